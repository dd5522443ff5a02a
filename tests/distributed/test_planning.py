"""Plans against what ranks really hold, save and send. Plans of worlds that no test can start are in test_plans.py.

Not covered: GPUs. What CUDA kernels allocate besides tensors, and the temporaries of a backward, are not planned either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from opd_megatron.config import (
    DataConfig,
    EvaluationConfig,
    ParallelLayout,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
    apply_overrides,
)
from opd_megatron.parallel.layout import replica_share
from tests.pool import RankPool
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
PUBLISHED = (ROOT / "recipes" / "architectures", ROOT / "recipes" / "assets")
GIB = 1 << 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", "qwen3", tied=True, vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "llama", "llama", vocab_size=263, hidden_size=128)
    # As in real models the feed-forward is the widest part of a layer; of a mixture, the copies of every token.
    write_tiny_model(folder / "wide", vocab_size=263, hidden_size=128, intermediate_size=512)
    write_tiny_model(folder / "wide_mixture", "qwen3_moe", vocab_size=263, hidden_size=128, num_experts_per_tok=6)
    write_tiny_model(folder / "teacher", "qwen3", vocab_size=263, hidden_size=96)
    write_tiny_model(folder / "mixture", "qwen3_moe", tied=True, vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "mixture_teacher", "qwen3_moe", vocab_size=263, hidden_size=96, norm_topk_prob=False)
    return folder


@pytest.fixture(scope="module")
def planner() -> Iterator[Callable[..., Any]]:
    """Call a function in a process that is no rank: a plan makes a process one of a world that does not exist."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result(timeout=300)


def tiny_config(
    models: Path, student: ParallelLayout, teacher: ParallelLayout, *, world_size: int, precision: str = "fp32", micro_batch: int = 2, mixture: bool = False
) -> RunConfig:
    folders = (models / "mixture", models / "mixture_teacher") if mixture else (models / "student", models / "teacher")
    return RunConfig(
        world_size=world_size,
        student=StudentConfig(hf=str(folders[0]), layout=student, vocab_multiple=4),
        teacher=TeacherConfig(hf=str(folders[1]), layout=teacher, micro_batch=3),
        data=DataConfig(prompts="prompts.jsonl", batch_prompts=16, max_prompt_tokens=20),
        rollout=RolloutConfig(max_response_tokens=12),
        training=TrainingConfig(micro_batch=micro_batch, precision=precision),
        evaluation=EvaluationConfig(prompts=0),
    )


