"""Compare a file that was just written with the graphs that it was made of, before anybody gets it.

At one key length per bucket, at least: its output beside that of the sparse graph, which must be equal to rounding, and
beside that of the dense one, whose distance is the plan's own error.

Where blocks are dropped, rounding may decide over a block at the tolerance, and a file that keeps one block more than
the graph it came from is no worse. So in sparse buckets the difference in root mean square must be far below the plan's
own error; in dense ones no output may differ by more than rounding.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from sparsify.errors import ExportError, OptionError
from sparsify.exporters.capture import Captured
from sparsify.exporters.formats import Runner, runner_of

TIE_SHARE = {"cpu": 0.25, "cuda": 1.0}
"""Of the plan's own error: what ties may make of the difference, in root mean square. On CUDA a package estimates by
other kernels than the graph, on Hopper in 16 bits where the graph has eight: it may drop other blocks, but no worse."""
ROUNDING = 4096
"""Rounding units of the largest output that two orders of the same sums may differ by, through all layers."""
SECONDS = 2.0  # of timing for each length
SHORT = 64  # key length at which a first bucket without a lower end is checked, where it reaches so far


@dataclass(frozen=True)
class Check:
    """What was found at one key length.

    difference       largest difference between the file's output and the sparse graph's
    plan_error       largest difference between the file's output and the dense graph's
    difference_rms, plan_error_rms   the same in root mean square
    dense_ms, sparse_ms   median time of a call in the file's own runtime; dense: the same model exported without a plan
    """

    length: int | None
    batch: int
    bucket: str
    budget: str
    difference: float
    plan_error: float
    difference_rms: float
    plan_error_rms: float
    dense_ms: float
    sparse_ms: float


def check(captured: Captured, sparse: Runner, dense: Runner, lengths: Sequence[int] | None,
          atol: float | None, progress: Callable[[str], None]) -> tuple[Check, ...]:
    """Run a loaded file at every length. Raises ExportError where it differs from the graph, OptionError for a length
    that the program cannot have."""
    found = []
    for length in lengths_to_check(captured, lengths):
        progress(f"comparing at {'the example' if length is None else length}")
        found.append(_check(captured, sparse, dense, length, atol))
    return tuple(found)


def lengths_to_check(captured: Captured, lengths: Sequence[int] | None) -> Sequence[int | None]:
    """The lengths asked for, and one for every bucket that they leave out."""
    if captured.key_length is None:
        if lengths:
            raise OptionError(f"lengths is {list(lengths)} and no attention of the exported model has a table of "
                              "buckets: its key length is fixed, or no budget depends on it. Leave lengths out, or "
                              "give dynamic_shapes that leave the key length free.")
        return [None]
    wanted = set(lengths or ())
    for bucket in captured.buckets:
        if not any(length in bucket for length in wanted):
            short = SHORT if bucket.hi is None else min(SHORT, bucket.hi - 1)
            wanted.add(max(bucket.lo, short) if bucket.lo < SHORT else bucket.lo)
    for length in wanted:
        captured.inputs_at(length)
    return sorted(wanted)


def _check(captured: Captured, sparse: Runner, dense: Runner, length: int | None, atol: float | None) -> Check:
    args, kwargs = captured.inputs_at(length)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    graph_sparse, graph_dense = (runner_of(program.module()) for program in (captured.program, captured.dense))
    ours, theirs, exact = (call(*_copy(args), **_copy(kwargs)) for call in (sparse, graph_sparse, graph_dense))
    difference, difference_rms, largest, unit = _distance(ours, theirs)
    plan_error, plan_error_rms, _, _ = _distance(ours, exact)
    _, own_rms, _, _ = _distance(theirs, exact)
    bucket = next((b for b in captured.buckets if length is not None and length in b), None)
    allowed = ROUNDING * unit * largest if atol is None else atol
    where = f"at key length {length}" if length is not None else "at the example inputs"
    if difference > allowed and difference_rms > TIE_SHARE[tensors[0].device.type] * own_rms:
        raise ExportError(f"the written file differs from the model it was made of by {difference:.3g} {where} "
                          f"({allowed:.3g} is allowed): it was not kept. Please report this; a larger atol accepts "
                          "it.")
    times = _time(lambda: sparse(*_copy(args), **_copy(kwargs)), lambda: dense(*_copy(args), **_copy(kwargs)))
    return Check(length, len(tensors[0]) if tensors[0].dim() else 1, "all" if bucket is None else str(bucket),
                 _budgets(captured, bucket), difference, plan_error, difference_rms, plan_error_rms, times[1],
                 times[0])


def _copy(inputs: Any) -> Any:
    """Fresh inputs: a model may write into them."""
    return pytree.tree_map_only(Tensor, Tensor.clone, inputs)


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float, float, float]:
    """Largest and root mean square difference of floating outputs, their largest value, and its rounding unit.

    Raises ExportError where the outputs are not even alike.
    """
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        raise ExportError(f"the written file returns {[list(x.shape) for x in ours]} and the model "
                          f"{[list(x.shape) for x in theirs]}: it was not kept. Please report this.")
    most, squares, count, largest, unit = 0.0, 0.0, 0, 0.0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not a.numel() or not b.is_floating_point():
            continue
        gap = torch.where(a == b, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=torch.inf)
        most = max(most, float(gap.max()))
        squares, count = squares + float(gap.square().sum()), count + gap.numel()
        finite = b[b.isfinite()].abs()
        largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
        unit = max(unit, torch.finfo(b.dtype).eps)
    return most, (squares / max(1, count)) ** 0.5, largest, unit


def _budgets(captured: Captured, bucket: Any) -> str:
    if bucket is None:
        return "; ".join(dict.fromkeys(record.budget or "dense" for record in captured.records)) or "no attention"
    others = "".join(f", site {i}: {budget}" for i, budget in sorted(bucket.sites.items()))
    return f"{bucket.budget}{others}"


def _time(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call, in turns; all have run before, or run once now."""
    for call in calls[1:]:
        call()
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(samples[0]) < 3 or time.perf_counter() - start < SECONDS:
        for call, taken in zip(calls, samples, strict=True):
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(taken) for taken in samples]
