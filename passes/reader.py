"""Read a tensor of a graph as a function from an index to an expression.

    arange(s)[None, :] <= arange(s)[:, None]    at [q, k]    is    k <= q

Views become index arithmetic, comparisons become relations. A tensor that cannot be read further is a *leaf*: a
function symbol applied to the index it is read at, so the reading is exact whatever it meets. Values are sympy
expressions: integers and sizes as they are, booleans as sympy Booleans (a bool leaf is `leaf(b, k) != 0`), and `Where`
for a choice between numbers. Whole numbers are exact, in floating point too while it can count that far; arithmetic on
other numbers is never compared, since sympy rounds nothing.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min, PythonMod

from sparsify.passes.buffers import Buffer, Ramp, Reading, Same
from sparsify.passes.graph import agree, arguments, aten, is_tensor, mutations, same, shape, storage_root, value
from sparsify.passes.site import BATCH, HEAD, KEY, QUERY

Index = tuple[sympy.Expr, ...]
Limits = Mapping[sympy.Symbol, sympy.Expr]
"""The sizes of the index symbols: each runs from 0 to its size - 1."""

MAX_DEPTH = 200
"""Ops read through before a tensor counts as a leaf. Masks are a few dozen deep, activations as deep as the model."""
MAX_CHOICES = 64
"""Branches of nested choices before a tensor counts as a leaf."""


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
    """Reads the tensors of one graph; remembers what it read, and the nodes behind leaf symbols in `leaves`.

    `buffers` are inputs whose values may be read; `read_buffers` are those that were, with what was read.
    """

    def __init__(self, gm: fx.GraphModule, buffers: Mapping[fx.Node, Buffer] | None = None) -> None:
        self.leaves: dict[str, fx.Node] = {}
        self.read_buffers: dict[Buffer, Reading] = {}
        self.shape_env = _shape_env(gm.graph)
        self.module = gm
        self._buffers = buffers or {}
        self._writes = mutations(gm.graph)
        self._order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._equal = _equal_nodes(gm.graph, self._writes)
        self._limits: Limits = {}
        self._reads: dict[Any, dict[tuple[fx.Node, Index], Value]] = {}
        self._depth = 0

    def within(self, limits: Limits) -> None:
        """Read from now on for indices of these sizes."""
        self._limits = limits
        self._read = self._reads.setdefault(tuple(limits.items()), {})

    def first(self, node: Any) -> Any:
        """The first node of the graph that computes the same: layers build the same mask again and again."""
        return self._equal.get(node, node) if isinstance(node, fx.Node) else node

    def at(self, node: fx.Node, index: Index) -> Value:
        """The element of `node` at `index`. Raises WrittenInPlace."""
        key = (self.first(node), index)
        if key not in self._read:
            self._check_writes(node)
            self._depth += 1
            try:
                self._read[key] = self._follow(*key)
            except (_Leaf, WrittenInPlace):  # what was computed from a tensor stays when that is written to
                self._read[key] = self.leaf(*key)
            finally:
                self._depth -= 1
        return self._read[key]

    def operand(self, x: Any, index: Index) -> Value:
        """An operand, broadcast to the result that is read at `index`."""
        if not is_tensor(x):
            return _number(value(x))
        return self.at(x, _broadcast(x, index))

    def constant(self, x: Any) -> Value | None:
        """A number, or the only element of a tensor; None where it has no value yet."""
        try:
            return self.at(x, (_ZERO,) * len(shape(x))) if is_tensor(x) else _number(value(x))
        except (_Leaf, WrittenInPlace):
            return None

    def leaf(self, node: fx.Node, index: Index) -> sympy.Basic:
        """An element by its name. Raises WrittenInPlace where the tensor is written to later."""
        last = self._writes.get(storage_root(node), (node,))[-1]
        if self._order[node] < self._order[last]:
            raise WrittenInPlace(f"{node.name} is written to in place by {last.name}")
        tensor = value(node)
        self.leaves[node.name] = node
        whole = not tensor.is_floating_point()
        assume = {"integer": True} if whole else {"real": True}
        symbol = sympy.Function(node.name, **assume)(*index) if index else sympy.Symbol(node.name, **assume)
        return sympy.Ne(symbol, 0) if tensor.dtype == torch.bool else symbol

    def positions_of(self, ids: AppliedUndef) -> Value | None:
        """The positions whose runs these ids number: p where ids is cumsum(diff(p) != 1). Between two elements of one
        run, p grows as the index does."""
        node = self.leaves[ids.func.__name__]
        if node.target is not aten.cumsum.default or arguments(node)["dim"] % len(ids.args) != len(ids.args) - 1:
            return None
        breaks = arguments(node)["self"]
        while breaks.target in (aten.to.dtype, aten._to_copy.default):
            breaks = arguments(breaks)["self"]
        if breaks.target is not aten.ne.Scalar or arguments(breaks)["other"] != 1:
            return None
        steps = arguments(breaks)["self"]
        if steps.target is not aten.diff.default:
            return None
        a = arguments(steps)
        if (a["n"] != 1 or a["dim"] % len(ids.args) != len(ids.args) - 1 or a["append"] is not None
                or a["prepend"] is None or not _is_one(shape(a["prepend"])[-1])):
            return None
        return self.at(a["self"], ids.args)

    def is_flag(self, leaf: AppliedUndef) -> bool:
        """Whether a leaf is an element of a bool tensor: 0 or 1."""
        return bool(value(self.leaves[leaf.func.__name__]).dtype == torch.bool)

    def is_stale(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether `node`, read anew at `reader`, may hold something else than when its users before that read it."""
        root = storage_root(node)
        reads = [self._order[user] for user in node.users
                 if self._order[user] <= self._order[reader] and storage_root(user) is not root]
        earliest = min(reads, default=self._order[node])
        return any(earliest < self._order[write] < self._order[reader] for write in self._writes.get(root, ()))

    def is_nonpositive(self, x: sympy.Expr) -> bool:
        """Whether an expression over index symbols and sizes is <= 0 wherever it is read, at every size."""
        worst = sympy.expand(x)
        for symbol, size in self._limits.items():
            slope = worst.coeff(symbol)
            worst = worst - slope * symbol
            if slope.is_positive or (not slope.is_nonpositive and self._bounds(slope)[0] >= 0):
                worst = sympy.expand(worst + slope * (size - 1))
            elif not slope.is_nonpositive:
                return False
        if worst.free_symbols & self._limits.keys():
            return False
        if self._bounds(worst)[1] <= 0:
            return True
        # What guards say beyond ranges: a length that was held to 1.
        return (self._is_size(worst) and self.shape_env is not None
                and self.shape_env._maybe_evaluate_static(worst <= 0) == sympy.true)

    def is_nonnegative(self, x: Value) -> bool:
        if not isinstance(x, sympy.Expr):
            return False
        if isinstance(x, FloorDiv | PythonMod) and x.args[1].is_positive:
            return isinstance(x, PythonMod) or self.is_nonnegative(x.args[0])
        return bool(x.is_nonnegative) or self.is_nonpositive(-x)

    def divide(self, x: sympy.Expr, n: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """x // n and x % n of whole numbers."""
        multiples, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(x)):
            if (term / n).is_integer and (term / n).as_numer_denom()[1] == 1:
                multiples += term / n
            else:
                rest += term
        if rest == 0 or (self.is_nonnegative(rest) and self.is_nonpositive(rest - n + 1)):
            return multiples, rest
        return multiples + FloorDiv(rest, n), PythonMod(rest, n)

    def _bounds(self, x: sympy.Expr) -> tuple[Any, Any]:
        if x.is_number:
            return x, x
        if self.shape_env is None or not self._is_size(x):
            return -sympy.oo, sympy.oo
        bounds = self.shape_env.bound_sympy(x)
        return bounds.lower, bounds.upper

    def _is_size(self, x: sympy.Expr) -> bool:
        known = self.shape_env.var_to_range if self.shape_env is not None else {}
        return not x.atoms(AppliedUndef) and x.free_symbols <= known.keys()

    def _follow(self, node: fx.Node, index: Index) -> Value:
        if self._depth > MAX_DEPTH:
            raise _Leaf
        if node in self._buffers:
            return self._buffer(node, index)
        if not isinstance(node.target, OpOverload) or not is_tensor(node):
            raise _Leaf
        name = node.target._opname.removesuffix("_") if node.target._schema.is_mutable else node.target._opname
        read = READERS.get(name)
        if read is None:
            raise _Leaf
        return read(self, node, arguments(node), index)

    def _buffer(self, node: fx.Node, index: Index) -> Value:
        buffer = self._buffers[node]
        reading = buffer.reading
        if reading is None or node in self._writes:
            raise _Leaf
        self.read_buffers[buffer] = reading
        return _reading(reading, index)

    def _check_writes(self, node: fx.Node) -> None:
        """In-place writes are read in order where each has one reader, the next: then no stale value exists."""
        root = storage_root(node)
        previous = root
        for write in self._writes.get(root, ()):
            if write.args[0] is not previous or len(previous.users) != 1:
                raise WrittenInPlace(f"{root.name} is written to in place by {write.name}")
            previous = write


