"""Soft-capped logits with the vocabulary split over 2 ranks, and in whole models that write, score and train, against naive fp64 autograd.

Not covered here: the kinds' options (tests/unit/test_losses_softcap.py), which do not depend on the split, and NCCL.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from opd_megatron.align.uld import uld_divergence
from opd_megatron.config import LossConfig, ParallelLayout, RolloutConfig, RunConfig
from opd_megatron.losses import fused_head_cross_entropy, fused_head_divergence, token_statistics
from tests.distributed.test_losses_tp import NUM_TOKENS, count_collectives, shard_slice, split_group, whole_problem
from tests.distributed.test_simct_tp import errors_of
from tests.pool import RankPool
from tests.reference_losses import TOLERANCE, naive_divergence, relative_error_or_zero, soft_capped, with_ids
from tests.reference_simct import OPTIONS, case_for, naive_uld, one_token_each, random_case
from tests.runs import small_config
from tests.unit.test_losses_softcap import CAPS, CASES, as_options

VOCAB = 55
# Of the tiny student and teacher.
MODEL_CAPS = (0.3, 0.5)


def fused_errors(tp_size, dtype):
    """Return the errors of each kind's divergence, hidden gradient summed over the group, and head gradient, for each of CAPS."""
    group = split_group(tp_size)
    columns, results = shard_slice(group), []
    for caps in CAPS:
        for case in [*CASES, {"kind": "cross entropy"}]:
            models, weight_T = whole_problem(dtype)
            leaves = [tensor.double().requires_grad_() for tensor in models[:2]]
            products = (leaves[0] @ leaves[1][:VOCAB].T, models[2].double() @ models[3][:VOCAB].double().T)
            logits = [soft_capped(product, softcap) for product, softcap in zip(products, caps)]
            hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
            shared = {"tp_group": group, "token_weight_T": weight_T, "vocab_size": VOCAB, "chunk_tokens": 8}
            if case["kind"] == "cross entropy":
                ids_T = torch.arange(NUM_TOKENS) * 5 % VOCAB
                expected_T = F.cross_entropy(logits[0], ids_T, reduction="none")
                result = fused_head_cross_entropy(hidden, head, ids_T, student_softcap=caps[0], **shared)
            else:
                options = with_ids(case, NUM_TOKENS, VOCAB) | {"temperature": 1.7}
                expected_T = naive_divergence(*logits, **options)
                result = fused_head_divergence(hidden, head, models[2], models[3][columns], **shared, **options, **as_options(caps))
            expected_hidden, expected_head = torch.autograd.grad((expected_T * weight_T).sum(), leaves)
            grad_hidden, grad_head = torch.autograd.grad(result.loss_sum, (hidden, head))
            dist.all_reduce(grad_hidden, group=group)
            # Relative to the whole gradient: a rank may hold no picked id, and then only rounding remains on it.
            head_error = (grad_head.double() - expected_head[columns]).norm() / expected_head.norm()
            errors = [relative_error_or_zero(*pair) for pair in ((result.divergence_T, expected_T.detach()), (grad_hidden, expected_hidden))]
            results.append((caps, case, *errors, head_error.item()))
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_split(pool: RankPool, tp_size: int, dtype: torch.dtype) -> None:
    for rank_results in pool.run(fused_errors, tp_size, dtype, world_size=tp_size):
        for *case, value_error, hidden_error, head_error in rank_results:
            assert value_error < TOLERANCE[torch.float32], case
            assert max(hidden_error, head_error) < TOLERANCE[dtype], case


def unit_errors(tp_size):
    """Return the errors of SimCT with each of its options, and of ULD, under both caps."""
    group, found, caps = split_group(tp_size), [], CAPS[-1]
    for options in OPTIONS:
        case = case_for(options, 0, num_units=7, dtype=torch.float32, student_vocab=29)
        found.append((options, errors_of(case, group, options | {"softcaps": caps}, **options, softcaps=caps)))
    case = one_token_each(random_case(0, num_units=7, dtype=torch.float32, student_vocab=29))
    naive = {"softcaps": caps, "loss": naive_uld, "top_k": 6}
    return [*found, ("uld", errors_of(case, group, naive, divergence=uld_divergence, top_k=6, softcaps=caps))]


def test_units_do_not_depend_on_the_split(pool: RankPool) -> None:
    for rank_results in pool.run(unit_errors, 2, world_size=2):
        for case, error in rank_results:
            assert error < 1e-5, case


