"""Qwen3, dense: queries and keys of each head are normed; the size of a head is its own number.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen3
"""

from opd_megatron.models.families.family import Family, TensorNames

FAMILY = Family(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    defaults={
        **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        # Whatever the hidden size.
        "head_dim": 128,
        **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    },
    windows="layers from max_window_layers on",
    windows_asked_by="use_sliding_window",
    tensors=TensorNames(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)
