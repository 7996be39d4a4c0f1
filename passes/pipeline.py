"""The passes, in order."""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import Tensor, fx

from sparsify.passes.buffers import Buffer, buffers_of, constants_of
from sparsify.passes.choose import all_symbols, choose_budgets, strict_symbols
from sparsify.passes.find import find_attention
from sparsify.passes.graph import without_guards
from sparsify.passes.normalise import graphs, normalise
from sparsify.passes.protect import INSIDE, NO_MASK, protect_sites, take_masks
from sparsify.passes.prove import prove_masks
from sparsify.passes.rewrite import rewrite_sites
from sparsify.passes.site import Refused, SiteRecord
from sparsify.plan import Plan


def run(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan, verify_masks: bool = False,
        protects: bool = False) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """Rewrite the attention of a Dynamo graph under `plan`: the new graph, and what became of each site.

    `verify_masks`: ops in the graph compare every mask with its proof whenever it runs. `protects`: keys are to be
    protected, so a graph without a mask of them says so.
    """
    normal = normalise(gm, example_inputs)
    return normal, rewrite(normal, plan, example_inputs, verify_masks, protects)


def run_exported(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan,
                 constants: Sequence[Tensor | None] | None = None) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """`run` for a graph of torch.export, whose inputs are fakes: no guard is made, for nobody would check it.

    A site whose key length may be in several buckets carries their budgets as a table (`planned_attention`).
    constants: for each input the buffer that goes into the file in its place, or None; proofs may read it.
    """
    normal = normalise(gm, example_inputs)
    buffers = {} if constants is None else constants_of(normal, constants)
    with without_guards():
        return normal, _rewrite(normal, plan, all_symbols(normal), buffers, tables=True)


def rewrite(gm: fx.GraphModule, plan: Plan, example_inputs: Sequence[Any] = (),
            verify_masks: bool = False, protects: bool = False) -> list[SiteRecord]:
    """Rewrite a graph that `normalise` made, in place: what became of each site.

    The sites inside a higher-order op are numbered after those of the graph around it. With the inputs that Dynamo
    hands to a backend, key lengths are compared with the plan's buckets (each comparison is a guard) and buffers are
    read; without them no guard could hold, so a length that may be in several buckets gets the most exact budget.
    """
    if not example_inputs:
        with without_guards():
            return _rewrite(gm, plan, all_symbols(gm), {}, verify_masks, protects)
    strict = strict_symbols(gm, example_inputs)
    return _rewrite(gm, plan, strict, buffers_of(gm, example_inputs), verify_masks, protects, may_guard=not strict)


def refuse_all(gm: fx.GraphModule, example_inputs: Sequence[Any], why: str) -> list[SiteRecord]:
    """Records of a graph that stays as it was, because the pass failed on it: all its sites, refused.

    Where they cannot be found either, one record stands for the whole graph.
    """
    try:
        found = [site for graph in graphs(normalise(gm, example_inputs)) for site in find_attention(graph)]
    except Exception:  # whatever failed in the pass may fail again
        return [SiteRecord(0, "refused", "other", "unknown line", "", why, "")]
    return [SiteRecord(i, "refused", site.form, site.origin.line, site.origin.module,
                       site.why if isinstance(site, Refused) else why,
                       site.node if isinstance(site, Refused) else site.output.node.name)
            for i, site in enumerate(found)]


def _rewrite(gm: fx.GraphModule, plan: Plan, strict: frozenset[sympy.Symbol], buffers: Mapping[fx.Node, Buffer],
             verify_masks: bool = False, protects: bool = False, may_guard: bool = False,
             tables: bool = False) -> list[SiteRecord]:
    records: list[SiteRecord] = []
    masks = take_masks(gm.graph)
    for graph in graphs(gm):
        found = find_attention(graph)
        proven = prove_masks(graph, found, buffers if graph is gm else {})
        chosen = choose_budgets(proven, plan, strict, len(records), tables)
        if protects or masks:
            missing = NO_MASK if graph is gm else INSIDE
            chosen = protect_sites(chosen, masks if graph is gm else (), missing, may_guard)
        records += rewrite_sites(graph, chosen, len(records), verify_masks)
    return records
