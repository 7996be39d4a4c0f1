"""Choose the budget of every site by its key length.

Given   proven sites, the plan, and the symbols of the lengths that the user fixed a range for.
Leaves  the graph untouched; each site with the bucket and budget that hold for every call of this graph. A comparison
        made here becomes a guard: Dynamo then compiles one graph per bucket and picks it by the key length of a call.
Never   compares where that would break a promise: unbacked lengths, ranges given by mark_dynamic(min, max).

Order of decision: a static length; a length known to be in one bucket; a length that must not be compared: with
`tables` the budgets of all buckets it may be in, for the op to look up, else the most exact of them; else compare, and
so guard.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import (
    StrictMinMaxConstraint,
    free_unbacked_symbols,
    statically_known_true,
)

from sparsify.passes.graph import expression, is_tensor, same, shape
from sparsify.passes.site import AttentionSite, ChosenSite, ProvenSite, Refused
from sparsify.plan import Bucket, Budget, Plan

ANY_LENGTH = Bucket(1, None, Budget.dense())
SINGLE_QUERY = "a single query: selecting key blocks would read as much as attending to all"


def choose_budgets(sites: Sequence[ProvenSite | Refused], plan: Plan,
                   strict: frozenset[sympy.Symbol] = frozenset(), first_index: int = 0,
                   tables: bool = False) -> list[ChosenSite | Refused]:
    """Give every site its budget. `strict`: see `strict_symbols`; the first site is number `first_index`.

    tables: a site that may drop something gets all buckets that its length may be in, be it one: no graph is compiled
    per bucket.
    """
    plan = plan.merged()
    chosen: list[ChosenSite | Refused] = []
    for index, proven in enumerate(sites, first_index):
        if isinstance(proven, Refused):
            chosen.append(proven)
            continue
        site = proven.site
        if statically_known_true(site.q_len == 1):
            chosen.append(ChosenSite(site, proven.mask, ANY_LENGTH, Budget.dense(), SINGLE_QUERY))
            continue
        buckets, how = _buckets_of(site.kv_len, plan, strict, tables)
        fitted = [_fit(bucket.budget_of(index), site) for bucket in buckets]
        how = "; ".join(dict.fromkeys((how, *(why for _, why in fitted if why))))
        if tables:
            chosen.append(_with_table(proven, buckets, [budget for budget, _ in fitted], how))
            continue
        bucket, budget = min(zip(buckets, (budget for budget, _ in fitted), strict=True),
                             key=lambda pair: _exactness(pair[1]))
        least = site.kv_len if isinstance(site.kv_len, int) else min(bucket.lo for bucket in buckets)
        chosen.append(ChosenSite(site, proven.mask, bucket, budget, how, least_keys=least))
    return chosen


def _fit(budget: Budget, site: AttentionSite) -> tuple[Budget, str]:
    """The budget for a site, and why it is another than the plan's."""
    if budget.shifts is None or same(len(budget.shifts), site.heads):
        return budget, ""
    return Budget.dense(), (f"the plan has shifts for {len(budget.shifts)} heads and this site has {site.heads}: "
                            "exact")


def _with_table(proven: ProvenSite, buckets: Sequence[Bucket], budgets: Sequence[Budget], how: str) -> ChosenSite:
    """A site with the budgets of its buckets, equal neighbours joined; without a table where all are dense."""
    table = Plan(tuple(Bucket(1 if i == 0 else bucket.lo, None if i + 1 == len(buckets) else bucket.hi, budget)
                       for i, (bucket, budget) in enumerate(zip(buckets, budgets, strict=True)))).merged().buckets
    span = Bucket(buckets[0].lo, buckets[-1].hi, table[0].budget)
    drops = next((bucket.budget for bucket in table if not bucket.budget.is_dense), None)
    if drops is None:
        return ChosenSite(proven.site, proven.mask, span, Budget.dense(), how)
    return ChosenSite(proven.site, proven.mask, span, drops, how, table=table)


def strict_symbols(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> frozenset[sympy.Symbol]:
    """Symbols that must not be compared: of sizes for which mark_dynamic promised a range, where a guard is an error of
    the user's; all of them where Dynamo does not compile (torch.export), since nobody would check a guard."""
    context = TracingContext.try_get()
    if context is None:
        return all_symbols(gm)
    symbols: set[sympy.Symbol] = set()
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        known = context.tensor_to_context.get(x) if isinstance(x, torch.Tensor) else None
        if known is None:
            continue
        for size, constraint in zip(shape(node), known.constraint_sizes, strict=True):
            if isinstance(constraint, StrictMinMaxConstraint) and isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    return frozenset(symbols)


def all_symbols(gm: fx.GraphModule) -> frozenset[sympy.Symbol]:
    """The symbols of all sizes of the inputs."""
    sizes = [size for node in gm.graph.find_nodes(op="placeholder") if is_tensor(node) for size in shape(node)]
    return frozenset(symbol for size in sizes for symbol in expression(size).free_symbols)


def _buckets_of(length: Any, plan: Plan, strict: frozenset[sympy.Symbol],
                tables: bool) -> tuple[list[Bucket], str]:
    """The buckets this length may be in, and how that is known."""
    if isinstance(length, int):
        return [plan.bucket_of(max(length, 1))], f"the key length is {length}"
    possible = [b for b in plan.buckets if not (statically_known_true(length < b.lo)
                                                or (b.hi is not None and statically_known_true(length >= b.hi)))]
    if len(possible) == 1:
        return possible, "known from the range of the key length"
    if tables:
        return possible, "the op looks its bucket up at each call"
    if free_unbacked_symbols(length):
        return possible, "the key length is unbacked: no guard, the most exact budget of its range"
    if length.node.expr.free_symbols & strict:
        return possible, "no guard may narrow the key length: the most exact budget of its range"
    return [next(b for b in possible if b.hi is None or length < b.hi)], "guard on the key length"


def _exactness(budget: Budget) -> tuple[float, float]:
    """Sorts the most exact budget first."""
    if budget.tolerance is None:
        return -1.0, 0.0
    shifts = budget.shifts or (1.0,)
    return budget.tolerance * sum(shifts) / len(shifts), budget.max_density
