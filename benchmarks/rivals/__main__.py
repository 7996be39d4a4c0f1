"""Time rivals and ours on the same inputs, beside the error of each: `python -m benchmarks.rivals`.

    python -m benchmarks.rivals dump --model SMOLLM2 --length 8192 --layers 10,20 --to smollm2.pt
    python -m benchmarks.rivals run --sources FOLDER --activations smollm2.pt --activations tiny-lm.pt

Sources are the rivals' own, unmodified, one folder each (`sources.py` says which); SPARSIFY_RIVALS names the folder
too. A rival that is absent or fails is listed with the reason. First every rival is tried once in a process of its own,
all at the same time: that compiles its kernels into the caches on disk, and one that brings the device down is left
out. Then all contenders of a case run interleaved in one process. Writes rivals.json and rivals.md, after every case.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import interleave
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment, write_json, write_text
from benchmarks.rivals import methods
from benchmarks.rivals.activations import capture, read, save
from benchmarks.rivals.kernels import KERNELS, Case, Shape
from benchmarks.rivals.methods import METHODS, Activations, time_at_error
from benchmarks.rivals.sources import Absent, first_line, load, origins
from sparsify.models.loading import HELDOUT_TEXT

ERRORS = (0.02, 0.05, 0.1, 0.2)
WRONG = 0.05  # relative error from which a kernel does not compute the same attention
WARM_CALLS = 3  # compiled parts record their CUDA graph at the third call
Call = Callable[[], Tensor]


@dataclass
class Results:
    """What is written to rivals.json."""

    facts: dict[str, str]
    kernels: list[dict[str, Any]] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / "rivals.json", vars(self))
        write_text(folder / "rivals.md", table(self))


@dataclass(frozen=True)
class Options:
    """How long to measure, and with what."""

    sources: Path | None
    device: str = "cuda"
    rounds: int = 3
    budget_ms: float = 60  # for one contender in one round


def run_kernels(case: Case, options: Options, results: Results, names: list[str]) -> None:
    """All kernels that know the mask of `case`, interleaved; rows go to `results`."""
    case = replace(case)  # what it keeps goes when this returns
    mask = "causal" if case.causal else "full"
    contenders: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for name in names:
        kernel = KERNELS[name]
        if mask not in kernel.masks:
            continue
        try:
            call = kernel.prepare(case, load(kernel.source, options.sources))
            error = case.relative_error(call())
            if not error < WRONG:
                raise ArithmeticError(f"relative error {error:.2g}: not the same attention")
            errors[name], contenders[name] = error, call
        except Exception as why:  # a stranger's code may raise anything; the reason goes into the results
            results.absent[f"kernels: {name}, {mask} {case.length}, {case.density:g}"] = first_line(why)
    times = interleave(contenders, options.device, options.rounds, options.budget_ms) if options.rounds else {}
    for name, ms in times.items():
        row = {"length": case.length, "mask": mask, "density": case.density, "kept_share": case.kept_share,
               "kernel": name, "ms": ms, "tflops": case.flops / ms / 1e9, "relative_error": errors[name]}
        if "ours" in times:
            row["over_ours"] = ms / times["ours"]
        results.kernels.append(row)
        print(f"{case.length:>7} {mask:<6} {case.density:<5g} {name:<14} {ms:>9.3f} ms {row['tflops']:>6.0f} TFLOP/s "
              f"error {errors[name]:.1e}", file=sys.stderr, flush=True)


def run_methods(x: Activations, options: Options, results: Results, names: list[str]) -> None:
    """All settings of all methods and the dense kernels on one input, interleaved; rows go to `results`."""
    contenders: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}

    def enter(label: str, method: str, call: Call, **facts: Any) -> None:
        for _ in range(WARM_CALLS if options.device == "cuda" else 1):
            out = call()
        error = x.relative_error(out)
        if not isfinite(error):
            raise ArithmeticError("its output is not finite")
        rows[label] = {"input": x.name, "length": x.length, "method": method, "relative_error": error, **facts}
        contenders[label] = call

    for label, call in methods.dense(x).items():
        try:
            enter(label, label, call, density=1.0)
        except (RuntimeError, ArithmeticError) as error:
            results.absent[f"methods: {label}, {x.name}"] = first_line(error)
    for name in names:
        method = METHODS[name]
        for setting in method.settings:
            try:
                module = load(method.source, options.sources)
                density = method.density(x, module, setting)
                enter(f"{name} {setting:g}", name, partial(method.run, x, module, setting), density=density,
                      knob=method.knob, setting=setting)
            except Exception as error:  # as above
                results.absent[f"methods: {name} {setting:g}, {x.name}"] = first_line(error)
                if isinstance(error, Absent):
                    break
    times = interleave(contenders, options.device, options.rounds, options.budget_ms) if options.rounds else {}
    for label, ms in times.items():
        results.methods.append({**rows[label], "ms": ms})
        print(f"{x.length:>7} {label:<22} density {rows[label]['density']:.3f} {ms:>9.3f} ms "
              f"error {rows[label]['relative_error']:.1e}", file=sys.stderr, flush=True)


def try_alone(contenders: list[tuple[str, str]], arguments: list[str], seconds: float,
              at_once: int) -> dict[tuple[str, str], str]:
    """Run every (part, name) once, each in a process of its own; why those failed that did."""
    environ = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # else every process starts one for every core

    def attempt(contender: tuple[str, str]) -> str | None:
        command = [sys.executable, "-m", "benchmarks.rivals", "run", *arguments, "--try", *contender]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ)
        except subprocess.TimeoutExpired:
            return f"not through its first calls within {seconds:g} s"
        lines = (done.stdout + done.stderr).strip().splitlines()
        return None if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")

    with ThreadPoolExecutor(at_once) as pool:
        reasons = zip(contenders, pool.map(attempt, contenders), strict=True)
        return {contender: why for contender, why in reasons if why is not None}


def equal_error(rows: list[dict[str, Any]], error: float) -> dict[str, float]:
    """Milliseconds of every method at this error, where it gets there."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["method"], []).append((row["relative_error"], row["ms"]))
    at = {name: time_at_error(of, error) for name, of in points.items()}
    return {name: ms for name, ms in at.items() if ms is not None}


