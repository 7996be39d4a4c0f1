"""Calibrated confidence: what a guarantee promises against what is measured, on documents that it was not fitted on.

    python -m benchmarks.thesis.guarantee --text manual='DOCS/*.md' --text man='PAGES/*.txt' --unseen code='LIB/*.py'
                                          [--model SMOLLM2] [--lengths 512,1024,2048,4096] [--documents 16]

Every length is a bucket. Of each kind of text half of the documents are calibrated on, on the activations of the dense
model; the others, and those of the unseen kinds, are measured on: the model runs sparse under the shifts of the middle
target, and each query block is asked under every target whether the lists that selection makes drop a key block with a
true peak. The first site stays dense, as in the default plan. A document is a part of a file, from a random place on.

Published: "manual" is the API documentation of Node.js 20 (one page a document), "help" Vim 9.0's, "book" pages of the
books that come with Rust 1.95 (without tags), "man" the longest man pages of sections 1, 3, 5, 7 and 8, one of a
family, as `MANWIDTH=80 man -P cat` prints them; unseen are "code", modules of Python 3.12's standard library, and for
tiny-lm "heldout", the five documents it was never trained on. Its training text has versions of the other kinds.
"""

import argparse
import glob
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.charts import Series, draw
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment, write_json, write_text
from sparsify import ops
from sparsify.bounds import Bounds
from sparsify.calibration.guarantee import TARGETS, Collector, fit
from sparsify.kernels import rule
from sparsify.kernels.blocks import KeptLists, allowed_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.true_peaks import true_peaks
from sparsify.measurement import encode
from sparsify.models.loading import load_model
from sparsify.plan import DEFAULT_TOLERANCE, Budget

CHARACTERS_PER_TOKEN = 8  # more than any of the texts has: what is encoded of a document
RUNS_UNDER = 0.95


@dataclass
class Tally:
    """What one document counts under one target; `misses` and `query_blocks` by head of all sparse sites."""

    misses: list[Tensor] = field(default_factory=list)
    query_blocks: int = 0
    kept: int = 0
    allowed: int = 0
    mass: float = 0.0

    @property
    def rate(self) -> float:
        return float(torch.cat(self.misses).sum()) / self.query_blocks


