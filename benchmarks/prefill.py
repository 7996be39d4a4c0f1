"""What it is worth, exactly, that masks are proven: `python -m benchmarks.prefill [--length 8192] [--layers 8]`.

A Llama of Hugging Face with random weights (32 query heads, 8 KV heads, head dim 128 on CUDA; smaller on a CPU) in
prefill, whose mask transformers materialises under torch.compile. Plain torch.compile beside the dense plan, both sides
Inductor, same weights, interleaved, medians. The logits must be equal to rounding: each side's distance from the model
in float64 (on CUDA float32), in root mean square, and ours at most twice the plain one's. CUDA writes the figures and
results/prefill.json; a CPU prints.
"""

import argparse
import copy
import json
from typing import Any

import torch

from benchmarks import records
from benchmarks.figures import Figure, record
from sparsify.measurement import compile_sides, measuring, time_in_turns
from sparsify.plan import Plan

ROUNDING = 2.0
"""What our error may be, in errors of plain torch.compile: rounding in another order, and nothing else."""


def main() -> None:
    """Measure both implementations of Hugging Face, print, and on CUDA keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    rows = []
    for implementation in ("sdpa", "eager"):
        rows.append(measure(implementation, options.length, options.layers, device))
        print(rows[-1], flush=True)
    facts = records.environment(device.type)
    results = {"environment": facts, "rows": rows}
    print(json.dumps(results, indent=1))
    if not on_cuda:
        return
    records.write_json(records.RESULTS / "prefill.json", results)
    command = f"python -m benchmarks.prefill --length {options.length} --layers {options.layers}"
    for row in rows:
        common: dict[str, Any] = {"issue": "pass", "where": facts["device"], "command": command}
        name = f"prefill of {options.length}, {row['attention']} attention, dense plan"
        record(Figure(figure=f"{name}: ratio over torch.compile", value=row["ratio"], bar=">= 1.2", unit="x", **common),
               Figure(figure=f"{name}: error of logits", value=row["ours_error"] / row["plain_error"],
                      bar=f"<= {ROUNDING}", unit="errors of torch.compile", **common))


def measure(implementation: str, length: int, layers: int, device: torch.device) -> dict[str, Any]:
    """One row: milliseconds of both sides, their ratio, and how far the logits of each are from the truth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = device.type == "cuda"
    heads, kv_heads, dim = (32, 8, 128) if wide else (8, 2, 64)
    dtype = torch.bfloat16 if wide else torch.float32
    config = LlamaConfig(vocab_size=4096, hidden_size=heads * dim, intermediate_size=2 * heads * dim, head_dim=dim,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=length, attn_implementation=implementation)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    ids = torch.randint(config.vocab_size, (1, length), device=device)
    torch._dynamo.reset()
    plain, ours = compile_sides(model, Plan.dense())
    with measuring(model):
        exact = copy.deepcopy(model).to(torch.float32 if wide else torch.float64)
        exact.config._attn_implementation = "sdpa"  # eager would hold the scores of all heads
        truth = exact(ids, use_cache=False).logits
        del exact
        errors = [float((side(ids) - truth).square().mean().sqrt() / truth.square().mean().sqrt())
                  for side in (plain, ours)]
        del truth
        seconds = time_in_turns(plain, ours, ids, repeats=5)
    return {"attention": implementation, "length": length, "layers": layers, "dtype": str(dtype),
            "plain_ms": 1e3 * seconds[0], "ours_ms": 1e3 * seconds[1], "ratio": seconds[0] / seconds[1],
            "plain_error": errors[0], "ours_error": errors[1]}


if __name__ == "__main__":
    main()
