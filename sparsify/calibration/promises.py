"""What the buckets of a calibrated plan may promise of missed peaks: one more run of each window, under the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import Tensor

from sparsify.bounds import Bounds
from sparsify.calibration.guarantee import LEAST_DOCUMENTS, Collector, fit
from sparsify.calibration.runs import Runs, Trial
from sparsify.calibration.samples import Window
from sparsify.kernels.masks import Masks
from sparsify.plan import Bucket, Plan

Say = Callable[[str], None]


def with_bounds(plan: Plan, windows: Mapping[int, Sequence[Window]], runs: Runs, say: Say) -> Plan:
    """The plan with bounds in every sparse bucket in which enough documents ran; `windows` by their key length.

    A bucket in which several lengths were calibrated promises the worse of them, under the lower shifts.
    """
    return replace(plan, buckets=tuple(_bounded(bucket, plan, windows, runs, say) for bucket in plan.buckets))


def _bounded(bucket: Bucket, plan: Plan, windows: Mapping[int, Sequence[Window]], runs: Runs, say: Say) -> Bucket:
    inside = {length: of_length for length, of_length in windows.items() if length in bucket}
    if bucket.is_dense or not inside:
        return bucket
    for length, of_length in inside.items():
        if len(of_length) < LEAST_DOCUMENTS:
            say(f"{length} keys: no guarantee, {len(of_length)} documents are too few for one")
            return bucket
    found = [_bounds(bucket, plan, of_length, length, runs, say) for length, of_length in inside.items()]
    return replace(bucket, bounds=reduce(Bounds.joined, found).to_dict())


def _bounds(bucket: Bucket, plan: Plan, windows: Sequence[Window], length: int, runs: Runs, say: Say) -> Bounds:
    def look() -> dict[str, Any]:
        collector = Collector(bucket.budget_of)

        def watch(site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> None:
            if k.shape[2] in bucket:
                collector.watch(site, q, k, v, scale, masks)

        for number, window in enumerate(windows, start=1):
            say(f"{length} keys: counting missed peaks, document {number} of {len(windows)}")
            with collector.document(window.kind):
                runs.watched(window, Trial(plan.buckets), watch)
        return replace(fit(collector.documents), device_type=runs.device.type).to_dict()

    budgets = [bucket.budget.to_dict(), *([site, budget.to_dict()] for site, budget in sorted(bucket.sites.items()))]
    return Bounds.from_dict(runs.journal.get(look, "bounds", [window.name for window in windows], budgets))
