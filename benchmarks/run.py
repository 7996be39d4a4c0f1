"""Time the workloads of the attention ops: `python -m benchmarks.run cuda_layer cuda_full`, or a device for all of its.

All contenders of one length run in one process, interleaved round by round, so that a drifting clock hits everybody
alike; times are medians over rounds. Every time has its relative error beside it, and a speed is always against the
fastest dense kernel of the same rounds; so is the roof, a matrix product. After every length results/NAME.json, .md and
the charts are written whole, and the length's figures go to figures.json: a run that is killed keeps what it has. A
later run on the same machine and clean commit adds its lengths to those of the file.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.bars import figures_of, memory_figures
from benchmarks.charts import Series, draw
from benchmarks.clock import Call, interleave
from benchmarks.dense import dense_calls
from benchmarks.figures import record
from benchmarks.records import RESULTS, environment
from benchmarks.roofline import Roof, roof_calls, tflops
from benchmarks.workloads import WORKLOADS, Layer, Workload

WRONG = 0.05  # relative error from which a rival does not compute the same attention


def run_length(workload: Workload, length: int, rounds: int, budget_ms: float,
               skip: Collection[str] = ()) -> list[dict[str, Any]]:
    """Rows of the table: one for every contender at one length. `skip` names dense kernels to leave out."""
    layer = Layer(workload, length)
    dense = dense_calls(layer, skip)
    selections = {_name_of_selection(workload, m): layer.selection(m) for m in workload.singles}
    lists_of = {f"lists {density if isinstance(density, str) else f'{density:g}'}": layer.lists(density)
                for density in workload.densities}
    contenders: dict[str, Call] = {**dense, "exact": layer.exact(), **selections,
                                   **{name: layer.sparse(kept) for name, kept in lists_of.items()}}
    errors, broken = {}, {}
    for name, call in contenders.items():
        try:
            out = call()
            if name not in selections:
                errors[name] = layer.relative_error(out, lists_of.get(name))
        except Exception as error:  # a rival that does not run on this card or at this length; compilers raise anything
            if name not in dense:
                raise
            broken[name] = str(error).splitlines()[0]
            continue
        if name in dense and not errors[name] < WRONG:
            broken[name] = f"its relative error is {errors[name]:.2g}"
        del out
    for name, why in broken.items():
        print(f"{length}: {name} does not run here: {why}", file=sys.stderr)
        del contenders[name], dense[name]
    roof = roof_calls(workload.device, workload.dtype)
    for call in roof.values():
        call()
    times = interleave({**contenders, **roof}, workload.device, rounds, budget_ms, rivals=dense)
    ceiling = Roof.of_times(times.pop("product"), times.pop("copy"), workload.device)
    rows = rows_of(times, list(dense), {name: layer.kept_share(kept) for name, kept in lists_of.items()}, errors,
                   [_name_of_selection(workload, m) for m in workload.singles], layer.flop, layer.bytes, ceiling)
    return [{"length": length, **row} for row in rows]


def rows_of(times: dict[str, float], dense: list[str], kept_shares: dict[str, float], errors: dict[str, float],
            selections: list[str], flop: float, moved: int, roof: Roof) -> list[dict[str, Any]]:
    """From times to what is said of them: the arithmetic of every row."""
    best_name = min(dense, key=times.__getitem__)
    best, rows = times[best_name], []
    for name, ms in times.items():
        row: dict[str, Any] = {"contender": name, "ms": ms, "best_dense": best_name, "speedup": best / ms,
                               "share_of_dense": ms / best, "relative_error": errors.get(name)}
        if "cudnn" in times:
            row["share_of_cudnn"] = ms / times["cudnn"]
        if name not in selections:
            share = kept_shares.get(name, 1.0)
            row["tflops"] = tflops(share * flop, ms)
            row["flop_per_byte"] = share * flop / moved
            row["share_of_roof"] = row["tflops"] / roof.attainable(row["flop_per_byte"])
            row["product_tflops"], row["copy_gbs"] = roof.product_tflops, roof.copy_gbs
        if name in kept_shares:
            row["kept_share"] = kept_shares[name]
            row["kept_rate_over_best_dense"] = kept_shares[name] * best / ms
            if "cudnn" in times:
                row["kept_rate_over_cudnn"] = kept_shares[name] * times["cudnn"] / ms
            for selection in selections:
                suffix = selection.removeprefix("selection").replace(" m=", "_m")
                row[f"speedup_with_selection{suffix}"] = best / (ms + times[selection])
        rows.append(row)
    return rows


def save(workload: Workload, rows: list[dict[str, Any]], facts: dict[str, str], command: str, out: Path,
         skip: Collection[str] = (), memory: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Write JSON, table and charts, together with what the same commit measured here at other lengths."""
    target = out / f"{workload.name}.json"
    before = records.read_json(target)
    if records.may_join(before, facts):
        measured = {row["length"] for row in rows}
        rows = [row for row in before["rows"] if row["length"] not in measured] + rows
        memory = memory or before.get("memory_mb")
    rows = sorted(rows, key=lambda row: row["length"])
    records.write_json(target, {"environment": facts, "command": command, "skipped": sorted(skip), "memory_mb": memory,
                                "rows": rows})
    records.write_text(target.with_suffix(".md"), table(rows, facts))
    for name, svg in charts(workload, rows, facts["device"]).items():
        records.write_text(out / f"{workload.name}_{name}.svg", svg)
    return rows


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
    calls = {"dense": lambda layer: dense_calls(layer)["sdpa"](), "adaptive": lambda layer: layer.adaptive()()}
    calls[side](small)
    before = _peak_kilobytes()
    calls[side](Layer(workload, length))
    return (_peak_kilobytes() - before) / 1024


