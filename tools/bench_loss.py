"""Time, peak memory and gradient error of the distillation losses, from hidden states and LM heads to their gradients: `python tools/bench_loss.py`.

Ours (fused head, and the divergence on full logits) against plain torch, also with its operands widened to fp32 where they are bf16 ("widened": the
unfused form whose logits are not rounded), and against the libraries that install from PyPI: nvidia-modelopt,
liger-kernel, trl, deepspeed. A library that is not installed is a row that says so; install them into an environment of their own. "products" are the four
matrix products alone, which no loss from hidden states can do without; at one rank each other row has its ratio to them. `--device cuda` measures on a GPU.
Each measurement runs in its own process (one per rank), time and memory in separate ones. The gradient error is relative, against fp64 autograd on
the same values, over hidden states and head. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench_common import environment, version

ERROR_TOKENS = 64  # rows of the comparison with fp64, whose full logits must fit
WORKER_SECONDS = 900


class Candidate(NamedTuple):
    """A function under test: the PyPI package it needs, and the kinds, numbers of ranks and dtypes it is for."""

    package: str | None
    kinds: tuple[str, ...]
    tensor: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


BOTH_KL, ALL = ("reverse_kl", "forward_kl"), ("reverse_kl", "forward_kl", "jsd")
CANDIDATES = {
    # What no loss from hidden states can do without: the yardstick of the fused head, with no gradient of its own to be wrong.
    "products": Candidate(None, ALL, (1,)),
    "fused": Candidate(None, ALL, (1, 2)),
    "unfused": Candidate(None, ALL, (1, 2)),
    "torch": Candidate(None, ALL, (1, 2)),
    "widened": Candidate(None, ALL, (1, 2), ("bfloat16",)),
    "modelopt": Candidate("nvidia-modelopt", BOTH_KL, (1, 2)),
    "deepspeed": Candidate("deepspeed", BOTH_KL, (1, 2)),
    "liger": Candidate("liger-kernel", ALL, (1,)),
    "trl": Candidate("trl", ALL, (1,)),
}
PACKAGES = ("torch", *(candidate.package for candidate in CANDIDATES.values() if candidate.package))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=ALL, default=["reverse_kl", "jsd"])
    parser.add_argument("--vocab", nargs="+", type=int, default=[32_000, 65_536, 151_936])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--tensor", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="tensor-parallel ranks, on gloo")
    parser.add_argument("--functions", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of both models")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on the first GPU; tensor-parallel ranks would share it, so with --tensor 1"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after one that is not; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="a few seconds: ours and torch on a tiny problem, to see that the tool works")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    if "--quick" in given:
        parser.set_defaults(kinds=["reverse_kl"], vocab=[512], dtypes=["float32"], functions=["fused", "torch"], tokens=32, hidden=16, repeats=1)
    options = parser.parse_args(given)
    if options.worker:
        print(json.dumps(_work(SimpleNamespace(**json.loads(options.worker)))), flush=True)
        # Libraries leave threads and groups behind whose end would be an abort; the number is out.
        os._exit(0)
    sizes = {"tokens": options.tokens, "hidden": options.hidden, "repeats": options.repeats}
    if options.device == "cuda" and options.tensor != [1]:
        print(f"--tensor={' '.join(map(str, options.tensor))} with --device=cuda: ranks on one GPU measure nothing; use --tensor 1", file=sys.stderr)
        return 2
    for name, value in sizes.items():
        if value < 1:
            print(f"--{name}={value} must be at least 1", file=sys.stderr)
            return 2
    for vocab, tensor in itertools.product(options.vocab, options.tensor):
        if vocab < 1 or vocab % tensor:
            print(f"--vocab={vocab} must be a positive multiple of --tensor={tensor}", file=sys.stderr)
            return 2
    rows: list[dict[str, Any]] = []
    print(f"{'function':10}{'kind':12}{'V':>8}{'dtype':>10}{'TP':>4}{'ms':>10}{'peak MiB':>10}{'grad error':>12}  note", flush=True)
    for kind, vocab, dtype, tensor in itertools.product(options.kinds, options.vocab, options.dtypes, options.tensor):
        for function in options.functions:
            candidate = CANDIDATES[function]
            if kind in candidate.kinds and tensor in candidate.tensor and dtype in candidate.dtypes:
                row = _measure({"function": function, "kind": kind, "vocab": vocab, "dtype": dtype, "tensor": tensor, "device": options.device, **sizes})
                rows.append(_beside_products(row, rows))
                print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"environment": environment(PACKAGES), "device": options.device, **sizes, "rows": rows}))
    return 0


def _beside_products(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with the ratio of its time to that of the four matrix products of the same problem, where both were measured."""
    same = ("kind", "vocab", "dtype", "tensor")
    for other in rows:
        if other["function"] == "products" and "ms" in other and "ms" in row and all(other[key] == row[key] for key in same):
            ratio = row["ms"] / other["ms"]
            return {**row, "ratio_to_products": ratio, "note": f"{ratio:.2f} x the products"}
    return row


