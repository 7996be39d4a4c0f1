"""The gate: one-sided confidence bounds over documents, and what they must not exceed.

The document is the unit that may be exchanged for another of its kind; rows and windows of one document are alike. So a
bound is Student's t over the means of documents: few documents, wide bound. It assumes that means of documents are
about normal; KL is skewed to the right, so with fewer than ten documents the true confidence is somewhat lower.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mpmath

CONFIDENCE = 0.95
"""One-sided, for each bucket by itself."""
MOST_RISE, MOST_RISE_UPPER = 0.3, 0.5
"""Per cent: what the mean rise of the next-token loss may be, and its upper bound, where the metric is KL."""


@dataclass(frozen=True)
class Judgement:
    """What documents say of a budget: mean and upper bound of the metric, of the loss rise in per cent, by kind."""

    documents: int
    mean: float
    upper: float
    rise: float | None
    rise_upper: float | None
    kinds: Mapping[str, float]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Evidence:
    """One document under one budget: the metric, and the next-token losses where there are any."""

    kind: str
    error: float
    losses: tuple[float, float] | None


def judge(evidence: Sequence[Evidence], max_error: float, check_loss: bool) -> Judgement:
    """Compare bounds with their limits. `check_loss`: the loss must not rise either; it is reported in any case."""
    errors = [x.error for x in evidence]
    mean, upper = statistics.fmean(errors), upper_bound(errors)
    kinds = {kind: statistics.fmean(x.error for x in evidence if x.kind == kind)
             for kind in sorted({x.kind for x in evidence})}
    failures = []
    if not upper <= max_error:
        failures.append(f"error {mean:.2g}, at most {upper:.2g}, above {max_error:g}")
    failures += [f"error {error:.2g} on {kind}, above {max_error:g}" for kind, error in kinds.items()
                 if kind and not error <= max_error]
    rise = rise_upper = None
    if all(x.losses is not None for x in evidence):
        losses = [x.losses for x in evidence if x.losses is not None]
        dense = statistics.fmean(loss for loss, _ in losses)
        rises = [100 * (sparse - loss) / max(dense, 1e-12) for loss, sparse in losses]
        rise, rise_upper = statistics.fmean(rises), upper_bound(rises)
        if check_loss and not (rise <= MOST_RISE and rise_upper <= MOST_RISE_UPPER):
            failures.append(f"loss {rise:+.2f} %, at most {rise_upper:+.2f} %, above {MOST_RISE} or {MOST_RISE_UPPER}")
    return Judgement(len(errors), mean, upper, rise, rise_upper, kinds, tuple(failures))


def upper_bound(values: Sequence[float]) -> float:
    """One-sided upper confidence bound of the mean, Student's t; infinite for a single value."""
    if len(values) < 2:
        return float("inf")
    return statistics.fmean(values) + t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Quantile of Student's t, to twelve digits: by bisection of the regularised incomplete beta function."""
    def below(t: float) -> float:
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
        return float(1 - tail)

    low, high = 0.0, 1.0
    while below(high) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < confidence else (low, middle)
    return high
