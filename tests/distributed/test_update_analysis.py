"""`tools/analyze_updates.py` on runs: what it reads from checkpoints of several layouts, measures with parts of an update, prints and refuses.

The numbers themselves are in tests/unit/test_update_spectra.py. Not covered: GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_megatron.analysis.experiments import EditedModel, plan_experiments
from opd_megatron.analysis.measure import measure
from opd_megatron.analysis.updates import open_run
from opd_megatron.config import CheckpointConfig, ParallelLayout, RunConfig, apply_overrides, from_json
from opd_megatron.models.checkpoint_weights import CheckpointWeights
from opd_megatron.models.gpt import build_gpt
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import named_global_parameters, open_weights
from opd_megatron.parallel.groups import student_groups
from opd_megatron.training.checkpoint import CheckpointFolder
from opd_megatron.training.student import Student
from recipes.quickstart import quickstart
from tests.pool import RankPool
from tests.programs import ROOT, run_program
from tests.runs import run_job, small_config, weights_of
from tests.tiny import write_tiny_model

KEPT = CheckpointConfig(every_steps=1, keep=9)


def analyze(*words: object) -> Any:
    return run_program("tools.analyze_updates", *words)


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "analysis" / "updates.json").read_text())


@pytest.fixture(scope="module")
def run(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on one rank that keeps every checkpoint."""
    run = tmp_path_factory.mktemp("analyzed") / "run"
    pool.run(run_job, dataclasses.replace(small_config(models), checkpoint=KEPT), run, world_size=1)
    return run


