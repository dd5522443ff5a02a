"""Llama 2, 3, 3.1, 3.2 and 3.3: the plain decoder that the others are told apart from.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama
"""

from opd_megatron.models.families.family import Family

FAMILY = Family(
    name="llama",
    class_name="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
)
