"""What exported files cost: `python -m benchmarks.export [--lengths 2048,8192]`.

The shipped model under the default plan of the device, on held-out text, batch 1: an AOTInductor package beside the
same model under `sparsify.compile`, both in this process, in turns, medians. One length of a dense bucket, one of a
sparse one. Differences are those of the logits.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks import records
from benchmarks.clock import interleave
from benchmarks.figures import Figure, record
from sparsify.exporters import aot_inductor
from sparsify.measurement import encode
from sparsify.models.loading import HELDOUT_TEXT, load_model, read_text
from sparsify.plan import Plan

BAR = {"cpu": 1.10, "cuda": 1.05}
"""Time of a package over that of the compiled model, at most."""


def main() -> None:
    """Export, measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192", help="tokens, with commas between")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [int(length) for length in options.lengths.split(",")]
    rows = measure(device, lengths, options.rounds)
    where = records.environment(device)["device"]
    command = f"python -m benchmarks.export --lengths {options.lengths}"
    for row in rows:
        print(row)
    record(*(Figure("export", f"AOTInductor over sparsify.compile, tiny-lm, {row['length']} tokens, {row['budget']}",
                    row["package_ms"] / row["compiled_ms"], f"<= {BAR[device]}", "x", where, command) for row in rows))


def measure(device: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each length: milliseconds of both, and how far their logits are apart."""
    loaded = load_model(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model: Any = loaded.model
    model.config.use_cache = False
    ids = encode(read_text(HELDOUT_TEXT), loaded.tokenizer)[: max(lengths)][None].to(device)
    plan = Plan.default(device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.pt2"
        sparsify.export(model, {"input_ids": ids[:, :1024].view(2, 512)}, path, plan=plan, target="aot_inductor",
                        progress=print)
        package = aot_inductor.load(path)
        sparsify.compile(model, plan)
        rows = []
        for length in lengths:
            given = ids[:, :length].contiguous()
            difference = float((package(input_ids=given)[0] - model(given).logits).abs().max())
            ms = interleave({"compiled": partial(model, given), "package": partial(package, input_ids=given)}, device,
                            rounds, 1.0)
            rows.append({"length": length, "budget": str(plan.bucket_of(length).budget), "difference": difference,
                         "compiled_ms": ms["compiled"], "package_ms": ms["package"]})
    return rows


if __name__ == "__main__":
    main()
