"""Tiny models and tokenizers for tests, made on the spot by transformers itself with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tools.make_tiny_models import tiny_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# As in Phi-4-mini: 12 of 16 dimensions are rotated, each frequency is divided by a number of its own, and more than 128 positions would have other numbers.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.25, 1.4, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 128,
}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    # A head dimension that is not hidden / heads.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 24, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    # Windows shorter than the texts of tests.
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 24, "sliding_window": 12}),
    # Caps that scores and logits of these random weights come near, and a scale that is not a head's.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            **{"head_dim": 24, "sliding_window": 12, "query_pre_attn_scalar": 20, "hidden_activation": "gelu_pytorch_tanh"},
            **{"attn_logit_softcapping": 0.3, "final_logit_softcapping": 4.0},
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
}


def write_tiny_model(
    folder: Path, family: str = "qwen3", *, tied: bool = False, vocab_size: int = 262, seed: int = 0, scale: float = 1.0, **changes: Any
) -> Path:
    """Write a Hugging Face folder of 4 layers with 4 heads in 2 key-value groups; every norm and bias is random, so that no swap goes unseen."""
    config_class, model_class, extra = _FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"vocab_size": vocab_size, "max_position_embeddings": 256, "dtype": "float32", "tie_word_embeddings": tied, **sizes, **extra, **changes}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings, eos_token_id=258, bos_token_id=None, pad_token_id=256))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 0.5).add_(0.0 if name.endswith("bias") or family == "gemma2" else 1.0)
            else:
                parameter.mul_(3.0 * scale)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
