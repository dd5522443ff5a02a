"""A teacher that reads more than the student, and a student that is its own teacher: the same losses in every layout, the same weights after a resume.

Not covered: NCCL, bf16 across layouts, more than 4 ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from opd_megatron.config import LossConfig, PrivilegedConfig, RunConfig, TeacherConfig
from opd_megatron.models.checkpoint_weights import CheckpointWeights
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import open_weights
from opd_megatron.parallel.groups import student_groups
from opd_megatron.parallel.world import worlds
from opd_megatron.rollout.rollouts import replay_rollouts
from opd_megatron.teacher.transfer import WeightTransfer, choose_sources, held_slices
from opd_megatron.training.student import Student
from tests.pool import RankPool
from tests.reference_losses import naive_divergence
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher, write_prompts
from tests.tiny import write_tiny_model

# The terms of a divergence of 0.003 are up to 0.05, and fp32 rounds them.
ROUNDING = {"rel": 1e-5, "abs": 1e-7}
LOSS = LossConfig(kind="forward_kl", temperature=1.1, pointwise_clip=0.05)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose distributions differ between prompts, and prompts of uneven length."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, vocab_size=263, seed=1, scale=0.8)
    write_tiny_model(folder / "teacher", vocab_size=263, seed=2, scale=0.5)
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("templates") / "teacher.jinja"
    file.write_text("{{ problem }}, and it is {{ answer }} {{ answer }}")
    return file


def _own(models: Path, template: Path, weights: Literal["initial", "ema", "live"], decay: float = 0.5, **layout: Any) -> RunConfig:
    teacher = TeacherConfig(weights=weights, ema_decay=decay, micro_batch=3)
    # The solution is worth something to random weights: it moves their distributions, and the student after them.
    return dataclasses.replace(small_config(models, **layout), teacher=teacher, privileged=PrivilegedConfig(template=str(template)), loss=LOSS)


def _changed(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


@pytest.fixture(scope="module")
def recorded(models: Path, template: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process's runs, by the weights that teach."""
    runs = {}
    for weights in ("initial", "ema", "live"):
        runs[weights] = tmp_path_factory.mktemp(weights) / "run"
        config = _changed(_own(models, template, weights), "checkpoint", every_steps=1, keep=3)
        pool.run(run_job, _changed(config, "rollout", record=True), runs[weights], world_size=1)
    return runs


def test_the_loss_is_that_of_transformers_on_both_prompts(models: Path, recorded: dict[str, Path]) -> None:
    """Mean over response tokens of sum_v min(q (log q - log p), 0.05) at temperature 1.1: q after the teacher's prompt, p after the student's."""
    model = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)
    values = []
    for sample in replay_rollouts(recorded["initial"] / "rollouts" / "step_1.jsonl").samples:
        assert sample.teacher_prompt_ids is not None
        assert len(sample.teacher_prompt_ids) > len(sample.prompt_ids)
        logits = []
        for prompt in (sample.prompt_ids, sample.teacher_prompt_ids):
            with torch.no_grad():
                whole_SV = model(torch.cat([prompt, sample.response_ids])[None]).logits[0]
            logits.append(whole_SV[len(prompt) - 1 : -1].double() / 1.1)
        values.append(naive_divergence(*logits, kind="forward_kl", pointwise_clip=0.05))
    value_T = torch.cat(values)
    assert metrics_of(recorded["initial"])[0]["divergence"] == pytest.approx(float(value_T.mean()), rel=1e-5)


LAYOUTS = {
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, None, 4),
    "PP2xVPP2, teacher TP2": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, None, 2),
    "CP2, teacher CP2xTP2": ({"context": 2}, {"context": 2, "tensor": 2}, None, 4),
    "TP2, PP2 of the teacher's own": ({"tensor": 2}, {"pipeline": 2}, 2, 4),
}


# One of each kind of weights, in layouts of all axes.
FAST = (("TP2xPP2+SP, teacher PP2", "ema"), ("CP2, teacher CP2xTP2", "initial"), ("TP2, PP2 of the teacher's own", "live"))


