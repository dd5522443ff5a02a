"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

from opd_megatron.planning.memory import Phase, RankMemory
from opd_megatron.planning.plan import ModelPlan, Plan

GIB = 1 << 30
NOTE = "planned, not measured: every prompt and response at its limit; CUDA context, communication buffers and fragmentation come on top (a few GiB)"
# A picture of more replicas is cut in the middle.
_REPLICAS_SHOWN = 8


def _notes(plan: Plan) -> list[str]:
    """Return what the numbers stand for."""
    training = plan.config.training
    unplanned = [f"training.{key}={value}" for key, value in (("layers", training.layers), ("fp8", training.fp8)) if value in ("te", training.fp8) and value]
    return [NOTE, *([f"planned for local layers in {training.precision}: what {' and '.join(unplanned)} keep instead is not counted"] if unplanned else [])]


def as_text(plan: Plan, gpu_memory_bytes: int, gpus_per_node: int) -> str:
    """Return the plan: what divides what, both layouts, memory of the first, middle, last and largest rank, their messages."""
    blocks = [
        _notes(plan),
        [line for model in plan.models for line in _model(plan, model, gpus_per_node)] + [_batch(plan)],
        [line for model in plan.models for line in _picture(model)],
        list(_memory(plan, gpu_memory_bytes)),
        list(_counting(plan)),
        list(_messages(plan)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def as_json(plan: Plan, gpu_memory_bytes: int) -> dict[str, Any]:
    """Return everything the text says, and every planned rank, as plain JSON values."""
    return {
        "note": " ".join(_notes(plan)),
        "world_size": plan.config.world_size,
        "gpu_memory_bytes": gpu_memory_bytes,
        "fits": plan.largest.total_bytes <= gpu_memory_bytes,
        "largest_rank": plan.largest.rank,
        "num_micro_batches": plan.num_micro_batches,
        "payload": {"messages": plan.payload_messages, "bytes": plan.payload_bytes, "gathered_bytes": plan.payload_gathered_bytes},
        "models": [{"role": model.role, "source": str(model.known.source), "layout": model.layout, "data_size": model.grid.data_size} for model in plan.models],
        "ranks": [
            {**asdict(rank), "peak_phase": rank.peak_phase, "total_bytes": rank.total_bytes, "messages": [asdict(message) for message in messages]}
            for rank, messages in zip(plan.ranks, plan.messages, strict=True)
        ],
    }


def _model(plan: Plan, model: ModelPlan, gpus_per_node: int) -> Iterator[str]:
    grid, layout = model.grid, model.grid.layout
    virtual = f" of {layout.virtual} chunks each" if layout.virtual > 1 else ""
    sizes = f"TP {layout.tensor} x PP {layout.pipeline}{virtual} x CP {layout.context} x DP {grid.data_size}"
    own = f", the last {grid.num_ranks} of {plan.config.world_size}" if grid.first_rank else ""
    yield f"{model.role + ':':<9}{grid.num_ranks} ranks = {sizes}{own}; architecture from {model.known.source}"
    if model.role == "rollout":
        yield "         the student's weights once more, filled before it writes and without memory otherwise"
    if grid.first_rank and plan.config.teacher is not None and plan.config.teacher.staleness:
        yield "         one batch ahead: two batches of rollouts in flight, scores of one wait while the student writes the next and trains"
    if (experts := model.known.architecture.experts) is not None:
        copies = grid.expert_shape["expt_dp"]
        parts = f", each in {layout.expert_tensor} parts (ETP)" if layout.expert_tensor > 1 else ""
        held = f"{experts.num_experts} experts = EP {layout.expert} x {experts.num_experts // layout.expert}{parts}, {copies} ranks of a stage hold the same"
        yield f"         {held}; a token visits {experts.experts_per_token}, taken to be all equally often"
    if gpus_per_node % layout.tensor:
        yield f"         its tensor groups of {layout.tensor} do not divide nodes of {gpus_per_node} GPUs: their sums would cross nodes"


def _batch(plan: Plan) -> str:
    config = plan.config
    samples = config.rollout.samples_per_prompt if config.training.objective == "opd" else 1
    limit = config.training.micro_batch_tokens
    size = f"at most {limit:,} tokens, packed" if limit is not None else f"{config.training.micro_batch}"
    return (
        f"batch:   {config.data.batch_prompts} prompts x {samples} = {config.num_sequences} sequences"
        f" over DP {plan.models[0].grid.data_size} x {plan.num_micro_batches} micro-batches of {size}"
    )


def _picture(model: ModelPlan) -> list[str]:
    title, *replicas = model.grid.picture(model.role).splitlines()
    if len(replicas) > _REPLICAS_SHOWN:
        half = _REPLICAS_SHOWN // 2
        replicas = [*replicas[:half], f"  ... {len(replicas) - 2 * half} more ...", *replicas[-half:]]
    return [title, *replicas]


def _memory(plan: Plan, gpu_memory_bytes: int) -> Iterator[str]:
    ranks = [plan.ranks[place] for place in plan.shown]
    yield _row("GiB", [f"rank {rank.rank}" for rank in ranks])
    yield _row("  pipeline stage, student / teacher", [_stages(rank) for rank in ranks])
    for phase in get_args(Phase):
        names = dict.fromkeys(term.name for rank in ranks for term in rank.terms if term.phase == phase)
        if names:
            yield "always there" if phase == "always" else f"during {phase}"
        for name in names:
            yield _row(
                f"  {name.partition(',')[0]}", [_gib(sum(term.num_bytes for term in rank.terms if (term.name, term.phase) == (name, phase))) for rank in ranks]
            )
    yield _row("always there + largest phase", [_gib(rank.total_bytes) for rank in ranks])
    yield _row("  which is", [rank.peak_phase for rank in ranks])
    yield _row("of a GPU's", [_gib(gpu_memory_bytes) for _ in ranks])


def _counting(plan: Plan) -> Iterator[str]:
    for rank in plan.largest_of_each_kind:
        yield f"how rank {rank.rank} is counted"
        for term in rank.terms:
            yield f"  {term.name + ':':<34}{term.why}"


def _messages(plan: Plan) -> Iterator[str]:
    for rank in plan.largest_of_each_kind:
        yield f"messages of one step on rank {rank.rank}: count x MiB of one"
        for message in plan.messages[plan.ranks.index(rank)]:
            head = f"{message.phase:<10}{message.group:<21}{message.operation:<26}"
            yield f"  {head}{message.count:>9,} x {message.num_bytes / (1 << 20):>9.3f}  {message.why}"
    crossing, gathered = (_gib(num_bytes) for num_bytes in (plan.payload_bytes, plan.payload_gathered_bytes))
    yield f"payload, all ranks: {plan.payload_messages:,} messages; {crossing} GiB from outside the tensor groups, {gathered} GiB inside them"


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<36}" + "".join(f"{cell:>20}" for cell in cells)


def _stages(rank: RankMemory) -> str:
    return " / ".join("-" if stage is None else str(stage) for stage in (rank.student_stage, rank.teacher_stage))


def _gib(num_bytes: int) -> str:
    # Tiny models are planned too.
    return f"{num_bytes / GIB:.2f}" if num_bytes >= GIB // 100 else f"{num_bytes / GIB:.6f}" if num_bytes else "-"
