"""Split summaries against sub-block means at one density: what the estimator is worth, in KL.

    python -m benchmarks.thesis.estimators --model SMOLLM2 --text FILE [--length 4096] [--density 0.29]

Every layer of the model is sparse (harsher than any plan), one absolute tolerance for all heads. `python -m
benchmarks.thesis research` compares more estimators at more lengths; this is the one number that the line promises.
Published on SmolLM2-135M, prose of 4K tokens, density 0.29: split-6 0.0120, sub8 0.0217 (ratio 0.55); code 0.22:
0.0177, 0.0272 (0.65); needle text 0.31: 0.0162, 0.0202 (0.80).
"""

import argparse
from pathlib import Path

from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment, write_json
from benchmarks.thesis.needed import OURS
from benchmarks.thesis.quality import kl_at
from benchmarks.thesis.rules import SUB_BLOCKS
from benchmarks.thesis.subject import Subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.29)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    subject = Subject.load(options.model, [options.text], options.documents, options.device)
    runs = {kind: [subject.at_density(kind, options.length, options.density * factor) for factor in (1, 0.9)]
            for kind in (OURS, SUB_BLOCKS)}
    split, sub = (kl_at([one.point for one in found], options.density) for found in runs.values())
    facts = environment(options.device)
    command = f"python -m benchmarks.thesis.estimators --model SMOLLM2 --text {options.text.name}"
    write_json(RESULTS / "estimators.json", {
        "environment": facts, "command": command, "length": options.length, "density": options.density,
        "kl_split": split, "kl_sub": sub, "runs": [one.to_dict() for found in runs.values() for one in found]})
    record(Figure("line", f"SmolLM2 KL, split-6 over sub8, {options.length} tokens, density {options.density:g}",
                  split / sub, "<= 0.8", "ratio", facts["device"].partition(",")[0], command))


if __name__ == "__main__":
    main()
