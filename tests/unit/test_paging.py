"""Which models the paged cache takes, and the numbers of its blocks. What ranks hold of them is in tests/distributed/test_planned_rollout.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.config import ParallelLayout
from opd_megatron.models.hf_folder import read_architecture
from opd_megatron.models.paging import check_budget, num_blocks, num_steps, sequence_blocks, why_not_paged
from tests.tiny import write_tiny_model

REFUSED = {
    "mistral": "attend to a window",
    "gemma2": "attend to a window",
    "phi3": "are lengthened by",
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama3", *REFUSED])
def test_paged_attention_takes_models_of_which_it_knows_everything(tmp_path: Path, family: str) -> None:
    why = why_not_paged(read_architecture(write_tiny_model(tmp_path / "hf", family)), ParallelLayout(), "bf16")
    assert why is None if family not in REFUSED else why is not None and REFUSED[family] in why


def test_precision_and_virtual_stages_are_refused(tmp_path: Path) -> None:
    architecture = read_architecture(write_tiny_model(tmp_path / "hf"))
    assert "training.precision=fp32" in str(why_not_paged(architecture, ParallelLayout(), "fp32"))
    assert "layout.virtual=2" in str(why_not_paged(architecture, ParallelLayout(pipeline=2, virtual=2), "bf16"))


@pytest.mark.parametrize(("prompt", "response", "blocks"), [(1, 1, 1), (4, 1, 1), (5, 1, 2), (4, 2, 2), (1, 4, 1), (1, 5, 2), (3, 6, 2), (3, 7, 3)])
def test_the_last_token_of_a_response_takes_no_block(prompt: int, response: int, blocks: int) -> None:
    assert sequence_blocks(prompt, response, 4) == blocks


def test_a_budget_is_cut_into_whole_blocks_and_must_hold_one_sequence_beside_the_spare() -> None:
    assert num_blocks(None, 1000, 3, 7) == 22
    assert num_blocks(10_999 / 2**30, 1000, 3, 7) == 10
    check_budget(8_000 / 2**30, 1000, 20, 9, 4)
    with pytest.raises(ValueError, match=r"holds 6 blocks of 4 tokens, .* a prompt of 20 tokens with a response of 9 needs 7"):
        check_budget(7_999 / 2**30, 1000, 20, 9, 4)


def _steps(num_sequences: int, most_tokens: int, free_blocks: int = 100) -> int:
    return num_steps(num_sequences, 20, 12, num_slots=8, free_blocks=free_blocks, most_tokens=most_tokens)


def test_prompts_that_do_not_enter_in_one_step_lengthen_a_rollout() -> None:
    # All at once; in two waves of eight; in four of two; two at a time, of which the last enter three steps later, beside six tokens of those that go on.
    assert _steps(8, 160) == 12
    assert _steps(16, 160) == 24
    assert _steps(8, 160, free_blocks=2) == 48
    assert _steps(8, 46) == 12 + 3
