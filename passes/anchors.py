"""Where attention shows: softmax in all its spellings.

    softmax(s, dim)   _softmax   special_softmax           one node
    exp(log_softmax(s, dim))   exp(s - logsumexp(s))       weights come out of the exponential
    e = exp(s [- max]);  e / sum(e, dim)                   early division
    e = exp(s [- max]);  (e @ v) / sum(e, dim)             late division
    e / (1 + sum(e, dim))                                  softmax plus one: a sink logit of 0
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from sparsify.passes.axes import is_view, op_name
from sparsify.passes.graph import argument, arguments, is_tensor

SOFTMAXES = {"softmax", "_softmax", "special_softmax"}
ANCHORS = {*SOFTMAXES, "exp", "exp_"}
SUMS = {"sum"}


@dataclass(frozen=True)
class Anchor:
    """Weights that are the softmax of `scores` over `dim`.

    inner   nodes of the softmax itself, which may read scores and weights beside the walk
    total   the sum that divides: `weights` already if `divided`, else the product with the values
    sink    one more logit in the sum, or None
    """

    form: Literal["softmax chain", "exp chain"]
    scores: fx.Node
    weights: fx.Node
    dim: int
    inner: frozenset[fx.Node] = frozenset()
    total: fx.Node | None = None
    divided: bool = False
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
    sums = [user for user in exponentials.users if op_name(user) in SUMS and len(arguments(user).get("dim") or ()) == 1]
    if len(sums) != 1:
        return None
    (total,) = sums
    dim, sink, inner = arguments(total)["dim"][0], None, {exponentials, total}
    divisor = total
    if len(total.users) == 1 and op_name(user := next(iter(total.users))) == "add" and argument(user, 1) in (1, 1.0):
        if op_name(scores) == "sub":
            return None  # the maximum that was subtracted is missing in the one that is added
        divisor, sink = user, 0.0
    divisions = [user for user in exponentials.users if op_name(user) in ("div", "div_")
                 and argument(user) is exponentials and source(argument(user, 1), divisor) is divisor]
    weights = divisions[0] if len(divisions) == 1 else exponentials
    return Anchor("exp chain", scores, weights, dim, frozenset(inner), divisor, bool(divisions), sink)


def source(x: Any, until: fx.Node | None = None) -> fx.Node | None:
    """What a tensor shows in another layout."""
    while is_tensor(x) and x is not until and is_view(x):
        x = argument(x)
    return x if is_tensor(x) else None

