"""CUDA graphs and first calls: `python -m benchmarks.graphs [--part ops --part model --part first]`.

    ops     the ops captured in a CUDA graph: replays give the bits of a plain call on inputs that came after the
            capture, and are timed against captured SDPA; 1K to 4K keys
    model   a small model under mode="reduce-overhead" with the default plan, and with one that is always sparse,
            against plain SDPA in the same mode; outputs as the same graph gives them uncompiled
    first   seconds of the first call at every new length, in a process with empty caches and in one that finds what the
            first left on disk; kernels compiled by each

Writes results/graphs.json and .md after every row, and figures of the issue [kernels].
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify
from benchmarks import records
from benchmarks.bars import REPORTED
from benchmarks.clock import interleave, time_looped, time_queued
from benchmarks.dense import bare_calls
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment
from benchmarks.workloads import BF16, Call, Layer, Workload
from sparsify import ops
from sparsify.ops import crossover
from sparsify.plan import DEFAULT_TOLERANCE, Bucket, Budget, Plan

WORKLOAD = Workload("graphs", "cuda", 32, 8, 128, BF16, (1024, 2048, 3072, 4096), ())
FIRST_LENGTHS = (1024, 1536, 2000, 3000, 4096, 5001, 8192, 16384, 20000, 32768)
LAYERS = 2
SPARSE = Plan((Bucket(1, None, Budget(DEFAULT_TOLERANCE)),), name="sparse everywhere")
PARTS = ("ops", "model", "first")
TIMERS = {"queued": time_queued, "looped": time_looped}
COMMAND = "python -m benchmarks.graphs"
LONGEST_FIRST_CALL = 10.0  # seconds
ROUNDING = 1e-3  # relative error that one rounding to bfloat16 makes, about


class SmallModel(nn.Module):
    """Attention and a feed-forward network, a few times; activations [batch, length, heads * head dim] in and out."""

    def __init__(self, workload: Workload, layers: int = LAYERS) -> None:
        super().__init__()
        self.shape = workload.heads, workload.kv_heads, workload.head_dim
        width, kv_width = workload.heads * workload.head_dim, workload.kv_heads * workload.head_dim
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.RMSNorm(width), "q": nn.Linear(width, width, bias=False),
            "k": nn.Linear(width, kv_width, bias=False), "v": nn.Linear(width, kv_width, bias=False),
            "out": nn.Linear(width, width, bias=False), "up": nn.Linear(width, 2 * width),
            "down": nn.Linear(2 * width, width)}) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        heads, kv_heads, dim = self.shape
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            normed = layer["norm"](x)
            q, k, v = (layer[name](normed).unflatten(2, (count, dim)).transpose(1, 2)
                       for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
            x = x + layer["out"](attended.transpose(1, 2).flatten(2))
            x = x + layer["down"](nn.functional.silu(layer["up"](x)))
        return x


def measure_ops(layer: Layer, rounds: int, budget_ms: float) -> list[dict[str, Any]]:
    """One row an op: whether replays are right, and times of replays and of plain calls."""
    calls: dict[str, Call] = {"sdpa": bare_calls(layer)["sdpa"], "exact": layer.exact(),
                              "adaptive": layer.adaptive(Budget(DEFAULT_TOLERANCE)), "sparse": _sparse(layer)}
    captured = {name: capture(call, layer.workload.device) for name, call in calls.items()}
    generator = torch.Generator(layer.workload.device).manual_seed(7)
    for x in layer.qkv:  # in place: a graph reads the memory that it was captured with
        x.copy_(torch.randn(x.shape, generator=generator, device=x.device))
    equal = {}
    for name, (replay, out) in captured.items():
        expected = calls[name]().clone()
        replay()
        first = out.clone()
        replay()
        equal[name] = torch.equal(first, expected) and torch.equal(out, first)
    times = {how: interleave({**{name: replay for name, (replay, _) in captured.items()},
                              **{f"plain {name}": call for name, call in calls.items()}},
                             layer.workload.device, rounds, budget_ms, timer=timer) for how, timer in TIMERS.items()}
    return [{"length": layer.length, "op": name, "equal": equal[name], "graph_ms": times["queued"][name],
             "graph_looped_ms": times["looped"][name], "plain_ms": times["queued"][f"plain {name}"],
             "plain_looped_ms": times["looped"][f"plain {name}"],
             "over_sdpa": times["queued"]["sdpa"] / times["queued"][name],
             "looped_over_sdpa": times["looped"]["sdpa"] / times["looped"][name]} for name in calls]


def capture(call: Call, device: str) -> tuple[Callable[[], Any], Tensor]:
    """A replay of the call, and the tensor that it fills; on a CPU the call itself stands in."""
    if device == "cpu":
        kept = call().clone()
        return lambda: kept.copy_(call()), kept
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, measures and fills caches, none of which a capture may do
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def _sparse(layer: Layer) -> Call:
    """What `adaptive_attention` runs where selection pays, wherever it does."""
    budget = Budget(DEFAULT_TOLERANCE)
    return lambda: layer.sparse(layer.select(budget.singles, budget))()


def measure_model(workload: Workload, lengths: Sequence[int], plan: Plan, forced: bool, rounds: int, budget_ms: float,
                  mode: str | None = "reduce-overhead", backend: str = "inductor") -> Iterator[dict[str, Any]]:
    """One row a length: times of both sides under `mode`, errors, replays that differ. `forced`: never exact."""
    device = workload.device
    torch.manual_seed(0)
    model = SmallModel(workload).to(device, workload.dtype).eval()
    torch._dynamo.reset()
    skipped = torch._dynamo.utils.counters["inductor"]
    plain = torch.compile(model.forward, mode=mode, dynamic=True, backend=backend)
    ours = sparsify.compile(model.forward, plan, mode=mode, dynamic=True, backend=backend)
    uncompiled = sparsify.compile(model.forward, plan, dynamic=True, backend="eager")
    always = mock.patch.object(crossover, "selection_pays", lambda *arguments: True)
    with always if forced else contextlib.nullcontext():
        for length in lengths:
            generator = torch.Generator(device).manual_seed(length)
            x = torch.randn(workload.batch, length, workload.heads * workload.head_dim, generator=generator,
                            device=device).to(workload.dtype)
            sides, runs, skips = {"plain": _stepping(plain, x), "ours": _stepping(ours, x)}, {}, {}
            for name, side in sides.items():
                before = skipped["cudagraph_skips"]
                runs[name] = [side().clone() for _ in range(4)]  # warm-up, record, replay
                skips[name] = skipped["cudagraph_skips"] - before
            with ops.counting() as counters:
                expected = uncompiled(x)
            times = {how: interleave(sides, device, rounds, budget_ms, timer=timer) for how, timer in TIMERS.items()}
            yield {"length": length, "plan": f"{plan.name}{', forced' * forced}",
                   "density": counters.density(LAYERS - 1),
                   "same_bits": all(torch.equal(run, runs["ours"][-1]) for run in runs["ours"][1:]),
                   "error": _difference(runs["ours"][-1], expected),
                   "plain_error": _difference(runs["plain"][-1], model(x)),
                   "skipped_graphs": skips["ours"],
                   **{f"{name}_{how}_ms": ms for how, both in times.items() for name, ms in both.items()},
                   **{f"{how}_ratio": both["plain"] / both["ours"] for how, both in times.items()}}


def _stepping(side: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return side(x)

    return step


def _difference(ours: Tensor, other: Tensor) -> float:
    return float((ours.double() - other.double()).norm() / other.double().norm())


def first_calls(workload: Workload, lengths: Sequence[int], cache: Path) -> list[dict[str, Any]]:
    """Seconds of the first two calls at every length, and kernels that appeared in the cache meanwhile."""
    budget, rows = Budget(DEFAULT_TOLERANCE), []
    torch.zeros(1, device=workload.device)
    for length in lengths:
        layer = Layer(workload, length)
        calls = {"adaptive": layer.adaptive(budget), "exact": layer.exact()}
        before, seconds = _count_kernels(cache), []
        for name in ("adaptive", "exact", "adaptive"):
            _wait(workload.device)
            start = time.perf_counter()
            calls[name]()
            _wait(workload.device)
            seconds.append(time.perf_counter() - start)
        rows.append({"length": length, "adaptive_s": seconds[0], "exact_s": seconds[1], "again_s": seconds[2],
                     "kernels": _count_kernels(cache) - before})
    return rows


def in_two_processes(lengths: Sequence[int], device: str) -> dict[str, list[dict[str, Any]]]:
    """`first_calls` with empty caches, and once more with what that left on disk."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
        for process in ("empty caches", "second process"):
            command = [sys.executable, "-m", "benchmarks.graphs", "--first-calls", device,
                       *(f"--length={length}" for length in lengths)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=settings).stdout
            rows[process] = json.loads(output.splitlines()[-1])
    return rows


