"""(d) The question itself: static per-token sparsity at short sequences.

Here sparsity is by single keys, not by blocks, and the selector is perfect: what a static share costs is then the
share's own doing. *Static*: every token keeps the same share of the keys it sees, the heaviest. *Adaptive*: every token
keeps the keys to which it gives a tolerance, one tolerance for all; equal density. 95 % intervals over windows, each
from a passage of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.charts import Series, draw
from benchmarks.thesis.attention import key_weights
from benchmarks.thesis.policies import Policy
from benchmarks.thesis.quality import interval, kl_at, ratio_interval
from benchmarks.thesis.subject import Outcome, Subject

DENSITIES = (0.5, 0.25, 0.125, 0.0625)
LONGEST = 2048
ONE_IN = 64  # weights looked at to set a tolerance


def measure(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    rows = []
    for length in [length for length in lengths if length <= LONGEST]:
        row: dict[str, Any] = {"length": length, "windows": len(subject.windows(length)), "at": []}
        tolerances = _tolerances(subject, length)
        adaptives = [subject.run(Policy("keys", "absolute", tolerance), length) for tolerance in tolerances]
        points = [one.point for one in adaptives]
        for density, adaptive in zip(DENSITIES, adaptives, strict=True):
            static = subject.run(Policy("keys", "share", density), length)
            kl = kl_at(points, static.density)  # at the very density of the static share
            low, high = ratio_interval([x * kl / adaptive.kl for x in adaptive.change.kl], static.change.kl)
            row["at"].append({"density": density, "static": _side(static), "adaptive": _side(adaptive),
                              "adaptive_kl_at_equal_density": round(kl, 7),
                              "adaptive_over_static": round(kl / static.kl, 4),
                              "interval": [round(low, 4), round(high, 4)]})
            print(f"{subject.name} {length}, every token {density:g} of its keys: KL {static.kl:.4f}, loss "
                  f"{row['at'][-1]['static']['loss_rise_nats']:+.4f} nats; adaptive KL {kl:.4f}", flush=True)
        rows.append(row)
    return {"lengths": rows}


def _side(outcome: Outcome) -> dict[str, Any]:
    change = outcome.change
    rises = [after - before for before, after in zip(change.loss_dense, change.loss, strict=True)]
    return {**outcome.to_dict(), "kl_interval": interval(change.kl), "loss_rise_nats": sum(rises) / len(rises),
            "loss_rise_nats_interval": interval(rises)}


@torch.no_grad()
def _tolerances(subject: Subject, length: int) -> list[float]:
    """The tolerances that give DENSITIES on the calibration windows."""
    sampled: list[Tensor] = []
    generator = torch.Generator(subject.device).manual_seed(0)

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        for _, weights, seen in key_weights(q, k, scale):
            picked = torch.randint(weights.numel(), (weights.numel() // ONE_IN,), generator=generator, device=q.device)
            visible = seen.flatten()[picked % seen.numel()]
            sampled.append(weights.flatten()[picked][visible].cpu())

    for ids in subject.batches(subject.calibration(length)):
        subject.logits(ids, None, watch=look)
    values = torch.cat(sampled).sort(descending=True).values
    return [float(values[int(density * (len(values) - 1))]) for density in DENSITIES]


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    series = [Series(f"{side}, {density:g}", [(row["length"], max(1e-6, row["at"][place][side]["kl"]))
                                              for row in result["lengths"]], dashed=side == "adaptive")
              for place, density in enumerate(DENSITIES) for side in ("static", "adaptive")]
    return {"kl": draw(series, title=f"{name}: every token keeps the same share of keys", x="tokens", y="KL, nats",
                       log_x=True, log_y=True)}
