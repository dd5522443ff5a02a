"""The facts that a Megatron-Core GPTModel is built from, and the layouts that divide it. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.config import ParallelLayout, fp8_multiple
from opd_megatron.models.families import FAMILIES, Activation, TensorNames


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding: `kind` is default, linear, llama3 or longrope; the other fields follow transformers' `rope_parameters`."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    # The part of each head, its first dimensions, that is rotated.
    fraction: float = 1.0
    # longrope divides each frequency by its own number, and lengthens the rotated part of queries and keys by one.
    short_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def rotated_dims(self, head_dim: int) -> int:
        """Return how many dimensions of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts that is the feed-forward of every layer: each token visits `experts_per_token` of `num_experts`."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # Whether the weights of a token's experts are scaled to a sum of one.
    norm_topk_prob: bool
    # What the model was pre-trained with; distillation adds no such term.
    aux_loss_coefficient: float


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of one of the `families`, dense where `experts` is None."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope: Rope
    max_positions: int
    init_std: float
    experts: Experts | None = None
    activation: Activation = "silu"
    # Attention scores are multiplied by this; None is head_dim ** -0.5.
    attention_scale: float | None = None
    # cap * tanh(score / cap), before the mask.
    attention_softcap: float | None = None
    # The same of logits, before a temperature.
    logit_softcap: float | None = None
    # Of each layer, how many positions it attends to, its own the last of them; None is all. Empty where no layer has such a window.
    windows: tuple[int | None, ...] = ()
    zero_centered_norms: bool = False
    scaled_embeddings: bool = False

    @property
    def tensors(self) -> TensorNames:
        """The Hugging Face names of its tensors."""
        return FAMILIES[self.family].tensors

    @property
    def norms_outputs(self) -> bool:
        """Whether what attention and the feed-forward add to the residual stream is normed."""
        return self.tensors.attention_output_norm is not None

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return self.hidden_size**0.5 if self.scaled_embeddings else 1.0

    def padded_vocab_size(self, tensor: int, multiple: int) -> int:
        """Return the vocabulary size rounded up so that every tensor rank holds the same multiple of `multiple` rows."""
        unit = tensor * multiple
        return math.ceil(self.vocab_size / unit) * unit

    def check_layout(self, role: str, layout: ParallelLayout) -> None:
        """Raise ValueError unless heads, layers, and feed-forward width or experts divide over the layout."""
        if self.experts is None:
            for axis, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
                if size > 1:
                    raise ValueError(f"{role}.layout.{axis}={size} spreads experts, and the {role} is a dense {self.family} model without any; use 1")
        for what, count, axis, size in (
            ("attention heads", self.num_heads, "tensor", layout.tensor),
            ("key-value heads", self.num_kv_heads, "tensor", layout.tensor),
            ("layers", self.num_layers, "pipeline", layout.pipeline),
            (f"layers of a stage (layout.pipeline={layout.pipeline})", self.num_layers // layout.pipeline, "virtual", layout.virtual),
            *self._split_feed_forward(layout),
        ):
            if count % size:
                fits = [n for n in range(1, count + 1) if count % n == 0 and n <= 64]
                raise ValueError(f"{role}.layout.{axis}={size} does not divide the {role}'s {count} {what}; use one of {fits}")

    def _split_feed_forward(self, layout: ParallelLayout) -> list[tuple[str, int, str, int]]:
        """Return what of the feed-forward is split: its columns, or the set of experts and each expert's columns."""
        if self.experts is None:
            return [("feed-forward columns", self.ffn_hidden_size, "tensor", layout.tensor)]
        return [
            ("experts", self.experts.num_experts, "expert", layout.expert),
            ("columns of an expert", self.experts.ffn_hidden_size, "expert_tensor", layout.expert_tensor),
        ]

    def check_fp8(self, role: str, layout: ParallelLayout, scaling: str | None) -> None:
        """Raise ValueError where a side of a weight on one rank is not a multiple of what products of 8-bit floats take."""
        multiple, experts = fp8_multiple(scaling), self.experts
        for what, whole, parts in (
            ("hidden size", self.hidden_size, 1),
            ("queries, keys and values", (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, layout.tensor),
            ("heads", self.num_heads * self.head_dim, layout.tensor),
            *([("feed-forward", self.ffn_hidden_size, layout.tensor)] if experts is None else [("expert", experts.ffn_hidden_size, layout.expert_tensor)]),
        ):
            if whole // parts % multiple:
                raise ValueError(
                    f"training.fp8={scaling} takes sizes that are multiples of {multiple} on a rank, and the {role}'s {what} has {whole} / {parts} = "
                    f"{whole // parts}; use fewer tensor ranks, or training.fp8=null"
                )

    def check_training(self, role: str, layout: ParallelLayout) -> None:
        """Raise ValueError where Megatron-Core runs a model under a layout but does not train it."""
        if self.experts is not None and layout.tensor > 1 and not layout.sequence:
            raise ValueError(
                f"{role}.layout.tensor={layout.tensor} trains a mixture of experts only under sequence parallelism: every tensor rank would send the same "
                f"tokens to the experts; set {role}.layout.sequence=true, or tensor=1"
            )


def present_modules(modules: Sequence[str], *, has_experts: bool) -> list[str]:
    """Return those modules that a model has; Megatron-Core refuses to be asked for parts of experts that are not there."""
    return [module for module in modules if has_experts or module not in ("moe", "moe_act")]
