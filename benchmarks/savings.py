"""The issue [budgets], time saved: attention of a model under a plan, over the best dense kernel of every site.

    python -m benchmarks.savings --plan results/plan-tiny-lm-cuda.json
    python -m benchmarks.savings --plan PLAN --model SMOLLM2 --name smollm2 --lengths 4096,8192 --batch 8

Each site is timed on its own q, k and v, as the compiled model gives them on text: the op that its graph calls under
the plan, selection included, against each dense kernel, interleaved in one run. Errors of the same plan are those of
its gates, which stand beside the times. Writes results/savings-NAME-DEVICE-batchN.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify
from benchmarks.clock import Timer, interleave, time_looped, time_queued
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment, write_json
from sparsify import ops
from sparsify.kernels.masks import Masks
from sparsify.measurement import encode
from sparsify.models.loading import HELDOUT_TEXT, load_model, read_text
from sparsify.ops import exact
from sparsify.ops.counters import Totals
from sparsify.plan import Bucket, Budget, Plan

BARS = {("smollm2", 8192): ">= 2", ("tiny-lm", 16384): ">= 3", ("tiny-lm", 32768): ">= 5"}
LENGTHS = {"tiny-lm": (4096, 8192, 16384, 32768)}
ROUNDS, BUDGET_MS = 5, 240.0  # for all sites together, of one contender in one round
TIMERS: dict[str, Timer] = {"queued": time_queued, "looped": time_looped}
OURS = "sparsify"


@dataclass(frozen=True)
class SiteCall:
    """What a site was given in one run of the model."""

    site: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    masks: Masks

    def dense(self, name: str) -> Tensor:
        return exact.run(name, self.q, self.k, self.v, self.scale, self.masks)

    def under(self, budget: Budget) -> Tensor:
        """By the op that a graph calls at this site."""
        masks = self.masks
        common = (self.q, self.k, self.v, self.scale, masks.causal_offset, masks.window, masks.key_mask,
                  masks.query_documents, masks.key_documents, masks.attn_mask, masks.softcap, masks.sink_logits)
        if budget.tolerance is None:
            return ops.exact_attention(*common, ops.VERSION)
        return ops.adaptive_attention(*common, budget.tolerance, budget.max_density, budget.sinks, budget.local,
                                      budget.singles, self.site, ops.VERSION, budget.peaks or 0.0, budget.shifts)


def calls_of(model: Any, ids: Tensor, plan: Plan) -> tuple[list[SiteCall], float]:
    """What every site is given in a run under the plan, and the density, mean over sites."""
    found: list[SiteCall] = []

    def watch(site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> None:
        found.append(SiteCall(site, q.clone(), k.clone(), v.clone(), scale, masks))

    totals = Totals()
    with ops.probing(lambda site, kv_len: plan.bucket_of(kv_len).budget_of(site), watch), ops.counting(totals):
        model(ids)
    densities = [totals.density(call.site) for call in found]
    return found, sum(1.0 if x is None else x for x in densities) / len(densities)


def time_sites(calls: list[SiteCall], plan: Plan, device: str, timer: Timer) -> tuple[float, float]:
    """Milliseconds of all sites: each one's best dense kernel, and the op under the plan."""
    dense = sparse = 0.0
    for call in calls:
        names = [name for name in exact.kernels_of(call.q, call.k, call.v, call.masks) if name != "lists"]
        contenders: dict[str, Callable[[], Any]] = {name: partial(call.dense, name) for name in names}
        contenders[OURS] = partial(call.under, plan.bucket_of(call.k.shape[2]).budget_of(call.site))
        for contender in contenders.values():
            contender()
        times = interleave(contenders, device, ROUNDS, BUDGET_MS / len(calls), rivals=names, timer=timer)
        sparse += times.pop(OURS)
        dense += min(times.values())
    return dense, sparse


@torch.inference_mode()
def main() -> None:
    """Measure, save, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--name", default="tiny-lm", help="of the model, in results and figures")
    parser.add_argument("--text", type=Path, default=HELDOUT_TEXT)
    parser.add_argument("--lengths")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [int(x) for x in options.lengths.split(",")] if options.lengths else LENGTHS[options.name]
    loaded = load_model(options.model, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    ids = encode(read_text(options.text), loaded.tokenizer).to(device)
    plan = Plan.load(options.plan)
    network: Any = loaded.model
    everywhere = Plan((Bucket(1, None, Budget(0.0)),), name="every site adaptive")
    body = sparsify.compile(network.base_model, everywhere, backend="eager")  # without logits, which are large
    facts, rows = environment(device), []
    command = " ".join(["python -m benchmarks.savings", *sys.argv[1:]]).replace(str(options.model), "MODEL")
    for length in lengths:
        if len(ids) < length * options.batch:
            sys.exit(f"the text has {len(ids)} tokens, too few for {options.batch} windows of {length}")
        calls, density = calls_of(body, ids[:length * options.batch].view(options.batch, length), plan)
        row: dict[str, Any] = {"length": length, "batch": options.batch, "sites": len(calls), "density": density}
        for name, timer in TIMERS.items():
            dense, sparse = time_sites(calls, plan, device, timer)
            row[name] = {"dense_ms": dense, "sparse_ms": sparse, "speed_up": dense / sparse}
        row["gates"] = [str(gate) for gate in plan.bucket_of(length).gates if gate.length == length]
        rows.append(row)
        print(row, flush=True)
        bar = BARS.get((options.name, length), ">= 1")
        record(Figure("budgets", f"{options.name}: attention under its plan over the best dense, {length}, batch "
                      f"{options.batch}", row["queued"]["speed_up"], bar, "x", facts["device"], command))
        write_json(RESULTS / f"savings-{options.name}-{device}-batch{options.batch}.json",
                   {"environment": facts, "command": command, "plan": plan.hash, "lengths": rows})


if __name__ == "__main__":
    main()
