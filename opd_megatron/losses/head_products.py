"""The three matrix products of an LM head, with fp32 results from low-precision operands.

Logits rounded to bf16 and then widened change the divergence by little and its gradient by 4 to 23 % (linkedin/Liger-Kernel#1432), so the
product itself must deliver fp32. CUDA does so (`out_dtype`). Elsewhere the operands are widened, the head one tile of rows at a time: widening
it whole would cost a [W, H] fp32 tensor, and a tile is read from cache by the product that follows.

Shapes: N tokens of one chunk, W = this rank's slice of the vocabulary, H hidden size.
"""

from collections.abc import Iterator

import torch

HEAD_TILE_BYTES = 1 << 20


def head_logits(hidden_NH: torch.Tensor, head_WH: torch.Tensor, dtype: torch.dtype, out_NW: torch.Tensor | None = None) -> torch.Tensor:
    """Return hidden @ head^T in `dtype`, fp32 or fp64, without rounding to the operands' dtype on the way; in `out_NW` where that helps."""
    if hidden_NH.dtype == dtype:
        return torch.mm(hidden_NH, head_WH.T, out=out_NW)
    if hidden_NH.is_cuda:
        return torch.mm(hidden_NH, head_WH.T, out_dtype=dtype)
    hidden_NH = hidden_NH.to(dtype)
    logits_NW = hidden_NH.new_empty((hidden_NH.size(0), head_WH.size(0))) if out_NW is None else out_NW
    for columns, tile_H in _head_tiles(head_WH, dtype):
        torch.mm(hidden_NH, tile_H.T, out=logits_NW[:, columns])
    return logits_NW


def hidden_gradient(grad_NW: torch.Tensor, head_WH: torch.Tensor) -> torch.Tensor:
    """Return grad @ head, this rank's part of the gradient of the hidden states, in the head's dtype.

    The gradient of the logits is rounded to it once, as the result is: relative errors of 2^-9 that do not add up, unlike those of rounded logits.
    """
    return grad_NW.to(head_WH.dtype) @ head_WH


def add_head_gradient_(total_WH: torch.Tensor, grad_NW: torch.Tensor, hidden_NH: torch.Tensor) -> None:
    """Add grad^T @ hidden to the head's gradient, which is kept in the dtype of `grad_NW`."""
    if hidden_NH.dtype != grad_NW.dtype and hidden_NH.is_cuda:
        total_WH.add_(torch.mm(grad_NW.to(hidden_NH.dtype).T, hidden_NH, out_dtype=total_WH.dtype))
    else:
        total_WH.addmm_(grad_NW.T, hidden_NH.to(grad_NW.dtype))


def _head_tiles(head_WH: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of the vocabulary with those rows of the head widened to `dtype`."""
    num_rows, hidden_size = head_WH.shape
    step = max(1, HEAD_TILE_BYTES // (dtype.itemsize * max(hidden_size, 1)))
    for first in range(0, num_rows, step):
        columns = slice(first, min(first + step, num_rows))
        yield columns, head_WH[columns].to(dtype)
