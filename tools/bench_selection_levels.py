"""What `bench_selection.py` measures: the loss part of a training step, and a whole step of a small Megatron model, each fused and unfused.

Shapes: T response tokens of the step, K kept ones, R those of one response, V vocabulary, H / G = student / teacher hidden size.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from opd_megatron.config import DataConfig, ImportanceConfig, ParallelLayout, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from opd_megatron.data.batches import Sample
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics, fused_head_divergence, token_statistics
from opd_megatron.losses.token_importance import SelectionRule, token_selection
from opd_megatron.models.hf_config import parse_architecture
from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor
from opd_megatron.parallel.groups import student_groups
from opd_megatron.parallel.offload import peak_bytes, start_peak
from opd_megatron.parallel.world import join_world
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import TeacherRows
from opd_megatron.training.importance import Importance
from opd_megatron.training.objective import Distillation
from opd_megatron.training.student import Student

FORMS = ("fused", "unfused")
PROMPT_TOKENS = 64
# Two responses of at most this length are compared with fp64, whose logits must fit.
ERROR_RESPONSE = 64
LOGITS_DEVIATION = 3.0
Result = TypeVar("Result")


class Seconds(NamedTuple):
    """Of the processor, and of the clock."""

    cpu: float = 0.0
    wall: float = 0.0


class Outcome(NamedTuple):
    """Which of its response tokens a step kept, its gradients (the next step overwrites them), and what weighing and training took."""

    kept_T: torch.Tensor
    gradients: list[torch.Tensor]
    weigh: Seconds
    train: Seconds


def _timed(action: Callable[[], Result]) -> tuple[Result, Seconds]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return result, Seconds(time.process_time() - cpu, time.perf_counter() - wall)


@dataclass(frozen=True)
class UnfusedObjective:
    """Reverse KL of the kept rows of a micro-batch that is the whole step, from full logits of all its rows: plain torch at its leanest.

    It drops logits and log-softmax of both models as soon as it can; a script that holds on to them needs more. `kept_T` is where it says what it kept.
    With `exact` all of it is in fp64.
    """

    teacher_head_VG: torch.Tensor
    response: int
    ratio: float
    kept_T: torch.Tensor
    exact: bool = False
    observes: ClassVar[tuple[str, ...]] = ()

    def __call__(self, hidden_TH: torch.Tensor, head_VH: torch.Tensor, micro_batch: Any) -> FusedDivergence:
        student_TV = self._logits(hidden_TH, head_VH)
        with torch.no_grad():
            teacher_TV = self._logits(micro_batch.teacher_hidden_TG, self.teacher_head_VG)
        if self.ratio < 1:
            self.kept_T.copy_(self._weights(student_TV, teacher_TV))
            kept_K = self.kept_T.nonzero().squeeze(1)
            student_TV, teacher_TV = student_TV.index_select(0, kept_K), teacher_TV.index_select(0, kept_K)
        log_p, log_q = self._log_softmax(student_TV), self._log_softmax(teacher_TV)
        del student_TV, teacher_TV
        divergence_K = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        # Megatron's schedule divides by the rows that went in.
        loss_sum = divergence_K.sum() * (len(hidden_TH) / len(divergence_K))
        return FusedDivergence(loss_sum, loss_sum.detach(), divergence_K.detach(), torch.zeros_like(divergence_K), None, {})

    def _logits(self, hidden_TH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
        return hidden_TH.double() @ head_VH.double().T if self.exact else hidden_TH @ head_VH.T

    def _log_softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(logits_TV if self.exact else logits_TV.float(), -1)

    @torch.no_grad()
    def _weights(self, student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
        parts = []
        for student_RV, teacher_RV in zip(student_TV.split(self.response), teacher_TV.split(self.response)):
            log_p, log_q = self._log_softmax(student_RV), self._log_softmax(teacher_RV)
            prob_RV = log_p.exp()
            parts.append(torch.stack([-(prob_RV * log_p).sum(-1), (prob_RV * (log_p - log_q)).sum(-1)]))
        entropy_T, reverse_kl_T = torch.cat(parts, 1)
        # soft_or_topk does not look at the forward KL.
        return _selected(TokenStatistics(entropy_T, reverse_kl_T, torch.zeros_like(entropy_T)), self.response, self.ratio, student_TV.size(1))


def _selected(statistics: TokenStatistics, response: int, ratio: float, vocab_size: int) -> torch.Tensor:
    lengths = [response] * (len(statistics.reverse_kl_T) // response)
    return token_selection(statistics, lengths, SelectionRule(rule="soft_or_topk", ratio=ratio), vocab_size=vocab_size).weights_T


class LossPart:
    """Level head: hidden states and heads of both models, and where the head's gradient is accumulated."""

    def __init__(self, case: SimpleNamespace) -> None:
        self.base_bytes = start_peak()
        self._response, generator, dtype = case.response, torch.Generator().manual_seed(0), getattr(torch, case.dtype)
        hidden_TH, nudge_TH = (torch.randn(case.tokens, case.hidden, generator=generator) for _ in range(2))
        # Tokens from unsure to sure, a teacher from close to far.
        hidden_TH *= 0.3 + 1.2 * torch.rand(case.tokens, 1, generator=generator)
        nudge_TH *= 0.5 * torch.rand(case.tokens, 1, generator=generator)
        self._teacher_TG = (hidden_TH + nudge_TH).to(dtype)
        self._hidden_TH = hidden_TH.to(dtype).requires_grad_()
        head_VH = torch.randn(case.vocab, case.hidden, generator=generator).mul_(LOGITS_DEVIATION / case.hidden**0.5).to(dtype)
        self._teacher_head_VG = head_VH.clone()
        self._main_grad_VH = torch.zeros(case.vocab, case.hidden)
        self._head_VH = head_VH.requires_grad_()
        self._head_VH.main_grad = self._main_grad_VH  # type: ignore[attr-defined]

    def step(self, form: str, ratio: float) -> Outcome:
        self._hidden_TH.grad = None
        self._main_grad_VH.zero_()
        kept_T, weigh = torch.ones(len(self._hidden_TH)), Seconds()
        if form == "fused" and ratio < 1:
            kept_T, weigh = _timed(lambda: self._weights(ratio))
        unfused = UnfusedObjective(self._teacher_head_VG, self._response, ratio, kept_T, exact=form == "exact")
        _, train = _timed(lambda: self._fused(kept_T) if form == "fused" else self._unfused(unfused))
        assert self._hidden_TH.grad is not None
        return Outcome(kept_T, [self._hidden_TH.grad, self._main_grad_VH], weigh, train)

    def _weights(self, ratio: float) -> torch.Tensor:
        statistics = token_statistics(self._hidden_TH.detach(), self._head_VH.detach(), self._teacher_TG, self._teacher_head_VG)
        return _selected(statistics, self._response, ratio, len(self._head_VH))

    def _fused(self, kept_T: torch.Tensor) -> None:
        """As in training: rows that are not kept do not reach the loss, and the head's gradient goes where it is accumulated."""
        kept_K = kept_T.nonzero().squeeze(1)
        hidden_KH, teacher_KG = self._hidden_TH.index_select(0, kept_K), self._teacher_TG[kept_K]
        result = fused_head_divergence(hidden_KH, self._head_VH, teacher_KG, self._teacher_head_VG, kind="reverse_kl", accumulate_main_grad=True)
        (result.loss_sum / len(kept_K)).backward()

    def _unfused(self, objective: UnfusedObjective) -> None:
        result = objective(self._hidden_TH, self._head_VH, SimpleNamespace(teacher_hidden_TG=self._teacher_TG))
        (result.loss_sum / len(self._hidden_TH)).backward()
        assert self._head_VH.grad is not None
        self._main_grad_VH += self._head_VH.grad
        self._head_VH.grad = None


