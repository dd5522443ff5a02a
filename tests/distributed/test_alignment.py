"""A teacher with another tokenizer: the losses that transformers and a plain reading of the definition give, in every layout.

Not covered: NCCL, bf16 across layouts, more than 4 ranks.
Units themselves are in tests/unit/test_units.py and test_responses.py, single losses in test_simct.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron.config import AlignmentConfig, LossConfig, PositionWeightsConfig, RunConfig
from opd_megatron.losses.position_weights import position_weights
from opd_megatron.rollout.rollouts import replay_rollouts
from opd_megatron.training.alignment import little_aligned, uncompared_ends, unlikely_ends
from tests.pool import RankPool
from tests.reference_simct import naive_simct
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher, write_prompts
from tests.tiny import write_tiny_model
from tests.tokenizers_made import byte_level_bpe

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
# Plain words, characters of several bytes, half a character, a special token in the middle, a text that is empty, one without an end.
RESPONSES = ("import self", "return None", "def naïve(x):", "日本 €", "  self.x = self", "a", "", "raise ValueError", "x" * 9, "print(1234)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that writes bytes, and a wider teacher with a vocabulary of merged pieces and another template."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, vocab_size=263, seed=1)
    sizes = {"hidden_size": 96, "vocab_size": 520}
    write_tiny_model(folder / "teacher", seed=2, scale=0.5, **sizes)
    tokenizer = byte_level_bpe(512)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "teacher")
    config = json.loads((folder / "teacher" / "generation_config.json").read_text())
    (folder / "teacher" / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": tokenizer.eos_token_id}))
    write_prompts(folder / "prompts.jsonl")
    return folder


def _config(models: Path, alignment: AlignmentConfig, **layout: Any) -> RunConfig:
    config = small_config(models, **layout)
    rollout = dataclasses.replace(config.rollout, max_response_tokens=24)
    return dataclasses.replace(config, rollout=rollout, alignment=alignment, loss=LossConfig(temperature=1.1))


def _changed(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


_SHARES = {"lost_bytes_share": 0.93, "special_token_share": 0.0, "cut_teacher_tokens": 0}
STRICT, SIMCT = AlignmentConfig(kind="strict"), AlignmentConfig(kind="simct")


@pytest.fixture(scope="module")
def recorded(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's record with responses put in that a trained model might write: random weights write no text."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    pool.run(run_job, _changed(_config(models, STRICT), "rollout", record=True), run, world_size=1)
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    for step in range(1, 4):
        file = run / "rollouts" / f"step_{step}.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for place, record in enumerate(records):
            ids = tokenizer(RESPONSES[(place + 3 * step) % len(RESPONSES)])["input_ids"]
            ids = ids[:-1] if place == 3 else [*ids[:2], tokenizer.pad_token_id, *ids[2:]] if place == 5 else ids
            ended = place not in (3, 6)
            record |= {"response_ids": [*ids, tokenizer.eos_token_id] if ended or not ids else ids, "sampled_logp": None, "finished": ended or not ids}
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture(scope="module")
def replayed(models: Path, recorded: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process's runs on that record, by kind."""
    runs = {}
    for kind, alignment in {"strict": STRICT, "simct": SIMCT}.items():
        runs[kind] = tmp_path_factory.mktemp(kind) / "run"
        pool.run(run_job, _changed(_config(models, alignment), "rollout", replay=str(recorded)), runs[kind], world_size=1)
    return runs


def _bytes_of(tokenizer: Any) -> list[bytes]:
    """Byte strings of a byte-level vocabulary, by decoding whole runs of tokens: not as the library reads them. Specials are empty."""
    from opd_megatron.align.pieces import token_bytes

    return [piece or b"" for piece in token_bytes(tokenizer)]


