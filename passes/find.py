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

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from sparsify.passes.anchors import ANCHORS, Anchor, read_anchor, readers_of
from sparsify.passes.axes import (
    CASTS,
    Axis,
    Dims,
    Group,
    broadcast,
    extent,
    flat,
    fresh,
    index_of,
    is_one,
    is_view,
    leaves,
    op_name,
    regroup,
    resolve,
    view_down,
    view_up,
)
from sparsify.passes.graph import (
    agree,
    agree_in_shape,
    argument,
    arguments,
    aten,
    is_inert_dropout,
    is_tensor,
    mutations,
    origin,
    same,
    shape,
    storage_root,
    value,
)
from sparsify.passes.products import Product, read_product
from sparsify.passes.site import (
    BATCH,
    HEAD,
    KEY,
    NEEDS_GRADIENTS,
    QUERY,
    AttentionSite,
    Form,
    Layout,
    MaskTerm,
    Operand,
    Refused,
    Scale,
)

DTYPES = {torch.float16, torch.bfloat16, torch.float32}
DROPOUT = "dropout is active: dropping key blocks would change what it draws"
ELEMENTWISE = {"mul", "div", "add", "sub", "masked_fill", "where", "tanh"}


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


OPAQUE = {aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default}


def _refuse(form: Form, node: fx.Node, why: str) -> Refused:
    return Refused(form, origin(node), why, node.name)


class _Stop(Exception):
    """The walk cannot go on: at this node, for this reason."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass(frozen=True)
class _Term:
    """A MaskTerm before the op's layout is known: `dims` instead of an index."""

    kind: Any
    tensor: fx.Node
    dims: Dims
    fill: Any = float("-inf")
    factor: float = 1.0


@dataclass(frozen=True)
class _Scores:
    """What was met between a softmax and the product above it; steps in the order they are applied."""

    keys: Axis
    scales: tuple[Scale, ...] = ()
    terms: tuple[_Term, ...] = ()
    softcap: float | None = None
    sink: Any = None  # a number, or an Operand, of one more column beside the keys
    columns: Axis | None = None  # softmax runs over these, keys and sink, if the sink is a column
    sink_first: bool = False


@dataclass(frozen=True)
class _Chain:
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
    state: _Scores
    query_dtype: torch.dtype
    is_causal: bool = False