class RandomWeights:
    """The weights of a small Qwen3, drawn when they are asked for. Untied: a random head that is the embedding would repeat every token with certainty."""

    assets = Path()

    def __init__(self, case: SimpleNamespace) -> None:
        sizes = {"hidden_size": case.model_hidden, "intermediate_size": 3 * case.model_hidden, "num_hidden_layers": case.layers, "vocab_size": case.vocab}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        self.architecture = parse_architecture({"architectures": ["Qwen3ForCausalLM"], **sizes, **heads}, "the bench's model")
        self._generator = torch.Generator().manual_seed(1)

    def read(self, row: MappedTensor) -> torch.Tensor:
        if len(row.shape) == 1:
            return torch.ones(row.shape)
        deviation = {EMBEDDING: 1.0, HEAD: LOGITS_DEVIATION / row.shape[1] ** 0.5}.get(row.megatron, row.shape[1] ** -0.5)
        return torch.randn(row.shape, generator=self._generator).mul_(deviation)


class TrainingStep:
    """Level step: a student on one rank, responses in one micro-batch, the teacher's rows and head. No step changes a weight, so that all are the same."""

    def __init__(self, case: SimpleNamespace) -> None:
        device, groups = join_world(), student_groups(ParallelLayout(), 1)
        self.base_bytes = start_peak()
        self._response, generator, dtype = case.response, torch.Generator().manual_seed(0), getattr(torch, case.dtype)
        num_samples = case.tokens // case.response
        self._config = RunConfig(
            student=StudentConfig(hf="drawn", vocab_multiple=1),
            teacher=TeacherConfig(hf="drawn"),
            data=DataConfig(prompts="drawn"),
            # So small a change is lost in the rounding of every weight; unclipped gradients can be compared.
            training=TrainingConfig(precision="bf16" if dtype == torch.bfloat16 else "fp32", micro_batch=num_samples, learning_rate=1e-30, clip_grad=0),
        )
        self._vocab = case.vocab
        self._student = Student(self._config, RandomWeights(case), groups, device)
        head_VG = torch.randn(case.vocab, case.model_hidden, generator=generator).mul_(LOGITS_DEVIATION / case.model_hidden**0.5)
        self._objective = Distillation(loss=self._config.loss, vocab_size=case.vocab, tp_group=groups.collection.tp, teacher_head_WG=head_VG.to(device, dtype))
        rows = {index: torch.randn(case.response, case.model_hidden, generator=generator).to(device, dtype) for index in range(num_samples)}
        texts = torch.randint(case.vocab, (num_samples, PROMPT_TOKENS + case.response), generator=generator)
        samples = (Sample(index, 0, text[:PROMPT_TOKENS], text[PROMPT_TOKENS:], None, True) for index, text in enumerate(texts))
        self._micro_batches = self._student.micro_batches(Rollouts(tuple(samples), policy_version=0), TeacherRows(rows=rows, nothing=rows[0][:0]))
        # Adam makes its moments in its first step.
        self.step("fused", 1.0)

    def step(self, form: str, ratio: float) -> Outcome:
        kept_T, weigh = torch.ones(self._micro_batches.rollouts.num_response_tokens), Seconds()
        batches, objective = self._micro_batches, self._objective
        if form != "fused":
            assert self._objective.teacher_head_WG is not None
            unfused: Any = UnfusedObjective(self._objective.teacher_head_WG, self._response, ratio, kept_T, exact=form == "exact")
            objective = unfused
        elif ratio < 1:
            config = replace(self._config, importance=ImportanceConfig(rule="soft_or_topk", ratio=ratio))
            importance = Importance(config=config, vocab_size=self._vocab)
            (batches, _), weigh = _timed(lambda: importance.weigh(self._student, self._micro_batches, self._objective, 1))
            assert batches.weight_N is not None
            kept_T = batches.weight_N.cpu()
        (_, _, updated), train = _timed(lambda: self._student.train_step(batches, objective))
        assert updated, "the loss or its gradient is not finite"
        gradients = [parameter.main_grad for parameter in self._student.model.parameters()]  # type: ignore[attr-defined]
        return Outcome(kept_T, gradients, weigh, train)


