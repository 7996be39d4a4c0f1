"""What exported packages cost: `python -m benchmarks.export [--lengths 2048,8192] [--batches 1] [--plan FILE]`.

The shipped model on held-out text: an AOTInductor package beside the same model under `sparsify.compile` with the same
plan, and beside two dense ones, under torch.compile alone and under `sparsify.compile` with a plan that drops nothing,
all in this process, in turns, medians. The faster dense one is the rival. Two times each (benchmarks/clock.py):
launches queued ahead, and calls in a row with their host time. Quality: KL and rise of the loss against the dense
model, of both. The compiled model runs a site exact where selection would not pay on this machine; a package follows
its plan: the density of the compiled model says which it did. Writes results/export-DEVICE.json and records figures.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify
from benchmarks import records
from benchmarks.clock import Timer, interleave, time_looped, time_queued
from benchmarks.figures import Figure, record
from sparsify import ops
from sparsify.exporters import aot_inductor
from sparsify.measurement import Quality, encode
from sparsify.models.loading import HELDOUT_TEXT, load_model, read_text
from sparsify.plan import Plan

BAR = {"cpu": 1.10, "cuda": 1.05}
"""Time of a package over that of the compiled model, at most."""
NOISE = 1.03
"""Time of a package over the best dense model, at most: never slower, up to what two runs of one program differ."""
TIMERS: dict[str, dict[str, Timer]] = {"cpu": {"queued": time_queued},  # where both are the same
                                       "cuda": {"queued": time_queued, "looped": time_looped}}
ROUNDS, BUDGET_MS = 9, {"cpu": 1.0, "cuda": 100.0}


def main() -> None:
    """Export, measure, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192", help="tokens, with commas between")
    parser.add_argument("--batches", default="1", help="rows, with commas between")
    parser.add_argument("--plan", type=Path, help="a plan file; default: the default plan")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan.load(options.plan) if options.plan else Plan.default(device)
    lengths, batches = ([int(x) for x in given.split(",")] for given in (options.lengths, options.batches))
    facts, command = records.environment(device), " ".join(["python -m benchmarks.export", *sys.argv[1:]])
    name = f"-{options.plan.stem}" if options.plan else ""
    rows = []
    for row in measure(device, plan, lengths, batches):
        print(row, flush=True)
        rows.append(row)
        records.write_json(records.RESULTS / f"export-{device}{name}.json",
                           {"environment": facts, "command": command, "plan": plan.hash, "calls": rows})
        _record(row, facts["device"], command, options.plan, BAR[device])


def _record(row: dict[str, Any], where: str, command: str, plan: Path | None, bar: float) -> None:
    subject = f"tiny-lm{f' under {plan.stem}' if plan else ''}, {row['length']} tokens, " + (
        f"batch {row['batch']}, " if row["batch"] > 1 else "") + row["budget"]
    queued = row["queued"]
    dense = min(queued["dense"], queued["exact"])
    record(Figure("export", f"AOTInductor over sparsify.compile, {subject}", queued["package"] / queued["compiled"],
                  f"<= {bar}", "x", where, command),
           Figure("export", f"AOTInductor over the best dense model, {subject}", queued["package"] / dense,
                  f"<= {NOISE}", "x", where, command))


@torch.inference_mode()
def measure(device: str, plan: Plan, lengths: list[int], batches: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each call: milliseconds of all four, KL and loss of ours against dense, and how they differ."""
    torch._dynamo.config.recompile_limit = 64  # three compiled models share the frames of one class
    loaded = load_model(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model: Any = loaded.model
    model.config.use_cache = False
    text = encode(read_text(HELDOUT_TEXT), loaded.tokenizer).to(device)
    dense: Any = torch.compile(copy.deepcopy(model))
    exact = sparsify.compile(copy.deepcopy(model), Plan.dense())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        sparsify.export(model, {"input_ids": text[:1024].view(2, 512)}, path, plan=plan, target="aot_inductor",
                        progress=print)
        package = aot_inductor.load(path)
        sparsify.compile(model, plan)
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "dense": lambda ids: dense(ids).logits, "exact": lambda ids: exact(ids).logits,
            "compiled": lambda ids: model(ids).logits, "package": lambda ids: package(input_ids=ids)[0]}
        for batch in batches:
            for length in lengths:
                ids = text[:batch * length].view(batch, length)
                yield {"length": length, "batch": batch, "budget": str(plan.bucket_of(length).budget)} | _row(
                    calls, ids, device)


def _row(calls: dict[str, Callable[[Tensor], Tensor]], ids: Tensor, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    outputs = {}
    for name, call in calls.items():
        call(ids)  # compiles, and measures which kernels pay
        with ops.counting() as counted:
            outputs[name] = call(ids)
        if name == "compiled":
            densities = [counted.density(site) or 1.0 for site in counted.sites()]
            row["compiled_density"] = sum(densities) / len(densities) if densities else 1.0
    row["difference"] = float((outputs["package"] - outputs["compiled"]).abs().max())
    for name in ("compiled", "package"):
        quality = Quality()
        for window, exact, ours in zip(ids, outputs["dense"], outputs[name], strict=True):
            quality.add(exact, ours, window)
        row[f"{name}_kl"] = quality.kl / quality.positions
        row[f"{name}_loss_rise"] = quality.sparse_loss / quality.dense_loss - 1
    del outputs
    bound = {name: partial(call, ids) for name, call in calls.items()}
    for name, timer in TIMERS[device].items():
        row[name] = interleave(bound, device, ROUNDS, BUDGET_MS[device], timer=timer)
    return row


if __name__ == "__main__":
    main()
