"""Time an exported file in its own runtime, on random inputs made by what the file says of itself."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsify.exporters.check import SHORT
from sparsify.exporters.contents import Contents
from sparsify.exporters.formats import format_of

SECONDS = 2.0  # for each length, and at least three calls


@dataclass(frozen=True)
class Timing:
    """Median time of a call at one key length."""

    length: int | None
    batch: int
    bucket: str
    ms: float


def time_file(path: str | Path, lengths: Sequence[int] | None = None, batch: int = 1,
              progress: Callable[[str], None] = lambda line: None) -> tuple[Timing, ...]:
    """Load a file that `sparsify.export` wrote and time it. `lengths` None: one for each bucket.

    Raises ExportError for a file that is none, OptionError for a length that it does not take.
    """
    form = format_of(Path(path))
    contents: Contents = form.describe(Path(path))
    wanted: Sequence[int | None] = lengths or [max(lo, min(SHORT, (hi or SHORT + 1) - 1))
                                               for lo, hi in contents.buckets] or [None]
    for length in wanted:
        contents.random_inputs(length, batch)
    run = form.load(Path(path))
    found = []
    for length in wanted:
        progress(f"timing {'the example' if length is None else length}")
        args, kwargs = contents.random_inputs(length, batch)
        run(*args, **kwargs)
        samples: list[float] = []
        start = time.perf_counter()
        while len(samples) < 3 or time.perf_counter() - start < SECONDS:
            begin = time.perf_counter()
            run(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            samples.append(1e3 * (time.perf_counter() - begin))
        bucket = next((f"[{lo}, {'inf' if hi is None else hi})" for lo, hi in contents.buckets
                       if length is not None and lo <= length and (hi is None or length < hi)), "all")
        found.append(Timing(length, batch, bucket, statistics.median(samples)))
    return tuple(found)
