"""(c) Which rule, at equal density? Ours against what a fixed budget would do, estimated and perfect, at every length.

Every policy is judged at the two densities where ours has a KL near 0.01 and 0.03; what is left of a difference in
density is taken out along the policy's own curve. A fixed share is given the better of its two rankings.

Rules spread blocks over positions differently, and a fixed share is hardest on the first rows of a sequence. `last
quarter` compares the same runs at equal density *of the last quarter of the rows*, KL over those rows: there all rows
see about as many keys, and what is left is which heads and rows get the blocks.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.charts import Series, draw
from benchmarks.figures import Figure
from benchmarks.thesis.needed import OURS, PERFECT, TARGETS, search
from benchmarks.thesis.policies import Policy
from benchmarks.thesis.quality import density_for, kl_at, ratio_interval
from benchmarks.thesis.subject import Outcome, Subject

SHARES = (Policy("split-6", "share"), Policy("split-6", "share", by="mean"))
PERFECT_SHARES = (Policy("oracle", "share"), Policy("oracle", "share", by="mean"))
SUB_BLOCKS = Policy("sub-8", "absolute")
RIVALS = (PERFECT, SUB_BLOCKS, *SHARES, *PERFECT_SHARES, Policy("sub-64", "share", by="mean"),
          Policy("split-6", "tokens"), Policy("oracle", "tokens"), Policy("split-6", "window"),
          Policy("split-6", "top-p"), Policy("oracle", "top-p"))


def measure(subject: Subject, lengths: Sequence[int]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for length in lengths:
        subject.criticals([OURS, *RIVALS], length)
        found = search(subject, OURS, length)
        floor = subject.criticals([OURS], length)[0].floor()
        wanted = [max(floor, density_for([one.point for one in found], target)) for target in TARGETS]
        curves = {kind: [subject.at_density(kind, length, density) for density in wanted] for kind in (OURS, *RIVALS)}
        rows.append({"length": length, "windows": len(subject.windows(length)),
                     "at": [_compared(curves, place) for place in range(len(wanted))],
                     "runs": [one.to_dict() for outcomes in curves.values() for one in outcomes]})
        for at in rows[-1]["at"]:
            print(f"{subject.name} {length}, density {at['density']:.3f}: " + ", ".join(
                f"{name} {one['kl']:.4f} (last quarter {one['last_quarter']['kl']:.4f})"
                for name, one in at["policies"].items()), flush=True)
    return {"lengths": rows}


def _compared(curves: dict[Policy, list[Outcome]], place: int) -> dict[str, Any]:
    """All policies at the density of ours, with the ratio of ours to each and its interval over windows."""
    ours = curves[OURS][place]
    compared = {}
    for kind, outcomes in curves.items():
        kl = kl_at([one.point for one in outcomes], ours.density)
        near = outcomes[place]
        scale = kl / near.kl if near.kl else 1.0
        low, high = ratio_interval(ours.change.kl, [max(1e-9, scale * x) for x in near.change.kl])
        last = kl_at([one.last_point for one in outcomes], ours.last_point[0])
        between = min(one.last_point[0] for one in outcomes) <= 1.02 * ours.last_point[0]
        compared[str(kind)] = {"kl": round(kl, 6), "ours_over_it": round(ours.kl / max(kl, 1e-9), 4),
                               "interval": [round(low, 4), round(high, 4)],
                               "density_before": round(near.density, 4),
                               "last_quarter": {"kl": round(last, 6), "extrapolated": not between,
                                                "ours_over_it": round(ours.last_point[1] / max(last, 1e-9), 4)}}
    return {"density": round(ours.density, 5), "density_last_quarter": round(ours.last_point[0], 5),
            "tolerance": round(ours.amount, 6), "policies": compared}


def figures(name: str, result: dict[str, Any], where: str, command: str) -> list[Figure]:
    """The issue's bars, at the density where our KL is near 0.01."""
    found = []
    for row in result["lengths"]:
        length, policies = row["length"], row["at"][0]["policies"]
        ours = policies[str(OURS)]["kl"]

        def over(kinds: Sequence[Policy], ours: float = ours, policies: dict[str, Any] = policies) -> float:
            return ours / min(policies[str(kind)]["kl"] for kind in kinds)

        def figure(what: str, value: float, bar: float, length: int = length) -> Figure:
            return Figure("budgets", f"{name} {length}: KL of ours over {what}, equal density", round(value, 4),
                          f"<= {bar:g}", "ratio", where, command)

        if length >= 2048:
            found.append(figure("a fixed share, same estimate", over(SHARES), 0.75 if length in (4096, 8192) else 1.0))
            if name != "tiny-lm":
                found.append(figure("sub8", over([SUB_BLOCKS]), 0.7))
        if length >= 4096:
            found.append(figure("a perfect fixed share", over(PERFECT_SHARES), 1.0))
    return found


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    kinds = [OURS, *RIVALS]
    series = [Series(str(kind), [(row["length"], max(1e-5, row["at"][0]["policies"][str(kind)]["kl"]))
                                 for row in result["lengths"]], dashed=kind.estimator == "oracle") for kind in kinds]
    return {"kl": draw(series, title=f"{name}: KL at the density where ours has 0.01", x="tokens", y="KL, nats",
                       log_x=True, log_y=True)}
