"""Never slower than dense: `python -m benchmarks.crossover`. The default plan, its crossover tuned on this machine.

For every batch, number of heads and length the op that the pass emits under the default plan, found by running the pass
over two layers of SDPA: the second is no first layer, which the plan keeps dense. It runs against SDPA's kernels called
one by one, in the two ways of `benchmarks/clock.py`. Where the op may select, queries are sharpened until it keeps the
density that the plan reckons with: random ones would keep next to nothing.

Two contenders tell what a ratio is worth: SDPA twice (the noise), and the exact op, whatever the plan says.

Writes results/crossover.json and .md after every length, and the figures of the issue [kernels] after every layer.
FlexAttention is compiled anew for every shape, so it is timed on request (`--flex`); results/cuda_layer.md has it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

import sparsify
from benchmarks import records
from benchmarks.clock import interleave, time_looped, time_queued
from benchmarks.dense import bare_calls, dense_calls
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment
from benchmarks.run import WRONG
from benchmarks.workloads import BF16, Call, Layer, Workload
from sparsify import ops, timings, tuning
from sparsify.errors import OptionError
from sparsify.ops import crossover
from sparsify.plan import Budget, Plan

LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768)
LAYERS = tuple(Workload(f"batch {batch}, {heads} heads", "cuda", heads, min(8, heads), 128, BF16, LENGTHS, (),
                        batch=batch) for batch in (1, 4) for heads in (8, 32))
LEAST, LEAST_OF_OURS = 0.99, 1.03
OURS = "lists"  # the exact kernel that is ours
SHARPNESS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
TIMERS = {"queued": time_queued, "looped": time_looped}
DENSE_OPS = ("scaled_dot_product_attention", "exact_attention")
COMMAND = "python -m benchmarks.crossover"


@dataclass(frozen=True)
class Emitted:
    """The op of a site, and the budget it was given; None: dense."""

    name: str
    call: Call
    budget: Budget | None


def emitted_op(layer: Layer, plan: Plan) -> Emitted:
    """What the pass makes of causal or full SDPA over q, k, v of this layer, at a site that is not the first."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def two_layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {"is_causal": layer.workload.causal, "scale": layer.scale, "enable_gqa": True}
        first = scaled_dot_product_attention(q, k, v, **arguments)
        return scaled_dot_product_attention(first, k, v, **arguments)

    torch._dynamo.reset()
    sparsify.compile(two_layers, plan, dynamic=False, fullgraph=True, backend=keep)(*layer.qkv)
    sites = [node for node in graphs[-1].graph.nodes if _name(node) in (*DENSE_OPS, "adaptive_attention")]
    site, name = sites[-1], _name(sites[-1])
    call = partial(site.target, *layer.qkv, *site.args[3:], **site.kwargs)
    budget = None
    if name == "adaptive_attention":  # tolerance, max_density, sinks, local, singles, site, version come last
        budget = Budget(*site.args[-7:-2])
    return Emitted(name, call, budget)


def measure(layer: Layer, plan: Plan, rounds: int, budget_ms: float, flex: bool = False) -> dict[str, Any]:
    """One row."""
    emitted, density = emitted_op(layer, plan), None
    if emitted.budget is not None:
        layer, density = sharpened(layer, emitted.budget)
        emitted = emitted_op(layer, plan)
    device = layer.workload.device
    dense = bare_calls(layer)
    if flex:
        dense["flex"] = dense_calls(layer)["flex"]
    contenders: dict[str, Call] = {**dense, "ours": emitted.call, "exact": layer.exact(), "sdpa again": dense["sdpa"]}
    errors = {}
    for name in list(contenders):
        try:
            errors[name] = layer.relative_error(contenders[name]())
        except RuntimeError as error:
            if name not in dense or name == "sdpa":
                raise
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
        if name in dense and not errors.get(name, 1.0) < WRONG:
            del contenders[name], dense[name]
    rivals = [name for name in dense if name != "sdpa"]  # SDPA itself stays in every round, beside its double
    times = {how: interleave(contenders, device, rounds, budget_ms, rivals=rivals, timer=timer)
             for how, timer in TIMERS.items()}
    with ops.counting() as counters:
        emitted.call()
    kept = None if emitted.budget is None else counters.density(1)  # the second site
    q, k, v = layer.qkv
    return {"length": layer.length, "op": emitted.name, "asked_density": density, "ran_density": kept,
            "exact_kernel": crossover.exact_kernel(q, k, v, layer.scale, layer.masks),
            "relative_error": errors["ours"], **ratios(times, list(dense))}


def ratios(times: dict[str, dict[str, float]], dense: Sequence[str]) -> dict[str, Any]:
    """From times by way of timing: ours and the exact op over the best dense, and SDPA over SDPA."""
    row: dict[str, Any] = {}
    for how, ms in times.items():
        best = min(dense, key=ms.__getitem__)
        row |= {f"{how}_ms": ms, f"{how}_best": best, f"{how}_ratio": ms[best] / ms["ours"],
                f"{how}_exact_ratio": ms[best] / ms["exact"], f"{how}_noise": abs(ms["sdpa again"] / ms["sdpa"] - 1)}
    return row