def table(results: Results) -> str:
    """The results as Markdown."""
    lines = ["# Rivals", "", ", ".join(f"{key} {value}" for key, value in results.facts.items()), ""]
    if results.kernels:
        lines += ["## Kernels alone", "Identical random lists of 128 x 128 blocks, bf16; times over ours in brackets, "
                  "above 1 is slower than ours. Relative error against float64 over the same pairs.", ""]
        for mask in ("causal", "full"):
            lines += _kernel_lines([row for row in results.kernels if row["mask"] == mask], mask)
        lines += [f"- {name}: {kernel.geometry}" for name, kernel in KERNELS.items()] + [""]
    if results.methods:
        lines += ["## Whole methods", "Selection included. Error: |out - dense| / |dense|. At equal error: "
                  "a method's least time for at most that error, interpolated between its settings; in brackets that "
                  "time over the better of ours.", ""]
        for name in dict.fromkeys(row["input"] for row in results.methods):
            lines += _method_lines([row for row in results.methods if row["input"] == name], name)
        lines += [f"- {name}: {method.knob}{'; ' if method.note else ''}{method.note}"
                  for name, method in METHODS.items()] + [""]
    lines += ["## Sources", *(f"- {name}: {text}" for name, text in results.origins.items()), ""]
    if results.absent:
        lines += ["## Absent", *(f"- {name}: {why}" for name, why in results.absent.items()), ""]
    return "\n".join(lines)


