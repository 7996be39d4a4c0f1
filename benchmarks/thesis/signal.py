"""(e) Which signal drives compute? Blocks that a query block needs, against what one could know of it.

    attention entropy   of the true attention rows, mean over the query block
    next-token entropy  of the prediction at those positions, mean over the query block
    loss                at those positions

Two needs: the blocks that our policy keeps, and the blocks that a perfect selector needs for coverage 0.95. Rank
correlations within a head over the query blocks of the last half of a window, where the count of visible blocks decides
little; mean over heads and windows, 95 % intervals over windows. Where a window has few query blocks, they are noisy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.charts import Series, draw
from benchmarks.thesis import shares
from benchmarks.thesis.attention import key_weights
from benchmarks.thesis.needed import OURS, TARGETS, search
from benchmarks.thesis.policies import Policy, critical_amounts
from benchmarks.thesis.quality import density_for, interval, rank_correlation
from benchmarks.thesis.subject import Subject
from sparsify.kernels.blocks import allowed_blocks
from sparsify.kernels.masks import Masks

NEEDS = ("blocks kept by ours", "blocks for coverage 0.95")
COVERING, COVERAGE = Policy("oracle", "top-p"), 0.95
SIGNALS = ("attention entropy", "next-token entropy", "loss")


def measure(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    return {"lengths": [_at(subject, length) for length in lengths if length >= 2048]}


@torch.no_grad()
def _at(subject: Subject, length: int) -> dict[str, Any]:
    points = [one.point for one in search(subject, OURS, length)]
    criticals = subject.criticals([OURS], length)[0]
    policy = OURS.at(criticals.amount(max(criticals.floor(), density_for(points, TARGETS[0]))))
    found: dict[tuple[str, str], list[np.ndarray]] = {(need, name): [] for need in NEEDS for name in SIGNALS}
    picture: dict[str, list[float]] = {}
    for ids in subject.batches(subject.windows(length)):
        needs, signals = _needs_and_signals(subject, ids, policy)
        after = needs[NEEDS[0]].shape[-1] // 2
        for window in range(len(ids)):
            for (need, name), correlations in found.items():
                wanted, known = needs[need][window], signals[name][window]
                known = known.expand_as(wanted)
                correlations.append(np.array([[rank_correlation(known[i, h, after:].numpy(),
                                                                wanted[i, h, after:].numpy())
                                               for h in range(subject.heads)] for i in range(subject.layers)]))
        if not picture:
            kept = needs[NEEDS[0]][0].mean((0, 1))
            picture = {"density": (kept / (torch.arange(1, len(kept) + 1) * 2)).tolist(),
                       SIGNALS[0]: signals[SIGNALS[0]][0].mean((0, 1)).tolist(),
                       SIGNALS[1]: signals[SIGNALS[1]][0, 0, 0].tolist()}
    result: dict[str, Any] = {"length": length, "windows": len(found[NEEDS[0], SIGNALS[0]]),
                              "tolerance": round(policy.amount, 6), "correlations": [],
                              "picture": {name: [round(x, 4) for x in values] for name, values in picture.items()}}
    for (need, name), correlations in found.items():
        every = np.stack(correlations).reshape(len(correlations), -1)
        every = every[:, ~np.isnan(every).all(0)]  # heads that keep the same count everywhere have no rank
        per_window = [float(np.nanmean(one)) for one in every]
        result["correlations"].append({
            "need": need, "signal": name, "mean": round(float(np.mean(per_window)), 4),
            "interval": [round(x, 4) for x in interval(per_window)],
            "head_quartiles": [round(float(x), 3) for x in np.quantile(np.nanmean(every, 0), [0.25, 0.5, 0.75])]})
        print(f"{subject.name} {length}: {need} against {name}: {result['correlations'][-1]['mean']:+.3f}", flush=True)
    return result


def _needs_and_signals(subject: Subject, ids: Tensor, policy: Policy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Blocks [B, layers, H, query blocks], and signals of that shape or [B, 1, 1, query blocks]."""
    kept, covering, entropy = list[Tensor](), list[Tensor](), list[Tensor]()
    length = ids.shape[1]
    allowed = allowed_blocks(Masks(0), length, length, ids.device)[0]

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        entropy.append(shares.mean_of_rows(attention_entropy(q, k, scale)[..., None])[..., 0].cpu())
        critical = critical_amounts(COVERING, shares.signals_of("oracle", q, k, scale), length)
        covering.append(((critical < COVERAGE) & allowed).sum(-1).cpu())

    logits = subject.logits(ids, None, watch=look)
    predicted = _next_token(logits, ids)
    subject.logits(ids, policy, on_kept=lambda layer, mask: kept.append(mask.sum(-1).cpu()))
    return ({NEEDS[0]: torch.stack(kept, 1).float(), NEEDS[1]: torch.stack(covering, 1).float()},
            {SIGNALS[0]: torch.stack(entropy, 1), **predicted})


def attention_entropy(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Entropy in nats of every row of the true attention: [B, H, L]."""
    return torch.cat([torch.special.entr(weights).sum(-1) for _, weights, _ in key_weights(q, k, scale)], 2)


def _next_token(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Per query block: mean entropy of the prediction and mean loss, [B, 1, 1, query blocks]."""
    entropy, loss = [], []
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    for rows, wanted in zip(logits.split(512, 1), targets.split(512, 1), strict=True):
        log_p = rows.float().log_softmax(-1)
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        loss.append(-log_p.gather(-1, wanted[..., None])[..., 0])
    whole = {SIGNALS[1]: torch.cat(entropy, 1), SIGNALS[2]: torch.cat(loss, 1)}
    return {name: shares.mean_of_rows(x[:, None, :, None])[:, :, None, :, 0].cpu() for name, x in whole.items()}


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    if not result["lengths"]:
        return {}
    row = result["lengths"][-1]
    blocks = len(row["picture"]["density"])
    series = []
    for what, values in row["picture"].items():
        most = max(values[1:])
        series.append(Series(f"{what}, 1 = {most:.2f}", [((i + 0.5) * row["length"] / blocks, x / most)
                                                         for i, x in enumerate(values) if i]))
    return {"document": draw(series, title=f"{name}: one document, query block by query block", x="token",
                             y="share of the largest")}
