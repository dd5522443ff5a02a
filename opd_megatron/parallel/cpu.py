"""Megatron-Core on CPU and gloo: the smallest set of redirections, each with its reason. Nothing happens where CUDA is present.

Measured with megatron-core 0.16.1 and 0.19.2. Megatron-Core has no CPU mode of its own; delete an entry when it gains one.
"""

from __future__ import annotations

import multiprocessing.dummy
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


def _names_cuda(device: Any) -> bool:
    """Return whether a `device=` argument means a CUDA device; a bare integer does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaToCpu(TorchFunctionMode):
    """Answer requests for CUDA tensors with CPU tensors; about one microsecond per operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer and gradient clipping compare type strings such as 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def enable_cpu_backend() -> bool:
    """Redirect Megatron-Core's CUDA calls to the CPU for the rest of the process; return whether the CPU is the device.

    Safe to call again; does nothing on a machine with CUDA.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is not None:
        return True
    import megatron.core.tensor_parallel.random as megatron_random

    # Every buffer of Megatron-Core is created on the current device.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # Called around timers and optimizer steps.
    torch.cuda.synchronize = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    # Before it reduces gradients, 0.19 lets the current stream wait for those that a CUDA graph made: there is no graph, and so no use of the stream.
    torch.cuda.current_stream = lambda *_args: None  # type: ignore[assignment,return-value]
    # The model-parallel random number tracker forks the device generator.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()  # type: ignore[assignment]
    # Without CUDA this queues a lazy call: a silent no-op, and the tracker would not fork.
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    _write_checkpoints_in_threads()
    _keep_expert_counts_on_the_host()
    _even_out_the_tokens_of_split_experts()
    _mode = _CudaToCpu()
    _mode.__enter__()
    return True


def _write_checkpoints_in_threads() -> None:
    """Let threads write a checkpoint's files: Megatron-Core forks two processes on every rank, which costs more than small files, beside gloo's threads."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.mp = SimpleNamespace(get_context=lambda _method: multiprocessing.dummy)


def _keep_expert_counts_on_the_host() -> None:
    """Let the dispatcher of a mixture of experts work without streams.

    It copies how many tokens go where to the host on a CUDA stream, and creates the stream if none is there. Here the counts are on the host;
    they only become arrays, since torch's all_to_all takes split sizes as numbers and no tensor.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def counts_as_numbers(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                counts = getattr(self, name)
                setattr(self, name, counts.numpy() if torch.is_tensor(counts) else counts)
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = counts_as_numbers


def _even_out_the_tokens_of_split_experts() -> None:
    """Let the ranks of a split expert gather their tokens, of which each has another number: gloo's all_gather takes equal parts only.

    Every part is filled up to the largest with zeros, which are cut off again. Its reduce_scatter, on the way back, takes uneven parts.
    """
    from megatron.core.tensor_parallel import mappings

    gather = mappings._gather_along_first_dim

    def even_gather(part: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(part, group, output_split_sizes, *args)
        largest = max(output_split_sizes)
        whole = gather(torch.cat([part, part.new_zeros(largest - part.size(0), *part.shape[1:])]), group)
        return torch.cat([rows[:size] for rows, size in zip(whole.chunk(group.size()), output_split_sizes, strict=True)]) if largest else whole

    mappings._gather_along_first_dim = even_gather
