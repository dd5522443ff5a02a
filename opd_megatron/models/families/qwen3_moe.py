"""Qwen3 mixtures of experts: Qwen3's attention, experts in every layer.

https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen3_moe
"""

from opd_megatron.models.families.family import Family, TensorNames

FAMILY = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    defaults={
        **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        **{"use_sliding_window": False, "sliding_window": 4096},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    },
    # What other mixtures do in some of their layers only.
    only={"attention_bias": False, "mlp_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    windows="every layer",
    windows_asked_by="use_sliding_window",
    has_experts=True,
    tensors=TensorNames(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)
