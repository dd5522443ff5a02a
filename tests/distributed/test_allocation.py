"""A student of which only some modules train: which tensors move, that layouts agree, that runs resume, what is saved.

Not covered: GPUs; the words of a choice, which are in tests/unit/test_modules.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import ModulesConfig, RunConfig, apply_overrides
from opd_megatron.models.modules import chosen_rows, module_of
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import open_weights
from tests.pool import RankPool
from tests.runs import LAYOUTS, metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher


def config_of(models: Path, train: str, layout: str | None = None, *overrides: str) -> tuple[RunConfig, int]:
    student, teacher, world_size = LAYOUTS[layout] if layout is not None else ({}, {}, 1)
    config = dataclasses.replace(with_teacher(small_config(models, **student), **teacher), modules=ModulesConfig(train=train))
    return apply_overrides(config, overrides), world_size


def moved_tensors(models: Path, run: Path) -> set[str]:
    before, after = load_file(models / "student" / "model.safetensors"), weights_of(run)
    return {name for name in after if not torch.equal(before[name], after[name])}


def named(models: Path, choice: str) -> set[str]:
    rows = weight_map(open_weights(hf=str(models / "student")).architecture)
    return {name for row in chosen_rows(choice, rows) for name in row.hf}


CASES = [
    ("paper", "TP2xPP2+SP, teacher PP2", ()),
    # The first stage has nothing to train, and its chunks no buffer.
    ("layers.3.mlp", "PP2", ()),
    pytest.param("layers.3.norm", "PP2xVPP2", (), marks=pytest.mark.slow),
    ("!embedding", "PP2", ("training.recompute=full",)),
    pytest.param("paper", "DP2xPP2, teacher TP2", (), marks=pytest.mark.slow),
    pytest.param("embedding", "TP2xPP2", (), marks=pytest.mark.slow),
    pytest.param("norm", "TP2+SP", (), marks=pytest.mark.slow),
    pytest.param("attention", "CP2xPP2, teacher CP2", (), marks=pytest.mark.slow),
    pytest.param("layers.0.mlp", "one rank, one of the teacher's own", ("training.recompute=full",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("train", "layout", "overrides"), CASES)
def test_what_is_chosen_trains_alike_in_every_layout_and_the_rest_keeps_its_bits(
    models: Path, pool: RankPool, recorded: Path, tmp_path: Path, train: str, layout: str, overrides: tuple[str, ...]
) -> None:
    for name in (None, layout):
        config, world_size = config_of(models, train, name, *overrides, f"rollout.replay={recorded}")
        pool.run(run_job, config, tmp_path / str(name), world_size=world_size)
    assert moved_tensors(models, tmp_path / layout) == named(models, train)
    reference, ours = weights_of(tmp_path / "None"), weights_of(tmp_path / layout)
    for one, two in zip(metrics_of(tmp_path / "None"), metrics_of(tmp_path / layout), strict=True):
        assert [two[key] for key in ("loss", "grad_norm")] == pytest.approx([one[key] for key in ("loss", "grad_norm")], rel=1e-5)
    for name in reference:
        # Adam divides by the root of tiny squares in its first steps: differences of sums are enlarged.
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["PP2", pytest.param("DP2", marks=pytest.mark.slow)])
def test_a_rank_with_nothing_to_train_is_saved_and_resumed_bit_for_bit(models: Path, pool: RankPool, tmp_path: Path, layout: str) -> None:
    """Rank 0 has nothing, and it is the one whose step of Adam a checkpoint keeps; of one norm the second replica's share is empty."""
    config, world_size = config_of(models, "layers.3.mlp" if layout == "PP2" else "decoder.final_layernorm.weight", layout, "training.steps=4")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, config, tmp_path / "parts", 2, world_size=world_size)
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert moved_tensors(models, tmp_path / "parts")


