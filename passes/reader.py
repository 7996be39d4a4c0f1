"""Read a tensor of a graph as a function from an index to an expression.

    arange(s)[None, :] <= arange(s)[:, None]    at [q, k]    is    k <= q

Views become index arithmetic, comparisons become relations. A tensor that cannot be read further is a *leaf*: a
function symbol applied to the index it is read at, so the reading is exact whatever it meets. Values are sympy
expressions: integers and sizes as they are, booleans as sympy Booleans (a bool leaf is `leaf(b, k) != 0`), and `Where`
for a choice between numbers.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sparsify.passes.graph import arguments, is_tensor, mutations, same_shape, shape, storage_root, value

Index = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Where:
    """`yes` where the condition holds, else `no`."""

    condition: sympy.Basic
    yes: Any
    no: Any


Value = Any
"""A sympy expression or a Where (sympy carries no types)."""


class WrittenInPlace(Exception):
    """A tensor whose value depends on when it is read."""


class _Leaf(Exception):
    """This node cannot be read further."""


class TensorReader:
    """Reads the tensors of one graph; remembers what it read, and the nodes behind leaf symbols in `leaves`."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.leaves: dict[str, fx.Node] = {}
        self._gm = gm
        self._writes = mutations(gm.graph)
        self._read: dict[tuple[fx.Node, Index], Value] = {}

    def at(self, node: fx.Node, index: Index) -> Value:
        """The element of `node` at `index`. Raises WrittenInPlace."""
        key = (node, index)
        if key not in self._read:
            self._check_writes(node)
            try:
                self._read[key] = self._follow(node, index)
            except _Leaf:
                self._read[key] = self._leaf(node, index)
        return self._read[key]

    def operand(self, x: Any, index: Index) -> Value:
        """An operand, broadcast to the result that is read at `index`."""
        if not is_tensor(x):
            return _number(value(x))
        sizes = shape(x)
        own = index[len(index) - len(sizes):]
        return self.at(x, tuple(_ZERO if _is_one(size) else i for size, i in zip(sizes, own, strict=True)))

    def _follow(self, node: fx.Node, index: Index) -> Value:
        if node.op == "get_attr":
            constant = getattr(self._gm, str(node.target))
            if isinstance(constant, torch.Tensor) and constant.numel() == 1:
                return _number(constant.item())
        if not isinstance(node.target, OpOverload) or not is_tensor(node):
            raise _Leaf
        name = node.target._opname.removesuffix("_") if node.target._schema.is_mutable else node.target._opname
        read = READERS.get(name)
        if read is None:
            raise _Leaf
        return read(self, node, arguments(node), index)

    def _leaf(self, node: fx.Node, index: Index) -> sympy.Basic:
        tensor = value(node)
        self.leaves[node.name] = node
        whole = not tensor.is_floating_point()
        assume = {"integer": True} if whole else {"real": True}
        symbol = sympy.Function(node.name, **assume)(*index) if index else sympy.Symbol(node.name, **assume)
        return sympy.Ne(symbol, 0) if tensor.dtype == torch.bool else symbol

    def _check_writes(self, node: fx.Node) -> None:
        """In-place writes are read in order where each has one reader, the next: then no stale value exists."""
        root = storage_root(node)
        previous = root
        for write in self._writes.get(root, ()):
            if write.args[0] is not previous or len(previous.users) != 1:
                raise WrittenInPlace(f"{root.name} is written to in place by {write.name}")
            previous = write


_ZERO = sympy.Integer(0)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _number(x: Any) -> sympy.Basic:
    """A Python or symbolic number as an expression."""
    if isinstance(x, torch.SymInt | torch.SymBool):
        return x.node.expr
    if isinstance(x, torch.SymFloat) and not free_unbacked_symbols(x):
        x = float(x)  # a number that the model holds, such as a mask's fill: a guard fixes it
    if isinstance(x, bool):
        return sympy.true if x else sympy.false
    if isinstance(x, int):
        return sympy.Integer(x)
    if isinstance(x, float) and not math.isnan(x):
        return {math.inf: sympy.oo, -math.inf: -sympy.oo}.get(x) or sympy.Float(x)
    raise _Leaf


def is_boolean(x: Any) -> bool:
    """Whether an expression is a truth value; to sympy, a Symbol is a Boolean too."""
    return isinstance(x, Boolean) and not isinstance(x, sympy.Expr)


def where(condition: sympy.Basic, yes: Value, no: Value) -> Value:
    """A choice; between truth values, a truth value."""
    if condition == sympy.true or yes == no:
        return yes
    if condition == sympy.false:
        return no
    if is_boolean(yes) and is_boolean(no):
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return Where(condition, yes, no)


def as_condition(x: Value) -> sympy.Basic:
    """A value as a truth value, as `tensor.bool()` does it."""
    if isinstance(x, Where):
        return where(x.condition, as_condition(x.yes), as_condition(x.no))
    return x if is_boolean(x) else sympy.Ne(x, 0)


