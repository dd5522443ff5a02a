"""The numbers that describe an update, against their definitions in numpy, and on matrices whose numbers are known.

Reading updates from checkpoints and what parts of them are worth are in tests/distributed/test_update_analysis.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opd_megatron.analysis.experiments import SCALES, plan_experiments
from opd_megatron.analysis.measure import Measured, TensorUpdate, group, grouped
from opd_megatron.analysis.spectra import (
    first_directions,
    frobenius_norm,
    numerical_rank,
    spectrum_of,
    subspace_alignment,
    tail_directions,
    top_directions,
    with_norm,
)
from opd_megatron.models.modules import layer_of, module_kind
from opd_megatron.models.weight_map import weight_map
from tests.model_configs import architecture_of

# Of fp32 arithmetic on matrices of up to 200 numbers a side.
CLOSE = {"rel": 1e-5}


def matrix(rows: int, columns: int, singular: list[float], seed: int = 0) -> torch.Tensor:
    """Return a matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(singular), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(singular), generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(singular, dtype=torch.float64) @ right.T).float()


def spectrum(delta: torch.Tensor):
    found = spectrum_of(torch.linalg.svdvals(delta), delta.shape)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (7, 7)])
def test_a_matrix_of_one_direction_is_all_in_it(shape: tuple[int, int]) -> None:
    found = spectrum(matrix(*shape, [3.0]))
    assert found.rank == 1
    assert found.spectral_norm == pytest.approx(3.0, **CLOSE)
    assert (found.spectral_share, found.effective_rank, found.top_share) == pytest.approx((1.0, 1.0, 1.0), **CLOSE)


@pytest.mark.parametrize("rank", [1, 40, 100, 101, 200])
def test_equal_directions_share_the_norm(rank: int) -> None:
    found = spectrum(matrix(220, 200, [2.0] * rank))
    assert found.rank == rank
    assert found.effective_rank == pytest.approx(rank, **CLOSE)
    assert found.spectral_share == pytest.approx(1 / math.sqrt(rank), **CLOSE)
    assert found.top_share == pytest.approx(math.sqrt(math.ceil(rank / 100) / rank), **CLOSE)


def test_the_numbers_are_those_of_their_definitions() -> None:
    delta = np.random.default_rng(0).normal(size=(150, 210)).astype(np.float32)
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    share = sigma / sigma.sum()
    found = spectrum(torch.from_numpy(delta))
    assert found.rank == 150
    assert found.spectral_norm == pytest.approx(np.linalg.norm(delta, 2), **CLOSE)
    assert found.spectral_share == pytest.approx(np.linalg.norm(delta, 2) / np.linalg.norm(delta, "fro"), **CLOSE)
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), **CLOSE)
    assert found.top_share == pytest.approx(np.sqrt(np.sum(sigma[:2] ** 2) / np.sum(sigma**2)), **CLOSE)


def test_what_rounding_alone_makes_has_no_rank() -> None:
    delta = matrix(200, 100, [5.0, 1.0, 1e-3])
    assert numerical_rank(torch.linalg.svdvals(delta), delta.shape) == 3
    # The larger side decides: 5 * 200 * 2^-23 is 1.2e-4, and 5 * 100 * 2^-23 would be 6e-5.
    assert [spectrum(matrix(*shape, [5.0, 1.0, 9e-5])).rank for shape in ((200, 100), (100, 200), (100, 100))] == [2, 2, 3]
    assert spectrum_of(torch.linalg.svdvals(torch.zeros(4, 6)), (4, 6)) is None


def naive_alignment(early: np.ndarray, final: np.ndarray, most: int) -> list[float]:
    """Root mean square cosine of the principal angles of the first k left directions, k = 1..most."""
    left, right = (np.linalg.svd(delta.astype(np.float64))[0] for delta in (early, final))
    return [float(np.sqrt(np.mean(np.linalg.svd(left[:, :k].T @ right[:, :k], compute_uv=False) ** 2))) for k in range(1, most + 1)]