class _Finder:
    """Reads the anchors of one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.writes = mutations(gm.graph)
        self.leads_to_product: dict[fx.Node, bool] = {}
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
            return self.complete(self._sdpa_chain(node))
        except _Stop as stop:
            return _refuse("sdpa", stop.node, stop.why)

    def _sdpa_chain(self, node: fx.Node) -> _Chain:
        named = arguments(node)
        query, key, values, mask, dropout, scale = (
            named[x] for x in ("query", "key", "value", "attn_mask", "dropout_p", "scale"))
        if dropout != 0:
            raise _Stop(node, DROPOUT)
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
                raise _Stop(node, f"{shape(node)[-3]} query heads cannot share {shape(key)[-3]} key heads evenly")
            grouped = (*scores[:-3], parts[0])
        for name, x in (("key", key), ("value", values)):
            for size, own in zip(reversed(shape(x)[:-2]), reversed(grouped), strict=False):
                if own and not is_one(size) and not agree(size, extent(leaves(own))):
                    raise _Stop(node, f"the {name} {shape(x)} does not fit scores of shape {(*batch, q_len, kv_len)}")
        if not agree(shape(values)[-2], kv_len):
            raise _Stop(node, f"the key {shape(key)} and the value {shape(values)} differ in length")
        key_dims = broadcast_batch(key, grouped, (scores[-1], query_dims[-1]))
        value_dims = broadcast_batch(values, grouped, (scores[-1], *fresh((shape(values)[-1],))))
        terms: tuple[_Term, ...] = ()
        if mask is not None:
            dims = broadcast(mask, scores)
            if dims is None:
                raise _Stop(node, f"the mask {shape(mask)} does not fit scores of shape {(*batch, q_len, kv_len)}")
            terms = (_Term("keep" if value(mask).dtype == torch.bool else "add", mask, dims),)
        keys = scores[-1]
        state = _Scores(keys[0] if keys else Axis(1), (Scale(scale),), terms)
        return _Chain("sdpa", scores, keys, Operand(query, query_dims), Operand(key, key_dims),
                      Operand(values, value_dims), Operand(node, (*scores[:-1], value_dims[-1])), node, node,
                      query_dims[-1], state, value(node).dtype, named["is_causal"])

    def read_chain(self, anchor: Anchor) -> AttentionSite | Refused:
        shadowed = anchor.weights.meta.get("shadow_of")  # the mathematics of a flex_attention call (flex.py)
        try:
            site = self.complete(self._chain(anchor))
            return site if shadowed is None else replace(site, form="flex_attention")
        except _Stop as stop:
            return _refuse(anchor.form if shadowed is None else "flex_attention", shadowed or stop.node, stop.why)

    def _chain(self, anchor: Anchor) -> _Chain:
        scores = fresh(shape(anchor.weights))
        dim = anchor.dim % len(scores)
        single = not scores[dim]  # one key: it has no axis, and which factor is the keys' shows by what it lacks
        state = _Scores(Axis(1) if single else scores[dim][0], sink=anchor.sink)
        if anchor.divided:
            self._check_division(anchor, anchor.weights, scores, scores, dim)
        product, dims, state = self._walk_up(anchor.weights, anchor.scores, scores, state, set(anchor.inner))
        below, weights, weight_dims = self._walk_down(anchor, scores, state)
        left, right = product.operands_of(dims)
        keys = () if single else leaves((state.keys,))
        factors = [Operand(product.left, left), Operand(product.right, right)]
        on_right = len(flat(right)) <= len(flat(left)) if single else bool(set(keys) & set(flat(right)))
        query, key = factors if on_right else factors[::-1]
        if not single and (set(keys) & set(flat(query.dims)) or not set(keys) & set(flat(key.dims))):
            raise _Stop(anchor.weights, "the softmax does not run over the keys of a product of queries and keys")
        value_dims, out_dims, summed = below.others_of(weights, weight_dims)
        if set(leaves(summed)) != set(keys):
            raise _Stop(below.node, "the product with the values does not sum over what the softmax runs over")
        output = below.node
        if anchor.total is not None and not anchor.divided:
            output, out_dims = self._late_division(anchor, below.node, scores, dim, out_dims)
        summed_dims = tuple(axis for axis in flat(query.dims) if axis not in flat(dims))
        rows = tuple(keys if i == dim else group for i, group in enumerate(scores))
        return _Chain(anchor.form, rows, keys, query, key,
                      Operand(below.right if weights is below.left else below.left, value_dims),
                      Operand(below.node.meta.get("stands_for", output), out_dims), product.node, below.node,
                      summed_dims, state, _factor_dtype(product))

    def _late_division(self, anchor: Anchor, product: fx.Node, scores: Dims, dim: int,
                       out: Dims) -> tuple[fx.Node, Dims]:
        """The division of the product, perhaps in another layout, by the sum of the exponentials."""
        node = product
        while len(node.users) == 1:
            (user,) = node.users
            if argument(user) is not node:
                break
            if base_name(user) == "div":
                self._check_division(anchor, user, out, scores, dim)
                return user, out
            below = view_down(user, out)
            if below is None:
                break
            node, out = user, below
        raise _Stop(product, "the exponentials are not divided by their sum")

    def _check_division(self, anchor: Anchor, division: fx.Node, dims: Dims, scores: Dims, dim: int) -> None:
        """Every row is divided by its own sum."""
        assert anchor.total is not None
        path = []
        node: Any = argument(division, 1)
        while node is not anchor.total and is_tensor(node) and is_view(node):
            path.append(node)
            node = argument(node)
        total: Dims | None = scores[:dim] + ((),) * (len(shape(anchor.total)) == len(scores)) + scores[dim + 1:]
        for view in reversed(path):
            total = total and view_down(view, total)
        wanted = {axis for i, group in enumerate(scores) for axis in leaves(group) if i != dim}
        own = None if total is None else resolve(total)
        if node is not anchor.total or own is None or set(flat(own)) != wanted or any(
                mine and mine != theirs for mine, theirs in zip(own[::-1], resolve(dims)[::-1], strict=False)):
            raise _Stop(division, "the exponentials are not divided by the sum of their row")

    # -- up: from the softmax to the product with the keys -------------------------------------------------------

    def _walk_up(self, user: fx.Node, node: Any, dims: Dims, state: _Scores,
                 inner: set[fx.Node]) -> tuple[Product, Dims, _Scores]:
        while True:
            if not is_tensor(node):
                raise _Stop(user, "the scores are no tensor of this graph")
            if any(other is not user and other not in inner for other in node.users):
                raise _Stop(node, "the scores are used elsewhere too")
            if (product := read_product(node)) is not None:
                return product, dims, self._with_added(product, dims, state)
            if (step := view_up(node, dims)) is not None:
                user, (node, dims) = node, step
                continue
            name = base_name(node)
            if name in CASTS:
                user, node = node, argument(node)
                continue
            if name in ("cat", "pad", "constant_pad_nd"):
                user, (node, dims, state) = node, self._sink_column(node, dims, state)
                continue
            if name not in ELEMENTWISE:
                raise _Stop(node, f"{node.target} stands between the keys and the softmax")
            choices = self._read_step(node, dims, state, inner)
            leading = [choice for choice in choices if self._leads(choice[0])] or choices[:1]
            for scores, after in leading[:-1]:
                with contextlib.suppress(_Stop):
                    return self._walk_up(node, scores, dims, after, set(inner))
            user, (node, state) = node, leading[-1]
            if not agree_in_shape(shape(node), shape(user)):
                raise _Stop(user, f"a mask widens the scores from {shape(node)} to {shape(user)}")

    def _leads(self, node: Any) -> bool:
        """Whether a walk up from here may meet a product."""
        if not is_tensor(node):
            return False
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self.leads_to_product:
                stack.pop()
                continue
            if read_product(top) is not None:
                self.leads_to_product[top] = True
                continue
            walkable = base_name(top) in ELEMENTWISE or is_view(top)
            sources = [x for x in top.all_input_nodes if is_tensor(x)] if walkable else []
            unknown = [x for x in sources if x not in self.leads_to_product]
            if unknown:
                stack += unknown
            else:
                self.leads_to_product[top] = any(self.leads_to_product[x] for x in sources)
        return self.leads_to_product[node]

    def _read_step(self, node: fx.Node, dims: Dims, state: _Scores, inner: set[fx.Node]) -> list[tuple[Any, _Scores]]:
        """One elementwise op: where the scores may be, and what is known once they are there."""
        name, named = base_name(node), arguments(node)
        if name in ("mul", "div"):
            return self._read_scaling(node, name == "div", named["self"], named["other"], dims, state)
        if name == "tanh":
            return [(named["self"], self._with_softcap(node, state))]
        if state.softcap is not None:
            raise _Stop(node, "the scores are masked before they are capped")
        if name in ("add", "sub"):
            return self._read_addition(node, name == "sub", named, dims, state, inner)
        factor = self._factor(node, state)
        if name == "masked_fill":
            term = self._term(node, "hide", named["mask"], dims, factor, named["value"])
            return [(named["self"], replace(state, terms=(term, *state.terms)))]
        kept, hidden = named["self"], named["other"]
        choices = []
        for kind, scores, fill in (("keep", kept, hidden), ("hide", hidden, kept)):
            if self._leads(scores):
                term = self._term(node, kind, named["condition"], dims, factor, fill)
                choices.append((scores, replace(state, terms=(term, *state.terms))))
        if not choices:
            raise _Stop(node, "neither choice of a where is scores")
        return choices

    def _read_scaling(self, node: fx.Node, divides: bool, first: Any, second: Any, dims: Dims,
                      state: _Scores) -> list[tuple[Any, _Scores]]:
        if divides and node.kwargs.get("rounding_mode") is not None:
            raise _Stop(node, "the scores are rounded")
        choices = []
        for scores, factor in ((first, second), (second, first))[: 1 if divides else 2]:
            if not is_tensor(scores):
                continue
            scale: Any = factor
            if is_tensor(factor):
                own = broadcast(factor, dims)
                if own is None or not agree_in_shape(shape(scores), shape(node)):
                    continue
                scale = Operand(factor, own)
            choices.append((scores, replace(state, scales=(Scale(scale, divides), *state.scales))))
        if not choices:
            raise _Stop(node, "a scale widens the scores")
        return choices

    def _read_addition(self, node: fx.Node, subtracts: bool, named: dict[str, Any], dims: Dims, state: _Scores,
                       inner: set[fx.Node]) -> list[tuple[Any, _Scores]]:
        first, second, alpha = named["self"], named["other"], named.get("alpha", 1)
        factor = self._factor(node, state)
        if not isinstance(alpha, int | float):
            raise _Stop(node, "a symbolic multiple of something is added to the scores")
        if not is_tensor(second):
            if state.sink is not None:
                raise _Stop(node, "a number is added to the scores beside a sink logit")
            return [(first, state)]  # the same for every key: softmax does not see it
        choices = []
        for scores, tensor, times in ((first, second, -alpha if subtracts else alpha), (second, first, 1)):
            own = broadcast(tensor, dims)
            if own is None or (scores is second and (subtracts or alpha != 1)):
                continue
            if state.sink is None and not set(leaves((state.keys,))) & set(flat(own)):
                inner |= readers_of(scores, tensor)  # one number a row, its maximum say: softmax does not see it
                choices.append((scores, state))
            else:
                term = _Term("add", tensor, own, factor=factor * times)
                choices.append((scores, replace(state, terms=(term, *state.terms))))
        if not choices:
            raise _Stop(node, "what is added to the scores widens them")
        return choices

    def _term(self, node: fx.Node, kind: Any, tensor: fx.Node, dims: Dims, factor: float, fill: Any) -> _Term:
        own = broadcast(tensor, dims)
        if own is None:
            raise _Stop(node, f"a mask widens the scores to {shape(node)}")
        if is_tensor(fill) and any(not is_one(size) for size in shape(fill)):
            return _Term(kind, tensor, own, self._uniform(node, fill), factor)
        return _Term(kind, tensor, own, fill, factor)

    def _uniform(self, node: fx.Node, fill: fx.Node) -> Any:
        """The one number that fills a tensor."""
        source = fill
        while is_view(source):
            source = argument(source)
        if op_name(source) in ("full", "full_like", "new_full"):
            return arguments(source)["fill_value"]
        if op_name(source) in ("zeros", "zeros_like", "new_zeros"):
            return 0.0
        if all(is_one(size) for size in shape(source)):
            return source
        raise _Stop(node, f"hidden scores become the elements of {fill.name}")

    def _factor(self, node: fx.Node, state: _Scores) -> float:
        """By what the scores are multiplied after this node."""
        result = 1.0
        for scale in state.scales:
            if isinstance(scale.value, Operand):
                raise _Stop(node, "the scores are scaled by a tensor after they are masked")
            number = float(value(scale.value))  # of a symbolic number: a guard fixes it
            result = result / number if scale.divides else result * number
        return result

    def _with_softcap(self, node: fx.Node, state: _Scores) -> _Scores:
        if state.softcap is not None:
            raise _Stop(node, "the scores are capped twice")
        return replace(state, scales=(), softcap=self._factor(node, state))

    def _with_added(self, product: Product, dims: Dims, state: _Scores) -> _Scores:
        """baddbmm(mask, q, k): the mask that the product adds, and its factor."""
        if product.added is not None and product.beta != 0:
            if state.softcap is not None:
                raise _Stop(product.node, "the scores are masked before they are capped")
            if not isinstance(product.beta, int | float):
                raise _Stop(product.node, "a symbolic multiple of something is added to the scores")
            own = broadcast(product.added, dims)
            assert own is not None, "the product has the shape of its result"
            term = _Term("add", product.added, own, factor=self._factor(product.node, state) * product.beta)
            state = replace(state, terms=(term, *state.terms))
        if isinstance(product.alpha, fx.Node) or product.alpha != 1:
            state = replace(state, scales=(Scale(product.alpha), *state.scales))
        return state

    def _sink_column(self, node: fx.Node, dims: Dims, state: _Scores) -> tuple[Any, Dims, _Scores]:
        """One more logit beside the scores: cat([scores, sinks]) or pad(scores, (1, 0))."""
        rank, named = len(dims), arguments(node)
        dim = next(i for i, group in enumerate(dims) if state.keys in group) if state.keys in flat(dims) else -1
        if dim < 0 or len(dims[dim]) != 1 or state.sink is not None or state.terms or state.scales or state.softcap:
            raise _Stop(node, f"{node.target} stands between the keys and the softmax")
        sink: Any
        if base_name(node) == "cat":
            parts = named["tensors"]
            if named["dim"] % rank != dim or len(parts) != 2:
                raise _Stop(node, "scores of several products are put side by side")
            first = is_one(shape(parts[0])[dim])
            scores, sink_node = parts[::-1] if first else parts
            if not is_one(shape(sink_node)[dim]):
                raise _Stop(node, "scores of several products are put side by side")
            sink = Operand(sink_node, tuple(() if i == dim else group for i, group in enumerate(dims)))
        else:
            pads, scores = list(named["pad"]), named["self"]
            if len(pads) < 2 * (rank - dim) - 1 or named.get("mode", "constant") != "constant":
                raise _Stop(node, "the scores are padded")
            before, after = pads[2 * (rank - 1 - dim): 2 * (rank - 1 - dim) + 2]
            if sorted((before, after)) != [0, 1] or sum(map(abs, pads)) != 1:
                raise _Stop(node, "the scores are padded")
            first, sink = before == 1, float(named["value"] or 0.0)
        keys = Axis(shape(scores)[dim])
        state = replace(state, sink=sink, columns=state.keys, keys=keys, sink_first=first)
        return scores, (*dims[:dim], (keys,), *dims[dim + 1:]), state

    # -- down: from the softmax to the product with the values ---------------------------------------------------

    def _walk_down(self, anchor: Anchor, dims: Dims, state: _Scores) -> tuple[Product, fx.Node, Dims]:
        node = anchor.weights
        waits = state.columns is not None
        while True:
            users = [u for u in node.users if u not in anchor.inner]
            if not users:
                raise _Stop(node, "the attention weights are used by nothing")
            if len(users) > 1:
                leaving = [u for u in users if u.op == "output"]
                raise _Stop(node, "the attention weights are returned" if leaving
                            else "the attention weights are used elsewhere too")
            user = users[0]
            if user.op == "output":
                raise _Stop(node, "the attention weights are returned")
            product = read_product(user)
            if base_name(user) == "mul" and len(user.users) == 1:  # multiplied here, summed next
                product = read_product(next(iter(user.users)))
            if product is not None and product.left is not product.right and node in (product.left, product.right):
                if waits:
                    raise _Stop(user, "the sink logit carries a value")
                if product.added is not None and product.beta != 0 or isinstance(product.alpha, fx.Node) \
                        or product.alpha != 1:
                    raise _Stop(user, "the product with the values adds or scales")
                return product, node, dims
            if base_name(user) == "dropout" and not is_inert_dropout(user):
                raise _Stop(user, DROPOUT)
            if waits and (sliced := self._without_sink(user, dims, state)) is not None:
                node, dims, waits = user, sliced, False
                continue
            if base_name(user) == "nan_to_num" and not arguments(user)["nan"]:
                node = user
                continue
            below = view_down(user, dims)
            if below is None or argument(user) is not node:
                raise _Stop(user, f"{user.target} stands between the softmax and the values")
            node, dims = user, below

    def _without_sink(self, user: fx.Node, dims: Dims, state: _Scores) -> Dims | None:
        """The dims of the weights once the column of the sink is cut off."""
        if op_name(user) != "slice" or state.columns is None:
            return None
        named = arguments(user)
        dim = named["dim"] % len(dims)
        rest = dims[:dim] + ((state.keys,),) + dims[dim + 1:]
        start = 1 if state.sink_first else 0
        fits = same(shape(user)[dim], state.keys.size) and same(named["start"] or 0, start) and named["step"] == 1
        return rest if dims[dim] == (state.columns,) and fits else None

    # -- what the axes are ---------------------------------------------------------------------------------------

    def complete(self, chain: _Chain) -> AttentionSite:
        """Un-repeat grouped KV heads, name the axes, and check what holds for all forms."""
        output, scored = chain.output.node, chain.scored
        if output.meta.get("requires_grad", False):
            raise _Stop(output, NEEDS_GRADIENTS)
        paths = {"query": list(self._path(chain.query, scored)), "key": list(self._path(chain.key, scored)),
                 "value": list(self._path(chain.value, chain.weighted))}
        sink = chain.state.sink
        if isinstance(sink, Operand):
            *_, (sink, _) = self._path(sink, output)
        for name, path in paths.items():
            operand, reader = path[-1]
            if self._written_between(operand.node, reader, output):
                raise _Stop(output, f"the {name} is written to in place before the output is computed")
        layout = self._layout(chain, paths["key"][-1][0], paths["value"][-1][0])
        query = _nearest(paths["query"], (layout.batch, layout.heads, layout.queries, layout.dim))
        key = _nearest(paths["key"], (layout.batch, layout.kv_heads, layout.keys, layout.dim))
        values = _nearest(paths["value"], (layout.batch, layout.kv_heads, layout.keys, layout.value_dim))
        dtype = self._dtype(chain, query, key)
        state = chain.state
        if isinstance(sink, Operand):
            sink = Operand(sink.node, resolve(sink.dims))
            if set(flat(sink.dims)) - set(layout.heads):
                raise _Stop(output, "the sink logit differs between queries or batch rows")
        indices = ((BATCH, layout.batch), (HEAD, layout.heads), (QUERY, layout.queries), (KEY, layout.keys))
        terms = tuple(MaskTerm(t.kind, t.tensor, index_of(t.dims, indices), t.fill, t.factor, resolve(t.dims))
                      for t in state.terms)
        scales = []
        for scale in state.scales:
            if isinstance(scale.value, Operand):
                operand = Operand(scale.value.node, resolve(scale.value.dims))
                axes = set(flat(operand.dims))
                if axes & set(layout.keys) and not axes <= {*layout.batch, *layout.kv_heads, *layout.keys}:
                    if scale.divides or state.softcap is not None:
                        raise _Stop(output, "the scores are scaled by a tensor over queries and keys")
                    gate = MaskTerm("gate", operand.node, index_of(operand.dims, indices), dims=operand.dims)
                    terms = (gate, *terms)
                    continue
                scale = Scale(operand, scale.divides)
            scales.append(scale)
        return AttentionSite(
            chain.form, origin(output), query, key,
            values, Operand(output, resolve(chain.output.dims)), layout, dtype,
            tuple(scales),
            terms, chain.is_causal, state.softcap, sink)

    def _dtype(self, chain: _Chain, query: Operand, key: Operand) -> torch.dtype:
        """The dtype attention runs in. That q and k were widened before their product changes nothing: it is exact."""
        common = torch.promote_types(value(query.node).dtype, value(key.node).dtype)
        scores = common if common.itemsize < chain.query_dtype.itemsize else chain.query_dtype
        dtype = torch.promote_types(scores, value(chain.weighted).dtype)
        if dtype not in DTYPES:
            raise _Stop(chain.output.node, f"attention runs in {dtype}; the ops take float16, bfloat16 and float32")
        return dtype

    def _path(self, operand: Operand, reader: fx.Node) -> Iterable[tuple[Operand, fx.Node]]:
        """The operand, then what it is a view of, step by step, each with the node that reads it.

        The last has no axis that the operand does not vary along.
        """
        node, dims = operand.node, operand.dims
        while True:
            yield Operand(node, dims), reader
            step = view_up(node, dims, through_casts=True)
            if step is None:
                return
            reader, (node, dims) = node, step

    def _layout(self, chain: _Chain, key: Operand, values: Operand) -> Layout:
        keys = leaves(chain.keys)
        in_key, in_value = (set(flat(x.dims)) for x in (key, values))
        rows = [tuple(a for a in group if a not in keys) for group in resolve(chain.scores)]
        shared = in_key | in_value
        in_rows = {a for group in rows for a in group}
        if in_key & in_rows != in_value & in_rows and not any(a not in shared for a in in_rows):
            raise _Stop(chain.scored, "each row has keys or values of its own: no queries share them")
        common = [tuple(a for a in group if a in shared) for group in rows]
        alone = [tuple(a for a in group if a not in shared) for group in rows]
        queries = self._query_group(chain, alone, keys)
        groups = tuple(a for group in alone for a in group if a not in queries)
        with_common = [i for i, group in enumerate(common) if group]
        batch: Group = tuple(a for i in with_common[:-1] for a in common[i])
        kv_heads: Group = common[with_common[-1]] if with_common else ()
        if with_common == [0]:  # heads folded into the batch, or no heads: unless each has a sink logit of its own
            sink = chain.state.sink
            alone_is_batch = not (isinstance(sink, Operand) and set(kv_heads) & set(flat(sink.dims)))
            if len(kv_heads) > 1:
                batch, kv_heads = kv_heads[:-1], kv_heads[-1:]
            elif alone_is_batch:
                batch, kv_heads = kv_heads, ()
        dim = leaves(chain.dim)
        rest = {*keys, *(a for group in rows for a in group)}
        value_dim = tuple(a for group in resolve(chain.output.dims) for a in group if a not in rest)
        return Layout(batch, kv_heads, groups, queries, keys, dim, value_dim)

    def _query_group(self, chain: _Chain, alone: list[Group], keys: Group) -> Group:
        """The axes of the queries, among those that only the query factor has: those that a mask ties to the keys,
        else those whose length is symbolic, else the last dim's; the others are heads that share their keys."""
        candidates = [group for group in alone if group]
        if not candidates:
            return ()
        tied = [group for group in candidates for term in chain.state.terms
                if set(group) & set(flat(term.dims)) and set(keys) & set(flat(term.dims))]
        symbolic = [group for group in candidates if any(not isinstance(a.size, int) for a in group)]
        for preferred in (tied, symbolic):
            if preferred and all(group == preferred[0] for group in preferred):
                return preferred[0]
        return candidates[-1]

    def _written_between(self, tensor: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node after `first` and before `last` writes to the storage of `tensor`."""
        start, end = self.position[first], self.position[last]
        return any(start < self.position[w] < end for w in self.writes.get(storage_root(tensor), ()))


def base_name(node: fx.Node) -> str:
    """The name of an ATen op without the underscore of its in-place form."""
    name = op_name(node)
    return name.removesuffix("_") if name and node.target._schema.is_mutable else name  # type: ignore[union-attr]


def broadcast_batch(tensor: fx.Node, batch: Dims, last: Dims) -> Dims:
    """The dims of a factor of SDPA: its batch dims, broadcast, then two of its own."""
    sizes = shape(tensor)[:-2]
    own = batch[len(batch) - len(sizes):]
    return (*(() if is_one(size) else group for size, group in zip(sizes, own, strict=True)), *last)



def _nearest(path: list[tuple[Operand, fx.Node]], wanted: Dims) -> Operand:
    """The tensor of a path to rewrite from: the last in the op's layout, else the first without repeats."""
    operands = [Operand(x.node, resolve(x.dims)) for x, _ in path]
    fewest = len(set(flat(operands[-1].dims)))
    operands = [x for x in operands if len(set(flat(x.dims))) == fewest]
    narrowest = min(value(x.node).dtype.itemsize for x in operands)
    operands = [x for x in operands if value(x.node).dtype.itemsize == narrowest]
    fitting = [x for x in operands if x.dims == wanted]
    return fitting[-1] if fitting else operands[0]


def _factor_dtype(product: Product) -> torch.dtype:
    """The dtype that the factors of a product have when it is computed: autocast casts them without a node."""
    common = torch.promote_types(value(product.left).dtype, value(product.right).dtype)
    own: torch.dtype = value(product.node).dtype
    return own if own.itemsize < common.itemsize else common
