"""An architecture -> this rank's part of a Megatron-Core GPTModel, and its final hidden states instead of logits.

Shapes: B sequences, S padded length, H hidden, W this rank's slice of the padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Architecture, Experts, Rope
from opd_megatron.models.families import Activation
from opd_megatron.models.layer_options import LayerOptions, own_attention_reason
from opd_megatron.models.layers import block_spec
from opd_megatron.models.weight_map import is_expert
from opd_megatron.parallel.groups import ModelGroups

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


# What runs everywhere.
LOCAL = LayerOptions()


class ModelChunks(torch.nn.ModuleList):
    """What one rank holds of a model, as Megatron's schedules see it: one GPTModel, or `layout.virtual` of them, in the order in which text passes through.

    Between two of them text passes through all later pipeline stages. `logit_softcap` is the architecture's: our own head needs it, GPTModel has none.
    """

    def __init__(self, chunks: Iterable[GPTModel], logit_softcap: float | None) -> None:
        super().__init__(chunks)
        self.logit_softcap = logit_softcap

    def __iter__(self) -> Iterator[GPTModel]:
        return super().__iter__()  # type: ignore[return-value]

    @property
    def config(self) -> TransformerConfig:
        """The one configuration that all chunks share."""
        return self[0].config  # type: ignore[union-attr,return-value]

    @property
    def last(self) -> GPTModel:
        """The chunk that holds the LM head, if this rank does."""
        return self[-1]  # type: ignore[return-value]


def build_gpt(
    architecture: Architecture,
    groups: ModelGroups,
    *,
    precision: Literal["bf16", "fp32"],
    vocab_multiple: int,
    options: LayerOptions = LOCAL,
) -> ModelChunks:
    """Return this rank's layers and tensor slice, with Megatron's random initialization."""
    layout = groups.layout
    config = _transformer_config(architecture, layout, precision, options)
    chunks = []
    for chunk in range(layout.virtual):
        chunks.append(
            GPTModel(
                config,
                block_spec(architecture, config, layout, groups.stage, chunk if layout.virtual > 1 else None, options.kind),
                vocab_size=architecture.padded_vocab_size(layout.tensor, vocab_multiple),
                max_sequence_length=architecture.max_positions,
                pre_process=groups.is_first_stage and chunk == 0,
                post_process=groups.is_last_stage and chunk == layout.virtual - 1,
                position_embedding_type="rope",
                rotary_base=architecture.rope.theta,  # type: ignore[arg-type]
                rotary_percent=architecture.rope.fraction,
                share_embeddings_and_output_weights=architecture.tied,
                pg_collection=groups.collection,
                vp_stage=chunk if layout.virtual > 1 else None,
            )
        )
    for model in chunks:
        device = model.rotary_pos_emb.inv_freq.device
        # The same bits on every device; and a model built on the meta device, which has no bits, still has its frequencies.
        with torch.device("cpu"):
            model.rotary_pos_emb.inv_freq = inverse_frequencies(architecture.rope, architecture.head_dim).to(device)
        if model.pre_process and architecture.scaled_embeddings:
            _scale_embeddings(model, architecture.embedding_scale)
        for name, parameter in model.named_parameters():
            if is_expert(name):
                # Megatron says so where expert parallelism is used. But experts that are whole on every tensor rank always see other tokens than
                # on the next one, so their gradients belong to the expert data-parallel group, which spans tensor ranks.
                parameter.allreduce = False  # type: ignore[attr-defined]
        if options.kind == "te" and options.fused_gradients:
            from opd_megatron.models.te_layers import fuse_gradients  # where it is not installed, its modules are none

            fuse_gradients(model)
    return ModelChunks(chunks, architecture.logit_softcap)


def _transformer_config(architecture: Architecture, layout: ParallelLayout, precision: Literal["bf16", "fp32"], options: LayerOptions) -> TransformerConfig:
    dtype = DTYPES[precision]
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        softmax_scale=architecture.attention_scale,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[architecture.activation],
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        init_method_std=architecture.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Losses return sums and counts; Megatron divides once by the global count. DistributedDataParallel reads it when built.
        calculate_per_token_loss=True,
        # Weights always come from files; initializing on the CPU also spares CUDA's random state.
        use_cpu_initialization=not torch.cuda.is_available(),
        # Transformer Engine's modules fuse it by a switch of their own.
        gradient_accumulation_fusion=options.fused_gradients and options.kind == "local",
        # The fused forms of the local layers need Apex, and a bias that these architectures do not have.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **_virtual_settings(layout),
        **_expert_settings(architecture.experts, layout, grouped=options.kind == "te"),
        **options.transformer_settings(has_experts=architecture.experts is not None),
        **(_window_settings(architecture) if options.kind == "te" and own_attention_reason(architecture, layout, precision) is None else {}),
    )
    if architecture.rope.attention_factor != 1.0:
        _lengthen_rotated(config, architecture.rope.attention_factor)
    return config


def _lengthen_rotated(config: TransformerConfig, factor: float) -> None:
    """Multiply the cosines and sines of the rotation by a factor above 1.

    Megatron-Core applies one under the name of another method, YaRN, where the configuration has this attribute: 0.1 ln(scaling) + 1.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py
    """
    config.yarn_rotary_scaling_factor = math.exp(10 * (factor - 1))  # type: ignore[attr-defined]


def _scale_embeddings(model: GPTModel, scale: float) -> None:
    """Multiply what the embedding gives by a number, rounded to the weights' dtype as transformers does; a tied head uses the weights as they are."""

    rounded = float(torch.tensor(scale, dtype=model.config.params_dtype, device="cpu"))

    def scaled(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * rounded

    model.embedding.register_forward_hook(scaled)


def _virtual_settings(layout: ParallelLayout) -> dict[str, Any]:
    """Return what an interleaved pipeline needs.

    Its two directions are exchanged one by one: in a batch, over two stages whose next rank is also the previous one, gloo pairs the messages wrongly.
    """
    if layout.virtual == 1:
        return {}
    return {"virtual_pipeline_model_parallel_size": layout.virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False}


def _window_settings(architecture: Architecture) -> dict[str, Any]:
    """Return how Transformer Engine's attention is told of windows: how many positions a query sees before its own, in which layers. Ours knows them itself."""
    sizes = {window for window in architecture.windows if window is not None}
    if not sizes:
        return {}
    return {"window_size": (sizes.pop() - 1, 0), "window_attn_skip_freq": [int(window is not None) for window in architecture.windows]}


def _expert_settings(experts: Experts | None, layout: ParallelLayout, *, grouped: bool) -> dict[str, Any]:
    """Return what makes TransformerConfig's feed-forward a mixture of experts that routes as transformers' Qwen3MoeSparseMoeBlock; no token is dropped."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        # A softmax over the chosen logits alone is the softmax over all of them, scaled to a sum of one.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        # Distillation alone: no auxiliary loss.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        # One expert after another; with Transformer Engine in one grouped product, which stores the same tensors in a checkpoint.
        "moe_grouped_gemm": grouped,
    }


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Return the rotary frequencies [rotated dimensions / 2] in fp32, scaled as transformers' `modeling_rope_utils` defines it."""
    num_dims = rope.rotated_dims(head_dim)
    exponent = torch.arange(0, num_dims, 2, dtype=torch.int64).float() / num_dims
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta**exponent)
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    wavelength = 2 * math.pi / frequency
    low, high = rope.original_max_positions / rope.low_freq_factor, rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequency / rope.factor + smooth * frequency
    return torch.where(wavelength > low, frequency / rope.factor, torch.where(wavelength < high, frequency, blended))


