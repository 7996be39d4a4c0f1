"""Split summaries against sub-block means at equal density: what the estimator is worth, in KL.

    python -m benchmarks.thesis.estimators --model SMOLLM2 --text FILE [--length 4096] [--density 0.29]

Every layer of the model is sparse (harsher than any plan), one absolute tolerance for all heads is set so that the
density of both estimators is the one asked for, and the KL to dense attention is averaged over all positions. The
estimates are those of the references: `kernels/oracle.py` for split-m, `sub_block_shares` here for means of 8 keys.
Published on SmolLM2-135M, prose of 4K tokens, density 0.29: split-6 0.0120, sub8 0.0217 (ratio 0.55); code 0.22:
0.0177, 0.0272 (0.65); needle text 0.31: 0.0162, 0.0202 (0.80).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.figures import Figure, record
from sparsify import ops
from sparsify.kernels import oracle, rule
from sparsify.kernels.blocks import allowed_blocks
from sparsify.kernels.masks import Masks
from sparsify.measurement import device_name, encode
from sparsify.models.loading import load_model

SINGLES, SUB_BLOCK = 6, 8
Shares = Callable[[Tensor, Tensor, float], Tensor]


def split_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Estimated shares [B, H, q_len, key blocks] by split summaries, exact on the diagonal."""
    return oracle.estimated_shares(q, k, singles=SINGLES, scale=scale, causal_offset=0)


def sub_block_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Estimated shares by means of `SUB_BLOCK` keys, on the diagonal too: what block pooling can do at this cost."""
    means = k.unflatten(2, (-1, SUB_BLOCK)).mean(3).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ means.transpose(-1, -2) * scale
    future = torch.arange(means.shape[2]) * SUB_BLOCK > torch.arange(q.shape[2])[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1).unflatten(-1, (-1, 64 // SUB_BLOCK)).sum(-1)


ESTIMATORS: dict[str, Shares] = {f"split-{SINGLES}": split_shares, f"sub{SUB_BLOCK}": sub_block_shares}


def causal(scale: float) -> tuple:
    """From `scale` on, as the ops take them by position."""
    return scale, 0, None, None, None, None, None, 0.0, None


class SparseAttention:
    """An attention function for transformers: dense until it is given an estimator and a tolerance."""

    def __init__(self) -> None:
        self.shares: Shares | None = None
        self.tolerance = 0.0
        self.kept = self.allowed = 0

    def __call__(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                 scaling: float, **kwargs: object) -> tuple[Tensor, None]:
        length = q.shape[2]
        if self.shares is None:
            return ops.exact_attention(q, k, v, *causal(scaling), ops.VERSION).transpose(1, 2), None
        peaks = oracle.peaks(self.shares(q, k, scaling))
        kept = rule.keep(peaks, q_len=length, kv_len=length, tolerance=self.tolerance, max_density=1.0, sinks=1,
                           local=1, masks=Masks(0))
        allowed = allowed_blocks(Masks(0), length, length, q.device)
        self.kept += int(kept.sum())
        self.allowed += int(allowed.sum()) * q.shape[1]
        lists = rule.pack(kept, peaks, allowed)
        return ops.block_sparse_attention(q, k, v, *lists, *causal(scaling))[0].transpose(1, 2), None


def compare(model: torch.nn.Module, attention: SparseAttention, ids: Tensor, density: float,
            runs: int) -> dict[str, dict[str, float]]:
    """KL of every estimator at `density`, interpolated (log KL over log density) between its two nearest runs."""
    attention.shares = None
    dense = _log_probabilities(model, ids)
    results = {}
    for name, shares in ESTIMATORS.items():
        attention.shares, attention.tolerance = shares, 0.05
        points: list[tuple[float, float, float]] = []
        for _ in range(runs):
            attention.kept = attention.allowed = 0
            sparse = _log_probabilities(model, ids)
            kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
            points.append((attention.kept / attention.allowed, kl, attention.tolerance))
            print(f"  {name}: tolerance {points[-1][2]:.4f}, density {points[-1][0]:.4f}, KL {kl:.5f}", flush=True)
            attention.tolerance = _next_tolerance(points, density)
        (d0, kl0, t0), (d1, kl1, _) = sorted(points, key=lambda point: abs(point[0] - density))[:2]
        slope = 0.0 if d0 == d1 else torch.log(torch.tensor(kl1 / kl0)).item() / torch.log(torch.tensor(d1 / d0)).item()
        results[name] = {"kl": kl0 * (density / d0) ** slope, "density": d0, "tolerance": t0}
    return results


def _next_tolerance(points: list[tuple[float, float, float]], density: float) -> float:
    """Secant on log tolerance over log density; density falls about as tolerance^-0.6."""
    logs = [(torch.log(torch.tensor(d)).item(), torch.log(torch.tensor(t)).item()) for d, _, t in points]
    target = torch.log(torch.tensor(density)).item()
    slope = -1.6
    if len(logs) > 1 and logs[-1][0] != logs[-2][0]:
        slope = (logs[-1][1] - logs[-2][1]) / (logs[-1][0] - logs[-2][0])
    return float(torch.tensor(logs[-1][1] + slope * (target - logs[-1][0])).exp().clamp(1e-4, 0.5))


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.29)
    parser.add_argument("--start", type=int, action="append", help="first token of a window; may be repeated")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "estimators.json")
    arguments = parser.parse_args()
    attention = SparseAttention()
    AttentionInterface.register("sparsify_estimators", attention)
    loaded = load_model(arguments.model)
    model: Any = loaded.model
    model.set_attn_implementation("sparsify_estimators")
    ids = encode(arguments.text.read_text(encoding="utf-8"), loaded.tokenizer)
    windows = []
    for start in arguments.start or [0]:
        window = ids[start: start + arguments.length]
        print(f"window at token {start}", flush=True)
        windows.append({"start": start, **compare(model, attention, window, arguments.density, arguments.runs)})
    split, sub = (sum(window[name]["kl"] for window in windows) / len(windows) for name in ESTIMATORS)
    command = f"python -m benchmarks.thesis.estimators --model SMOLLM2 --text {arguments.text.name}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"length": arguments.length, "density": arguments.density, "windows": windows,
                                         "kl_split": split, "kl_sub": sub}, indent=1) + "\n")
    where = device_name(torch.device("cpu"))
    record(Figure("line", f"SmolLM2 KL, split-6 over sub8, {arguments.length} tokens, density {arguments.density:g}",
                  split / sub, "<= 0.8", "ratio", where, command))


if __name__ == "__main__":
    main()
