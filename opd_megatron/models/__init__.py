"""Hugging Face configurations and weights <-> Megatron-Core models. `architecture` and `hf_folder` need no torch."""
