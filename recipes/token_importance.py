"""The quickstart with one rule each for which tokens count and how much (TIP, arXiv 2604.14084; PW-OPSD, arXiv 2605.21606). Four CPU ranks."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import ImportanceConfig, PositionWeightsConfig, RunConfig
from recipes.quickstart import quickstart


def _under(importance: ImportanceConfig) -> RunConfig:
    """The rules are compared under TIP's loss, the reverse KL; the quickstart's own is loss.kind=forward_kl."""
    base = quickstart()
    return replace(base, loss=replace(base.loss, kind="reverse_kl"), importance=importance)


def tip_all() -> RunConfig:
    """Every token counts: what the rules are compared with."""
    return _under(ImportanceConfig())


def tip_entropy_50() -> RunConfig:
    """Half of the tokens of each response, drawn in proportion to the student's entropy (TIP Tables 3 and 5)."""
    return _under(ImportanceConfig(rule="entropy_sample", ratio=0.5))


def tip_soft_or_50() -> RunConfig:
    """TIP: the half of each response where the student is unsure or wrong (Soft-OR of entropy and divergence, Table 5)."""
    return _under(ImportanceConfig(rule="soft_or_topk", ratio=0.5))


def tip_soft_or_20() -> RunConfig:
    """The same with a fifth of each response."""
    return _under(ImportanceConfig(rule="soft_or_topk", ratio=0.2))


def tip_q3_10() -> RunConfig:
    """A tenth of all tokens of the step, where the student is sure and the teacher is not with it (Table 4)."""
    # Responses of at most 12 tokens: a tenth of each would mostly be none.
    return _under(ImportanceConfig(rule="q3_topk", ratio=0.1, select_scope="step"))


def tip_div_50() -> RunConfig:
    """The half of each response with the largest divergence (Table 8)."""
    return _under(ImportanceConfig(rule="div_topk", ratio=0.5))


def tip_entropy_topk_50() -> RunConfig:
    """The half of each response with the largest entropy, without chance."""
    return _under(ImportanceConfig(rule="entropy_topk", ratio=0.5))


def tip_bottom_50() -> RunConfig:
    """Control: the half of each response that TIP leaves out (Table 6)."""
    return _under(ImportanceConfig(rule="bottom_topk", ratio=0.5))


def position_weighted() -> RunConfig:
    """Late tokens weigh more, and each response counts alike (PW-OPSD's "moderate" weights, with an external teacher, which no paper tested)."""
    return replace(quickstart(), position_weights=PositionWeightsConfig(enabled=True))
