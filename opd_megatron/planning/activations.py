"""What autograd keeps for the backward, per token.

The terms follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), section 4, which
counts the tensors that each operation of a layer saves and divides them by the tensor-parallel size t, those between the split parts only
under sequence parallelism. Adapted to what the layers here do: SwiGLU in place of GeLU, grouped-query attention, flash attention (no scores,
but a logarithm of their sum per head), RMSNorm on queries and keys, rotary embedding, no dropout. Under full recomputation only the inputs of layers
are kept, and one layer at a time is whole again in the backward; under selective recomputation the inputs of the modules that are computed again.
A mixture of experts is counted with balanced routing: every rank computes as many copies of tokens as it sends out, and where experts are split, those of
all ranks that have a part of them. Left out: the last micro-batch's routes, which its dispatchers keep beside autograd (5 bytes a token, expert and layer).
`tests/distributed/test_planned_activations.py` compares the sum with what PyTorch saves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Architecture, Experts

FP32_BYTES = 4
# torch.topk and token indices are int64.
_INDEX_BYTES = 8


@dataclass(frozen=True)
class ActivationTerm:
    """Bytes that one layer keeps for one token; `why` says what they are."""

    num_bytes: float
    why: str


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """Positions of one micro-batch on a rank: `num_rows` rows, or one row of packed sequences."""

    num_tokens: int
    num_rows: int
    packed: bool
    # Positions of the longest sequence, before any split.
    longest: int


# Modules that are computed again in the backward: core_attn, mlp, moe. The others need Transformer Engine's layers, and plans are of local ones.
Modules = Collection[str]


def layer_activations(architecture: Architecture, layout: ParallelLayout, shape: MicroBatchShape, itemsize: int, again: Modules = ()) -> list[ActivationTerm]:
    """Return what one layer saves for one token of a micro-batch: h hidden, f feed-forward, a heads and g key-value heads of size d, t tensor.

    Of modules that are computed `again` it saves their inputs alone.
    """
    hidden, tensor = architecture.hidden_size, layout.tensor
    heads, kv_heads, head_dim = architecture.num_heads / tensor, architecture.num_kv_heads / tensor, architecture.head_dim
    whole = tensor if layout.sequence else 1
    rotated = architecture.rope.rotated_dims(head_dim)
    # With one key-value head a rank the queries of the fused projection are contiguous; otherwise they are copied out of it.
    copied_heads = heads if architecture.qk_norm and kv_heads > 1 else 0
    normed_heads = heads + kv_heads if architecture.qk_norm else 0
    attends_again = "core_attn" in again
    # Held as values, which are a view of it, or as the keys that a norm reads; gathered values are not.
    projected_heads = heads + 2 * kv_heads if layout.context == 1 or architecture.qk_norm or attends_again else 0
    feeds_again = ("moe" if architecture.experts else "mlp") in again
    # Of the norms behind a block, the feed-forward's is a part of it.
    num_norms = (3 if feeds_again else 4) if architecture.norms_outputs else 2
    keeps_scores = not architecture.attention_softcap and not attends_again
    return [
        ActivationTerm(num_norms * norm_itemsize(architecture, itemsize) * hidden / whole, f"inputs of {num_norms} norms: {num_norms}h"),
        ActivationTerm(2 * itemsize * hidden / whole, "inputs of the query-key-value and the gate-up projection, or of the router: 2h"),
        ActivationTerm(itemsize * projected_heads * head_dim, "queries, keys and values as projected: (a + 2g) d / t"),
        ActivationTerm(itemsize * copied_heads * head_dim, "queries again, as their norm reads them: a d / t"),
        *_attention(heads * head_dim, kv_heads * head_dim, 1 if attends_again else layout.context, itemsize, packed=shape.packed, keeps_output=keeps_scores),
        # Capped attention keeps nothing of its scores.
        ActivationTerm(FP32_BYTES * heads if keeps_scores else 0, "logarithm of the sum of attention scores, fp32: a / t"),
        ActivationTerm(FP32_BYTES * (num_norms / whole + normed_heads), "one fp32 number of every norm"),
        # One row per position, whatever the number of sequences.
        ActivationTerm(4 * itemsize * rotated / shape.num_rows, "cosines and sines of the rotation of queries and of keys: 4d a position"),
        *([] if feeds_again else _block(architecture, layout, whole, itemsize)),
    ]


def _block(architecture: Architecture, layout: ParallelLayout, whole: int, itemsize: int) -> list[ActivationTerm]:
    if architecture.experts:
        return _experts(architecture.experts, architecture.hidden_size, whole, layout.expert_tensor, itemsize)
    return _feed_forward(architecture.ffn_hidden_size / layout.tensor, itemsize)


def norm_itemsize(architecture: Architecture, itemsize: int) -> int:
    """Return the bytes of a number that a norm reads: those that multiply by 1 + weight do so in fp32."""
    return FP32_BYTES if architecture.zero_centered_norms else itemsize


def _attention(query_width: float, key_width: float, context: int, itemsize: int, *, packed: bool, keeps_output: bool) -> list[ActivationTerm]:
    """Return what attention saves for one token; over context ranks it reads keys and values of all, and joins two outputs; packed, one a sequence.

    Flash attention `keeps_output`, for its backward, beside the joined one that the next projection reads.
    """
    if context == 1:
        outputs = 2 if packed and keeps_output else 1
        return [
            ActivationTerm(itemsize * (query_width + key_width), "queries and keys after rotation: (a + g) d / t"),
            ActivationTerm(outputs * itemsize * query_width, "output of attention, of each packed sequence and joined: a d / t, packed 2 a d / t"),
        ]
    return [
        ActivationTerm(itemsize * query_width, "queries after rotation: a d / t"),
        ActivationTerm(itemsize * 2 * key_width * context, "keys and values of all context ranks: 2 g d / t for each"),
        ActivationTerm((2 if keeps_output else 1) * itemsize * query_width, "outputs of attention, of both chunks and joined: 2 a d / t"),
    ]


def _feed_forward(ffn: float, itemsize: int) -> list[ActivationTerm]:
    # Megatron-Core adds an offset of 0 to the up projection, which copies it.
    return [ActivationTerm(5 * itemsize * ffn, "gate and up, silu of gate, up plus its offset, their product: 5f / t")]


def _experts(experts: Experts, hidden: int, whole: int, parts: int, itemsize: int) -> list[ActivationTerm]:
    """Return what a router and its experts keep of one token, which k of E experts of width f see; split over ranks as the sequence is.

    Each of the x `parts` of an expert reads the copies of x ranks, and has 1 / x of its width.
    """
    chosen, num_experts, ffn = experts.experts_per_token, experts.num_experts, experts.ffn_hidden_size
    # The softmax is over the chosen experts, or over all where their weights are not scaled to a sum of one.
    weighed = chosen if experts.norm_topk_prob else num_experts
    return [
        ActivationTerm((_INDEX_BYTES * chosen + FP32_BYTES * weighed) / whole, "router: ids of the chosen experts, softmax in fp32"),
        ActivationTerm((FP32_BYTES + 1) * num_experts / whole, "weights in fp32 and whether chosen, of every expert: 5 E bytes"),
        ActivationTerm((_INDEX_BYTES + FP32_BYTES * parts) * chosen / whole, "place of every copy, and its weight on x ranks: (8 + 4 x) k bytes"),
        ActivationTerm(itemsize * chosen * hidden * parts / whole, "copies that experts read, of x ranks: k h x"),
        ActivationTerm(6 * itemsize * chosen * ffn / whole, "gate and up, silu of gate, up plus its offset, their product, the same weighed: 6 k f"),
    ]


def layer_bytes(architecture: Architecture, layout: ParallelLayout, shape: MicroBatchShape, itemsize: int, again: Modules = ()) -> int:
    """Return the bytes that one layer saves of one micro-batch."""
    return round(shape.num_tokens * sum(term.num_bytes for term in layer_activations(architecture, layout, shape, itemsize, again)))


def chunk_activation_bytes(
    architecture: Architecture,
    layout: ParallelLayout,
    shape: MicroBatchShape,
    *,
    itemsize: int,
    num_layers: int,
    is_last: bool,
    recompute: bool,
    again: Modules = (),
) -> int:
    """Return the bytes of one micro-batch on a stage, or on one of its chunks: its layers, and the last norm's input or what is sent on.

    Recomputed whole, a layer keeps its input alone, and all of them together the angles of the rotation.
    """
    whole = layout.tensor if layout.sequence else 1
    row = shape.num_tokens * itemsize * architecture.hidden_size // whole
    end = shape.num_tokens * (FP32_BYTES + architecture.hidden_size * norm_itemsize(architecture, itemsize)) // whole if is_last else row
    if recompute:
        return num_layers * row + FP32_BYTES * shape.longest // layout.context * architecture.rope.rotated_dims(architecture.head_dim) + end
    return num_layers * layer_bytes(architecture, layout, shape, itemsize, again) + end


def forward_bytes_per_token(architecture: Architecture, layout: ParallelLayout, *, itemsize: int, num_layers: int) -> int:
    """Return what a forward without gradients holds of one token at its widest, in a feed-forward layer; no sequence is split there.

    4h: the inputs of the stage, the layer, the norm after attention, and the feed-forward. Then, dense, 5f / t; with experts, beside the routes that all
    `num_layers` layers keep, k h for the copies as sent, again as arrived where they go to other ranks, and three times as the experts see them: sorted, and
    the outputs before and after they are joined. The x parts of split experts see the copies of x ranks, and their outputs are summed in fp32.
    """
    hidden, experts, parts = architecture.hidden_size, architecture.experts, layout.expert_tensor
    if experts is None:
        return round(itemsize * (4 * hidden + 5 * architecture.ffn_hidden_size / layout.tensor))
    sent, routes = 2 if layout.expert > 1 else 1, (FP32_BYTES + 1) * experts.num_experts + _INDEX_BYTES * experts.experts_per_token
    # One more copy of each in fp32, if outputs have another dtype, and the sum.
    summed = FP32_BYTES * (1 + (parts if itemsize < FP32_BYTES else 0)) if parts > 1 else 0
    copies = (itemsize * (sent + 3 * parts) + summed) * experts.experts_per_token
    return (itemsize * 4 + copies) * hidden + num_layers * routes