@pytest.mark.slow
def test_a_frozen_student_resumes_in_another_layout(models: Path, pool: RankPool, tmp_path: Path) -> None:
    whole, world_size = config_of(models, "layers.2.mlp,layers.3.attention", "TP2xPP2", "training.steps=4")
    pool.run(run_job, whole, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, whole, tmp_path / "parts", 2, world_size=world_size)
    other, world_size = config_of(models, "layers.2.mlp,layers.3.attention", "DP2", "training.steps=4")
    pool.run(run_job, other, tmp_path / "parts", world_size=world_size)
    for one, two in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def held_bytes(config: RunConfig) -> dict[str, int]:
    """Return the bytes of gradients and optimizer on this rank."""
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.training.optimizer import optimizer_state, prime_adam
    from opd_megatron.training.student import Student
    from tests.planned import buffers, storages

    student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), torch.device("cpu"))
    prime_adam(student.optimizer)
    own = {name: sum(storages(tensors).values()) for name, tensors in (("gradients", [b.grad_data for b in buffers(student)]),)}
    return {**own, "optimizer": sum(storages(optimizer_state(student.optimizer)).values())}


def test_what_does_not_train_costs_no_gradient_and_no_optimizer(models: Path, pool: RankPool) -> None:
    """The gradient buffer is also what data-parallel ranks exchange."""
    config, world_size = config_of(models, "layers.3.mlp", "PP2")
    first, last = pool.run(held_bytes, config, world_size=world_size)
    assert first == {"gradients": 0, "optimizer": 0}
    numbers = 3 * 64 * 96
    assert last["gradients"] == pytest.approx(4 * numbers, rel=0.01)
    assert last["optimizer"] == pytest.approx(8 * numbers, rel=0.01)


@pytest.mark.parametrize("layout", [pytest.param(None, marks=pytest.mark.slow), "TP2xPP2"])
def test_learning_rates_are_scaled_by_module(models: Path, pool: RankPool, recorded: Path, tmp_path: Path, layout: str | None) -> None:
    """Adam's first step is the learning rate times the sign of the gradient, wherever that is not tiny."""
    factors = 'modules.learning_rate_factors={"mlp": 0.5, "layers.1.mlp": 3}'
    config, world_size = config_of(models, "all", layout, factors, f"rollout.replay={recorded}", "training.warmup_steps=0", "training.steps=1")
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    before, after = load_file(models / "student" / "model.safetensors"), weights_of(tmp_path / "run")

    def largest(name: str) -> float:
        return float((after[name] - before[name]).abs().max())

    rate = config.training.learning_rate
    assert largest("model.layers.0.mlp.down_proj.weight") == pytest.approx(0.5 * rate, rel=1e-3)
    assert largest("model.layers.1.mlp.down_proj.weight") == pytest.approx(3 * rate, rel=1e-3)
    assert largest("model.layers.1.self_attn.o_proj.weight") == pytest.approx(rate, rel=1e-3)
    assert metrics_of(tmp_path / "run")[0]["lr"] == pytest.approx(rate)


@pytest.mark.slow
def test_scaled_rates_survive_a_resume_bit_for_bit(models: Path, pool: RankPool, tmp_path: Path) -> None:
    factors = ('modules.learning_rate_factors={"mlp": 0.5, "layers.1.mlp": 3, "layers.2.attention": 2}', "training.steps=4", "training.lr_schedule=cosine")
    config, world_size = config_of(models, "!embedding", "PP2", *factors)
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, config, tmp_path / "parts", 2, world_size=world_size)
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


MEASURED = ("modules.probe_steps=2", "training.steps=3", "modules.freeze_share=0.2")