@pytest.fixture(scope="module")
def mixture_run(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 of a mixture of experts, spread over two ranks; its base is stored in fp32."""
    folder = tmp_path_factory.mktemp("mixture")
    write_tiny_model(folder / "student", "qwen3_moe", vocab_size=263, scale=0.3, num_hidden_layers=2, num_experts=4)
    config = small_config(models, expert=2)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=str(folder / "student")),
        training=dataclasses.replace(config.training, objective="sft", steps=2, precision="bf16", learning_rate=1e-4),
        teacher=None,
        checkpoint=KEPT,
    )
    pool.run(run_job, config, folder / "run", world_size=2)
    return folder / "run"


def naive(base: Path, final: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    before = load_file(base / "model.safetensors")
    assert before.keys() == final.keys()
    return {name: (final[name].double() - before[name].double()).numpy() for name in before}


def test_every_tensor_is_measured_as_numpy_does_by_its_hugging_face_name(run: Path, models: Path) -> None:
    done = analyze(run)
    assert done.returncode == 0, done.stderr
    record = record_of(run)
    updates = naive(models / "student", weights_of(run))
    total = sum(float(np.sum(update**2)) for update in updates.values())
    assert {tensor["name"] for tensor in record["tensors"]} == updates.keys()
    assert record["norm"] == pytest.approx(total**0.5, rel=1e-4)
    for tensor in record["tensors"]:
        update = updates[tensor["name"]]
        # Updates of 1e-3 of weights of about 0.1 in fp32: rounding is 1e-5 of them.
        assert tensor["norm"] == pytest.approx(np.linalg.norm(update), rel=1e-4), tensor["name"]
        assert tensor["share"] == pytest.approx(np.sum(update**2) / total, rel=1e-3), tensor["name"]
        if tensor["kind"] in ("attention", "mlp"):
            assert tensor["spectral_share"] == pytest.approx(np.linalg.norm(update, 2) / np.linalg.norm(update), rel=1e-4), tensor["name"]
        else:
            assert tensor["spectral_norm"] is tensor["effective_rank"] is tensor["alignment"] is None
    assert {tensor["module"] for tensor in record["tensors"] if tensor["layer"] == 3} == {
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
    }
    for groups in ("kinds", "thirds"):
        assert sum(one["share"] for one in record[groups]) == pytest.approx(1.0)
    assert (record["early_step"], record["final_step"], record["rounding_floor"], record["experiments"]) == (1, 3, None, [])
    assert all(word in done.stdout for word in ("3 self_attn.v_proj", "early: step 1, 33% of the run", "updates.json"))
    assert (run / "analysis" / "spectra.png").stat().st_size > 10_000
    assert not (run / "analysis" / "experiments.png").exists()


def save_again(run: Path, out: Path, layout: ParallelLayout) -> None:
    """Load a run's checkpoints in another layout and save them in it."""
    stored = from_json(RunConfig, json.loads((run / "config.json").read_text())["config"])
    config = dataclasses.replace(stored, student=dataclasses.replace(stored.student, layout=layout))
    source = open_weights(hf=config.student.hf)
    student = Student(config, source, student_groups(layout, config.seed), torch.device("cpu"))
    before, after = (CheckpointFolder(path / "checkpoints", source.assets, keep=9) for path in (run, out))
    for step in (1, 3):
        progress = before.open(before.path / f"step_{step}", source.architecture)
        before.load(student, before.path / f"step_{step}", progress)
        after.save(student, progress)


def test_a_sharded_checkpoint_says_what_a_whole_one_does(run: Path, pool: RankPool, tmp_path: Path) -> None:
    sharded = tmp_path / "run"
    sharded.mkdir()
    shutil.copy(run / "config.json", sharded)
    pool.run(save_again, run, sharded, ParallelLayout(tensor=2, pipeline=2))
    pieces = [
        len(CheckpointWeights(path / "checkpoints" / "step_3")._tensors["decoder.layers.0.self_attention.linear_qkv.weight"].chunks) for path in (run, sharded)
    ]
    assert pieces == [1, 2]
    assert measure(open_run(sharded)) == measure(open_run(run))


def test_a_run_that_began_with_a_checkpoint_is_measured_from_it(run: Path, models: Path, tmp_path: Path) -> None:
    done = run_program("tools.convert_hf_to_megatron", "--hf", models / "student", "--out", tmp_path / "start")
    assert done.returncode == 0, done.stderr
    other = tmp_path / "run"
    shutil.copytree(run, other)
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["student"] |= {"hf": None, "checkpoint": str(tmp_path / "start")}
    (other / "config.json").write_text(json.dumps(stored))
    assert measure(open_run(other)) == measure(open_run(run))


def test_a_run_in_bf16_is_measured_by_its_master_weights(mixture_run: Path) -> None:
    opened = open_run(mixture_run)
    assert opened.early is not None
    found_between_roundings = 0
    for row in weight_map(opened.final.architecture):
        stored, exact = opened.final.read(row), opened.final.read_exact(row)
        assert stored.dtype == torch.bfloat16
        assert exact.dtype == torch.float32
        assert torch.equal(exact.bfloat16(), stored), row.name
        found_between_roundings += int((exact != stored.float()).sum())
        assert not opened.final.is_rounded(row)
        assert torch.equal(opened.base_of(row), opened.base.read(row).bfloat16().float())
    assert found_between_roundings > 1000
    measured = measure(opened)
    assert measured.rounding_floor is None
    experts = [tensor for tensor in measured.tensors if ".experts." in tensor.name]
    assert len(experts) == 2 * 4 * 3
    # Two steps of Adam at 1e-4 move a weight by up to 2e-4, which bf16 would not hold. Embeddings of unseen tokens stay, and experts that no token went to.
    for tensor in measured.tensors:
        mean = tensor.norm / np.prod(tensor.shape) ** 0.5
        assert 1e-4 < mean < 2.1e-4 or tensor.kind == "embedding" or (mean == 0 and tensor in experts), (tensor.name, mean)


def test_where_bf16_is_all_there_is_the_rounding_floor_is_told(mixture_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(mixture_run / "config.json", run)
    done = run_program("tools.convert_hf_to_megatron", "--hf", mixture_run / "hf", "--out", run / "checkpoints" / "step_2")
    assert done.returncode == 0, done.stderr
    done = analyze(run)
    assert done.returncode == 0, done.stderr
    record = record_of(run)
    moved = [tensor["base_norm"] for tensor in record["tensors"] if tensor["moved"]]
    assert record["rounding_floor"] == pytest.approx(sum(norm**2 for norm in moved) ** 0.5 / 512)
    assert "stored in 16 bits alone" in done.stdout
    assert "no earlier checkpoint" in done.stdout


def edited_weights(run: Path, radius: int) -> list[dict[str, torch.Tensor]]:
    """Return what the model holds in every experiment, one after another, and how far each is from the base by its own account."""
    opened = open_run(run)
    architecture = opened.final.architecture
    groups = student_groups(ParallelLayout(), seed=0)
    model = build_gpt(architecture, groups, precision="fp32", vocab_multiple=1)
    rows = {row.name: row for row in weight_map(architecture)}
    edited, found = EditedModel(opened, model), []
    for experiment in plan_experiments(list(rows.values()), architecture.num_layers, radius=radius, fractions=[0.1, 1.0], has_early=True):
        norm = edited.put(experiment.changes)
        tensors = {name: parameter.detach().clone() for name, parameter in named_global_parameters(model, architecture)}
        weights = {part: value for name, tensor in tensors.items() for part, value in to_hf(rows[name], tensor, architecture).items()}
        found.append({"label": (experiment.name, experiment.kind, experiment.layer, experiment.amount), "norm": norm, "weights": weights})
    return found


def test_experiments_put_into_the_model_what_they_say(run: Path, models: Path, pool: RankPool) -> None:
    (found,) = pool.run(edited_weights, run, 1, world_size=1)
    base, final = load_file(models / "student" / "model.safetensors"), weights_of(run)
    opened = open_run(run, final=1)
    early = {part: value for row in weight_map(opened.final.architecture) for part, value in opened.parts_of(row, opened.final.read(row)).items()}
    by_label = {one["label"]: one["weights"] for one in found}
    in_layer = {name: int(name.split(".")[2]) for name in base if "layers." in name}
    is_matrix = {name: base[name].dim() == 2 and name in in_layer for name in base}

    def check(label: tuple[Any, ...], wanted: Callable[[str], torch.Tensor]) -> None:
        for name, weight in by_label[label].items():
            # base + (final - base) is final within a rounding of fp32.
            torch.testing.assert_close(weight, wanted(name), atol=2e-6, rtol=0, msg=f"{label}: {name}")

    assert len(by_label) == 2 + 4 + 2 + 2 + 1 + 3 + 8
    check(("base", None, None, None), lambda name: base[name])
    check(("final", None, None, None), lambda name: final[name])
    check(("scaled", None, None, 0.25), lambda name: base[name] + 0.25 * (final[name] - base[name]))
    check(("embedding_swapped", None, None, None), lambda name: base[name] if "embed" in name else final[name])
    check(("matrices", None, None, None), lambda name: final[name] if is_matrix[name] else base[name])
    check(("top", None, None, 1.0), lambda name: final[name] if is_matrix[name] else base[name])
    check(("early", None, None, None), lambda name: early[name])
    check(("window", "mlp", 0, 1.0), lambda name: final[name] if is_matrix[name] and ".mlp." in name and in_layer[name] <= 1 else base[name])
    check(("window", "attention", 2, 1.0), lambda name: final[name] if is_matrix[name] and "attn" in name and 1 <= in_layer[name] <= 3 else base[name])
    for name in base:
        update, lengthened = final[name] - base[name], by_label["early_rescaled", None, None, None][name] - base[name]
        assert float(lengthened.norm()) == pytest.approx(float(update.norm()), rel=1e-3), name
        assert torch.nn.functional.cosine_similarity(lengthened.flatten(), (early[name] - base[name]).flatten(), dim=0) > 0.999, name
        if is_matrix[name]:
            top, tail = (by_label[key, None, None, amount][name] - base[name] for key, amount in (("top", 0.1), ("tail", 0.5)))
            left, singular, right = np.linalg.svd(update.double().numpy(), full_matrices=False)
            count, rank = -(-len(singular) // 10), len(singular)
            first = (left[:, :count] * singular[:count]) @ right[:count] * np.linalg.norm(singular) / np.linalg.norm(singular[:count])
            last = (left[:, rank - rank // 2 :] * singular[rank - rank // 2 :]) @ right[rank - rank // 2 :]
            np.testing.assert_allclose(top.numpy(), first, atol=1e-5 * float(singular[0]) + 2e-6)
            np.testing.assert_allclose(tail.numpy(), last, atol=1e-5 * float(singular[0]) + 2e-6)
    for one in found:
        distance = sum(float((one["weights"][name] - base[name]).double().square().sum()) for name in base) ** 0.5
        assert one["norm"] == pytest.approx(distance, rel=1e-3), one["label"]


@pytest.fixture(scope="module")
def graded_run(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of the quickstart on one rank, with an accuracy that is neither 0 nor 1."""
    run = tmp_path_factory.mktemp("graded") / "run"
    words = [
        *("student.layout.tensor=1", "student.layout.pipeline=1", "training.steps=4", "training.learning_rate=1e-3", "training.warmup_steps=0"),
        *("evaluation.prompts=64", "data.task_size=2000", "data.batch_prompts=32", "checkpoint.every_steps=1", "checkpoint.keep=9"),
    ]
    config = apply_overrides(quickstart(), [*words, f"student.hf={ROOT}/recipes/assets/tiny_student", f"teacher.hf={ROOT}/recipes/assets/tiny_teacher"])
    pool.run(run_job, config, run, world_size=1)
    return run


def test_accuracies_are_those_that_the_run_itself_measured(graded_run: Path, tmp_path: Path) -> None:
    file, plots = tmp_path / "out" / "updates.json", tmp_path / "plots"
    done = analyze(graded_run, "--window", 1, "--recover", 0.1, "--early", 2, "--json", file, "--plots", plots)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    outcomes = record["experiments"]
    measured = {one["step"]: one["accuracy"] for one in map(json.loads, (graded_run / "evals.jsonl").read_text().splitlines()) if one["who"] == "student"}
    by_name = {(one["name"], one["amount"]): one for one in outcomes if one["name"] != "window"}
    base, final = by_name["base", None], by_name["final", None]
    assert 0 < measured[0] < 1
    assert (base["accuracy"], final["accuracy"]) == (measured[0], measured[4])
    assert measured[0] != measured[4]
    assert by_name["scaled", 1.0]["accuracy"] == final["accuracy"]
    assert {one["prompts"] for one in outcomes} == {64}
    assert base["share_of_gain"] == 0
    assert final["share_of_gain"] == 1
    assert (base["update_norm"], final["update_norm"]) == (0, pytest.approx(record["norm"], rel=1e-5))
    assert by_name["scaled", 0.5]["update_norm"] == pytest.approx(record["norm"] / 2, rel=1e-5)
    windows = [(one["kind"], one["layer"], one["num_layers"]) for one in outcomes if one["name"] == "window"]
    assert windows == [(kind, layer, 2) for kind in ("attention", "mlp") for layer in (0, 1)]
    assert record["early_step"] == 2
    assert {path.name for path in plots.iterdir()} == {"spectra.png", "experiments.png"}
    assert not (graded_run / "analysis").exists()
    assert "mlp around layer 1 (2)" in done.stdout


def test_fewer_prompts_are_the_first_of_them(graded_run: Path, tmp_path: Path) -> None:
    done = analyze(graded_run, "--recover", 1, "--prompts", 20, "--json", tmp_path / "updates.json", "--plots", tmp_path)
    assert done.returncode == 0, done.stderr
    examples = json.loads((graded_run / "evals.jsonl").read_text().splitlines()[1])["examples"]
    outcomes = json.loads((tmp_path / "updates.json").read_text())["experiments"]
    assert {one["prompts"] for one in outcomes} == {20}
    assert outcomes[0]["accuracy"] == pytest.approx(sum(example["score"] >= 1 for example in examples[:20]) / 20)


def test_what_did_not_move_is_said_and_has_no_numbers(run: Path, tmp_path: Path) -> None:
    """The base is the final model but for one matrix, of which half did not move."""
    shutil.copytree(run / "hf", tmp_path / "base")
    weights = weights_of(run)
    weights["model.layers.1.mlp.up_proj.weight"][:10] += 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    done = analyze(run, "--base", tmp_path / "base", "--json", tmp_path / "updates.json", "--plots", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "updates.json").read_text())
    (moved,) = [tensor for tensor in record["tensors"] if tensor["moved"]]
    assert (moved["name"], moved["share"], moved["rank"]) == ("model.layers.1.mlp.up_proj.weight", 1.0, 1)
    still = [tensor for tensor in record["tensors"] if not tensor["moved"]]
    assert len(still) == record["tensors_not_moved"] > 40
    measures = ("spectral_norm", "spectral_share", "effective_rank", "rank", "top_share", "alignment", "first_cosine")
    assert all(tensor[name] is None for tensor in still for name in measures)
    assert {(tensor["norm"], tensor["share"]) for tensor in still} == {(0.0, 0.0)}
    assert "not moved: " in done.stdout
    assert "nan" not in done.stdout.lower()


def test_a_base_that_is_the_final_model_has_no_shares(run: Path, tmp_path: Path) -> None:
    done = analyze(run, "--base", run / "hf", "--json", tmp_path / "updates.json", "--plots", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "updates.json").read_text())
    assert record["norm"] == 0
    assert all(tensor["share"] is None for tensor in record["tensors"])
    assert record["matrices"]["effective_rank"] is None


def test_experiments_are_refused_on_several_ranks(graded_run: Path, tmp_path: Path) -> None:
    done = run_program("tools.analyze_updates", graded_run, "--window", 1, "--json", tmp_path / "updates.json", "--plots", tmp_path, ranks=2)
    assert done.returncode == 2, done.stderr
    assert "on one rank, not 2: start the tool without torchrun" in done.stderr
    assert "Traceback" not in done.stderr


def without_config(run: Path) -> None:
    (run / "config.json").unlink()


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def with_one_checkpoint(run: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")


def with_an_unknown_setting(run: Path) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["training"]["warp"] = 9
    (run / "config.json").write_text(json.dumps(stored))


def with_a_base_that_is_gone(run: Path) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["student"]["hf"] = "/nowhere/student"
    (run / "config.json").write_text(json.dumps(stored))


def with_a_cut_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step_3" / ".metadata").write_bytes(b"")


def as_it_is(run: Path) -> None:
    pass


WRONG = {
    "no run": (as_it_is, ["/nowhere"], "/nowhere is not a run directory"),
    "no configuration": (without_config, ["{run}"], "is not a run directory: no config.json"),
    "another version's configuration": (with_an_unknown_setting, ["{run}"], "'training.warp'"),
    "no checkpoints": (without_checkpoints, ["{run}"], "has no checkpoints"),
    "one checkpoint": (with_one_checkpoint, ["{run}", "--early", "1"], "checkpoint.every_steps=10 checkpoint.keep=100"),
    "an absent early step": (as_it_is, ["{run}", "--early", "7"], "--early 7: there is no such checkpoint; there are 1, 2"),
    "an early step that is the final one": (as_it_is, ["{run}", "--early", "3"], "there are 1, 2"),
    "an absent final step": (as_it_is, ["{run}", "--final", "9"], "--final 9: there is no such checkpoint; there are 1, 2, 3"),
    "a cut checkpoint": (with_a_cut_checkpoint, ["{run}"], ".metadata is damaged"),
    "a base that is gone": (with_a_base_that_is_gone, ["{run}"], "/nowhere/student is not a Hugging Face model folder"),
    "another base": (as_it_is, ["{run}", "--base", "/nowhere"], "name their folder with --base"),
    "another architecture": (as_it_is, ["{run}", "--base", "{models}/teacher"], "has another architecture"),
    "numbers that are none": (as_it_is, ["{run}", "--base", "{damaged}"], "1 values that are not finite"),
    "a negative radius": (as_it_is, ["{run}", "--window", "-1"], "--window -1 must be from 0 to 3"),
    "a radius beyond the model": (as_it_is, ["{run}", "--window", "4"], "--window 4 must be from 0 to 3"),
    "no fraction": (as_it_is, ["{run}", "--recover", "0.1", "0"], "--recover 0 must be above 0"),
    "more than all": (as_it_is, ["{run}", "--recover", "1.5"], "--recover 1.5 must be above 0 and at most 1"),
    "nan": (as_it_is, ["{run}", "--recover", "nan"], "--recover nan must be"),
    "no prompts": (as_it_is, ["{run}", "--window", "1", "--prompts", "0"], "--prompts 0 must be at least 1"),
    "prompts for nothing": (as_it_is, ["{run}", "--prompts", "5"], "no model is run"),
    "nothing held out": (as_it_is, ["{run}", "--window", "1"], "held out no prompts"),
    "no place for plots": (as_it_is, ["{run}", "--plots", "/proc/nowhere"], "--plots: folder /proc/nowhere cannot be written"),
    "no place for numbers": (as_it_is, ["{run}", "--json", "{run}"], "cannot be written"),
}


@pytest.fixture(scope="module")
def damaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "student"
    shutil.copytree(models / "student", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("spoil", "words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_exits_2_with_one_line(
    run: Path, models: Path, damaged: Path, tmp_path: Path, spoil: Callable[[Path], None], words: list[str], message: str
) -> None:
    copy = run
    if spoil is not as_it_is:
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        spoil(copy)
    done = analyze(*(word.format(run=copy, models=models, damaged=damaged) for word in words))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