def build(config: RunConfig, bridge: Any = None) -> tuple[Any, Any]:
    """Return the student and the teacher that a rank of a run builds; with a `bridge`, a student whose teacher is on ranks of its own."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups, teacher_groups
    from opd_megatron.parallel.world import worlds
    from opd_megatron.teacher.teacher import Teacher
    from opd_megatron.training.setup import make_router, make_scorer
    from opd_megatron.training.student import Student

    device, source = torch.device("cpu"), open_weights(hf=config.teacher.hf)
    student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), device)
    scorer = make_scorer(source, config, teacher_groups(config.teacher.layout), device) if bridge is None else None
    with worlds(0) if bridge is None else nullcontext(bridge) as way:
        router = make_router(source, config, way)
    return student, Teacher(source, router, scorer, student.groups, student_padded_vocab=student.padded_vocab, device=device)


def longest_rollouts(config: RunConfig) -> Any:
    """Return a step in which every prompt and every response has reached its limit."""
    from opd_megatron.data.batches import Sample
    from opd_megatron.rollout.rollouts import Rollouts

    prompt, response = torch.arange(config.data.max_prompt_tokens), torch.arange(config.rollout.max_response_tokens)
    return Rollouts(tuple(Sample(index, 0, prompt, response, None, True) for index in range(config.num_sequences)), 0)


LAYOUTS = {
    "TP2xPP2, teacher DP4": ({"tensor": 2, "pipeline": 2}, {}),
    "TP2+SPxDP2, teacher TP2xPP2": ({"tensor": 2, "sequence": True}, {"tensor": 2, "pipeline": 2}),
    "PP2xDP2, teacher TP2xDP2": ({"pipeline": 2}, {"tensor": 2}),
    "CP2xTP2, teacher CP2xPP2": ({"context": 2, "tensor": 2}, {"context": 2, "pipeline": 2}),
    "PP2xVPP2xDP2, teacher DP4": ({"pipeline": 2, "virtual": 2}, {}),
}
# Of two mixtures of experts.
MIXTURES = {
    "EP2xPP2, teacher EP4": ({"expert": 2, "pipeline": 2}, {"expert": 4}),
    "TP2+SPxEP2, teacher EP2xPP2": ({"tensor": 2, "sequence": True, "expert": 2}, {"expert": 2, "pipeline": 2}),
    "CP2xEP4, teacher EP2xTP2": ({"context": 2, "expert": 4}, {"expert": 2, "tensor": 2}),
    "DP4 of whole mixtures, teacher TP2": ({}, {"tensor": 2}),
    "EP2xETP2, teacher TP2xETP2": ({"expert": 2, "expert_tensor": 2}, {"tensor": 2, "expert_tensor": 2}),
    "TP2+SPxETP2, teacher ETP4": ({"tensor": 2, "sequence": True, "expert_tensor": 2}, {"expert_tensor": 4}),
    "PP2xETP2, teacher EP2xETP2": ({"pipeline": 2, "expert_tensor": 2}, {"expert": 2, "expert_tensor": 2}),
}


def config_of(models: Path, name: str, precision: str = "fp32") -> RunConfig:
    student, teacher = {**LAYOUTS, **MIXTURES}[name]
    return tiny_config(models, ParallelLayout(**student), ParallelLayout(**teacher), world_size=4, precision=precision, mixture=name in MIXTURES)


# --- memory ------------------------------------------------------------------------------------------------------------------------------


def held_bytes(config: RunConfig, bridge: Any = None) -> dict[str, int]:
    """Return what this rank of the student really holds of each kind, every storage once."""
    from opd_megatron.training.optimizer import optimizer_state, prime_adam

    student, teacher = build(config, bridge)
    received = teacher.score(longest_rollouts(config))
    prime_adam(student.optimizer)
    weights = storages(student.model.parameters())
    gradients = storages(buffer.grad_data for buffer in buffers(student))
    optimizer = storages(optimizer_state(student.optimizer))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "teacher weights": sum(storages(teacher.scorer.model.parameters() if teacher.scorer is not None else []).values()),
        "scores received": sum(rows.nbytes for rows in (received.rows if received is not None else {}).values()),
        "teacher head slice": sum(storages([teacher.head_WG] if teacher.head_WG is not None else []).values()),
        "payload bytes": teacher.payload_bytes,
        "gathered bytes": teacher.gathered_bytes,
    }


def held_apart(config: RunConfig) -> dict[str, int]:
    """Return the same of a rank of either world, the teacher's having ranks of its own."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import teacher_groups
    from opd_megatron.parallel.world import worlds
    from opd_megatron.training.setup import make_router, make_scorer

    with worlds(config.num_teacher_ranks) as bridge:
        if bridge.rank in bridge.student_ranks:
            return held_bytes(config, bridge)
        device, source = torch.device("cpu"), open_weights(hf=config.teacher.hf)
        scorer, router = make_scorer(source, config, teacher_groups(config.teacher.layout), device), make_router(source, config, bridge)
        rollouts = bridge.told_by_student().rollouts
        route, rows = router.route(rollouts), scorer.hidden_rows(rollouts)
        router.deliver(route, rows, device)
        return {
            "teacher weights": sum(storages(scorer.model.parameters()).values()),
            "scores made": sum(part.nbytes for part in rows.values()),
            "payload bytes": route.plan.sent_rows() * router.row_bytes,
            "gathered bytes": route.plan.gathered_rows() * router.row_bytes,
        }