LEVELS: dict[str, type[LossPart] | type[TrainingStep]] = {"head": LossPart, "step": TrainingStep}


def measure_memory(case: SimpleNamespace) -> dict[str, float]:
    """Return what one form at one ratio found in memory, and the most that its step added to it, in MiB."""
    _start()
    # glibc keeps freed blocks of up to 32 MiB for later, as if they were needed; from M_MMAP_THRESHOLD on each is mapped and unmapped by itself.
    ctypes.CDLL(None).mallopt(-3, 2**18)
    problem = LEVELS[case.level](case)
    before = start_peak()
    problem.step(case.form, case.ratio)
    return {"held_mib": (before - problem.base_bytes) / 2**20, "peak_mib": (peak_bytes() - before) / 2**20}


def measure_time(case: SimpleNamespace) -> dict[tuple[str, float], dict[str, float]]:
    """Return the seconds of every form at every ratio, and how many tokens only one of the two forms keeps."""
    _start()
    problem = LEVELS[case.level](case)
    rows: dict[tuple[str, float], dict[str, float]] = {(form, ratio): {"cpu_seconds": math.inf} for ratio in case.ratios for form in FORMS}
    for _ in range(case.repeats):
        for ratio in case.ratios:
            outcomes = {form: problem.step(form, ratio) for form in FORMS}
            for form, outcome in outcomes.items():
                row = rows[form, ratio]
                row["tokens_differ"] = _num_different(*outcomes.values())
                if outcome.weigh.cpu + outcome.train.cpu < row["cpu_seconds"]:
                    row.update(_seconds(outcome))
    return rows


def measure_errors(case: SimpleNamespace) -> dict[tuple[str, float], dict[str, float]]:
    """Return for every form at every ratio the largest relative error of a gradient, against the divergence in fp64 of what fp64 keeps; of few tokens."""
    _start()
    response = min(case.response, ERROR_RESPONSE)
    problem = LEVELS[case.level](SimpleNamespace(**{**vars(case), "response": response, "tokens": 2 * response}))
    rows = {}
    for ratio in case.ratios:
        exact = problem.step("exact", ratio)
        exact = exact._replace(gradients=[gradient.clone() for gradient in exact.gradients])
        for form in FORMS:
            outcome = problem.step(form, ratio)
            pairs = zip(outcome.gradients, exact.gradients, strict=True)
            rows[form, ratio] = {"gradient_error": max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)}
    return rows


def _start() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _num_different(left: Outcome, right: Outcome) -> int:
    return int(((left.kept_T != 0) != (right.kept_T != 0)).sum())


def _seconds(outcome: Outcome) -> dict[str, float]:
    parts = {f"{name}_{clock}_seconds": getattr(getattr(outcome, name), clock) for name in ("weigh", "train") for clock in ("cpu", "wall")}
    return {"cpu_seconds": outcome.weigh.cpu + outcome.train.cpu, "wall_seconds": outcome.weigh.wall + outcome.train.wall, **parts}
