"""Few heads and short queries on long keys, lists in pieces and whole: `python -m benchmarks.small_grids`.

A chunk of a prompt on one card of several: 8 query heads on 2 KV heads, 128 to 1024 queries, causal to the bottom
right. Every attention of ours runs twice in the same interleaved rounds, as kernels/splits.py decides and with it
switched off, beside the dense kernels of SDPA, FlexAttention left out (it compiles for every shape). "all blocks" is
exact attention without given lists. Writes results/small_grids.json and .md after every shape, and figures of the issue
[kernels]. Takes less than a minute.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import records
from benchmarks.bars import REPORTED
from benchmarks.clock import interleave
from benchmarks.dense import dense_calls
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment
from benchmarks.run import WRONG
from benchmarks.workloads import BF16, MIXED, Call, Layer, Workload
from sparsify.ops import exact

WORKLOAD = Workload("small_grids", "cuda", 8, 2, 128, BF16, (32768, 131072), (1.0, 0.25, 0.1, MIXED))
QUERIES = (128, 256, 512, 1024)
COMMAND = "python -m benchmarks.small_grids"
SHOWN = (256, 32768)  # queries and keys that figures name


def measure_shape(layer: Layer, rounds: int, budget_ms: float) -> list[dict[str, Any]]:
    """One row a density, and one for all blocks: milliseconds whole and in pieces, and of the best dense kernel."""
    lists_of = {f"lists {density if isinstance(density, str) else f'{density:g}'}": layer.lists(density)
                for density in layer.workload.densities}
    ours: dict[str, Call] = {"all blocks": lambda: exact.run("lists", *layer.qkv, layer.scale, layer.masks),
                             **{name: layer.sparse(lists) for name, lists in lists_of.items()}}
    dense = _right(dense_calls(layer, skip=("flex",)), layer)
    both = {**{f"{name}, whole": _whole(call) for name, call in ours.items()}, **ours}
    errors = {name: layer.relative_error(call(), lists_of.get(name.removesuffix(", whole")))
              for name, call in both.items()}
    times = interleave({**dense, **both}, layer.workload.device, rounds, budget_ms, rivals=dense)
    best = min(dense, key=times.__getitem__)
    return [{"keys": layer.length, "queries": layer.q_len, "contender": name, "whole_ms": times[f"{name}, whole"],
             "pieces_ms": times[name], "gain": times[f"{name}, whole"] / times[name], "best_dense": best,
             "dense_ms": times[best], "over_dense": times[best] / times[name],
             "whole_error": errors[f"{name}, whole"], "pieces_error": errors[name]} for name in ours]


def _right(dense: dict[str, Call], layer: Layer) -> dict[str, Call]:
    """The dense kernels that run here and compute the same attention."""
    found = {}
    for name, call in dense.items():
        try:
            error = layer.relative_error(call())
        except RuntimeError as problem:
            print(f"{name} does not run here: {str(problem).splitlines()[0]}", file=sys.stderr)
            continue
        if error < WRONG:
            found[name] = call
        else:
            print(f"{name} is wrong here: its relative error is {error:.2g}", file=sys.stderr)
    return found


def _whole(call: Call) -> Call:
    """The same call without pieces."""
    from sparsify.kernels import splits

    def run() -> Any:
        with mock.patch.object(splits, "FEWEST_KEY_BLOCKS", sys.maxsize):
            return call()

    return run


def figures_of(rows: Sequence[dict[str, Any]], where: str) -> list[Figure]:
    """The lowest gain, and those of one shape."""
    common: dict[str, Any] = {"issue": "kernels", "where": where, "command": COMMAND, "bar": REPORTED, "unit": "x"}
    found = [Figure(figure="small grids: pieces over whole lists, lowest", value=min(row["gain"] for row in rows),
                    **common)]
    for row in rows:
        if (row["queries"], row["keys"]) == SHOWN:
            what = f"small grids, {row['contender']}, {row['queries']} queries, {row['keys']} keys"
            found += [Figure(figure=f"{what}: pieces over whole lists", value=row["gain"], **common),
                      Figure(figure=f"{what}: over the best dense", value=row["over_dense"], **common)]
    return found


def table(rows: Sequence[dict[str, Any]], facts: dict[str, str]) -> str:
    """The rows as Markdown."""
    return records.markdown(
        ["keys", "queries", "contender", "whole, ms", "in pieces, ms", "gain", "best dense", "ms", "over best dense",
         "relative error, whole", "in pieces"],
        [[str(r["keys"]), str(r["queries"]), r["contender"], f"{r['whole_ms']:.4f}", f"{r['pieces_ms']:.4f}",
          f"{r['gain']:.2f}", r["best_dense"], f"{r['dense_ms']:.4f}", f"{r['over_dense']:.2f}",
          f"{r['whole_error']:.1e}", f"{r['pieces_error']:.1e}"] for r in rows], facts)


def measure(workload: Workload, queries: Sequence[int], rounds: int, budget_ms: float, out: Path) -> None:
    """All shapes, saved after every one."""
    facts, rows = environment(workload.device), []
    for keys in workload.lengths:
        for count in queries:
            with torch.inference_mode():
                layer = Layer(replace(workload, fewer_queries=keys // count), keys)
                rows += measure_shape(layer, rounds, budget_ms)
            records.write_json(out / "small_grids.json", {"environment": facts, "command": COMMAND, "rows": rows})
            records.write_text(out / "small_grids.md", table(rows, facts))
    record(*figures_of(rows, facts["device"]))


def main() -> None:
    """Measure on CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, action="append", help="keys, instead of the workload's")
    parser.add_argument("--queries", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    workload = replace(WORKLOAD, lengths=tuple(arguments.length or WORKLOAD.lengths))
    measure(workload, arguments.queries or QUERIES, arguments.rounds, arguments.budget_ms, arguments.out)
    print((arguments.out / "small_grids.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
