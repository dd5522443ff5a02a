"""The quickstart with one rule each for which tokens count and how much (TIP, arXiv 2604.14084; PW-OPSD, arXiv 2605.21606). Four CPU ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd_megatron.config import ImportanceConfig, PositionWeightsConfig, RunConfig
from recipes.quickstart import quickstart


def _with_rule(rule: str, ratio: float, **options: Any) -> RunConfig:
    """TIP minimizes the reverse KL; the rules are compared under it, but for the quickstart's own loss use loss.kind=forward_kl."""
    base = quickstart()
    return replace(base, loss=replace(base.loss, kind="reverse_kl"), importance=ImportanceConfig(rule=rule, ratio=ratio, **options))


def tip_all() -> RunConfig:
    """Every token counts: what the rules are compared with."""
    return _with_rule("all", 1.0)


def tip_entropy_50() -> RunConfig:
    """Half of the tokens of each response, drawn in proportion to the student's entropy (TIP Tables 3 and 5)."""
    return _with_rule("entropy_sample", 0.5)


def tip_soft_or_50() -> RunConfig:
    """TIP: the half of each response where the student is unsure or wrong (Soft-OR of entropy and divergence, Table 5)."""
    return _with_rule("soft_or_topk", 0.5)


def tip_soft_or_20() -> RunConfig:
    """The same with a fifth of each response."""
    return _with_rule("soft_or_topk", 0.2)


def tip_q3_10() -> RunConfig:
    """A tenth of all tokens of the step, where the student is sure and the teacher is not with it (Table 4)."""
    # Responses of at most 12 tokens: a tenth of each would mostly be none.
    return _with_rule("q3_topk", 0.1, select_scope="step")


def tip_div_50() -> RunConfig:
    """The half of each response with the largest divergence (Table 8)."""
    return _with_rule("div_topk", 0.5)


def tip_entropy_topk_50() -> RunConfig:
    """The half of each response with the largest entropy, without chance."""
    return _with_rule("entropy_topk", 0.5)


def tip_bottom_50() -> RunConfig:
    """Control: the half of each response that TIP leaves out (Table 6)."""
    return _with_rule("bottom_topk", 0.5)


def position_weighted() -> RunConfig:
    """Late tokens weigh more, and each response counts alike (PW-OPSD's "moderate" weights, with an external teacher, which no paper tested)."""
    return replace(quickstart(), position_weights=PositionWeightsConfig(enabled=True))
