"""Does retrieval survive? Exact match of key-value lookup and copying, dense and sparse, per length.

    python -m benchmarks.retrieval                    every length, 100 queries each: hours on two CPU cores
    python -m benchmarks.retrieval 512 4096           some lengths
    python -m benchmarks.retrieval 16384 --queries 24

The plan is the CPU's default on either device: of the default plans it drops blocks from the shortest length on.
Writes results/retrieval-cpu.json (or -cuda) and records how many points the sparse side is behind.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks.figures import Figure, record
from sparsify.measurement import Side, checkout_commit, device_name, measuring
from sparsify.models.loading import TINY_LM, load_model
from sparsify.models.tasks import Rows, exact_match, retrieval_rows
from sparsify.plan import Plan

RESULTS = Path(__file__).with_name("results")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUERIES_PER_ROW = {"kv": 4, "copy": 2}


def main() -> None:
    """Measure, save, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32).model
    dense, sparse = Side(model), Side(model)
    sparsify.compile(dense, Plan.dense())
    sparsify.compile(sparse, Plan.default("cpu"))
    where = f"{device_name(torch.device(device))}, {torch.get_num_threads()} threads"
    file = RESULTS / f"retrieval-{device}.json"
    with measuring(model):
        for length in options.lengths:
            for kind, per_row in QUERIES_PER_ROW.items():
                rows = retrieval_rows(TINY_LM, kind, length, math.ceil(options.queries / per_row))
                (before, queries), (after, _) = (_exact_match(side, rows, device) for side in (dense, sparse))
                print(f"{kind} at {length}: dense {before:.3f}, sparse {after:.3f} of {queries} queries", flush=True)
                _save(file, {"kind": kind, "length": length, "queries": queries, "dense": before, "sparse": after,
                             "where": where, "torch": torch.__version__, "commit": checkout_commit()})
                behind = round(100 * (before - after), 6)  # 0.99 - 0.98 is a hair more than a point in binary
                record(Figure("line", f"{kind} at {length}, points behind dense", behind, "<= 1", "points", where,
                              "python -m benchmarks.retrieval"))


def _save(file: Path, entry: dict[str, Any]) -> None:
    """Put one result into the file, in place of an earlier one of its kind and length."""
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    others = [e for e in entries if (e["kind"], e["length"]) != (entry["kind"], entry["length"])]
    ordered = sorted([*others, entry], key=lambda e: (e["kind"], e["length"]))
    file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def _exact_match(side: Side, rows: Rows, device: str) -> tuple[float, int]:
    return exact_match(lambda ids: side(ids.to(device)), rows)


if __name__ == "__main__":
    main()
