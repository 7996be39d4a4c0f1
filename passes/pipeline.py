"""The passes, in order."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparsify.passes.buffers import buffers_of
from sparsify.passes.choose import choose_budgets, strict_symbols
from sparsify.passes.find import find_attention
from sparsify.passes.normalise import graphs, normalise
from sparsify.passes.prove import prove_masks
from sparsify.passes.rewrite import rewrite
from sparsify.passes.site import SiteRecord
from sparsify.plan import Plan


def run(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan,
        verify_masks: bool = False) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """Rewrite the attention of a Dynamo graph under `plan`: the new graph, and what became of each site.

    `verify_masks`: ops in the graph compare every mask with its proof whenever it runs.

    The sites inside a higher-order op are numbered after those of the graph around it.
    """
    normal = normalise(gm, example_inputs)
    strict = strict_symbols(normal, example_inputs)
    buffers = buffers_of(normal, example_inputs)
    records: list[SiteRecord] = []
    for graph in graphs(normal):
        found = find_attention(graph)
        proven = prove_masks(graph, found, buffers if graph is normal else {})
        chosen = choose_budgets(proven, plan, strict, len(records))
        records += rewrite(graph, chosen, len(records), verify_masks)
    return normal, records
