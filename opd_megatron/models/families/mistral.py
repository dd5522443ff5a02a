"""Mistral 7B, Nemo, Small and Large (dense, text): Llama's tensors; version 0.1 attends to its last 4096 positions alone.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/mistral
"""

from opd_megatron.models.families.family import Family

FAMILY = Family(
    name="mistral",
    class_name="MistralForCausalLM",
    # A file without `sliding_window` means 4096; those of later versions say null.
    defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8, "sliding_window": 4096},
    # With layers of several kinds, transformers makes another model of the same file, Ministral.
    only={"attention_bias": False, "mlp_bias": False, "layer_types": None},
    windows="every layer",
)
