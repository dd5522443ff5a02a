"""Weights in and out: a Hugging Face folder or a Megatron distributed checkpoint -> this rank's model, a checkpoint, or a folder.

Both sources give the same thing, global Megatron tensors by name, one at a time, so memory stays at one tensor beside the model.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.hf_folder import HFFolder, copy_assets, folder_written_whole, open_hf_folder, read_architecture
from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor, name_in_layer, weight_map
from opd_megatron.models.weight_slices import local_slice, to_hf, to_megatron, vocab_slice
from opd_megatron.parallel.groups import ModelGroups

# A checkpoint carries the Hugging Face files that are not weights here, so it knows its own architecture and tokenizer.
ASSETS_FOLDER = "huggingface"
# What reading a missing, cut or altered checkpoint file raises; torch derives its CheckpointException from BaseException.
DAMAGE = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, CheckpointingException, dcp.api.CheckpointException),
)
# Megatron-Core keeps an optimizer's fp32 weights in the model's shapes, under the model's names after this.
_MASTERS = "optimizer.state.param."
_MAX_SHARD_BYTES = 5 * 1024**3
# Buffers that old checkpoints of these families store and no model needs.
_IGNORED_HF = re.compile(r"rotary_emb\.inv_freq$")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightSource(Protocol):
    """Where a model's weights come from."""

    architecture: Architecture
    assets: Path

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor, vocabulary unpadded."""
        ...


def open_weights(*, hf: str | None = None, checkpoint: str | None = None) -> WeightSource:
    """Return the source named by exactly one of the two paths; ValueError if it is not whole or not understood."""
    if hf:
        return HFWeights(open_hf_folder(hf))
    assert checkpoint is not None
    return CheckpointWeights(Path(checkpoint))


class HFWeights:
    """A Hugging Face folder. Tensors the model needs must be there, and tensors it does not know are refused."""

    def __init__(self, folder: HFFolder) -> None:
        self.architecture = folder.architecture
        self.assets = folder.path
        self._files = folder.tensor_files
        needed = {name for row in weight_map(self.architecture) for name in row.hf}
        if self.architecture.tied:
            # Some exporters write the tied head a second time.
            needed.add("lm_head.weight")
        missing = sorted(needed - set(self._files) - ({"lm_head.weight"} if self.architecture.tied else set()))
        unknown = sorted(name for name in set(self._files) - needed if not _IGNORED_HF.search(name))
        if missing:
            raise ValueError(f"{folder.path}: {len(missing)} tensors of a {self.architecture.family} model are missing, first {missing[0]!r}")
        if unknown:
            raise ValueError(f"{folder.path}: {len(unknown)} tensors are unknown to a {self.architecture.family} model, first {unknown[0]!r}")
        # Megatron keeps in one tensor what a folder may store in several dtypes: query, key and value, or the experts of a layer.
        self._dtypes: dict[str, torch.dtype] = {}
        for row in weight_map(self.architecture):
            for name in row.hf:
                stored = _DTYPES[folder.tensor_dtypes[name]]
                self._dtypes[row.megatron] = torch.promote_types(self._dtypes.get(row.megatron, stored), stored)

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor fused from its Hugging Face parts; no other tensor is read.

        In the dtype they are stored in; where these differ, in the one that holds the values of all.
        """
        return to_megatron(row, [self._read_part(name).to(self._dtypes[row.megatron]) for name in row.hf], self.architecture)

    def _read_part(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


class CheckpointWeights:
    """A distributed checkpoint of any layout, read without process groups; padded vocabulary rows are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.assets = path / ASSETS_FOLDER
        if not (path / "metadata.json").is_file() or not (path / ".metadata").is_file():
            raise ValueError(f"{path} is not a Megatron checkpoint: no metadata.json and .metadata in it")
        self.architecture = read_architecture(self.assets)
        self._reader = dcp.FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._tensors = metadata.state_dict_metadata
        except DAMAGE as error:
            raise ValueError(f"{path / '.metadata'} is damaged: {damage_in(error)}") from None
        self._check_contents()

    def _check_contents(self) -> None:
        """Every tensor the architecture needs is there with its shape: a checkpoint of another model is refused before it is read."""
        for row in weight_map(self.architecture):
            stored = self._tensors.get(row.megatron)
            shape = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
            wanted = _stored_shape(row, self.architecture)
            fits = shape is not None and shape[1:] == wanted[1:] and (shape[0] == wanted[0] or (row.is_vocab and shape[0] > wanted[0]))
            if not fits:
                config = self.assets / "config.json"
                raise ValueError(f"{self.path}: {row.megatron} has shape {shape} where {config} implies {wanted}; another model's checkpoint?")

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor, or one expert's slice, in the dtype it is stored in; ValueError where its files are damaged.

        Only the stored pieces that hold it are read, and vocabulary padding is not.
        """
        return self._read(row.megatron, row)

    def read_exact(self, row: MappedTensor) -> torch.Tensor:
        """Return the same in fp32: of a run in bf16 the optimizer's master weight, where there is one, which training moves and `read` is a rounding of."""
        return self._read(row.megatron if self.is_rounded(row) else self._exact_key(row), row).float()

    def is_rounded(self, row: MappedTensor) -> bool:
        """Whether only a rounding to 16 bits is stored: a converted model, or a tensor that did not train."""
        stored = self._tensors.get(self._exact_key(row))
        return not (isinstance(stored, TensorStorageMetadata) and stored.properties.dtype == torch.float32)

    def _exact_key(self, row: MappedTensor) -> str:
        stored = self._tensors[row.megatron]
        assert isinstance(stored, TensorStorageMetadata)
        return row.megatron if stored.properties.dtype == torch.float32 else _MASTERS + row.megatron

    def _read(self, key: str, row: MappedTensor) -> torch.Tensor:
        stored = self._tensors[key]
        assert isinstance(stored, TensorStorageMetadata)
        start, size = ([0] * len(row.shape), row.shape) if row.expert is None else ([row.expert] + [0] * len(row.shape), (1, *row.shape))
        box = ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(size))
        tensor = torch.empty(size, dtype=stored.properties.dtype)
        try:
            plan = dcp.LoadPlan(create_read_items_for_chunk_list(key, stored, [box]))
            self._reader.read_data(plan, _Into(tensor)).wait()
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged: cannot read {row.name}: {damage_in(error)}") from None
        return tensor.reshape(row.shape)


