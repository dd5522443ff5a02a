"""Runs whose Adam counts its steps by group, as the fused ones of Transformer Engine and Apex do, and keeps moments of its own after a load.

The Adam here is plain PyTorch with that interface, put where Megatron-Core has the other, so that its and our branches for it run.
Not covered: the fused kernels, which need a GPU; moments that are not fp32, which no configuration asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import ModulesConfig, RunConfig
from tests.pool import RankPool
from tests.runs import LAYOUTS, metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher


class AdamOfGroups(torch.optim.Optimizer):
    """AdamW with the step in its groups, and a load that makes new moments."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int, "the kernels take no other number"
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                if parameter.grad is not None:
                    self._update(group, parameter, state)

    @staticmethod
    def _update(group: dict[str, Any], parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        size = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - beta1**step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            self.state[parameter] = {name: value.clone() for name, value in state.items() if torch.is_tensor(value) and value.dim()}


@contextmanager
def adam_of_groups() -> Iterator[None]:
    """Let Megatron-Core find it where it looks for a fused one."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    changed = [
        (optimizer, "Adam", AdamOfGroups),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", AdamOfGroups),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run_fused(config: RunConfig, run: Path, steps: int | None = None) -> str:
    with adam_of_groups():
        return run_job(config, run) if steps is None else run_until_step(config, run, steps)


def config_of(models: Path, layout: str, recorded: Path, train: str = "all", **training: Any) -> tuple[RunConfig, int]:
    student, teacher, world_size = LAYOUTS[layout]
    config = with_teacher(small_config(models, **student), **teacher)
    return dataclasses.replace(
        config,
        modules=ModulesConfig(train=train),
        training=dataclasses.replace(config.training, steps=4, **training),
        rollout=dataclasses.replace(config.rollout, replay=str(recorded)),
    ), world_size


@pytest.fixture(scope="module")
def four_steps(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of as many steps as these runs make."""
    config = small_config(models)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4), rollout=dataclasses.replace(config.rollout, record=True))
    run = tmp_path_factory.mktemp("recorded") / "run"
    pool.run(run_job, config, run, world_size=1)
    return run


CASES = [
    ("PP2", "all", {"precision": "bf16", "offload_optimizer": True}),
    # Rank 0, whose step a checkpoint keeps, has nothing to train.
    ("PP2", "layers.3.mlp", {}),
]


@pytest.mark.parametrize(("layout", "train", "training"), CASES)
def test_a_run_resumes_bit_for_bit(models: Path, four_steps: Path, pool: RankPool, tmp_path: Path, layout: str, train: str, training: dict[str, Any]) -> None:
    config, world_size = config_of(models, layout, four_steps, train, **training)
    pool.run(run_fused, config, tmp_path / "whole", world_size=world_size)
    pool.run(run_fused, config, tmp_path / "parts", 2, world_size=world_size)
    pool.run(run_fused, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("first", ["PyTorch's", "of groups"])
def test_a_checkpoint_of_one_adam_goes_on_with_the_other(models: Path, four_steps: Path, pool: RankPool, tmp_path: Path, first: str) -> None:
    """Both compute the same update: a run that changes from one to the other ends as one that does not, to rounding."""
    config, world_size = config_of(models, "DP2", four_steps)
    one, other = (run_until_step, run_fused) if first == "PyTorch's" else (run_fused, run_job)
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    pool.run(one, config, tmp_path / "parts", 2, world_size=world_size)
    pool.run(other, config, tmp_path / "parts", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "parts"), metrics_of(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name in whole:
        # Adam divides by the root of tiny squares in its first steps: differences of rounding are enlarged.
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=2e-5)


def state_before_any_step(config: RunConfig) -> list[tuple[Any, ...]]:
    """Return what prime_adam gives an optimizer that never stepped, and what restart_adam leaves of one that did."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.training.optimizer import has_finite_state, prime_adam, restart_adam
    from opd_megatron.training.student import Student

    with adam_of_groups():
        student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), torch.device("cpu"))
        prime_adam(student.optimizer)
        (part,) = student.optimizer.chained_optimizers
        assert isinstance(part.optimizer, AdamOfGroups)
        state = part.optimizer.state.values()
        found = [tuple(group["step"] for group in part.optimizer.param_groups)]
        assert all(set(one) == {"exp_avg", "exp_avg_sq"} for one in state)
        for one in state:
            one["exp_avg"].fill_(2.0)
        for group in part.optimizer.param_groups:
            group["step"] = 7
        assert has_finite_state(student.optimizer)
        restart_adam(student.optimizer)
        assert not any(one["exp_avg"].any() for one in state)
        found.append(tuple(group["step"] for group in part.optimizer.param_groups))
        next(iter(state))["exp_avg_sq"].fill_(torch.inf)
        found.append((has_finite_state(student.optimizer),))
        return found


def test_an_adam_that_never_stepped_is_saved_and_one_that_did_begins_anew(models: Path, pool: RankPool) -> None:
    (found,) = pool.run(state_before_any_step, small_config(models), world_size=1)
    steps, restarted, finite = found
    assert set(steps) == {0}
    assert set(restarted) == {0}
    assert finite == (False,)
