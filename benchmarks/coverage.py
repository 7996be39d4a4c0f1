"""What fraction of the attention of real architectures does the pass find, and do they still compute the same?

`rewrite` has the form that the check of the attention zoo (a folder ZOO, with requirements of its own) takes:

    python ZOO/coverage_check.py --rewriter benchmarks.coverage:rewrite --jobs 1 --json dense.json
    python -m benchmarks.coverage sparse ZOO [PATTERN] > sparse.txt    the same entries where blocks are dropped
    python -m benchmarks.coverage table dense.json sparse.json

The second command runs every entry at a length of several key blocks under a plan that drops blocks: each call of the
sparse op against float64 attention over the lists that it kept, with all its masks, and the dense plan against eager at
that length. The third writes the table per library to benchmarks/coverage.md and the totals to benchmarks/figures.json.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.figures import Figure, record
from sparsify.backend import compiled_call, rewrite_graph
from sparsify.kernels import oracle, rule
from sparsify.kernels.blocks import KEY_BLOCK, KeptLists, count_blocks
from sparsify.passes.site import SiteRecord
from sparsify.plan import Bucket, Budget, Plan

DENSE = Plan.dense()
DROPPING = Plan((Bucket(1, None, Budget(tolerance=0.3, max_density=1.0, sinks=1, local=1), {}),))
"""Drops whatever no row looks at much: attention of random weights is flat, so nearly all that it may."""
LENGTHS = (512, 320, 200)
"""Several key blocks, and what shorter position tables hold."""
RIGHTLY_LEFT = ("dropout is active", "the attention weights are returned", "an online softmax")
"""Reasons to leave attention that is exactly softmax(q k^T * scale + mask) v."""
TABLE = Path(__file__).with_name("coverage.md")
MASKS = ("causal_offset", "window", "key_mask", "query_documents", "key_documents", "attn_mask", "softcap",
         "sink_logits")


def rewrite(model: Any, *example_inputs: Tensor) -> tuple[Callable[..., Any], Callable[[], int]]:
    """`model` with its attention rewritten under the dense plan, run as a graph, and the count of rewritten calls.

    Counted is what runs: each run of a graph adds its sites that were not refused.
    """
    executed = 0

    def count(records: list[SiteRecord]) -> None:
        nonlocal executed
        executed += sum(record.outcome != "refused" for record in records)

    return _rewritten(model, DENSE, count), lambda: executed


def _rewritten(model: Any, plan: Plan, ran: Callable[[list[SiteRecord]], None],
               watch: contextlib.AbstractContextManager[Any] | None = None) -> Callable[..., Any]:
    """`model` under `plan`; `ran` gets the records of a graph whenever it runs, `watch` is open meanwhile."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        rewritten, records = rewrite_graph(gm, inputs, plan)

        def run(*args: Any) -> Any:
            with watch or contextlib.nullcontext():  # not around Dynamo, which stands aside where a mode is active
                result = rewritten(*args)
            ran(records)
            return result

        return run

    return compiled_call(model, backend, plan, dynamic=False)