def _count_kernels(cache: Path) -> int:
    return sum(1 for _ in cache.rglob("*.cubin"))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def figures_of(results: dict[str, Any], where: str) -> list[Figure]:
    """What the issue asks of graphs and first calls."""
    common: dict[str, Any] = {"issue": "kernels", "where": where, "command": COMMAND}
    found = []
    if results.get("ops"):
        rows = results["ops"]
        wrong = [row for row in rows if not row["equal"]]
        found.append(Figure(figure="CUDA graphs of the ops, 1K to 4K: replays that differ from a plain call",
                            value=float(len(wrong)), bar="<= 0", unit="ops", **common))
        found += [Figure(figure=f"{name} op in a CUDA graph over SDPA in one, lowest of 1K to 4K", bar=REPORTED,
                         value=min(row["over_sdpa"] for row in rows if row["op"] == name), unit="x", **common)
                  for name in ("exact", "adaptive")]
    if results.get("model"):
        rows = results["model"]
        found.append(Figure(figure="reduce-overhead: runs without a graph, or whose replays differ",
                            value=float(sum(bool(row["skipped_graphs"]) or not row["same_bits"] for row in rows)),
                            bar="<= 0", unit="lengths", **common))
        # Where selection decides, rounding moves a block across the tolerance now and then: those are in the table.
        exact = [row["error"] / max(row["plain_error"], ROUNDING) for row in rows if row["density"] in (None, 1.0)]
        if exact:
            found.append(Figure(figure="reduce-overhead: error over plain torch.compile's, largest", value=max(exact),
                                bar="<= 2.0", unit="errors of torch.compile", **common))
        found += [Figure(figure=f"reduce-overhead, {row['plan']}, {row['length']} keys: over plain SDPA",
                         value=row["queued_ratio"], bar=REPORTED, unit="x", **common) for row in rows]
    if results.get("first"):
        for process, rows in results["first"].items():
            longest = max(max(row["adaptive_s"], row["exact_s"]) for row in rows)
            found.append(Figure(figure=f"first call of a length class, {process}, longest", value=longest,
                                bar=f"<= {LONGEST_FIRST_CALL:g}", unit="s", **common))
        later = sum(row["kernels"] for row in results["first"]["empty caches"][1:])
        again = sum(row["kernels"] for row in results["first"]["second process"])
        found += [Figure(figure="kernels compiled for lengths after the first", value=float(later), bar="<= 0",
                         unit="kernels", **common),
                  Figure(figure="kernels compiled by a second process", value=float(again), bar="<= 0",
                         unit="kernels", **common)]
    return found


