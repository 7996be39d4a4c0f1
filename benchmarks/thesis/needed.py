"""(a) How much density does each length need?

For coverage: of a perfect selector on mean mass, per head. For KL: of our policy, of perfect peaks, and of the fixed
shares, found by interpolation of log KL over log density between runs around the target.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.charts import Series, draw
from benchmarks.thesis import shares
from benchmarks.thesis.policies import Policy, critical_amounts
from benchmarks.thesis.quality import density_for
from benchmarks.thesis.subject import Outcome, Subject
from sparsify.kernels.blocks import allowed_blocks
from sparsify.kernels.masks import Masks

OURS = Policy("split-6", "absolute")
PERFECT = Policy("oracle", "absolute")
KINDS = (OURS, PERFECT, Policy("split-6", "share"), Policy("oracle", "share", by="mean"))
COVERAGES = (0.90, 0.95, 0.99)
TARGETS = (0.01, 0.03)  # KL, nats
REFINEMENTS = 2  # runs per target after the first guess
CLOSE = 0.05  # a run whose KL is this near the target, in log, is the target's


def measure(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for length in lengths:
        row: dict[str, Any] = {"length": length, "windows": len(subject.windows(length)),
                               "coverage": coverage_densities(subject, length), "kl": {}}
        subject.criticals(KINDS, length)
        for kind in KINDS:
            outcomes = search(subject, kind, length)
            points = [one.point for one in outcomes]
            row["kl"][str(kind)] = {
                **{f"{target:g}": round(density_for(points, target), 4) for target in TARGETS},
                "runs": [one.to_dict() for one in outcomes]}
        rows.append(row)
        print(f"{subject.name} {length}: " + ", ".join(f"{name} {found['0.01']:.3f} / {found['0.03']:.3f}"
                                                       for name, found in row["kl"].items()), flush=True)
    return {"lengths": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How density falls with the length, as a power."""
    return {"exponents": _exponents(rows) if len(rows) > 1 else {}}


def search(subject: Subject, kind: Policy, length: int) -> list[Outcome]:
    """Outcomes of a kind around the densities where its KL meets TARGETS."""
    criticals = subject.criticals([kind], length)[0]
    floor = criticals.floor()
    guess = min(0.9, max(floor + 0.02, (length / 512) ** -0.4 * 0.8))
    outcomes = [subject.at_density(kind, length, guess)]
    for target in TARGETS:
        for _ in range(REFINEMENTS):
            points = [one.point for one in outcomes]
            if any(abs(np.log(max(kl, 1e-9) / target)) < CLOSE for _, kl in points):
                break
            wanted = min(0.97, max(floor, density_for(points, target)))
            found = subject.at_density(kind, length, wanted)
            if found in outcomes:  # the floor, or a step of whole blocks
                break
            outcomes.append(found)
    return outcomes


@torch.no_grad()
def coverage_densities(subject: Subject, length: int) -> dict[str, dict[str, Any]]:
    """Per coverage: density over all rows and over the last quarter, mean over heads, and quartiles of heads."""
    kind = Policy("oracle", "top-p")
    kept = np.zeros((len(COVERAGES), 2, subject.layers, subject.heads))
    possible = np.zeros(2)
    allowed = allowed_blocks(Masks(0), length, length, subject.device)[0]
    last = slice(allowed.shape[0] - max(1, allowed.shape[0] // 4), None)

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        critical = critical_amounts(kind, shares.signals_of("oracle", q, k, scale), length)
        for place, coverage in enumerate(COVERAGES):
            reached = (critical < coverage) & allowed
            counts = torch.stack([reached.sum((0, 2, 3)), reached[:, :, last].sum((0, 2, 3))])
            kept[place, :, layer] += counts.cpu().numpy()

    for ids in subject.batches(subject.windows(length)):
        subject.logits(ids, None, watch=look)
        possible += len(ids) * np.array([int(allowed.sum()), int(allowed[last].sum())])
    densities = kept / possible[:, None, None]
    return {f"{coverage:g}": {
        "density": round(float(densities[i, 0].mean()), 4), "last_quarter": round(float(densities[i, 1].mean()), 4),
        "heads": [round(float(x), 4) for x in np.quantile(densities[i, 0], [0, 0.25, 0.5, 0.75, 1])]}
        for i, coverage in enumerate(COVERAGES)}


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    rows = result["lengths"]
    coverage = [Series(f"coverage {c:g}", [(row["length"], row["coverage"][f"{c:g}"]["density"]) for row in rows])
                for c in COVERAGES]
    by_kl = [Series(f"{kind.estimator} {kind.rule}, KL {target:g}",
                    [(row["length"], row["kl"][str(kind)][f"{target:g}"]) for row in rows], dashed=target != TARGETS[0])
             for kind in KINDS for target in TARGETS]
    titles = {"coverage": (coverage, f"{name}: density that coverage needs, perfect selector"),
              "kl": (by_kl, f"{name}: density that a KL needs")}
    return {chart: draw(series, title=title, x="tokens", y="density", log_x=True)
            for chart, (series, title) in titles.items()}


def _exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """b of density ~ length**b, over lengths where the need is below 1."""
    found = {}
    for coverage in COVERAGES:
        found[f"coverage {coverage:g}"] = [(r["length"], r["coverage"][f"{coverage:g}"]["last_quarter"]) for r in rows]
    for kind in KINDS:
        for target in TARGETS:
            found[f"{kind}, KL {target:g}"] = [(r["length"], r["kl"][str(kind)][f"{target:g}"]) for r in rows]
    logs = {name: np.log(np.array(points)) for name, points in found.items() if len(points) > 1}
    return {name: round(float(np.polyfit(at[:, 0], at[:, 1], 1)[0]), 3) for name, at in logs.items()}
