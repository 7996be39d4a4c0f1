"""The thesis on trained models: which density each length needs, what a fixed budget costs, and which signal decides.

    python -m benchmarks.thesis all                                         the shipped model, every part
    python -m benchmarks.thesis rules --model SMOLLM2 --lengths 512 2048    one part, another model
    python -m benchmarks.thesis transfer --plan plan.json --queries 400     a quarter of depths has 100 answers

Parts: needed (a), transfer (b), rules (c), static (d), signal (e), symbols (f), research (g); each module says what it
does. Writes <model>-<part>.json and SVG charts to --out, and bars to benchmarks/figures.json (`rules`; `transfer` where
a plan file is given).

Cost on one H100, defaults, by arithmetic, not measured. A pass over 98,304 tokens in 8K windows of SmolLM2 (30
layers, 9 heads) is 27 TFLOP of weights (0.1 s in TF32), 1.1e11 causal scores and 4.8e9 logits (0.2 s). A perfect
selector reads and writes the scores about twelve times in float32 (1.8 s), an estimate of 8 vectors a block an eighth
of that; attention over the lists at density 0.3 in bfloat16 takes 0.1 s, launches 0.3 s. All parts are about 60
estimated and 30 perfect passes a length: 120 s at 8K, 100 s at 4K (24 windows), less below, so five to six minutes
for SmolLM2. tiny-lm (36 heads) has 7.7e10 scores at 32K and half at each shorter length: four to five minutes with
the retrieval rows of `transfer` and `symbols`. Memory: scores 1 GB a temporary (a handful alive), logits 2 GB, dense
logits in float16 of all windows 10 GB (SmolLM2): below 30 GB. Files are written after
every length; the same command on the same commit and machine goes on where they end. On two CPU cores
a pass over 2K tokens is 1 s (tiny-lm) and 7 s (SmolLM2); use OMP_NUM_THREADS=1 where other work runs.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import record
from benchmarks.records import RESULTS, environment, may_join, read_json, write_json, write_text
from benchmarks.thesis import needed, research, rules, signal, static, symbols, transfer
from benchmarks.thesis.subject import Subject

LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
MOST = {"tiny-lm": 32768}  # positions that were trained; others: 8192
PARTS: dict[str, Any] = {"needed": needed, "rules": rules, "transfer": transfer, "static": static, "signal": signal,
                         "symbols": symbols, "research": research}
TOGETHER = ("transfer",)  # its lengths need each other; all others are measured, and written, one by one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"], nargs="+")
    parser.add_argument("--model", default="tiny-lm", help="tiny-lm, a model folder or a GGUF file")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--documents", type=int, default=24, help="windows judged per length, at most")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files, each a text; default: held-out text")
    parser.add_argument("--plan", type=Path, help="for transfer: a plan file; default: the default tolerance")
    parser.add_argument("--queries", type=int, default=96, help="answers asked for per task and length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "thesis")
    options = parser.parse_args()
    subject = Subject.load(options.model, options.text, options.documents, options.device)
    lengths = options.lengths or [n for n in LENGTHS[options.device] if n <= MOST.get(subject.name, 8192)]
    extra: dict[str, tuple[Any, ...]] = {"transfer": (options.plan, options.queries), "symbols": (options.queries,)}
    facts = environment(options.device)
    command = f"python -m benchmarks.thesis {{}} --model {'tiny-lm' if subject.name == 'tiny-lm' else 'MODEL'}"
    for name in ("lengths", "documents", "plan", "queries"):  # what numbers depend on, where it is given
        if (given := getattr(options, name)) != parser.get_default(name):
            command += f" --{name} {' '.join(map(str, given)) if name == 'lengths' else getattr(given, 'name', given)}"
    for part in PARTS if "all" in options.part else options.part:
        measure_part(part, subject, lengths, extra.get(part, ()), options, facts, command.format(part))


def measure_part(part: str, subject: Subject, lengths: Sequence[int], extra: tuple[Any, ...], options: Any,
                 facts: dict[str, str], command: str) -> None:
    """Measure one part, length by length, and write what there is after each; figures when all are there."""
    module, file = PARTS[part], options.out / f"{subject.name}-{part}.json"
    texts = [path.name for path in options.text] or ["heldout.txt"]
    head = {"environment": facts, "model": subject.name, "texts": texts, "command": command}
    before = read_json(file)
    known: dict[str, Any] = before if may_join(before, facts) and before["texts"] == texts else {"seconds": 0.0}
    rows = [row for row in known.get("lengths", []) if row["length"] in lengths] if part not in TOGETHER else []
    measured, seconds = {row["length"] for row in rows}, known["seconds"]
    result: dict[str, Any] = {"lengths": rows}
    for some in [lengths] if part in TOGETHER else [[length] for length in lengths if length not in measured]:
        start = time.perf_counter()
        result = module.measure(subject, some, *extra)
        rows = sorted([*rows, *result["lengths"]], key=lambda row: row["length"])
        seconds = round(seconds + time.perf_counter() - start, 1)
        result = {**result, "lengths": rows}
        write_json(file, {**head, "seconds": seconds, **result, **summary(module, rows)})
    result |= summary(module, rows)
    for name, chart in module.charts(subject.name, result).items():
        write_text(options.out / f"{subject.name}-{part}-{name}.svg", chart)
    if hasattr(module, "figures"):
        record(*module.figures(subject.name, result, facts["device"], command))
    print(f"{part}: {seconds:.0f} s, {file}", flush=True)


def summary(module: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a part says of all its lengths together."""
    return module.summary(rows) if hasattr(module, "summary") else {}


if __name__ == "__main__":
    main()