def _shape_env(graph: fx.Graph) -> ShapeEnv | None:
    values = (node.meta.get("val") for node in graph.nodes)
    sizes = (size for x in values for size in (x.shape if isinstance(x, torch.Tensor) else (x,)))
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def _equal_nodes(graph: fx.Graph, writes: Mapping[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """The first node of those that compute the same: same op, same arguments, no randomness, nothing written to."""
    first: dict[Any, fx.Node] = {}
    equal: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        key: Any = None
        held = node.meta.get("val")
        if node.op == "call_function" and isinstance(held, torch.SymInt):
            key = held.node.expr
        elif (isinstance(node.target, OpOverload) and is_tensor(node) and not node.target._schema.is_mutable
              and torch.Tag.nondeterministic_seeded not in node.target.tags
              and not any(storage_root(x) in writes for x in (node, *node.all_input_nodes))):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: equal.get(n, n))
            key = (node.target, _hashable(args), _hashable(dict(kwargs)), held.dtype)
        try:
            equal[node] = node if key is None else first.setdefault(key, node)
        except TypeError:  # an argument that cannot be hashed
            equal[node] = node
    return equal


def _hashable(x: Any) -> Any:
    """Arguments as a key; 1, 1.0 and True are not the same."""
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(x.items()))
    if isinstance(x, list | tuple):
        return tuple(_hashable(v) for v in x)
    return (type(x), x)


