"""What Gemma 2, Phi-4-mini and Mistral have beyond Llama: training in every layout, generation, and that each part is in the logits at all.

Conversion and logits of all families are in test_conversion.py. Not covered: published weights (none can be downloaded where tests run).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import DataConfig, EvaluationConfig, ParallelLayout, RolloutConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from opd_megatron.models.compare import megatron_logits
from opd_megatron.models.gpt import build_gpt
from opd_megatron.models.weights import load_model, open_weights
from opd_megatron.parallel.groups import student_groups
from opd_megatron.rollout.engine import Sampler
from opd_megatron.rollout.sampling import SamplingSettings
from tests.pool import RankPool
from tests.runs import run_job
from tests.tiny import write_tiny_model

# Student and teacher of a job.
PAIRS = [("gemma2", "phi3"), ("phi3", "gemma2"), ("mistral", "mistral")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("gemma2", "phi3", "mistral"):
        write_tiny_model(folder / f"student {family}", family, tied=True, vocab_size=263, seed=1, scale=0.3)
        write_tiny_model(folder / f"teacher {family}", family, vocab_size=263, seed=2, scale=0.5)
    # Longer than the windows of 12 positions.
    rows = [{"prompt": "count " + "abc"[: 1 + i % 3] * (4 + i % 5), "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _config(models: Path, pair: tuple[str, str], student: dict[str, Any], teacher: dict[str, Any], training: dict[str, Any], **rollout: Any) -> RunConfig:
    return RunConfig(
        student=StudentConfig(hf=str(models / f"student {pair[0]}"), layout=ParallelLayout(**student), vocab_multiple=4),
        teacher=TeacherConfig(hf=str(models / f"teacher {pair[1]}"), layout=ParallelLayout(**teacher), micro_batch=3, self_test=pair[0] == pair[1]),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=8, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=10, **rollout),
        training=TrainingConfig(steps=1, learning_rate=1e-3, precision="fp32", **(training or {"micro_batch": 2})),
        evaluation=EvaluationConfig(prompts=0),
    )


@pytest.fixture(scope="module")
def references(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for pair in PAIRS:
        pool.run(run_job, _config(models, pair, {}, {}, {}, record=True), folder / " ".join(pair), world_size=1)
    return folder


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, {}),
    "PP2xVPP2, teacher TP2": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, {}),
    "CP2, teacher CP2": ({"context": 2}, {"context": 2}, {}),
    "packed, recomputed": ({}, {}, {"micro_batch_tokens": 160, "recompute": "full"}),
}
# The others are slow.
QUICK = {("gemma2", "TP2xPP2+SP, teacher PP2"), ("gemma2", "CP2, teacher CP2"), ("gemma2", "packed, recomputed"), ("phi3", "TP2xPP2+SP, teacher PP2")}


@pytest.mark.parametrize(
    ("pair", "name"),
    [pytest.param(pair, name, marks=[] if (pair[0], name) in QUICK else [pytest.mark.slow]) for pair in PAIRS for name in LAYOUTS],
    ids=lambda x: x if isinstance(x, str) else " from ".join(x),
)
def test_every_layout_takes_the_step_of_one_process(models: Path, references: Path, pool: RankPool, tmp_path: Path, pair: tuple[str, str], name: str) -> None:
    student, teacher, training = LAYOUTS[name]
    reference = references / " ".join(pair)
    config = _config(models, pair, student, teacher, training, replay=str(reference))
    pool.run(run_job, config, tmp_path / "run", world_size=max(ParallelLayout(**layout).model_size for layout in (student, teacher)))
    metrics, expected = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (tmp_path / "run", reference))
    # fp32 sums in another order.
    for key in ("loss", "divergence", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
    weights, exact = (load_file(folder / "hf" / "model.safetensors") for folder in (tmp_path / "run", reference))
    difference = torch.stack([(weights[name] - exact[name]).norm() for name in exact]).norm() / torch.stack([tensor.norm() for tensor in exact.values()]).norm()
    assert difference < 1e-5


def _logits_without(folder: Path, changes: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    source = open_weights(hf=str(folder))
    source.architecture = replace(source.architecture, **changes)
    groups = student_groups(ParallelLayout(), seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=1)
    load_model(model, groups, source, vocab_multiple=1)
    logits = megatron_logits(model, groups, tokens[None], source.architecture.vocab_size)
    assert logits is not None
    return logits[0]


PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"windows": ()}),
    "window of some layers": ("gemma2", {"windows": (12, 12, 12, 12)}),
    "cap of scores": ("gemma2", {"attention_softcap": None}),
    "cap of logits": ("gemma2", {"logit_softcap": None}),
    "scale of scores": ("gemma2", {"attention_scale": None}),
    "scale of embeddings": ("gemma2", {"scaled_embeddings": False}),
    "1 + weight": ("gemma2", {"zero_centered_norms": False}),
    "activation": ("gemma2", {"activation": "silu"}),
    "unrotated part": ("phi3", {"rope": {"fraction": 1.0, "short_factors": (1.0,) * 8}}),
    "length of rotated part": ("phi3", {"rope": {"attention_factor": 1.0}}),
    "factors of frequencies": ("phi3", {"rope": {"short_factors": (1.0,) * 6}}),
}


@pytest.mark.parametrize("name", PARTS)
def test_no_part_could_be_left_out_unseen(models: Path, pool: RankPool, name: str) -> None:
    """The comparison with transformers bites: without any one part logits are further off than its tolerance by a factor of ten and more."""
    family, changes = PARTS[name]
    folder = models / f"teacher {family}"
    if "rope" in changes:
        changes = {"rope": replace(open_weights(hf=str(folder)).architecture.rope, **changes["rope"])}
    tokens = torch.arange(3, 60)
    whole, partial = (pool.run(_logits_without, folder, without, tokens, world_size=1)[0] for without in ({}, changes))
    assert float((whole - partial).abs().max()) > 1e-3


def _greedy(folder: Path, layout: ParallelLayout, prompts: list[list[int]]) -> list[list[int]]:
    source = open_weights(hf=str(folder))
    groups = student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=16)
    load_model(model, groups, source, vocab_multiple=16)
    sampler = Sampler(model, groups, vocab_size=source.architecture.vocab_size, eos_ids=(258,), batch_sequences=4)
    settings = SamplingSettings(max_response_tokens=16, temperature=0.0)
    return [response.ids.tolist() for response in sampler.generate([tuple(prompt) for prompt in prompts], [(0, i) for i in range(len(prompts))], settings)]


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2, pipeline=2)], ids=lambda layout: layout.describe())
@pytest.mark.parametrize("family", ["gemma2", "phi3", "mistral"])
def test_greedy_tokens_are_those_of_transformers(models: Path, pool: RankPool, family: str, layout: ParallelLayout) -> None:
    """Prompts of 5 to 20 tokens and 16 of response: caches grow past the windows of 12."""
    from transformers import AutoModelForCausalLM

    folder = models / f"teacher {family}"
    prompts = [torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 9, 20, 20)]
    ours = pool.run(_greedy, folder, layout, prompts, world_size=layout.model_size)[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=258, pad_token_id=256)
        theirs.append(output[0, len(prompt) :].tolist())
    equal = sum(a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=False))
    # After a near-tie of random weights two continuations differ.
    assert equal >= 0.75 * sum(map(len, theirs))
