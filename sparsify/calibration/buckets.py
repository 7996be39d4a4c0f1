"""From gates at single lengths to the buckets of a plan, and the same again on other hardware."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, log
from statistics import fmean

import torch

from sparsify.calibration.gains import LEAST_GAIN, calls_of_layers, gain
from sparsify.calibration.request import fingerprint
from sparsify.errors import PlanError
from sparsify.plan import Bucket, Budget, Gate, Plan

MOST_BUCKETS = 6


def bucket_of(gate: Gate, last: int) -> Bucket:
    """The bucket that a gate decides: from half its length, or behind the `last` length before it, to its length."""
    keeps = gate.passed and gate.gain >= LEAST_GAIN
    return Bucket(max(last + 1, gate.length // 2 + 1), gate.length + 1,
                  _with_peaks(gate.budget, gate) if keeps else Budget.dense(), gate.sites if keeps else {}, (gate,))


def assemble(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Buckets that cover every length: dense below and between, the last without end; at most MOST_BUCKETS."""
    filled: list[Bucket] = []
    end = 1
    for bucket in buckets:
        if bucket.lo > end:
            filled.append(Bucket(end, bucket.lo, Budget.dense()))
        filled.append(bucket)
        end = bucket.hi or end
    filled[-1] = replace(filled[-1], hi=None)
    return tuple(_at_most(filled, MOST_BUCKETS))


def remeasure(plan: Plan, device: torch.device, dtype: torch.dtype) -> Plan:
    """The same plan on this machine: thresholds stay as they were judged, what they save is measured again.

    A bucket that was dense only for want of a gain may become sparse, and the other way round; one that was edited
    since stays, for nothing is known of what it keeps. Layers are timed with random tensors of their shapes, and the
    times kept for the ops to find. Raises PlanError for a plan that was not calibrated.
    """
    gates = sorted((gate for bucket in plan.buckets for gate in bucket.gates), key=lambda gate: gate.length)
    if not gates or not plan.graph:
        raise PlanError(f"plan {plan.name} holds no gates: it was not calibrated, so there is nothing to measure "
                        "again. Make one with sparsify.calibrate.")
    buckets: list[Bucket] = []
    for gate in gates:
        edited = plan.bucket_of(gate.length)
        if _is_edited(edited):
            if not buckets or buckets[-1].lo != edited.lo:
                buckets.append(edited)
            continue
        calls = calls_of_layers(plan.graph, gate.length, gate.budget.singles, device, dtype)
        budgets = {call.site: gate.sites.get(call.site, gate.budget) for call in calls}
        saved = gain([call for call in calls if call.site in gate.densities], gate.densities, budgets)
        timed = all(call.times or call.small for call in calls)
        bucket = bucket_of(replace(gate, gain=saved, timed=timed), buckets[-1].gates[-1].length if buckets else 0)
        before = plan.bucket_of(gate.length)
        if before.budget == bucket.budget:
            bucket = replace(bucket, bounds=before.bounds)
        buckets.append(bucket)
    return replace(plan, buckets=assemble(buckets), fingerprint={**plan.fingerprint, **fingerprint(device, dtype)})


def _is_edited(bucket: Bucket) -> bool:
    """Whether a bucket says other than its gates do: one of them, where two were joined."""
    def kept(gate: Gate) -> tuple[Budget, Mapping[int, Budget]]:
        decided = bucket_of(gate, 0)
        return decided.budget, decided.sites

    return (bucket.budget, bucket.sites) not in [kept(gate) for gate in bucket.gates]


def _with_peaks(budget: Budget, gate: Gate) -> Budget:
    """The budget with what the ops need to reckon with its density: that of the sites that are not dense."""
    kept = [density for site, density in gate.densities.items() if not gate.sites.get(site, budget).is_dense]
    if not kept or not budget.tolerance:
        return budget
    return replace(budget, peaks=float(f"{fmean(kept) * gate.length * budget.tolerance:.4g}"))


def _at_most(buckets: Sequence[Bucket], most: int) -> list[Bucket]:
    """Equal neighbours joined, then those that differ least, under the more exact budget of the two."""
    joined = list(Plan(tuple(buckets)).merged().buckets)
    while len(joined) > most:
        costs = [_difference(before, after) for before, after in zip(joined, joined[1:], strict=False)]
        place = costs.index(min(costs))
        before, after = joined[place:place + 2]
        exact = min((before, after), key=lambda x: x.budget.tolerance or 0.0)
        joined[place:place + 2] = [replace(exact, lo=before.lo, hi=after.hi, gates=(*before.gates, *after.gates))]
    return joined


def _difference(before: Bucket, after: Bucket) -> float:
    """How much joining two buckets gives away: the ratio of their tolerances."""
    if not before.budget.tolerance or not after.budget.tolerance:
        return inf
    return abs(log(before.budget.tolerance / after.budget.tolerance))
