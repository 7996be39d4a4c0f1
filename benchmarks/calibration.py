"""The issue [budgets], calibration: time and peak memory of `sparsify calibrate` from nothing, and what its gates say.

    python -m benchmarks.calibration                               the shipped model on its held-out text
    python -m benchmarks.calibration --model PATH --lengths 512,1024,2048,4096 --name smollm2
    python -m benchmarks.calibration --text prose=a.txt --text code=b.txt

Writes results/plan-NAME-DEVICE.json and records the figures. Times of shape classes that were measured on this machine
before are used as they are; the journal of an earlier run is not.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment
from sparsify.plan import Plan

WALL_BARS = {("smollm2", "cpu"): "<= 1500", ("tiny-lm", "cuda"): "<= 180"}
MEMORY_BARS = {("smollm2", "cpu"): "<= 6"}


def main() -> None:
    """Calibrate, save, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--name", default="tiny-lm", help="of the model, in results and figures")
    parser.add_argument("--lengths")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--max-error", default="0.005", help="as of sparsify calibrate")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = [*([options.model] if options.model else []), *(x for text in options.text for x in ("--text", text)),
                 *(["--lengths", options.lengths] if options.lengths else []), "--max-error", options.max_error]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sparsify", "calibrate", *arguments, "--out", str(out)], check=True)
        seconds = time.perf_counter() - start
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(out, RESULTS / f"plan-{options.name}-{device}.json")
        plan = Plan.load(out)
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    where = environment(device)["device"]
    command = " ".join(["python -m benchmarks.calibration", *sys.argv[1:]]).replace(str(options.model), "MODEL")
    record(*figures_of(plan, options.name, device, seconds, gigabytes, where, command))


def figures_of(plan: Plan, name: str, device: str, seconds: float, gigabytes: float, where: str,
               command: str) -> list[Figure]:
    """Time, memory, and per length what held-out documents said of the budget: KL and loss where it is sparse."""
    figures: list[Figure] = []

    def add(figure: str, value: float, bar: str, unit: str) -> None:
        figures.append(Figure("budgets", f"calibrate {name}: {figure}", value, bar, unit, where, command))

    lengths = sorted(gate.length for bucket in plan.buckets for gate in bucket.gates)
    span = f"{lengths[0]} to {lengths[-1]}"
    add(f"wall time, {span}", seconds, WALL_BARS.get((name, device), ">= 0"), "s")
    add(f"peak memory, {span}", gigabytes, MEMORY_BARS.get((name, device), ">= 0"), "GiB")
    for bucket in plan.buckets:
        for gate in bucket.gates:
            if bucket.budget.is_dense:
                continue
            add(f"KL at {gate.length}, upper bound", gate.upper, "<= 0.01", "nats")
            if gate.rise is not None and gate.rise_upper is not None:
                add(f"loss rise at {gate.length}", gate.rise, "<= 0.3", "%")
                add(f"loss rise at {gate.length}, upper bound", gate.rise_upper, "<= 0.5", "%")
            add(f"density at {gate.length}", gate.density, ">= 0", "")
            add(f"share of attention's time saved at {gate.length}", gate.gain, ">= 0.03", "")
    return figures


if __name__ == "__main__":
    main()
