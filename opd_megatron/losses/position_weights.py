"""How much a token counts for its place in the response (PW-OPSD, arXiv 2605.21606, and the authors' code). Shapes: T tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd_megatron.losses.step_tokens import as_list

SMALLEST_SLOPE = 1e-6


def position_weights(
    response_lengths: Sequence[int] | torch.Tensor, *, minimum: float = 0.25, center: float = 0.30, slope: float = 0.10, normalize: bool = False
) -> torch.Tensor:
    """Return w = minimum + (1 - minimum) sigmoid((f - center)/slope) of every token, fp32 [T], where f = (t - 0.5)/L is its place in its own response.

    t counts from 1 to the response's own length L: neither padding nor other responses matter. The paper's weights average 0.771 and are left so;
    `normalize` divides by the mean of the response. A slope below 1e-6 counts as 1e-6. The result lies where a tensor of lengths does, else on the host.
    Raises ValueError for a minimum outside [0, 1], a center that is not finite or a negative slope.
    """
    if not 0 <= minimum <= 1:
        raise ValueError(f"minimum={minimum} must be in [0, 1]")
    if not math.isfinite(center):
        raise ValueError(f"center={center} must be finite")
    if not 0 <= slope < math.inf:
        raise ValueError(f"slope={slope} must not be negative or infinite; late tokens weigh more, 0 is a step")
    lengths_B = torch.tensor(as_list(response_lengths), dtype=torch.int64)
    if (lengths_B < 0).any():
        raise ValueError(f"response_lengths must not be negative, got {lengths_B.min()}")
    response_T = torch.arange(len(lengths_B)).repeat_interleave(lengths_B)
    index_T = torch.arange(len(response_T)) - (lengths_B.cumsum(0) - lengths_B)[response_T]
    place_T = (index_T + 0.5).double() / lengths_B[response_T]
    weight_T = minimum + (1 - minimum) * torch.sigmoid((place_T - center) / max(slope, SMALLEST_SLOPE))
    if normalize:
        sum_B = torch.zeros(len(lengths_B), dtype=torch.float64).index_add_(0, response_T, weight_T)
        # A response of which all weights are 0 keeps them.
        weight_T = weight_T * (lengths_B / sum_B.clamp_min(torch.finfo(torch.float64).tiny))[response_T]
    return weight_T.float().to(response_lengths.device if isinstance(response_lengths, torch.Tensor) else "cpu")