def _kernel_lines(rows: list[dict[str, Any]], mask: str) -> list[str]:
    names = [name for name in KERNELS if any(row["kernel"] == name for row in rows)]
    if not rows:
        return []
    worst = {name: max(row["relative_error"] for row in rows if row["kernel"] == name) for name in names}
    lines = [f"| {mask}: length | kept | " + " | ".join(f"{name} ms" for name in names) + " |",
             "|---" * (len(names) + 2) + "|"]
    for key in dict.fromkeys((row["length"], row["density"]) for row in rows):
        of = {row["kernel"]: row for row in rows if (row["length"], row["density"]) == key}
        share = next(iter(of.values()))["kept_share"]
        cells = [_cell(of[name]["ms"], of[name].get("over_ours")) if name in of else "" for name in names]
        lines.append(f"| {key[0]} | {share:.3f} | " + " | ".join(cells) + " |")
    return [*lines, "| largest error | | " + " | ".join(f"{worst[name]:.1e}" for name in names) + " |", ""]


def _method_lines(rows: list[dict[str, Any]], name: str) -> list[str]:
    present = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"### {name}", "", "| error at most | " + " | ".join(f"{method} ms" for method in present) + " |",
             "|---" * (len(present) + 1) + "|"]
    for error in ERRORS:
        times = equal_error(rows, error)
        ours = min((ms for method, ms in times.items() if method.startswith("ours")), default=None)
        cells = [_cell(times[method], ours and times[method] / ours) if method in times else "" for method in present]
        lines.append(f"| {error:g} | " + " | ".join(cells) + " |")
    lines += ["", "| method | setting | density | error | ms |", "|---|---|---|---|---|"]
    for row in rows:
        setting = f"{row['knob']} {row['setting']:g}" if "knob" in row else ""
        lines.append(f"| {row['method']} | {setting} | {row['density']:.3f} | {row['relative_error']:.1e} | "
                     f"{row['ms']:.3f} |")
    return [*lines, ""]


def _cell(ms: float, over: float | None) -> str:
    return f"{ms:.3f}" + (f" ({over:.2f})" if over is not None else "")


def ratios(results: Results) -> dict[str, dict[str, float]]:
    """Every rival's time over ours: by what is compared, then by where."""
    found: dict[str, dict[str, float]] = {}
    for row in results.kernels:
        if row["kernel"] != "ours" and "over_ours" in row:
            of = found.setdefault(f"kernel of {row['kernel']}, same lists", {})
            of[f"{row['mask']} {row['length']}, {row['density']:g}"] = row["over_ours"]
    for name in dict.fromkeys(row["input"] for row in results.methods):
        rows = [row for row in results.methods if row["input"] == name]
        for error in ERRORS:
            times = equal_error(rows, error)
            ours = [ms for method, ms in times.items() if method.startswith("ours")]
            for method, ms in times.items():
                if ours and not method.startswith("ours"):
                    of = found.setdefault(f"{method}, equal error, {name}", {})
                    of[f"error {error:g}"] = ms / min(ours)
    return found


def summary(results: Results) -> list[str]:
    """One line for everything compared: how far ours is ahead."""
    return [f"{what}: {', '.join(f'{ratio:.2f} at {where}' for where, ratio in of.items())}"
            for what, of in ratios(results).items()]