def _peak_kilobytes() -> int:
    """High-water mark of this process; `ru_maxrss` would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def table(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The rows as Markdown."""
    head = ["length", "contender", "ms", "over best dense", "of cuDNN's time", "with selection (m=6, m=2)",
            "kept share", "kept rate / cuDNN", "kept rate / best dense", "TFLOP/s", "of the roof", "relative error"]
    lines = []
    for row in rows:
        selected = [row[name] for name in ("speedup_with_selection", "speedup_with_selection_m2") if name in row]
        lines.append([str(row["length"]), row["contender"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}",
                      _cell(row, "share_of_cudnn", ".3f"), ", ".join(f"{x:.2f}" for x in selected),
                      _cell(row, "kept_share", ".3f"), _cell(row, "kept_rate_over_cudnn", ".2f"),
                      _cell(row, "kept_rate_over_best_dense", ".2f"), _cell(row, "tflops", ".1f"),
                      _cell(row, "share_of_roof", ".2f"), _cell(row, "relative_error", ".1e")])
    return records.markdown(head, lines, facts)


def charts(workload: Workload, rows: list[dict[str, Any]], where: str) -> dict[str, str]:
    """Rate and speed-up against length, and the roofline; by the end of the file's name."""
    rated = [row for row in rows if "tflops" in row]
    names = list(dict.fromkeys(row["contender"] for row in rated))
    roof = {row["length"]: row["product_tflops"] for row in rated}

    def of(name: str, x: str, y: str) -> list[tuple[float, float]]:
        return [(row[x], row[y]) for row in rows if row["contender"] == name and y in row]

    rate = [Series("matrix product", list(roof.items()), dashed=True), *(Series(x, of(x, "length", "tflops"))
                                                                         for x in names)]
    speed = [Series(name, of(name, "length", "speedup_with_selection")) for name in names if name.startswith("lists")]
    speed.append(Series("best dense", [(length, 1.0) for length in roof], dashed=True))
    points = [Series(name, of(name, "flop_per_byte", "tflops"), joined=False) for name in names]
    reach = [row["flop_per_byte"] for row in rated]
    ceiling = Roof(max(roof.values()), max(row["copy_gbs"] for row in rated))
    ridge = ceiling.product_tflops * 1e3 / ceiling.copy_gbs
    edges = sorted({min(*reach, ridge / 2), ridge, max(*reach, ridge * 2)})
    line = Series("roof", [(x, ceiling.attainable(x)) for x in edges], dashed=True)
    title = f"{workload.name}, {where}"
    return {
        "rate": draw(rate, title=f"Rate of kept work: {title}", x="keys", y="TFLOP/s", log_x=True),
        "speedup": draw(speed, title=f"Selection included: {title}", x="keys", y="times the best dense", log_x=True),
        "roofline": draw([line, *points], title=f"Roofline: {title}", x="FLOP per compulsory byte", y="TFLOP/s",
                         log_x=True, log_y=True),
    }


def _cell(row: dict[str, Any], field: str, spec: str) -> str:
    return "" if row.get(field) is None else format(row[field], spec)


def _name_of_selection(workload: Workload, singles: int) -> str:
    return "selection" if singles == workload.singles[0] else f"selection m={singles}"


def _line(row: dict[str, Any]) -> str:
    return f"{row['length']:>7} {row['contender']:<16} {row['ms']:>10.3f} ms {row['speedup']:>6.2f}x"


def main() -> None:
    """Measure every workload named, length by length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="+", choices=[*WORKLOADS, "cuda", "cpu"])
    parser.add_argument("--length", type=int, action="append", help="instead of the workload's lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=200, help="time for one contender in one round")
    parser.add_argument("--skip", default="", help="dense kernels to leave out, with commas between: flex,efficient")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no length after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", choices=("dense", "adaptive"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = [w for w in WORKLOADS.values() if w.name in arguments.workload or w.device in arguments.workload]
    if arguments.memory:
        print(measure_memory(chosen[0], arguments.length[0], arguments.memory))
        return
    skip = [name for name in arguments.skip.split(",") if name]
    start = time.perf_counter()
    failed = [failure for workload in chosen
              for failure in measure(workload, tuple(arguments.length or workload.lengths), arguments.rounds,
                                     arguments.budget_ms, skip, arguments.out, start + arguments.seconds)]
    if failed:
        sys.exit("not measured: " + ", ".join(failed))


def measure(workload: Workload, lengths: tuple[int, ...], rounds: int, budget_ms: float, skip: Collection[str],
            out: Path, until: float = float("inf")) -> list[str]:
    """Measure, save and record one workload; what failed, or was not begun before `until` on `time.perf_counter`."""
    facts, command = environment(workload.device), f"python -m benchmarks.run {workload.name}"
    rows: list[dict[str, Any]] = []
    failed = []
    for length in lengths:
        try:
            if time.perf_counter() > until:
                raise TimeoutError("no time was left")
            with torch.inference_mode():
                measured = run_length(workload, length, rounds, budget_ms, skip)
        except Exception as error:  # the lengths and workloads that follow are worth as much as before
            print(f"{workload.name}, {length} keys: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(f"{workload.name} at {length}")
            continue
        rows += measured
        save(workload, rows, facts, command, out, skip)
        for row in measured:
            print(_line(row), file=sys.stderr, flush=True)
        record(*figures_of(workload.name, measured, facts["device"], command))
        if workload.device == "cuda":
            torch.cuda.empty_cache()
    if workload.device == "cpu" and 16384 in lengths:
        memory = peak_memory(workload, 16384)
        save(workload, rows, facts, command, out, skip, memory)
        record(*memory_figures(memory, facts["device"], command))
    return failed


if __name__ == "__main__":
    main()