def collectives():
    """Return the collectives of each kind's forward without caps and with both, and those of all backwards."""
    group = split_group(2)
    models, _ = whole_problem()
    columns = shard_slice(group)
    hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
    teacher = models[2], models[3][columns]
    shared, ids_T = {"tp_group": group, "vocab_size": VOCAB, "chunk_tokens": 8}, torch.arange(NUM_TOKENS)
    losses = []

    def forwards(caps):
        """Yield what issues the collectives of each forward."""
        yield lambda: token_statistics(hidden, head, *teacher, **shared, **as_options(caps))
        yield lambda: losses.append(fused_head_cross_entropy(hidden, head, ids_T, student_softcap=caps[0], **shared).loss_sum)
        for case in CASES:
            options = with_ids(case, NUM_TOKENS, VOCAB) | shared | as_options(caps)
            yield lambda options=options: losses.append(fused_head_divergence(hidden, head, *teacher, **options).loss_sum)

    plain, capped = ([count_collectives(forward) for forward in forwards(caps)] for caps in ((None, None), CAPS[-1]))
    return plain, capped, count_collectives(lambda: [loss.backward() for loss in losses])


def test_a_cap_sends_nothing(pool: RankPool) -> None:
    for plain, capped, backwards in pool.run(collectives, world_size=2):
        assert plain == capped
        assert all(plain)
        assert backwards == 0


def capped_step(config: RunConfig, run_dir: Path) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Let two models that cap their logits write and score one step; return what was measured, a divergence a token, and on one rank its naive value."""
    from opd_megatron.parallel.world import worlds
    from opd_megatron.training.setup import build_parts, open_sources

    sources = open_sources(config)
    assert sources.teacher is not None
    for source, softcap in zip((sources.student, sources.teacher), MODEL_CAPS):
        source.architecture = dataclasses.replace(source.architecture, logit_softcap=softcap)
    with worlds(0) as bridge:
        # Among what this does is the self-test: the student's own weights as a teacher.
        parts = build_parts(config, sources, run_dir, bridge, torch.device("cpu"), lambda _line: None)
        student, teacher = parts.student, parts.teacher
        assert teacher is not None
        rollouts = parts.write(1, sources.prompts.prompts[: config.data.batch_prompts], 0)
        rows = teacher.score(rollouts)
        sums = student.measure(student.micro_batches(rollouts, rows), parts.objective)
        reverse_kl_T = student.statistics(student.micro_batches(rollouts, rows), parts.objective, 1.0).reverse_kl_T
        alone = dist.get_world_size() == 1
        naive_T = torch.cat([_naive_of_sample(sample, student, teacher) for sample in rollouts.samples]) if alone else None
    return sums, reverse_kl_T, naive_T


def _naive_of_sample(sample: Any, student: Any, teacher: Any) -> torch.Tensor:
    """Return KL(student||teacher) at temperature 1 of each response token, from logits that this function caps."""
    from opd_megatron.models.compare import megatron_logits

    tokens_BS, logits = torch.cat([sample.prompt_ids, sample.response_ids])[None], []
    for (model, groups), softcap in zip(((student.model, student.groups), (teacher.scorer.model, teacher.scorer.groups)), MODEL_CAPS):
        ours_BSV = megatron_logits(model, groups, tokens_BS, 263)
        model.logit_softcap = None
        raw_BSV = megatron_logits(model, groups, tokens_BS, 263)
        model.logit_softcap = softcap
        assert ours_BSV is not None
        assert raw_BSV is not None
        capped_SV = soft_capped(raw_BSV.double(), softcap)[0, len(sample.prompt_ids) - 1 : -1]
        # The logits that are compared with those of transformers.
        assert relative_error_or_zero(ours_BSV[0, len(sample.prompt_ids) - 1 : -1], capped_SV) < TOLERANCE[torch.float32]
        assert raw_BSV.abs().max() > 1.5 * softcap, "choose a lower cap"
        logits.append(capped_SV)
    return naive_divergence(*logits, kind="reverse_kl")


def test_models_that_cap_write_score_and_train_by_capped_logits(pool: RankPool, models: Path, tmp_path: Path) -> None:
    """The objective recomputes the log-probabilities that the sampler saw, and finds them; at another temperature than 1, on one rank and on two."""
    config = small_config(models)
    config = dataclasses.replace(config, rollout=RolloutConfig(max_response_tokens=10, temperature=0.8), loss=LossConfig(kind="reverse_kl", temperature=0.8))
    ((alone, reverse_kl_T, naive_T),) = pool.run(capped_step, config, tmp_path / "one", world_size=1)
    assert relative_error_or_zero(reverse_kl_T, naive_T) < TOLERANCE[torch.float32]
    split = dataclasses.replace(config, student=dataclasses.replace(config.student, layout=ParallelLayout(tensor=2)))
    for sums, split_T, _ in [(alone, reverse_kl_T, None), *pool.run(capped_step, split, tmp_path / "two", world_size=2)]:
        # fp32 rounding between layouts, and between one token at a time and all at once.
        assert sums.drift_max < 1e-5
        assert sums.divergence == pytest.approx(alone.divergence, rel=1e-5)
        assert relative_error_or_zero(split_T, reverse_kl_T) < TOLERANCE[torch.float32]
