"""(f) Load-bearing tokens: filler is thinned, symbolic tokens are kept, and the answers stay right.

Rows are the shipped model's tasks: statements (definitions and questions, full of digits, operators and keys) planted
in real text, answers at the very end. Shown per policy, at equal density: answers right, and the share kept of the
blocks that hold a planted statement and of those that are filler, as the asking rows (the last query block) see them.

    ours        peaks under one tolerance: what is load-bearing is read off the attention
    protected   the same with the statements' key blocks protected, the tolerance raised to the same density
    share       a fixed share of the same estimate; of block means; perfect
    window      the latest blocks
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.charts import Series, draw
from benchmarks.thesis.needed import OURS
from benchmarks.thesis.policies import Policy
from benchmarks.thesis.subject import Subject
from sparsify.kernels.blocks import KEY_BLOCK
from sparsify.models.loading import TINY_LM
from sparsify.models.tasks import retrieval_rows

LENGTHS = (2048, 4096, 8192, 32768)
DENSITIES = (0.4, 0.2, 0.1, 0.05)
PER_ROW = {"kv": 4, "mv": 4, "copy": 2}  # tasks, and the answers that a row of each asks for
MOST_TOKENS = 1 << 18  # of the rows of one task
POLICIES = {"ours": OURS, "protected": Policy("split-6", "absolute", protect=True), "share": Policy("split-6", "share"),
            "share, block means": Policy("sub-64", "share", by="mean"),
            "share, perfect": Policy("oracle", "share", by="mean"), "window": Policy("split-6", "window")}
STATEMENT = re.compile(r"(# NOTE|# QUERY|# MARK|# PRICE|Question:|Answer:|set |get |let |<copy|</copy>|<paste)")
ATTEMPTS = 3  # runs at most to meet a density
NEAR = 0.02  # relative


def measure(subject: Subject, lengths: Sequence[int], queries: int) -> dict[str, Any]:
    if subject.name != "tiny-lm":
        return {"lengths": []}
    rows = []
    for length in [length for length in lengths if length in LENGTHS]:
        for kind, per_row in PER_ROW.items():
            task = retrieval_rows(TINY_LM, kind, length, max(1, min(queries // per_row, MOST_TOKENS // length)))
            marked = torch.stack([statements(subject, ids) for ids in task.ids])
            row: dict[str, Any] = {"length": length, "kind": kind, "queries": sum(len(a) for a in task.answers),
                                   "statements": round(float(marked.float().mean()), 4),
                                   "dense": _judge(subject, None, task, marked)["right"], "policies": {}}
            for name, policy in POLICIES.items():
                floor = subject.criticals([policy], length)[0].floor()
                densities = [density for density in DENSITIES if density >= floor]
                row["policies"][name] = [_at_density(subject, policy, task, marked, density) for density in densities]
            rows.append(row)
            print(f"{kind} at {length}, dense {row['dense']:.2f}: " + "; ".join(
                f"{name} " + " ".join(f"{one['right']:.2f}@{one['density']:.2f}" for one in found)
                for name, found in row["policies"].items()), flush=True)
    return {"lengths": rows}


def _at_density(subject: Subject, policy: Policy, task: Any, marked: Tensor, density: float) -> dict[str, Any]:
    """Judged at the amount that meets the density on these rows: the amount of real text, then by secant."""
    length = task.ids.shape[1]
    criticals = subject.criticals([policy], length)[0]
    wanted, found = density, dict[str, Any]()
    for _ in range(ATTEMPTS):
        attempt = _judge(subject, policy.at(criticals.amount(max(criticals.floor(), wanted))), task, marked)
        if not found or abs(attempt["density"] - density) < abs(found["density"] - density):
            found = attempt
        if abs(attempt["density"] / density - 1) < NEAR:
            break
        wanted = max(0.2 * density, wanted * density / attempt["density"])
    return found


def _judge(subject: Subject, policy: Policy | None, task: Any, marked: Tensor) -> dict[str, Any]:
    of_statements, of_filler = torch.zeros(2), torch.zeros(2)

    def count(layer: int, kept: Tensor, rows: Tensor) -> None:
        asking = kept[:, :, -1].float().mean(1).cpu()  # [rows, key blocks], mean over heads
        for total, those in ((of_statements, marked[rows]), (of_filler, ~marked[rows])):
            total.add_(torch.stack([asking[those].sum(), those.sum().float()]))

    right, density = subject.answers(policy, task, marked, count)
    kept = {name: round(float(total[0] / total[1].clamp(min=1)), 4)
            for name, total in (("statements_kept", of_statements), ("filler_kept", of_filler))}
    return {"amount": 0.0 if policy is None else round(policy.amount, 6), "density": round(density, 4),
            "right": round(sum(right) / len(right), 4), **kept}


def statements(subject: Subject, ids: Tensor) -> Tensor:
    """Key blocks that hold a token of a planted statement: bool [key blocks]. By the text alone, as a user would."""
    marked = torch.zeros(len(ids), dtype=torch.bool)
    line = list[int]()
    text = ""
    copying = False
    for at, token in enumerate([*ids.tolist(), None]):
        piece = "\n" if token is None else subject.token_of(token)
        if "\n" in piece:
            if copying or STATEMENT.match(text.strip()):
                marked[line] = True
            copying = (copying or "<copy" in text or "<paste" in text) and "</" not in text
            text, line = "", []
        text += piece.split("\n")[-1] if "\n" in piece else piece
        line.append(at)
    pad = -len(ids) % KEY_BLOCK
    return torch.nn.functional.pad(marked, (0, pad)).view(-1, KEY_BLOCK).any(-1)


def charts(name: str, result: dict[str, Any]) -> dict[str, str]:
    made = {}
    for row in result["lengths"]:
        if row["kind"] == "kv":
            series = [Series(policy, [(one["density"], one["right"]) for one in found])
                      for policy, found in row["policies"].items() if found]
            made[f"kv-{row['length']}"] = draw(series, title=f"{name}: key-value answers right at {row['length']}",
                                               x="density", y="share of answers")
    return made
