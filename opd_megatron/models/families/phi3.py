"""Phi-4-mini, and Phi-3 mini and medium: query, key and value in one tensor, gate and up in another, a part of each head unrotated.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/phi3
"""

from opd_megatron.models.families.family import Family, TensorNames

FAMILY = Family(
    name="phi3",
    class_name="Phi3ForCausalLM",
    defaults={
        **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        **{"tie_word_embeddings": False, "sliding_window": None},
    },
    rope_kinds=("default", "longrope"),
    partial_rotary=True,
    windows="every layer",
    tensors=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)
