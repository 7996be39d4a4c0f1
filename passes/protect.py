"""Hand the masks of protected keys to the sites that they fit.

Given   a graph with markers, `ids = sparsify.protect_keys(ids, mask)`, and later its chosen sites.
Leaves  the graph without markers, as if they had not been written; each sparse site with the mask of its keys, or the
        reason why it has none.
Never   drops a wish in silence: a sparse site that was asked to protect keys and cannot says so in its record.

A mask fits a site that has as many keys and as many batch rows (or one). Sizes that are equal in this call are held to
it by a guard, where guards may be made; else they must be known to be equal.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from sparsify.passes.graph import agree, expression, same, shape
from sparsify.passes.site import KEPT, ChosenSite, Refused

NO_MASK = "no mask of protected keys reaches this graph: the model's graph breaks before it"
INSIDE = "no mask of protected keys reaches the body of a higher-order op"


def take_masks(graph: fx.Graph) -> list[fx.Node]:
    """The masks of the graph's markers; the markers are gone."""
    masks = []
    for marker in graph.find_nodes(op="call_function", target=torch.ops.sparsify.protect_keys.default):
        x, mask = marker.args
        masks.append(mask)
        marker.replace_all_uses_with(x)
        graph.erase_node(marker)
    return masks


def protect_sites(sites: Sequence[ChosenSite | Refused], masks: Sequence[fx.Node], missing: str,
                  may_guard: bool) -> list[ChosenSite | Refused]:
    """The sites with their masks. `missing`: why there is none, if protection was asked for and `masks` is empty."""
    return [_protect(site, masks, missing, may_guard) if isinstance(site, ChosenSite) and not site.budget.is_dense
            else site for site in sites]


def _protect(chosen: ChosenSite, masks: Sequence[fx.Node], missing: str, may_guard: bool) -> ChosenSite:
    site = chosen.site
    equal = agree if may_guard else same
    for mask in reversed(masks):  # the innermost was written for what is closest
        rows, keys = shape(mask)
        if equal(keys, site.kv_len) and (same(rows, 1) or equal(rows, site.batch) or equal(rows, 1)):
            return replace(chosen, protected=mask, protection=KEPT)
    if masks:
        sizes = ", ".join("[" + ", ".join(str(expression(size)) for size in shape(mask)) + "]" for mask in masks)
        missing = (f"protected keys are not kept: the mask is {sizes} and this site has {expression(site.batch)} batch "
                   f"rows of {expression(site.kv_len)} keys")
    elif missing:
        missing = f"protected keys are not kept: {missing}"
    return replace(chosen, protection=missing)
