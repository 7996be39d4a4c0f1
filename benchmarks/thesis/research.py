"""(g) Estimators and what else could make a selection better, at equal density and at equal total time.

Candidates choose by one absolute tolerance; `zero-order`, `feedback` and `shared` are variants of `attention.py`. Time
is counted in density: attention over a share of the blocks takes that share of the dense time, an estimate of v
vectors a block SELECTION[length] of it (kernels/README.md, one H100, D = 128: m = 6 is 8 vectors, m = 2 is 4), so a
cheaper estimate may keep more blocks. Building clusters costs more than building split summaries and is not counted;
feedback is taken to cost nothing, and a correction of dropped blocks as much as two vectors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.charts import Series, draw
from benchmarks.thesis import shares
from benchmarks.thesis.needed import OURS, PERFECT, TARGETS, search
from benchmarks.thesis.policies import Policy, choose
from benchmarks.thesis.quality import density_for, kl_at, ratio_interval
from benchmarks.thesis.subject import Outcome, Subject

CANDIDATES = (Policy("split-2", "absolute"), Policy("split-14", "absolute"), Policy("sub-8", "absolute"),
              Policy("sub-16", "absolute"), Policy("kmeans-8", "absolute"), Policy("kmeans-7v", "absolute"),
              Policy("split-6", "absolute", variant="zero-order"), Policy("split-2", "absolute", variant="zero-order"),
              Policy("split-6", "absolute", variant="feedback"), Policy("split-6", "absolute", variant="shared"))
OWN_VECTORS = 8  # split-6


def measure(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for length in [length for length in lengths if length >= 2048]:
        subject.criticals([OURS, PERFECT, *CANDIDATES], length)
        floor = subject.criticals([OURS], length)[0].floor()
        found = search(subject, OURS, length)
        wanted = [max(floor, density_for([one.point for one in found], target)) for target in TARGETS]
        subject.attention.heads_of = matching_heads(subject, length, wanted[0])
        curves = {kind: [subject.at_density(kind, length, density) for density in [*wanted, *_in_time(
            kind, length, wanted, floor)]] for kind in (OURS, PERFECT, *CANDIDATES)}
        rows.append({"length": length, "windows": len(subject.windows(length)),
                     "at": [_compared(curves, place, length) for place in range(len(wanted))],
                     "runs": [one.to_dict() for outcomes in curves.values() for one in outcomes]})
        for at in rows[-1]["at"]:
            print(f"{subject.name} {length}, density {at['density']:.3f}: " + ", ".join(
                f"{name} {one['kl']:.4f} ({one['kl_at_equal_time']:.4f})" for name, one in at["candidates"].items()),
                flush=True)
    return {"lengths": rows}


def selection_share(length: int, vectors: float) -> float:
    """Time of a selection over the time of dense attention."""
    fixed, each = (0.20, 0.010) if length < 16384 else (0.11, 0.0075) if length < 32768 else (0.06, 0.0075)
    return fixed + each * vectors


def saved_density(kind: Policy, length: int) -> float:
    """The density that a candidate may keep beyond ours in the same total time."""
    if kind == PERFECT:
        return 0.0
    ours = selection_share(length, OWN_VECTORS)
    if kind.variant == "shared":
        return ours / 2
    vectors = shares.estimator(kind.estimator).vectors + (2 if kind.variant == "zero-order" else 0)
    return ours - selection_share(length, vectors)


def _in_time(kind: Policy, length: int, wanted: Sequence[float], floor: float) -> list[float]:
    """The densities of a candidate that takes as long as ours at the first of the wanted ones, if they differ."""
    saved = saved_density(kind, length)
    return [min(0.97, max(floor, wanted[0] + saved))] if saved else []


def _compared(curves: dict[Policy, list[Outcome]], place: int, length: int) -> dict[str, Any]:
    ours = curves[OURS][place]
    found = {}
    for kind, outcomes in curves.items():
        points = [one.point for one in outcomes]
        kl = kl_at(points, ours.density)
        saved = saved_density(kind, length)
        in_time = kl_at(points, min(1.0, max(0.01, ours.density + saved)))
        near = outcomes[place]
        low, high = ratio_interval([kl / near.kl * x for x in near.change.kl], ours.change.kl)
        found[str(kind)] = {"kl": round(kl, 6), "over_split_6": round(kl / ours.kl, 4),
                            "interval": [round(low, 4), round(high, 4)], "density_saved": round(saved, 4),
                            "kl_at_equal_time": round(in_time, 6), "over_split_6_at_equal_time":
                            round(in_time / ours.kl, 4), "density_before": round(near.density, 4)}
    return {"density": round(ours.density, 5), "candidates": found}


@torch.no_grad()
def matching_heads(subject: Subject, length: int, density: float) -> dict[int, Tensor]:
    """For every second layer, the head of the layer before whose kept blocks overlap most, on calibration windows."""
    policy = OURS.at(subject.criticals([OURS], length)[0].amount(density))
    overlap = dict[int, Tensor]()
    before: list[Tensor] = []

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        kept = choose(policy, shares.signals_of("split-6", q, k, scale), length).transpose(0, 1).flatten(1).float()
        if layer % 2:
            common = kept @ before[0].T
            union = kept.sum(1)[:, None] + before[0].sum(1) - common
            overlap[layer] = overlap[layer] + common / union if layer in overlap else common / union
        before[:] = [kept]

    for ids in subject.batches(subject.calibration(length)):
        subject.logits(ids, None, watch=look)
    return {layer: found.argmax(1) for layer, found in overlap.items()}


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    kinds = [str(kind) for kind in (PERFECT, *CANDIDATES)]
    series = [Series(kind, [(row["length"], row["at"][0]["candidates"][kind]["over_split_6"])
                            for row in result["lengths"]], dashed=kind == str(PERFECT)) for kind in kinds]
    return {"kl": draw(series, title=f"{name}: KL over split-6, equal density", x="tokens", y="ratio", log_x=True)}