class _Referee(TorchDispatchMode):
    """Compares every call of the sparse op with float64 attention over the lists that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.dropping, self.worst = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.sparsify.adaptive_attention.default:
            q, k, v, scale, *rest = args
            masks, budget = dict(zip(MASKS, rest[:8], strict=True)), rest[8:13]
            lists = KeptLists(*torch.ops.sparsify.select_blocks(q, k, scale, *rest[:8], *budget))
            kept = rule.unpack(lists, count_blocks(k.shape[2], KEY_BLOCK))
            double = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                      for name, x in masks.items()}
            exact = oracle.attention(q.double(), k.double(), v.double(), scale=scale, kept=kept, **double)[0]
            error = (out.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)
            self.calls += 1
            self.worst = max(self.worst, float(error.nan_to_num(nan=torch.inf)))
            self.dropping += bool((~kept).any())
        return out


def check_sparse(entry: Any) -> dict[str, Any]:
    """One entry of the zoo at the first of LENGTHS that it takes."""
    zoo = importlib.import_module("zoo")
    for length in LENGTHS:
        with entry.ambient(), torch.no_grad():
            model, example_inputs, _ = entry.build()
            try:
                inputs = example_inputs(1, length)
                torch.manual_seed(1)
                expected = zoo.tensors_of(model(*inputs))
            except (IndexError, RuntimeError, ValueError, AssertionError):
                continue  # longer than its position table, or a fixed image size
            return {"length": length, **_judge(zoo, model, inputs, expected)}
    return {"length": 0}


def _judge(zoo: Any, model: Any, inputs: tuple[Any, ...], expected: list[Tensor]) -> dict[str, Any]:
    torch.manual_seed(1)
    dense = zoo.tensors_of(_rewritten(model, DENSE, lambda records: None)(*inputs))
    torch._dynamo.reset()
    referee, records = _Referee(), list[SiteRecord]()
    _rewritten(model, DROPPING, records.extend, referee)(*inputs)
    errors = [((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item() for a, b in zip(expected, dense, strict=True)
              if a.numel() and a.is_floating_point()]
    return {"dense_error": max(errors, default=0.0), "calls": referee.calls, "dropping": referee.dropping,
            "sparse_error": referee.worst,
            "why": sorted({f"{r.why} ({r.line})" for r in records if r.outcome == "refused"})}


def run_sparse(zoo_folder: str, pattern: str = "*") -> None:
    """Print a line and, at the end, write sparse.json."""
    sys.path.insert(0, zoo_folder)
    isolate, zoo = importlib.import_module("isolate"), importlib.import_module("zoo")
    rows = []
    for entry, result in isolate.run_each([e for e in zoo.entries(pattern) if not e.train], check_sparse, 1, 300):
        rows.append({"name": entry.name, "library": entry.library, "tolerance": max(1e-3, entry.tolerance), **result})
        print(json.dumps(rows[-1]), flush=True)
    Path("sparse.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_table(dense_file: str, sparse_file: str) -> None:
    """coverage.md and the figures."""
    dense = json.loads(Path(dense_file).read_text(encoding="utf-8"))
    sparse = json.loads(Path(sparse_file).read_text(encoding="utf-8"))
    why = {row["name"]: "; ".join(row.get("why", ())) for row in sparse}
    ran = [row for row in sparse if row.get("dropping")]
    apart = [row for row in ran if max(row["sparse_error"], row["dense_error"]) > row["tolerance"]]
    wrong = [row["name"] for row in dense["rows"] if row["verdict"] in ("WRONG OUTPUT", "OVER", "FAILED")]
    left = [row for row in dense["rows"] if row["verdict"] in ("missed", "partial")]
    for row in left:
        row["why"] = why.get(row["name"]) or "dropout is active: train mode"
    rightly = sum(row["expected"] - row["rewritten"] for row in left
                  if row["exact"] and any(reason in row["why"] for reason in RIGHTLY_LEFT))
    lines = [
        "# Attention found in real architectures", "",
        f"Written by `python -m benchmarks.coverage table`: torch {torch.__version__}, CPU, dense plan.",
        "A call counts as found if its rewritten form runs and the output of the model stays the same.", "",
        "| library | entries fully covered | attention calls found |", "|---|---|---|",
        *(f"| {name} | {total['fully_covered']} / {total['entries']} "
          f"| {total['found_calls']} / {total['expected_calls']} |"
          for name, total in dense["summary"].items() if isinstance(total, dict)),
        "", f"Of the exact calls that were left, {rightly} were left rightly: dropout, weights that leave the graph, "
        "an online softmax.", f"Wrong outputs, over-counts and failures: {', '.join(wrong) or 'none'}. The check took "
        f"{dense['summary']['seconds']:.0f} s.", "", "## Left as they were, and why", "",
        "| entry | exact | expected | rewritten | why |", "|---|---|---|---|---|",
        *(f"| {row['name']} | {'yes' if row['exact'] else 'no'} | {row['expected']} | {row['rewritten']} "
          f"| {row['why']} |" for row in left),
        "", "## Where blocks are dropped", "",
        f"{len(ran)} entries, {sum(row['dropping'] for row in ran)} attention calls that dropped blocks, at up to "
        f"{LENGTHS[0]} tokens:", "every call against float64 attention over the lists that it kept, with its masks. "
        f"Largest relative error {max((row['sparse_error'] for row in ran), default=0):.1e};",
        f"apart: {', '.join(row['name'] for row in apart) or 'none'}."]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    exact = dense["summary"]["exact"]
    command = "python -m benchmarks.coverage table dense.json sparse.json"

    def figure(name: str, number: float, bar: str, unit: str) -> Figure:
        return Figure("pass", name, number, bar, unit, f"torch {torch.__version__}, CPU", command)

    record(figure("zoo: exact attention calls rewritten, or rightly left",
                  (exact["found_calls"] + rightly) / exact["expected_calls"], ">= 1.0", "share"),
           figure("zoo: wrong outputs, over-counts and failures", len(wrong), "<= 0", "entries"),
           figure("zoo: the whole check", dense["summary"]["seconds"], "<= 900", "s"),
           figure("zoo: sparse entries apart from float64 over their lists", len(apart), "<= 0", "entries"))


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"sparse": run_sparse, "table": write_table}
    commands[sys.argv[1]](*sys.argv[2:])
