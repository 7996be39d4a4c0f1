"""tiny-lm as an ONNX file in ONNX Runtime on this CPU.

    python -m benchmarks.export_onnx [--queries 100] [--quick]                       the CPU's default plan
    python -m benchmarks.export_onnx --plan benchmarks/results/plan-tiny-lm-cpu-0.01.json

Three files of one graph: ours under the plan, and two dense ones, whose attention is GroupQueryAttention
(onnxruntime's own) or Attention (standard). Speed: calls in turns, the faster dense file at every length is the rival.
Error: KL(dense || ours) on held-out text. Peak memory: each file in a process of its own. Retrieval: key-value lookup,
dense and ours. Writes results/export_onnx.json, or export_onnx-PLAN.json, and records figures.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.figures import Figure, record
from sparsify.exporters import onnx as form
from sparsify.exporters.capture import capture
from sparsify.measurement import Quality, Side, device_name, encode
from sparsify.models.loading import HELDOUT_TEXT, TINY_LM, load_model, read_text
from sparsify.models.tasks import exact_match, retrieval_rows
from sparsify.plan import Plan

LONG = 16384
LENGTHS = (256, 512, 1024, 2048, 4095, 8192, LONG)
RETRIEVED = (4096, LONG)
QUERIES_PER_ROW = 4
THREADS = 2
ROUNDS = 8

RIVALS = {
    "GroupQueryAttention": """<domain: "sparsify", opset_import: ["": 23, "com.microsoft": 1]>
NAME <scale> (q, k, v) => (out) {
  rows = Shape<start=0, end=1>(q)
  length = Shape<start=2, end=3>(q)
  kv_heads = Shape<start=1, end=2>(k)
  dim = Shape<start=3, end=4>(q)
  flat = Constant<value_ints=[0, 0, -1]>()
  q_rows = Transpose<perm=[0, 2, 1, 3]>(q)
  k_rows = Transpose<perm=[0, 2, 1, 3]>(k)
  v_rows = Transpose<perm=[0, 2, 1, 3]>(v)
  q_flat = Reshape(q_rows, flat)
  k_flat = Reshape(k_rows, flat)
  v_flat = Reshape(v_rows, flat)
  zero = Constant<value_ints=[0]>()
  one = Constant<value_ints=[1]>()
  nothing = Constant<value_float=0.0>()
  no_past_shape = Concat<axis=0>(rows, kv_heads, zero, dim)
  no_past = Expand(nothing, no_past_shape)
  last = Sub(length, one)
  last_of_rows = Expand(last, rows)
  last32 = Cast<to=6>(last_of_rows)
  total32 = Cast<to=6>(length)
  mixed, keys, values = com.microsoft.GroupQueryAttention<num_heads=HEADS, kv_num_heads=GROUPS, scale=SCALE>
    (q_flat, k_flat, v_flat, no_past, no_past, last32, total32)
  by_head = Constant<value_ints=[0, 0, HEADS, -1]>()
  mixed_heads = Reshape(mixed, by_head)
  out = Transpose<perm=[0, 2, 1, 3]>(mixed_heads)
}""",
    "Attention": """<domain: "sparsify", opset_import: ["": 23]>
NAME <scale> (q, k, v) => (out) { out = Attention<is_causal=1, scale: float = @scale>(q, k, v) }""",
}
"""Bodies of the attention of dense files: causal from the first key, as tiny-lm is without a past."""

Run = Callable[[Tensor], Tensor]


def main() -> None:
    """Export, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="a plan file; default: the default plan")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="speed alone")
    parser.add_argument("--alone", nargs=2, metavar=("FILE", "LENGTH"), help="run one file once and print its memory")
    options = parser.parse_args()
    if options.alone:
        _run_alone(Path(options.alone[0]), int(options.alone[1]))
        return
    torch.set_num_threads(THREADS)
    where = f"{device_name(torch.device('cpu'))}, {THREADS} threads"
    plan = Plan.load(options.plan) if options.plan else Plan.default("cpu")
    results: dict[str, Any] = {"where": where, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__,
                               "plan": plan.hash}
    loaded = load_model()
    text = encode(read_text(HELDOUT_TEXT), loaded.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Side(loaded.model), Path(folder), plan)
        runs = {name: as_call(file) for name, file in files.items()}
        results["lengths"] = _times(runs, text)
        if not options.quick:
            quality = Quality()
            for start in range(0, 4 * LONG, LONG):
                ids = text[start:start + LONG][None]
                quality.add(runs["GroupQueryAttention"](ids)[0], runs["ours"](ids)[0], ids[0])
            results["kl"] = quality.kl / quality.positions
            results["memory"] = {name: _memory(file, LONG) for name, file in files.items()}
            results["retrieval"] = {length: _retrieval(runs, length, options.queries) for length in RETRIEVED}
    _record(results, plan, options.plan, options.quick)


