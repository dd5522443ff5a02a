"""Gemma 2: soft-capped scores and logits, norms before and after each block, scaled embeddings, a window in every other layer.

https://arxiv.org/abs/2408.00118, https://github.com/huggingface/transformers/tree/main/src/transformers/models/gemma2
"""

from opd_megatron.models.families.family import Family, TensorNames

FAMILY = Family(
    name="gemma2",
    class_name="Gemma2ForCausalLM",
    defaults={
        **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "query_pre_attn_scalar": 256},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    only={"attention_bias": False, "use_bidirectional_attention": False},
    activation_key="hidden_activation",
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    windows="every other layer, first included",
    attention_scalar_key="query_pre_attn_scalar",
    attention_softcap_key="attn_logit_softcapping",
    logit_softcap_key="final_logit_softcapping",
    zero_centered_norms=True,
    scaled_embeddings=True,
    tensors=TensorNames(
        attention_output_norm="post_attention_layernorm",
        feed_forward_norm="pre_feedforward_layernorm",
        feed_forward_output_norm="post_feedforward_layernorm",
    ),
)
