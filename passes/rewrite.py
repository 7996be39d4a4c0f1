"""Replace every chosen site by one op.

Given   sites with their masks proven and budgets chosen.
Leaves  the same graph: sparse buckets call adaptive_attention, tables of buckets planned_attention; dense ones SDPA
        where it can say the mask without a tensor and calls may be short, else exact_attention; what built the masks,
        the scores and the repeated heads is gone; a record per site. The result stands where the old output stood,
        with its dtype, and its strides wherever a user could see.
Never   touches a refused site, nor a dense one that is SDPA's own business: no mask tensor, nothing to gain.

    softmax(q @ k^T * scale + mask) @ v   ->   sparsify.adaptive_attention(q, k, v, scale, causal_offset, key_mask, ...)
"""

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sparsify import ops
from sparsify.ops import crossover
from sparsify.passes.arrange import rearrange
from sparsify.passes.axes import Dims, Size, base_name, extent, flat, op_name
from sparsify.passes.emit import documents, key_mask, size_node
from sparsify.passes.graph import (
    arguments,
    aten,
    emit,
    expression,
    is_inert_dropout,
    is_tensor,
    mutations,
    same,
    same_shape,
    shape,
    storage_root,
    value,
)
from sparsify.passes.site import (
    TRUE,
    AttentionSite,
    ChosenSite,
    MaskProof,
    MaskTerm,
    Operand,
    Outcome,
    Refused,
    Scale,
    SiteRecord,
    is_soft,
)
from sparsify.plan import Bucket

STRIDE_BLIND = {aten.contiguous.default, aten.linear.default, aten.matmul.default}
RELAYOUTS = {aten.reshape.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int,
             aten.unsqueeze.default}
WIDE_IN_AUTOCAST = {"div", "mul", "sum"}
"""Ops that end an attention, and that autocast does not narrow."""


def rewrite_sites(gm: fx.GraphModule, sites: Sequence[ChosenSite | Refused], first_index: int = 0,
                  verify_masks: bool = False) -> list[SiteRecord]:
    """Rewrite `gm` in place; the first site is number `first_index`. `verify_masks`: proofs are checked in each run."""
    rewriter = _Rewriter(first_index, verify_masks)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    # By output, not by softmax: what one site leaves for the next must stand before it.
    order = sorted(range(len(sites)), key=lambda place: position[site.site.output.node]
                   if isinstance(site := sites[place], ChosenSite) else -1)
    made = {place: rewriter.rewrite_site(place, sites[place]) for place in order}
    records = [made[place] for place in range(len(sites))]
    _trace_to_the_user(gm.graph)
    _remove_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return records