def table(results: dict[str, Any], facts: dict[str, str]) -> str:
    """All parts as Markdown."""
    parts = [records.markdown(
        ["length", "op", "replays equal", "graph ms", "plain ms", "graph over SDPA's", "looped: graph ms", "plain ms",
         "graph over SDPA's"],
        [[str(r["length"]), r["op"], "yes" if r["equal"] else "NO", f"{r['graph_ms']:.3f}", f"{r['plain_ms']:.3f}",
          f"{r['over_sdpa']:.2f}", f"{r['graph_looped_ms']:.3f}", f"{r['plain_looped_ms']:.3f}",
          f"{r['looped_over_sdpa']:.2f}"] for r in results.get("ops", [])], facts)]
    parts.append(records.markdown(
        ["length", "plan", "density", "plain ms", "ours ms", "ratio", "looped: plain ms", "ours ms", "ratio", "error",
         "plain's error", "same bits", "graphs skipped"],
        [[str(r["length"]), r["plan"], "" if r["density"] is None else f"{r['density']:.2f}",
          *(cell for how in TIMERS for cell in (f"{r[f'plain_{how}_ms']:.3f}", f"{r[f'ours_{how}_ms']:.3f}",
                                                f"{r[f'{how}_ratio']:.3f}")),
          f"{r['error']:.1e}", f"{r['plain_error']:.1e}", "yes" if r["same_bits"] else "NO",
          str(r["skipped_graphs"])] for r in results.get("model", [])],
        {"mode": "reduce-overhead", "layers": str(LAYERS)}))
    parts.append(records.markdown(
        ["process", "length", "first adaptive call, s", "first exact call, s", "again, ms", "kernels compiled"],
        [[process, str(r["length"]), f"{r['adaptive_s']:.2f}", f"{r['exact_s']:.2f}", f"{1e3 * r['again_s']:.2f}",
          str(r["kernels"])] for process, rows in results.get("first", {}).items() for r in rows],
        {"first": "calls"}))
    return "\n".join(parts)