def _units_of(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Two pointers, token by token."""
    units, start, i, j, left, right = [], (0, 0), 0, 0, b"", b""
    while i < len(student) or j < len(teacher):
        if len(left) <= len(right) and i < len(student):
            left, i = left + student[i], i + 1
        else:
            right, j = right + teacher[j], j + 1
        if left == right:
            units.append((start[0], i, start[1], j))
            start = (i, j)
    return units


def _reference(models: Path, sample: Any, kind: str, temperature: float) -> tuple[list[float], list[int], int]:
    """Return losses and first tokens of the sample's units, and its tokens: Hugging Face models, tokenizers and a naive loss."""
    tokenizers = [AutoTokenizer.from_pretrained(models / role) for role in ("student", "teacher")]
    nets = [AutoModelForCausalLM.from_pretrained(models / role, dtype=torch.float32) for role in ("student", "teacher")]
    pieces = [_bytes_of(tokenizer) for tokenizer in tokenizers]
    ends = [tokenizer.eos_token_id for tokenizer in tokenizers]
    ids = sample.response_ids.tolist()
    ended = sample.finished and ids[-1] == ends[0]
    body, theirs, units = ids[:-1] if ended else ids, [], []
    walls = [-1, *(place for place, token in enumerate(body) if not pieces[0][token]), len(body)]
    for before, wall in itertools.pairwise(walls):
        stretch = body[before + 1 : wall]
        text = b"".join(pieces[0][token] for token in stretch).decode("utf-8", "replace")
        read = tokenizers[1](text, add_special_tokens=False)["input_ids"] if text else []
        common = _units_of([pieces[0][token] for token in stretch], [pieces[1][token] for token in read])
        units += [(a + before + 1, b + before + 1, c + len(theirs), d + len(theirs)) for a, b, c, d in common]
        theirs += read
    pair_of = {piece: index for index, piece in enumerate(pieces[1]) if piece}
    pairs = [(index, pair_of[piece]) for index, piece in enumerate(pieces[0]) if piece and piece in pair_of] + [tuple(ends)]
    if ended:
        theirs.append(ends[1])
        units.append((len(ids) - 1, len(ids), len(theirs) - 1, len(theirs)))
    single = [b - a == d - c == 1 and (ids[a], theirs[c]) in pairs for a, b, c, d in units]
    if kind == "strict":
        units, single = [unit for unit, one in zip(units, single) if one], [True] * sum(single)
    logits = []
    for net, prompt, response, size in zip(nets, (sample.prompt_ids, sample.teacher_prompt_ids), (ids, theirs), (len(pieces[0]), len(pieces[1]))):
        with torch.no_grad():
            whole = net(torch.cat([prompt, torch.tensor(response, dtype=torch.long)])[None]).logits[0]
        logits.append(whole[len(prompt) - 1 : -1, :size].double() / temperature)
    losses = naive_simct(*logits, units, ids, theirs, sorted(pairs), has_column=[not one for one in single])
    return losses.tolist(), [unit[0] for unit in units], len(ids)


@pytest.mark.parametrize("kind", ["strict", "simct"])
def test_the_loss_is_that_of_transformers_on_each_models_own_tokens(models: Path, recorded: Path, replayed: dict[str, Path], kind: str) -> None:
    """Sum over units of the row's reverse KL, over the student's tokens of the step: tokens without a unit count in the divisor."""
    samples = replay_rollouts(recorded / "rollouts" / "step_1.jsonl").samples
    found = [_reference(models, sample, kind, 1.1) for sample in samples]
    total, rows, tokens = sum(sum(losses) for losses, _, _ in found), sum(len(losses) for losses, _, _ in found), sum(count for _, _, count in found)
    step = metrics_of(replayed[kind])[0]
    assert step["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert step["divergence"] == pytest.approx(total / rows, rel=1e-5)
    assert step["response_tokens"] == tokens
    if kind == "strict":
        assert step["kept_fraction"] == pytest.approx(rows / tokens) == step["aligned_share"]
    else:
        assert step["multi_token_unit_share"] > 0.1


LAYOUTS = {
    "TP2": ({"tensor": 2}, {}, None, 2),
    "TP2+SP, teacher TP2": ({"tensor": 2, "sequence": True}, {"tensor": 2}, None, 4),
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, None, 4),
    "CP2, teacher CP2xTP2": ({"context": 2}, {"context": 2, "tensor": 2}, None, 4),
    "CP2xTP2+SP": ({"context": 2, "tensor": 2, "sequence": True}, {}, None, 4),
    "PP2xVPP2, teacher TP2": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, None, 2),
    "DP2xPP2": ({"pipeline": 2}, {"tensor": 2}, None, 4),
    "TP2, PP2 of the teacher's own": ({"tensor": 2}, {"pipeline": 2}, 2, 4),
}
FAST = (("TP2xPP2+SP, teacher PP2", "simct"), ("CP2, teacher CP2xTP2", "simct"), ("TP2, PP2 of the teacher's own", "strict"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, kind, marks=[] if (name, kind) in FAST else [pytest.mark.slow]) for name in LAYOUTS for kind in ("strict", "simct")],
)
def test_every_layout_gives_the_same_losses(
    models: Path, recorded: Path, replayed: dict[str, Path], pool: RankPool, tmp_path: Path, name: str, kind: str
) -> None:
    """Three steps, so gradients agree too: spans that cross a context window, vocabularies sharded over the tensor group, replicas with fewer units."""
    student, teacher, own, world_size = LAYOUTS[name]
    config = with_teacher(_config(models, {"strict": STRICT, "simct": SIMCT}[kind], **student), own, **teacher)
    pool.run(run_job, _changed(config, "rollout", replay=str(recorded)), tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(replayed[kind]), strict=True):
        for key in ("loss", "divergence", "student_entropy", "teacher_shared_mass", "teacher_eos_mass", "kept_fraction", "units_per_token"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-7), (key, ours["step"])
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    ours, reference = weights_of(tmp_path / "run"), weights_of(replayed[kind])
    assert max(float((ours[name] - reference[name]).abs().max()) for name in ours) < 1e-5