@pytest.mark.parametrize(
    ("name", "weights"),
    [pytest.param(name, weights, marks=[] if (name, weights) in FAST else [pytest.mark.slow]) for name in LAYOUTS for weights in ("initial", "ema", "live")],
)
def test_every_layout_gives_the_same_losses(
    models: Path,
    template: Path,
    recorded: dict[str, Path],
    pool: RankPool,
    tmp_path: Path,
    name: str,
    weights: Literal["initial", "ema", "live"],
) -> None:
    """Three steps: from the second on, the weights that teach have moved, unless they are the initial ones."""
    student, teacher, own, world_size = LAYOUTS[name]
    config = with_teacher(_own(models, template, weights, **student), own, **teacher)
    pool.run(run_job, _changed(config, "rollout", replay=str(recorded[weights])), tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded[weights]), strict=True):
        for key in ("loss", "divergence", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], **(ROUNDING if key != "grad_norm" else {"rel": 1e-4})), (key, ours["step"])


def test_which_weights_teach_matters_from_the_second_step_on(recorded: dict[str, Path]) -> None:
    losses = {weights: [step["loss"] for step in metrics_of(run)] for weights, run in recorded.items()}
    assert len({values[0] for values in losses.values()}) == 1
    assert len({values[2] for values in losses.values()}) == 3


def _hf_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = CheckpointWeights(checkpoint)
    return {row.megatron: source.read(row) for row in weight_map(source.architecture)}


def test_the_average_is_what_its_recursion_says(models: Path, recorded: dict[str, Path]) -> None:
    """a_3 = 0.5 a_2 + 0.5 w_3 and so on from a_0 = w_0, read from the checkpoints of all steps; the bias of the first steps is not corrected."""
    from safetensors.torch import load_file

    run = recorded["ema"] / "checkpoints"
    source = CheckpointWeights(run / "step_1")
    start, rows = load_file(models / "student" / "model.safetensors"), weight_map(source.architecture)
    steps = [_hf_weights(run / f"step_{step}") for step in (1, 2, 3)]
    average = _stored_average(run / "step_3")
    assert len(average) == len(rows)
    for row in rows:
        expected = {name: start[name] for name in row.hf}
        for step in steps:
            for name, part in to_hf(row, step[row.megatron], source.architecture).items():
                expected[name] = 0.5 * expected[name] + 0.5 * part
        stored = average[row.megatron][: row.shape[0]]
        for name, part in to_hf(row, stored, source.architecture).items():
            torch.testing.assert_close(part, expected[name], rtol=1e-6, atol=1e-8)


