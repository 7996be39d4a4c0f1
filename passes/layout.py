"""What the axes of one attention are: batch, heads, queries, keys; and the site in the op's layout.

An axis shows by who has it. The keys are what softmax runs over. The queries are what only the query factor has: if
there is more than one such axis, the others are heads that share their keys. What keys or values have too is batch and
heads. Repeated KV heads vanish by themselves: on the way up through expand and reshape, keys and values lose the axis
that they do not vary along.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.passes.axes import DTYPES, Dims, Group, flat, index_of, leaves, resolve, view_up
from sparsify.passes.graph import mutations, origin, storage_root, value
from sparsify.passes.site import (
    BATCH,
    HEAD,
    KEY,
    NEEDS_GRADIENTS,
    QUERY,
    AttentionSite,
    Form,
    Gain,
    Layout,
    MaskTerm,
    Operand,
    Scale,
)
from sparsify.passes.walk import Scores, Stop


@dataclass(frozen=True)
class Chain:
    """One attention in the layout of its user. `scored` reads the keys."""

    form: Form
    scores: Dims
    keys: Group
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    scored: fx.Node
    weighted: fx.Node
    dim: Group
    state: Scores
    query_dtype: torch.dtype
    is_causal: bool = False
    gains: tuple[Gain, ...] = ()


class Writes:
    """Where a graph writes in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.by_storage = mutations(graph)

    def between(self, tensor: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node after `first` and before `last` writes to the storage of `tensor`."""
        start, end = self.position[first], self.position[last]
        return any(start < self.position[w] < end for w in self.by_storage.get(storage_root(tensor), ()))


def name_axes(chain: Chain, writes: Writes) -> AttentionSite:
    """Un-repeat grouped KV heads, name the axes, and check what holds for all forms."""
    output, scored = chain.output.node, chain.scored
    if output.meta.get("requires_grad", False):
        raise Stop(output, NEEDS_GRADIENTS)
    def path_of(operand: Operand, reader: fx.Node) -> list[tuple[Operand, fx.Node]]:
        return list(_path(operand, reader, output, writes))

    paths = {"query": path_of(chain.query, scored), "key": path_of(chain.key, scored),
             "value": path_of(chain.value, chain.weighted)}
    sink = chain.state.sink
    if isinstance(sink, Operand):
        *_, (sink, _) = path_of(sink, output)
    for name, path in paths.items():
        operand, reader = path[-1]
        if writes.between(operand.node, reader, output):
            raise Stop(output, f"the {name} is written to in place before the output is computed")
    scalers = [x.value for x in (*chain.state.scales, *(x for term in chain.state.terms for x in term.scalers))]
    for scaler in (*scalers, *(gain.value for gain in chain.gains)):
        if isinstance(scaler, Operand) and writes.between(scaler.node, scored, output):
            raise Stop(output, "a scale is written to in place before the output is computed")
    if isinstance(sink, Operand) and writes.between(sink.node, scored, output):
        raise Stop(output, "the sink logits are written to in place before the output is computed")
    layout = _layout(chain, paths["key"][-1][0], paths["value"][-1][0])
    query = _nearest(paths["query"], (layout.batch, layout.heads, layout.queries, layout.dim))
    key = _nearest(paths["key"], (layout.batch, layout.kv_heads, layout.keys, layout.dim))
    values = _nearest(paths["value"], (layout.batch, layout.kv_heads, layout.keys, layout.value_dim))
    dtype = _dtype(chain, query, key)
    state = chain.state
    if isinstance(sink, Operand):
        sink = Operand(sink.node, resolve(sink.dims))
        if set(flat(sink.dims)) - set(layout.heads):
            raise Stop(output, "the sink logit differs between queries or batch rows")
    indices = ((BATCH, layout.batch), (HEAD, layout.heads), (QUERY, layout.queries), (KEY, layout.keys))
    terms = tuple(MaskTerm(t.kind, t.tensor, index_of(t.dims, indices), t.fill, t.factor, resolve(t.dims),
                           tuple(Scale(_resolved(x.value), x.divides) for x in t.scalers
                                 if isinstance(x.value, Operand)))
                  for t in state.terms)
    scales = []
    for scale in state.scales:
        if isinstance(scale.value, Operand):
            operand = _resolved(scale.value)
            axes = set(flat(operand.dims))
            if axes & set(layout.keys) and not axes <= {*layout.batch, *layout.kv_heads, *layout.keys}:
                if scale.divides or state.softcap is not None:
                    raise Stop(output, "the scores are scaled by a tensor over queries and keys")
                gate = MaskTerm("gate", operand.node, index_of(operand.dims, indices), dims=operand.dims)
                terms = (gate, *terms)
                continue
            scale = Scale(operand, scale.divides)
        scales.append(scale)
    gains = tuple(gain for gain in (_place_gain(gain, layout, terms, output) for gain in chain.gains) if gain)
    return AttentionSite(chain.form, origin(output), query, key, values, _resolved(chain.output), layout, dtype,
                         tuple(scales), terms, chain.is_causal, state.softcap, sink, gains)


def _resolved(operand: Operand) -> Operand:
    return Operand(operand.node, resolve(operand.dims))


def _place_gain(gain: Gain, layout: Layout, terms: tuple[MaskTerm, ...], output: fx.Node) -> Gain | None:
    """Where a gain may go; None if the masks make it one."""
    if not isinstance(gain.value, Operand):
        return gain
    operand = _resolved(gain.value)
    axes = set(flat(operand.dims))
    if not axes & set(layout.keys):
        return Gain(gain.kind, operand)
    if axes <= {*layout.batch, *layout.kv_heads, *layout.keys}:
        return Gain(gain.kind, operand, "values")
    if gain.kind == "zero" and any(term.kind == "hide" and term.tensor is operand.node and term.dims == operand.dims
                                   for term in terms):
        return None  # what the scores hide has no weight already
    raise Stop(output, "the weights are changed by a tensor over queries and keys after the softmax")


def _dtype(chain: Chain, query: Operand, key: Operand) -> torch.dtype:
    """The dtype attention runs in. That q and k were widened before their product changes nothing: it is exact."""
    common = torch.promote_types(value(query.node).dtype, value(key.node).dtype)
    scores = common if common.itemsize < chain.query_dtype.itemsize else chain.query_dtype
    dtype = torch.promote_types(scores, value(chain.weighted).dtype)
    if dtype not in DTYPES:
        raise Stop(chain.output.node, f"attention runs in {dtype}; the ops take float16, bfloat16 and float32")
    return dtype


def _path(operand: Operand, reader: fx.Node, output: fx.Node, writes: Writes) -> Iterable[tuple[Operand, fx.Node]]:
    """The operand, then what it is a view or a copy of, step by step, each with the node that reads it.

    The last has no axis that the operand does not vary along. A copy that is written to is not what it was copied from.
    """
    node, dims = operand.node, operand.dims
    while True:
        yield Operand(node, dims), reader
        step = view_up(node, dims, through_casts=True)
        if step is None or (storage_root(node) is not storage_root(step[0]) and writes.between(node, node, output)):
            return
        reader, (node, dims) = node, step


def _layout(chain: Chain, key: Operand, values: Operand) -> Layout:
    keys = leaves(chain.keys)
    in_key, in_value = (set(flat(x.dims)) for x in (key, values))
    rows = [tuple(a for a in group if a not in keys) for group in resolve(chain.scores)]
    shared = in_key | in_value
    in_rows = {a for group in rows for a in group}
    if (in_value - in_key) & in_rows:
        raise Stop(chain.scored, "the values differ between rows that share their keys")
    if in_key & in_rows != in_value & in_rows and not any(a not in shared for a in in_rows):
        raise Stop(chain.scored, "each row has keys or values of its own: no queries share them")
    common = [tuple(a for a in group if a in shared) for group in rows]
    alone = [tuple(a for a in group if a not in shared) for group in rows]
    queries = _query_group(chain, alone, keys)
    groups = tuple(a for group in alone for a in group if a not in queries)
    with_common = [i for i, group in enumerate(common) if group]
    batch: Group = tuple(a for i in with_common[:-1] for a in common[i])
    kv_heads: Group = common[with_common[-1]] if with_common else ()
    if with_common == [0]:  # heads folded into the batch, or no heads: unless each has a sink logit of its own
        sink = chain.state.sink
        varies = set(flat(resolve(sink.dims))) if isinstance(sink, Operand) else set()
        if kv_heads[0] not in varies:
            batch, kv_heads = kv_heads[:1], kv_heads[1:]
    dim = leaves(chain.dim)
    rest = {*keys, *(a for group in rows for a in group)}
    value_dim = tuple(a for group in resolve(chain.output.dims) for a in group if a not in rest)
    return Layout(batch, kv_heads, groups, queries, keys, dim, value_dim)


def _query_group(chain: Chain, alone: list[Group], keys: Group) -> Group:
    """The axes of the queries, among those that only the query factor has: those that a mask ties to the keys,
    else those whose length is symbolic, else the last dim's; the others are heads that share their keys. None where
    the last dim has one query."""
    candidates = [group for group in alone if group]
    last = [i for i, group in enumerate(resolve(chain.scores)) if not set(group) & set(keys)][-1:]
    single = len(chain.scores) >= 4 and last and not resolve(chain.scores)[last[0]]  # [..., heads, 1, keys]
    if not candidates or single:
        return ()
    masks = [set(flat(term.dims)) for term in chain.state.terms]
    tied = [group for group in candidates for axes in masks
            if set(group) & axes and set(keys) & axes and axes <= {*group, *keys}]
    symbolic = [group for group in candidates if any(not isinstance(a.size, int) for a in group)]
    for preferred in (tied, symbolic):
        if preferred and all(group == preferred[0] for group in preferred):
            return preferred[0]
    return candidates[-1]


def _nearest(path: list[tuple[Operand, fx.Node]], wanted: Dims) -> Operand:
    """The tensor of a path to rewrite from: the last in the op's layout, else the first without repeats."""
    operands = [Operand(x.node, resolve(x.dims)) for x, _ in path]
    fewest = len(set(flat(operands[-1].dims)))
    operands = [x for x in operands if len(set(flat(x.dims))) == fewest]
    narrowest = min(value(x.node).dtype.itemsize for x in operands)
    operands = [x for x in operands if value(x.node).dtype.itemsize == narrowest]
    fitting = [x for x in operands if x.dims == wanted]
    return fitting[-1] if fitting else operands[0]
