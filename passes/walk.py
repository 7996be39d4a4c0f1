"""The walk from a softmax up to the product that made its scores, and down to the product that takes its weights.

On the way up the scores meet casts, views, masks, biases, scales, a soft cap and a sink column; `Scores` holds what was
met. On the way down the weights meet casts, views and inert dropout. Every node must have one user, the next; where two
operands may be the scores, the one that leads to a product is.
"""

import contextlib
import functools
import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sparsify.passes.anchors import Anchor, readers_of
from sparsify.passes.axes import (
    CASTS,
    PRECISE,
    Axis,
    Dims,
    base_name,
    broadcast,
    flat,
    is_one,
    is_view,
    leaves,
    op_name,
    view_down,
    view_up,
)
from sparsify.passes.graph import (
    agree_in_shape,
    argument,
    arguments,
    is_inert_dropout,
    is_tensor,
    mutations,
    same,
    shape,
    storage_root,
    value,
)
from sparsify.passes.products import Product, read_product
from sparsify.passes.site import Gain, Operand, Scale

DROPOUT = "dropout is active: dropping key blocks would change what it draws"
ELEMENTWISE = {"mul", "div", "neg", "add", "sub", "masked_fill", "index_put", "where", "tanh"}


class Stop(Exception):
    """The walk cannot go on: at this node, for this reason."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass(frozen=True)
class Term:
    """A MaskTerm before the op's layout is known: `dims` instead of an index."""

    kind: Any
    tensor: fx.Node
    dims: Dims
    fill: Any = float("-inf")
    factor: float = 1.0
    scalers: tuple[Scale, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What was met between a softmax and the product above it; steps in the order they are applied."""

    keys: Axis
    scales: tuple[Scale, ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float | None = None
    sink: Any = None  # a number, or an Operand, of one more column beside the keys
    columns: Axis | None = None  # softmax runs over these, keys and sink, if the sink is a column
    sink_first: bool = False


class Walker:
    """Walks one graph; remembers which nodes lead to a product."""

    def __init__(self, graph: fx.Graph) -> None:
        self.written = mutations(graph)
        self.leads_to_product: dict[fx.Node, bool] = {}

    def up(self, user: fx.Node, node: Any, dims: Dims, state: Scores,
           inner: set[fx.Node]) -> tuple[Product, Dims, Scores]:
        """From scores to the product that made them: it, the dims of its result, and what was met.

        `user` reads `node`, which has these dims; `inner` are nodes that may read it too.
        """
        while True:
            if not is_tensor(node):
                raise Stop(user, "the scores are no tensor of this graph")
            if any(other is not user and other not in inner for other in node.users):
                raise Stop(node, "the scores are used elsewhere too")
            if (product := read_product(node)) is not None:
                return product, dims, self._with_added(product, dims, state)
            if (step := view_up(node, dims)) is not None:
                user, (node, dims) = node, step
                continue
            name = base_name(node)
            if name in CASTS:
                if value(node).dtype not in PRECISE:
                    raise Stop(node, f"the scores are cast to {value(node).dtype}")
                user, node = node, argument(node)
                continue
            if name in ("cat", "pad", "constant_pad_nd"):
                user, (node, dims, state) = node, self._sink_column(node, dims, state)
                continue
            if node.op == "placeholder":
                raise Stop(user, "the scores are an input, no product of queries and keys")
            if name not in ELEMENTWISE:
                raise Stop(node, f"{node.target} stands between the keys and the softmax")
            choices = self._read_step(node, dims, state, inner)
            leading = [choice for choice in choices if self._leads(choice[0])] or choices[:1]
            for scores, after in leading[:-1]:
                with contextlib.suppress(Stop):
                    return self.up(node, scores, dims, after, set(inner))
            user, (node, state) = node, leading[-1]
            if not agree_in_shape(shape(node), shape(user)):
                raise Stop(user, f"a mask widens the scores from {shape(node)} to {shape(user)}")

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

    def _read_step(self, node: fx.Node, dims: Dims, state: Scores, inner: set[fx.Node]) -> list[tuple[Any, Scores]]:
        """One elementwise op: where the scores may be, and what is known once they are there."""
        name, named = base_name(node), arguments(node)
        if name in ("mul", "div"):
            return self._read_scaling(node, name == "div", named["self"], named["other"], dims, state)
        if name == "neg":
            return [(named["self"], replace(state, scales=(Scale(-1.0), *state.scales)))]
        if name == "tanh":
            return [(named["self"], self._with_softcap(node, state))]
        if state.softcap is not None:
            raise Stop(node, "the scores are masked before they are capped")
        if name in ("add", "sub"):
            return self._read_addition(node, name == "sub", named, dims, state, inner)
        if name == "masked_fill":
            term = self._term(node, "hide", named["mask"], dims, state, named["value"])
            return [(named["self"], replace(state, terms=(term, *state.terms)))]
        if name == "index_put":  # s[mask] = fill
            mask = named["indices"][0] if len(named["indices"]) == 1 else None
            if mask is None or value(mask).dtype != torch.bool or named["accumulate"] or not agree_in_shape(
                    shape(mask), shape(node)):
                raise Stop(node, f"{node.target} stands between the keys and the softmax")
            term = self._term(node, "hide", mask, dims, state, named["values"])
            return [(named["self"], replace(state, terms=(term, *state.terms)))]
        kept, hidden = named["self"], named["other"]
        choices = []
        for kind, scores, fill in (("keep", kept, hidden), ("hide", hidden, kept)):
            if self._leads(scores):
                term = self._term(node, kind, named["condition"], dims, state, fill)
                choices.append((scores, replace(state, terms=(term, *state.terms))))
        if not choices:
            raise Stop(node, "neither choice of a where is scores")
        return choices

    def _read_scaling(self, node: fx.Node, divides: bool, first: Any, second: Any, dims: Dims,
                      state: Scores) -> list[tuple[Any, Scores]]:
        if divides and node.kwargs.get("rounding_mode") is not None:
            raise Stop(node, "the scores are rounded")
        choices = []
        for scores, factor in ((first, second), (second, first))[: 1 if divides else 2]:
            if not is_tensor(scores):
                continue
            scales: list[Any] = [factor]
            if is_tensor(factor):
                if broadcast(factor, dims) is None or not agree_in_shape(shape(scores), shape(node)):
                    continue
                scales = self._parts_of_scale(factor, dims, state)
            choices.append((scores, replace(state, scales=(*(Scale(x, divides) for x in scales), *state.scales))))
        if not choices:
            raise Stop(node, "a scale widens the scores")
        return choices

    def _parts_of_scale(self, factor: fx.Node, dims: Dims, state: Scores) -> list[Operand]:
        """A tensor as the factors it is made of, where one of them does not differ between keys: |q| * |k|."""
        keys = set(leaves((state.keys,)))
        if op_name(factor) == "mul" and storage_root(factor) not in self.written:
            parts = [(x, broadcast(x, dims)) for x in map(functools.partial(argument, factor), (0, 1)) if is_tensor(x)]
            if len(parts) == 2 and any(own is not None and not keys & set(flat(own)) for _, own in parts):
                return [Operand(x, own) for x, own in parts if own is not None]
        own = broadcast(factor, dims)
        assert own is not None
        return [Operand(factor, own)]

    def _read_addition(self, node: fx.Node, subtracts: bool, named: dict[str, Any], dims: Dims, state: Scores,
                       inner: set[fx.Node]) -> list[tuple[Any, Scores]]:
        first, second, alpha = named["self"], named["other"], named.get("alpha", 1)
        factor, scalers = _later(state)
        keys = set(leaves((state.keys,)))
        # One number a row is the same for every key, softmax does not see it: unless it is scaled key by key, or a sink
        # does not get it.
        invariant = state.sink is None and not any(
            isinstance(x.value, Operand) and keys & set(flat(x.value.dims)) for x in scalers)
        if not isinstance(alpha, int | float):
            raise Stop(node, "a symbolic multiple of something is added to the scores")
        if not is_tensor(second):
            if not invariant:
                raise Stop(node, "a number is added to the scores, and then they are scaled or meet a sink logit")
            return [(first, state)]
        choices = []
        for scores, tensor, times in ((first, second, -alpha if subtracts else alpha), (second, first, 1)):
            own = broadcast(tensor, dims)
            if own is None or (scores is second and (subtracts or alpha != 1)):
                continue
            if invariant and not keys & set(flat(own)):
                inner |= readers_of(scores, tensor)
                choices.append((scores, state))
            else:
                term = Term("add", tensor, own, factor=factor * times, scalers=scalers)
                choices.append((scores, replace(state, terms=(term, *state.terms))))
        if not choices:
            raise Stop(node, "what is added to the scores widens them")
        return choices

    def _term(self, node: fx.Node, kind: Any, tensor: fx.Node, dims: Dims, state: Scores, fill: Any) -> Term:
        own = broadcast(tensor, dims)
        if own is None:
            raise Stop(node, f"a mask widens the scores to {shape(node)}")
        if is_tensor(fill) and any(not is_one(size) for size in shape(fill)):
            fill = self._uniform(node, fill)
        if isinstance(value(fill), torch.SymFloat) and not free_unbacked_symbols(value(fill)):
            fill = float(value(fill))  # of a symbolic number: a guard fixes it
        factor, scalers = _later(state)
        return Term(kind, tensor, own, fill, factor, scalers)

    def _uniform(self, node: fx.Node, fill: fx.Node) -> Any:
        """The one number that fills a tensor."""
        source = fill
        while is_view(source):
            source = argument(source)
        if storage_root(source) in self.written or storage_root(fill) in self.written:
            raise Stop(node, f"hidden scores become the elements of {fill.name}, which is written to in place")
        if op_name(source) in ("full", "full_like", "new_full"):
            return arguments(source)["fill_value"]
        if op_name(source) in ("zeros", "zeros_like", "new_zeros"):
            return 0.0
        if all(is_one(size) for size in shape(source)):
            return source
        raise Stop(node, f"hidden scores become the elements of {fill.name}")

    def _with_softcap(self, node: fx.Node, state: Scores) -> Scores:
        factor, scalers = _later(state)
        if state.softcap is not None or scalers:
            raise Stop(node, "the scores are capped twice, or scaled by a tensor after they are capped")
        if factor == 0 or not math.isfinite(factor):
            raise Stop(node, f"the scores are capped at {factor}")
        # -c * tanh(s) is c * tanh(-s), and the ops take a cap above 0.
        return replace(state, scales=() if factor > 0 else (Scale(-1.0),), softcap=abs(factor))

    def _with_added(self, product: Product, dims: Dims, state: Scores) -> Scores:
        """baddbmm(mask, q, k): the mask that the product adds, and its factor."""
        if product.added is not None and product.beta != 0:
            if state.softcap is not None:
                raise Stop(product.node, "the scores are masked before they are capped")
            if not isinstance(product.beta, int | float):
                raise Stop(product.node, "a symbolic multiple of something is added to the scores")
            own = broadcast(product.added, dims)
            assert own is not None, "the product has the shape of its result"
            factor, scalers = _later(state)
            term = Term("add", product.added, own, factor=factor * product.beta, scalers=scalers)
            state = replace(state, terms=(term, *state.terms))
        if isinstance(product.alpha, fx.Node) or product.alpha != 1:
            state = replace(state, scales=(Scale(product.alpha), *state.scales))
        return state

    def _sink_column(self, node: fx.Node, dims: Dims, state: Scores) -> tuple[Any, Dims, Scores]:
        """One more logit beside the scores: cat([scores, sinks]) or pad(scores, (1, 0))."""
        rank, named = len(dims), arguments(node)
        dim = next(i for i, group in enumerate(dims) if state.keys in group) if state.keys in flat(dims) else -1
        if dim < 0 or len(dims[dim]) != 1 or state.sink is not None or state.terms or state.scales or state.softcap:
            raise Stop(node, f"{node.target} stands between the keys and the softmax")
        sink: Any
        if base_name(node) == "cat":
            parts = named["tensors"]
            if named["dim"] % rank != dim or len(parts) != 2:
                raise Stop(node, "scores of several products are put side by side")
            first = is_one(shape(parts[0])[dim])
            scores, sink_node = parts[::-1] if first else parts
            if not is_one(shape(sink_node)[dim]):
                raise Stop(node, "scores of several products are put side by side")
            sink = Operand(sink_node, tuple(() if i == dim else group for i, group in enumerate(dims)))
        else:
            pads, scores = list(named["pad"]), named["self"]
            if len(pads) < 2 * (rank - dim) - 1 or named.get("mode", "constant") != "constant":
                raise Stop(node, "the scores are padded")
            before, after = pads[2 * (rank - 1 - dim): 2 * (rank - 1 - dim) + 2]
            if sorted((before, after)) != [0, 1] or sum(map(abs, pads)) != 1:
                raise Stop(node, "the scores are padded")
            first, sink = before == 1, float(named["value"] or 0.0)
        keys = Axis(shape(scores)[dim])
        state = replace(state, sink=sink, columns=state.keys, keys=keys, sink_first=first)
        return scores, (*dims[:dim], (keys,), *dims[dim + 1:]), state

    def down(self, anchor: Anchor, dims: Dims, state: Scores) -> tuple[Product, fx.Node, Dims, tuple[Gain, ...]]:
        """From the weights to the product with the values: it, its factor and the dims of that, gains on the way."""
        node = anchor.weights
        waits = state.columns is not None
        gains: tuple[Gain, ...] = ()
        while True:
            users = [user for user in node.users if user not in anchor.inner]
            tests = [user for user in users if base_name(user) == "isnan"]
            rest = [user for user in users if user not in tests]
            if not rest:
                raise Stop(node, "the attention weights are used by nothing")
            if len(rest) > 1:
                leaving = any(user.op == "output" for user in rest)
                raise Stop(node, "the attention weights are returned" if leaving
                           else "the attention weights are used elsewhere too")
            (user,) = rest
            if user.op == "output":
                raise Stop(node, "the attention weights are returned")
            if tests:
                if not _empties_rows(user, node, tests, self.written):
                    raise Stop(node, "the attention weights are used elsewhere too")
                node = user
                continue
            product = read_product(user)
            if base_name(user) == "mul" and len(user.users) == 1:  # multiplied here, summed next
                product = read_product(next(iter(user.users)))
            if product is not None and product.left is not product.right and node in (product.left, product.right):
                if waits:
                    raise Stop(user, "the sink logit carries a value")
                adds = product.added is not None and product.beta != 0
                if adds or isinstance(product.alpha, fx.Node) or product.alpha != 1:
                    raise Stop(user, "the product with the values adds or scales")
                return product, node, dims, gains
            if base_name(user) == "dropout" and not is_inert_dropout(user):
                raise Stop(user, DROPOUT)
            if waits and (sliced := self._without_sink(user, dims, state)) is not None:
                node, dims, waits = user, sliced, False
                continue
            if base_name(user) == "nan_to_num" and not arguments(user)["nan"]:
                node = user
                continue
            if not waits and (gain := _read_gain(user, node, dims)) is not None:
                node, gains = user, (*gains, gain)
                continue
            below = view_down(user, dims)
            if below is None or argument(user) is not node:
                raise Stop(user, f"{user.target} stands between the softmax and the values")
            node, dims = user, below

    def _without_sink(self, user: fx.Node, dims: Dims, state: Scores) -> Dims | None:
        """The dims of the weights once the column of the sink is cut off."""
        if op_name(user) != "slice" or state.columns is None:
            return None
        named = arguments(user)
        dim = named["dim"] % len(dims)
        rest = dims[:dim] + ((state.keys,),) + dims[dim + 1:]
        start = 1 if state.sink_first else 0
        fits = same(shape(user)[dim], state.keys.size) and same(named["start"] or 0, start) and named["step"] == 1
        return rest if dims[dim] == (state.columns,) and fits else None


def _later(state: Scores) -> tuple[float, tuple[Scale, ...]]:
    """By what the scores are multiplied after the step that is read: a number, and tensors."""
    result, scalers = 1.0, []
    for scale in state.scales:
        if isinstance(scale.value, Operand):
            scalers.append(scale)
            continue
        number = float(value(scale.value))  # of a symbolic number: a guard fixes it
        result = result / number if scale.divides else result * number
    return result, tuple(scalers)


def _read_gain(user: fx.Node, weights: fx.Node, dims: Dims) -> Gain | None:
    """weights * x, weights / x, masked_fill(weights, mask, 0)."""
    name, named = base_name(user), arguments(user)
    factor: Any
    kind: Literal["times", "over", "zero"]
    if name == "masked_fill" and named["self"] is weights and value(named["value"]) == 0:
        kind, factor = "zero", named["mask"]
    elif name == "mul" and weights in (named["self"], named["other"]):
        kind, factor = "times", named["other"] if named["self"] is weights else named["self"]
    elif name == "div" and named["self"] is weights and user.kwargs.get("rounding_mode") is None:
        kind, factor = "over", named["other"]
    else:
        return None
    if not is_tensor(factor):
        return Gain(kind, factor)
    own = broadcast(factor, dims)
    if own is None or factor is weights or not agree_in_shape(shape(user), shape(weights)):
        return None
    return Gain(kind, Operand(factor, own))


def _empties_rows(user: fx.Node, weights: fx.Node, tests: list[fx.Node], written: Container[fx.Node]) -> bool:
    """Whether rows of NaN become zeros, as they are in our ops: masked_fill(w, isnan(w), 0), where(isnan(w), 0, w)."""
    if len(tests) != 1 or list(tests[0].users) != [user]:
        return False
    (test,) = tests
    named = arguments(user)
    if base_name(user) == "masked_fill":
        return named["self"] is weights and named["mask"] is test and value(named["value"]) == 0
    if base_name(user) != "where" or named["condition"] is not test or named["other"] is not weights:
        return False
    return _is_zero(named["self"], written)


def _is_zero(x: Any, written: Container[fx.Node]) -> bool:
    """Whether a number, or a tensor that was made so and not written to since, is zero."""
    while is_tensor(x) and is_view(x) and storage_root(x) not in written:
        x = argument(x)
    if is_tensor(x):
        return storage_root(x) not in written and (op_name(x) in ("zeros", "new_zeros")
                                                    or (op_name(x) == "full" and argument(x, 1) == 0))
    return isinstance(x, int | float) and x == 0