def write_files(model: torch.nn.Module, folder: Path, plan: Plan) -> dict[str, Path]:
    """Ours under the plan, and a dense file for each rival."""
    captured = capture(model, torch.randint(5, 4000, (2, 64)), plan)
    files = {"ours": folder / "ours.onnx"}
    form.write(captured, files["ours"])
    site = captured.records[0]
    for name, body in RIVALS.items():
        dense = onnx.load(files["ours"])
        functions = list(dense.functions)
        del dense.functions[:]
        for function in functions:
            words = {"NAME": function.name, "HEADS": site.heads, "GROUPS": site.kv_heads,
                     "SCALE": site.head_dim ** -0.5}
            filled = body
            for word, value in words.items():
                filled = filled.replace(word, str(value))
            written = onnx.parser.parse_function(filled)
            del written.attribute[:]
            written.attribute.extend(function.attribute)
            dense.functions.append(written)
        dense.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        files[name] = folder / f"{name}.onnx"
        onnx.save(dense, files[name])
    return files


def as_call(file: Path) -> Run:
    """A file as a call on token ids."""
    session = _session(file)
    name = session.get_inputs()[0].name
    return lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes time from the next file's call
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _times(runs: dict[str, Run], text: Tensor) -> dict[int, dict[str, float]]:
    """Least milliseconds of each file at each length: others on the machine only add.

    Calls in turns, every second turn in reverse order, in rounds over all lengths: nobody disturbs a length alone.
    """
    # `Attention` makes all scores at once: gigabytes beyond some length, and slower than the other long before.
    least = {length: dict.fromkeys((name for name in runs if length <= 8192 or name != "Attention"), math.inf)
             for length in LENGTHS}
    for _ in range(ROUNDS):
        for length, times in least.items():
            ids, names = text[:length][None], list(times)
            for name in names:
                runs[name](ids)
            for turn in range(max(1, 4096 // length)):
                for name in names if turn % 2 == 0 else names[::-1]:
                    start = time.perf_counter()
                    runs[name](ids)
                    times[name] = min(times[name], 1e3 * (time.perf_counter() - start))
    for length, times in least.items():
        print(f"{length}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()), flush=True)
    return least


def _memory(file: Path, length: int) -> float:
    """Peak resident megabytes of a process that runs the file once, and nothing else."""
    command = [sys.executable, "-m", "benchmarks.export_onnx", "--alone", str(file), str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _run_alone(file: Path, length: int) -> None:
    session = _session(file)
    ids = np.random.default_rng(0).integers(5, 4000, (1, length))
    session.run(None, {session.get_inputs()[0].name: ids})
    # Not getrusage: its maximum begins with what the parent held when it forked.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024)


def _retrieval(runs: dict[str, Run], length: int, queries: int) -> dict[str, float]:
    rows = retrieval_rows(TINY_LM, "kv", length, math.ceil(queries / QUERIES_PER_ROW))
    found = {name: exact_match(runs[name], rows) for name in ("GroupQueryAttention", "ours")}
    print(f"key-value lookup at {length}: {found}", flush=True)
    return {name: share for name, (share, _) in found.items()}


def _record(results: dict[str, Any], plan: Plan, path: Path | None, quick: bool) -> None:
    """The figures that the issue asks for."""
    def ratio(length: int) -> float:
        times = results["lengths"][length]
        return min(ms for name, ms in times.items() if name != "ours") / times["ours"]

    def add(figure: str, value: float, bar: str, unit: str) -> None:
        figures.append(Figure("export", f"onnxruntime, {subject}: {figure}", value, bar, unit, results["where"],
                              command))

    figures: list[Figure] = []
    subject = "tiny-lm" if path is None else f"tiny-lm under {path.stem}"
    command = "python -m benchmarks.export_onnx" + (f" --plan {path}" if path else "")
    add(f"speed-up at {LONG}", ratio(LONG), ">= 1.7", "x")
    dense = [length for length in LENGTHS if plan.bucket_of(length).is_dense]
    add("least ratio in dense buckets", min(map(ratio, dense)), ">= 0.97", "x")
    add("least ratio in sparse buckets", min(ratio(length) for length in LENGTHS if length not in dense), ">= 1", "x")
    if not quick:
        memory = results["memory"]
        add(f"KL at {LONG}", results["kl"], "<= 0.02", "nats a token")
        add(f"peak memory at {LONG}", memory["ours"] / memory["GroupQueryAttention"], "<= 1.2", "of dense")
        for length, found in results["retrieval"].items():
            add(f"key-value lookup at {length}, points behind dense",
                round(100 * (found["GroupQueryAttention"] - found["ours"]), 6), "<= 1", "points")
        name = "export_onnx" if path is None else f"export_onnx-{path.stem}"
        records.write_json(records.RESULTS / f"{name}.json", results)
    record(*figures)


if __name__ == "__main__":
    main()
