"""A measured update as one JSON object. Where something has no value, it is null: never NaN, and never 0 for want of a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from opd_megatron.analysis.experiments import Outcome, kept_share
from opd_megatron.analysis.measure import Group, Measured, TensorUpdate, grouped
from opd_megatron.analysis.measure import group as together
from opd_megatron.analysis.updates import AnalyzedRun


def as_record(run: AnalyzedRun, measured: Measured, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything that was measured, aggregates before tensors."""
    tensors = measured.tensors
    return {
        "run": str(run.directory.path),
        "recipe": run.recipe,
        "base": run.base_path,
        "final_step": run.final_step,
        "early_step": run.early_step,
        "norm": measured.norm,
        "rounding_floor": measured.rounding_floor,
        "tensors_rounded": sum(tensor.is_rounded for tensor in tensors),
        "tensors_not_moved": sum(tensor.norm == 0 for tensor in tensors),
        "embedding_cosine": measured.embedding_cosine,
        "matrices": asdict(together(measured.matrices)),
        "kinds": _groups(grouped(tensors, lambda tensor: tensor.kind), "kind"),
        "thirds": _groups(grouped(tensors, lambda tensor: measured.third_of(tensor.layer)), "third"),
        "layers": [_layer(measured, layer) for layer in range(measured.num_layers)],
        "modules": _groups(grouped(measured.matrices, lambda tensor: tensor.module), "module"),
        "tensors": [_tensor(tensor) for tensor in tensors],
        "experiments": outcomes_as_records(outcomes),
    }


def outcomes_as_records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the experiments in order, with the share of the gain from base to final weights that each keeps; null where training gained nothing."""
    if not outcomes:
        return []
    accuracy = {outcome.experiment.name: outcome.accuracy for outcome in outcomes}
    return [
        {
            "name": outcome.experiment.name,
            "kind": outcome.experiment.kind,
            "layer": outcome.experiment.layer,
            "num_layers": outcome.experiment.num_layers,
            "amount": outcome.experiment.amount,
            "accuracy": outcome.accuracy,
            "prompts": outcome.num_prompts,
            "update_norm": outcome.update_norm,
            "share_of_gain": kept_share(outcome.accuracy, accuracy["base"], accuracy["final"]),
            "share_of_final": outcome.accuracy / accuracy["final"] if accuracy["final"] else None,
        }
        for outcome in outcomes
    ]


def _groups(groups: dict[object, Group], name: str) -> list[dict[str, Any]]:
    return [{name: value, **asdict(group)} for value, group in groups.items()]


def _layer(measured: Measured, layer: int) -> dict[str, Any]:
    inside = [tensor for tensor in measured.tensors if tensor.layer == layer]
    kinds = _groups(grouped(inside, lambda tensor: tensor.kind), "kind")
    return {"layer": layer, "third": measured.third_of(layer), **asdict(together(inside)), "kinds": kinds}


def _tensor(tensor: TensorUpdate) -> dict[str, Any]:
    spectrum, alignment = tensor.spectrum, tensor.alignment
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "layer": tensor.layer,
        "module": tensor.module,
        "shape": list(tensor.shape),
        "moved": tensor.norm > 0,
        "norm": tensor.norm,
        "base_norm": tensor.base_norm,
        "share": tensor.share,
        "rounded": tensor.is_rounded,
        "spectral_norm": spectrum.spectral_norm if spectrum else None,
        "spectral_share": spectrum.spectral_share if spectrum else None,
        "effective_rank": spectrum.effective_rank if spectrum else None,
        "rank": spectrum.rank if spectrum else None,
        "top_share": spectrum.top_share if spectrum else None,
        "early_norm": tensor.early_norm,
        "alignment": alignment.cosine if alignment else None,
        "alignment_by_chance": alignment.by_chance if alignment else None,
        "alignment_subspaces": alignment.num_subspaces if alignment else None,
        "first_cosine": alignment.first_cosine if alignment else None,
    }
