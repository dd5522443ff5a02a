"""The dynamic engine writes what the static one writes: Megatron-Core's own paged context and layers, with plain attention over the pages.

Not covered: flash-attention's kernels, the Triton kernel that appends to the pages, and the recording of CUDA graphs; their padded sizes are.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from opd_megatron.config import ParallelLayout
from opd_megatron.models.gpt import ModelChunks, build_gpt
from opd_megatron.models.weights import load_model, open_weights
from opd_megatron.parallel.groups import ModelGroups, student_groups
from opd_megatron.parallel.layout import replica_share
from opd_megatron.rollout.dynamic import DynamicSampler
from opd_megatron.rollout.engine import Response, Sampler
from opd_megatron.rollout.rollouts import WriterPrompt, sample_rollouts
from opd_megatron.rollout.sampling import SamplingSettings
from tests.paged_attention import needs_paged_caches, paged_attention_on_cpu
from tests.pool import RankPool
from tests.tiny import write_tiny_model

pytestmark = needs_paged_caches

EOS = tuple(range(3, 263, 8))
BLOCK = 4
SETTINGS = SamplingSettings(max_response_tokens=11, temperature=1.3, top_k=50, top_p=0.97)
# Of every length around one and two blocks, long and short in turn; no even number, so replicas have different shares.
PROMPTS = [tuple((3 * length + place) % 250 for place in range(length)) for length in (9, 1, 4, 3, 12, 5, 8, 7, 2, 13, 16, 6, 10)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        "dense": write_tiny_model(folder / "dense", "qwen3", vocab_size=263, scale=0.4),
        "tied": write_tiny_model(folder / "tied", "qwen2", tied=True, vocab_size=263, scale=0.4),
        "mixture": write_tiny_model(folder / "mixture", "qwen3_moe", vocab_size=263, scale=0.3),
    }


def _load(folder: Path, layout: ParallelLayout) -> tuple[ModelChunks, ModelGroups]:
    source = open_weights(hf=str(folder))
    groups = student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=4)
    load_model(model, groups, source, vocab_multiple=4)
    return model, groups


def _both(
    folder: Path,
    layout: ParallelLayout,
    prompts: list[tuple[int, ...]],
    *,
    slots: int = 64,
    kv_cache_gib: float | None = None,
    graphed: bool = False,
    settings: SamplingSettings = SETTINGS,
    whole_first_share: bool = False,
) -> tuple[list[Response], list[Response]]:
    """Return what the static and the dynamic engine of this rank's replica write of its share."""
    model, groups = _load(folder, layout)
    mine = list(replica_share(len(prompts), groups.writer, groups.num_writers))
    if whole_first_share:
        mine = list(range(len(prompts))) if groups.writer == 0 else []
    shared = {"vocab_size": 263, "eos_ids": EOS, "batch_sequences": slots}
    static = Sampler(model, groups, **shared)
    dynamic = DynamicSampler(model, groups, **shared, kv_cache_gib=kv_cache_gib, cuda_graphs=graphed, block_tokens=BLOCK)
    given = [prompts[index] for index in mine], [(5, index) for index in mine], settings
    with paged_attention_on_cpu():
        # Twice: nothing of the first generation is left in the second.
        dynamic.generate(*given)
        return static.generate(*given), dynamic.generate(*given)


def _assert_equal(outcomes: list[tuple[list[Response], list[Response]]]) -> list[Response]:
    for static, dynamic in outcomes:
        assert [one.ids.tolist() for one in static] == [one.ids.tolist() for one in dynamic]
        assert [one.finished for one in static] == [one.finished for one in dynamic]
        for one, other in zip(static, dynamic, strict=True):
            # fp32 sums in another order.
            assert torch.allclose(one.logp, other.logp, rtol=0, atol=2e-5)
            assert one.ids.dtype == other.ids.dtype
            assert one.logp.dtype == other.logp.dtype
    return [response for _, dynamic in outcomes for response in dynamic]


