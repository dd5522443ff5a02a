"""Qwen2 and Qwen2.5, dense: biases on query, key and value.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen2
"""

from opd_megatron.models.families.family import Family

FAMILY = Family(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    defaults={
        **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    },
    # `attention_bias` is not a key of this family: the biases are always there.
    only={"mlp_bias": False},
    windows="layers from max_window_layers on",
    windows_asked_by="use_sliding_window",
    qkv_bias=True,
)
