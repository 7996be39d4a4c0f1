"""Find the attention sites of a graph.

Given   ATen from normalise.py: softmax, matmul and SDPA still whole, fake values set.
Leaves  the graph untouched; one AttentionSite or Refused per softmax and per SDPA call, in graph order.
Never   guesses: what cannot be read exactly comes back Refused. No module class, no model is known here.

    scores = product(q, k)                  contracted over the head dim, in any layout
    probs  = softmax(cap(scores * scale) + mask)
    out    = product(probs, v)              contracted over the keys     ->  AttentionSite

The walk starts at an anchor (anchors.py: softmax in all its spellings) with an axis for each of its dims, goes up
through casts, masks, scales and views to the product that made the scores, and down through casts, inert dropout and
views to the product that takes the weights. What an axis is follows from who has it: the keys are what softmax runs
over, the queries what only one factor has, batch and heads what all have. Every node on the way must have one user, the
next: then nothing else reads the scores or the weights, and no in-place op changes them behind our back.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from sparsify.passes.anchors import ANCHORS, Anchor, divided_by, read_anchor, source
from sparsify.passes.axes import (
    Axis,
    Dims,
    base_name,
    broadcast,
    extent,
    flat,
    fresh,
    is_one,
    leaves,
    op_name,
    regroup,
    resolve,
    view_down,
)
from sparsify.passes.graph import (
    agree,
    argument,
    arguments,
    aten,
    origin,
    same,
    shape,
    value,
)
from sparsify.passes.layout import Chain, Writes, name_axes
from sparsify.passes.products import Product
from sparsify.passes.site import (
    AttentionSite,
    Form,
    Operand,
    Refused,
    Scale,
)
from sparsify.passes.walk import DROPOUT, Scores, Stop, Term, Walker


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Refused]:
    """List every attention of `gm`, those inside bodies of higher-order ops too."""
    finder = _Finder(gm)
    found: list[AttentionSite | Refused] = []
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            found += finder.read_higher_order(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            found.append(finder.read_sdpa(node))
        elif node.target in OPAQUE:
            found.append(_refuse("other", node, node.meta.get("refusal", f"{node.target} is called directly")))
        elif op_name(node) in ANCHORS and (anchor := read_anchor(node)) is not None:
            found.append(finder.read_chain(anchor))
    return found


ONLINE = "an online softmax: the maximum and the sum run over several chunks of keys"
OPAQUE = {aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default}


def _refuse(form: Form, node: fx.Node, why: str) -> Refused:
    return Refused(form, origin(node), why, node.name)


class _Finder:
    """Reads the anchors of one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.writes = Writes(gm.graph)
        self.walker = Walker(gm.graph)
        self.shadowed = {node.meta["stands_for"].args[0] for node in gm.graph.nodes if "stands_for" in node.meta}

    def read_higher_order(self, node: fx.Node) -> Iterable[Refused]:
        """Attention inside a higher-order op that stays whole: recorded, never rewritten."""
        if node in self.shadowed:
            return
        if node.target is torch.ops.higher_order.flex_attention:
            yield _refuse("flex_attention", node, node.meta.get("refusal", "flex_attention is called directly"))
            return
        for attribute in node.all_input_nodes:
            body = getattr(self.gm, str(attribute.target), None) if attribute.op == "get_attr" else None
            if not isinstance(body, fx.GraphModule) or body.meta.get("normalised"):
                continue
            for inner in body.graph.nodes:
                name = inner.target if inner.op == "call_method" else getattr(inner.target, "__name__", "")
                if isinstance(inner.target, HigherOrderOperator):
                    yield _refuse("other", inner, f"it is inside a {inner.target} inside a {node.target}")
                elif name in ("softmax", "scaled_dot_product_attention"):
                    form: Form = "sdpa" if name != "softmax" else "softmax chain"
                    yield _refuse(form, inner, f"it is inside the body of {node.target}")

    def read_sdpa(self, node: fx.Node) -> AttentionSite | Refused:
        try:
            return name_axes(self._sdpa_chain(node), self.writes)
        except Stop as stop:
            return _refuse("sdpa", stop.node, stop.why)

    def _sdpa_chain(self, node: fx.Node) -> Chain:
        named = arguments(node)
        query, key, values, mask, dropout, scale = (
            named[x] for x in ("query", "key", "value", "attn_mask", "dropout_p", "scale"))
        if dropout != 0:
            raise Stop(node, DROPOUT)
        if scale is None:
            scale = int(shape(query)[-1]) ** -0.5  # fixes a symbolic head dim: no model calls with another
        *batch, q_len, _ = shape(node)
        kv_len, dim = shape(key)[-2:]
        scores = fresh((*batch, q_len, kv_len))
        query_dims = broadcast_batch(query, scores[:-2], (*scores[-2:-1], *fresh((dim,))))
        grouped = scores[:-2]
        if named["enable_gqa"] and not same(shape(key)[-3], shape(node)[-3]):
            parts = regroup(scores[-3], (shape(key)[-3], shape(node)[-3] // shape(key)[-3]))
            if parts is None:
                raise Stop(node, f"{shape(node)[-3]} query heads cannot share {shape(key)[-3]} key heads evenly")
            grouped = (*scores[:-3], parts[0])
        for name, x in (("key", key), ("value", values)):
            for size, own in zip(reversed(shape(x)[:-2]), reversed(grouped), strict=False):
                if own and not is_one(size) and not agree(size, extent(leaves(own))):
                    raise Stop(node, f"the {name} {shape(x)} does not fit scores of shape {(*batch, q_len, kv_len)}")
        if not agree(shape(values)[-2], kv_len):
            raise Stop(node, f"the key {shape(key)} and the value {shape(values)} differ in length")
        key_dims = broadcast_batch(key, grouped, (scores[-1], query_dims[-1]))
        value_dims = broadcast_batch(values, grouped, (scores[-1], *fresh((shape(values)[-1],))))
        terms: tuple[Term, ...] = ()
        if mask is not None:
            dims = broadcast(mask, scores)
            if dims is None:
                raise Stop(node, f"the mask {shape(mask)} does not fit scores of shape {(*batch, q_len, kv_len)}")
            terms = (Term("keep" if value(mask).dtype == torch.bool else "add", mask, dims),)
        keys = scores[-1]
        state = Scores(keys[0] if keys else Axis(1), (Scale(scale),), terms)
        return Chain("sdpa", scores, keys, Operand(query, query_dims), Operand(key, key_dims),
                      Operand(values, value_dims), Operand(node, (*scores[:-1], value_dims[-1])), node, node,
                      query_dims[-1], state, value(node).dtype, named["is_causal"])

    def read_chain(self, anchor: Anchor) -> AttentionSite | Refused:
        shadowed = anchor.weights.meta.get("shadow_of")  # the mathematics of a flex_attention call (flex.py)
        try:
            site = name_axes(self._chain(anchor), self.writes)
            return site if shadowed is None else replace(site, form="flex_attention")
        except Stop as stop:
            if _is_online(anchor):
                stop.why = ONLINE
            where = shadowed or (anchor.weights if stop.node.op == "placeholder" else stop.node)
            return _refuse(anchor.form if shadowed is None else "flex_attention", where, stop.why)

    def _chain(self, anchor: Anchor) -> Chain:
        scores = fresh(shape(anchor.weights))
        dim = anchor.dim % len(scores)
        single = not scores[dim]  # one key: it has no axis, and which factor is the keys' shows by what it lacks
        state = Scores(Axis(1) if single else scores[dim][0], sink=anchor.sink)
        if anchor.dividend is not None:
            self._check_division(anchor, anchor.weights, anchor.dividend, scores, scores, dim)
        product, dims, state = self.walker.up(anchor.weights, anchor.scores, scores, state, set(anchor.inner))
        below, weights, weight_dims, gains = self.walker.down(anchor, scores, state)
        left, right = product.operands_of(dims)
        keys = () if single else leaves((state.keys,))
        factors = [Operand(product.left, left), Operand(product.right, right)]
        on_right = len(flat(right)) <= len(flat(left)) if single else bool(set(keys) & set(flat(right)))
        query, key = factors if on_right else factors[::-1]
        if not single and (set(keys) & set(flat(query.dims)) or not set(keys) & set(flat(key.dims))):
            raise Stop(anchor.weights, "the softmax does not run over the keys of a product of queries and keys")
        value_dims, out_dims, summed = below.others_of(weights, weight_dims)
        if set(leaves(summed)) != set(keys):
            raise Stop(below.node, "the product with the values does not sum over what the softmax runs over: it runs "
                                   "over queries, say, or its weights are mixed between heads")
        output = below.node
        if anchor.total is not None and anchor.dividend is None:
            output, out_dims = self._late_division(anchor, below.node, scores, dim, out_dims)
        summed_dims = tuple(axis for axis in flat(query.dims) if axis not in flat(dims))
        rows = tuple(keys if i == dim else group for i, group in enumerate(scores))
        return Chain(anchor.form, rows, keys, query, key,
                      Operand(below.right if weights is below.left else below.left, value_dims),
                      Operand(below.node.meta.get("stands_for", output), out_dims), product.node, below.node,
                      summed_dims, state, _factor_dtype(product), gains=gains)

    def _late_division(self, anchor: Anchor, product: fx.Node, scores: Dims, dim: int,
                       out: Dims) -> tuple[fx.Node, Dims]:
        """The division of the product, perhaps in another layout, by the sum of the exponentials."""
        node = product
        while len(node.users) == 1:
            (user,) = node.users
            assert anchor.total is not None
            if divided_by(user, node, anchor.total) is not None:
                self._check_division(anchor, user, node, out, scores, dim)
                return user, out
            if argument(user) is not node:
                break
            below = view_down(user, out)
            if below is None:
                break
            node, out = user, below
        raise Stop(product, "the exponentials are not divided by their sum")

    def _check_division(self, anchor: Anchor, division: fx.Node, dividend: fx.Node, dims: Dims, scores: Dims,
                        dim: int) -> None:
        """Every row is divided by its own sum."""
        assert anchor.total is not None
        views = divided_by(division, dividend, anchor.total)
        total: Dims | None = scores[:dim] + ((),) * (len(shape(anchor.total)) == len(scores)) + scores[dim + 1:]
        for view in reversed(views or []):
            total = total and view_down(view, total)
        wanted = {axis for i, group in enumerate(scores) for axis in leaves(group) if i != dim}
        own = None if views is None or total is None else resolve(total)
        if own is None or set(flat(own)) != wanted or any(
                mine and mine != theirs for mine, theirs in zip(own[::-1], resolve(dims)[::-1], strict=False)):
            raise Stop(division, "the exponentials are not divided by the sum of their row")


def broadcast_batch(tensor: fx.Node, batch: Dims, last: Dims) -> Dims:
    """The dims of a factor of SDPA: its batch dims, broadcast, then two of its own."""
    sizes = shape(tensor)[:-2]
    own = batch[len(batch) - len(sizes):]
    return (*(() if is_one(size) else group for size, group in zip(sizes, own, strict=True)), *last)


def _is_online(anchor: Anchor) -> bool:
    """Whether the exponentials are of one chunk of keys, shifted by a maximum that runs over several."""
    shift = source(argument(anchor.scores, 1)) if op_name(anchor.scores) == "sub" else None
    return shift is not None and base_name(shift) in ("maximum", "max") and len(shift.all_input_nodes) == 2


def _factor_dtype(product: Product) -> torch.dtype:
    """The dtype that the factors of a product have when it is computed: autocast casts them without a node."""
    common = torch.promote_types(value(product.left).dtype, value(product.right).dtype)
    own: torch.dtype = value(product.node).dtype
    return own if own.itemsize < common.itemsize else common
