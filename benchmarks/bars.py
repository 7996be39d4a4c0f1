"""What the rows of `benchmarks/run.py` are held to: data. `figures_of` makes the figures of rows that were measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Figure

LONG = (32768, 65536, 131072)
FIELDS = {
    "kept_rate_over_cudnn": "kept-block rate over cuDNN's dense rate",
    "kept_rate_over_best_dense": "kept-block rate over the best dense rate",
    "speedup_with_selection": "selection (m=6) included, over the best dense",
    "speedup_with_selection_m2": "selection (m=2) included, over the best dense",
    "share_of_dense": "of the best dense time",
    "speedup": "over the best dense",
}
REPORTED = ">= 0"  # an issue wants it measured and sets no bar


@dataclass(frozen=True)
class Bar:
    """A field of one row, and what it must reach; `figure` names it where the fields' words do not."""

    workload: str
    length: int
    contender: str
    field: str
    bar: str
    issue: str = "kernels"
    figure: str = ""

    @property
    def name(self) -> str:
        """As figures.json has it."""
        where = "" if self.workload == "cuda_layer" else f"{self.workload}: "
        return self.figure or f"{where}{self.contender}, {self.length} keys, {FIELDS[self.field]}"


def _bars(workload: str, lengths: Iterable[int], contenders: Sequence[str], field: str, bar: str) -> list[Bar]:
    return [Bar(workload, length, contender, field, bar) for length in lengths for contender in contenders]


RATE = "kept_rate_over_cudnn"
BARS = (
    Bar("cpu_layer", 16384, "lists 0.1", "speedup", ">= 5", "line",
        "CPU op at given lists, density 0.1, 16K, over dense SDPA"),
    Bar("cpu_layer", 16384, "lists 0.1", "speedup_with_selection", ">= 4", "line",
        "CPU op with selection, density 0.1, 16K, over dense SDPA"),
    *(Bar("cpu_layer", length, "exact", "speedup", ">= 0.97", "line",
          f"CPU exact op over dense SDPA, {length} keys") for length in (2048, 4096, 8192, 16384)),
    *_bars("cpu_layer", [16384], ["lists 0.1"], "speedup_with_selection", ">= 5.5"),
    *_bars("cpu_layer", [16384], ["lists 0.25"], "speedup_with_selection", ">= 2.3"),
    *_bars("cpu_layer", (2048, 4096, 8192, 16384), ["exact"], "speedup", ">= 1.0"),
    Bar("cuda_layer", 32768, "lists 0.25", RATE, ">= 0.9", "line",
        "kept-block rate over cuDNN's dense rate, density 0.25, 32K"),
    Bar("cuda_layer", 32768, "lists 1", RATE, ">= 1.0", "line",
        "kept-block rate over cuDNN's dense rate, density 1, 32K"),
    *_bars("cuda_layer", (8192, 16384, *LONG), ["lists 1"], RATE, ">= 1.05"),
    *_bars("cuda_layer", LONG, ["lists 0.5", "lists 0.25"], RATE, ">= 1.0"),
    *_bars("cuda_layer", LONG, ["lists 0.125"], RATE, ">= 0.95"),
    *_bars("cuda_layer", [8192], ["lists 0.25"], RATE, ">= 1.0"),
    *_bars("cuda_layer", [8192], ["lists 0.125"], RATE, ">= 0.9"),
    *_bars("cuda_layer", (8192, 16384, *LONG), ["lists mixed"], RATE, ">= 0.95"),
    *(Bar("cuda_layer", length, "lists 0.1", f"speedup_with_selection{m}", f">= {bar}")
      for length, bars in zip(LONG, ((5.0, 5.5), (6.0, 6.5), (6.5, 7.5)), strict=True)
      for m, bar in zip(("", "_m2"), bars, strict=True)),
    *_bars("cuda_layer", [8192], ["selection"], "share_of_dense", "<= 0.10"),
    *_bars("cuda_layer", [8192], ["selection m=2"], "share_of_dense", "<= 0.07"),
    *_bars("cuda_layer", (16384, *LONG), ["selection"], "share_of_dense", "<= 0.06"),
    *_bars("cuda_layer", (16384, *LONG), ["selection m=2"], "share_of_dense", "<= 0.04"),
    *_bars("cuda_layer", (4096, 8192, 16384, 32768), ["exact"], "speedup", ">= 0.99"),
    # "Full attention the same within 0.05"
    *_bars("cuda_full", (8192, 32768, 131072), ["lists 1"], RATE, ">= 1.0"),
    *_bars("cuda_full", (32768, 131072), ["lists 0.5", "lists 0.25"], RATE, ">= 0.95"),
    *_bars("cuda_full", (32768, 131072), ["lists 0.125"], RATE, ">= 0.9"),
    *_bars("cuda_full", [8192], ["lists 0.25"], RATE, ">= 0.95"),
    *_bars("cuda_full", [8192], ["lists 0.125"], RATE, ">= 0.85"),
    *_bars("cuda_full", (8192, 32768, 131072), ["lists mixed"], RATE, ">= 0.9"),
    *(bar for name in ("cuda_layer_d64", "cuda_layer_d256")
      for bar in _bars(name, (8192, 32768), ["lists 1", "lists 0.25", "lists 0.125"], RATE, REPORTED)),
)


def figures_of(workload: str, rows: Sequence[dict[str, Any]], where: str, command: str) -> list[Figure]:
    """The figures that these rows decide, in the order of BARS."""
    by = {(row["length"], row["contender"]): row for row in rows}
    found = []
    for bar in BARS:
        value = by.get((bar.length, bar.contender), {}).get(bar.field) if bar.workload == workload else None
        if value is not None:
            found.append(Figure(issue=bar.issue, figure=bar.name, value=value, bar=bar.bar, unit="x", where=where,
                                command=command))
    return found


def memory_figures(memory_mb: dict[str, float], where: str, command: str) -> list[Figure]:
    """Peak memory of adaptive over dense attention on a CPU, for both issues that ask."""
    name, value = "CPU peak memory of adaptive over dense attention, 16K", memory_mb["adaptive"] / memory_mb["dense"]
    return [Figure(issue, name, value, bar, "x", where, command)
            for issue, bar in (("line", "<= 1.1"), ("kernels", "<= 1.05"))]
