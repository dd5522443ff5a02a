"""How kept tokens and position weights become one weight per token and one divisor per step. Shapes: T tokens, B responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from opd_megatron.losses.step_tokens import as_list, require_lengths

REDUCTIONS = ("token", "sequence")
DENOMINATORS = ("kept", "weights", "all")


class TokenWeights(NamedTuple):
    """The loss of the step is sum_t weight_t d_t / divisor. A divisor of 0 says that nothing is kept: skip the step, on every rank."""

    weight_T: torch.Tensor
    divisor: float


def token_weights(
    kept_T: torch.Tensor,
    position_T: torch.Tensor,
    response_lengths: Sequence[int] | torch.Tensor,
    *,
    reduction: str = "token",
    denominator: str = "kept",
) -> TokenWeights:
    """Return the weight of every token, fp32 [T], and the divisor of their weighted sum, for selection k and position weight w of **all tokens of the step**.

        token      sum_t k w d / D                            D over all tokens of the step
        sequence   mean over responses of sum_t k w d / D_i    D_i over the response; responses with D_i = 0 are left out of the mean

    D is the sum of k ("kept"), of k w ("weights"), or the number of tokens ("all", where a lower ratio shrinks the gradient as a lower learning rate
    would). k is 1 or 0, or 1/π, whose sum estimates the number of tokens.

    The weights then hold for any split: a micro-batch, a data-parallel or a context-parallel rank takes the entries of its tokens, adds up
    weight d, and the divisor is applied once to the sum over all of them. Computed for a part of the step they would be another loss.
    Raises ValueError for an unknown name or lengths that do not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; use one of {', '.join(REDUCTIONS)}")
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator={denominator!r} is not known; use one of {', '.join(DENOMINATORS)}")
    lengths = as_list(response_lengths)
    if kept_T.shape != position_T.shape:
        raise ValueError(f"kept_T and position_T must have one shape, not {tuple(kept_T.shape)} and {tuple(position_T.shape)}")
    require_lengths(lengths, kept_T.numel())
    kept_T, position_T = kept_T.detach().double(), position_T.detach().double()
    weight_T = kept_T * position_T
    part_T = {"kept": kept_T, "weights": weight_T, "all": torch.ones_like(kept_T)}[denominator]
    if reduction == "token":
        return TokenWeights(weight_T.float(), part_T.sum().item())
    lengths_B = torch.tensor(lengths, dtype=torch.int64, device=kept_T.device)
    response_T = torch.arange(len(lengths), device=kept_T.device).repeat_interleave(lengths_B)
    divisor_B = torch.stack([part.sum() for part in part_T.split(lengths)]) if lengths else part_T.new_zeros(0)
    # Where the divisor of a response is 0, so are its weights.
    weight_T = weight_T / divisor_B.masked_fill(divisor_B == 0, 1)[response_T]
    return TokenWeights(weight_T.float(), float(divisor_B.count_nonzero()))
