"""Steps, the same in every layout; steps that must change nothing.

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

from opd_megatron.config import DataConfig, EvaluationConfig, LossConfig, RolloutConfig, RunConfig, StudentConfig, TrainingConfig
from opd_megatron.training.trainer import Trainer
from tests.pool import RankPool
from tests.runs import LAYOUTS, metrics_of, run_job, small_config, with_teacher

ASSETS = Path(__file__).parents[2] / "recipes" / "assets"


# Their axes come together with others below.
SLOW = ("TP2+SP", "PP2", "DP2xPP2, teacher TP2", "PP2xVPP2", "CP2", "DP2, PP2 of the teacher's own")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS])
def test_every_layout_gives_the_same_losses_and_gradient_norms(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, teacher, world_size = LAYOUTS[name]
    config = with_teacher(small_config(models, **student), **teacher)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        # fp32 sums in another order; 1e-5 is what the project promises.
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])
        assert ours["response_tokens"] == reference["response_tokens"]


@pytest.mark.parametrize("loss", [{"kind": "skew_reverse", "alpha": 0.2}, {"kind": "topk_tail_forward", "top_k": 5}, {"kind": "k3"}], ids=lambda x: x["kind"])
def test_other_kinds_of_loss_train_alike_in_every_layout(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, loss: dict[str, Any]) -> None:
    for run, layout, world_size in (("one", {}, 1), ("four", {"tensor": 2, "pipeline": 2}, 4)):
        config = small_config(models, **layout)
        config = dataclasses.replace(config, loss=LossConfig(**loss), rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
        pool.run(run_job, config, tmp_path / run, world_size=world_size)
    one, four = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "four")
    assert [step["grad_norm"] > 0 for step in one] == [True, True, True]
    for ours, reference in zip(four, one, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


@pytest.mark.parametrize("name", ["TP2", "PP2", "PP2xVPP2", "DP2", "CP2xPP2, teacher CP2", "TP2xPP2+SP, teacher PP2"])
def test_every_layout_writes_the_same_first_rollouts(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, _, world_size = LAYOUTS[name]
    config = small_config(models, **student)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True), training=dataclasses.replace(config.training, steps=1))
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    ours, reference = ([json.loads(line) for line in (run / "rollouts" / "step_1.jsonl").read_text().splitlines()] for run in (tmp_path / "run", recorded))
    assert [sample["response_ids"] for sample in ours] == [sample["response_ids"] for sample in reference]
    for one, other in zip(ours, reference, strict=True):
        assert one["sampled_logp"] == pytest.approx(other["sampled_logp"], abs=1e-5)


def test_recomputed_log_probabilities_are_those_of_the_sampler(recorded: Path) -> None:
    # Cached decoding and a full forward differ by rounding only.
    assert all(0 < step["rollout_drift_max"] < 1e-4 for step in metrics_of(recorded))


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
    pool.run(run_job, config, tmp_path / "run", world_size=1)
    for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines():
        assert json.loads(line)["accuracy"] >= 0.75


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
        return run_job(config, run), checksums
    finally:
        Teacher.fetch, Trainer.step = fetch, step  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["TP2", "PP2", "DP2"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(models: Path, pool: RankPool, tmp_path: Path, layout: dict[str, int]) -> None:
    for status, checksums in pool.run(_with_broken_steps, small_config(models, **layout), tmp_path / "run", (2,), world_size=2):
        assert status == "finished"
        assert checksums[0] == checksums[1] != checksums[2]
    steps = metrics_of(tmp_path / "run")
    assert [step["skipped_steps"] for step in steps] == [0, 1, 1]
    assert steps[1]["loss"] is None
    assert steps[1]["loss_nonfinite"] == "nan"


def _expect_too_many_skips(config: RunConfig, run: Path) -> str:
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        _with_broken_steps(config, run, (1, 2))
    dist.barrier()
    return (run / "status").read_text().strip()


def test_too_many_skipped_steps_in_a_row_end_the_run(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = small_config(models, tensor=2)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_skipped_steps=2))
    assert set(pool.run(_expect_too_many_skips, config, tmp_path / "run", world_size=2)) == {"crashed"}


def test_bf16_trains_with_fp32_masters(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = small_config(models, tensor=2, pipeline=2, sequence=True)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16", steps=2))
    pool.run(run_job, config, tmp_path / "run", world_size=4)
    assert all(torch.isfinite(torch.tensor(step["loss"])) and step["skipped_steps"] == 0 for step in metrics_of(tmp_path / "run"))


def _converted(models: Path, out: Path) -> None:
    from opd_megatron.conversion.to_megatron import write_checkpoint
    from opd_megatron.models.weights import open_weights

    for role in ("student", "teacher"):
        write_checkpoint(open_weights(hf=str(models / role)), out / role)


def test_models_from_checkpoints_train_as_those_from_folders(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    pool.run(_converted, models, tmp_path, world_size=1)
    config = small_config(models, tensor=2)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=None, checkpoint=str(tmp_path / "student")),
        teacher=dataclasses.replace(config.teacher, hf=None, checkpoint=str(tmp_path / "teacher")),
        rollout=dataclasses.replace(config.rollout, replay=str(recorded)),
    )
    pool.run(run_job, config, tmp_path / "run", world_size=2)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
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
        run_job(config, run)
    except ValueError as error:
        return str(error)
    finally:
        Teacher.score = score  # type: ignore[method-assign]
    return ""


def test_the_self_test_sees_a_shift_by_one_position(models: Path, pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(_expect_self_test_to_fail, small_config(models, pipeline=2), tmp_path / "run", world_size=2):
        assert "self-test failed" in message


def test_supervised_fine_tuning_agrees_across_layouts(models: Path, pool: RankPool, tmp_path: Path) -> None:
    def config(**layout: Any) -> RunConfig:
        base = small_config(models, **layout)
        return dataclasses.replace(base, training=dataclasses.replace(base.training, objective="sft"))

    pool.run(run_job, config(), tmp_path / "one", world_size=1)
    pool.run(run_job, config(tensor=2, pipeline=2, sequence=True), tmp_path / "four", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "four"), metrics_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
