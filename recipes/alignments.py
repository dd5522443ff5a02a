"""How SimCT compares two tokenizations: in the paper (arXiv 2605.07711) and in the authors' code, which differs from it. No recipes."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import AlignmentConfig


def paper_math() -> AlignmentConfig:
    """Return the paper's Eq. 6 to 9: shortest units, mean log-probabilities, every end of a response kept, no row left out."""
    return AlignmentConfig(kind="simct")


def public_code_4dae6fc() -> AlignmentConfig:
    """Return what github.com/sunjie279/SimCT- computes at commit 4dae6fc (May 2026).

    Five differences from the paper: raw logits for log-probabilities, a mismatch together with the equal token after it, none at the end of a response,
    tokens compared by what each decodes to alone, and shared by name. A single token that is not shared has no column.
    """
    return AlignmentConfig(kind="simct", score="raw_logit", units="released", tail="drop", boundaries="decoded_text", vocab_match="string", oov_unit="none")


def public_code_cf0f33a() -> AlignmentConfig:
    """Return the same at commit cf0f33a (August 2026): units on whose columns the teacher has less than half of its mass have no loss."""
    return replace(public_code_4dae6fc(), gh_threshold=2.0)


def public_scripts() -> AlignmentConfig:
    """Return what the authors' scripts of May 2026 run: the code of then, without the later flag."""
    return public_code_4dae6fc()