@pytest.mark.parametrize(("layout", "world_size"), [({"context": 2}, 2), pytest.param({"tensor": 2, "sequence": True}, 4, marks=pytest.mark.slow)])
def test_packed_samples_give_the_same_losses(
    models: Path, recorded: Path, replayed: dict[str, Path], pool: RankPool, tmp_path: Path, layout: dict[str, Any], world_size: int
) -> None:
    """Several samples in one row, uneven packs, units that lie in both windows of a sample."""
    config = _changed(_config(models, SIMCT, **layout), "rollout", replay=str(recorded))
    pool.run(run_job, _changed(config, "training", micro_batch=1, micro_batch_tokens=96), tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(replayed["simct"]), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_position_weights_weigh_units_by_their_first_token(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """Per-sequence mean over all response tokens of what the units of a sequence are worth, and its ablation by token."""
    weights = PositionWeightsConfig(enabled=True, center=0.5, slope=0.1)
    config = dataclasses.replace(_changed(_config(models, SIMCT), "rollout", replay=str(recorded)), position_weights=weights)
    pool.run(run_job, _changed(config, "training", steps=1), tmp_path / "run", world_size=1)
    total, samples = 0.0, replay_rollouts(recorded / "rollouts" / "step_1.jsonl").samples
    for sample in samples:
        losses, first, count = _reference(models, sample, "simct", 1.1)
        weight_R = position_weights([count], center=0.5, slope=0.1)
        total += float((weight_R[first] * torch.tensor(losses)).sum()) / count
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(total / len(samples), rel=1e-5)


def test_spans_may_weigh_by_their_tokens(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    alignment = dataclasses.replace(SIMCT, span_weight="student_tokens")
    config = _changed(_changed(_config(models, alignment), "rollout", replay=str(recorded)), "training", steps=1)
    pool.run(run_job, config, tmp_path / "run", world_size=1)
    total, tokens = 0.0, 0
    for sample in replay_rollouts(recorded / "rollouts" / "step_1.jsonl").samples:
        losses, first, count = _reference(models, sample, "simct", 1.1)
        lengths = [stop - start for start, stop in itertools.pairwise([*first, count])]
        # A special token in the middle is in no unit.
        walls = {place for place, token in enumerate(sample.response_ids.tolist()) if token == 256}
        lengths = [length - len(walls & set(range(start, start + length))) for start, length in zip(first, lengths)]
        total, tokens = total + sum(loss * length for loss, length in zip(losses, lengths)), tokens + count
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.slow
def test_sorted_probabilities_in_two_layouts(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _changed(_config(models, AlignmentConfig(kind="uld", top_k=50)), "rollout", replay=str(recorded))
    pool.run(run_job, config, tmp_path / "one", world_size=1)
    layout = dataclasses.replace(config.student.layout, tensor=2, context=2)
    pool.run(run_job, _changed(config, "student", layout=layout), tmp_path / "four", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "four"), metrics_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_a_stopped_run_ends_with_the_same_weights(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """A teacher of its own ranks that is one batch ahead: what waits in the checkpoint is aligned anew."""
    config = with_teacher(_config(models, SIMCT), 1)
    config = _changed(config, "teacher", staleness=1)
    pool.run(run_job, config, tmp_path / "whole", world_size=2)
    pool.run(run_until_step, config, tmp_path / "stopped", 1, world_size=2)
    pool.run(run_job, config, tmp_path / "stopped", world_size=2)
    whole, stopped = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    shared = json.loads((tmp_path / "stopped" / "shared_vocabulary.json").read_text())
    assert len(shared["student_ids"]) == len(shared["teacher_ids"]) == 257


def test_what_no_unit_is_left_of_is_skipped_and_said(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """Never a loss of 0 that passes for agreement: the steps change nothing, and too many in a row end the run with the way out."""
    alignment = dataclasses.replace(SIMCT, gh_threshold=1.0001)
    config = _changed(_changed(_config(models, alignment), "rollout", replay=str(recorded)), "training", max_skipped_steps=2)
    with pytest.raises(Exception, match="no unit of any response was left to compare"):
        pool.run(run_job, config, tmp_path / "run", world_size=1)


@pytest.mark.parametrize(
    ("trouble", "silent", "well", "amiss", "way_out"),
    [
        (unlikely_ends, {}, {"teacher_eos_mass": 0.4}, {"teacher_eos_mass": 2e-5}, "2.0e-05"),
        (uncompared_ends, {}, {"ends_compared_share": 0.1}, {"ends_compared_share": 0.0}, "alignment.eos=bridge"),
        (little_aligned, None, _SHARES | {"aligned_share": 0.9}, _SHARES | {"aligned_share": 0.07}, "93%"),
    ],
)
def test_trouble_between_tokenizers_is_told_once_it_shows(trouble: Any, silent: Any, well: Any, amiss: Any, way_out: str) -> None:
    """Not in the first step, when no response may have ended yet: in the first step that can tell."""
    assert silent is None or trouble(silent) is None
    assert trouble(well) == ""
    assert way_out in trouble(amiss)


def test_a_record_is_replayed_with_the_prompts_of_this_runs_teacher(
    models: Path, recorded: Path, replayed: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    """What another run's teacher read was written in other ids: it is not taken over, and a prompt that this run does not ask is refused."""
    run = tmp_path / "record"
    shutil.copytree(recorded, run)
    for file in (run / "rollouts").iterdir():
        records = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**record, "teacher_prompt_ids": [5, 6, 7]}) + "\n" for record in records))
    config = _changed(_changed(_config(models, SIMCT), "rollout", replay=str(run)), "training", steps=1)
    pool.run(run_job, config, tmp_path / "run", world_size=1)
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(metrics_of(replayed["simct"])[0]["loss"], rel=1e-6)
    with pytest.raises(Exception, match="which this run does not ask then"):
        pool.run(run_job, dataclasses.replace(config, seed=99), tmp_path / "other", world_size=1)
