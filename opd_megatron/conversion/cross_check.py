"""Our weight map beside another library's: the Megatron tensors that both make from the same Hugging Face tensors, one after another.

The libraries are no dependency. Where one is installed, its mapping is called on whole tensors, as by the only tensor rank; no model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.transformer import TransformerConfig
from safetensors import safe_open

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_folder import open_hf_folder, read_architecture
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weights import open_weights

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One Megatron tensor, or one expert's part of it; `difference` is None where both make the same bits of the same parts."""

    name: str
    difference: str | None


class OtherMapping(Protocol):
    """A library's mapping of one model."""

    library: str

    def make(self, name: str, read: Read) -> tuple[list[str], torch.Tensor]:
        """Return the Hugging Face names that a Megatron tensor is made of, and the tensor."""
        ...


def cross_check(folder: Path, other: OtherMapping) -> Iterator[Compared]:
    """Yield every Megatron tensor of a folder's model as compared; ValueError if the folder is damaged."""
    source = open_weights(hf=str(folder))
    files = open_hf_folder(folder).tensor_files

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    for row in weight_map(source.architecture):
        try:
            parts, theirs = other.make(_their_name(row), read)
        except (KeyError, NotImplementedError, ValueError, RuntimeError, AssertionError) as error:
            yield Compared(name=row.name, difference=f"{other.library} makes none: {type(error).__name__}: {error}")
            continue
        yield Compared(name=row.name, difference=_difference(row, source.read(row), parts, theirs, other.library))


def _their_name(row: MappedTensor) -> str:
    """Return what both libraries call a tensor: a parameter of Transformer Engine's layers, whose grouped experts are numbered at the end."""
    return row.megatron if row.expert is None else row.megatron.replace("experts.experts.", "experts.") + str(row.expert)


def _difference(row: MappedTensor, ours: torch.Tensor, parts: list[str], theirs: torch.Tensor, library: str) -> str | None:
    if tuple(parts) != row.hf:
        return f"made of {', '.join(row.hf)}; {library} makes it of {', '.join(parts)}"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{list(ours.shape)} {ours.dtype}; {library}'s is {list(theirs.shape)} {theirs.dtype}"
    if torch.equal(ours, theirs):
        return None
    different = ours != theirs
    return f"{int(different.sum()):,} of {ours.numel():,} values are not {library}'s, the first at {different.nonzero()[0].tolist()}"


def open_mapping(folder: Path, library: str) -> OtherMapping:
    """Return the mapping of `mbridge` or `megatron-bridge`; ValueError if it is not there, cannot be imported, or does not know the folder's model."""
    architecture = read_architecture(folder)
    try:
        return _MBridge(folder) if library == "mbridge" else _MegatronBridge(folder, architecture)
    except ModuleNotFoundError as error:
        if error.name in ("mbridge", "megatron.bridge"):
            raise ValueError(f"{library} is not installed") from None
        raise ValueError(f"{library} is installed and cannot be imported: {error}") from None
    except Exception as error:  # whatever a foreign library raises: a bare Transformer Engine, for one, a RuntimeError
        raise ValueError(f"{library} cannot be used here: {type(error).__name__}: {error}") from None


class _MBridge:
    """mbridge. Its fix for tied embeddings is written into the class, so a process opens one model."""

    library = "mbridge"

    def __init__(self, folder: Path) -> None:
        from mbridge import AutoBridge
        from mbridge.core.parallel_states import ParallelStates

        self._bridge = AutoBridge.from_pretrained(folder, parallel_states=ParallelStates())
        # It would cast to bf16.
        self._bridge.dtype = None

    def make(self, name: str, read: Read) -> tuple[list[str], torch.Tensor]:
        parts = list(self._bridge._weight_name_mapping_mcore_to_hf(name))
        return parts, self._bridge._weight_to_mcore_format(name, [read(part) for part in parts])


class _MegatronBridge:
    """Megatron Bridge, whose mappings take their sizes from the module that holds the parameter."""

    library = "megatron-bridge"

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        from megatron.bridge import AutoBridge
        from transformers import AutoConfig

        self._registry = AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder, local_files_only=True))._model_bridge.mapping_registry()
        self._module = _Whole(architecture)

    def make(self, name: str, read: Read) -> tuple[list[str], torch.Tensor]:
        """Return the Hugging Face names that Megatron Bridge maps to a Megatron tensor, and that tensor; KeyError where it maps none."""
        mapping = self._registry.megatron_to_hf_lookup(name)
        if mapping is None:
            raise KeyError(name)
        named: Any = mapping.hf_param
        parts = list(named.values()) if isinstance(named, dict) else [named]
        weights = {key: read(part) for key, part in named.items()} if isinstance(named, dict) else read(named)
        return parts, mapping.hf_to_megatron(weights, self._module)


class _Whole(torch.nn.Module):
    """A module that no tensor parallelism splits: it has the sizes of a model, and no weights of it."""

    tensor_model_parallel = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))
        self.config = TransformerConfig(
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            num_attention_heads=architecture.num_heads,
            num_query_groups=architecture.num_kv_heads,
            kv_channels=architecture.head_dim,
            use_cpu_initialization=True,
        )


def version_of(library: str) -> str:
    """Return the version of an installed library."""
    return version(library)