class _Rewriter:
    """Rewrites the sites of one graph in the order of their outputs; remembers what the next may meet again."""

    def __init__(self, first_index: int, verify_masks: bool) -> None:
        self.first_index = first_index
        self.verify_masks = verify_masks
        self.replaced: dict[fx.Node, fx.Node] = {}  # old outputs: one site may attend to another's
        self.masks: dict[Any, Any] = {}  # layers share their masks

    def rewrite_site(self, place: int, chosen: ChosenSite | Refused) -> SiteRecord:
        index = self.first_index + place
        if isinstance(chosen, Refused):
            return SiteRecord(index, "refused", chosen.form, chosen.origin.line, chosen.origin.module, chosen.why,
                              chosen.node)
        site, why = chosen.site, chosen.how
        outcome: Outcome = "exact" if chosen.budget.is_dense else "sparse"
        depends = _depends(chosen)
        if outcome == "exact" and site.form == "sdpa" and _gains_nothing(chosen) and not _op_may_gain(chosen):
            outcome, why = "kept dense", f"{why}; scaled_dot_product_attention is exact and needs no other mask here"
            op = "scaled_dot_product_attention"
        else:
            op = self.replace(index, chosen)
        budget = str(chosen.budget)
        if chosen.table is not None and len(chosen.table) > 1:
            budget = "; ".join(f"{bucket} {bucket.budget}" for bucket in chosen.table)
        return SiteRecord(index, outcome, site.form, site.origin.line, site.origin.module, why, site.output.node.name,
                          str(chosen.mask), str(chosen.bucket), budget, op, depends, *_sizes(site),
                          protection=chosen.protection)

    def replace(self, index: int, chosen: ChosenSite) -> str:
        """Put an op where the site's output was; its name."""
        site, budget, old, at = chosen.site, chosen.budget, chosen.site.output.node, chosen.site.output.node
        layout, graph = site.layout, old.graph
        query = self.operand(site.query, (layout.batch, layout.heads, layout.queries, layout.dim), at)
        key = self.operand(site.key, (layout.batch, layout.kv_heads, layout.keys, layout.dim), at)
        values = self.operand(site.value, (layout.batch, layout.kv_heads, layout.keys, layout.value_dim), at)
        offset, window = (None if x is None else size_node(x, at)
                          for x in (chosen.mask.causal_offset, chosen.mask.window))
        visible_keys = self.key_mask(site, chosen.mask)
        documents = self.documents(site, chosen.mask)
        attn_mask = self.attn_mask(site, chosen.mask.carried)
        sink_logits = self.sink_logits(site)
        with graph.inserting_before(at):
            query, key, values = (_cast(graph, node, site.dtype) for node in (query, key, values))
            query, key = self.scaled(site, query, key)
            values = self.gained(site, values, "values")
            terms = tuple(term for term in site.masks if term.kind != "gate")
            if self.verify_masks and terms:
                mask, kv_len = self.attn_mask(site, terms), size_node(expression(site.kv_len), at)
                query = emit(graph, torch.ops.sparsify.check_mask.default, query, mask, kv_len, offset, window,
                             visible_keys, *documents, attn_mask, index, site.origin.line)
            scale = _scale(graph, (*site.scales, *((Scale(site.softcap),) if site.softcap is not None else ())))
            by_sdpa = budget.is_dense and not _op_may_gain(chosen)
            causal = _sdpa_causality(query, key, site, chosen.mask) if by_sdpa else None
            if causal is not None:
                grouped = not same(shape(query)[1], shape(key)[1])
                if attn_mask is not None and value(attn_mask).dtype not in (torch.bool, torch.float32, site.dtype):
                    attn_mask = _cast(graph, attn_mask, torch.float32)  # SDPA takes no other; a half loses nothing
                new = emit(graph, aten.scaled_dot_product_attention.default, query, key, values, attn_mask, 0.0, causal,
                           scale=scale, enable_gqa=grouped)
            else:
                attention = (query, key, values, scale, offset, window, visible_keys, *documents, attn_mask,
                             site.softcap or 0.0, sink_logits)
                protected = chosen.protected and self.replaced.get(chosen.protected, chosen.protected)
                if budget.is_dense:
                    new = emit(graph, torch.ops.sparsify.exact_attention.default, *attention, ops.VERSION)
                elif chosen.table is not None:
                    *columns, factors = _columns(chosen.table, site)
                    new = emit(graph, torch.ops.sparsify.planned_attention.default, *attention, *columns, index,
                               ops.VERSION, *_trimmed((factors, None), (protected, None)))
                else:
                    shifts = None if budget.shifts is None else list(budget.shifts)
                    new = emit(graph, torch.ops.sparsify.adaptive_attention.default, *attention, budget.tolerance,
                               budget.max_density, budget.sinks, budget.local, budget.singles, index, ops.VERSION,
                               *_trimmed((budget.peaks or 0.0, 0.0), (shifts, None), (protected, None)))
            new.meta = {**old.meta, "val": new.meta["val"]}
            made = self.gained(site, new, "output")
        self.replaced[old] = self.as_before(made, site)
        old.replace_all_uses_with(self.replaced[old])
        return op_name(new)

    def operand(self, operand: Operand, layout: Dims, at: fx.Node) -> fx.Node:
        """An operand in the op's layout."""
        return rearrange(self.replaced.get(operand.node, operand.node), operand.dims, layout, at)

    def scaled(self, site: AttentionSite, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Query and key times the tensors that scale the scores."""
        layout, at = site.layout, site.output.node
        for scale in site.scales:
            if not isinstance(scale.value, Operand):
                continue
            function = aten.div.Tensor if scale.divides else aten.mul.Tensor
            on_keys = bool(set(layout.keys) & set(flat(scale.value.dims)))
            groups = (layout.batch, layout.kv_heads, layout.keys, ()) if on_keys else (
                layout.batch, layout.heads, layout.queries, ())
            node = self.replaced.get(scale.value.node, scale.value.node)
            factor = rearrange(node, scale.value.dims, groups, at, broadcast_groups=True)
            with at.graph.inserting_before(at):
                scaled = _cast(at.graph, emit(at.graph, function, key if on_keys else query, factor), site.dtype)
            query, key = (query, scaled) if on_keys else (scaled, key)
        return query, key

    def gained(self, site: AttentionSite, tensor: fx.Node, on: str) -> fx.Node:
        """Values or output times the gains of the weights that were placed there."""
        layout, at = site.layout, site.output.node
        groups = ((layout.batch, layout.kv_heads, layout.keys, ()) if on == "values" else
                  (layout.batch, layout.heads, layout.queries, ()))
        for gain in site.gains:
            if gain.on != on:
                continue
            factor: Any = gain.value
            if isinstance(factor, Operand):
                factor = rearrange(self.replaced.get(factor.node, factor.node), factor.dims, groups, at,
                                   broadcast_groups=True)
            with at.graph.inserting_before(at):
                if gain.kind == "zero":
                    tensor = emit(at.graph, aten.masked_fill.Scalar, tensor, factor, 0)
                    continue
                function = aten.mul.Tensor if gain.kind == "times" else aten.div.Tensor
                tensor = _cast(at.graph, emit(at.graph, function, tensor, factor), site.dtype)
        return tensor

    def as_before(self, new: fx.Node, site: AttentionSite) -> fx.Node:
        """The op's output in the layout, dtype and strides of the old one."""
        old, layout, graph = site.output.node, site.layout, site.output.node.graph
        made = rearrange(new, (layout.batch, layout.heads, layout.queries, layout.value_dim), site.output.dims, old)
        with graph.inserting_before(old):
            made = _cast(graph, made, value(old).dtype)
            if not _same_strides(made, old) and _strides_matter(old):
                made = _with_strides_of(graph, made, old)
        made.meta = {**old.meta, "val": made.meta["val"]}
        return made

    def leaves(self, mask: MaskProof) -> dict[str, fx.Node]:
        return {name: self.replaced.get(node, node) for name, node in mask.leaves.items()}

    def key_mask(self, site: AttentionSite, mask: MaskProof) -> fx.Node | None:
        if mask.visible_keys == TRUE:
            return None
        leaves = self.leaves(mask)
        known = (mask.visible_keys, tuple(leaves.values()), expression(site.batch), expression(site.kv_len),
                 value(site.query.node).device)
        if known not in self.masks:
            self.masks[known] = key_mask(mask.visible_keys, leaves, site.batch, site.kv_len, site.output.node)
        return self.masks[known]

    def documents(self, site: AttentionSite, mask: MaskProof) -> tuple[fx.Node | None, fx.Node | None]:
        if mask.documents is None:
            return None, None
        leaves = self.leaves(mask)
        known = (mask.documents, tuple(leaves.values()), *map(expression, (site.batch, site.q_len, site.kv_len)),
                 value(site.query.node).device)
        if known not in self.masks:
            self.masks[known] = documents(mask.documents, leaves, site.batch, (site.q_len, site.kv_len),
                                           site.output.node)
        return self.masks[known]

    def attn_mask(self, site: AttentionSite, terms: tuple[MaskTerm, ...]) -> fx.Node | None:
        """The masks and biases that no argument says, as one tensor [B | 1, H | 1, L | 1, S | 1]."""
        if not terms:
            return None
        known = (terms, *map(expression, (site.batch, site.heads, site.q_len, site.kv_len)))
        if known not in self.masks:
            self.masks[known] = self.build_attn_mask(site, terms)
        return self.masks[known]

    def build_attn_mask(self, site: AttentionSite, terms: tuple[MaskTerm, ...]) -> fx.Node:
        at, graph, layout = site.output.node, site.output.node.graph, site.layout
        groups = (layout.batch, layout.heads, layout.queries, layout.keys)
        visible: fx.Node | None = None
        bias: fx.Node | None = None
        for term in terms:
            tensor = rearrange(self.replaced.get(term.tensor, term.tensor), term.dims, groups, at,
                               broadcast_groups=True)
            with graph.inserting_before(at):
                if term.kind != "add":
                    tensor = _cast(graph, tensor, torch.bool)
                    if term.kind == "hide":
                        tensor = emit(graph, aten.logical_not.default, tensor)
                    if not is_soft(term, site.masks):
                        visible = tensor if visible is None else emit(graph, aten.logical_and.default, visible, tensor)
                        continue
                    fill = emit(graph, aten.full.default, [], term.fill, dtype=torch.float32,
                                device=value(tensor).device)
                    zero = emit(graph, aten.zeros_like.default, fill)
                    tensor = emit(graph, aten.where.self, tensor, zero, fill)
                elif not value(tensor).dtype.is_floating_point:
                    tensor = _cast(graph, tensor, site.dtype)
                if term.factor != 1:
                    tensor = emit(graph, aten.mul.Scalar, tensor, term.factor)
            for scale in term.scalers:
                assert isinstance(scale.value, Operand)
                factor = rearrange(self.replaced.get(scale.value.node, scale.value.node), scale.value.dims, groups, at,
                                   broadcast_groups=True)
                with graph.inserting_before(at):
                    tensor = emit(graph, aten.div.Tensor if scale.divides else aten.mul.Tensor, tensor, factor)
            with graph.inserting_before(at):
                bias = tensor if bias is None else emit(graph, aten.add.Tensor, bias, tensor)
        if visible is None or bias is None:
            mask = visible if bias is None else bias
            assert mask is not None
            return mask
        with graph.inserting_before(at):
            return emit(graph, aten.where.ScalarOther, visible, bias, float("-inf"))

    def sink_logits(self, site: AttentionSite) -> fx.Node | None:
        """One logit a query head."""
        at, sink = site.output.node, site.sink_logits
        if sink is None:
            return None
        if isinstance(sink, Operand):
            return rearrange(self.replaced.get(sink.node, sink.node), sink.dims, (site.layout.heads,), at)
        heads = size_node(expression(site.heads), at)
        with at.graph.inserting_before(at):
            return emit(at.graph, aten.full.default, [heads], sink, dtype=torch.float32,
                        device=value(site.query.node).device)


def _columns(table: tuple[Bucket, ...], site: AttentionSite) -> tuple[Any, ...]:
    """The buckets of a table as `planned_attention` takes them, from its edges to its peaks; and its shifts."""
    budgets = [bucket.budget for bucket in table]
    shifts: list[float] | None = None
    if any(budget.shifts for budget in budgets):
        shifts = [shift for budget in budgets for shift in budget.shifts or [1.0] * int(site.heads)]
    return ([bucket.lo for bucket in table[1:]], [budget.tolerance or 0.0 for budget in budgets],
            [budget.max_density for budget in budgets], [budget.sinks for budget in budgets],
            [budget.local for budget in budgets], [budget.singles for budget in budgets],
            [budget.peaks or 0.0 for budget in budgets], shifts)


def _trimmed(*arguments: tuple[Any, Any]) -> list[Any]:
    """The last arguments of a call by position, each with its default, as far as they differ from that.

    By position: behind a default that is left out, Inductor hands an argument to the one before it (torch 2.13).
    """
    last = max((i for i, (given, default) in enumerate(arguments, 1) if given != default), default=0)
    return [given for given, _ in arguments[:last]]


def _gains_nothing(chosen: ChosenSite) -> bool:
    """Whether SDPA would be handed the same masks as before."""
    return chosen.mask.carried == chosen.site.masks


def _op_may_gain(chosen: ChosenSite) -> bool:
    """Whether every call is so long that the exact op, which knows kernels of ours, may be faster than SDPA."""
    site, mask = chosen.site, chosen.mask
    heads, _, dim, value_dim = _sizes(site)
    shown = mask.causal_offset is None or mask.causal_offset == 0
    if not (shown and not mask.carried and same(site.q_len, site.kv_len) and heads and dim and value_dim):
        return False
    return crossover.op_may_beat_sdpa(value(site.query.node).device.type, site.dtype, chosen.least_keys, heads,
                                      dim + value_dim, batch=max(_known(site.batch), 1))


def _depends(chosen: ChosenSite) -> tuple[str, ...]:
    """The inputs of the graph that the masks of a site are made of."""
    seen: set[fx.Node] = set()
    todo = [term.tensor for term in chosen.site.masks]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return tuple(node.meta.get("source", node.name) for node in chosen.site.output.node.graph.nodes
                 if node in seen and node.op == "placeholder" and is_tensor(node))


def _sdpa_causality(query: fx.Node, key: fx.Node, site: AttentionSite, mask: MaskProof) -> bool | None:
    """The `is_causal` by which SDPA says this attention; None where it cannot, or only on a slow kernel.

    Inductor knows SDPA, and a call of it costs the host less than an op of ours. A bias is SDPA's own business; a mask
    that may hide all keys of a row is not: its kernels disagree about such rows. Where autocast is on, SDPA would
    narrow scores that the user kept wide in a region without it; the dtype of the output tells, or may not tell.
    """
    output = site.output.node
    if value(output).dtype.itemsize < site.dtype.itemsize or base_name(output) in WIDE_IN_AUTOCAST:
        return None
    if (mask.visible_keys != TRUE or mask.window is not None or mask.documents is not None
            or site.softcap is not None or site.sink_logits is not None
            or any(term.kind != "add" and not is_soft(term, site.masks) for term in mask.carried)
            or free_unbacked_symbols((site.q_len, site.kv_len))):  # SDPA would compare them
        return None
    on_slow_path = value(query).dtype == torch.float32 and value(query).device.type == "cuda"
    if on_slow_path and not same(shape(query)[1], shape(key)[1]):
        return None  # no fused kernel has grouped heads in float32; exact_attention repeats them
    if mask.causal_offset is None:
        return False
    if mask.carried:
        return None  # is_causal beside a mask is an error
    return True if mask.causal_offset == 0 and same(shape(query)[2], shape(key)[2]) else None


def _sizes(site: AttentionSite) -> tuple[int, int, int, int]:
    """Heads, KV heads, head dim and value dim; 0 for a symbol."""
    dims = extent(site.layout.dim), extent(site.layout.value_dim)
    return _known(site.heads), _known(site.kv_heads), _known(dims[0]), _known(dims[1])


def _known(size: Size) -> int:
    """A size, or 0 for a symbol."""
    return int(size) if isinstance(size, int | sympy.Integer) else 0


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The operand in the dtype attention ran in: autocast casts without a node."""
    return node if value(node).dtype == dtype else emit(graph, aten.to.dtype, node, dtype)


def _scale(graph: fx.Graph, scales: tuple[Scale, ...]) -> "float | fx.Node":
    """All factors as one number, or one node where a factor is symbolic."""
    result: float | fx.Node = 1.0
    for scale in scales:
        if isinstance(scale.value, Operand):
            continue  # folded into query or key
        function = operator.truediv if scale.divides else operator.mul
        if isinstance(result, fx.Node) or isinstance(scale.value, fx.Node):
            plain = result == 1.0 and not scale.divides
            result = scale.value if plain else emit(graph, function, result, scale.value)
        else:
            result = function(result, scale.value)
    return result


def _with_strides_of(graph: fx.Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    """A copy of `new` with its dims in the order in which the memory of `old` has them."""
    strides = value(old).stride()
    order = sorted(range(len(strides)), key=lambda d: -_hint(strides[d]))
    inverse = [order.index(d) for d in range(len(order))]
    if order == inverse == list(range(len(order))):
        return emit(graph, aten.contiguous.default, new)
    dense = emit(graph, aten.contiguous.default, emit(graph, aten.permute.default, new, order))
    return emit(graph, aten.permute.default, dense, inverse)


def _hint(size: Any) -> int:
    """What a symbolic stride was in this call: it orders the dims as well as any other."""
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.hint is not None else int(size)


def _same_strides(new: fx.Node, old: fx.Node) -> bool:
    return same_shape(tuple(value(new).stride()), tuple(value(old).stride()))


def _strides_matter(node: fx.Node) -> bool:
    """Whether a user of the output could tell its strides: a view that must fit, or a returned tensor."""
    return any(_strides_matter(user) if user.target in RELAYOUTS else user.target not in STRIDE_BLIND
               for user in node.users)


def _trace_to_the_user(graph: fx.Graph) -> None:
    """Nodes that a rewrite added point at the code of the node they were added for, which follows them."""
    code: dict[str, Any] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        if "stack_trace" in node.meta:
            code = {name: node.meta[name] for name in ("stack_trace", "nn_module_stack") if name in node.meta}
        else:
            node.meta.update(code)


def _remove_dead_code(graph: fx.Graph) -> None:
    """Erase what nothing reads, in-place writes to tensors that nothing reads any more too."""

    def is_needed(node: fx.Node) -> bool:
        if node.target is aten.scaled_dot_product_attention.default:  # impure to torch, for the sake of its dropout
            return arguments(node)["dropout_p"] != 0
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