_ZERO = sympy.Integer(0)
_EXACT_FLOATS = 2**53


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _broadcast(node: fx.Node, index: Index) -> Index:
    """The index of an operand of the result that is read at `index`."""
    sizes = shape(node)
    own = index[len(index) - len(sizes):]
    return tuple(_ZERO if _is_one(size) else i for size, i in zip(sizes, own, strict=True))


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
        if abs(x) <= _EXACT_FLOATS and x.is_integer():
            return sympy.Integer(int(x))
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


def branches(x: Value) -> Iterator[sympy.Basic]:
    """Everything that a value may be."""
    if isinstance(x, Where):
        yield from branches(x.yes)
        yield from branches(x.no)
    else:
        yield x


def as_condition(x: Value) -> sympy.Basic:
    """A value as a truth value, as `tensor.bool()` does it."""
    if isinstance(x, Where):
        return where(x.condition, as_condition(x.yes), as_condition(x.no))
    return x if is_boolean(x) else _relation(sympy.Ne, x, _ZERO)


def as_number(x: Value) -> Value:
    """A value as a number, as arithmetic takes it."""
    if is_boolean(x):
        return where(x, sympy.Integer(1), sympy.Integer(0))
    return x


def _lift(function: Callable[..., Any], *xs: Value) -> Value:
    """Apply a function of expressions, choice by choice."""
    if math.prod(sum(1 for _ in branches(x)) for x in xs) > MAX_CHOICES:
        raise _Leaf
    return _lift_all(function, *xs)


