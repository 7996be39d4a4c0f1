"""(b) The share that is free at the longest length, at each shorter one, against a plan: KL, loss, retrieval.

The share is that of `split-6, share`, the product's estimate under a fixed share, with KL 0.01 at the longest length.
A plan is a file of `sparsify calibrate`; without one, the default tolerance at every length, the first layer dense.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.charts import Series, draw
from benchmarks.figures import Figure
from benchmarks.thesis.needed import search
from benchmarks.thesis.policies import Policy
from benchmarks.thesis.quality import density_for, interval, ratio_interval
from benchmarks.thesis.subject import Subject
from sparsify.errors import OptionError
from sparsify.models.loading import TINY_LM
from sparsify.models.tasks import retrieval_rows
from sparsify.plan import DEFAULT_TOLERANCE, Bucket, Budget, Plan

FOLLOWED = ("tolerance", "max_density", "sinks", "local", "singles", "peaks")  # the last only says what pays
FREE = 0.01  # KL, nats
SHARE = Policy("split-6", "share")
QUERIES = {"kv": 4, "copy": 2}  # per row
DEPTHS = 4  # quarters of the context that answers are counted by
WITHOUT_PLAN = Plan((Bucket(1, None, Budget(DEFAULT_TOLERANCE), {0: Budget.dense()}),), name="default tolerance")


def measure(subject: Subject, lengths: Sequence[int], plan_file: Path | None, queries: int) -> dict[str, Any]:
    plan = WITHOUT_PLAN if plan_file is None else Plan.load(plan_file)
    longest = max(lengths)
    points = [one.point for one in search(subject, SHARE, longest)]
    amount = subject.criticals([SHARE], longest)[0].amount(density_for(points, FREE))
    rows: list[dict[str, Any]] = []
    for length in sorted(lengths, reverse=True):
        sides: dict[str, Any] = {"dense": None, "fixed share": SHARE.at(amount),
                                 "plan": plan_policies(plan, length, subject.layers)}
        row: dict[str, Any] = {"length": length, "windows": len(subject.windows(length))}
        for name, policies in sides.items():
            row[name] = {}
            if policies is not None:
                outcome = subject.run(policies, length, name)
                rise = ratio_interval(outcome.change.loss, outcome.change.loss_dense)
                row[name] = {**outcome.to_dict(), "kl_interval": interval(outcome.change.kl),
                             "loss_rise_interval": [round(x - 1, 6) for x in rise]}
            if subject.name == "tiny-lm":
                row[name]["retrieval"] = {kind: retrieval(subject, policies, kind, length, queries) for kind in QUERIES}
        rows.insert(0, row)
        print(f"{subject.name} {length}: share KL {row['fixed share']['kl']:.4f}, plan KL {row['plan']['kl']:.4f}; "
              + str({name: row[name].get("retrieval") for name in sides}), flush=True)
    return {"plan_file": None if plan_file is None else plan_file.name, "plan": plan.to_dict(), "share": amount,
            "longest": longest, "lengths": rows}


def plan_policies(plan: Plan, length: int, layers: int) -> list[Policy | None]:
    """One policy per layer: what the plan's bucket of this length says of the site of that number.

    Raises OptionError for a budget that says more than a policy can.
    """
    bucket = plan.bucket_of(length)
    return [_policy_of(bucket.budget_of(layer)) for layer in range(layers)]


def _policy_of(budget: Budget) -> Policy | None:
    if budget.tolerance is None:
        return None
    for one in fields(budget):
        if one.name not in FOLLOWED and getattr(budget, one.name) != one.default:
            raise OptionError(f"plan has a budget with {one.name} = {getattr(budget, one.name)!r}, which is not "
                              f"followed here; what is: {', '.join(FOLLOWED)}. Give a plan without it.")
    return Policy(f"split-{budget.singles}", "absolute", budget.tolerance, max_density=budget.max_density,
                  sinks=budget.sinks, local=budget.local)


def retrieval(subject: Subject, policies: Any, kind: str, length: int, queries: int) -> dict[str, Any]:
    """Exact match of a task of the shipped model, the number of queries, and the same by the depth of what is asked."""
    rows = retrieval_rows(TINY_LM, kind, length, max(1, queries // QUERIES[kind]))
    right, density = subject.answers(policies, rows)
    by_depth: list[list[bool]] = [[] for _ in range(DEPTHS)]
    for answer, depth in zip(right, itertools.chain(*rows.depths), strict=True):
        by_depth[min(DEPTHS - 1, int(depth * DEPTHS))].append(answer)
    return {"right": round(sum(right) / len(right), 4), "queries": len(right), "density": round(density, 4),
            "by_depth": [{"right": sum(some), "queries": len(some)} for some in by_depth]}


def figures(name: str, result: dict[str, Any], where: str, command: str) -> list[Figure]:
    """The issue's bars for a plan that ships; none without a plan file."""
    if result["plan_file"] is None:
        return []
    found = []
    for row in result["lengths"]:
        of_plan = row["plan"]
        bars = [("KL", of_plan["kl"], 0.01, "nats"), ("loss rise", of_plan["loss_rise"], 0.003, "relative"),
                ("loss rise, upper 95 % bound", of_plan["loss_rise_interval"][1], 0.005, "relative")]
        for kind, answers in of_plan.get("retrieval", {}).items():
            depths = list(zip(row["dense"]["retrieval"][kind]["by_depth"], answers["by_depth"], strict=True))
            lost = [dense["right"] - ours["right"] for dense, ours in depths]
            behind = 100 * sum(lost) / answers["queries"]
            worst = max(100 * some / max(1, ours["queries"]) for some, (_, ours) in zip(lost, depths, strict=True))
            bars += [(f"{kind}, points behind dense", round(behind, 4), 1.0, "points"),
                     (f"{kind}, points behind dense at the worst quarter of depths", round(worst, 4), 1.0, "points")]
        found += [Figure("budgets", f"{name} {row['length']}: {what} of the plan", value, f"<= {bar:g}", unit, where,
                         command) for what, value, bar, unit in bars]
    return found


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    rows = result["lengths"]
    sides = ("fixed share", "plan")
    made = {"kl": draw([Series(side, [(row["length"], max(1e-5, row[side]["kl"])) for row in rows]) for side in sides],
                       title=f"{name}: a share free at {result['longest']}, and a plan", x="tokens", y="KL, nats",
                       log_x=True, log_y=True)}
    if "retrieval" in rows[0]["plan"]:
        made["retrieval"] = draw(
            [Series(f"{side}, {kind}", [(row["length"], row[side]["retrieval"][kind]["right"]) for row in rows],
                    dashed=side == "dense") for side in ("dense", *sides) for kind in QUERIES],
            title=f"{name}: answers right", x="tokens", y="share of answers", log_x=True)
    return made