def _line(row: dict[str, Any]) -> str:
    numbers = [f"{row[key]:.{digits}{form}}" if key in row else "-" for key, digits, form in (("ms", 1, "f"), ("peak_mib", 1, "f"), ("gradient_error", 1, "e"))]
    head = f"{row['function']:10}{row['kind']:12}{row['vocab']:>8}{row['dtype']:>10}{row['tensor']:>4}"
    return f"{head}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>12}  {row.get('note', '')}"


def _measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case with its three measurements, or with a note that says why there are none."""
    package = CANDIDATES[case["function"]].package
    if package is not None and version(package) is None:
        return {**case, "note": "not installed"}
    row = dict(case)
    for what in ("time", "memory") if case["function"] == "products" else ("time", "memory", "error"):
        try:
            row.update(_run_workers({**case, "what": what}))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return {**row, "note": f"failed: {str(error).strip().splitlines()[-1][:120]}"}
    return row


def _run_workers(case: dict[str, Any]) -> dict[str, Any]:
    """Run one process per rank; the slowest rank's time, the largest peak and the largest error count. RuntimeError with the first stderr if one fails."""
    with tempfile.TemporaryDirectory(prefix="opd-bench-") as folder:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        command = [sys.executable, __file__, "--worker"]
        processes = [
            subprocess.Popen(
                [*command, json.dumps({**case, "rank": rank, "store": f"{folder}/store"})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(case["tensor"])
        ]
        try:
            outputs = [process.communicate(timeout=WORKER_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(processes, outputs):
        if process.returncode:
            raise RuntimeError(errors or f"exit code {process.returncode}")
    results = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    return {key: max(result[key] for result in results) for key in results[0]}


def _work(case: SimpleNamespace) -> dict[str, float]:
    """Return one rank's measurement of one function."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    group = None
    if case.tensor > 1 or case.function == "deepspeed":
        dist.init_process_group("gloo", init_method=f"file://{case.store}", rank=case.rank, world_size=case.tensor)
        group = dist.group.WORLD
    num_tokens = min(case.tokens, ERROR_TOKENS) if case.what == "error" else case.tokens
    models = [tensor.to(case.device) for tensor in _problem(num_tokens, case)]
    width = case.vocab // case.tensor
    columns = slice(case.rank * width, (case.rank + 1) * width)
    sharded = [models[0].requires_grad_(), models[1][columns].clone().requires_grad_(), models[2], models[3][columns].clone()]
    exact = _exact_gradients(models, case, columns) if case.what == "error" else ()
    del models
    loss = _prepare(case, group) if case.function != "products" else None

    def step() -> list[torch.Tensor]:
        if loss is None:
            return _products(*sharded)
        gradients = list(torch.autograd.grad(loss(*sharded), sharded[:2]))
        if group is not None and case.tensor > 1:
            dist.all_reduce(gradients[0])  # the hidden states' gradient is a sum over the ranks, whoever computes it
        return gradients

    if case.what == "error":
        return {"gradient_error": max(((value.double() - reference).norm() / reference.norm()).item() for value, reference in zip(step(), exact))}
    if case.what == "memory":
        from opd_megatron.parallel.offload import peak_bytes, start_peak

        before = start_peak()
        step()
        return {"peak_mib": (peak_bytes() - before) / 2**20}
    seconds = []
    for _ in range(case.repeats + 1):
        if group is not None:
            dist.barrier()
        _wait_for(case.device)
        start = time.perf_counter()
        step()
        _wait_for(case.device)
        seconds.append(time.perf_counter() - start)
    return {"ms": 1000 * min(seconds[1:])}


def _wait_for(device: str) -> None:
    """Wait until the device has done what it was given; a CPU has, when a function returns."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _products(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any) -> list[Any]:
    """Return tensors like the two gradients by the four matrix products alone: both models' logits, and what stands for their gradient times each operand.

    In the operands' dtype throughout, and all tokens at once: what the library's own products take, without fp32 results or chunks.
    """
    import torch

    with torch.no_grad():
        torch.mm(teacher_hidden, teacher_head.T)
        logits_TV = student_hidden @ student_head.T
        return [logits_TV @ student_head, logits_TV.T @ student_hidden]


def _problem(num_tokens: int, case: SimpleNamespace) -> list[Any]:
    """Return hidden states and heads of both models: logits of standard deviation 3, and a teacher that is close to the student."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden, nudge = (torch.randn(num_tokens, case.hidden, generator=generator) for _ in range(2))
    head = torch.randn(case.vocab, case.hidden, generator=generator) * (3 / case.hidden**0.5)
    return [tensor.to(getattr(torch, case.dtype)) for tensor in (hidden, head, hidden + 0.3 * nudge, head)]


def _exact_gradients(models: list[Any], case: SimpleNamespace, columns: slice) -> tuple[Any, ...]:
    """Return the gradients of hidden states and of this rank's head rows by fp64 autograd over the whole vocabulary."""
    import torch

    leaves = [tensor.detach().double().requires_grad_() for tensor in models[:2]]
    logits = leaves[0] @ leaves[1].T, models[2].double() @ models[3].double().T
    hidden, head = torch.autograd.grad(_torch_loss(*logits, case.kind, None), leaves)
    return hidden, head[columns]


def _torch_loss(student_TW: Any, teacher_TW: Any, kind: str, group: Any) -> Any:
    """Return the divergence summed over tokens by plain autograd; with a group, this rank's share of it, whose gradient is the true one."""
    import torch
    import torch.nn.functional as F
    from torch.distributed import ReduceOp, all_reduce
    from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

    def log_softmax(logits_TW: torch.Tensor) -> torch.Tensor:
        logits_TW = logits_TW if logits_TW.dtype == torch.float64 else logits_TW.float()
        if group is None:
            return F.log_softmax(logits_TW, -1)
        max_T = logits_TW.detach().amax(-1, keepdim=True)
        all_reduce(max_T, op=ReduceOp.MAX, group=group)
        shifted_TW = logits_TW - max_T
        return shifted_TW - differentiable_all_reduce(shifted_TW.exp().sum(-1, keepdim=True), group=group).log()

    log_p, log_q = log_softmax(student_TW), log_softmax(teacher_TW)
    if kind == "reverse_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if kind == "forward_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    return sum(0.5 * F.kl_div(log_m, logp, reduction="sum", log_target=True) for logp in (log_p, log_q))


def _prepare(case: SimpleNamespace, group: Any) -> Callable[..., Any]:
    """Return the loss of one candidate, a function of hidden states and heads summed over tokens. Imports only what it needs."""
    if case.function == "fused":
        from opd_megatron.losses import fused_head_divergence

        return lambda *models: fused_head_divergence(*models, kind=case.kind, tp_group=group).loss_sum
    if case.function == "liger":
        return _liger(case)
    if case.function == "widened":
        return lambda *models: _on_logits(_torch(case, group))(*(tensor.float() for tensor in models))
    return _on_logits({"unfused": _unfused, "torch": _torch, "modelopt": _modelopt, "deepspeed": _deepspeed, "trl": _trl}[case.function](case, group))


def _on_logits(loss: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    import torch

    def from_hidden(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any) -> Any:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_head.T
        return loss(student_hidden @ student_head.T, teacher)

    return from_hidden


def _unfused(case: SimpleNamespace, group: Any) -> Callable[[Any, Any], Any]:
    from opd_megatron.losses import vocab_parallel_divergence

    return lambda student, teacher: vocab_parallel_divergence(student, teacher, kind=case.kind, tp_group=group).sum()


def _torch(case: SimpleNamespace, group: Any) -> Callable[[Any, Any], Any]:
    return lambda student, teacher: _torch_loss(student, teacher, case.kind, group)


def _modelopt(case: SimpleNamespace, group: Any) -> Callable[[Any, Any], Any]:
    from modelopt.torch.distill.plugins import megatron as plugin

    if group is not None:
        plugin.parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group
    config = SimpleNamespace(tensor_model_parallel_size=case.tensor, sequence_parallel=False)
    loss = plugin.LogitsKLLoss(config, reverse=case.kind == "reverse_kl")
    return lambda student, teacher: loss(student[:, None], teacher[:, None])[0].sum()  # this rank's share of the sum


def _deepspeed(case: SimpleNamespace, group: Any) -> Callable[[Any, Any], Any]:
    import deepspeed
    from deepspeed.sequence.vocab_parallel_ops import vocab_parallel_kl_div

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, dist_init_required=False)
    shards = group if case.tensor > 1 else None
    return lambda student, teacher: vocab_parallel_kl_div(student, teacher, reverse=case.kind == "reverse_kl", tp_group=shards).sum()


def _trl(case: SimpleNamespace, group: Any) -> Callable[[Any, Any], Any]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta = {"forward_kl": 0, "jsd": 0.5, "reverse_kl": 1}[case.kind]
    return lambda student, teacher: GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")


def _liger(case: SimpleNamespace) -> Callable[..., Any]:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0, "jsd": 0.5, "reverse_kl": 1}[case.kind]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)

    def summed(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any) -> Any:
        labels = torch.zeros(student_hidden.size(0), dtype=torch.long, device=student_hidden.device)
        return student_hidden.size(0) * loss(student_hidden, student_head, teacher_hidden, teacher_head, labels)

    return summed


if __name__ == "__main__":
    sys.exit(main())
