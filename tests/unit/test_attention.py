"""Attention with windows and soft caps against scores written out, and its gradients against autograd's of them.

Not covered: layers and whole models (tests/distributed/test_conversion.py), context parallelism of windows (tests/distributed/test_conversion.py), CUDA.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

import opd_megatron.models.attention as attention
from opd_megatron.models.attention import SDPAttention
from opd_megatron.models.layers import packed_sequences

HEADS, GROUPS, SIZE = 4, 2, 8


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, softcap: float | None, window: int | None) -> torch.Tensor:
    """[Q, B, A, D] and [K, B, G, D] -> [Q, B, A * D]: one query of one head after another."""
    num_queries, num_keys = query.size(0), key.size(0)
    out = torch.empty(query.shape, dtype=query.dtype)
    rows = []
    for row in range(num_queries):
        position = num_keys - num_queries + row
        first = 0 if window is None else max(0, position - window + 1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            keys, values = key[first : position + 1, :, group], value[first : position + 1, :, group]
            scores = torch.einsum("bd,kbd->bk", query[row, :, head], keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(torch.einsum("bk,kbd->bd", scores.softmax(-1), values))
        rows.append(torch.stack(heads, dim=1))
    out = torch.stack(rows)
    return out.flatten(2)


def layer(*, scale: float | None = None, softcap: float | None, window: int | None) -> SDPAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=GROUPS, use_cpu_initialization=True)
    windows = (window,) if window is not None else ()
    return SDPAttention(config, 1, windows=windows, softcap=softcap, softmax_scale=scale, pg_collection=SimpleNamespace(cp=None))


def tensors(num_queries: int, num_keys: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_queries, batch, HEADS, SIZE), (num_keys, batch, GROUPS, SIZE), (num_keys, batch, GROUPS, SIZE))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).requires_grad_() for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(13, 13), (1, 13), (1, 1), (4, 13)])
def test_outputs_and_gradients_are_those_of_scores_written_out(
    window: int | None, softcap: float | None, num_queries: int, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three queries' scores at a time.
    monkeypatch.setattr(attention, "_MAX_SCORES", 3 * 2 * HEADS * num_keys)
    inputs = tensors(num_queries, num_keys)
    # `forward` takes a whole text or one query; several of a longer key are what a context rank has.
    ours = layer(scale=0.3, softcap=softcap, window=window)._attend(*inputs)
    theirs = naive(*inputs, scale=0.3, softcap=softcap, window=window)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("softcap", "window"), [(None, 4), (1.5, None), (1.5, 4)])
def test_a_decoding_step_sees_what_the_whole_text_showed_its_last_position(softcap: float | None, window: int | None) -> None:
    query, key, value = tensors(9, 9)
    whole = layer(softcap=softcap, window=window)(query, key, value, None)
    step = layer(softcap=softcap, window=window)(query[-1:], key, value, None)
    torch.testing.assert_close(step[0], whole[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("softcap", "window"), [(None, 4), (1.5, 4)])
def test_packed_sequences_do_not_see_each_other(softcap: float | None, window: int | None) -> None:
    texts = [tensors(length, length, batch=1, seed=length) for length in (7, 3, 9)]
    packed = [torch.cat([text[part][:, 0] for text in texts]) for part in range(3)]
    ours = layer(softcap=softcap, window=window)(*packed, None, packed_seq_params=packed_sequences([7, 3, 9]))
    alone = torch.cat([layer(softcap=softcap, window=window)(*text, None) for text in texts])
    torch.testing.assert_close(ours, alone)


def test_a_default_scale_is_that_of_a_head() -> None:
    inputs = tensors(6, 6)
    for softcap in (None, 1.5):
        torch.testing.assert_close(layer(softcap=softcap, window=None)(*inputs, None), naive(*inputs, scale=SIZE**-0.5, softcap=softcap, window=None))


def test_low_precision_gradients_of_capped_attention_stay_near() -> None:
    inputs = tensors(40, 40)
    short = tuple(x.detach().bfloat16().requires_grad_() for x in inputs)
    ours = layer(softcap=1.5, window=16)(*short, None)
    theirs = layer(softcap=1.5, window=16)(*inputs, None)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = zip(torch.autograd.grad(ours, short, upstream.bfloat16()), torch.autograd.grad(theirs, inputs, upstream), strict=True)
    for one, other in grads:
        assert float((one.double() - other).norm() / other.norm()) < 2e-2
