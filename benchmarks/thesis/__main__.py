"""The thesis on trained models: which density each length needs, what a fixed budget costs, and which signal decides.

    python -m benchmarks.thesis all                                         the shipped model, every part
    python -m benchmarks.thesis rules --model SMOLLM2 --lengths 512 2048    one part, another model
    python -m benchmarks.thesis transfer --plan plan.json

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
logits in float16 of all windows 10 GB (SmolLM2): below 30 GB. A part writes its files when it ends. On two CPU cores
a pass over 2K tokens is 1 s (tiny-lm) and 7 s (SmolLM2); use OMP_NUM_THREADS=1 where other work runs.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import record
from benchmarks.records import RESULTS, environment, write_json, write_text
from benchmarks.thesis import needed, research, rules, signal, static, symbols, transfer
from benchmarks.thesis.subject import Subject

LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
MOST = {"tiny-lm": 32768}  # positions that were trained; others: 8192
PARTS: dict[str, Any] = {"needed": needed, "rules": rules, "transfer": transfer, "static": static, "signal": signal,
                         "symbols": symbols, "research": research}


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
    for part in PARTS if "all" in options.part else options.part:
        start = time.perf_counter()
        measure: Callable[..., dict[str, Any]] = PARTS[part].measure
        result = measure(subject, lengths, *extra.get(part, ()))
        seconds = round(time.perf_counter() - start, 1)
        texts = [path.name for path in options.text] or ["heldout.txt"]
        written = {"environment": facts, "model": subject.name, "texts": texts, "command": command.format(part),
                   "seconds": seconds, **result}
        write_json(options.out / f"{subject.name}-{part}.json", written)
        for name, chart in PARTS[part].charts(subject.name, result).items():
            write_text(options.out / f"{subject.name}-{part}-{name}.svg", chart)
        if hasattr(PARTS[part], "figures"):
            record(*PARTS[part].figures(subject.name, result, facts["device"], command.format(part)))
        print(f"{part}: {seconds:.0f} s, {options.out / f'{subject.name}-{part}.json'}", flush=True)


if __name__ == "__main__":
    main()