class Attention:
    """An attention function for transformers: dense, watched by a collector, or sparse and tallied."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.collector: Collector | None = None
        self.bounds: Bounds | None = None
        self.tallies: dict[float, Tally] = {}

    def __call__(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float,
                 **kwargs: object) -> tuple[Tensor, None]:
        site: Any = module.layer_idx
        call = (scaling, 0, None, None, None, None, None, 0.0, None)
        if self.collector is not None:
            self.collector.watch(site, q, k, v, scaling, Masks(0))
        if self.bounds is None or site == 0:
            return ops.exact_attention(q, k, v, *call, ops.VERSION).transpose(1, 2), None
        lists = self.tally(site, q, k, call)
        return ops.block_sparse_attention(q, k, v, *lists, *call)[0].transpose(1, 2), None

    def tally(self, site: int, q: Tensor, k: Tensor, call: tuple[Any, ...]) -> KeptLists:
        """Count misses under every target; the lists of the target to run under."""
        assert self.bounds is not None and self.budget.tolerance is not None
        masks, length, budget = Masks(0), q.shape[2], self.budget
        peaks, mass = true_peaks(q, k, scale=call[0], masks=masks)
        allowed = allowed_blocks(masks, length, length, q.device)
        made = {}
        for target, promise in self.bounds.promises.items():
            made[target] = KeptLists(*ops.select_blocks(q, k, *call, budget.tolerance, budget.max_density, budget.sinks,
                                                        budget.local, budget.singles, list(promise.shifts[site])))
            kept = rule.unpack(made[target], peaks.shape[3])
            tally = self.tallies[target]
            tally.misses.append((allowed & ~kept & (peaks >= self.budget.tolerance)).any(-1).sum((0, 2)).cpu())
            tally.query_blocks += peaks[..., 0].numel()
            tally.kept += int(kept.sum())
            tally.allowed += int(allowed.sum()) * q.shape[1]
            tally.mass += float((mass * kept).sum())
        return made[RUNS_UNDER]


def measure(model: torch.nn.Module, attention: Attention, windows: Sequence[Tensor]) -> dict[float, list[Tally]]:
    """Tallies of documents, by target."""
    tallies: dict[float, list[Tally]] = {target: [] for target in TARGETS}
    for ids in windows:
        attention.tallies = {target: Tally() for target in TARGETS}
        run(model, ids)
        for target, tally in attention.tallies.items():
            tallies[target].append(tally)
    return tallies


def run(model: torch.nn.Module, ids: Tensor) -> None:
    """One forward pass; of the logits one row."""
    device = next(model.parameters()).device
    with torch.no_grad():
        model(ids[None].to(device), use_cache=False, logits_to_keep=1)


def summary(tallies: Sequence[Tally], target: float) -> dict[str, float]:
    """Means over documents, with the standard error of the rate; the worst head, and heads above the promise."""
    rates = [tally.rate for tally in tallies]
    by_head = torch.stack([torch.cat(tally.misses) for tally in tallies]).double()
    heads = by_head / (tallies[0].query_blocks / by_head.shape[1])
    error = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else float("inf")
    head_errors = heads.std(0) / len(rates) ** 0.5
    return {"documents": len(rates), "query_blocks": sum(tally.query_blocks for tally in tallies),
            "misses": statistics.fmean(rates), "standard_error": error,
            "coverage": sum(t.mass for t in tallies) / sum(t.query_blocks for t in tallies),
            "density": sum(t.kept for t in tallies) / sum(t.allowed for t in tallies),
            "heads_above": float((heads.mean(0) > 1 - target + 2 * head_errors).double().mean()),
            "worst_head": float(heads.mean(0).max())}


def read_windows(pattern: str, tokenizer: Any, length: int, count: int, rng: random.Random) -> list[Tensor]:
    """Token ids of up to `count` documents that are long enough; a file may hold several, <|endoftext|> between."""
    texts = [(path, part) for path in sorted(glob.glob(pattern, recursive=True))
             for part in range(Path(path).read_text(encoding="utf-8", errors="replace").count("<|endoftext|>") + 1)]
    rng.shuffle(texts)
    windows: list[Tensor] = []
    for path, part in texts:
        if len(windows) == count:
            break
        text = Path(path).read_text(encoding="utf-8", errors="replace").split("<|endoftext|>")[part]
        start = rng.randrange(max(1, len(text) - CHARACTERS_PER_TOKEN * length))
        ids = encode(text[start: start + CHARACTERS_PER_TOKEN * length], tokenizer)[:length]
        if len(ids) == length:
            windows.append(ids)
    return windows


def one_bucket(model: torch.nn.Module, attention: Attention, seen: dict[str, list[Tensor]],
               unseen: dict[str, list[Tensor]], length: int) -> dict[str, Any]:
    """Calibrate on half of the documents of every kind, measure the others; plain data."""
    collector = Collector(lambda site: Budget.dense() if site == 0 else attention.budget)
    attention.collector, attention.bounds = collector, None
    for kind, windows in seen.items():
        for ids in windows[: len(windows) // 2]:
            with collector.document(kind):
                run(model, ids)
    bounds = fit(collector.documents)
    print(f"{length} tokens: {bounds}", flush=True)
    attention.collector, attention.bounds = None, bounds
    held_out = measure(model, attention, [ids for windows in seen.values() for ids in windows[len(windows) // 2:]])
    new = {kind: measure(model, attention, windows) for kind, windows in unseen.items() if windows}
    rows = []
    for target in TARGETS:
        promise = bounds.promise(target)
        assert promise is not None
        row = {"target": target, "promised": {name: x for name, x in promise.to_dict().items() if name != "shifts"},
               "seen": summary(held_out[target], target),
               "unseen": {kind: summary(tallies[target], target) for kind, tallies in new.items()}}
        rows.append(row)
        print(f"  {target}: {row['seen']} unseen {row['unseen']}", flush=True)
    return {"length": length, "calibrated_on": {"documents": bounds.documents, "query_blocks": bounds.query_blocks},
            "targets": rows}


def chart(buckets: Sequence[dict[str, Any]], name: str) -> str:
    """Measured over promised misses, a line for each length, and for each unseen kind at its worst length."""
    promised = [1 - target for target in TARGETS]
    series = [Series("as promised", [(x, x) for x in promised], dashed=True)]
    for bucket in buckets:
        points = [(1 - row["target"], row["seen"]["misses"]) for row in bucket["targets"]]
        series.append(Series(f"{bucket['length']} tokens", points))
    for kind in sorted({kind for bucket in buckets for row in bucket["targets"] for kind in row["unseen"]}):
        worst = [max(bucket["targets"][place]["unseen"][kind]["misses"] for bucket in buckets
                     if kind in bucket["targets"][place]["unseen"]) for place in range(len(TARGETS))]
        series.append(Series(f"unseen: {kind}", list(zip(promised, worst, strict=True))))
    return draw(series, title=f"{name}: query blocks that miss a peak, held-out documents", x="promised",
                y="measured", log_x=True)


def figures_of(buckets: Sequence[dict[str, Any]], name: str, where: str, command: str) -> list[Figure]:
    """The figures of the issue, each the worst over all buckets."""
    figures = []
    for place, target in enumerate(TARGETS):
        rows = [bucket["targets"][place] for bucket in buckets]
        excess = max((row["seen"]["misses"] - (1 - target)) / max(row["seen"]["standard_error"], 1e-9) for row in rows)
        figures.append(Figure("budgets", f"{name}, guarantee {target:g}: measured misses above promised, worst bucket",
                              excess, "<= 2", "standard errors", where, command))
        for kind in sorted({kind for row in rows for kind in row["unseen"]}):
            ratio = max(row["unseen"][kind]["misses"] for row in rows if kind in row["unseen"]) / (1 - target)
            figures.append(Figure("budgets", f"{name}, guarantee {target:g}: misses on unseen {kind} over promised",
                                  ratio, "<= 2", "times", where, command))
    blocks = sum(bucket["targets"][0]["seen"]["query_blocks"] for bucket in buckets)
    return [*figures, Figure("budgets", f"{name}, guarantee: held-out query blocks", blocks, ">= 50000", "query blocks",
                             where, command)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as sparsify takes it; left out: the shipped model")
    parser.add_argument("--text", action="append", required=True, metavar="KIND=GLOB")
    parser.add_argument("--unseen", action="append", default=[], metavar="KIND=GLOB")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--documents", type=int, default=16, help="of all kinds together, for each of the two halves")
    parser.add_argument("--tolerance", type=float, default=DEFAULT_TOLERANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    attention = Attention(Budget(arguments.tolerance))
    AttentionInterface.register("sparsify_guarantee", attention)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    loaded = load_model(arguments.model, device=arguments.device, dtype=dtype)
    model: Any = loaded.model
    model.set_attn_implementation("sparsify_guarantee")
    name = "tiny-lm" if arguments.model is None else loaded.name.removesuffix(".gguf")
    rng, buckets, here = random.Random(0), [], environment(arguments.device)
    file = RESULTS / f"guarantee_{name.split('.')[0].lower()}"
    texts, unseen = (dict(option.split("=", 1) for option in options) for options in (arguments.text, arguments.unseen))
    for length in map(int, arguments.lengths.split(",")):
        each = 2 * arguments.documents // len(texts)
        kinds = {kind: read_windows(pattern, loaded.tokenizer, length, each, rng) for kind, pattern in texts.items()}
        new = {kind: read_windows(pattern, loaded.tokenizer, length, arguments.documents // 2, rng)
               for kind, pattern in unseen.items()}
        buckets.append(one_bucket(model, attention, kinds, new, length))
        write_json(file.with_suffix(".json"), {
            "model": name, **here, "dtype": str(dtype).removeprefix("torch."), "tolerance": arguments.tolerance,
            "kinds": sorted(texts), "buckets": buckets})
        write_text(file.with_suffix(".svg"), chart(buckets, name))
    command = "python -m benchmarks.thesis.guarantee " + " ".join(
        [f"--text {kind}=..." for kind in texts] + [f"--unseen {kind}=..." for kind in unseen]
        + ([] if arguments.model is None else ["--model SMOLLM2"]) + [f"--lengths {arguments.lengths}"])
    record(*figures_of(buckets, name, here["device"], command))


if __name__ == "__main__":
    main()
