"""Recipes are built, listed and checked without torch, and whatever is wrong with a command is said before anything starts.

Not covered: runs themselves (tests/distributed/test_training.py), and the files of models that are not part of this repository.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron.config import AlignmentConfig, RunConfig, apply_overrides
from opd_megatron.training.preflight import check_run
from recipes import alignments, run
from recipes.quickstart import quickstart
from tests.tiny import write_tiny_model

ROOT = Path(run.__file__).parents[1]
RECIPES = run.all_recipes()
TINY_STUDENT, TINY_TEACHER = ROOT / "recipes" / "assets" / "tiny_student", ROOT / "recipes" / "assets" / "tiny_teacher"
TINY_MERGED_TEACHER = ROOT / "recipes" / "assets" / "tiny_merged_teacher"

# Seconds of import that building and checking must not cost, and packages a login node may lack.
HEAVY = "('torch', 'megatron', 'transformers', 'numpy', 'triton', 'nemo_run')"
WITHOUT_HEAVY = f"""
import atexit, os, runpy, sys
def check():
    found = [name for name in {HEAVY} if name in sys.modules]
    if found:
        sys.stderr.write(f"imported {{found}}")
        sys.stderr.flush()
        os._exit(99)
atexit.register(check)
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call `python -m recipes.run` in this process, outside of any job; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recipes.run", *words])
        capsys.readouterr()
        code = run.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code that exits with 99 if it imported a heavy package."""
    return subprocess.run([sys.executable, "-c", WITHOUT_HEAVY + code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def as_module(*words: str) -> subprocess.CompletedProcess[str]:
    return python("runpy.run_module('recipes.run', run_name='__main__', alter_sys=True)", *words)


def test_all_recipes_are_built_without_torch() -> None:
    outcome = python("import recipes.run\nfor name, build in recipes.run.all_recipes().items():\n    print(name, type(build()).__name__)")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines() == [f"{name} RunConfig" for name in RECIPES]


def test_the_guard_itself_sees_an_import() -> None:
    # An entry of sys.modules is all it looks at; importing torch would cost seconds.
    outcome = python("sys.modules['torch'] = sys")
    assert outcome.returncode == 99
    assert "torch" in outcome.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_without_torch(name: str) -> None:
    outcome = as_module(name, "--check")
    if outcome.returncode == 2:
        # Only a model or a data file that is not on this machine may stop it.
        assert any(reason in outcome.stderr for reason in ("is not a Hugging Face model folder", "is not a Megatron checkpoint", "does not exist"))
        return
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout) == RECIPES[name]().to_json()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_documented_function_without_arguments_that_fits_its_own_world(name: str) -> None:
    function = RECIPES[name]
    assert not inspect.signature(function).parameters
    assert (inspect.getdoc(function) or "").strip()
    config = function()
    assert isinstance(config, RunConfig)
    config.check_world(config.world_size)
    assert config == function()


def test_the_list_has_one_line_for_every_recipe() -> None:
    outcome = as_module("--list")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == list(RECIPES)
    assert all(len(line.split()) > 1 for line in outcome.stdout.splitlines())


def test_check_prints_the_configuration_with_overrides_applied(command) -> None:
    words = ["training.steps=7", "student.layout.pipeline=1", "data.task_options.max_word_len=5", "rollout.record=true"]
    code, out, _ = command("quickstart", "--check", *words)
    assert code == 0
    assert json.loads(out) == apply_overrides(quickstart(), words).to_json()


def test_check_prints_nothing_that_is_no_json(command) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    code, out, _ = command("quickstart", "--check", "rollout.temperature=inf")
    assert code == 2 or json.loads(out, parse_constant=refuse)


def test_options_and_overrides_may_be_mixed(command) -> None:
    code, out, _ = command("--check", "training.steps=7", "quickstart")
    assert code == 2, "the first word is the recipe"
    code, out, _ = command("quickstart", "training.steps=7", "--check", "seed=5")
    assert (code, json.loads(out)["seed"], json.loads(out)["training"]["steps"]) == (0, 5, 7)


MISTAKES = {
    "no recipe": ([], ["name a recipe", "--list"]),
    "unknown recipe": (["quikstart", "--check"], ["unknown recipe 'quikstart'", "did you mean quickstart"]),
    "unlike any recipe": (["zzz", "--check"], ["unknown recipe 'zzz'", "known are", *RECIPES]),
    "unknown key": (["quickstart", "--check", "training.step=3"], ["unknown key 'training.step'", "training.steps"]),
    "no KEY=VALUE": (["quickstart", "--check", "fast"], ["'fast' is not KEY=VALUE"]),
    "bad value": (["quickstart", "--check", "training.steps=0"], ["training.steps=0 must be at least 1"]),
    "no run directory": (["quickstart"], ["--run-dir is missing", "folder"]),
    "student heads": (
        ["quickstart", "--check", "student.layout.tensor=4", "student.layout.pipeline=1"],
        ["student.layout.tensor=4 does not divide the student's 2 key-value heads", "use one of [1, 2]"],
    ),
    "student layers": (
        ["quickstart", "--check", "student.layout.tensor=1", "student.layout.pipeline=4", "training.micro_batch=1"],
        ["student.layout.pipeline=4 does not divide the student's 2 layers", "use one of [1, 2]"],
    ),
    "teacher layers": (
        ["quickstart", "--check", "teacher.layout.pipeline=2"],
        ["teacher.layout.pipeline=2 does not divide the teacher's 3 layers", "use one of [1, 3]"],
    ),
    "student world": (["quickstart", "--check", "--nproc-per-node", "6"], ["student.layout: world_size=6 is not a multiple", "=4", "use 4 ranks"]),
    "teacher world": (["quickstart", "--check", "teacher.layout.pipeline=3"], ["teacher.layout: world_size=4 is not a multiple", "=3", "use 3 ranks"]),
    "small world": (["quickstart", "--check", "--nproc-per-node", "2"], ["world_size=2", "use at least 4 ranks or change the layout"]),
    "positions": (["quickstart", "--check", "rollout.max_response_tokens=449"], ["= 513 exceeds the student's 512 positions", "lower one of them"]),
    "rollout world": (
        ["quickstart", "--check", "rollout.layout.tensor=3"],
        ["rollout.layout: world_size=4 is not a multiple", "nearest that work: rollout.layout.tensor="],
    ),
    "rollout layers": (["quickstart", "--check", "rollout.layout.pipeline=4"], ["rollout.layout.pipeline=4 does not divide the student's 2 layers"]),
    "dynamic engine": (
        ["quickstart", "--check", "rollout.engine=dynamic"],
        ["rollout.engine=dynamic cannot write with the student: training.precision=fp32", "set it to auto or static"],
    ),
    "graphs of stages": (
        ["quickstart", "--check", "training.precision=bf16", "rollout.cuda_graphs=true"],
        ["records steps of one stage, and the student writes in 2", "rollout.layout.pipeline=1"],
    ),
    "few pages": (
        ["quickstart", "--check", "training.precision=bf16", "rollout.kv_cache_gib=1e-6"],
        ["rollout.kv_cache_gib=1e-06 holds 0 blocks of 256 tokens", "needs 1"],
    ),
    "student folder": (["quickstart", "--check", "student.hf=nowhere"], ["nowhere is not a Hugging Face model folder", "config.json"]),
    "student checkpoint": (
        ["quickstart", "--check", "student.hf=null", "student.checkpoint=nowhere"],
        ["student.checkpoint='nowhere' is not a Megatron checkpoint", "metadata.json"],
    ),
    "data file": (["quickstart", "--check", "data.prompts=nowhere.jsonl"], ["data.prompts='nowhere.jsonl' does not exist", "working directory"]),
    "modules that are not there": (["quickstart", "--check", "modules.train=attn"], ["modules.train='attn': 'attn' names no tensor", "did you mean attention"]),
    "nothing to train": (["quickstart", "--check", "modules.train=!all"], ["modules.train='!all' leaves no tensor"]),
    "rates of what does not train": (
        ["quickstart", "--check", "modules.train=mlp", 'modules.learning_rate_factors={"attention": 2}'],
        ["'attention' names only what modules.train='mlp' leaves out"],
    ),
    "nothing to extrapolate": (
        ["quickstart", "--check", "effopd.enabled=true", "modules.train=norm"],
        ["effopd.modules='paper' moves only what modules.train='norm' leaves where it is"],
    ),
    "extrapolation's file": (["quickstart", "--check", "effopd.enabled=true", "effopd.prompts=no.jsonl"], ["effopd.prompts='no.jsonl' does not exist"]),
    "evaluation file": (["quickstart", "--check", "evaluation.prompts=nowhere.parquet"], ["evaluation.prompts='nowhere.parquet' does not exist"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_2_and_one_line_that_says_what_to_do(command, name: str) -> None:
    words, parts = MISTAKES[name]
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("name", ["unknown recipe", "student heads", "no run directory"])
def test_a_mistake_ends_the_process_with_2_and_no_traceback(name: str) -> None:
    words, parts = MISTAKES[name]
    outcome = as_module(*words)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert parts[0] in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_size_of_the_job_is_checked_rather_than_the_recipes(command, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, rank in (("SLURM_NTASKS", "SLURM_PROCID"), ("WORLD_SIZE", "RANK")):
        monkeypatch.setenv(variable, "6")
        # Without a rank of its own this process is nobody's job, whatever the environment it was started from says.
        assert command("quickstart", "--check")[0] == 0
        monkeypatch.setenv(rank, "0")
        assert command("quickstart", "--check")[0] == 2
        monkeypatch.setenv(variable, "8")
        assert command("quickstart", "--check", "training.micro_batch=32")[0] == 0
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_number_of_ranks_below_1_is_a_mistake(command, number: str) -> None:
    assert command("quickstart_sft", "--check", "--nproc-per-node", number)[0] == 2


def test_the_message_is_left_for_the_launcher(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "cause.json"))
    command("quikstart", "--check")
    assert json.loads((tmp_path / "cause.json").read_text())["message"]["message"].startswith("unknown recipe 'quikstart'")


def test_tokenizers_that_differ_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in TINY_TEACHER.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = json.loads((TINY_TEACHER / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    overrides = [f"student.hf={TINY_STUDENT}", f"teacher.hf={folder}"]
    with pytest.raises(ValueError, match=r"student and teacher tokenizers differ.*choose a teacher with the student's tokenizer"):
        check_run(apply_overrides(quickstart(), overrides), 4)
    # Supervised fine-tuning has no teacher to agree with.
    check_run(apply_overrides(quickstart(), [*overrides, "training.objective=sft"]), 4)


def test_experts_are_refused_where_they_cannot_train_or_be_spread(tmp_path: Path) -> None:
    mixture = write_tiny_model(tmp_path / "mixture", "qwen3_moe")
    wrong = {
        "student.layout.tensor=2": "trains a mixture of experts only under sequence parallelism.*set student.layout.sequence=true, or tensor=1",
        "student.layout.sequence=true student.layout.expert_tensor=3": r"student.layout: expert\*expert_tensor=3 does not divide the 4 ranks",
        "student.layout.sequence=true teacher.layout.expert=2": "teacher.layout.expert=2 spreads experts, and the teacher is a dense qwen3 model",
    }
    for layout, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_run(apply_overrides(quickstart(), [f"student.hf={mixture}", "training.micro_batch=1", *layout.split()]), 8)


def test_a_student_that_cannot_take_the_teachers_place_is_refused_where_it_would_have_to(tmp_path: Path) -> None:
    student = write_tiny_model(tmp_path / "student", num_key_value_heads=2)
    teacher = write_tiny_model(tmp_path / "teacher", num_key_value_heads=4)
    overrides = [f"student.hf={student}", f"teacher.hf={teacher}", "student.layout.pipeline=1", "teacher.layout.tensor=4"]
    with pytest.raises(
        ValueError, match=r"self_test=true.*teacher.layout.tensor=4 does not divide the student's 2 key-value heads.*or set teacher.self_test=false"
    ):
        check_run(apply_overrides(quickstart(), overrides), 4)
    check_run(apply_overrides(quickstart(), [*overrides, "teacher.self_test=false"]), 4)


RELEASED = {"score": "raw_logit", "units": "released", "tail": "drop", "boundaries": "decoded_text", "vocab_match": "string", "oov_unit": "none"}
PRESETS = {"paper_math": {}, "public_code_4dae6fc": RELEASED, "public_code_cf0f33a": {**RELEASED, "gh_threshold": 2.0}, "public_scripts": RELEASED}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_simct_differs_from_the_paper_in_what_its_source_does_otherwise(name: str) -> None:
    assert vars(getattr(alignments, name)()) == {**vars(AlignmentConfig()), "kind": "simct", **PRESETS[name]}


def test_the_tiny_pair_has_two_tokenizers() -> None:
    # With equal ones the recipes would run as well, and show nothing.
    with pytest.raises(ValueError, match=r"student and teacher tokenizers differ.*or set alignment.kind=strict"):
        check_run(apply_overrides(quickstart(), [f"student.hf={TINY_STUDENT}", f"teacher.hf={TINY_MERGED_TEACHER}"]), 4)


# Keys that users' scripts set, with a value other than the default where one is supported.
CONTRACT_KEYS = {
    "seed": 7,
    "student.hf": "folder",
    "teacher.hf": "folder",
    **{f"student.layout.{axis}": 1 for axis in ("virtual", "context", "expert")},
    **{f"teacher.layout.{axis}": 1 for axis in ("context", "expert")},
    "student.layout.tensor": 4,
    "student.layout.pipeline": 4,
    "student.layout.sequence": True,
    "teacher.layout.tensor": 2,
    "teacher.layout.pipeline": 3,
    "teacher.placement": "colocated",
    "data.prompts": "prompts.jsonl",
    "data.batch_prompts": 32,
    "rollout.max_response_tokens": 99,
    "rollout.temperature": 0.7,
    "rollout.top_p": 0.9,
    "rollout.top_k": 20,
    "rollout.record": True,
    "rollout.replay": "runs/other",
    "loss.kind": "jsd",
    "loss.beta": 0.25,
    "loss.temperature": 2.0,
    "loss.pointwise_clip": 0.1,
    "importance.rule": "all",
    "importance.ratio": 0.5,
    "position_weights.enabled": True,
    "alignment.kind": "strict",
    "effopd.enabled": True,
    "modules.train": "all",
    "training.objective": "sft",
    "training.steps": 50,
    "training.micro_batch": 2,
    "training.learning_rate": 0.005,
    "checkpoint.every_steps": 5,
    "checkpoint.keep": 3,
    "checkpoint.resume": False,
    "evaluation.every_steps": 4,
    "evaluation.prompts": 16,
}
SECTIONS_TO_COME = {"importance", "position_weights", "alignment", "effopd", "modules"}


@pytest.mark.parametrize("key", CONTRACT_KEYS)
def test_scripts_can_set_this_key(key: str) -> None:
    value = CONTRACT_KEYS[key]
    section = key.partition(".")[0]
    if section in SECTIONS_TO_COME and not hasattr(quickstart(), section):
        pytest.skip(f"needs RunConfig.{section}")
    config = apply_overrides(quickstart(), [f"{key}={str(value).lower() if isinstance(value, bool) else value}"])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value