class _Into(dcp.DefaultLoadPlanner):
    """Puts whatever is read into its place in one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._tensor


def _stored_shape(row: MappedTensor, architecture: Architecture) -> tuple[int, ...]:
    """Return the shape of the checkpoint tensor that holds a row."""
    if row.expert is None:
        return row.shape
    assert architecture.experts is not None
    return (architecture.experts.num_experts, *row.shape)


def load_model(model: ModelChunks, groups: ModelGroups, source: WeightSource, *, vocab_multiple: int) -> None:
    """Copy this rank's slice of every weight into the model, in the model's dtype."""
    architecture = source.architecture
    rows = {row.name: row for row in weight_map(architecture)}
    padded = architecture.padded_vocab_size(groups.layout.tensor, vocab_multiple)
    with torch.no_grad():
        for name, parameter in named_global_parameters(model, architecture):
            row = rows[name]
            rank, size = (groups.tensor_rank, groups.layout.tensor) if row.expert is None else (groups.expert_tensor_rank, groups.layout.expert_tensor)
            parameter.copy_(local_slice(row, source.read(row), tensor_rank=rank, tensor_size=size, padded_vocab=padded))


def named_global_parameters(model: Iterable[GPTModel], architecture: Architecture) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter of this rank with the name of its row in the weight map; a tied head answers to the embedding's."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name == HEAD and architecture.tied:
                name = EMBEDDING
            local = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if local:
                layer = chunk.decoder.layers[int(local[1])]
                local_experts = layer.mlp.local_expert_indices if architecture.experts else []
                name = f"decoder.layers.{layer.layer_number - 1}.{name_in_layer(local[2], architecture, local_experts)}"
            yield name, parameter


def load_head_slice(source: WeightSource, groups: ModelGroups, *, padded_vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows [W, G] of a source's LM head for this rank of another model's tensor group, padded as that model pads."""
    piece = vocab_slice(_read_head(source), tensor_rank=groups.tensor_rank, tensor_size=groups.layout.tensor, padded_vocab=padded_vocab)
    return piece.to(dtype=dtype, copy=True)


