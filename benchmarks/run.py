"""Time the workloads of the attention ops: `python -m benchmarks.run cpu_layer`.

All contenders of one length run in one process, interleaved round by round, so that a drifting clock hits everybody
alike; times are medians over rounds. Every time has its relative error beside it, and a speed is always against the
fastest dense kernel of the same rounds. Writes JSON and a table to benchmarks/results/, figures to
benchmarks/figures.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Figure, record
from benchmarks.workloads import BUDGET, TOLERANCE, WORKLOADS, Call, Layer, Workload
from sparsify import ops
from sparsify.measurement import checkout_commit, device_name

RESULTS = Path(__file__).parent / "results"
KERNEL_BARS = (
    *((length, "lists 1", "kept_rate_over_cudnn", ">= 1.05") for length in (8192, 16384, 32768, 65536, 131072)),
    *((length, f"lists {density}", "kept_rate_over_cudnn", ">= 1.0")
      for length in (32768, 65536, 131072) for density in (0.5, 0.25)),
    *((length, "lists 0.125", "kept_rate_over_cudnn", ">= 0.95") for length in (32768, 65536, 131072)),
    (8192, "lists 0.25", "kept_rate_over_cudnn", ">= 1.0"),
    (8192, "lists 0.125", "kept_rate_over_cudnn", ">= 0.9"),
    *((length, "lists 0.1", f"speedup_with_selection{m}", f">= {bar}")
      for length, bars in ((32768, (5.0, 5.5)), (65536, (6.0, 6.5)), (131072, (6.5, 7.5)))
      for m, bar in zip(("", "_m2"), bars, strict=True)),
    (8192, "selection", "share_of_dense", "<= 0.10"), (8192, "selection m=2", "share_of_dense", "<= 0.07"),
    *((length, name, "share_of_dense", f"<= {bar}") for length in (16384, 32768, 65536, 131072)
      for name, bar in (("selection", 0.06), ("selection m=2", 0.04))),
    *((length, "exact", "speedup", ">= 0.99") for length in (4096, 8192, 16384, 32768)),
)
"""Length, contender, field of its row, bar: what cuda_layer is held to."""
QUEUE_CYCLES = 1_500_000  # about a millisecond: by then the host has launched the call, as it has inside a model


def run(workload: Workload, lengths: tuple[int, ...], rounds: int, budget_ms: float) -> list[dict[str, Any]]:
    """Rows of the table: one for every length and contender."""
    rows = []
    for length in lengths:
        layer = Layer(workload, length)
        dense: dict[str, Call] = layer.dense()
        contenders: dict[str, Call] = {**dense, "exact": layer.exact(), "selection": layer.selection(),
                                       "selection m=2": layer.selection(2)}
        lists = {density: layer.lists(density) for density in workload.densities}
        lists_of = {}
        for density, kept in lists.items():
            lists_of[f"lists {density:g}"] = kept
            contenders[f"lists {density:g}"] = layer.sparse(kept)
        errors, broken = {}, {}
        for name, call in contenders.items():
            try:
                out = call()
            except RuntimeError as error:  # a rival that does not run on this card or at this length
                if name not in dense:
                    raise
                broken[name] = str(error).splitlines()[0]
                continue
            if "selection" not in name:
                errors[name] = layer.relative_error(out, lists_of.get(name))
        for name in broken:
            print(f"{length}: {name} does not run here: {broken[name]}", file=sys.stderr)
            del contenders[name], dense[name]
        times = interleave(contenders, workload.device, rounds, budget_ms)
        best = min(times[name] for name in dense)
        best_name = min(dense, key=times.__getitem__)
        for name, ms in times.items():
            kept_share = layer.kept_share(lists_of.get(name)) if "selection" not in name else None
            row = {"length": length, "contender": name, "ms": ms, "best_dense": best_name, "speedup": best / ms,
                   "share_of_dense": ms / best, "relative_error": errors.get(name)}
            if name in lists_of:
                assert kept_share is not None
                row["kept_share"] = kept_share
                row["kept_rate_over_best_dense"] = kept_share * best / ms
                if "cudnn" in times:
                    row["kept_rate_over_cudnn"] = kept_share * times["cudnn"] / ms
                row["speedup_with_selection"] = best / (ms + times["selection"])
                row["speedup_with_selection_m2"] = best / (ms + times["selection m=2"])
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
    return rows


def interleave(contenders: dict[str, Call], device: str, rounds: int, budget_ms: float) -> dict[str, float]:
    """Median milliseconds of every contender; each round runs them all, every second one in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    repeats = {name: max(1, min(20, int(budget_ms / _time(call, device, 1)))) for name, call in contenders.items()}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
        for name in order:
            times[name].append(_time(contenders[name], device, repeats[name]))
    return {name: statistics.median(x) for name, x in times.items()}


def _time(call: Call, device: str, repeats: int) -> float:
    """Milliseconds a call, median over repeats; on CUDA with a cold second-level cache, launches queued ahead."""
    samples = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
        return statistics.median(samples)
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in events:
        flush.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events)