def head_weight(chunks: ModelChunks) -> torch.Tensor:
    """Return this rank's slice [W, H] of the LM head; the embedding's where they are tied. Last stage only."""
    model = chunks.last
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def forget_routes(chunks: ModelChunks) -> None:
    """Drop what the dispatchers of experts keep of the last micro-batch.

    These tensors hold its graph, the graph holds the gradient hooks, and the hooks hold the model: a circle through C++ that Python never collects, so that a
    model that is not needed any more would keep its memory and its process groups.
    """
    for layer in (layer for model in chunks for layer in model.decoder.layers):
        dispatcher = getattr(layer.mlp, "token_dispatcher", None)
        kept = vars(dispatcher) if dispatcher is not None else {}
        kept.update({name: None for name, value in kept.items() if isinstance(value, torch.Tensor) and value.grad_fn is not None})


def keep_recomputed_gradients(chunks: ModelChunks) -> None:
    """Let layers that are computed again in the backward have gradients behind an embedding that does not train.

    Megatron-Core's checkpoint is a function of a layer's input alone: where that needs no gradient, the layer's weights silently get none.
    """

    def mark(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output

    for model in chunks:
        if model.pre_process:
            model.embedding.register_forward_hook(mark)


@contextmanager
def without_fp8(chunks: ModelChunks) -> Iterator[None]:
    """Compute in the weights' own precision: a decoding step has fewer tokens than 8-bit products take, and a comparison wants none of their rounding."""
    config = chunks.config
    fp8, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = fp8


@contextmanager
def hidden_states_only(chunks: ModelChunks) -> Iterator[None]:
    """Make the last stage's forward return final hidden states [B, S, H] (S / tensor under sequence parallelism) instead of logits.

    GPTModel has no hook before its output layer in 0.16; from 0.18 `forward(output_processor=...)` can replace this.
    """
    model = chunks.last
    if not model.post_process:
        yield
        return
    model.output_layer.forward = lambda hidden, weight=None, runtime_gather_output=None: (hidden, None)
    try:
        yield
    finally:
        del model.output_layer.forward