def test_alignment_is_the_mean_cosine_of_growing_subspaces() -> None:
    early = np.random.default_rng(1).normal(size=(60, 90)).astype(np.float32)
    final = early + np.random.default_rng(2).normal(size=(60, 90)).astype(np.float32)
    found = subspace_alignment(*(first_directions(torch.from_numpy(delta))[1] for delta in (early, final)))
    cosines = naive_alignment(early, final, 20)
    assert found.num_subspaces == 20
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert found.first_cosine == pytest.approx(cosines[0], rel=1e-4)


def test_alignment_knows_equal_other_and_random_subspaces() -> None:
    eye = torch.eye(64)
    assert subspace_alignment(eye[:, :20], -eye[:, :20]).cosine == pytest.approx(1.0)
    assert subspace_alignment(eye[:, :20], eye[:, 20:40]).cosine == 0
    # The same plane with another basis: only from the second subspace on.
    turned = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert subspace_alignment(eye[:, :2], eye[:, :2] @ turned).cosine == pytest.approx((0.6 + 1) / 2)
    # Fewer directions on one side.
    assert subspace_alignment(eye[:, :3], eye[:, :20]).num_subspaces == 3
    generator = torch.Generator().manual_seed(0)
    drawn = [subspace_alignment(*(torch.linalg.qr(torch.randn(64, 20, generator=generator))[0] for _ in range(2))) for _ in range(50)]
    # The root of a mean is above the mean of roots: at k = 1 by a fifth, at k = 20 by nothing.
    assert float(np.mean([one.cosine for one in drawn])) == pytest.approx(drawn[0].by_chance, rel=0.05)


@pytest.mark.parametrize("beta", [0.0, 0.8, 1.0, 1.2])
def test_an_early_update_is_lengthened_by_the_papers_formula(beta: float) -> None:
    early = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    length = frobenius_norm(early)
    moved = with_norm(early, 3 * length, beta)
    assert frobenius_norm(moved) == pytest.approx(length * (1 + 2 * beta), **CLOSE)
    assert torch.nn.functional.cosine_similarity(moved.flatten(), early.flatten(), dim=0) == pytest.approx(1.0, **CLOSE)


def test_lengthening_zeros_gives_zeros() -> None:
    assert torch.equal(with_norm(torch.zeros(3, 4), 2.0), torch.zeros(3, 4))
    assert torch.equal(top_directions(torch.zeros(3, 4), 0.5), torch.zeros(3, 4))
    assert torch.equal(tail_directions(torch.zeros(3, 4), 0.5), torch.zeros(3, 4))


def test_first_directions_get_the_whole_norm_and_last_ones_keep_theirs() -> None:
    singular = [8.0, 4.0, 2.0, 1.0, 0.5]
    delta = matrix(30, 40, singular)
    top, tail = top_directions(delta, 0.4), tail_directions(delta, 0.5)
    assert torch.linalg.svdvals(top)[:3].tolist() == pytest.approx([8 * (scale := math.sqrt(85.25 / 80)), 4 * scale, 0.0], abs=1e-5)
    assert torch.linalg.svdvals(tail)[:3].tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)
    # What the kept directions were before they were lengthened, and the rest, are the matrix.
    assert torch.allclose(top / scale + tail_directions(delta, 0.6), delta, atol=1e-5)
    assert torch.allclose(top_directions(delta, 1.0), delta, atol=1e-5)


@pytest.mark.parametrize(("fraction", "kept"), [(0.07, 7), (0.071, 8), (0.001, 1), (0.29, 29), (1.0, 100)])
def test_a_fraction_of_the_rank_is_rounded_up_once(fraction: float, kept: int) -> None:
    """100 * 0.07 and 100 * 0.29 are not whole in floating point."""
    delta = matrix(100, 120, [1.0] * 100)
    assert numerical_rank(torch.linalg.svdvals(top := top_directions(delta, fraction)), top.shape) == kept


def update_of(name: str, kind: str, layer: int | None, norm: float, total: float) -> TensorUpdate:
    return TensorUpdate(name=name, kind=kind, layer=layer, shape=(4, 4), norm=norm, base_norm=2.0, share=norm**2 / total)  # type: ignore[arg-type]