def peak_memory(workload: Workload, length: int) -> dict[str, float]:
    """Megabytes that a fresh process needs beyond its imports, for dense SDPA and for adaptive attention (CPU)."""
    peaks = {}
    for side in ("dense", "adaptive"):
        command = [sys.executable, "-m", "benchmarks.run", workload.name, "--length", str(length), "--memory", side]
        peaks[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


def measure_memory(workload: Workload, length: int, side: str) -> float:
    """Megabytes between the imports' peak and the peak of one call, inputs included; run in a fresh process."""
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # thread pools and libraries are loaded before the count
    small = Layer(workload, 256)
    calls = {"dense": lambda layer: layer.dense()["sdpa"](), "adaptive": _adaptive}
    calls[side](small)
    before = _peak_kilobytes()
    calls[side](Layer(workload, length))
    return (_peak_kilobytes() - before) / 1024


def _peak_kilobytes() -> int:
    """High-water mark of this process; `ru_maxrss` would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _adaptive(layer: Layer) -> torch.Tensor:
    return ops.adaptive_attention(*layer.qkv, *layer.arguments, TOLERANCE, BUDGET.max_density, BUDGET.sinks,
                                  BUDGET.local, BUDGET.singles, 0, ops.VERSION)


def environment(device: str) -> dict[str, str]:
    """Where the numbers were measured."""
    name = device_name(torch.device(device))
    facts = {"device": name if device == "cuda" else f"{name}, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "python": platform.python_version(), "commit": checkout_commit() or "unknown"}
    if device == "cuda":
        import triton

        facts |= {"triton": triton.__version__, "cudnn": str(torch.backends.cudnn.version())}
    return facts


def figures(workload: Workload, rows: list[dict[str, Any]], memory: dict[str, float] | None, where: str,
            command: str) -> list[Figure]:
    """The numbers that the project holds itself to."""
    by = {(row["length"], row["contender"]): row for row in rows}
    common = {"where": where, "command": command}
    found = []

    def add(figure: str, key: tuple[int, str], field: str, bar: str, issue: str = "line") -> None:
        if key in by and field in by[key]:
            found.append(Figure(issue=issue, figure=figure, value=by[key][field], bar=bar, unit="x", **common))

    if workload.name == "cpu_layer":
        add("CPU op at given lists, density 0.1, 16K, over dense SDPA", (16384, "lists 0.1"), "speedup", ">= 5")
        add("CPU op with selection, density 0.1, 16K, over dense SDPA", (16384, "lists 0.1"), "speedup_with_selection",
            ">= 4")
        for length in (2048, 4096, 8192, 16384):
            add(f"CPU exact op over dense SDPA, {length} keys", (length, "exact"), "speedup", ">= 0.97")
    if workload.name == "cuda_layer":
        add("kept-block rate over cuDNN's dense rate, density 0.25, 32K", (32768, "lists 0.25"), "kept_rate_over_cudnn",
            ">= 0.9")
        add("kept-block rate over cuDNN's dense rate, density 1, 32K", (32768, "lists 1"), "kept_rate_over_cudnn",
            ">= 1.0")
        for length, contender, field, bar in KERNEL_BARS:
            short = {"kept_rate_over_cudnn": "kept-block rate over cuDNN's dense rate",
                     "speedup_with_selection": "selection (m=6) included, over the best dense",
                     "speedup_with_selection_m2": "selection (m=2) included, over the best dense",
                     "share_of_dense": "of the best dense time", "speedup": "over the best dense"}[field]
            add(f"{contender}, {length} keys, {short}", (length, contender), field, bar, "kernels")
    if memory is not None:
        found.append(Figure(issue="line", figure="CPU peak memory of adaptive over dense attention, 16K",
                            value=memory["adaptive"] / memory["dense"], bar="<= 1.1", unit="x", **common))
    return found


def table(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The rows as Markdown."""
    head = ["length", "contender", "ms", "over best dense", "with selection (m=6, m=2)", "kept share",
            "kept rate / best dense", "relative error"]
    lines = [", ".join(f"{key} {value}" for key, value in facts.items()), "", "| " + " | ".join(head) + " |",
             "|---" * len(head) + "|"]
    for row in rows:
        selected = f"{row['speedup_with_selection']:.2f}, {row['speedup_with_selection_m2']:.2f}" \
            if "kept_share" in row else ""
        cells = [str(row["length"]), row["contender"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}", selected,
                 f"{row['kept_share']:.3f}" if "kept_share" in row else "",
                 f"{row['kept_rate_over_best_dense']:.2f}" if "kept_share" in row else "",
                 f"{row['relative_error']:.1e}" if row["relative_error"] is not None else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    return f"{row['length']:>7} {row['contender']:<16} {row['ms']:>10.3f} ms {row['speedup']:>6.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--length", type=int, action="append", help="instead of the workload's lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=200, help="time for one contender in one round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", choices=("dense", "adaptive"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    lengths = tuple(arguments.length or workload.lengths)
    if arguments.memory:
        print(measure_memory(workload, lengths[0], arguments.memory))
        return
    with torch.inference_mode():
        rows = run(workload, lengths, arguments.rounds, arguments.budget_ms)
    memory = peak_memory(workload, 16384) if workload.device == "cpu" and 16384 in lengths else None
    facts = environment(workload.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / workload.name
    command = f"python -m benchmarks.run {workload.name}"
    target.with_suffix(".json").write_text(
        json.dumps({"environment": facts, "command": command, "memory_mb": memory, "rows": rows}, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(rows, facts))
    print(table(rows, facts))
    record(*figures(workload, rows, memory, facts["device"], command))


if __name__ == "__main__":
    main()
