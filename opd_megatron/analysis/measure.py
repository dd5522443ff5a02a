"""The update of a run, measured: norms and their shares by module, kind, layer and third, and the spectrum of every attention and MLP matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import torch

from opd_megatron.analysis.spectra import Alignment, Spectrum, first_directions, frobenius_norm, spectrum_of, subspace_alignment
from opd_megatron.analysis.updates import AnalyzedRun
from opd_megatron.models.modules import ModuleKind, layer_of, module_kind
from opd_megatron.models.weight_map import EMBEDDING, MappedTensor, weight_map

Third = Literal["bottom", "middle", "top", "outside"]
# bf16 keeps 8 bits of a number, so rounding moves it by up to 2^-9 of itself.
_BF16_ROUNDING = 2.0**-9


@dataclass(frozen=True, kw_only=True)
class TensorUpdate:
    """The update of one Hugging Face tensor. `spectrum` and `alignment` are None where there is none: vectors, vocabulary matrices, what did not move."""

    name: str
    kind: ModuleKind
    layer: int | None
    shape: tuple[int, ...]
    norm: float
    base_norm: float
    # Its part of the squared norm of the whole update; None where nothing moved.
    share: float | None = None
    spectrum: Spectrum | None = None
    early_norm: float | None = None
    alignment: Alignment | None = None
    # Only a rounding to 16 bits is stored.
    is_rounded: bool = False

    @property
    def module(self) -> str:
        """The name without its layer and expert, e.g. `self_attn.q_proj`."""
        words = self.name.removeprefix("model.").removesuffix(".weight").split(".")
        return ".".join(word for word in (words[2:] if words[0] == "layers" else words) if not word.isdigit())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All tensors of a run, and what only all together tell."""

    tensors: list[TensorUpdate]
    num_layers: int
    # Mean over the vocabulary of the cosine of a token's embedding with what it was.
    embedding_cosine: float

    @property
    def norm(self) -> float:
        """The norm of the whole update."""
        return math.sqrt(sum(tensor.norm**2 for tensor in self.tensors))

    @property
    def rounding_floor(self) -> float | None:
        """About how long an update rounding alone makes: ||W|| 2^-9 over what moved and is stored in bf16 only; None where all are exact."""
        rounded = [tensor for tensor in self.tensors if tensor.is_rounded and tensor.norm]
        return _BF16_ROUNDING * math.sqrt(sum(tensor.base_norm**2 for tensor in rounded)) if rounded else None

    @property
    def matrices(self) -> list[TensorUpdate]:
        """The attention and MLP matrices that moved: those that the paper's means are over."""
        return [tensor for tensor in self.tensors if tensor.kind in ("attention", "mlp") and tensor.spectrum is not None]

    def third_of(self, layer: int | None) -> Third:
        """Return which third of the layers this one is in."""
        return "outside" if layer is None else ("bottom", "middle", "top")[3 * layer // self.num_layers]  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors together: their number, norm and share, and means over their spectra, None where none has one."""

    num_tensors: int
    norm: float
    share: float | None
    spectral_norm: float | None
    spectral_share: float | None
    effective_rank: float | None
    # The same over the number of singular values, so that matrices of several sizes can be compared.
    effective_rank_share: float | None
    top_share: float | None
    alignment: float | None
    alignment_by_chance: float | None
    first_cosine: float | None


def measure(run: AnalyzedRun, device: torch.device | None = None, tell: Callable[[MappedTensor], None] = lambda row: None) -> Measured:
    """Read base and checkpoints once and measure; `device` is where singular values are computed, and `tell` is called before every tensor."""
    tensors: list[TensorUpdate] = []
    cosine = math.nan
    for row in weight_map(run.final.architecture):
        tell(row)
        base = run.base_of(row)
        update = run.update_of(row, base)
        early = run.update_of(row, base, is_early=True) if run.early is not None else None
        if row.megatron == EMBEDDING:
            cosine = float(torch.nn.functional.cosine_similarity(base, base + update, dim=1).mean())
        base_parts, early_parts = run.parts_of(row, base), run.parts_of(row, early) if early is not None else {}
        for name, part in run.parts_of(row, update).items():
            tensors.append(_measured(name, row, base_parts[name], part, early_parts.get(name), run.final.is_rounded(row), device or torch.device("cpu")))
    total = sum(tensor.norm**2 for tensor in tensors)
    with_share = [replace(tensor, share=tensor.norm**2 / total if total else None) for tensor in tensors]
    return Measured(tensors=with_share, num_layers=run.final.architecture.num_layers, embedding_cosine=cosine)


def group(tensors: Iterable[TensorUpdate]) -> Group:
    """Return norm and share of tensors together, and unweighted means over the matrices among them."""
    chosen = list(tensors)
    spectra = [(tensor.spectrum, min(tensor.shape)) for tensor in chosen if tensor.spectrum is not None]
    alignments = [tensor.alignment for tensor in chosen if tensor.alignment is not None]
    shares = [tensor.share for tensor in chosen if tensor.share is not None]
    return Group(
        num_tensors=len(chosen),
        norm=math.sqrt(sum(tensor.norm**2 for tensor in chosen)),
        share=math.fsum(shares) if shares else None,
        spectral_norm=_mean(spectrum.spectral_norm for spectrum, _ in spectra),
        spectral_share=_mean(spectrum.spectral_share for spectrum, _ in spectra),
        effective_rank=_mean(spectrum.effective_rank for spectrum, _ in spectra),
        effective_rank_share=_mean(spectrum.effective_rank / size for spectrum, size in spectra),
        top_share=_mean(spectrum.top_share for spectrum, _ in spectra),
        alignment=_mean(alignment.cosine for alignment in alignments),
        alignment_by_chance=_mean(alignment.by_chance for alignment in alignments),
        first_cosine=_mean(alignment.first_cosine for alignment in alignments),
    )


def grouped(tensors: Iterable[TensorUpdate], key: Callable[[TensorUpdate], object]) -> dict[object, Group]:
    """Return a group for every value of `key`, in the order in which the values first come."""
    members: dict[object, list[TensorUpdate]] = defaultdict(list)
    for tensor in tensors:
        members[key(tensor)].append(tensor)
    return {value: group(chosen) for value, chosen in members.items()}


def _measured(
    name: str, row: MappedTensor, base: torch.Tensor, update: torch.Tensor, early: torch.Tensor | None, is_rounded: bool, device: torch.device
) -> TensorUpdate:
    spectrum, alignment = None, None
    # The singular values of a vocabulary matrix cost as much as those of all layers, and nothing of the paper is about them.
    if update.dim() == 2 and layer_of(row) is not None:
        if early is None:
            spectrum = spectrum_of(torch.linalg.svdvals(update.to(device)), update.shape)
        else:
            singular_R, left_MK = first_directions(update.to(device))
            spectrum = spectrum_of(singular_R, update.shape)
            _, early_MK = first_directions(early.to(device))
            # Zeros have no directions.
            alignment = subspace_alignment(early_MK, left_MK) if min(early_MK.size(1), left_MK.size(1)) else None
    return TensorUpdate(
        name=name,
        kind=module_kind(row),
        layer=layer_of(row),
        shape=tuple(update.shape),
        norm=frobenius_norm(update),
        base_norm=frobenius_norm(base),
        spectrum=spectrum,
        early_norm=frobenius_norm(early) if early is not None else None,
        alignment=alignment,
        is_rounded=is_rounded,
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