def figures(results: Results) -> list[Figure]:
    """The least ratio of everything compared."""
    command = "python -m benchmarks.rivals run"
    return [Figure("kernels", f"time over ours, the least: {what}", min(of.values()), ">= 1", "x",
                   results.facts["device"], command) for what, of in ratios(results).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dump = commands.add_parser("dump", help="capture activations of a model into a file")
    dump.add_argument("--model", help="instead of the shipped model: folder, GGUF file or cached id")
    dump.add_argument("--text", type=Path, default=HELDOUT_TEXT)
    dump.add_argument("--length", type=int, required=True)
    dump.add_argument("--layers", help="numbers with commas between; default all")
    dump.add_argument("--to", type=Path, required=True)
    run = commands.add_parser("run", help="time everybody")
    run.add_argument("--sources", type=Path, default=os.environ.get("SPARSIFY_RIVALS"))
    run.add_argument("--activations", type=Path, action="append", default=[])
    run.add_argument("--length", type=int, action="append", help="of kernels alone; default 8192 and 32768")
    run.add_argument("--density", type=float, action="append", help="of kernels alone; default 0.5, 0.25, 0.125, 0.1")
    run.add_argument("--only", action="append", help="contenders, by name; default all")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--budget-ms", type=float, default=60, help="time for one contender in one round")
    run.add_argument("--try-seconds", type=float, default=240, help="for one contender's first calls")
    run.add_argument("--at-once", type=int, default=8, help="contenders that are tried at the same time; 0: none is")
    run.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more after so many")
    run.add_argument("--out", type=Path, default=RESULTS)
    run.add_argument("--try", dest="attempt", nargs=2, metavar=("PART", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.command == "dump":
        layers = tuple(map(int, arguments.layers.split(","))) if arguments.layers else None
        save(capture(arguments.model, arguments.text, arguments.length, layers, device), arguments.to)
        return
    with torch.no_grad():  # not inference mode: compiled parts of rivals record CUDA graphs
        _run(arguments, device)


def _run(arguments: argparse.Namespace, device: str) -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = 64
    # Compiled parts are specialised to every shape and knob: the fastest they can be, as if there were no other.
    config.automatic_dynamic_shapes, config.specialize_float = False, True
    shape = Shape() if device == "cuda" else Shape(4, 2, 64, torch.float32, "cpu")
    cases = [Case(length, density, causal, shape) for length in arguments.length or (8192, 32768)
             for causal in (True, False) for density in arguments.density or (0.5, 0.25, 0.125, 0.1)]
    inputs = [read(file, device) for file in arguments.activations]
    wanted = {"methods": [name for name in METHODS if (not arguments.only or name in arguments.only) and inputs],
              "kernels": [name for name in KERNELS if not arguments.only or name in arguments.only]}
    options = Options(arguments.sources, device, arguments.rounds, arguments.budget_ms)
    results = Results(environment(device) if device == "cuda" else {"device": "cpu"},
                      origins=origins(arguments.sources))
    if arguments.attempt:
        part, name = arguments.attempt
        _attempt(part, name, cases, inputs, options)
        return
    started = time.perf_counter()
    if arguments.at_once:
        given = sys.argv[sys.argv.index("run") + 1:]
        contenders = [(part, name) for part, names in wanted.items() for name in names]
        failed = try_alone(contenders, given, arguments.try_seconds, arguments.at_once)
        results.absent |= {f"{part}: {name}": why for (part, name), why in failed.items()}
        wanted = {part: [name for name in names if (part, name) not in failed] for part, names in wanted.items()}
        print(f"tried in {time.perf_counter() - started:.0f} s; left out:", results.absent, file=sys.stderr, flush=True)
    steps: list[Callable[[], None]] = [partial(run_methods, x, options, results, wanted["methods"]) for x in inputs]
    steps += [partial(run_kernels, case, options, results, wanted["kernels"]) for case in cases]
    for done, step in enumerate(steps):
        if time.perf_counter() - started > arguments.seconds:
            results.absent["the rest"] = f"no time was left for {len(steps) - done} of {len(steps)} steps"
            break
        try:
            step()
        except Exception as error:  # what follows is worth as much as before
            results.absent[f"step {done + 1} of {len(steps)}"] = first_line(error)
        results.write(arguments.out)
        if device == "cuda":
            torch.cuda.empty_cache()
    results.write(arguments.out)
    print("\n".join(summary(results)))
    if device == "cuda":
        record(*figures(results))
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)


def _attempt(part: str, name: str, cases: list[Case], inputs: list[Activations], options: Options) -> None:
    """First calls of one contender; the exit status says whether any of them worked and the device still does."""
    once = Options(options.sources, options.device, rounds=0)
    results = Results({})
    source = KERNELS[name].source if part == "kernels" else METHODS[name].source
    try:
        load(source, options.sources)
    except Absent as error:
        sys.exit(str(error))
    if part == "kernels":
        for case in cases:
            run_kernels(case, once, results, [name])
        tried = sum(("causal" if case.causal else "full") in KERNELS[name].masks for case in cases)
    else:
        for x in inputs:
            run_methods(x, once, results, [name])
        tried = len(inputs) * len(METHODS[name].settings)
    if options.device == "cuda":
        torch.cuda.synchronize()
    if len(results.absent) >= tried > 0:
        sys.exit(next(iter(results.absent.values())))


if __name__ == "__main__":
    main()
