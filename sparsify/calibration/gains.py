"""What a budget saves here: the densities that it was measured to keep, and the times of this machine.

Every site counts by what dense attention of its shape costs (`crossover.dense_seconds`). How much of that a density
takes is measured for its shape class, as the ops do to find the crossover, with selection in it; where nothing may be
measured (SPARSIFY_TUNE=0, calls too small to time) it is UNMEASURED for selection plus the density. What the rest of
the model takes does not count: a gain is a share of the time of attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.masks import Masks
from sparsify.ops import crossover
from sparsify.plan import Budget, SiteShape
from sparsify.timings import GAIN, Times

LEAST_GAIN = 1 - GAIN
"""Share of attention's time below which a bucket, or a site, is dense: the same 3 % that the ops ask for."""
UNMEASURED = 0.15
"""Selection over dense attention, by default: between 0.06 (H100, 16K keys and more) and 0.3 (8K keys)."""
LARGEST_MEASURED = 1.0  # seconds for the rounds of one class on a CPU; a GPU takes TUNE_SECONDS


@dataclass(frozen=True)
class SiteCall:
    """One call of a site in one run of the model: plain data, so that a journal can keep it.

    weight  seconds of dense attention by constants: what the site counts beside others
    small   below what is ever timed: it gains nothing
    times   what was measured for its shape class, by the singles of a split summary; empty: nothing
    """

    site: int
    kv_len: int
    weight: float
    small: bool = False
    times: Mapping[int, Times] = field(default_factory=dict)

    def relative(self, density: float, budget: Budget) -> float:
        """Time over that of dense attention."""
        if budget.is_dense or self.small:
            return 1.0
        # More vectors never cost less: noise in the times must not say so.
        found = [times.relative(density) for singles, times in self.times.items() if singles <= budget.singles]
        measured = [time for time in found if time is not None]
        if budget.singles in self.times and measured:
            return max(measured)
        return UNMEASURED * (budget.singles + 2) / (Budget.singles + 2) + density

    def to_dict(self) -> dict[str, Any]:
        return {"site": self.site, "kv_len": self.kv_len, "weight": self.weight, "small": self.small,
                "times": {str(singles): times.to_dict() for singles, times in self.times.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SiteCall":
        return cls(data["site"], data["kv_len"], data["weight"], data["small"],
                   {int(singles): Times.from_dict(times) for singles, times in data["times"].items()})


def observe(site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks,
            singles: Sequence[int]) -> SiteCall:
    """What a call weighs, and the times of its class, measured where they are not known yet."""
    seconds = crossover.TUNE_SECONDS if q.is_cuda else LARGEST_MEASURED
    found = {m: crossover.times_for(q, k, v, scale, masks, m, seconds) for m in singles}
    small = crossover.class_of(q, k, v, masks) is None
    return SiteCall(site, k.shape[2], crossover.dense_seconds(q, k, v, masks), small,
                    {m: times for m, times in found.items() if times is not None})


def calls_of_layers(sites: Sequence[SiteShape], length: int, singles: int, device: torch.device,
                    dtype: torch.dtype) -> list[SiteCall]:
    """The same for the sites of a plan, on random tensors: one call each, as many queries as keys."""
    known: dict[tuple[int | bool, ...], SiteCall] = {}
    calls = []
    for site in sites:
        layer = site.heads, site.kv_heads, site.head_dim, site.value_dim, site.causal
        if 0 in layer[:4]:
            continue
        if layer not in known:
            q, k, v, masks = crossover.random_layer((1, *layer[:2], length, *layer[2:4]), site.causal, dtype, device)
            known[layer] = observe(site.index, q, k, v, site.head_dim ** -0.5, masks, (singles,))
        calls.append(replace(known[layer], site=site.index))
    return calls


def gain(calls: Sequence[SiteCall], densities: Mapping[int, float], budget_of: Mapping[int, Budget]) -> float:
    """Share of the time of attention that these calls save."""
    total = sum(call.weight for call in calls)
    spent = sum(call.weight * call.relative(densities.get(call.site, 1.0), budget_of[call.site]) for call in calls)
    return 1 - spent / max(total, 1e-300)
