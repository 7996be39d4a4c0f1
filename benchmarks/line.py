"""The issue [line], end to end: `sparsify bench` on the shipped model, and its figures.

    python -m benchmarks.line                  the default bench of this device: results/line-cpu or line-cuda
    python -m benchmarks.line --length 32768   one length, minutes on a CPU: results/line-cpu-32768
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks.figures import Figure, record
from sparsify.measurement import Side, encode, measuring, time_in_turns
from sparsify.models.loading import HELDOUT_TEXT, TINY_LM, load_model, load_tokenizer, read_text
from sparsify.plan import Plan

RESULTS = Path(__file__).with_name("results")
SPEEDUP_BARS = {16384: ">= 1.6", 32768: ">= 2.3"}
QUALITY_LENGTH = 16384


def main() -> None:
    """Measure, save, and record; the bars hold on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int)
    length = parser.parse_args().length
    name = "line-cuda" if torch.cuda.is_available() else "line-cpu"
    arguments = [] if length is None else ["--lengths", str(length)]
    out = RESULTS / (name if length is None else f"{name}-{length}")
    command = [sys.executable, "-m", "sparsify", "bench", "--json", "--out", str(out), *arguments]
    start = time.perf_counter()
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = time.perf_counter() - start
    if report["environment"]["device"] == "cpu":
        command_line = " ".join(["python -m benchmarks.line", *sys.argv[1:]])
        exact = over_exact(report["rows"][-1]["length"])
        record(*figures_of(report, exact, None if length else seconds, command_line))


def over_exact(length: int, repeats: int = 3) -> float:
    """Speed-up over `Plan.dense()`: what dropping blocks is worth by itself.

    The bench compares with torch.compile, which loses time on attention masks that the pass proves away.
    """
    model = load_model().model
    exact, sparse = Side(model), Side(model)
    sparsify.compile(exact, Plan.dense())
    sparsify.compile(sparse)
    ids = encode(read_text(HELDOUT_TEXT), load_tokenizer(TINY_LM))[None, :length]
    with measuring(model):
        for side in (exact, sparse):
            side(ids)
        exact_seconds, sparse_seconds = time_in_turns(exact, sparse, ids, repeats)
    return exact_seconds / sparse_seconds


def figures_of(report: dict[str, Any], over_exact: float, seconds: float | None, command: str) -> list[Figure]:
    """The figures of a report; `seconds` is the wall time of a default bench, `command` what made it.

    `over_exact` is the longest length's speed-up over `Plan.dense()`.
    """
    environment = report["environment"]
    where = f"{environment['device_name']}, {environment['threads']} threads"
    plan = Plan.from_dict(report["plan"])
    figures: list[Figure] = []

    def add(figure: str, value: float, bar: str, unit: str) -> None:
        figures.append(Figure("line", figure, value, bar, unit, where, command))

    for row in report["rows"]:
        length = row["length"]
        if plan.bucket_of(length).budget.is_dense:
            add(f"speed-up at {length}, dense bucket", row["speedup"], ">= 0.98", "x")
            add(f"KL at {length}, dense bucket", row["kl"], "<= 1e-6", "nats")
        if length in SPEEDUP_BARS:
            add(f"speed-up at {length}", row["speedup"], SPEEDUP_BARS[length], "x")
        if length == QUALITY_LENGTH:
            rise = 100 * (row["sparse_loss"] / row["dense_loss"] - 1)
            add(f"KL at {length}", row["kl"], "<= 0.02", "nats")
            add(f"loss rise at {length}", rise, "<= 0.5", "%")
    longest = report["rows"][-1]["length"]
    add(f"speed-up at {longest} over Plan.dense()", over_exact, SPEEDUP_BARS.get(longest, ">= 1"), "x")
    if seconds is not None:
        add("wall time of the default bench", seconds, "<= 360", "s")
    return figures


if __name__ == "__main__":
    main()