@pytest.mark.parametrize("layout", ["TP2xPP2", pytest.param("DP2", marks=pytest.mark.slow)])
def test_a_probe_ranks_modules_and_leaves_no_trace(models: Path, pool: RankPool, recorded: Path, tmp_path: Path, layout: str) -> None:
    """The measured run is, bit for bit, the run that names what the probe chose; a plain reading of its steps' weights gives the same ranking."""
    overrides = (*MEASURED, f"rollout.replay={recorded}", "training.learning_rate=1e-4")
    config, world_size = config_of(models, "measured", layout, *overrides)
    pool.run(run_job, config, tmp_path / "measured", world_size=world_size)
    told = json.loads((tmp_path / "measured" / "modules.json").read_text())
    named_config, _ = config_of(models, told["train"], layout, *overrides)
    pool.run(run_job, named_config, tmp_path / "named", world_size=world_size)
    measured, by_name = weights_of(tmp_path / "measured"), weights_of(tmp_path / "named")
    assert all(torch.equal(measured[name], by_name[name]) for name in by_name)
    # The probe is the beginning of a run that trains everything.
    plain, _ = config_of(models, "all", layout, *overrides, "training.steps=2")
    pool.run(run_job, plain, tmp_path / "plain", world_size=world_size)
    before, after = load_file(models / "student" / "model.safetensors"), weights_of(tmp_path / "plain")
    norms: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in weight_map(open_weights(hf=str(models / "student")).architecture):
        module = module_of(row)
        norms[module] = norms.get(module, 0.0) + sum(float((after[name] - before[name]).double().square().sum()) for name in row.hf)
        counts[module] = counts.get(module, 0) + sum(before[name].numel() for name in row.hf)
    assert {row["module"]: row["squared_norm"] for row in told["modules"]} == pytest.approx(norms, rel=1e-4)
    assert {row["module"]: row["num_parameters"] for row in told["modules"]} == counts
    ranking = sorted(norms, key=lambda module: norms[module] / counts[module], reverse=True)
    assert [row["module"] for row in told["modules"]] == ranking
    frozen = [word.removeprefix("!") for word in told["train"].split(",")]
    assert frozen == ranking[::-1][: len(frozen)]
    total = sum(norms.values())
    assert sum(norms[module] for module in frozen) <= 0.2 * total < sum(norms[module] for module in ranking[::-1][: len(frozen) + 1])


@pytest.mark.slow
def test_a_measured_run_resumes_with_what_was_measured(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "measured", "PP2", *MEASURED, "effopd.enabled=true", "effopd.prompts=4", "effopd.accept=ge", "effopd.max_k=1")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, config, tmp_path / "parts", 2, world_size=world_size)
    (tmp_path / "parts" / "modules.json").unlink()
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # It was not measured again.
    assert not (tmp_path / "parts" / "modules.json").exists()
    assert moved_tensors(models, tmp_path / "parts") < named(models, "all")


def _after_training_anew(config: RunConfig, run: Path) -> dict[str, tuple[float, bool, bool]]:
    """Train whole for a step, then a part only: return of each tensor how far it went since, and whether it has a gradient buffer and memory of its own."""
    from opd_megatron.models.allocation import Allocation
    from opd_megatron.models.weights import named_global_parameters
    from opd_megatron.training.trainer import Trainer

    before: dict[str, torch.Tensor] = {}
    original, found = Trainer.step, {}

    def step(self: Trainer, number: int) -> dict[str, float | int]:
        parameters = dict(named_global_parameters(self.student.model, self.student.architecture))
        if number == 2:
            self.student.train_only(Allocation.of(ModulesConfig(train="layers.3.mlp"), self.student.architecture))
            before.update({name: parameter.detach().clone() for name, parameter in parameters.items()})
        metrics = original(self, number)
        for name, parameter in parameters.items() if number == 3 else ():
            own = parameter.untyped_storage().nbytes() == parameter.nbytes
            found[name] = (float((parameter - before[name]).abs().max()), hasattr(parameter, "main_grad"), own)
        return metrics

    Trainer.step = step  # type: ignore[method-assign]
    try:
        run_job(config, run)
    finally:
        Trainer.step = original  # type: ignore[method-assign]
    return found


def test_a_student_that_trains_less_than_before_gives_its_buffers_back(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "all", "DP2")
    for found in pool.run(_after_training_anew, config, tmp_path / "run", world_size=world_size):
        for name, (moved, has_buffer, has_own_memory) in found.items():
            trains = name in ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc2.weight")
            assert (moved > 0) == trains, name
            assert has_buffer == trains, name
            assert has_own_memory or trains, name


def test_a_probe_that_moves_nothing_is_refused(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """At a learning rate below the smallest number of fp32."""
    config, world_size = config_of(models, "measured", None, *MEASURED, "training.learning_rate=1e-60")
    with pytest.raises(AssertionError, match="moved no weight, so nothing can be ranked"):
        pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    assert not (tmp_path / "run" / "config.json").exists()