def measure(workload: Workload, parts: Sequence[str], rounds: int, budget_ms: float, out: Path) -> dict[str, Any]:
    """The parts one after the other; saved after every row, together with what the same commit measured before."""
    facts, target = environment(workload.device), out / "graphs.json"
    before = records.read_json(target)
    results: dict[str, Any] = before["results"] if records.may_join(before, facts) else {}

    def save() -> None:
        records.write_json(target, {"environment": facts, "command": COMMAND, "results": results})
        records.write_text(target.with_suffix(".md"), table(results, facts))

    if "ops" in parts:
        results["ops"] = []
        for length in workload.lengths:
            with torch.inference_mode():
                results["ops"] += measure_ops(Layer(workload, length), rounds, budget_ms)
            save()
        record(*figures_of({"ops": results["ops"]}, facts["device"]))
    if "model" in parts:
        results["model"] = []
        for plan, forced in ((Plan.default(workload.device), False), (SPARSE, True)):
            with torch.no_grad():
                for row in measure_model(workload, workload.lengths, plan, forced, rounds, budget_ms):
                    results["model"].append(row)
                    print(row, file=sys.stderr, flush=True)
                    save()
        record(*figures_of({"model": results["model"]}, facts["device"]))
    if "first" in parts:
        results["first"] = in_two_processes(FIRST_LENGTHS, workload.device)
        save()
        record(*figures_of({"first": results["first"]}, facts["device"]))
    return results


def main() -> None:
    """Measure on CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="instead of all")
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--first-calls", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_calls:
        workload = replace(WORKLOAD, device=arguments.first_calls)
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        with torch.inference_mode():
            print(json.dumps(first_calls(workload, arguments.length or FIRST_LENGTHS, cache)))
        return
    workload = replace(WORKLOAD, lengths=tuple(arguments.length or WORKLOAD.lengths))
    measure(workload, arguments.part or PARTS, arguments.rounds, arguments.budget_ms, arguments.out)
    print((arguments.out / "graphs.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