def load_head_rows(source: WeightSource, ids_C: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows [C, G] of a source's LM head for these ids, in their order."""
    return _read_head(source)[ids_C].to(dtype)


def _read_head(source: WeightSource) -> torch.Tensor:
    name = EMBEDDING if source.architecture.tied else HEAD
    return source.read(next(row for row in weight_map(source.architecture) if row.megatron == name))


def export_hf(source: WeightSource, out: Path, *, dtype: torch.dtype | None = None, replace: bool = False) -> None:
    """Write a Hugging Face folder that transformers and vLLM load: safetensors with index, configuration, tokenizer files.

    `dtype=None` keeps the source's. The folder appears whole or not at all; ValueError if it exists and `replace` is not set.
    """
    with folder_written_whole(out, replace=replace) as folder:
        copy_assets(source.assets, folder)
        _write_tensors(source, folder, dtype)
        if dtype is not None:
            _record_dtype(folder / "config.json", dtype)


def _write_tensors(source: WeightSource, folder: Path, dtype: torch.dtype | None) -> None:
    """Write all weights, a shard at a time, and the index where there are several."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes: list[int] = [0]
    names: dict[str, int] = {}
    for row in weight_map(source.architecture):
        tensor = source.read(row)
        damaged = tensor.numel() - int(tensor.isfinite().sum())
        if damaged:
            raise ValueError(f"{row.name} holds {damaged} values that are not finite: the weights are damaged, nothing was exported")
        for name, part in to_hf(row, tensor if dtype is None else tensor.to(dtype), source.architecture).items():
            size = part.numel() * part.element_size()
            if sizes[-1] and sizes[-1] + size > _MAX_SHARD_BYTES:
                _write_shard(folder, len(shards), shards[-1])
                shards[-1] = {}
                shards.append({})
                sizes.append(0)
            shards[-1][name] = part
            sizes[-1] += size
            names[name] = len(shards)
    _write_shard(folder, len(shards), shards[-1])
    _name_shards(folder, names, len(shards), sum(sizes))


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / f"model-{number:05d}.safetensors"
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from error
    # safetensors writes for the owner alone; a model is as readable as the user's other files.
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _name_shards(folder: Path, names: dict[str, int], num_shards: int, num_bytes: int) -> None:
    """Rename the shards as transformers does, now that their number is known, and write the index."""
    if num_shards == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    for number in range(1, num_shards + 1):
        (folder / f"model-{number:05d}.safetensors").rename(folder / f"model-{number:05d}-of-{num_shards:05d}.safetensors")
    weight_map_json = {name: f"model-{number:05d}-of-{num_shards:05d}.safetensors" for name, number in names.items()}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map_json}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _record_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Write the exported dtype under the key the configuration already uses (transformers 4: torch_dtype, 5: dtype)."""
    config = json.loads(config_file.read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def damage_in(error: BaseException) -> str:
    """Return one line on what reading or writing a checkpoint met; torch wraps the reasons of the ranks."""
    if isinstance(error, dcp.api.CheckpointException):
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        return damage_in(causes[0]) if causes else "another rank failed"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