def _as_number(x: Value) -> Value:
    if is_boolean(x):
        return where(x, sympy.Integer(1), sympy.Integer(0))
    return x


def _lift(function: Callable[..., Any], *xs: Value) -> Value:
    """Apply a function of expressions, choice by choice."""
    for i, x in enumerate(xs):
        if isinstance(x, Where):
            yes, no = (_lift(function, *xs[:i], branch, *xs[i + 1:]) for branch in (x.yes, x.no))
            return where(x.condition, yes, no)
    return function(*xs)


# One function per kind of op: (reader, node, its arguments by name, index) -> value. `_Leaf` where it cannot say.
Arguments = dict[str, Any]


def _cast(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, to = a["self"], value(node).dtype
    x = reader.at(source, index)
    if to == torch.bool:
        return as_condition(x)
    was = value(source).dtype
    if was == torch.bool:
        return _as_number(x)
    if to.itemsize < 4 or (was.is_floating_point and not to.is_floating_point):  # rounds: fine for 0 and -inf only
        return _lift(_require_constant, x)
    return x


def _require_constant(x: sympy.Basic) -> sympy.Basic:
    if not x.is_number:
        raise _Leaf
    return x


def _same_value(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return reader.at(a["self"], index)


def _arange(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    start, step = _number(value(a.get("start", 0))), _number(value(a.get("step", 1)))
    return start + step * index[0]


def _constant(number: Any) -> Callable[..., Value]:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        x = _number(value(a["fill_value"] if number is None else number))
        return as_condition(x) if value(node).dtype == torch.bool else _as_number(x)

    return read


def _scalar_tensor(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _number(value(a["s"]))


def _compare(function: Callable[..., Any]) -> Callable[..., Value]:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        return _lift(function, *(_as_number(reader.operand(x, index)) for x in node.args[:2]))

    return read


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Value]:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        if value(node).dtype == torch.bool or a.get("alpha", 1) != 1:
            raise _Leaf
        return _lift(function, *(_as_number(reader.operand(x, index)) for x in node.args[:2]))

    return read


def _divide(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if a.get("rounding_mode") != "floor" or value(node).dtype.is_floating_point:
        raise _Leaf
    return _lift(FloorDiv, *(_as_number(reader.operand(x, index)) for x in node.args[:2]))


def _floor_divide(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _divide(reader, node, {"rounding_mode": "floor"}, index)


def _negate(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _lift(operator.neg, reader.at(a["self"], index))


def _logic(function: Callable[..., Any]) -> Callable[..., Value]:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        if value(node).dtype != torch.bool:
            raise _Leaf  # bit arithmetic
        operands = [x for x in node.args if isinstance(x, fx.Node | bool)]
        return function(*(as_condition(reader.operand(x, index)) for x in operands))

    return read


def _where(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    condition, yes, no = (reader.operand(a[x], index) for x in ("condition", "self", "other"))
    return where(as_condition(condition), yes, no)


def _masked_fill(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    condition, yes, no = (reader.operand(a[x], index) for x in ("mask", "value", "self"))
    return where(as_condition(condition), yes, no)


def _triangle(compare: Callable[..., Any]) -> Callable[..., Value]:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        keep = compare(index[-1] - index[-2], _number(value(a["diagonal"])))
        outside = sympy.false if value(node).dtype == torch.bool else _ZERO
        return where(keep, reader.at(a["self"], index), outside)

    return read


def _expand(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return reader.operand(a["self"], index)


def _unsqueeze(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    return reader.at(a["self"], index[:dim] + index[dim + 1:])


def _squeeze(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    sizes = shape(a["self"])
    dims = a.get("dim", range(len(sizes)))
    dims = {d % len(sizes) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = iter(index)
    return reader.at(a["self"], tuple(_ZERO if d in dims and _is_one(size) else next(rest)
                                      for d, size in enumerate(sizes)))


def _slice(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    start = _start(a["start"] if a["start"] is not None else 0, shape(a["self"])[dim])
    return reader.at(a["self"], (*index[:dim], start + _number(value(a["step"])) * index[dim], *index[dim + 1:]))


def _select(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    sizes = shape(a["self"])
    dim = a["dim"] % len(sizes)
    return reader.at(a["self"], (*index[:dim], _start(a["index"], sizes[dim]), *index[dim:]))


def _start(given: Any, size: Any) -> sympy.Expr:
    """A position in a dim, counted from its front."""
    position = value(given)
    if statically_known_true(position >= 0):
        return _number(position)
    if statically_known_true(position < 0) and statically_known_true(position + size >= 0):
        return _number(position + size)
    raise _Leaf


def _permute(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    rank = len(index)
    order = list(range(rank))
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    else:
        first, second = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (rank - 2, rank - 1)
        order[first], order[second] = order[second], order[first]
    return reader.at(a["self"], tuple(index[order.index(d)] for d in range(rank)))


def _reshape(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """A reshape that only adds or removes dims of size 1."""
    before, after = shape(a["self"]), shape(node)
    long = [i for i, size in zip(index, after, strict=True) if not _is_one(size)]
    if not same_shape(tuple(s for s in before if not _is_one(s)), tuple(s for s in after if not _is_one(s))):
        raise _Leaf
    rest = iter(long)
    return reader.at(a["self"], tuple(_ZERO if _is_one(size) else next(rest) for size in before))


def _index(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, given = a["self"], a["indices"]
    dims = [d for d, x in enumerate(given) if x is not None]
    if any(value(given[d]).dtype == torch.bool for d in dims) or dims != list(range(dims[0], dims[-1] + 1)):
        raise _Leaf
    rank = max(len(shape(given[d])) for d in dims)
    first = dims[0]
    picked = [reader.operand(given[d], index[first:first + rank]) for d in dims]
    if not all(isinstance(x, sympy.Expr) and x.is_nonnegative for x in picked):
        raise _Leaf  # a negative index counts from the end
    return reader.at(source, (*index[:first], *picked, *index[first + rank:]))


def _pad(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if a.get("mode", "constant") != "constant":
        raise _Leaf
    sizes, inside, position = shape(a["self"]), sympy.true, list(index)
    for i in range(len(a["pad"]) // 2):
        dim = len(index) - 1 - i
        position[dim] = index[dim] - _number(value(a["pad"][2 * i]))
        inside = sympy.And(inside, position[dim] >= 0, position[dim] < _number(sizes[dim]))
    outside = _number(value(a["value"] or 0))
    if value(node).dtype == torch.bool:
        outside = as_condition(outside)
    return where(inside, reader.at(a["self"], tuple(position)), outside)


def _cat(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    ends, end = [], sympy.Integer(0)
    for part in a["tensors"]:
        end = end + _number(shape(part)[dim])
        ends.append(end)
    result: Value | None = None
    for part, start, end in reversed(list(zip(a["tensors"], [_ZERO, *ends], ends, strict=False))):
        element = reader.at(part, (*index[:dim], index[dim] - start, *index[dim + 1:]))
        result = element if result is None else where(index[dim] < end, element, result)
    assert result is not None
    return result


def _diff(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    before = a["prepend"]
    if a["n"] != 1 or a["append"] is not None or (before is not None and not _is_one(shape(before)[dim])):
        raise _Leaf

    def element(x: fx.Node, i: sympy.Expr) -> Value:
        return _as_number(reader.operand(x, (*index[:dim], i, *index[dim + 1:])))

    i = index[dim]
    if before is None:
        return _lift(operator.sub, element(a["self"], i + 1), element(a["self"], i))
    first = _lift(operator.sub, element(a["self"], _ZERO), element(before, _ZERO))
    later = _lift(operator.sub, element(a["self"], i), element(a["self"], i - 1))
    return where(sympy.Eq(i, 0), first, later)


def _cumsum(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """A running sum of the same number; packed-document masks of one document come to that."""
    dim = a["dim"] % len(index)
    x = _as_number(reader.at(a["self"], index))
    if isinstance(x, Where) or index[dim] in x.free_symbols or x.atoms(AppliedUndef):
        raise _Leaf
    return x * (index[dim] + 1)


READERS: Mapping[str, Callable[[TensorReader, fx.Node, Arguments, Index], Value]] = {
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy"), _same_value),
    "arange": _arange,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0)),
    **dict.fromkeys(("full", "new_full", "full_like"), _constant(None)),
    "scalar_tensor": _scalar_tensor,
    **{name: _compare(relation) for names, relation in (
        (("le", "less_equal"), sympy.Le), (("lt", "less"), sympy.Lt), (("ge", "greater_equal"), sympy.Ge),
        (("gt", "greater"), sympy.Gt), (("eq",), sympy.Eq), (("ne", "not_equal"), sympy.Ne)) for name in names},
    "add": _arithmetic(operator.add), "sub": _arithmetic(operator.sub), "mul": _arithmetic(operator.mul),
    "rsub": _arithmetic(lambda x, y: y - x), "remainder": _arithmetic(PythonMod),
    "minimum": _arithmetic(sympy.Min), "maximum": _arithmetic(sympy.Max),
    "div": _divide, "floor_divide": _floor_divide, "neg": _negate,
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _logic(sympy.And)),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), _logic(sympy.Or)),
    **dict.fromkeys(("bitwise_xor", "logical_xor"), _logic(sympy.Xor)),
    **dict.fromkeys(("bitwise_not", "logical_not"), _logic(sympy.Not)),
    "where": _where, "masked_fill": _masked_fill,
    "tril": _triangle(sympy.Le), "triu": _triangle(sympy.Ge),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "slice": _slice, "select": _select,
    **dict.fromkeys(("permute", "transpose", "t", "mT"), _permute),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "index": _index, **dict.fromkeys(("pad", "constant_pad_nd"), _pad), "cat": _cat,
    "diff": _diff, "cumsum": _cumsum,
}
