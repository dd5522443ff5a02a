"""From logits and given random numbers to tokens, and from rollouts to a file and back.

Not covered: generation with a model and its cache, and the exchange between replicas (tests/distributed/test_training.py); CUDA;
logits that are NaN or all minus infinity.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.parallel.layout import replica_share
from opd_megatron.rollout.rollouts import Rollouts, Sample, record_rollouts, replay_rollouts
from opd_megatron.rollout.sampling import SamplingSettings, sample_tokens, uniform_stream

LARGEST_BELOW_1 = 1 - 2**-53


def settings_of(**changes: float) -> SamplingSettings:
    return SamplingSettings(max_response_tokens=8, **changes)  # type: ignore[arg-type]


def random_logits(num_rows: int, num_columns: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def draw_evenly(logits_V: torch.Tensor, sampling: SamplingSettings, num_draws: int) -> torch.Tensor:
    """How often each token is drawn [V] by evenly spaced numbers: inverse transform sampling then meets every probability within one draw."""
    uniform_B = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    token_B, _ = sample_tokens(logits_V.expand(num_draws, -1), uniform_B, sampling)
    return torch.bincount(token_B, minlength=len(logits_V))


def naive_distribution(logits: list[float], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The definition, in fp64: softmax, the k best, of those the smallest set reaching p, renormalized."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    kept = order[: top_k or len(order)]
    total, reached, chosen = sum(weights[index] for index in kept), 0.0, []
    for index in kept:
        if reached >= top_p:
            break
        chosen.append(index)
        reached += weights[index] / total
    mass = sum(weights[index] for index in chosen)
    return [weights[index] / mass if index in chosen else 0.0 for index in range(len(weights))]


# --- sample_tokens -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.2}])
def test_greedy_takes_the_largest_logit_whatever_the_number(truncation: dict[str, float]) -> None:
    logits_BV = random_logits(64, 33)
    for uniform in (0.0, 0.5, LARGEST_BELOW_1):
        token_B, logp_B = sample_tokens(logits_BV, torch.full((64,), uniform), settings_of(temperature=0, **truncation))
        assert torch.equal(token_B, logits_BV.argmax(-1))
        assert torch.equal(logp_B, logits_BV.log_softmax(-1).amax(-1))


TRUNCATIONS = {
    "none": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k of 1": {"top_k": 1},
    "top_k of more than all": {"top_k": 99},
    "top_p": {"top_p": 0.7},
    "top_p of next to nothing": {"top_p": 1e-6},
    "top_p of nearly all": {"top_p": 0.999},
    "top_k, then top_p of what is left": {"top_k": 6, "top_p": 0.8},
    "all three": {"top_k": 9, "top_p": 0.6, "temperature": 2.0},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_frequencies_are_those_of_the_truncated_softmax(name: str, seed: int) -> None:
    logits_V = random_logits(1, 24, seed)[0]
    counts_V = draw_evenly(logits_V, settings_of(**TRUNCATIONS[name]), num_draws := 4096)
    expected_V = torch.tensor(naive_distribution(logits_V.tolist(), **TRUNCATIONS[name]), dtype=torch.float64)  # type: ignore[arg-type]
    # Nothing outside the set, ever; inside, evenly spaced numbers hit an interval of length p in p * N draws, give or take one.
    assert not counts_V[expected_V == 0].any()
    assert ((counts_V - num_draws * expected_V).abs() <= 1.01).all()


def test_frequencies_of_a_random_stream_approach_the_softmax() -> None:
    logits_V = random_logits(1, 16, scale=1.0)[0]
    uniform_B = uniform_stream(20_000, "chi-square")
    token_B, _ = sample_tokens(logits_V.expand(20_000, -1), uniform_B, settings_of(temperature=1.5))
    expected_V = 20_000 * (logits_V.double() / 1.5).softmax(-1)
    chi_square = ((torch.bincount(token_B, minlength=16) - expected_V) ** 2 / expected_V).sum()
    # 15 degrees of freedom: a true sampler stays below 57 in all but one of a million streams, and this stream is fixed.
    assert chi_square < 57


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    st.integers(0, 13),
    st.floats(0.01, 1),
    st.floats(0, LARGEST_BELOW_1),
)
def test_a_token_is_always_among_the_k_largest(logits: list[float], top_k: int, top_p: float, uniform: float) -> None:
    token_B, logp_B = sample_tokens(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), settings_of(top_k=top_k, top_p=top_p))
    token = int(token_B)
    # Equal logits share a place, as in transformers.
    assert sum(logit > logits[token] for logit in logits) < (top_k or len(logits))
    assert math.isfinite(float(logp_B))


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_the_log_probability_is_that_of_the_whole_scaled_softmax(name: str) -> None:
    logits_BV = random_logits(200, 24, seed=3)
    token_B, logp_B = sample_tokens(logits_BV, uniform_stream(200, name), settings_of(**TRUNCATIONS[name]))
    reference_BV = (logits_BV.double() / TRUNCATIONS[name].get("temperature", 1.0)).log_softmax(-1)
    assert logp_B.dtype == torch.float32
    # fp32 rounding of a sum of 24 terms; a renormalized value would be off by 1e-3 or more.
    assert torch.allclose(logp_B.double(), reference_BV.gather(-1, token_B[:, None])[:, 0], rtol=0, atol=1e-5)


def test_bf16_logits_are_used_in_fp32() -> None:
    logits_BV = random_logits(100, 24).bfloat16()
    uniform_B = uniform_stream(100, "bf16")
    for ours, reference in zip(*(sample_tokens(logits, uniform_B, settings_of(top_p=0.9)) for logits in (logits_BV, logits_BV.float())), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_k": 8}, {"top_p": 0.9}], ids=str)
def test_a_token_of_zero_probability_is_never_drawn(truncation: dict[str, float]) -> None:
    logits_V = random_logits(1, 10)[0]
    banned = [0, 1, 4, 8, 9]
    logits_V[banned] = -torch.inf
    # The ends matter: 0 must not give the first column, nor the largest number the last.
    uniform_B = torch.tensor([0.0, LARGEST_BELOW_1, *(i / 997 for i in range(997))], dtype=torch.float64)
    token_B, logp_B = sample_tokens(logits_V.expand(len(uniform_B), -1), uniform_B, settings_of(**truncation))
    assert not set(token_B.tolist()) & set(banned)
    assert logp_B.isfinite().all()
    if "top_k" not in truncation and "top_p" not in truncation:
        assert (int(token_B[0]), int(token_B[1])) == (2, 7)


def test_a_row_with_one_possible_token_gives_it_and_leaves_the_others_alone() -> None:
    logits_BV = random_logits(3, 6)
    logits_BV[1] = -torch.inf
    logits_BV[1, 4] = -7.0
    uniform_B = torch.tensor([0.3, 0.9, 0.6], dtype=torch.float64)
    for truncation in ({}, {"top_k": 2}, {"top_p": 0.5}):
        token_B, logp_B = sample_tokens(logits_BV, uniform_B, settings_of(**truncation))
        assert (int(token_B[1]), float(logp_B[1])) == (4, 0.0)
        for row in (0, 2):
            alone, _ = sample_tokens(logits_BV[row : row + 1], uniform_B[row : row + 1], settings_of(**truncation))
            assert int(alone) == int(token_B[row])


# --- uniform_stream ----------------------------------------------------------------------------------------------------------------------


def test_a_stream_depends_on_its_key_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = uniform_stream(100, 1234, "step", 7, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    uniform_stream(5, "something else")
    assert torch.equal(uniform_stream(100, 1234, "step", 7, 0), first)
    assert first.dtype == torch.float64
    assert (first >= 0).all()
    assert (first < 1).all()


def test_a_longer_stream_begins_with_the_shorter_one() -> None:
    # So a larger rollout.max_response_tokens changes no token that was written before.
    longest = uniform_stream(1000, 1, 2)
    assert all(torch.equal(uniform_stream(length, 1, 2), longest[:length]) for length in (0, 1, 7, 8, 15, 16, 17, 255, 999))


def test_neighbouring_keys_give_unrelated_streams() -> None:
    keys = [(seed, step, sample) for seed in range(4) for step in range(16) for sample in range(16)]
    streams = torch.stack([uniform_stream(8, *key) for key in keys])
    assert len({tuple(stream.tolist()) for stream in streams}) == len(keys)
    # The separator counts: digits do not run together.
    assert not torch.equal(uniform_stream(8, 1, 23), uniform_stream(8, 12, 3))
    # 8192 numbers in 16 bins of 512 give or take 22 each: within 6 standard deviations.
    counts = torch.histc(streams.float(), bins=16, min=0, max=1)
    assert ((counts - 512).abs() < 6 * 22).all()


# --- Rollouts ----------------------------------------------------------------------------------------------------------------------------


def sample_of(
    prompt: list[int], response: list[int], logp: list[float] | None, *, prompt_index: int = 0, sample_index: int = 0, finished: bool = True
) -> Sample:
    ids = (torch.tensor(part, dtype=torch.long) for part in (prompt, response))
    return Sample(prompt_index, sample_index, *ids, None if logp is None else torch.tensor(logp, dtype=torch.float32), finished)


def bits(logp: torch.Tensor | None) -> list[int] | None:
    return None if logp is None else logp.view(torch.int32).tolist()


def assert_same(one: Rollouts, other: Rollouts) -> None:
    assert one.policy_version == other.policy_version
    assert len(one.samples) == len(other.samples)
    for ours, theirs in zip(one.samples, other.samples, strict=True):
        assert (ours.prompt_index, ours.sample_index, ours.finished) == (theirs.prompt_index, theirs.sample_index, theirs.finished)
        assert torch.equal(ours.prompt_ids, theirs.prompt_ids)
        assert torch.equal(ours.response_ids, theirs.response_ids)
        assert ours.response_ids.dtype == theirs.response_ids.dtype == torch.long
        assert bits(ours.sampled_logp) == bits(theirs.sampled_logp)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(max_value=0, width=32, allow_nan=False), max_size=6))
def test_a_replay_has_every_bit_of_the_record(tmp_path_factory: pytest.TempPathFactory, logp: list[float]) -> None:
    # Zeros of both signs, subnormal numbers and minus infinity included.
    file = tmp_path_factory.getbasetemp() / "replay" / "step_1.jsonl"
    rollouts = Rollouts((sample_of([1, 2], list(range(len(logp))), logp, prompt_index=3, sample_index=1, finished=False),), policy_version=5)
    record_rollouts(rollouts, file)
    assert_same(rollouts, replay_rollouts(file))


def test_given_text_has_no_log_probabilities_after_a_replay_either(tmp_path: Path) -> None:
    rollouts = Rollouts((sample_of([1], [2, 3], None), sample_of([4, 5], [], []), sample_of([10**6], [7], [-0.1])), policy_version=0)
    record_rollouts(rollouts, tmp_path / "new" / "folder" / "step_1.jsonl")
    assert_same(rollouts, replay_rollouts(tmp_path / "new" / "folder" / "step_1.jsonl"))
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["step_1.jsonl"]


def recorded_lines(tmp_path: Path) -> tuple[Path, list[str]]:
    file = tmp_path / "step_1.jsonl"
    record_rollouts(Rollouts((sample_of([1], [2, 3], [-0.5, -0.25]), sample_of([4], [5], [-1.0])), policy_version=2), file)
    return file, file.read_text().splitlines()


def test_a_missing_replay_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.replay needs a run that was made with rollout\.record=true and has this step") as caught:
        replay_rollouts(tmp_path / "step_9.jsonl")
    assert str(tmp_path / "step_9.jsonl") in str(caught.value)


@pytest.mark.parametrize("key", ["prompt_index", "sample_index", "prompt_ids", "response_ids", "sampled_logp", "finished", "policy_version"])
def test_a_replay_without_a_field_is_refused_with_its_line(tmp_path: Path, key: str) -> None:
    file, lines = recorded_lines(tmp_path)
    record = json.loads(lines[1])
    del record[key]
    file.write_text(lines[0] + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=key) as caught:
        replay_rollouts(file)
    assert f"{file}:2 is not a recorded rollout" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "not json", "{'prompt_index': 0}", ""], ids=["cut", "text", "quotes", "empty line"])
def test_a_garbled_replay_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    file, lines = recorded_lines(tmp_path)
    file.write_text(lines[0] + "\n" + text + "\n")
    with pytest.raises(ValueError) as caught:
        replay_rollouts(file)
    assert f"{file}:2 is not a recorded rollout" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"5\n",
        b"null\n",
        b"[]\n",
        b"\xff\xfe\x00\x01\n",
        b"",
        "prompt_ids=x",
        "response_ids=[1.5]",
        "response_ids=[[1]]",
        "sampled_logp=[-0.5]",
        "sampled_logp=x",
    ],
    ids=str,
)
def test_a_replay_of_another_shape_is_refused_with_the_file(tmp_path: Path, content: bytes | str) -> None:
    file, lines = recorded_lines(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        key, _, value = content.partition("=")
        file.write_text(json.dumps({**json.loads(lines[0]), key: value if value == "x" else json.loads(value)}) + "\n")
    with pytest.raises(ValueError) as caught:
        replay_rollouts(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_the_shares_of_all_replicas_are_a_partition_in_order(count: int, size: int) -> None:
    shares = [list(replica_share(count, rank, size)) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_counts_are_of_response_tokens_and_of_all_tokens() -> None:
    rollouts = Rollouts((sample_of([1, 2, 3], [4, 5], None), sample_of([1], [], None)), policy_version=0)
    assert [(sample.num_tokens, sample.num_scored) for sample in rollouts.samples] == [(5, 2), (1, 0)]
    assert rollouts.num_response_tokens == 2
