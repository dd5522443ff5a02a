"""A mixture of experts in every layout: routing, generation, training, and runs that resume with their experts elsewhere.

Not covered: grouped products on a GPU, and there the uneven collectives of expert tensor parallelism, which on the CPU are evened out.
Weights and logits in expert layouts are in test_conversion.py.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from safetensors.torch import load_file, save_file

from opd_megatron.config import DataConfig, EvaluationConfig, ParallelLayout, RolloutConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from opd_megatron.models.compare import megatron_logits, transformers_logits
from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import build_gpt, head_weight
from opd_megatron.models.weights import load_model, named_global_parameters, open_weights
from opd_megatron.parallel.groups import ModelGroups, student_groups, teacher_groups
from opd_megatron.rollout.engine import Sampler
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.training.optimizer import build_optimizer, clip_and_update, gradient_norm
from tests.pool import RankPool
from tests.runs import metrics_of, run_job
from tests.tiny import write_tiny_model

TOKENS_BS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


def _load(folder: Path, layout: ParallelLayout, *, as_teacher: bool = False) -> tuple[GPTModel, ModelGroups]:
    source = open_weights(hf=str(folder))
    groups = teacher_groups(layout) if as_teacher else student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=1)
    load_model(model, groups, source, vocab_multiple=1)
    return model, groups


def _tie_routers(folder: Path, ties: int) -> None:
    """Give each router only `ties` different rows, repeated: experts come in groups that every token likes equally."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensors[name] = tensor[:ties].repeat(tensor.size(0) // ties, 1)
    save_file(tensors, file, metadata={"format": "pt"})


def _logit_difference(folder: Path, layout: ParallelLayout) -> float:
    model, groups = _load(folder, layout)
    ours = megatron_logits(model, groups, TOKENS_BS, open_weights(hf=str(folder)).architecture.vocab_size)
    assert ours is not None
    theirs = torch.stack(transformers_logits(folder, list(TOKENS_BS), torch.float32))
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(expert=2)], ids=lambda layout: layout.describe())
@pytest.mark.parametrize("ties", [2, 8], ids=lambda ties: f"{ties} kinds of expert")
@pytest.mark.parametrize("normalized", [True, False], ids=["sum of one", "as they are"])
def test_tokens_visit_the_experts_that_transformers_chooses(pool: RankPool, tmp_path: Path, normalized: bool, ties: int, layout: ParallelLayout) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe", norm_topk_prob=normalized)
    _tie_routers(folder, ties)
    # fp32 sums in another order; one other expert for one token would change logits of scale 10 by more than 1e-2.
    assert max(pool.run(_logit_difference, folder, layout, world_size=layout.expert)) < 1e-4


def _train_once(folder: Path, layout: ParallelLayout, learning_rate: float) -> tuple[dict[str, float], dict[str, float], float]:
    """Return, of one step on the mean of all logits' squares, every parameter's gradient norm and change on this rank, and the global norm."""
    model, groups = _load(folder, layout)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model.last)
    optimizer, _ = build_optimizer([ddp], TrainingConfig(learning_rate=learning_rate, precision="fp32"), {})
    named = dict(named_global_parameters(model, open_weights(hf=str(folder)).architecture))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    ddp.zero_grad_buffer()
    tokens_BS = TOKENS_BS.chunk(groups.data_size)[groups.data_rank]
    positions_BS = torch.arange(tokens_BS.size(1)).expand_as(tokens_BS)
    ddp(tokens_BS, positions_BS, None).square().sum().backward()
    finalize_model_grads([ddp], torch.tensor(tokens_BS.numel(), dtype=torch.int))
    gradients = {name: float(parameter.main_grad.norm()) for name, parameter in named.items()}
    norm = gradient_norm(optimizer)
    clip_and_update(optimizer, norm)
    return gradients, {name: float((parameter - before[name]).abs().max()) for name, parameter in named.items()}, norm


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(expert=2)], ids=lambda layout: layout.describe())
def test_an_expert_without_tokens_has_no_gradient_and_stays_as_it_is(pool: RankPool, tmp_path: Path, layout: ParallelLayout) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe")
    # One kind of expert alone: every token visits the same two, here of different ranks or not.
    _tie_routers(folder, 1)
    gradients: dict[str, float] = {}
    changes: dict[str, float] = {}
    for own_gradients, own_changes, _ in pool.run(_train_once, folder, layout, 1e-3, world_size=layout.expert):
        gradients |= own_gradients
        changes |= own_changes
    for matrix in ("linear_fc1", "linear_fc2"):
        for layer in range(4):
            names = [f"decoder.layers.{layer}.mlp.experts.experts.{matrix}.weight[{expert}]" for expert in range(8)]
            assert sorted(gradients[name] > 0 for name in names) == [False] * 6 + [True] * 2
            assert [changes[name] > 0 for name in names] == [gradients[name] > 0 for name in names]