LAYOUTS = {
    "one rank": ({}, 1),
    "TP2": ({"tensor": 2}, 2),
    "TP2+SP": ({"tensor": 2, "sequence": True}, 2),
    "PP2": ({"pipeline": 2}, 2),
    "TP2xPP2": ({"tensor": 2, "pipeline": 2}, 4),
    "DP4": ({}, 4),
    "PP2xDP2": ({"pipeline": 2}, 4),
    "CP2": ({"context": 2}, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_what_the_static_engine_writes(folders: dict[str, Path], pool: RankPool, name: str) -> None:
    layout, world_size = LAYOUTS[name]
    # Five slots: sequences wait, and enter when others have ended.
    written = _assert_equal(pool.run(_slotted, folders["dense"], ParallelLayout(**layout), PROMPTS, 5, world_size=world_size))
    lengths = {len(response.ids) for response in written}
    assert max(lengths) == SETTINGS.max_response_tokens
    assert len(lengths) > 3, "they end at different times"


def _slotted(folder: Path, layout: ParallelLayout, prompts: list[tuple[int, ...]], slots: int) -> tuple[list[Response], list[Response]]:
    return _both(folder, layout, prompts, slots=slots)


def test_a_tied_model_writes_the_same(folders: dict[str, Path], pool: RankPool) -> None:
    _assert_equal(pool.run(_slotted, folders["tied"], ParallelLayout(pipeline=2), PROMPTS, 4, world_size=2))


def _first_alone(folder: Path, layout: ParallelLayout) -> tuple[list[Response], list[Response]]:
    return _both(folder, layout, PROMPTS[:5], slots=2, whole_first_share=True)


@pytest.mark.parametrize(
    "layout", [{"expert": 2}, {"expert": 2, "pipeline": 2}, pytest.param({"expert": 2, "expert_tensor": 2}, marks=pytest.mark.slow)], ids=str
)
def test_replicas_that_have_nothing_to_write_lend_their_experts(folders: dict[str, Path], pool: RankPool, layout: dict[str, int]) -> None:
    outcomes = pool.run(_first_alone, folders["mixture"], ParallelLayout(**layout), world_size=4)
    written = _assert_equal(outcomes)
    assert [] in [dynamic for _, dynamic in outcomes]
    assert written


def _one_length(folder: Path, prompt_tokens: int, response_tokens: int, num: int) -> tuple[list[Response], list[Response]]:
    prompts = [tuple(range(start, start + prompt_tokens)) for start in range(num)]
    settings = SamplingSettings(max_response_tokens=response_tokens, temperature=1.0)
    return _both(folder, ParallelLayout(), prompts, settings=settings, slots=3)


# With the last token, which is never cached, texts end before, at and after the end of a block; one response is one token.
@pytest.mark.parametrize("prompt_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
@pytest.mark.parametrize("response_tokens", [1, 2, BLOCK, BLOCK + 1])
def test_text_at_the_ends_of_blocks(folders: dict[str, Path], pool: RankPool, prompt_tokens: int, response_tokens: int) -> None:
    _assert_equal(pool.run(_one_length, folders["dense"], prompt_tokens, response_tokens, 4, world_size=1))


def _block_bytes() -> int:
    """Of the dense model on one rank: keys and values, fp32, 4 layers, 2 heads of 24."""
    return 2 * 4 * 4 * BLOCK * 2 * 24


def _budgeted(folder: Path, num_blocks: int) -> tuple[list[Response], list[Response]]:
    return _both(folder, ParallelLayout(), PROMPTS, kv_cache_gib=num_blocks * _block_bytes() / 2**30)


@pytest.mark.parametrize("num_blocks", [8, 9, 14, 100])
def test_sequences_wait_for_blocks(folders: dict[str, Path], pool: RankPool, num_blocks: int) -> None:
    # The longest prompt of 16 and its response need 7 blocks, and one is spare.
    _assert_equal(pool.run(_budgeted, folders["dense"], num_blocks, world_size=1))


def test_a_prompt_that_never_fits_is_refused_with_the_numbers(folders: dict[str, Path], pool: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"holds 6 blocks of 4 tokens, .* a prompt of 16 tokens with a response of 11 needs 7; set it to 4\.58e-05"):
        pool.run(_budgeted, folders["dense"], 7, world_size=1)


def _graphed(folder: Path, layout: ParallelLayout, slots: int) -> tuple[list[Response], list[Response]]:
    return _both(folder, layout, PROMPTS * 2, slots=slots, graphed=True)


@pytest.mark.parametrize("slots", [9, 24, *(pytest.param(slots, marks=pytest.mark.slow) for slots in (1, 3, 17))])
def test_steps_padded_to_the_sizes_of_graphs_write_the_same(folders: dict[str, Path], pool: RankPool, slots: int) -> None:
    _assert_equal(pool.run(_graphed, folders["dense"], ParallelLayout(tensor=2), slots, world_size=2))


def _what_is_left(folder: Path) -> tuple[bool, int]:
    """Return whether the pages of a generation are gone, without a collection of circles, and their bytes."""
    from opd_megatron.rollout import dynamic as module

    model, groups = _load(folder, ParallelLayout())
    sampler = DynamicSampler(model, groups, vocab_size=263, eos_ids=EOS, batch_sequences=4, block_tokens=BLOCK)
    pages, num_bytes = [], []
    make = sampler._make_cache

    def seen(*arguments: object) -> module.PagedCache:
        cache = make(*arguments)  # type: ignore[arg-type]
        pages.append(weakref.ref(cache.context.memory_buffer))
        num_bytes.append(cache.context.memory_buffer.nbytes)
        return cache

    sampler._make_cache = seen  # type: ignore[method-assign]
    gc.disable()
    try:
        with paged_attention_on_cpu():
            sampler.generate(PROMPTS, [(index,) for index in range(len(PROMPTS))], SETTINGS)
        return pages[0]() is None, num_bytes[0]
    finally:
        gc.enable()


def test_the_pages_are_as_many_as_planned_and_gone_after_a_generation(folders: dict[str, Path], pool: RankPool) -> None:
    # Four sequences of 16 + 11 tokens, of which the last is not cached: 7 blocks each, and a spare one.
    assert pool.run(_what_is_left, folders["dense"], world_size=1) == [(True, (4 * 7 + 1) * _block_bytes())]


def _rollouts(folder: Path, layout: ParallelLayout, kind: type) -> list[list[int]]:
    model, groups = _load(folder, layout)
    shared = {"vocab_size": 263, "eos_ids": EOS, "batch_sequences": 3}
    sampler = DynamicSampler(model, groups, **shared, block_tokens=BLOCK) if kind is DynamicSampler else Sampler(model, groups, **shared)
    prompts = [WriterPrompt(index, ids) for index, ids in enumerate(PROMPTS[:5])]
    with paged_attention_on_cpu():
        rollouts = sample_rollouts(sampler, groups, prompts, SETTINGS, samples_per_prompt=3, key=(1, 2), policy_version=0)
    return [sample.response_ids.tolist() for sample in rollouts.samples]


def test_all_ranks_hold_the_samples_of_every_replica(folders: dict[str, Path], pool: RankPool) -> None:
    reference = pool.run(_rollouts, folders["dense"], ParallelLayout(), Sampler, world_size=1)[0]
    assert len(reference) == 15
    assert pool.run(_rollouts, folders["dense"], ParallelLayout(tensor=2), DynamicSampler, world_size=4) == [reference] * 4