def _lift_all(function: Callable[..., Any], *xs: Value) -> Value:
    for i, x in enumerate(xs):
        if isinstance(x, Where):
            yes, no = (_lift_all(function, *xs[:i], branch, *xs[i + 1:]) for branch in (x.yes, x.no))
            return where(x.condition, yes, no)
    return function(*xs)


def _relation(kind: Any, left: sympy.Expr, right: sympy.Expr) -> sympy.Basic:
    """A comparison. Of a distance, a minimum or a maximum it becomes comparisons of their arguments."""
    difference = left - right
    if kind in (sympy.Eq, sympy.Ne):
        if right == 0 and isinstance(left, sympy.Mul) and left.is_integer:
            join = sympy.Or if kind is sympy.Eq else sympy.And
            return join(*(kind(factor, 0) for factor in left.args))
        return kind(left, right)
    choices = [x for x in sympy.Add.make_args(difference)
               if isinstance(x.as_coeff_Mul()[1], _CHOICES) and not x.is_number]
    if len(choices) != 1 or not _is_indexed(choices[0]):
        return kind(left, right)
    rest = difference - choices[0]
    coefficient, choice = choices[0].as_coeff_Mul()
    options = (choice.args[0], -choice.args[0]) if isinstance(choice, sympy.Abs) else choice.args
    takes_largest = isinstance(choice, sympy.Abs | sympy.Max | Max) == bool(coefficient > 0)
    below = kind in (sympy.Le, sympy.Lt)
    join = sympy.And if takes_largest == below else sympy.Or
    return join(*(_relation(kind, coefficient * option + rest, _ZERO) for option in options))


_CHOICES = (sympy.Abs, sympy.Min, sympy.Max, Min, Max)


def _is_indexed(x: sympy.Basic) -> bool:
    """Whether an expression has an index symbol or a leaf; a maximum of sizes is a size."""
    return bool(x.atoms(AppliedUndef) or x.free_symbols & {BATCH, HEAD, QUERY, KEY})


def _reading(reading: Reading, index: Index) -> Value:
    """A buffer's values at an index."""
    if isinstance(reading, Same):
        return _number(reading.value)
    if isinstance(reading, Ramp):
        return _number(reading.start) + _number(reading.step) * index[reading.dim]
    diagonal = index[reading.columns] - index[reading.rows]
    inside = [diagonal >= reading.low] if reading.low is not None else []
    inside += [diagonal <= reading.high] if reading.high is not None else []
    return where(sympy.And(*inside), _number(reading.inside), _number(reading.outside))


# One function per kind of op: (reader, node, its arguments by name, index) -> value. `_Leaf` where it cannot say.
Arguments = dict[str, Any]
Reader = Callable[[TensorReader, fx.Node, Arguments, Index], Value]


def _stored(reader: TensorReader, node: fx.Node, index: Index, x: Value) -> Value:
    """A computed value as the node's dtype holds it: where a narrow one would round or wrap, its element by name."""
    dtype = value(node).dtype
    if dtype.itemsize >= 4 or dtype == torch.bool:
        return x

    def held(branch: sympy.Basic) -> Any:
        if branch.is_number and (dtype.is_floating_point or torch.iinfo(dtype).min <= branch <= torch.iinfo(dtype).max):
            return branch
        return reader.leaf(node, index)

    return _lift(held, x)


