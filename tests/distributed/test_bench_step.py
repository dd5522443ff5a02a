"""`tools/bench_step.py`: it runs the steps that it says, on tokens that it counts, and refuses what it cannot measure.

Not covered: whether its times and bytes are right (those of metrics.jsonl: tests/unit/test_throughput.py, test_clock.py), and a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import apply_overrides
from opd_megatron.models.hf_folder import read_architecture
from opd_megatron.models.random_weights import RandomWeights
from opd_megatron.models.weight_map import weight_map
from recipes.run import find_recipe
from tests.pool import RankPool
from tests.programs import ROOT, run_program

SIZES = ("--steps", "1", "--warmup", "1", "--prompt-tokens", "12", "--response-tokens", "5")
ONE_RANK = ("student.layout.tensor=1", "student.layout.pipeline=1", "data.batch_prompts=6", "training.micro_batch=3")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "tools/bench_step.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Two ranks, of which the second holds the teacher: both ends of every path."""
    done = bench("quickstart", "--nproc-per-node", "2", "--json", *SIZES, *ONE_RANK, "teacher.placement=dedicated", "teacher.num_ranks=1")
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def test_every_prompt_and_response_has_the_length_that_was_asked_for(measured: dict[str, Any]) -> None:
    tokens = measured["rates"]["tokens_per_second"] * measured["seconds"]["step"]
    assert tokens == pytest.approx(6 * (12 + 5))
    # Hidden states of the teacher's 128 channels, in fp32, of every response token once.
    assert measured["payload_bytes_per_token"] == 128 * 4


def test_the_phases_make_up_the_step(measured: dict[str, Any]) -> None:
    seconds = measured["seconds"]
    parts = sum(seconds[name] for name in ("rollout", "align", "teacher", "weigh", "train", "probe", "idle"))
    assert 0.9 * seconds["step"] < parts <= seconds["step"]
    assert set(measured["memory"]["peak_bytes"]) == {"rollout", "align", "teacher", "weigh", "train", "probe"}


def test_the_plan_beside_it_is_that_of_the_same_configuration(measured: dict[str, Any]) -> None:
    planned = run_program("tools.plan", "quickstart", *measured["changes"], "--json")
    assert planned.returncode == 0, planned.stderr
    assert measured["memory"]["planned_bytes"] == max(rank["total_bytes"] for rank in json.loads(planned.stdout.splitlines()[0])["ranks"])
    assert "rollout.max_response_tokens=5" in measured["changes"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("opsd",), "privileged.template makes of opsd a run that needs text"),
        (("tiny_simct",), "alignment.kind makes of tiny_simct a run that needs text"),
        (("quickstart_sft",), "training.objective makes of quickstart_sft a run that needs text"),
        (("quickstart", "--steps", "0"), "--steps 0 must be at least 1"),
        (("quickstart", *ONE_RANK, "student.hf=models/NoSuchModel"), "no architecture of that name is"),
        (("quickstart", "--nproc-per-node", "3"), "world_size=3 is not a multiple"),
        (("quickstart", *ONE_RANK, "--prompt-tokens", "1000000"), "exceeds the student's"),
        (("quickstart", *SIZES, *ONE_RANK, "training.layers=te"), "training.layers=te needs"),
        (("quickstart", *SIZES, *ONE_RANK, "rollout.engine=dynamic"), "rollout.engine=dynamic cannot"),
        (("quickstart", *SIZES, *ONE_RANK, "student.hf=/nowhere"), "/nowhere"),
        (
            ("quickstart", *SIZES, *ONE_RANK, "teacher.placement=dedicated", "teacher.num_ranks=1", "--nproc-per-node", "2", "training.layers=te"),
            "training.layers=te needs",
        ),
    ],
    ids=["privileged", "alignment", "sft", "steps", "model", "layout", "positions", "layers", "engine", "folder", "two-ranks"],
)
def test_what_cannot_be_measured_is_the_users_mistake(words: tuple[str, ...], says: str) -> None:
    refused = bench(*words)
    assert refused.returncode == 2, refused.stderr
    assert says in refused.stderr
    # Nothing of torchrun's, and the reason once.
    assert [line.startswith("error: ") for line in refused.stderr.splitlines()] == [True], refused.stderr


def _refused(free_bytes: int) -> str | None:
    from opd_megatron.training import free_memory

    config = apply_overrides(find_recipe("quickstart")(), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        from tools import bench_step

        patch.setattr(free_memory, "free_gpu_bytes", lambda _device: free_bytes)
        try:
            bench_step.refuse_too_large(config, bench_step.random_sources(config), torch.device("cuda"))
        except ValueError as error:
            return str(error)
    return None


def test_more_than_a_gpu_has_free_is_refused_as_in_a_run(pool: RankPool) -> None:
    assert pool.run(_refused, 1 << 40) == [None] * 4
    for message in pool.run(_refused, 1 << 16):
        assert message is not None
        assert "too little GPU memory: rank " in message


def test_random_weights_are_those_of_an_architecture_and_no_two_rows_are_equal() -> None:
    architecture = read_architecture(ROOT / "recipes" / "architectures" / "Qwen3-0.6B")
    weights = RandomWeights(architecture=architecture, assets=Path())
    rows = {row.name: row for row in weight_map(architecture)}
    matrix = weights.read(rows["decoder.layers.0.mlp.linear_fc2.weight"])
    assert matrix.shape == rows["decoder.layers.0.mlp.linear_fc2.weight"].shape
    assert float(matrix.std()) == pytest.approx(architecture.init_std, rel=0.01)
    assert torch.unique(matrix[:, :8], dim=0).size(0) == matrix.size(0)
    assert not torch.equal(matrix, weights.read(rows["decoder.layers.1.mlp.linear_fc2.weight"]))
    assert torch.equal(matrix, weights.read(rows["decoder.layers.0.mlp.linear_fc2.weight"]))
    assert (weights.read(rows["decoder.final_layernorm.weight"]) == 1).all()