def buffers(student: Any) -> list[Any]:
    """Return what holds the student's gradients; experts have buffers of their own."""
    return [buffer for chunk in student.ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def planned_bytes(config: RunConfig) -> list[dict[str, int]]:
    """Return the plan of every rank of the world, not only of those that a plan shows."""
    from opd_megatron.models.gpt import DTYPES
    from opd_megatron.planning import make_plan
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.memory import rank_memory
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank

    student, teacher = know_model("student", config.student, PUBLISHED), know_model("teacher", config.teacher, PUBLISHED)
    payload, row_bytes = step_payload(config), teacher.architecture.hidden_size * DTYPES[config.training.precision].itemsize
    ranks = [rank_memory(plan_rank(config, student, teacher, payload, rank)) for rank in range(config.world_size)]
    plan = make_plan(config, PUBLISHED)
    everyone = {"payload bytes": plan.payload_bytes, "gathered bytes": plan.payload_gathered_bytes}
    scores = [{"scores received": payload.needed_rows(rank) * row_bytes, "scores made": payload.held_rows(rank) * row_bytes} for rank in range(len(ranks))]
    return [{**{term.name: term.num_bytes for term in memory.terms}, **everyone, **own} for memory, own in zip(ranks, scores, strict=True)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*LAYOUTS, *MIXTURES])
def test_ranks_hold_what_was_planned(models: Path, pool: RankPool, planner: Callable[..., Any], name: str, precision: str) -> None:
    config = config_of(models, name, precision)
    planned = planner(planned_bytes, config)
    for rank, held in enumerate(pool.run(held_bytes, config)):
        for kind, num_bytes in held.items():
            # Megatron aligns every parameter in its buffers, which is much of a tiny norm and nothing of a real matrix.
            rel = 0.1 if kind in ("weights", "gradients", "optimizer") else 0
            assert planned[rank].get(kind, 0) == pytest.approx(num_bytes, rel=rel), (rank, kind)


APART = {
    "TP2, teacher TP2 on ranks of its own": ({"tensor": 2}, {"tensor": 2}),
    "PP2, teacher CP2 on ranks of its own": ({"pipeline": 2}, {"context": 2}),
    "EP2, teacher EP2 on ranks of its own": ({"expert": 2}, {"expert": 2}),
}


