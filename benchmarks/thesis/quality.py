"""How much a policy changes what a model says, per window, and how sure that is over windows.

    change = compare(dense_logits, sparse_logits, ids)        KL, losses: one value per window
    low, high = interval(values)                              95 % of the mean, by bootstrap over windows
    low, high = ratio_interval(a, b)                          95 % of mean(a) / mean(b), windows drawn in pairs
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits compared at once
DRAWS = 2000
USUAL_SLOPE = -2.7  # of log KL over log density, measured on trained models
LEAST_SLOPE = -0.5
APART = 0.02  # in log density: nearer points say nothing about a slope
NOTHING = 1e-9  # a KL of nothing, for logarithms


@dataclass
class Change:
    """Per window: KL of dense from sparse over all positions and over the last quarter, and both losses; nats."""

    kl: list[float] = field(default_factory=list)
    kl_last: list[float] = field(default_factory=list)
    loss_dense: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def extend(self, other: "Change") -> None:
        for one in fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))

    def mean(self, name: str) -> float:
        values = getattr(self, name)
        return sum(values) / len(values)

    def loss_rise(self) -> float:
        """Relative: 0.003 is 0.3 %."""
        return self.mean("loss") / self.mean("loss_dense") - 1


def compare(dense: Tensor, sparse: Tensor, ids: Tensor) -> Change:
    """From logits [B, L, vocabulary] of both sides; a few positions at a time."""
    batch, length, vocabulary = dense.shape
    step = max(1, CHUNK[dense.device.type] // (batch * vocabulary))
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1))[..., None]
    kl, before, after = (torch.empty(batch, length, device=dense.device) for _ in range(3))
    for start in range(0, length, step):
        part = slice(start, start + step)
        log_p, log_q = (x[:, part].float().log_softmax(-1) for x in (dense, sparse))
        kl[:, part] = (log_p.exp() * (log_p - log_q)).sum(-1)
        before[:, part], after[:, part] = (-x.gather(-1, targets[:, part])[..., 0] for x in (log_p, log_q))
    last = length - length // 4
    means = (kl.mean(1), kl[:, last:].mean(1), before[:, :-1].mean(1), after[:, :-1].mean(1))
    return Change(*(mean.tolist() for mean in means))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean, by bootstrap."""
    return ratio_interval(values, [1.0] * len(values))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of mean(above) / mean(below), windows drawn together, by bootstrap."""
    if len(above) < 2:
        return (math.nan, math.nan)
    draws = np.random.default_rng(0).integers(0, len(above), (DRAWS, len(above)))
    ratios = np.asarray(above)[draws].mean(1) / np.asarray(below)[draws].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def kl_at(points: Sequence[tuple[float, float]], density: float) -> float:
    """KL at a density, from (density, KL) points: log KL is linear in log density; 0 at density 1."""
    if density >= 1:
        return 0.0
    (d0, k0), slope = _line(points, lambda point: math.log(point[0] / density))
    return k0 * (density / d0) ** slope


def density_for(points: Sequence[tuple[float, float]], kl: float) -> float:
    """The density that a KL needs, by the same interpolation; at most 1."""
    (d0, k0), slope = _line(points, lambda point: math.log(kl / max(point[1], NOTHING)))
    return min(1.0, d0 * (kl / k0) ** (1 / slope))


def _line(points: Sequence[tuple[float, float]],
          beyond: Callable[[tuple[float, float]], float]) -> tuple[tuple[float, float], float]:
    """The point nearest a target, and the slope of log KL over log density there.

    `beyond` says how far a point lies past the target, by sign. The slope is that between the nearest points on both
    sides, else between the two nearest that lie apart, else USUAL_SLOPE; never rising, whatever noise says.
    """
    known = sorted(((d, max(kl, NOTHING)) for d, kl in points), key=lambda point: abs(beyond(point)))
    nearest = known[0]
    other = next((point for point in known if beyond(point) * beyond(nearest) < 0), None)
    if other is None or abs(math.log(other[0] / nearest[0])) < APART:
        other = next((point for point in known if abs(math.log(point[0] / nearest[0])) >= APART), None)
    if other is None:
        return nearest, USUAL_SLOPE
    slope = math.log(other[1] / nearest[1]) / math.log(other[0] / nearest[0])
    return nearest, min(LEAST_SLOPE, slope)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; ties share the mean of their ranks. NaN where one side is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[inverse])
    if min(rank.std() for rank in ranks) == 0:
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
