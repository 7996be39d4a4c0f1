"""Replace every chosen site by one op.

Given   sites with their masks proven and budgets chosen.
Leaves  the same graph: sparse buckets call adaptive_attention; dense ones SDPA where it can say the mask without a
        tensor, else exact_attention; what built the masks, the scores and the repeated heads is gone; a record per
        site. The result stands where the old output stood, with its dtype, and its strides wherever a user could see.
Never   touches a refused site, nor a dense one that is SDPA's own business: no mask tensor, nothing to gain.

    softmax(q @ k^T * scale + mask) @ v   ->   sparsify.adaptive_attention(q, k, v, scale, causal_offset, key_mask, ...)
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.passes.emit import expression, key_mask, size_node
from sparsify.passes.graph import (
    aten,
    emit,
    is_inert_dropout,
    mutations,
    same,
    same_shape,
    shape,
    storage_root,
    value,
)
from sparsify.passes.site import TRUE, AttentionSite, ChosenSite, MaskProof, Outcome, Refused, Scale, SiteRecord

STRIDE_BLIND = {aten.reshape.default, aten.contiguous.default, aten.linear.default, aten.matmul.default}
RELAYOUTS = {aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default}


def rewrite(gm: fx.GraphModule, sites: Sequence[ChosenSite | Refused]) -> list[SiteRecord]:
    """Rewrite `gm` in place."""
    rewriter = _Rewriter()
    records = [rewriter.rewrite_site(index, site) for index, site in enumerate(sites)]
    _remove_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return records


class _Rewriter:
    """Rewrites the sites of one graph in order; remembers what the next may meet again."""

    def __init__(self) -> None:
        self.replaced: dict[fx.Node, fx.Node] = {}  # old outputs: one site may attend to another's
        self.key_masks: dict[Any, fx.Node] = {}  # layers share their mask

    def rewrite_site(self, index: int, chosen: ChosenSite | Refused) -> SiteRecord:
        if isinstance(chosen, Refused):
            return SiteRecord(index, "refused", chosen.form, chosen.origin.line, chosen.origin.module, chosen.why,
                              chosen.node)
        site, why = chosen.site, chosen.how
        outcome: Outcome = "exact" if chosen.budget.is_dense else "sparse"
        if outcome == "exact" and site.form == "sdpa" and not site.masks:
            outcome, why = "kept dense", f"{why}; scaled_dot_product_attention is exact and needs no mask here"
        else:
            self.replaced[site.output] = self.replace(index, chosen)
        return SiteRecord(index, outcome, site.form, site.origin.line, site.origin.module, why, site.output.name,
                          str(chosen.mask), str(chosen.bucket), str(chosen.budget))

    def replace(self, index: int, chosen: ChosenSite) -> fx.Node:
        """Put the op where the site's output was."""
        site, budget, old = chosen.site, chosen.budget, chosen.site.output
        graph, dtype = old.graph, value(old).dtype
        offset = None if chosen.mask.causal_offset is None else size_node(chosen.mask.causal_offset, old)
        visible_keys = self.key_mask(site, chosen.mask)
        operands = [self.replaced.get(node, node) for node in (site.query, site.key, site.value)]
        with graph.inserting_before(old):
            query, key, values = (_cast(graph, node, dtype) for node in operands)
            if site.key_transposed:
                key = emit(graph, aten.transpose.int, key, -2, -1)
            scale = _scale(graph, site.scales)
            attention = (query, key, values, scale, offset, None, visible_keys, None, None, None, 0.0, None)
            if budget.is_dense and (causal := _sdpa_causality(query, key, chosen.mask)) is not None:
                grouped = not same(shape(query)[1], shape(key)[1])
                new = emit(graph, aten.scaled_dot_product_attention.default, query, key, values, None, 0.0, causal,
                           scale=scale, enable_gqa=grouped)
            elif budget.is_dense:
                new = emit(graph, torch.ops.sparsify.exact_attention.default, *attention, ops.VERSION)
            else:
                new = emit(graph, torch.ops.sparsify.adaptive_attention.default, *attention, budget.tolerance,
                           budget.max_density, budget.sinks, budget.local, budget.singles, index, ops.VERSION)
            new.meta = {**old.meta, "val": new.meta["val"]}
            if not _same_strides(new, old) and _strides_matter(old):
                new = emit(graph, aten.contiguous.default, new)
                new.meta = {**old.meta, "val": new.meta["val"]}
        old.replace_all_uses_with(new)
        return new

    def key_mask(self, site: AttentionSite, mask: MaskProof) -> fx.Node | None:
        if mask.visible_keys == TRUE:
            return None
        leaves = {name: self.replaced.get(node, node) for name, node in mask.leaves.items()}
        kv_len = shape(site.key)[3 if site.key_transposed else 2]
        known = (mask.visible_keys, tuple(leaves.values()), expression(kv_len), value(site.query).device)
        if known not in self.key_masks:
            self.key_masks[known] = key_mask(mask.visible_keys, leaves, kv_len, site.output)
        return self.key_masks[known]


def _sdpa_causality(query: fx.Node, key: fx.Node, mask: MaskProof) -> bool | None:
    """The `is_causal` by which SDPA says this mask; None where it would need a tensor, or a slow kernel.

    Inductor knows SDPA, and a call of it costs the host less than an op of ours.
    """
    if mask.visible_keys != TRUE:
        return None
    on_slow_path = value(query).dtype == torch.float32 and value(query).device.type == "cuda"
    if on_slow_path and not same(shape(query)[1], shape(key)[1]):
        return None  # no fused kernel has grouped heads in float32; exact_attention repeats them
    if mask.causal_offset is None:
        return False
    return True if mask.causal_offset == 0 and same(shape(query)[2], shape(key)[2]) else None


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The operand in the dtype attention ran in: autocast casts without a node."""
    return node if value(node).dtype == dtype else emit(graph, aten.to.dtype, node, dtype)


def _scale(graph: fx.Graph, scales: tuple[Scale, ...]) -> "float | fx.Node":
    """All factors as one number, or one node where a factor is symbolic."""
    result: float | fx.Node = 1.0
    for scale in scales:
        function = operator.truediv if scale.divides else operator.mul
        if isinstance(result, fx.Node) or isinstance(scale.value, fx.Node):
            plain = result == 1.0 and not scale.divides
            result = scale.value if plain else emit(graph, function, result, scale.value)
        else:
            result = function(result, scale.value)
    return result


def _same_strides(new: fx.Node, old: fx.Node) -> bool:
    return same_shape(tuple(value(new).stride()), tuple(value(old).stride()))


def _strides_matter(node: fx.Node) -> bool:
    """Whether a user of the output could tell its strides: a view that must fit, or a returned tensor."""
    return any(_strides_matter(user) if user.target in RELAYOUTS else user.target not in STRIDE_BLIND
               for user in node.users)


def _remove_dead_code(graph: fx.Graph) -> None:
    """Erase what nothing reads, in-place writes to tensors that nothing reads any more too."""

    def is_needed(node: fx.Node) -> bool:
        return node.is_impure() and not is_inert_dropout(node)

    graph.eliminate_dead_code(is_needed)
    while unread := _unread_storage(graph):
        for node in reversed(unread):
            graph.erase_node(node)
        graph.eliminate_dead_code(is_needed)


def _unread_storage(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of one storage that is made and written to in this graph but read by no node outside."""
    for root in mutations(graph):
        if root.op != "call_function":
            continue
        nodes = [node for node in graph.nodes if storage_root(node) is root]
        if all(user in nodes for node in nodes for user in node.users):
            return nodes
    return []