def test_norm_shares_add_up_however_tensors_are_put_together() -> None:
    norms = [1.0, 2.0, 3.0, 4.0, 0.0]
    total = sum(norm**2 for norm in norms)
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 4, 9)),
        "model.layers.9.mlp.experts.3.up_proj.weight",
    ]
    layers = [None, 0, 4, 9, 9]
    tensors = [
        update_of(name, "embedding" if layer is None else "attention", layer, norm, total) for name, layer, norm in zip(names, layers, norms, strict=True)
    ]
    measured = Measured(tensors=tensors, num_layers=10, embedding_cosine=1.0)
    assert measured.norm == pytest.approx(math.sqrt(total))
    for key in (lambda tensor: tensor.kind, lambda tensor: measured.third_of(tensor.layer), lambda tensor: tensor.layer, lambda tensor: tensor.module):
        groups = grouped(tensors, key)
        assert sum(one.share or 0 for one in groups.values()) == pytest.approx(1.0)
        assert sum(one.norm**2 for one in groups.values()) == pytest.approx(total)
    assert [measured.third_of(layer) for layer in (None, 0, 3, 4, 6, 7, 9)] == ["outside", "bottom", "bottom", "middle", "middle", "top", "top"]
    assert [tensor.module for tensor in tensors] == ["embed_tokens", *["self_attn.q_proj"] * 3, "mlp.experts.up_proj"]
    # No spectrum was given, so there is no mean of one.
    assert group(tensors).spectral_share is None


def test_the_rounding_floor_is_of_what_moved_and_is_rounded() -> None:
    exact = update_of("model.layers.0.mlp.up_proj.weight", "mlp", 0, 1.0, 1.0)
    rounded = [
        TensorUpdate(name=f"model.layers.{n}.mlp.up_proj.weight", kind="mlp", layer=n, shape=(4, 4), norm=n, base_norm=512.0, is_rounded=True) for n in (0, 1)
    ]
    assert Measured(tensors=[exact], num_layers=2, embedding_cosine=1.0).rounding_floor is None
    assert Measured(tensors=[exact, *rounded], num_layers=2, embedding_cosine=1.0).rounding_floor == 1.0


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_experiments_name_the_tensors_that_they_say(family: str) -> None:
    """Biases stay with windows and are no matrices; a router is neither attention nor MLP; experts are MLP."""
    extra = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 40} if family == "qwen3_moe" else {}
    rows = weight_map(architecture_of(family, num_hidden_layers=5, **extra))
    planned = plan_experiments(rows, 5, radius=1, fractions=[0.1], has_early=True)
    by_name = {experiment.name: experiment for experiment in planned if experiment.name not in ("scaled", "window")}
    assert [experiment.name for experiment in planned[:2]] == ["base", "final"]
    assert [experiment.amount for experiment in planned if experiment.name == "scaled"] == list(SCALES)
    matrices = {row.name for row in rows if len(row.shape) == 2 and layer_of(row) is not None and ".router." not in row.name}
    for name in ("matrices", "top", "tail", "early_rescaled_matrices"):
        assert by_name[name].changes.keys() == matrices, name
    assert by_name["early"].changes.keys() == by_name["early_rescaled"].changes.keys() == by_name["final"].changes.keys() == {row.name for row in rows}
    assert not by_name["base"].changes
    windows = [experiment for experiment in planned if experiment.name == "window"]
    assert [(one.kind, one.layer, one.num_layers) for one in windows] == [
        (kind, layer, size) for kind in ("attention", "mlp") for layer, size in enumerate((2, 3, 3, 3, 2))
    ]
    for one in windows:
        assert one.changes.keys() == {row.name for row in rows if module_kind(row) == one.kind and abs((layer_of(row) or 0) - (one.layer or 0)) <= 1}
    assert not [one for one in plan_experiments(rows, 5, radius=None, fractions=[], has_early=False) if one.name in ("window", "top", "early")]