def sharpened(layer: Layer, budget: Budget) -> tuple[Layer, float]:
    """The layer with queries sharp enough that selection keeps what the plan reckons with, or as near as it gets."""
    assert budget.tolerance is not None
    wanted = timings.expected_density(layer.length, budget.tolerance)
    best, reached = layer, 0.0
    for sharpness in SHARPNESS:
        tried = Layer(replace(layer.workload, sharpness=sharpness), layer.length)
        density = tried.density(tried.select(budget.singles, budget))
        if density > reached:
            best, reached = tried, density
        if density >= wanted:
            break
    return best, reached


def tune(workload: Workload, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the classes of a layer ahead, as `sparsify tune` does; nothing where the environment forbids it."""
    layer = tuning.Layer(workload.heads, workload.kv_heads, workload.head_dim, workload.head_dim)
    try:
        rows = tuning.tune(layer, lengths, device=torch.device(workload.device), dtype=workload.dtype,
                           batch=workload.batch, causal=workload.causal)
    except OptionError as error:
        print(f"not tuned: {error}", file=sys.stderr)
        return []
    print(tuning.table(rows), file=sys.stderr, flush=True)
    return [row.to_dict() for row in rows]


def figures_of(layers: dict[str, list[dict[str, Any]]], where: str) -> list[Figure]:
    """The worst length of every layer, each way of timing; and ours as the exact kernel, wherever it is that."""
    common: dict[str, Any] = {"issue": "kernels", "unit": "x", "where": where, "command": COMMAND}
    words = {"queued": "launches queued ahead", "looped": "host time included"}
    found = [Figure(figure=f"default plan over the best dense, {name}, lowest of 1K to 32K, {words[how]}",
                    value=min(row[f"{how}_ratio"] for row in rows), bar=f">= {LEAST}", **common)
             for name, rows in layers.items() if rows for how in TIMERS]
    ours = [row["queued_exact_ratio"] for rows in layers.values() for row in rows if row["exact_kernel"] == OURS]
    if ours:
        found.append(Figure(figure="exact op over the best dense, lowest where it runs our kernel", value=min(ours),
                            bar=f">= {LEAST_OF_OURS}", **common))
    return found


def table(layers: dict[str, list[dict[str, Any]]], facts: dict[str, str]) -> str:
    """The rows as Markdown."""
    head = ["layer", "length", "op", "density", "exact kernel", "ours ms", "best dense", "ratio", "exact op", "noise",
            "looped: ours ms", "best dense", "ratio", "exact op", "relative error"]
    lines = []
    for name, rows in layers.items():
        for row in rows:
            cells = [name, str(row["length"]), row["op"],
                     "" if row["ran_density"] is None else f"{row['ran_density']:.2f}", row["exact_kernel"]]
            for how in TIMERS:
                ms, best = row[f"{how}_ms"], row[f"{how}_best"]
                cells += [f"{ms['ours']:.3f}", f"{best} {ms[best]:.3f}", f"{row[f'{how}_ratio']:.3f}",
                          f"{row[f'{how}_exact_ratio']:.3f}"]
                if how == "queued":
                    cells.append(f"{row['queued_noise']:.3f}")
            lines.append([*cells, f"{row['relative_error']:.1e}"])
    return records.markdown(head, lines, facts)


def measure_layers(workloads: Sequence[Workload], rounds: int, budget_ms: float, flex: bool, out: Path,
                   is_complete: bool = True) -> None:
    """Tune all layers, then measure one after the other; save after every length. Complete runs make figures."""
    device = workloads[0].device
    facts = environment(device)
    tuned = {workload.name: tune(workload, workload.lengths) for workload in workloads}
    plan = Plan.default(device)
    print(plan, file=sys.stderr)
    layers: dict[str, list[dict[str, Any]]] = {workload.name: [] for workload in workloads}
    for workload in workloads:
        for length in workload.lengths:
            with torch.inference_mode():
                row = measure(Layer(workload, length), plan, rounds, budget_ms, flex)
            layers[workload.name].append(row)
            print(f"{workload.name}, {length}: {row['op']}, exact by {row['exact_kernel']}, "
                  f"{row['queued_ratio']:.3f} queued, {row['looped_ratio']:.3f} looped", file=sys.stderr, flush=True)
            records.write_json(out / "crossover.json", {
                "environment": facts, "command": COMMAND, "plan": plan.to_dict(), "tuned": tuned, "layers": layers})
            records.write_text(out / "crossover.md", table(layers, facts))
        if is_complete:
            done = {workload.name: layers[workload.name]}
            record(*(figure for figure in figures_of(done, facts["device"]) if workload.name in figure.figure))
    if is_complete:
        record(*(figure for figure in figures_of(layers, facts["device"]) if figure.figure.startswith("exact op")))


def main() -> None:
    """Measure on CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, action="append", help="instead of all; makes no figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-ms", type=float, default=40, help="time for one contender in one round")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    workloads = [replace(w, lengths=tuple(arguments.length or w.lengths)) for w in LAYERS]
    measure_layers(workloads, arguments.rounds, arguments.budget_ms, arguments.flex, arguments.out,
                   is_complete=not arguments.length)


def _name(node: fx.Node) -> str:
    """Of an op, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", "")


if __name__ == "__main__":
    main()
