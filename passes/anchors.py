"""Where attention shows: softmax in all its spellings.

    softmax(s, dim)   _softmax   special_softmax           one node
    _safe_softmax(s, dim)                                  that of SDPA: a row that sees no key gives zeros
    exp(log_softmax(s, dim))   exp(s - logsumexp(s))       weights come out of the exponential
    e = exp(s [- max]);  e / sum(e, dim)                   early division
    e = exp(s [- max]);  (e @ v) / sum(e, dim)             late division
    e / (c + sum(e, dim))                                  softmax plus one: a sink logit of log(c)
"""

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from sparsify.passes.axes import is_view, op_name
from sparsify.passes.graph import argument, arguments, is_tensor, shape

SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
ANCHORS = {*SOFTMAXES, "exp", "exp_"}
NEGLIGIBLE = 2**-24
"""Against a sum of exponentials that holds exp(0): less than the rounding of float32."""


@dataclass(frozen=True)
class Anchor:
    """Weights that are the softmax of `scores` over `dim`.

    inner   nodes of the softmax itself, which may read scores and weights beside the walk
    total   the sum that divides: the `dividend`, exponentials, into `weights`; without one, the product with the values
    sink    one more logit in the sum, or None
    """

    form: Literal["softmax chain", "exp chain"]
    scores: fx.Node
    weights: fx.Node
    dim: int
    inner: frozenset[fx.Node] = frozenset()
    total: fx.Node | None = None
    dividend: fx.Node | None = None
    sink: float | None = None


def read_anchor(node: fx.Node) -> Anchor | None:
    """The anchor that starts at `node`; None for an exponential that no sum normalises."""
    if op_name(node) in SOFTMAXES:
        return Anchor("softmax chain", argument(node), node, argument(node, 1))
    inside = argument(node)
    if not is_tensor(inside):
        return None
    if op_name(inside) in ("log_softmax", "_log_softmax"):
        return Anchor("exp chain", argument(inside), node, argument(inside, 1), frozenset({inside}))
    if op_name(inside) == "sub" and (lse := source(argument(inside, 1))) is not None and op_name(lse) == "logsumexp":
        dims = arguments(lse)["dim"]
        if argument(lse) is argument(inside) and len(dims) == 1:
            return Anchor("exp chain", inside, node, dims[0])
    return _read_sum(node, inside)


def _read_sum(exponentials: fx.Node, scores: fx.Node) -> Anchor | None:
    sums = [user for user in exponentials.users
            if op_name(user) == "sum" and len(arguments(user).get("dim") or ()) == 1]
    if len(sums) != 1:
        return None
    (total,) = sums
    dim, sink, inner = arguments(total)["dim"][0], None, {exponentials, total}
    divisor = total
    if len(total.users) == 1 and op_name(user := next(iter(total.users))) == "add":
        shifted = _shift_of(scores)
        one: Any = next((x for x in user.args if x is not total), None)
        if isinstance(one, int | float) and one > 0 and user.kwargs.get("alpha", 1) == 1:
            if shifted is None:
                divisor, sink = user, math.log(one)
            elif one <= NEGLIGIBLE and _shifts_by_the_largest(scores, dim):
                divisor = user
        elif shifted is not None and is_tensor(one) and _is_exp_of_minus(one, argument(scores, 1)):
            divisor, sink = user, 0.0
            inner |= {scores, *shifted}
            scores = argument(scores)
    divisions = [user for user in exponentials.users if divided_by(user, exponentials, divisor) is not None]
    if len(divisions) == 1:
        return Anchor("exp chain", scores, divisions[0], dim, frozenset(inner), divisor, exponentials, sink)
    return Anchor("exp chain", scores, exponentials, dim, frozenset(inner), divisor, None, sink)


def _shift_of(node: fx.Node) -> set[fx.Node] | None:
    """The nodes that make the number that is subtracted from every row of scores, None where nothing is subtracted."""
    if op_name(node) != "sub" or not is_tensor(argument(node, 1)):
        return None
    return readers_of(argument(node), argument(node, 1))


def _shifts_by_the_largest(scores: fx.Node, dim: int) -> bool:
    """Whether the maximum over the keys is subtracted: the sum holds a one then."""
    largest = source(argument(scores, 1))
    if largest is not None and largest.target is operator.getitem:
        largest = argument(largest)
    if largest is None or op_name(largest) not in ("amax", "max") or argument(largest) is not argument(scores):
        return False
    over = arguments(largest).get("dim")
    if over is None:
        return False
    rank = len(shape(scores))
    return [d % rank for d in ([over] if isinstance(over, int) else over)] == [dim % rank]


def _is_exp_of_minus(node: fx.Node, number: fx.Node) -> bool:
    """Whether this is the exponential of a logit of 0, shifted like the others."""
    return op_name(node) == "exp" and op_name(minus := argument(node)) == "neg" and argument(minus) is number


def readers_of(scores: fx.Node, reduced: fx.Node) -> set[fx.Node]:
    """The nodes that lead from the scores to a number a row; none where something else is read on the way."""
    found: set[fx.Node] = set()
    node = reduced
    while True:
        found.add(node)
        if scores in node.all_input_nodes:
            return found
        if len(node.all_input_nodes) != 1:
            return set()
        (node,) = node.all_input_nodes


def divided_by(node: fx.Node, dividend: fx.Node, total: fx.Node) -> list[fx.Node] | None:
    """Whether `node` is dividend / total or dividend * (1 / total): the views of the total on the way, last first."""
    name = op_name(node).removesuffix("_")
    if name not in ("div", "mul") or dividend not in node.args or node.kwargs.get("rounding_mode") is not None:
        return None
    if name == "div" and argument(node) is not dividend:
        return None
    factor: Any = argument(node, 1) if argument(node) is dividend else argument(node)
    inverse, views = name == "mul", []
    while factor is not total:
        if not is_tensor(factor):
            return None
        if is_view(factor):
            views.append(factor)
        elif op_name(factor) == "reciprocal" and inverse:
            inverse = False
        elif op_name(factor) != "mul" or argument(factor, 1) != 1:  # 1 / x is x.reciprocal() * 1
            return None
        factor = argument(factor)
    return None if inverse else views


def source(x: Any) -> fx.Node | None:
    """What a tensor shows in another layout."""
    while is_tensor(x) and is_view(x):
        x = argument(x)
    return x if is_tensor(x) else None

