"""One matrix's update by its singular values: how concentrated it is, where an early one points, and parts of it.

Everything is of EffOPD's Property 2 (arXiv 2605.11739, Table 1), and norms are Frobenius norms. Pure functions of tensors, in fp32.

Shapes: M rows and N columns; R = min(M, N) singular values, the largest first; K of the first directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Subspaces of 1 to this many directions are compared.
COMPARED_DIRECTIONS = 20


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What the singular values sigma_1 >= ... >= sigma_r of an update say, r its rank in fp32."""

    spectral_norm: float
    # sigma_1 / sqrt(sum sigma_i^2): 1 for a single direction, 1 / sqrt(r) for r equal ones.
    spectral_share: float
    # exp(- sum s_i log s_i), s_i = sigma_i / sum sigma_j: 1 for a single direction, r for r equal ones.
    effective_rank: float
    rank: int
    # sqrt(sum_{i <= k} sigma_i^2 / sum sigma_j^2), k = ceil(r / 100): a share of the norm, not of its square.
    top_share: float


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How far an early update's first left directions are the final one's: see `subspace_alignment`."""

    cosine: float
    # What directions drawn at random would have, about: narrow matrices are alike by their size alone.
    by_chance: float
    # |cosine| of the first directions alone.
    first_cosine: float
    num_subspaces: int


def frobenius_norm(tensor: torch.Tensor) -> float:
    """Return the norm of a tensor of any shape, summed in fp64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def numerical_rank(singular_R: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> int:
    """Return how many singular values are above sigma_1 * max(M, N) * eps of fp32: what rounding alone makes is below."""
    return int((singular_R > singular_R[0] * max(shape) * torch.finfo(torch.float32).eps).sum())


def spectrum_of(singular_R: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> Spectrum | None:
    """Return the spectrum of an M x N matrix with these singular values; None for a matrix of zeros, which has none."""
    rank = numerical_rank(singular_R, shape)
    if rank == 0:
        return None
    sigma_R = singular_R[:rank].double()
    share_R, square_R = sigma_R / sigma_R.sum(), sigma_R.square()
    return Spectrum(
        spectral_norm=float(sigma_R[0]),
        spectral_share=float(sigma_R[0] / square_R.sum().sqrt()),
        effective_rank=float((-(share_R * share_R.log()).sum()).exp()),
        rank=rank,
        top_share=float((square_R[: math.ceil(rank / 100)].sum() / square_R.sum()).sqrt()),
    )


def subspace_alignment(early_MK: torch.Tensor, final_MK: torch.Tensor) -> Alignment:
    """Return the mean over k = 1..K of the cosine between the spans of the first k columns of two matrices with orthonormal columns.

    The cosine of two subspaces is ||U_k^T V_k||_F / sqrt(k), the root mean square of the cosines of their k principal angles. The paper does not say which it
    takes. This one is |cos| for k = 1, 1 for equal subspaces whatever basis each has, and sqrt(k / M) for random ones, so that chance can be told.
    """
    count = min(early_MK.size(1), final_MK.size(1))
    squared_KK = (early_MK[:, :count].T @ final_MK[:, :count]).double().square()
    sizes_K = torch.arange(1, count + 1, dtype=torch.float64, device=squared_KK.device)
    cosine_K = (squared_KK.cumsum(0).cumsum(1).diagonal() / sizes_K).sqrt().clamp(max=1)
    return Alignment(
        cosine=float(cosine_K.mean()),
        by_chance=float((sizes_K / early_MK.size(0)).sqrt().mean()),
        first_cosine=float(cosine_K[0]),
        num_subspaces=count,
    )


def first_directions(delta_MN: torch.Tensor, count: int = COMPARED_DIRECTIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all singular values [R] and the first left directions [M, K], K = `count` or the rank where that is less."""
    left_MR, singular_R, _ = torch.linalg.svd(delta_MN, full_matrices=False)
    return singular_R, left_MR[:, : min(count, numerical_rank(singular_R, delta_MN.shape))]


def top_directions(delta_MN: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the first ceil(fraction * rank) directions of an update, lengthened to its norm; zeros stay zeros."""
    left_MR, singular_R, right_RN = torch.linalg.svd(delta_MN, full_matrices=False)
    # 0.07 * 100 is a little above 7.
    kept = math.ceil(round(fraction * numerical_rank(singular_R, delta_MN.shape), 9))
    return with_norm((left_MR[:, :kept] * singular_R[:kept]) @ right_RN[:kept], frobenius_norm(delta_MN))


def tail_directions(delta_MN: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the last floor(fraction * rank) directions of an update as long as they are: the control of `top_directions`, which the paper does not rescale."""
    left_MR, singular_R, right_RN = torch.linalg.svd(delta_MN, full_matrices=False)
    rank = numerical_rank(singular_R, delta_MN.shape)
    first = rank - math.floor(round(fraction * rank, 9))
    return (left_MR[:, first:rank] * singular_R[first:rank]) @ right_RN[first:rank]


def with_norm(early: torch.Tensor, final_norm: float, beta: float = 1.0) -> torch.Tensor:
    """Return an early update moved towards the norm of the final one, dW (1 + beta (||final|| - ||dW||) / ||dW||): beta 1 reaches it.

    Zeros stay zeros: they have no direction.
    """
    norm = frobenius_norm(early)
    return early * (1 + beta * (final_norm - norm) / norm) if norm else early