def _stored_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the average in a checkpoint, by its Megatron name."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint)
    prefix = "teacher_average."
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("weights", ["ema", pytest.param("live", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    models: Path, template: Path, pool: RankPool, tmp_path: Path, weights: Literal["ema", "live"]
) -> None:
    config = with_teacher(_own(models, template, weights, tensor=2, pipeline=2), pipeline=2)
    for run, stops in (("whole", False), ("parts", True)):
        if stops:
            assert pool.run(run_until_step, config, tmp_path / run, 2) == ["interrupted"] * 4
        pool.run(run_job, config, tmp_path / run)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_average_resumes_in_another_layout(models: Path, template: Path, recorded: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    config = _changed(_own(models, template, "ema", tensor=2, pipeline=2), "rollout", replay=str(recorded["ema"]))
    assert pool.run(run_until_step, config, tmp_path / "run", 2) == ["interrupted"] * 4
    other = dataclasses.replace(config.student, layout=dataclasses.replace(config.student.layout, tensor=1, pipeline=2), vocab_multiple=1)
    pool.run(run_job, dataclasses.replace(config, student=other), tmp_path / "run")
    assert metrics_of(tmp_path / "run")[2]["loss"] == pytest.approx(metrics_of(recorded["ema"])[2]["loss"], **ROUNDING)
    stored = [_stored_average(path / "checkpoints" / "step_3") for path in (tmp_path / "run", recorded["ema"])]
    for name, tensor in stored[1].items():
        rows = min(len(tensor), len(stored[0][name]))
        # Where a gradient is near 0, Adam divides its rounding by its rounding: about a hundredth of the learning rate.
        torch.testing.assert_close(stored[0][name][:rows], tensor[:rows], rtol=1e-4, atol=1e-5)


def test_weights_that_wait_on_the_host_are_brought_up_to_date(models: Path, template: Path, recorded: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    config = _changed(_own(models, template, "live"), "rollout", replay=str(recorded["live"]))
    assert config.teacher is not None
    pool.run(run_job, _changed(config, "teacher", placement="offloaded"), tmp_path / "run", world_size=1)
    assert [step["loss"] for step in metrics_of(tmp_path / "run")] == [step["loss"] for step in metrics_of(recorded["live"])]


def test_a_mixture_of_experts_teaches_itself_in_another_layout(models: Path, template: Path, pool: RankPool, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "experts", "qwen3_moe", vocab_size=263, seed=3, scale=0.3)
    base = _own(models, template, "live")
    base = _changed(base, "student", hf=str(tmp_path / "experts"))
    pool.run(run_job, _changed(base, "rollout", record=True), tmp_path / "one", world_size=1)
    config = _changed(base, "student", layout=dataclasses.replace(base.student.layout, expert=2, pipeline=2))
    config = _changed(with_teacher(config, tensor=2, expert_tensor=2, expert=2), "rollout", replay=str(tmp_path / "one"))
    pool.run(run_job, config, tmp_path / "four")
    for ours, reference in zip(metrics_of(tmp_path / "four"), metrics_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], **ROUNDING), ours["step"]


def test_a_record_without_the_teachers_prompts_is_refused(models: Path, template: Path, recorded: dict[str, Path], pool: RankPool, tmp_path: Path) -> None:
    plain = _changed(_changed(small_config(models), "rollout", record=True), "training", steps=1)
    pool.run(run_job, plain, tmp_path / "plain", world_size=1)
    privileged = _changed(_own(models, template, "initial"), "rollout", replay=str(tmp_path / "plain"))
    for config, message in (
        (_changed(privileged, "training", steps=1), "was recorded without privileged.template"),
        (_changed(plain, "rollout", record=False, replay=str(recorded["initial"])), "was recorded with privileged.template"),
    ):
        with pytest.raises(AssertionError, match=message):
            pool.run(run_job, config, tmp_path / "run", world_size=1)


def _planned_broadcasts(config: RunConfig) -> list[int]:
    from opd_megatron.planning import make_plan

    plan = make_plan(config, ())
    return [message.count for messages in plan.messages for message in messages if message.group == "all ranks"]


def _broadcasts(config: RunConfig) -> int:
    device, source = torch.device("cpu"), open_weights(hf=config.student.hf)
    with worlds(0) as bridge:
        student = Student(config, source, student_groups(config.student.layout, seed=1), device)
        held = held_slices(student.model, student.groups, source.architecture)
        sources = choose_sources(source.architecture, bridge, held)
        sizes = {"padded_vocab": student.padded_vocab, "dtype": torch.float32, "device": device}
        transfer = WeightTransfer(architecture=source.architecture, bridge=bridge, sources=sources, **sizes)
        sent_2R = torch.zeros(2, bridge.group.size())
        sent = transfer.sent_from(bridge.rank)
        sent_2R[:, bridge.rank] = torch.tensor([len(sent), sum(held[name].parameter.numel() for name in sent)])
        dist.all_reduce(sent_2R)
    # Every slice has one source, and no rank has much more to send, and to average, than another.
    assert int(sent_2R[0].sum()) == transfer.num_broadcasts
    assert float(sent_2R[1].max()) < 1.3 * float(sent_2R[1].mean())
    return transfer.num_broadcasts


def test_weights_travel_in_as_many_messages_as_planned(models: Path, template: Path, pool: RankPool, planner: Callable[..., Any]) -> None:
    config = dataclasses.replace(_own(models, template, "live", tensor=2), world_size=4)
    assert set(planner(_planned_broadcasts, config)) == set(pool.run(_broadcasts, config))