@pytest.mark.parametrize("name", APART)
def test_ranks_of_two_worlds_hold_what_was_planned(models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    student, teacher = APART[name]
    config = tiny_config(models, ParallelLayout(**student), ParallelLayout(**teacher), world_size=4, mixture="expert" in student)
    config = apply_overrides(config, ["teacher.placement=dedicated", "teacher.num_ranks=2", "teacher.staleness=1"])
    planned, measured = planner(planned_bytes, config), pool.run(held_apart, config)
    for rank, held in enumerate(measured):
        for kind, num_bytes in held.items():
            # As above: alignment of tiny parameters.
            rel = 0.1 if kind in ("weights", "gradients", "optimizer") else 0
            assert planned[rank].get(kind, 0) == pytest.approx(num_bytes, rel=rel), (rank, kind)
        assert {kind for kind in planned[rank] if kind in ("weights", "teacher weights")} == {"weights" if rank < 2 else "teacher weights"}
    assert sum(held.get("scores received", 0) for held in measured) > 0


def bytes_inside_and_outside(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Return, of what is offloaded, the bytes on the device in the phase that needs it and in the others."""
    from opd_megatron.training.optimizer import optimizer_state, prime_adam

    student, teacher = build(config)
    with student.optimizer_on_device():
        prime_adam(student.optimizer)

    def now() -> dict[str, int]:
        kinds = {
            "gradients": [buffer.grad_data for buffer in buffers(student)],
            "optimizer": optimizer_state(student.optimizer),
            "teacher weights": list(teacher.scorer.model.parameters()),
        }
        return {kind: sum(storages(tensors).values()) for kind, tensors in kinds.items()}

    outside = now()
    with student.optimizer_on_device(), teacher.scorer.on_device():
        inside = now()
    return {kind: (inside[kind], outside[kind]) for kind in inside}


def planned_phases(config: RunConfig) -> dict[str, dict[str, int]]:
    from opd_megatron.planning import make_plan

    phases: dict[str, dict[str, int]] = {}
    for term in make_plan(config, PUBLISHED).ranks[0].terms:
        phases.setdefault(term.name, {})[term.phase] = term.num_bytes
    return phases


def test_what_waits_on_the_host_is_planned_for_its_phase_only(models: Path, pool: RankPool, planner: Callable[..., Any]) -> None:
    config = apply_overrides(config_of(models, "TP2xPP2, teacher DP4"), ["teacher.placement=offloaded", "training.offload_optimizer=true"])
    planned = planner(planned_phases, config)
    for kind, (inside, outside) in pool.run(bytes_inside_and_outside, config)[0].items():
        assert list(planned[kind]) == ["teacher" if kind == "teacher weights" else "train"]
        # As above: alignment of tiny parameters.
        assert sum(planned[kind].values()) == pytest.approx(inside, rel=0.1)
        assert outside == 0


def saved_bytes(config: RunConfig) -> int:
    """Return the bytes that autograd keeps of one forward of the student."""
    from opd_megatron.models.gpt import build_gpt, hidden_states_only
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.models.layers import RMSNorm, packed_sequences
    from opd_megatron.parallel.groups import student_groups

    groups = student_groups(config.student.layout, 1)
    training = config.training
    model = build_gpt(read_architecture(Path(config.student.hf)), groups, precision=training.precision, vocab_multiple=4, recompute=training.recompute)
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    length, limit = (config.data.max_prompt_tokens + config.rollout.max_response_tokens) // config.student.layout.context, config.training.micro_batch_tokens
    packed = packed_sequences([length] * (limit // length)) if limit is not None else None
    tokens_BS = torch.zeros((1, limit) if limit is not None else (config.training.micro_batch, length), dtype=torch.long)
    usual, RMSNorm.forward = RMSNorm.forward, lambda self, x: FusedRMSNorm.apply(x, self.weight, self.eps)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hidden_states_only(model):
            model.last(tokens_BS, torch.arange(tokens_BS.size(1)).expand_as(tokens_BS), None, packed_seq_params=packed)
    finally:
        RMSNorm.forward = usual
    if "mixture" in config.student.hf:
        # Experts see matrices: all that is saved counts, but weights and ids of tokens.
        weights = storages(model.parameters())
        kept = storages(tensor for tensor in saved.values() if tensor.shape != tokens_BS.shape)
        return sum(num_bytes for place, num_bytes in kept.items() if place not in weights)
    # Matrices are no activations: weights, token ids, and the mask that attention over context ranks needs on CPU (flash attention needs none).
    return sum(storages(tensor for tensor in saved.values() if tensor.dim() > 2).values())


class FusedRMSNorm(torch.autograd.Function):
    """Saves what PyTorch's CUDA kernel saves: the input and one number a row. On CPU the norm is several operations, each with its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype) * weight


def planned_activations(config: RunConfig) -> int:
    from opd_megatron.planning import make_plan

    (term,) = (term for term in make_plan(config, PUBLISHED).ranks[0].terms if term.name == "activations")
    return term.num_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("student", "layout", "micro_batch"),
    [
        ("student", {}, 1),
        ("student", {}, 4),
        ("student", {"tensor": 2}, 2),
        ("student", {"tensor": 2, "sequence": True}, 2),
        ("llama", {}, 2),
        ("llama", {"tensor": 2, "sequence": True}, 1),
        ("student", {"context": 2}, 1),
        ("llama", {"context": 2}, 2),
        ("mixture", {}, 2),
        ("mixture", {"expert": 2}, 2),
        ("mixture", {"expert": 2, "tensor": 2, "sequence": True}, 2),
        ("mixture_teacher", {"expert": 2}, 1),
        ("mixture", {"expert_tensor": 2}, 2),
        ("mixture_teacher", {"expert_tensor": 2, "tensor": 2, "sequence": True}, 1),
        ("mixture", {"expert": 2, "expert_tensor": 2}, 2),
    ],
)
def test_autograd_saves_what_was_planned(
    models: Path, pool: RankPool, planner: Callable[..., Any], student: str, layout: dict[str, Any], micro_batch: int, precision: str
) -> None:
    num_ranks = max(2, layout.get("expert", 1) * layout.get("expert_tensor", 1))
    config = tiny_config(models, ParallelLayout(**layout), ParallelLayout(), world_size=num_ranks, precision=precision, micro_batch=micro_batch)
    config = replace(config, student=replace(config.student, hf=str(models / student)))
    # However a router spreads the tokens, the ranks that share experts save as much together as planned.
    assert num_ranks * planner(planned_activations, config) == sum(pool.run(saved_bytes, config, world_size=num_ranks))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside had at once; views of `others` are none of them."""

    def __init__(self, others: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or not storage.nbytes():
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, place: int, num_bytes: int) -> None:
        self._known.discard(place)
        self.now -= num_bytes


def forward_peak(config: RunConfig) -> tuple[int, int]:
    """Return the bytes that a forward of the student without gradients needs at once beside its weights, and how many tokens it has."""
    from opd_megatron.models.forward import forward_hidden, inference_mode
    from opd_megatron.models.gpt import build_gpt
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.parallel.groups import student_groups

    groups = student_groups(config.student.layout, 1)
    model = build_gpt(read_architecture(Path(config.student.hf)), groups, precision=config.training.precision, vocab_multiple=4)
    tokens_BS = torch.randint(0, 256, (4, 100), generator=torch.Generator().manual_seed(dist.get_rank()))
    with inference_mode(model, groups), LiveBytes([tokens_BS, *model.parameters()]) as live:
        forward_hidden(model, groups, tokens_BS)
    return live.peak, tokens_BS.numel()


def planned_forward(config: RunConfig) -> int:
    from opd_megatron.models.gpt import DTYPES
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.planning.activations import forward_bytes_per_token

    architecture, itemsize = read_architecture(Path(config.student.hf)), DTYPES[config.training.precision].itemsize
    return forward_bytes_per_token(architecture, config.student.layout, itemsize=itemsize, num_layers=architecture.num_layers)


RECOMPUTED, PACKED = "training.recompute=full", "training.micro_batch_tokens=96"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "layout", "settings"),
    [
        ("student", {}, [RECOMPUTED]),
        ("student", {"tensor": 2, "sequence": True}, [RECOMPUTED]),
        ("mixture", {"expert": 2}, [RECOMPUTED]),
        ("mixture", {"expert_tensor": 2}, [RECOMPUTED]),
        ("student", {}, [PACKED]),
        ("llama", {"tensor": 2, "sequence": True}, [PACKED]),
        ("mixture", {}, [PACKED]),
        ("mixture", {"expert_tensor": 2}, [PACKED]),
        ("student", {"tensor": 2}, [PACKED, RECOMPUTED]),
    ],
)
def test_autograd_saves_what_was_planned_of_packs_and_recomputed_layers(
    models: Path, pool: RankPool, planner: Callable[..., Any], student: str, layout: dict[str, Any], settings: list[str]
) -> None:
    config = tiny_config(models, ParallelLayout(**layout), ParallelLayout(), world_size=2, precision="bf16", micro_batch=1)
    config = apply_overrides(replace(config, student=replace(config.student, hf=str(models / student))), settings)
    assert 2 * planner(planned_activations, config) == sum(pool.run(saved_bytes, config, world_size=2))


def most_in_flight(config: RunConfig) -> int:
    """Return how many micro-batches, each on one chunk, this rank has sent forward and not yet backward, at most."""
    from opd_megatron.training.objective import Distillation

    student, teacher = build(config)
    rollouts = longest_rollouts(config)
    objective = Distillation(loss=config.loss, vocab_size=263, tp_group=student.groups.collection.tp, teacher_head_WG=teacher.head_WG)
    now, most = 0, 0

    def forward(*_: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)

    def backward(*_: Any) -> None:
        nonlocal now
        now -= 1

    for chunk in student.model:
        chunk.decoder.register_forward_hook(forward)
        # Where a chunk begins its backward ends.
        chunk.decoder.layers[0].self_attention.linear_qkv.weight.register_post_accumulate_grad_hook(backward)
    student.train_step(student.micro_batches(rollouts, teacher.score(rollouts)), objective)
    return most


def planned_in_flight(config: RunConfig) -> list[int]:
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank
    from opd_megatron.planning.step_shape import StepShape

    student, payload = know_model("student", config.student, PUBLISHED), step_payload(config)
    return [StepShape(plan_rank(config, student, None, payload, rank)).num_in_flight for rank in range(config.world_size)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "batch_prompts"), [({"pipeline": 4}, 16), ({"pipeline": 2, "virtual": 2}, 16), ({"pipeline": 2, "virtual": 2}, 4)])
def test_stages_hold_as_many_micro_batches_as_planned(
    models: Path, pool: RankPool, planner: Callable[..., Any], layout: dict[str, Any], batch_prompts: int
) -> None:
    config = tiny_config(models, ParallelLayout(**layout), ParallelLayout(), world_size=4)
    config = apply_overrides(config, [f"data.batch_prompts={batch_prompts}"])
    assert pool.run(most_in_flight, config) == planner(planned_in_flight, config)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("student", "layout", "world_size"),
    [
        ("wide", {}, 2),
        ("wide_mixture", {}, 2),
        ("wide_mixture", {"expert": 2}, 2),
        ("wide_mixture", {"tensor": 2}, 2),
        ("wide_mixture", {"expert_tensor": 2}, 2),
        ("wide_mixture", {"tensor": 2, "expert_tensor": 2}, 2),
        ("wide_mixture", {"expert": 2, "expert_tensor": 2}, 4),
    ],
)
def test_a_forward_without_gradients_needs_what_was_planned(
    models: Path, pool: RankPool, student: str, layout: dict[str, Any], world_size: int, precision: str
) -> None:
    config = tiny_config(models, ParallelLayout(**layout), ParallelLayout(), world_size=world_size, precision=precision)
    config = replace(config, student=replace(config.student, hf=str(models / student)))
    measured = pool.run(forward_peak, config, world_size=world_size)
    # However tokens are spread. Cosines, sines and the router's logits are not planned, and much of a tiny model.
    assert sum(peak for peak, _ in measured) == pytest.approx(sum(tokens for _, tokens in measured) * planned_forward(config), rel=0.05)


# --- messages ----------------------------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::allgather_": "all-gather",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::reduce_scatter_": "reduce-scatter",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d::alltoall_base_": "all-to-all",
    "c10d::send": "send",
    "c10d::broadcast_": "broadcast",
}
# Sums and maximum of the loss, the gradient norm and the token count; the token count goes from the last stage to the others.
SCALARS = {"all-reduce": 4, "broadcast": 1}


def sent_messages(config: RunConfig) -> dict[str, dict[str, int]]:
    """Return how many messages of each kind this rank sends while it writes, scores and trains."""
    from opd_megatron.rollout.engine import Sampler
    from opd_megatron.rollout.sampling import SamplingSettings
    from opd_megatron.training.objective import Distillation

    student, teacher = build(config)
    rollouts = longest_rollouts(config)
    # Without an end-of-sequence token every response reaches its limit.
    sampler = Sampler(student.model, student.groups, vocab_size=263, eos_ids=(), batch_sequences=config.rollout.batch_sequences)
    objective = Distillation(loss=config.loss, vocab_size=263, tp_group=student.groups.collection.tp, teacher_head_WG=teacher.head_WG)
    share = [rollouts.samples[index] for index in replica_share(len(rollouts.samples), student.groups.data_rank, student.groups.data_size)]
    settings = SamplingSettings(max_response_tokens=config.rollout.max_response_tokens)
    scores: list[Any] = []
    counts = {
        "rollout": counted(lambda: sampler.generate([sample.prompt_ids.tolist() for sample in share], [(i,) for i in range(len(share))], settings)),
        "teacher": counted(lambda: scores.append(teacher.score(rollouts))),
        "weigh": {},
        "train": counted(lambda: student.train_step(student.micro_batches(rollouts, scores[0]), objective)),
    }
    if config.importance.rule != "all":
        counts["weigh"] = counted(lambda: student.statistics(student.micro_batches(rollouts, scores[0]), objective, 1.0))
    # Megatron also calls the data-parallel collectives of a group of one, and gathers all weights once for each optimizer, the dense and the experts'.
    in_vain = sum(len(buffer.buckets) for buffer in buffers(student) if buffer.data_parallel_group.size() == 1)
    for operation, times in {"reduce-scatter": 1, "all-gather": len(student.optimizer.chained_optimizers)}.items() if in_vain else ():
        counts["train"][operation] -= times * in_vain
    return {phase: {operation: count for operation, count in of_phase.items() if count} for phase, of_phase in counts.items()}


def counted(action: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    counts: dict[str, int] = {}
    for event in profile.key_averages():
        if event.key in OPERATIONS:
            counts[OPERATIONS[event.key]] = counts.get(OPERATIONS[event.key], 0) + event.count
    return counts


def planned_messages(config: RunConfig) -> list[dict[str, dict[str, int]]]:
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.messages import rank_messages
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank

    student, teacher = know_model("student", config.student, PUBLISHED), know_model("teacher", config.teacher, PUBLISHED)
    by_rank, payload = [], step_payload(config)
    for rank in range(config.world_size):
        counts: dict[str, dict[str, int]] = {"rollout": {}, "teacher": {}, "weigh": {}, "train": dict(SCALARS)}
        for message in rank_messages(plan_rank(config, student, teacher, payload, rank)):
            of_phase = counts["train" if message.phase == "optimizer" else message.phase]
            # The default loss is a KL divergence, whose exchange is all-reduces.
            operation = "all-reduce" if message.operation.startswith("all-reduce") else message.operation
            of_phase[operation] = of_phase.get(operation, 0) + message.count
        by_rank.append(counts)
    return by_rank


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MIXTURES])
def test_ranks_send_as_many_messages_as_planned(models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    check_messages(config_of(models, name), pool, planner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4", "EP2xETP2, teacher TP2xETP2"])
def test_packs_and_recomputed_layers_send_as_many_messages_as_planned(models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    config = replace(config_of(models, name), training=TrainingConfig(precision="fp32"))
    check_messages(apply_overrides(config, [RECOMPUTED, PACKED]), pool, planner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4"])
def test_the_pass_of_a_selection_rule_sends_as_many_messages_as_planned(models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    check_messages(apply_overrides(config_of(models, name), ["importance.rule=soft_or_topk"]), pool, planner)


def check_messages(config: RunConfig, pool: RankPool, planner: Callable[..., Any]) -> None:
    planned = planner(planned_messages, config)
    for rank, sent in enumerate(pool.run(sent_messages, config)):
        assert sent == planned[rank], rank