def test_gradients_do_not_depend_on_where_experts_are(pool: RankPool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe")
    reference, _, reference_norm = pool.run(_train_once, folder, ParallelLayout(), 1e-3, world_size=1)[0]
    for gradients, _, norm in pool.run(_train_once, folder, ParallelLayout(expert=2), 1e-3, world_size=2):
        # fp32 sums in another order.
        assert norm == pytest.approx(reference_norm, rel=1e-5)
        experts = [name for name in gradients if name.endswith("]")]
        assert len(experts) == 4 * 2 * 8 / 2
        for name in experts:
            assert gradients[name] == pytest.approx(reference[name], rel=1e-5), name


def _cached_and_recomputed(folder: Path, layout: ParallelLayout, as_teacher: bool) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Return ids and both log-probabilities of what this replica wrote; the second replica writes less than the first, and the third nothing."""
    model, groups = _load(folder, layout, as_teacher=as_teacher)
    prompts = [(5, 6, 7), (9,), (8, 7, 6, 5, 4), (1, 2)][: max(0, 4 - 2 * groups.data_rank)]
    sampler = Sampler(model, groups, vocab_size=262, eos_ids=(258,), batch_sequences=3)
    responses = sampler.generate(prompts, [(7, index) for index in range(len(prompts))], SamplingSettings(max_response_tokens=12))
    written = []
    with inference_mode(model, groups):
        for prompt, response in zip(prompts, responses, strict=True):
            tokens_S = torch.cat([torch.tensor(prompt), response.ids])
            hidden_BSH = forward_hidden(model, groups, tokens_S[None])
            if hidden_BSH is not None and layout.tensor == 1:
                logp_SV = (hidden_BSH[0] @ head_weight(model).t())[:, :262].log_softmax(-1)
                scored = logp_SV[len(prompt) - 1 : -1].gather(1, response.ids[:, None])[:, 0]
                written.append((response.ids.tolist(), response.logp, scored))
    return written


@pytest.fixture(scope="module")
def written_alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A mixture of experts, and what one rank writes with it."""
    folder = write_tiny_model(tmp_path_factory.mktemp("mixture") / "hf", "qwen3_moe", scale=0.3)
    return folder, [ids for ids, _, _ in pool.run(_cached_and_recomputed, folder, ParallelLayout(), False, world_size=1)[0]]


@pytest.mark.parametrize(
    ("layout", "world_size", "as_teacher"),
    [
        (ParallelLayout(), 1, False),
        (ParallelLayout(expert=2), 2, False),
        (ParallelLayout(expert=2), 2, True),
        (ParallelLayout(expert=2, pipeline=2), 4, False),
        (ParallelLayout(expert=2, expert_tensor=2), 4, True),
        (ParallelLayout(expert_tensor=2), 2, False),
        pytest.param(ParallelLayout(), 1, True, marks=pytest.mark.slow),
        pytest.param(ParallelLayout(expert=4), 4, False, marks=pytest.mark.slow),
        pytest.param(ParallelLayout(expert=4), 4, True, marks=pytest.mark.slow),
        pytest.param(ParallelLayout(expert=2, pipeline=2), 4, True, marks=pytest.mark.slow),
        pytest.param(ParallelLayout(expert=2, expert_tensor=2), 4, False, marks=pytest.mark.slow),
        pytest.param(ParallelLayout(expert_tensor=2), 2, True, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.describe() if isinstance(value, ParallelLayout) else None,
)
def test_cached_generation_is_that_of_the_whole_text_though_replicas_write_unevenly(
    pool: RankPool, written_alone: tuple[Path, list[list[int]]], layout: ParallelLayout, world_size: int, as_teacher: bool
) -> None:
    folder, reference = written_alone
    results = [written for written in pool.run(_cached_and_recomputed, folder, layout, as_teacher, world_size=world_size) if written]
    assert [len(written) for written in results] == [4, 2][: max(1, world_size // layout.pipeline)]
    for written in results:
        assert [ids for ids, _, _ in written] == reference[: len(written)]
        for _, logp, recomputed in written:
            # fp32: one position at a time against all at once.
            assert torch.allclose(logp, recomputed, atol=1e-5)


UNEVEN = [[3, 5], [4, 0], [0, 1], [0, 0], [2, 2]]


def _gathered_and_scattered_back() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, of uneven parts, what a rank gathers, and the gradient of its part where every rank weighs what it gathered its own way."""
    rank, results = dist.get_rank(), []
    for sizes in UNEVEN:
        part = _part(rank, sizes[rank]).requires_grad_()
        whole = gather_from_sequence_parallel_region(part, group=dist.group.WORLD, output_split_sizes=sizes)
        (whole * (rank + 1) * torch.arange(whole.size(0))[:, None]).sum().backward()
        results.append((whole.detach(), part.grad))
    return results


def _part(rank: int, size: int) -> torch.Tensor:
    return (torch.arange(size * 3).view(size, 3) + 100.0 * rank).contiguous()


def test_uneven_parts_are_gathered_and_their_gradients_scattered_back(pool: RankPool) -> None:
    by_rank = pool.run(_gathered_and_scattered_back, world_size=2)
    for index, sizes in enumerate(UNEVEN):
        whole = torch.cat([_part(rank, size) for rank, size in enumerate(sizes)])
        # Rank 0 weighs row i by i, rank 1 by 2 i.
        gradient = (3.0 * torch.arange(sum(sizes)))[:, None].expand(-1, 3).split(sizes)
        for rank, results in enumerate(by_rank):
            assert torch.equal(results[index][0], whole), (sizes, rank)
            assert torch.equal(results[index][1], gradient[rank]), (sizes, rank)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher with experts, a student without, and prompts of uneven length."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "dense", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=2)
    write_tiny_model(folder / "student", "qwen3_moe", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=2)
    write_tiny_model(folder / "teacher", "qwen3_moe", vocab_size=263, seed=2, scale=0.5, hidden_size=96, norm_topk_prob=False)
    rows = [{"prompt": "count " + "abc"[: 1 + i % 3] * (1 + i % 5), "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _config(models: Path, student: dict[str, Any], teacher: dict[str, Any], **rollout: Any) -> RunConfig:
    return RunConfig(
        student=StudentConfig(hf=str(models / "student"), layout=ParallelLayout(**student), vocab_multiple=4),
        teacher=TeacherConfig(hf=str(models / "teacher"), layout=ParallelLayout(**teacher), micro_batch=3),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=8, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=10, **rollout),
        training=TrainingConfig(steps=3, micro_batch=2, learning_rate=1e-3, precision="fp32"),
        evaluation=EvaluationConfig(prompts=0),
    )


@pytest.fixture(scope="module")
def recorded(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-process run whose rollouts the other layouts replay."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    pool.run(run_job, _config(models, {}, {}, record=True), run, world_size=1)
    return run


LAYOUTS = {
    "EP2": ({"expert": 2}, {}, 2),
    "TP2+SP, experts on both": ({"tensor": 2, "sequence": True}, {}, 2),
    "TP2+SP, EP2, teacher TP2": ({"tensor": 2, "sequence": True, "expert": 2}, {"tensor": 2}, 2),
    "EP2xPP2, teacher EP4": ({"expert": 2, "pipeline": 2}, {"expert": 4}, 4),
    "TP2+SP, EP4, teacher EP2xPP2": ({"tensor": 2, "sequence": True, "expert": 4}, {"expert": 2, "pipeline": 2}, 4),
    "CP2, EP2, teacher EP2xTP2": ({"context": 2, "expert": 2}, {"expert": 2, "tensor": 2}, 2),
    "ETP2": ({"expert_tensor": 2}, {}, 2),
    "TP2+SP, ETP2, teacher ETP2": ({"tensor": 2, "sequence": True, "expert_tensor": 2}, {"expert_tensor": 2}, 4),
    "EP2xETP2, teacher TP2xETP2": ({"expert": 2, "expert_tensor": 2}, {"tensor": 2, "expert_tensor": 2}, 4),
    "TP2+SP, EP2xETP2, teacher EP2xETP2xTP2": (
        {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
        {"expert": 2, "expert_tensor": 2, "tensor": 2},
        4,
    ),
    "PP2, ETP2, teacher PP2xETP2": ({"pipeline": 2, "expert_tensor": 2}, {"pipeline": 2, "expert_tensor": 2}, 4),
    "CP2, ETP4, teacher CP2xETP2": ({"context": 2, "expert_tensor": 4}, {"context": 2, "expert_tensor": 2}, 4),
}


# Larger, or the same axes together with others.
SLOW = ["TP2+SP, EP4, teacher EP2xPP2", "ETP2", "TP2+SP, EP2xETP2, teacher EP2xETP2xTP2", "CP2, ETP4, teacher CP2xETP2"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS])
def test_every_layout_trains_alike(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, teacher, world_size = LAYOUTS[name]
    pool.run(run_job, _config(models, student, teacher, replay=str(recorded)), tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        # fp32 sums in another order; 1e-5 is what the project promises.
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


@pytest.fixture(scope="module")
def deeper(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student with a layer for each of 4 chunks, and one process's run of it."""
    folder = tmp_path_factory.mktemp("deeper")
    write_tiny_model(folder / "student", "qwen3_moe", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=4)
    pool.run(run_job, _of(folder / "student", _config(models, {}, {}, record=True)), folder / "run", world_size=1)
    return folder / "student", folder / "run"


def _of(student: Path, config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, student=dataclasses.replace(config.student, hf=str(student)))


def test_chunks_of_a_pipeline_train_experts_alike(models: Path, deeper: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    student, recorded = deeper
    config = _config(models, {"expert": 2, "pipeline": 2, "virtual": 2}, {"expert": 4}, replay=str(recorded))
    pool.run(run_job, _of(student, config), tmp_path / "run", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        # As above.
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


@pytest.mark.parametrize(
    "layout",
    [pytest.param({"expert": 2}, marks=pytest.mark.slow), {"tensor": 2, "sequence": True, "expert": 2}],
    ids=lambda layout: ParallelLayout(**layout).describe(),
)
def test_packs_train_experts_alike(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    """Against rows of one process that are padded."""
    config = _config(models, layout, {"expert": 2}, replay=str(recorded))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch=1, micro_batch_tokens=96))
    pool.run(run_job, config, tmp_path / "run", world_size=2)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


@pytest.fixture(scope="module")
def one_step(models: Path, recorded: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one_step") / "run"
    pool.run(run_job, _after_one_step(_config(models, {}, {}, replay=str(recorded))), run, world_size=1)
    return run


def _after_one_step(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))


# Each of those whose losses are not compared in `make test`, and one in stages.
QUICK_STEPS = ["ETP2", "TP2+SP, EP2xETP2, teacher EP2xETP2xTP2", "PP2, ETP2, teacher PP2xETP2"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK_STEPS else [pytest.mark.slow]) for name in LAYOUTS if "ETP" in name])
def test_split_experts_take_the_step_of_one_process(models: Path, recorded: Path, one_step: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    """Through a checkpoint, which the exported weights come from. The losses of more steps are compared above."""
    student, teacher, world_size = LAYOUTS[name]
    pool.run(run_job, _after_one_step(_config(models, student, teacher, replay=str(recorded))), tmp_path / "run", world_size=world_size)
    ours, exact, before = (
        load_file(file) for file in (tmp_path / "run/hf/model.safetensors", one_step / "hf/model.safetensors", models / "student/model.safetensors")
    )
    experts = [name for name in exact if ".experts." in name]
    for names in (list(exact), experts):
        difference = torch.stack([(ours[name] - exact[name]).norm() for name in names]).norm()
        # fp32 sums in another order; Adam moves a weight by 1e-3, and by a part of that where rounding decides about a gradient near 0.
        assert difference < 1e-5 * torch.stack([exact[name].norm() for name in names]).norm()
    assert any(not torch.equal(exact[name], before[name]) for name in experts)


def test_a_dense_student_learns_from_experts_wherever_they_are(models: Path, pool: RankPool, tmp_path: Path) -> None:
    for name, teacher, world_size in (("one", {}, 1), ("spread", {"expert": 2}, 2)):
        config = _config(models, {}, teacher)
        config = dataclasses.replace(config, student=dataclasses.replace(config.student, hf=str(models / "dense")))
        pool.run(run_job, config, tmp_path / name, world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "spread"), metrics_of(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def test_a_teacher_on_ranks_of_its_own_spreads_its_experts_there(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, {"expert": 2}, {"expert": 2}, replay=str(recorded))
    assert config.teacher is not None
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, placement="dedicated", num_ranks=2))
    pool.run(run_job, config, tmp_path / "run", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def test_experts_that_wait_on_the_host_change_nothing(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """Bit for bit: values only travel."""
    resident = _config(models, {"expert": 2}, {"expert": 2}, replay=str(recorded))
    assert resident.teacher is not None
    offloaded = dataclasses.replace(
        resident,
        teacher=dataclasses.replace(resident.teacher, placement="offloaded"),
        training=dataclasses.replace(resident.training, offload_optimizer=True),
    )
    for name, config in (("resident", resident), ("offloaded", offloaded)):
        pool.run(run_job, config, tmp_path / name, world_size=2)
    here, there = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("resident", "offloaded"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_bf16_trains_experts_with_fp32_masters(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _config(models, *LAYOUTS["EP2xPP2, teacher EP4"][:2], replay=str(recorded))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16"))
    pool.run(run_job, config, tmp_path / "run", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        # 8 bits of every hidden value, and now and then another expert for a token.
        assert ours["loss"] == pytest.approx(reference["loss"], rel=5e-2), ours["step"]
        assert ours["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EP2", "EP2xPP2, teacher EP4", "TP2+SP, EP2xETP2, teacher EP2xETP2xTP2", "ETP2"])
def test_every_layout_writes_the_same_first_rollouts(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, teacher, world_size = LAYOUTS[name]
    config = _config(models, student, teacher, record=True)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    ours, theirs = ([json.loads(line) for line in (run / "rollouts" / "step_1.jsonl").read_text().splitlines()] for run in (tmp_path / "run", recorded))
    assert [sample["response_ids"] for sample in ours] == [sample["response_ids"] for sample in theirs]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("EP2xPP2, teacher EP4", "EP2", marks=pytest.mark.slow),
        pytest.param("TP2+SP, experts on both", "EP2xPP2, teacher EP4", marks=pytest.mark.slow),
        pytest.param("TP2+SP, EP2xETP2, teacher EP2xETP2xTP2", "EP2", marks=pytest.mark.slow),
        ("EP2", "PP2, ETP2, teacher PP2xETP2"),
    ],
)
def test_a_run_resumes_with_its_experts_elsewhere(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, before: str, after: str) -> None:
    for name, steps in ((before, 2), (after, 3)):
        student, teacher, world_size = LAYOUTS[name]
        config = _config(models, student, teacher, replay=str(recorded))
        config = dataclasses.replace(config, world_size=world_size, training=dataclasses.replace(config.training, steps=steps))
        pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        # The third step's gradient shows weights, its update and norm Adam's moments: as in one run, to fp32 sums in another order.
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])
    exported, whole = (load_file(run / "hf" / "model.safetensors") for run in (tmp_path / "run", recorded))
    # Adam moves a weight by up to 1e-3 a step; where a gradient is near 0, rounding decides about a part of that.
    assert all(torch.allclose(exported[name], whole[name], atol=1e-4) for name in whole)


def _models_left(config: RunConfig, run: Path) -> int:
    """Return how many more models there are after a run than before it."""
    before = _num_models()
    run_job(config, run)
    return _num_models() - before


def _num_models() -> int:
    gc.collect()
    return sum(isinstance(found, GPTModel) for found in gc.get_objects())


@pytest.mark.parametrize("axis", ["expert", "expert_tensor"])
def test_a_finished_run_leaves_no_model_behind(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, axis: str) -> None:
    """Nor its process groups, each with threads and sockets."""
    assert pool.run(_models_left, _config(models, {axis: 2}, {}, replay=str(recorded)), tmp_path / "run", world_size=2) == [0, 0]