def _cast(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, to = a["self"], value(node).dtype
    x = reader.at(source, index)
    was = value(source).dtype
    if to == was:
        return x
    if to == torch.bool:
        return as_condition(x)
    x = as_number(x)
    if not to.is_floating_point and not all(branch.is_integer for branch in branches(x)):
        x = _lift(lambda branch: _truncated(reader, branch), x)
    return _stored(reader, node, index, x)


def _truncated(reader: TensorReader, x: sympy.Expr) -> sympy.Expr:
    """A number as a cast to integers leaves it."""
    if x.is_number and x.is_finite:
        return sympy.Integer(int(x))
    if reader.is_nonnegative(x):
        return _floored(x)
    raise _Leaf


def _floored(x: sympy.Expr) -> sympy.Expr:
    """The floor of a quotient of whole numbers. Floating point gets it right: a quotient that is not whole is further
    from a whole number than it rounds, below 2**23."""
    if x.is_integer:
        return x
    numerator, denominator = sympy.together(x).as_numer_denom()
    if not (numerator.is_integer and denominator.is_Integer):
        raise _Leaf
    return FloorDiv(numerator, denominator)


def _floor(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _lift(_floored, reader.at(a["self"], index))


def _same_value(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return reader.at(a["self"], index)


def _lifted_constant(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """A copy of a tensor that the user's code spells out; attributes of the graph read otherwise may change."""
    if a["self"].op == "get_attr":
        constant = getattr(reader.module, str(a["self"].target))
        if isinstance(constant, torch.Tensor) and constant.numel() == 1:
            return _number(constant.item())
    return reader.at(a["self"], index)


def _arange(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    start, step = _number(value(a.get("start", 0))), _number(value(a.get("step", 1)))
    return _stored(reader, node, index, start + step * index[0])


def _constant(number: Any) -> Reader:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        x = _number(value(a["fill_value"] if number is None else number))
        return as_condition(x) if value(node).dtype == torch.bool else as_number(x)

    return read


def _fill(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    x = reader.operand(a["value"], index)
    return as_condition(x) if value(node).dtype == torch.bool else as_number(x)


def _copied(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if value(node).dtype != value(a["src"]).dtype:
        raise _Leaf
    return reader.operand(a["src"], index)


def _scalar_tensor(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _number(value(a["s"]))


def _eye(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    diagonal = sympy.Eq(index[0], index[1])
    return diagonal if value(node).dtype == torch.bool else as_number(diagonal)


def _compare(kind: Any) -> Reader:
    def compare(left: sympy.Expr, right: sympy.Expr) -> sympy.Basic:
        if not (_is_exact(left) and _is_exact(right)):
            raise _Leaf
        return _relation(kind, left, right)

    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        operands = [reader.operand(x, index) for x in node.args[:2]]
        if kind in (sympy.Eq, sympy.Ne):
            operands = [_unchosen(reader, x, y, index) for x, y in zip(node.args, operands, strict=False)]
        return _lift(compare, *map(as_number, operands))

    return read


def _unchosen(reader: TensorReader, node: Any, x: Value, index: Index) -> Value:
    """An operand of an equality as one element, where it is a choice between elements: equal ids are a document."""
    if isinstance(x, sympy.Ne) and isinstance(x.lhs, AppliedUndef) and x.rhs == 0 and reader.is_flag(x.lhs):
        return x.lhs
    if not isinstance(x, Where) or all(branch.is_number for branch in branches(x)):
        return x
    return reader.leaf(reader.first(node), _broadcast(node, index))


def _is_exact(x: sympy.Expr) -> bool:
    """Whether sympy's value of an expression is torch's: whole numbers and elements as they are."""
    if x.is_number or x.is_integer or isinstance(x, AppliedUndef | sympy.Symbol):
        return x is not sympy.nan
    return bool((sympy.together(x).as_numer_denom()[0]).is_integer) and not x.atoms(sympy.Float)


def _arithmetic(function: Callable[..., Any], on_booleans: Any = None) -> Reader:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        operands = [reader.operand(x, index) for x in node.args[:2]]
        if value(node).dtype == torch.bool:
            if on_booleans is None:
                raise _Leaf
            return on_booleans(*map(as_condition, operands))
        left, right = map(as_number, operands)
        alpha = _number(value(a.get("alpha", 1)))
        if alpha != 1:
            right = _lift(lambda x: x * alpha, right)
        return _stored(reader, node, index, _lift(function, left, right))

    return read


def _divide(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    mode = a.get("rounding_mode")

    def divide(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if mode is None and y.is_number and y != 0:
            return x / y
        if not (x.is_integer and y.is_integer and y.is_positive):
            raise _Leaf
        if mode == "floor" or (mode == "trunc" and reader.is_nonnegative(x)):
            return reader.divide(x, y)[0]
        raise _Leaf

    x, y = (as_number(reader.operand(x, index)) for x in node.args[:2])
    return _stored(reader, node, index, _lift(divide, x, y))


def _floor_divide(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _divide(reader, node, {"rounding_mode": "floor"}, index)


def _remainder(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    def remainder(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        if not (x.is_integer and y.is_integer and y.is_positive):
            raise _Leaf
        return reader.divide(x, y)[1]

    x, y = (as_number(reader.operand(x, index)) for x in node.args[:2])
    return _stored(reader, node, index, _lift(remainder, x, y))


def _function(function: Callable[..., Any]) -> Reader:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        return _stored(reader, node, index, _lift(function, as_number(reader.at(a["self"], index))))

    return read


def _clamp(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    x = as_number(reader.at(a["self"], index))
    for name, function in (("min", sympy.Max), ("max", sympy.Min)):
        if a.get(name) is not None:
            x = _lift(function, x, as_number(reader.operand(a[name], index)))
    return _stored(reader, node, index, x)


def _logarithm(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """Of a mask of ones and zeros: 0 and -inf."""
    def logarithm(x: sympy.Expr) -> sympy.Expr:
        if x not in (0, 1):
            raise _Leaf
        return _ZERO if x == 1 else -sympy.oo

    return _lift(logarithm, as_number(reader.at(a["self"], index)))


def _logic(function: Callable[..., Any]) -> Reader:
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
    return where(as_condition(condition), as_condition(yes) if value(node).dtype == torch.bool else yes, no)


def _triangle(compare: Callable[..., Any]) -> Reader:
    def read(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
        keep = compare(index[-1] - index[-2], _number(value(a["diagonal"])))
        outside = sympy.false if value(node).dtype == torch.bool else _ZERO
        return where(keep, reader.at(a["self"], index), outside)

    return read


def _expand(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return reader.operand(a["self"], index)


def _repeat(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    sizes = shape(a["self"])
    own = index[len(index) - len(sizes):]
    before, after = map(_sizes, (sizes, shape(node)[len(index) - len(sizes):]))
    return reader.at(a["self"], tuple(i if size == repeated else reader.divide(i, size)[1]
                                      for i, size, repeated in zip(own, before, after, strict=True)))


def _repeat_interleave(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if a["dim"] is None:
        raise _Leaf
    dim = a["dim"] % len(index)
    position = reader.divide(index[dim], _number(value(a["repeats"])))[0]
    return reader.at(a["self"], (*index[:dim], position, *index[dim + 1:]))


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
    dim, step = a["dim"] % len(index), _number(value(a["step"]))
    size, kept = shape(a["self"])[dim], shape(node)[dim]
    start, end = (value(x) for x in (0 if a["start"] is None else a["start"], a["end"]))
    if same(size, kept):
        first: sympy.Expr = _ZERO
    elif end is not None and statically_known_true(end >= 0) and same(kept, end - start):
        first = _number(start)  # were it negative, fewer would be kept
    else:
        first = _start(start, size)
    return reader.at(a["self"], (*index[:dim], first + step * index[dim], *index[dim + 1:]))


def _narrow(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    start = _start(a["start"], shape(a["self"])[dim])
    return reader.at(a["self"], (*index[:dim], start + index[dim], *index[dim + 1:]))


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
    elif rank > 1:
        first, second = ((a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else
                         (a["axis0"] % rank, a["axis1"] % rank) if "axis0" in a else (rank - 2, rank - 1))
        order[first], order[second] = order[second], order[first]
    return reader.at(a["self"], tuple(index[order.index(d)] for d in range(rank)))


def _movedim(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    rank = len(index)
    sources, targets = ([d % rank for d in ([a[x]] if isinstance(a[x], int) else a[x])]
                        for x in ("source", "destination"))
    rest = iter(d for d in range(rank) if d not in sources)
    order = [sources[targets.index(d)] if d in targets else next(rest) for d in range(rank)]
    return reader.at(a["self"], tuple(index[order.index(d)] for d in range(rank)))


def _reshape(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """Dims are taken apart and put together group by group; a group that is one dim on both sides just passes."""
    _agree_on_dims(shape(a["self"]), shape(node))
    before, after = _sizes(shape(a["self"])), _sizes(shape(node))
    position: list[sympy.Expr] = [_ZERO] * len(before)
    for ins, outs in _groups(before, after):
        if len(ins) == len(outs) == 1:
            position[ins[0]] = index[outs[0]]
            continue
        flat: sympy.Expr = _ZERO
        for d in outs:
            flat = flat * after[d] + index[d]
        for d in reversed(ins[1:]):
            flat, position[d] = reader.divide(flat, before[d])
        position[ins[0]] = flat
    return reader.at(a["self"], tuple(position))


def _agree_on_dims(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Hold the dims of a reshape that changes nothing to that: `mask.view(batch, -1)` of a mask of the same batch."""
    pairs = [[x for x in sizes if not _is_one(x)] for sizes in (before, after)]
    hints = [[x.node.hint if isinstance(x, torch.SymInt) else x for x in sizes] for sizes in pairs]
    if None not in hints[0] and hints[0] == hints[1]:
        for x, y in zip(*pairs, strict=True):
            agree(x, y)


def _groups(before: list[sympy.Expr], after: list[sympy.Expr]) -> Iterator[tuple[list[int], list[int]]]:
    """The dims of a reshape that hold the same elements, dims of size 1 left out: [6, 4] -> [2, 3, 4] is two groups."""
    if 0 in before:
        raise _Leaf
    ins, outs = ([d for d, size in enumerate(sizes) if size != 1] for sizes in (before, after))
    while ins and outs:
        i, o = 1, 1
        while True:
            quotient = math.prod(before[d] for d in ins[:i]) / math.prod(after[d] for d in outs[:o])
            if quotient == 1:
                break
            # Take the shorter side on; where symbols do not tell, all that is left is one group.
            if quotient.as_numer_denom()[0] == 1 and i < len(ins):
                i += 1
            elif quotient.as_numer_denom()[1] == 1 and o < len(outs):
                o += 1
            else:
                i, o = len(ins), len(outs)
                break
        yield ins[:i], outs[:o]
        ins, outs = ins[i:], outs[o:]
    if ins or outs:
        raise _Leaf


def _sizes(sizes: tuple[Any, ...]) -> list[sympy.Expr]:
    return [sympy.sympify(_number(size)) for size in sizes]


def _index(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, given = a["self"], a["indices"]
    dims = [d for d, x in enumerate(given) if x is not None]
    if any(value(given[d]).dtype == torch.bool for d in dims) or dims != list(range(dims[0], dims[-1] + 1)):
        raise _Leaf
    rank = max(len(shape(given[d])) for d in dims)
    first = dims[0]
    picked = [_picked(reader, reader.operand(given[d], index[first:first + rank])) for d in dims]
    return reader.at(source, (*index[:first], *picked, *index[first + rank:]))


def _index_select(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    picked = _picked(reader, reader.operand(a["index"], index[dim:dim + 1]))
    return reader.at(a["self"], (*index[:dim], picked, *index[dim + 1:]))


def _gather(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    picked = _picked(reader, reader.at(a["index"], index))
    return reader.at(a["self"], (*index[:dim], picked, *index[dim + 1:]))


def _picked(reader: TensorReader, x: Value) -> sympy.Expr:
    """A position taken from a tensor; a negative one would count from the end."""
    if not reader.is_nonnegative(x):
        raise _Leaf
    return x


def _flip(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dims = {d % len(index) for d in a["dims"]}
    sizes = _sizes(shape(node))
    return reader.at(a["self"], tuple(sizes[d] - 1 - i if d in dims else i for d, i in enumerate(index)))


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


def _stack(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    position, rest = index[dim], (*index[:dim], *index[dim + 1:])
    *others, last = a["tensors"]
    result = reader.at(last, rest)
    for i, part in reversed(list(enumerate(others))):
        result = where(sympy.Eq(position, i), reader.at(part, rest), result)
    return result


def _diff(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = a["dim"] % len(index)
    before = a["prepend"]
    if (a["n"] != 1 or a["append"] is not None or (before is not None and not _is_one(shape(before)[dim]))
            or value(node).dtype.itemsize < 4):
        raise _Leaf

    def element(x: fx.Node, i: sympy.Expr) -> Value:
        return as_number(reader.operand(x, (*index[:dim], i, *index[dim + 1:])))

    i = index[dim]
    if before is None:
        return _lift(operator.sub, element(a["self"], i + 1), element(a["self"], i))
    first = _lift(operator.sub, element(a["self"], _ZERO), element(before, _ZERO))
    later = _lift(operator.sub, element(a["self"], i), element(a["self"], i - 1))
    return where(sympy.Eq(i, 0), first, later)


def _cumsum(reader: TensorReader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """A running sum of the same number; packed-document masks of one document come to that."""
    dim = a["dim"] % len(index)
    x = as_number(reader.at(a["self"], index))
    if isinstance(x, Where) or index[dim].free_symbols & x.free_symbols or x.atoms(AppliedUndef) or not x.is_integer:
        raise _Leaf
    return _stored(reader, node, index, x * (index[dim] + 1))


def _named(names: str, reader: Reader) -> dict[str, Reader]:
    return dict.fromkeys(names.split(), reader)


READERS: Mapping[str, Reader] = {
    **_named("to _to_copy type_as", _cast),
    **_named("clone contiguous alias detach positive", _same_value),
    **_named("lift_fresh lift_fresh_copy", _lifted_constant),
    "arange": _arange, "scalar_tensor": _scalar_tensor, "eye": _eye, "fill": _fill, "copy": _copied,
    **_named("ones new_ones ones_like", _constant(1)),
    **_named("zeros new_zeros zeros_like zero", _constant(0)),
    **_named("full new_full full_like", _constant(None)),
    **_named("le less_equal", _compare(sympy.Le)), **_named("lt less", _compare(sympy.Lt)),
    **_named("ge greater_equal", _compare(sympy.Ge)), **_named("gt greater", _compare(sympy.Gt)),
    "eq": _compare(sympy.Eq), **_named("ne not_equal", _compare(sympy.Ne)),
    "add": _arithmetic(operator.add, sympy.Or),
    **_named("sub subtract", _arithmetic(operator.sub)),
    **_named("mul multiply", _arithmetic(operator.mul, sympy.And)),
    "rsub": _arithmetic(lambda x, y: y - x),
    "minimum": _arithmetic(sympy.Min, sympy.And), "maximum": _arithmetic(sympy.Max, sympy.Or),
    **_named("div divide true_divide", _divide), "floor_divide": _floor_divide, "remainder": _remainder,
    "floor": _floor, **_named("neg negative", _function(operator.neg)), **_named("abs absolute", _function(sympy.Abs)),
    **_named("clamp clip clamp_min clamp_max", _clamp), "log": _logarithm,
    **_named("__and__ bitwise_and logical_and", _logic(sympy.And)),
    **_named("__or__ bitwise_or logical_or", _logic(sympy.Or)),
    **_named("__xor__ bitwise_xor logical_xor", _logic(sympy.Xor)),
    **_named("bitwise_not logical_not", _logic(sympy.Not)),
    "where": _where, "masked_fill": _masked_fill,
    "tril": _triangle(sympy.Le), "triu": _triangle(sympy.Ge),
    **_named("expand expand_as broadcast_to", _expand),
    **_named("repeat tile", _repeat), "repeat_interleave": _repeat_interleave,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "slice": _slice, "narrow": _narrow, "select": _select,
    **_named("permute transpose swapaxes swapdims t mT numpy_T", _permute), **_named("movedim moveaxis", _movedim),
    **_named("view reshape _unsafe_view flatten unflatten view_as reshape_as", _reshape),
    "index": _index, "index_select": _index_select, "gather": _gather, "flip": _flip,
    **_named("pad constant_pad_nd", _pad), **_named("cat concat", _cat), "stack": _stack,
    "diff": _diff, "cumsum": _cumsum,
}
