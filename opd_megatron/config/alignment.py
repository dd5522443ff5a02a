"""What is compared where the student's tokenizer is not the teacher's. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from opd_megatron.config.checks import require

# What only rows of more than one token know.
_OF_SPANS = ("score", "tail", "mask_first_token", "span_weight", "span_norm", "oov_unit")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How two tokenizations of a response are compared.

    identity: equal tokenizers, token by token. strict: tokens that both have, where both write them. simct: these, and every shortest stretch of text
    between two common boundaries as one unit (SimCT, arXiv 2605.07711); defaults are the paper's, the released code's choices are the second value
    of each option. uld: sorted probabilities, place by place (Universal Logit Distillation, arXiv 2402.12030), as a baseline.
    """

    kind: Literal["identity", "strict", "simct", "uld"] = "identity"
    # A unit's column: the mean log-probability of its tokens, or the mean of their raw logits.
    score: Literal["mean_logprob", "raw_logit"] = "mean_logprob"
    # Shortest stretches, or, as released, each with the equal token that follows it.
    units: Literal["minimal", "released"] = "minimal"
    # What becomes of a stretch at the end that no equal token follows.
    tail: Literal["keep", "drop"] = "keep"
    # Boundaries are compared in the bytes of the tokens, or, as released, in what each token alone decodes to.
    boundaries: Literal["bytes", "decoded_text"] = "bytes"
    # Tokens are shared if their bytes are equal, or, as released, if their names in the vocabularies are.
    vocab_match: Literal["bytes", "string"] = "bytes"
    # Leave out rows in which the teacher has less than one over this of its mass on all shared tokens, the unit and the ends; 0 keeps all.
    gh_threshold: float = 0.0
    # Take a unit's own first tokens, whose mass counts in its column too, out of its row.
    mask_first_token: bool = False
    # A row counts once, or as often as it has tokens of the student.
    span_weight: Literal["unit", "student_tokens"] = "unit"
    # What the sum of a unit's log-probabilities is divided by: each model's own number of tokens, nothing, or the larger of both numbers.
    span_norm: Literal["own_k", "sum", "max_k"] = "own_k"
    # Whether a unit of one token of each, which is no shared token, has a column of its own.
    oov_unit: Literal["column", "none"] = "column"
    # Look at that many shared tokens of a row, the student's likeliest; 0 looks at all. For uld: that many of the highest probabilities, and the rest as one.
    top_k: int = 0
    # The ends of text: one shared token (pair), left out (skip), or all ids that end a text as one column in each model (bridge).
    eos: Literal["pair", "skip", "bridge"] = "pair"

    def __post_init__(self) -> None:
        names = {"identity": [option.name for option in fields(self) if option.name != "kind"], "strict": list(_OF_SPANS), "simct": []}
        names["uld"] = [name for name in names["identity"] if name not in ("top_k", "eos")]
        plain = {option.name: option.default for option in fields(self)}
        for name in names[self.kind]:
            chosen = getattr(self, name)
            require(chosen == plain[name], f"alignment.{name}={_word(chosen)} has no effect with alignment.kind={self.kind}; leave it at {_word(plain[name])}")
        require(
            self.gh_threshold == 0 or 1 < self.gh_threshold < math.inf,
            f"alignment.gh_threshold={self.gh_threshold} must be 0 for none, or more than 1: it is one over the teacher's mass on the columns",
        )
        require(self.top_k >= 0, f"alignment.top_k={self.top_k} must not be negative; 0 looks at all")
        fewest = 1 if self.kind == "uld" else 3 if self.mask_first_token else 2
        require(
            self.top_k == 0 or self.top_k >= fewest,
            f"alignment.top_k={self.top_k} leaves rows of one column, on which models cannot differ; use at least {fewest}, or 0 for all",
        )
        require(self.tail == "keep" or self.units == "released", "alignment.tail=drop belongs to alignment.units=released: every other unit has an end")
        require(
            self.boundaries == "bytes" or self.units == "released",
            "alignment.boundaries=decoded_text belongs to alignment.units=released: text decoded token by token loses split characters",
        )

    @property
    def is_identity(self) -> bool:
        """Whether both models read the same tokens."""
        return self.kind == "identity"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
