"""One step, the same in every layout; runs that resume bit for bit; steps that must change nothing.

Not covered: GPUs, bf16 across layouts (its rounding differs by design), more than 4 ranks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ParallelLayout,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.job import run_in_world
from opd_megatron.training.optimizer import optimizer_state
from opd_megatron.training.trainer import Trainer
from tests.pool import RankPool
from tests.tiny import write_tiny_model

ASSETS = Path(__file__).parents[2] / "recipes" / "assets"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher folder, and prompts of uneven length."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=4)
    write_tiny_model(folder / "teacher", tied=False, vocab_size=263, seed=2, scale=0.5, hidden_size=96)
    write_prompts(folder / "prompts.jsonl")
    return folder


def write_prompts(file: Path) -> None:
    rows = [{"prompt": "count " + "abc"[: 1 + i % 3] * (1 + i % 5), "answer": str(i)} for i in range(64)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _config(models: Path, **layout: Any) -> RunConfig:
    return RunConfig(
        student=StudentConfig(hf=str(models / "student"), layout=ParallelLayout(**layout), vocab_multiple=4),
        teacher=TeacherConfig(hf=str(models / "teacher"), micro_batch=3),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=8, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=10),
        training=TrainingConfig(steps=3, micro_batch=2, learning_rate=1e-3, precision="fp32"),
        evaluation=EvaluationConfig(prompts=0),
    )


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _job(config: RunConfig, run: Path) -> str:
    return run_in_world("test", config, run, torch.device("cpu"))


def _state(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def recorded(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-process run whose rollouts the other layouts replay."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    config = _config(models)
    pool.run(_job, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)), run, world_size=1)
    return run


def _with_teacher(config: RunConfig, own: int | None = None, **layout: Any) -> RunConfig:
    """Lay the teacher out; with `own`, on that many ranks of its own."""
    assert config.teacher is not None
    teacher = dataclasses.replace(config.teacher, layout=ParallelLayout(**layout), placement="dedicated" if own else "colocated", num_ranks=own)
    return dataclasses.replace(config, teacher=teacher)


LAYOUTS = {
    "TP2": ({"tensor": 2}, {}, 2),
    "TP2+SP": ({"tensor": 2, "sequence": True}, {}, 2),
    "PP2": ({"pipeline": 2}, {}, 2),
    "TP2xPP2": ({"tensor": 2, "pipeline": 2}, {}, 4),
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, 4),
    "DP2": ({}, {}, 2),
    "DP2xPP2, teacher TP2": ({"pipeline": 2}, {"tensor": 2}, 4),
    "TP2xDP2, teacher TP2xPP2": ({"tensor": 2}, {"tensor": 2, "pipeline": 2}, 4),
    "DP4, teacher TP2": ({}, {"tensor": 2}, 4),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, 2),
    "TP2xPP2xVPP2+SP": ({"tensor": 2, "pipeline": 2, "virtual": 2, "sequence": True}, {}, 4),
    "CP2": ({"context": 2}, {}, 2),
    "CP2xTP2+SP, teacher PP2": ({"context": 2, "tensor": 2, "sequence": True}, {"pipeline": 2}, 4),
    "CP2xPP2, teacher CP2": ({"context": 2, "pipeline": 2}, {"context": 2}, 4),
    "TP2, teacher CP4": ({"tensor": 2}, {"context": 4}, 4),
    "one rank, one of the teacher's own": ({}, {"own": 1}, 2),
    "TP2, TP2 of the teacher's own": ({"tensor": 2}, {"tensor": 2, "own": 2}, 4),
    "DP2, PP2 of the teacher's own": ({}, {"pipeline": 2, "own": 2}, 4),
    "PP2, CP2 of the teacher's own": ({"pipeline": 2}, {"context": 2, "own": 2}, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_losses_and_gradient_norms(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, teacher, world_size = LAYOUTS[name]
    config = _with_teacher(_config(models, **student), **teacher)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    pool.run(_job, config, tmp_path / "run", world_size=world_size)
    for ours, reference in zip(_metrics(tmp_path / "run"), _metrics(recorded), strict=True):
        # fp32 sums in another order; 1e-5 is what the project promises.
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])
        assert ours["response_tokens"] == reference["response_tokens"]


PACKED = {
    "one rank": ({}, {}, 1),
    "DP4": ({}, {}, 4),
    "TP2+SP": ({"tensor": 2, "sequence": True}, {}, 2),
    "PP2": ({"pipeline": 2}, {"tensor": 2}, 2),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, 2),
    "CP2": ({"context": 2}, {}, 2),
    "CP2xTP2+SP, teacher CP2": ({"context": 2, "tensor": 2, "sequence": True}, {"context": 2}, 4),
    "DP2, TP2 of the teacher's own": ({}, {"tensor": 2, "own": 2}, 4),
}


QUICK_PACKED = ("one rank", "DP4", "PP2xVPP2", "CP2xTP2+SP, teacher CP2")


@pytest.mark.parametrize("name", [name if name in QUICK_PACKED else pytest.param(name, marks=pytest.mark.slow) for name in PACKED])
def test_packed_sequences_train_as_padded_ones_do(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    """No sequence sees another in its pack: losses and gradients are those of one sequence a row. 8 samples of 8 to 31 tokens."""
    student, teacher, world_size = PACKED[name]
    config = _with_teacher(_config(models, **student), **teacher)
    training = dataclasses.replace(config.training, micro_batch=1, micro_batch_tokens=80)
    config = dataclasses.replace(config, training=training, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    pool.run(_job, config, tmp_path / "run", world_size=world_size)
    for ours, reference in zip(_metrics(tmp_path / "run"), _metrics(recorded), strict=True):
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])
        if name == "one rank":
            assert 0 <= ours["padding_share"] < reference["padding_share"]


@pytest.mark.parametrize("training", [{"micro_batch": 2}, {"micro_batch_tokens": 80}], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("student", "count"),
    [({}, 3), ({"pipeline": 2, "virtual": 2}, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (({}, 7), ({"pipeline": 2}, 5)))],
    ids=str,
)
def test_a_batch_that_does_not_divide_leaves_some_replicas_less_to_do(
    models: Path, pool: RankPool, tmp_path: Path, student: dict[str, Any], count: int, training: dict[str, Any]
) -> None:
    """Four replicas share 3 samples: one has none, and joins in everything."""
    config = _config(models)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_prompts=count))
    pool.run(_job, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)), tmp_path / "one", world_size=1)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, layout=ParallelLayout(**student)),
        rollout=dataclasses.replace(config.rollout, replay=str(tmp_path / "one")),
        training=dataclasses.replace(config.training, **{"micro_batch": 1, **training}),
    )
    pool.run(_job, config, tmp_path / "four", world_size=4)
    for ours, reference in zip(_metrics(tmp_path / "four"), _metrics(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def test_recomputed_layers_give_the_same_gradients(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, tensor=2, pipeline=2, sequence=True)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    for recompute in ("none", "full"):
        training = dataclasses.replace(config.training, recompute=recompute)
        pool.run(_job, dataclasses.replace(config, training=training), tmp_path / recompute, world_size=4)
    assert [step["grad_norm"] for step in _metrics(tmp_path / "full")] == [step["grad_norm"] for step in _metrics(tmp_path / "none")]


@pytest.mark.parametrize("loss", [{"kind": "skew_reverse", "alpha": 0.2}, {"kind": "topk_tail_forward", "top_k": 5}, {"kind": "k3"}], ids=lambda x: x["kind"])
def test_other_kinds_of_loss_train_alike_in_every_layout(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, loss: dict[str, Any]) -> None:
    for run, layout, world_size in (("one", {}, 1), ("four", {"tensor": 2, "pipeline": 2}, 4)):
        config = _config(models, **layout)
        config = dataclasses.replace(config, loss=LossConfig(**loss), rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
        pool.run(_job, config, tmp_path / run, world_size=world_size)
    one, four = _metrics(tmp_path / "one"), _metrics(tmp_path / "four")
    assert [step["grad_norm"] > 0 for step in one] == [True, True, True]
    for ours, reference in zip(four, one, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def _offloaded_bytes(config: RunConfig, run: Path) -> list[tuple[int, int]]:
    """Train; return the bytes that teacher and optimizer hold whenever the student begins to write."""
    held = []
    write = Trainer._write

    def watched(self: Trainer, step: int) -> Rollouts:
        assert self.teacher is not None
        assert self.teacher.scorer is not None
        assert self.teacher.scorer.offloaded is not None
        tensors = [*optimizer_state(self.student.optimizer), *(buffer.grad_data for chunk in self.student.ddp for buffer in chunk.buffers)]
        held.append((self.teacher.scorer.offloaded.device_bytes, sum(tensor.untyped_storage().nbytes() for tensor in tensors)))
        return write(self, step)

    Trainer._write = watched  # type: ignore[method-assign]
    try:
        run_in_world("test", config, run, torch.device("cpu"))
    finally:
        Trainer._write = write  # type: ignore[method-assign]
    return held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_offloaded_is_away_while_the_student_writes_and_changes_nothing(models: Path, pool: RankPool, tmp_path: Path, precision: str) -> None:
    """Bit for bit, across a stop and a resume: values only travel."""
    config = _config(models, tensor=2)
    training = dataclasses.replace(config.training, precision=precision, steps=3)
    config = dataclasses.replace(config, training=training, checkpoint=CheckpointConfig(every_steps=2))
    pool.run(_job, config, tmp_path / "resident", world_size=2)
    assert config.teacher is not None
    config = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, placement="offloaded"), training=dataclasses.replace(training, offload_optimizer=True)
    )
    pool.run(_stop_after, config, tmp_path / "offloaded", 2, world_size=2)
    for held in pool.run(_offloaded_bytes, config, tmp_path / "offloaded", world_size=2):
        assert held == [(0, 0)]
    for ours, reference in zip(_metrics(tmp_path / "offloaded"), _metrics(tmp_path / "resident"), strict=True):
        assert {key: ours[key] for key in ("loss", "grad_norm")} == {key: reference[key] for key in ("loss", "grad_norm")}
        assert all(ours[f"{phase}_peak_bytes"] > 0 for phase in ("rollout", "teacher", "train"))
    whole, parts = _state(tmp_path / "resident"), _state(tmp_path / "offloaded")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name", ["TP2", "PP2", "PP2xVPP2", "DP2", "CP2xPP2, teacher CP2", "TP2xPP2+SP, teacher PP2"])
def test_every_layout_writes_the_same_first_rollouts(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, _, world_size = LAYOUTS[name]
    config = _config(models, **student)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True), training=dataclasses.replace(config.training, steps=1))
    pool.run(_job, config, tmp_path / "run", world_size=world_size)
    ours, reference = ([json.loads(line) for line in (run / "rollouts" / "step_1.jsonl").read_text().splitlines()] for run in (tmp_path / "run", recorded))
    assert [sample["response_ids"] for sample in ours] == [sample["response_ids"] for sample in reference]
    for one, other in zip(ours, reference, strict=True):
        assert one["sampled_logp"] == pytest.approx(other["sampled_logp"], abs=1e-5)


def test_recomputed_log_probabilities_are_those_of_the_sampler(recorded: Path) -> None:
    # Cached decoding and a full forward differ by rounding only.
    assert all(0 < step["rollout_drift_max"] < 1e-4 for step in _metrics(recorded))


@pytest.mark.parametrize("name", ["TP2", "TP2xPP2", "DP2"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(models: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, _, world_size = LAYOUTS[name]
    config = dataclasses.replace(_config(models, **student), checkpoint=CheckpointConfig(every_steps=2))
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=5))
    pool.run(_job, longer, tmp_path / "whole", world_size=world_size)
    pool.run(_stop_after, longer, tmp_path / "parts", 3, world_size=world_size)
    assert (tmp_path / "parts" / "status").read_text().strip() == "interrupted"
    pool.run(_job, longer, tmp_path / "parts", world_size=world_size)
    whole, parts = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert [step["loss"] for step in _metrics(tmp_path / "whole")] == [step["loss"] for step in _metrics(tmp_path / "parts")]


def _stop_after(config: RunConfig, run: Path, steps: int) -> str:
    """Send this process the signal of a preemption once `steps` steps are done, on one rank only."""
    import os
    import signal

    from opd_megatron.training.trainer import Trainer

    original = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, float | int]:
        metrics = original(self, number)
        if number == steps and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    Trainer.step = step  # type: ignore[method-assign]
    try:
        return run_in_world("test", config, run, torch.device("cpu"))
    finally:
        Trainer.step = original  # type: ignore[method-assign]


def test_held_out_prompts_are_graded_as_their_own_source_asks(pool: RankPool, tmp_path: Path) -> None:
    # Training prompts of a task with a grader of its own, held-out prompts from a file.
    rows = [{"prompt": f"Spell this word backward (example: sun -> nus): {word}", "answer": word[::-1]} for word in ("poil", "coact", "tree", "solio")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = RunConfig(
        student=StudentConfig(hf=str(ASSETS / "tiny_student"), vocab_multiple=1),
        data=DataConfig(prompts="reasoning_gym:spell_backward", task_size=50, batch_prompts=8),
        rollout=RolloutConfig(max_response_tokens=12),
        training=TrainingConfig(objective="sft", steps=1, micro_batch=8, learning_rate=1e-6, precision="fp32"),
        evaluation=EvaluationConfig(prompts=str(tmp_path / "test.jsonl")),
    )
    pool.run(_job, config, tmp_path / "run", world_size=1)
    for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines():
        assert json.loads(line)["accuracy"] >= 0.75


def test_a_run_resumes_in_another_layout(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, tensor=2, pipeline=2)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    pool.run(_job, longer, tmp_path / "whole", world_size=4)
    pool.run(_stop_after, longer, tmp_path / "parts", 2, world_size=4)
    for steps, layout in ((3, {"pipeline": 2, "virtual": 2}), (4, {})):
        other = dataclasses.replace(longer, student=dataclasses.replace(longer.student, layout=ParallelLayout(**layout)))
        pool.run(_stop_after, other, tmp_path / "parts", steps, world_size=2)
    whole, parts = _metrics(tmp_path / "whole"), _metrics(tmp_path / "parts")
    assert [step["step"] for step in parts] == [1, 2, 3, 4]
    for one, two in zip(whole, parts, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def _with_broken_steps(config: RunConfig, run: Path, broken: tuple[int, ...]) -> tuple[str, list[float]]:
    """Poison the teacher's hidden states at some steps, and return the weights' checksum after each step."""
    from opd_megatron.teacher.teacher import Teacher, TeacherRows
    from opd_megatron.training.trainer import Trainer

    fetch, step = Teacher.fetch, Trainer.step
    checksums, calls = [], [0]

    def poisoned(self: Teacher) -> TeacherRows | None:
        scores = fetch(self)
        # The self-test scores once before step 1.
        calls[0] += 1
        if calls[0] - 1 in broken and scores is not None and scores.rows:
            scores.rows[min(scores.rows)][0, 0] = float("nan")
        return scores

    def observed(self: Trainer, number: int) -> dict[str, float | int]:
        metrics = step(self, number)
        checksums.append(float(sum(parameter.double().abs().sum() for parameter in self.student.model.parameters())))
        return metrics

    Teacher.fetch, Trainer.step = poisoned, observed  # type: ignore[method-assign]
    try:
        return run_in_world("test", config, run, torch.device("cpu")), checksums
    finally:
        Teacher.fetch, Trainer.step = fetch, step  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["TP2", "PP2", "DP2"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(models: Path, pool: RankPool, tmp_path: Path, layout: dict[str, int]) -> None:
    for status, checksums in pool.run(_with_broken_steps, _config(models, **layout), tmp_path / "run", (2,), world_size=2):
        assert status == "finished"
        assert checksums[0] == checksums[1] != checksums[2]
    steps = _metrics(tmp_path / "run")
    assert [step["skipped_steps"] for step in steps] == [0, 1, 1]
    assert steps[1]["loss"] is None
    assert steps[1]["loss_nonfinite"] == "nan"


def _expect_too_many_skips(config: RunConfig, run: Path) -> str:
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        _with_broken_steps(config, run, (1, 2))
    dist.barrier()
    return (run / "status").read_text().strip()


def test_too_many_skipped_steps_in_a_row_end_the_run(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, tensor=2)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_skipped_steps=2))
    assert set(pool.run(_expect_too_many_skips, config, tmp_path / "run", world_size=2)) == {"crashed"}


def test_old_checkpoints_are_dropped(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(models), checkpoint=CheckpointConfig(every_steps=1, keep=2))
    pool.run(_job, config, tmp_path / "run", world_size=1)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_3"]


def test_bf16_trains_with_fp32_masters(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, tensor=2, pipeline=2, sequence=True)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16", steps=2))
    pool.run(_job, config, tmp_path / "run", world_size=4)
    assert all(torch.isfinite(torch.tensor(step["loss"])) and step["skipped_steps"] == 0 for step in _metrics(tmp_path / "run"))


def _converted(models: Path, out: Path) -> None:
    from opd_megatron.models.convert import write_checkpoint
    from opd_megatron.models.weights import open_weights

    for role in ("student", "teacher"):
        write_checkpoint(open_weights(hf=str(models / role)), out / role)


def test_models_from_checkpoints_train_as_those_from_folders(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    pool.run(_converted, models, tmp_path, world_size=1)
    config = _config(models, tensor=2)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=None, checkpoint=str(tmp_path / "student")),
        teacher=dataclasses.replace(config.teacher, hf=None, checkpoint=str(tmp_path / "teacher")),
        rollout=dataclasses.replace(config.rollout, replay=str(recorded)),
    )
    pool.run(_job, config, tmp_path / "run", world_size=2)
    for ours, reference in zip(_metrics(tmp_path / "run"), _metrics(recorded), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)


def _expect_self_test_to_fail(config: RunConfig, run: Path) -> str:
    """Shift the teacher's hidden states by one position, the classic mistake."""
    from opd_megatron.teacher.teacher import Teacher, TeacherRows

    score = Teacher.score

    def shifted(self: Teacher, rollouts: Any) -> TeacherRows | None:
        scores = score(self, rollouts)
        return dataclasses.replace(scores, rows={index: rows.roll(1, dims=0) for index, rows in scores.rows.items()}) if scores is not None else None

    Teacher.score = shifted  # type: ignore[method-assign]
    try:
        run_in_world("test", config, run, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    finally:
        Teacher.score = score  # type: ignore[method-assign]
    return ""


def test_the_self_test_sees_a_shift_by_one_position(models: Path, pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(_expect_self_test_to_fail, _config(models, pipeline=2), tmp_path / "run", world_size=2):
        assert "self-test failed" in message


def test_supervised_fine_tuning_agrees_across_layouts(models: Path, pool: RankPool, tmp_path: Path) -> None:
    def config(**layout: Any) -> RunConfig:
        base = _config(models, **layout)
        return dataclasses.replace(base, training=dataclasses.replace(base.training, objective="sft"))

    pool.run(_job, config(), tmp_path / "one", world_size=1)
    pool.run(_job, config(tensor=2, pipeline=2, sequence=True), tmp_path / "four", world_size=4)
    for ours, reference in zip(_metrics(tmp_path / "four"), _metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)


def test_a_replaced_data_file_is_noticed_on_resume(models: Path, pool: RankPool, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text((models / "prompts.jsonl").read_text())
    config = _config(models)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompts=str(data)))
    pool.run(_job, config, tmp_path / "run", world_size=1)
    data.write_text(data.read_text().replace("count a", "count z"))
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    with pytest.raises(AssertionError, match="is not the data this run began with"):
        pool.run(_job, longer, tmp_path / "run", world_size=1)


def test_a_tied_student_in_stages_resumes_bit_for_bit_whatever_its_sizes(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """The committed student's embedding does not fill its gradient bucket: 262 * 96 is no multiple of 128."""
    assets = Path(__file__).parents[2] / "recipes" / "assets"
    config = _config(models, tensor=2, pipeline=2)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=str(assets / "tiny_student"), vocab_multiple=1),
        teacher=dataclasses.replace(config.teacher, hf=str(assets / "tiny_teacher")),
    )
    pool.run(_job, config, tmp_path / "whole", world_size=4)
    pool.run(_stop_after, config, tmp_path / "parts", 2, world_size=4)
    pool.run(_job, config, tmp_path / "parts", world_size=4)
    whole, parts = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
