"""How much each response token of a step weighs, decided for the whole step before any gradient. Shapes: N response tokens of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from opd_megatron.config import RunConfig
from opd_megatron.losses.fused_head import TokenStatistics
from opd_megatron.losses.importance_metrics import kept_divergence, quadrant_shares
from opd_megatron.losses.position_weights import position_weights
from opd_megatron.losses.token_importance import Selection, SelectionRule, token_selection
from opd_megatron.losses.token_weights import token_weights
from opd_megatron.rollout.sampling import uniform_stream
from opd_megatron.training.batching import MicroBatches
from opd_megatron.training.objective import Distillation, Objective, SupervisedFineTuning
from opd_megatron.training.student import Student


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What the configuration asks for: which tokens are kept (`importance`), how much they weigh (`position_weights`), what divides their sum (`loss`)."""

    config: RunConfig
    vocab_size: int

    @property
    def rule(self) -> SelectionRule | None:
        """The rule that chooses tokens; None where every token is kept and nothing needs to be measured."""
        importance = self.config.importance
        if importance.rule == "all":
            return None
        # The configuration has the rule's options under their names.
        return SelectionRule(**{option.name: getattr(importance, option.name) for option in fields(SelectionRule)})

    @property
    def is_plain(self) -> bool:
        """Whether every token weighs 1 and their number is the divisor."""
        return self.rule is None and not self.config.position_weights.enabled and self.config.reduction == "token"

    def weigh(self, student: Student, micro_batches: MicroBatches, objective: Objective, step: int) -> tuple[MicroBatches, dict[str, float]]:
        """Return the micro-batches with a weight for every token, the same on all ranks, and what is to be recorded of it.

        A rule costs a forward pass over the whole step, without gradient. Where its statistics are not finite, no weight is: nor is the loss, and the
        step is skipped.
        """
        if self.is_plain or isinstance(objective, SupervisedFineTuning):
            return micro_batches, {}
        lengths = micro_batches.rollouts.num_scored
        kept_N, metrics = torch.ones(sum(lengths)), {}
        if self.rule is not None:
            assert isinstance(objective, Distillation), "the configuration has rules for equal tokenizers only"
            statistics = student.statistics(micro_batches, objective, self.config.importance.temperature)
            if not bool(torch.stack(_host(statistics)).isfinite().all()):
                return replace(micro_batches, weight_N=torch.full((sum(lengths),), math.nan, device=student.device)), {}
            selection = self._select(TokenStatistics(*_host(statistics)), lengths, self.rule, step)
            kept_N = selection.weights_T
            metrics = _selection_metrics(TokenStatistics(*_host(statistics)), selection)
        position_N = self._position_weights(lengths)
        weight_N, divisor = token_weights(kept_N, position_N, lengths, reduction=self.config.reduction, denominator=self.config.loss.denominator)
        if self.config.position_weights.enabled and len(position_N):
            metrics |= {"position_weight_mean": float(position_N.mean()), "position_weight_min": float(position_N.min())}
        # Megatron divides by the number of tokens that it is given.
        num_kept = int((weight_N != 0).sum())
        weight_N = weight_N.double() * (num_kept / divisor if divisor else 0.0)
        return replace(micro_batches, weight_N=weight_N.float().to(student.device)), (
            {"kept_fraction": num_kept / max(1, len(weight_N))} if self.rule is not None else {}
        ) | metrics

    def _select(self, statistics: TokenStatistics, lengths: list[int], rule: SelectionRule, step: int) -> Selection:
        # One number from a counter-based stream: the same on every rank and after a resume.
        generator = torch.Generator().manual_seed(int(uniform_stream(1, self.config.seed, step, "importance")[0] * 2**53))
        return token_selection(statistics, lengths, rule, vocab_size=self.vocab_size, generator=generator)

    def _position_weights(self, lengths: list[int]) -> torch.Tensor:
        settings = self.config.position_weights
        if not settings.enabled:
            return torch.ones(sum(lengths))
        return position_weights(lengths, minimum=settings.minimum, center=settings.center, slope=settings.slope, normalize=settings.normalize)


def _host(statistics: TokenStatistics) -> list[torch.Tensor]:
    return [statistics.student_entropy_T.cpu(), statistics.reverse_kl_T.cpu(), statistics.forward_kl_T.cpu()]


def _selection_metrics(statistics: TokenStatistics, selection: Selection) -> dict[str, float]:
    """Return what metrics.jsonl shows of a selection: means in nats, thresholds, shares of TIP's quadrants by our own convention."""
    shares = quadrant_shares(statistics, selection.weights_T)
    divergence = kept_divergence(statistics.reverse_kl_T, selection.weights_T)
    known = selection.threshold_B[~selection.threshold_B.isnan()]
    metrics = {
        "entropy_all": float(statistics.student_entropy_T.mean()) if len(statistics.student_entropy_T) else 0.0,
        "reverse_kl_all": float(statistics.reverse_kl_T.mean()) if len(statistics.reverse_kl_T) else 0.0,
        "reverse_kl_kept": divergence.kept if divergence.kept is not None else math.nan,
        "reverse_kl_dropped": divergence.dropped if divergence.dropped is not None else math.nan,
        "score_threshold_mean": float(known.mean()) if len(known) else math.nan,
        "entropy_median": shares.entropy_threshold,
        "reverse_kl_median": shares.divergence_threshold,
    }
    metrics |= {f"quadrant_{number}_share": share for number, share in enumerate(shares.tokens, start=1)}
    metrics |= {f"quadrant_{number}_kept_share": share for number, share in enumerate(shares.kept, start=1)}
    # A mean over nothing has no place in a record.
    return {key: value for key, value in metrics.items() if math.isfinite(value)}
