"""Whole plans: every recipe, worlds of any size, what does not fit, and `tools/plan.py`.

Not covered here: whether running ranks hold and send what was planned (test_planned_*.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import DataConfig, ParallelLayout, RunConfig, StudentConfig, TeacherConfig, TrainingConfig, apply_overrides
from recipes.run import all_recipes, find_recipe
from tests.planned import GIB, PUBLISHED
from tests.programs import ROOT, run_program
from tools.plan import refuse_what_a_run_would

# The rules of token importance are runs of the quickstart: the same ranks, layouts and sizes.
RECIPES = {name: recipe for name, recipe in all_recipes().items() if recipe.__module__ != "recipes.token_importance"}


def summary(config: RunConfig, gpu_gib: float = 80) -> tuple[str | None, dict[str, Any]]:
    from opd_megatron.planning import Catalogue, as_json, as_text, make_plan, shortfall

    refuse_what_a_run_would(config)
    plan = make_plan(config, PUBLISHED)
    text = as_text(plan, round(gpu_gib * GIB), 8)
    for word in ("planned, not measured", *(model.layout for model in plan.models), "always there", "messages of one step", "payload, all ranks"):
        assert word in text
    catalogue = Catalogue(published=PUBLISHED, check=refuse_what_a_run_would)
    return shortfall(config, plan.largest, round(gpu_gib * GIB), catalogue), as_json(plan, round(gpu_gib * GIB))


def timed_summary(config: RunConfig) -> tuple[Any, float]:
    """Return the summary with the processor time it took."""
    started = time.process_time()
    return summary(config), time.process_time() - started


# The models of others in other layouts.
LARGER = ("_from_rl_", "_from_235b_", "h200")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if any(part in name for part in LARGER) else []) for name in RECIPES])
def test_every_recipe_can_be_planned(planner: Callable[..., Any], name: str) -> None:
    missing, record = planner(summary, RECIPES[name]())
    assert missing is None
    assert record["fits"]
    assert record["ranks"][0]["rank"] == 0
    assert record["ranks"][-1]["rank"] == RECIPES[name]().world_size - 1
    assert all(rank["total_bytes"] > sum(term["num_bytes"] for term in rank["terms"] if term["phase"] == "always") > 0 for rank in record["ranks"])


# Parameters of the published weights, each tensor counted once.
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "gemma-2-2b-it": 2_614_341_888,
    "Phi-4-mini-instruct": 3_836_021_760,
}


def test_every_published_architecture_is_among_those_counted() -> None:
    assert {path.name for path in PUBLISHED[0].iterdir() if path.is_dir()} == set(PARAMETERS)


def planned_weights(config: RunConfig) -> int:
    from opd_megatron.planning import make_plan

    (term,) = (term for term in make_plan(config, PUBLISHED).ranks[0].terms if term.name == "weights")
    return term.num_bytes


# Thousands of experts take seconds to build.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("Qwen3-") and "-A" in name else []) for name in PARAMETERS])
def test_a_published_architecture_has_as_many_parameters_as_its_weights(planner: Callable[..., Any], name: str) -> None:
    config = RunConfig(
        student=StudentConfig(hf=f"models/{name}", vocab_multiple=1), data=DataConfig(prompts="x.jsonl"), training=TrainingConfig(objective="sft")
    )
    assert planner(planned_weights, config) == 2 * PARAMETERS[name]


LARGE = [
    *("world_size=1024", "student.hf=models/Qwen3-32B", "teacher.hf=models/Llama-3.3-70B-Instruct", "data.batch_prompts=2048"),
    *("student.layout.tensor=8", "student.layout.pipeline=8", "teacher.layout.tensor=8", "teacher.layout.pipeline=4"),
]


def test_a_world_of_1024_ranks_is_planned_in_seconds(planner: Callable[..., Any]) -> None:
    config = apply_overrides(find_recipe("qwen3_1p7b_from_8b_8gpu_h100")(), LARGE)
    (_, record), seconds = planner(timed_summary, config)
    # 6 s of a core of 2026, by its own clock: the machine that runs tests may be busy.
    assert seconds < 30
    stages = [(rank["student_stage"], rank["teacher_stage"]) for rank in record["ranks"]]
    assert stages == [(stage, stage // 2) for stage in range(8)]
    assert {rank["rank"] for rank in record["ranks"]} >= {0, 512, 1023}
    activations = [term["num_bytes"] for rank in record["ranks"] for term in rank["terms"] if term["name"] == "activations"]
    # 1F1B: as many micro-batches in flight as stages from here to the last.
    assert activations[:-1] == [activations[0] * (8 - stage) // 8 for stage in range(7)]


TOO_LARGE = {
    "gradients": ["student.hf=models/Qwen3-14B"],
    "KV cache, evaluation": ["rollout.batch_sequences=512"],
    "teacher weights": ["teacher.hf=models/Llama-3.3-70B-Instruct", "teacher.layout.tensor=1"],
    "activations": ["training.micro_batch=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_plan_that_does_not_fit_names_what_is_largest_and_changes_after_which_it_fits(planner: Callable[..., Any], name: str) -> None:
    config = apply_overrides(find_recipe("qwen3_1p7b_from_8b_8gpu_h100")(), TOO_LARGE[name])
    missing, record = planner(summary, config)
    assert not record["fits"]
    largest = next(rank for rank in record["ranks"] if rank["rank"] == record["largest_rank"])
    there = [term for term in largest["terms"] if term["phase"] in ("always", largest["peak_phase"])]
    assert max(there, key=lambda term: term["num_bytes"])["name"] == name
    assert f"needs {largest['total_bytes'] / GIB:.1f} of 80.0 GiB; largest: {name} " in missing
    changes = [part.split()[0] for part in missing.partition("it would fit with ")[2].split(", or ")]
    assert changes
    for change in changes:
        assert planner(summary, apply_overrides(config, [change]))[0] is None, change


def test_what_no_change_can_fit_is_said_to_be_so(planner: Callable[..., Any]) -> None:
    missing, _ = planner(summary, find_recipe("quickstart")(), 1e-4)
    assert missing is not None
    assert "no single change" in missing


APART = ["world_size=12", "teacher.placement=dedicated", "teacher.num_ranks=4", "teacher.layout.pipeline=2", "teacher.layout.tensor=2"]


def test_a_teacher_on_ranks_of_its_own_shares_no_rank_with_the_student(planner: Callable[..., Any]) -> None:
    config = apply_overrides(find_recipe("qwen3_1p7b_from_8b_8gpu_h100")(), APART)
    _, record = planner(summary, config)
    assert [(rank["rank"], rank["student_stage"], rank["teacher_stage"]) for rank in record["ranks"]] == [
        (0, 0, None),
        (6, 0, None),
        (8, None, 0),
        (11, None, 1),
    ]
    names = [{term["name"].partition(",")[0] for term in rank["terms"]} for rank in record["ranks"]]
    assert names[1] == {
        *("weights", "gradients", "optimizer", "activations", "loss chunk", "head gradient", "KV cache", "prompts", "sampling", "payload"),
        "teacher head slice",
    }
    assert names[2] == {"teacher weights", "teacher forward", "KV cache", "prompts"}
    assert names[3] == names[2] | {"payload", "sampling"}
    phases = [{message["phase"] for message in rank["messages"]} for rank in record["ranks"]]
    assert phases == [{"rollout", "train", "optimizer"}] * 2 + [{"teacher"}] * 2
    # Nothing that is needed is where it was made: one copy of 256 sequences goes to the tensor ranks of the student.
    assert record["payload"]["bytes"] == 256 * 3072 * 4096 * 2
    # Each of the 2 tensor ranks gets its other half from the other.
    assert record["payload"]["gathered_bytes"] == record["payload"]["bytes"]


def test_one_batch_ahead_the_student_holds_scores_while_it_writes(planner: Callable[..., Any]) -> None:
    config = apply_overrides(find_recipe("qwen3_1p7b_from_8b_8gpu_h100")(), APART)
    waiting = []
    for staleness in (0, 1):
        _, record = planner(summary, apply_overrides(config, [f"teacher.staleness={staleness}"]))
        waiting.append([term["num_bytes"] for rank in record["ranks"] for term in rank["terms"] if term["name"] == "payload, waiting"])
    # The share of one of 4 replicas, in bf16, on both planned ranks of the student.
    assert waiting == [[], [64 * 3072 * 4096 * 2] * 2]


def test_a_mixture_is_refused_where_it_cannot_train(planned_models: Path) -> None:
    from opd_megatron.planning.architectures import know_model

    mixture, layout = str(planned_models / "mixture"), ParallelLayout(tensor=2)
    with pytest.raises(ValueError, match="trains a mixture of experts only under sequence parallelism"):
        know_model("student", StudentConfig(hf=mixture, layout=layout), PUBLISHED)
    assert know_model("teacher", TeacherConfig(hf=mixture, layout=layout), PUBLISHED).architecture.experts is not None


# --- the command line --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("gemma2_2b_from_phi4_mini_8gpu_h100_simct", ["rollout.engine=dynamic"], "rollout.engine=dynamic cannot write with the student"),
        ("qwen3_1p7b_from_8b_8gpu_h100", ["training.recompute=selective", "training.recompute_modules=moe"], "are parts of experts, and the student has none"),
    ],
)
def test_what_a_run_would_refuse_is_not_planned(name: str, words: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "tools/plan.py", name, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_the_tool_prints_one_json_object_for_programs() -> None:
    done = subprocess.run([sys.executable, "tools/plan.py", "quickstart", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["world_size"], record["fits"]) == (4, True)
    assert "planned, not measured" in record["note"]


@pytest.mark.slow
def test_the_tool_exits_2_with_the_plan_and_the_way_out_when_it_does_not_fit() -> None:
    done = run_program("tools.plan", "qwen3_1p7b_from_8b_8gpu_h100", "--nodes", "2", "--gpu-memory", "24")
    assert done.returncode == 2
    assert "16 ranks = TP 2 x PP 1 x CP 1 x DP 8" in done.stdout
    assert done.stderr.startswith("error: rank ")
    assert "of 24.0 GiB; largest: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quikstart",), "did you mean quickstart"),
        (("quickstart", "training.step=3"), "unknown key 'training.step'"),
        (("quickstart", "--nodes", "0"), "--nodes 0 must be at least 1"),
        (("quickstart", "--gpus-per-node", "-2"), "--gpus-per-node -2 must be at least 1"),
        (("quickstart", "--gpu-memory", "0"), "--gpu-memory 0.0 must be positive"),
        (("quickstart", "--gpu-memory", "nan"), "--gpu-memory nan must be positive"),
        (("quickstart", "--nodes", "1", "--gpus-per-node", "6"), "world_size=6 is not a multiple"),
        (
            ("quickstart", "student.layout.tensor=4", "student.layout.pipeline=1"),
            "does not divide the student's 2 key-value heads; use one of [1, 2]; nearest that work: student.layout.tensor=2, or student.layout.tensor=1",
        ),
        (
            ("quickstart", "teacher.placement=dedicated", "teacher.num_ranks=2"),
            "student.layout: world_size=2 is not a multiple of tensor*pipeline*context=4; use at least 4 ranks or change the layout; nearest that work: "
            "student.layout.tensor=1, or student.layout.pipeline=1",
        ),
        (("quickstart", "teacher.layout.expert=2"), "a dense qwen3 model without any; use 1; nearest that work: teacher.layout.expert=1"),
        (("quickstart", "teacher.placement=dedicated", "teacher.num_ranks=4"), "leaves none of world_size=4 ranks to the student; use more ranks in all"),
        (("qwen3_30b_a3b_from_235b_a22b_256gpu_h100", "student.layout.expert=7"), "nearest that work: student.layout.expert=8"),
        (("qwen2p5_1p5b_from_14b_4gpu_h200", "teacher.layout.tensor=4"), "or set teacher.self_test=false; nearest that work: teacher.layout.tensor=2"),
        (("quickstart", "student.hf=models/Qwen9-1B"), "student.hf='models/Qwen9-1B' is not on this machine"),
        (("quickstart", "student.hf=null", "student.checkpoint=nowhere"), "student.checkpoint='nowhere' is not on this machine"),
        (("quickstart", "teacher.hf=recipes"), "recipes is not a Hugging Face model folder"),
    ],
)
def test_wrong_input_exits_2_with_one_line(words: tuple[str, ...], message: str) -> None:
    done = run_program("tools.plan", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
