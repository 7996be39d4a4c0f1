"""Axes: what the dims of a tensor mean, whatever its layout.

    scores = q.reshape(B*H, L, D) @ k.reshape(B*H, S, D).mT       dims ((b, h), (l,), (s,))
    scores.view(B, H, L, S)                                       dims ((b,), (h,), (l,), (s,))

An `Axis` is one index, by identity. The dims of a tensor name the axes that make up each dim, major first; a dim of
size 1 has none. A reshape regroups axes, and cuts one where a dim ends inside it; a permutation moves dims; a broadcast
drops axes on the way up, so a tensor that does not vary along an axis does not have it. Grouped heads, folded batches
and length-first layouts are then no cases of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sparsify.passes.graph import (
    agree,
    argument,
    arguments,
    expression,
    is_inert_dropout,
    same,
    same_shape,
    shape,
    value,
)

Size = Any
"""An int or a SymInt."""


class Axis:
    """One index of a site. A reshape that cuts it gives it `parts`, major first."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] = ()


Group = tuple[Axis, ...]
Dims = tuple[Group, ...]

RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
PERMUTATIONS = {"transpose", "permute", "t", "mT", "numpy_T", "adjoint", "swapaxes", "swapdims", "movedim", "moveaxis"}
EXPANSIONS = {"expand", "expand_as", "broadcast_to"}
COPIES = {"contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "detach"}
CASTS = {"to", "_to_copy", "type_as"}
DTYPES = {torch.float16, torch.bfloat16, torch.float32}
"""What attention may run in: what the ops take."""
PRECISE = DTYPES | {torch.float64}
"""What scores and weights may be cast to on the way. Anything else (float8, whole numbers) is quantisation."""
VIEWS = RESHAPES | PERMUTATIONS | EXPANSIONS | COPIES | CASTS


def is_view(node: fx.Node) -> bool:
    """Whether `node` shows all of one tensor, in another layout or dtype."""
    name = op_name(node)
    return name in VIEWS or (name == "slice" and same_shape(shape(node), shape(argument(node))))


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def fresh(sizes: Iterable[Size]) -> Dims:
    """New axes for the dims of a tensor."""
    return tuple(() if is_one(size) else (Axis(size),) for size in sizes)


def leaves(group: Iterable[Axis]) -> Group:
    """The axes as far as they are cut."""
    return tuple(leaf for axis in group for leaf in (leaves(axis.parts) if axis.parts else (axis,)))


def resolve(dims: Dims) -> Dims:
    """Dims in terms of uncut axes."""
    return tuple(leaves(group) for group in dims)


def flat(dims: Dims) -> Group:
    """All axes of a tensor, major first."""
    return tuple(axis for group in dims for axis in leaves(group))


def extent(group: Iterable[Axis]) -> Size:
    """The product of the sizes."""
    total: Size = 1
    for axis in group:
        total = total * axis.size
    return total


def regroup(group: Iterable[Axis], sizes: Sequence[Size]) -> Dims | None:
    """The axes as dims of these sizes, cut where a dim ends inside one; None where the sizes do not say how.

    Sizes that are known to be equal decide; else those that are equal in this call, and are held to it by a guard
    (a slice of a buffer has the length `Min(64, s0)`).
    """
    axes = leaves(group)
    return _regroup(axes, sizes, same) or _regroup(leaves(axes), sizes, _equal_here)


def _regroup(axes: Group, sizes: Sequence[Size], equal: Callable[[Size, Size], bool]) -> Dims | None:
    rest, dims = list(axes), []
    for size in sizes:
        taken: list[Axis] = []
        product: Size = 1
        while not equal(product, size):
            if not rest:
                return None
            axis = rest.pop(0)
            if not equal(product * axis.size, size) and not _divides(product * axis.size, size):
                if not _divides(product, size) or not _divides(size // product, axis.size):
                    return None
                needed = size // product
                axis.parts = (Axis(needed), Axis(axis.size // needed))
                axis, minor = axis.parts
                rest.insert(0, minor)
            taken.append(axis)
            product = product * axis.size
        dims.append(tuple(taken))
    return tuple(dims) if not rest else None


def _equal_here(a: Size, b: Size) -> bool:
    """Whether two sizes are equal in the call that is compiled; then a guard holds them to it."""
    hints = [x.node.hint if isinstance(x, torch.SymInt) else x for x in (a, b)]
    return hints[0] == hints[1] is not None and agree(a, b)


def _divides(divisor: Size, size: Size) -> bool:
    return same(size, divisor) or statically_known_true(size % divisor == 0)


def view_up(node: fx.Node, dims: Dims, *, through_casts: bool = False) -> tuple[fx.Node, Dims] | None:
    """One step from `node` to the tensor it shows in another layout, and the dims of that; None at any other op.

    `through_casts`: also up from a wider float dtype to the narrower one it was, which loses nothing, if ops take it.
    """
    name = op_name(node)
    if name in COPIES or is_inert_dropout(node):
        return argument(node), dims
    if name in CASTS:
        source = argument(node)
        was, now = value(source).dtype, value(node).dtype
        if was == now or (through_casts and was in DTYPES and was.itemsize < now.itemsize):
            return source, dims
        return None
    if name in RESHAPES:
        source = argument(node)
        grouped = regroup(flat(dims), shape(source))
        return None if grouped is None else (source, grouped)
    if name in PERMUTATIONS:
        order = permutation(node)
        return arguments(node)["self"], tuple(dims[order.index(d)] for d in range(len(order)))
    if name in EXPANSIONS:
        return _expansion_up(arguments(node)["self"], dims)
    if name == "repeat_interleave" and "repeats" in (named := arguments(node)) and isinstance(named["dim"], int):
        return _interleaving_up(named["self"], dims, named["dim"], named["repeats"])
    if name in ("index", "index_select"):
        return _indexing_up(node, dims)
    if name == "repeat":
        return _repetition_up(argument(node), dims, argument(node, 1))
    if name == "slice" and same_shape(shape(node), shape(argument(node))):
        return argument(node), dims
    return None


def _expansion_up(source: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    sizes = shape(source)
    own = dims[len(dims) - len(sizes):]
    return source, tuple(() if is_one(size) else group for size, group in zip(sizes, own, strict=True))


def _interleaving_up(source: fx.Node, dims: Dims, dim: int, repeats: Any) -> tuple[fx.Node, Dims] | None:
    dim %= len(dims)
    if not isinstance(repeats, int):
        return None
    parted = regroup(dims[dim], (shape(source)[dim], repeats))
    return None if parted is None else (source, (*dims[:dim], parted[0], *dims[dim + 1:]))


def _indexing_up(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """x[:, arange(heads) // times], spelled with index or index_select: every head of x `times` times."""
    named = arguments(node)
    indices = named["indices"] if "indices" in named else [None] * (named["dim"] % len(dims)) + [named["index"]]
    if not indices or indices[-1] is None or any(x is not None for x in indices[:-1]):
        return None
    index = indices[-1]
    if op_name(index) in ("floor_divide", "div") and op_name(argument(index)) == "arange":
        floors = op_name(index) == "floor_divide" or index.kwargs.get("rounding_mode") == "floor"
        counted, times = argument(index), argument(index, 1)
        fits = floors and arguments(counted).get("start", 0) == 0 and arguments(counted).get("step", 1) == 1
    elif op_name(index) == "repeat_interleave" and op_name(argument(index)) == "arange":
        counted, times = argument(index), arguments(index).get("repeats")
        fits = arguments(counted).get("start", 0) == 0 and arguments(counted).get("step", 1) == 1
    else:
        return None
    dim = len(indices) - 1
    if not fits or not isinstance(times, int) or not same(shape(named["self"])[dim] * times, shape(node)[dim]):
        return None
    return _interleaving_up(named["self"], dims, dim, times)


def _repetition_up(source: fx.Node, dims: Dims, repeats: Sequence[Any]) -> tuple[fx.Node, Dims] | None:
    sizes = (1,) * (len(repeats) - len(shape(source))) + shape(source)
    result = []
    for group, size, times in zip(dims, sizes, map(value, repeats), strict=True):
        parted = regroup(group, (times, size))
        if parted is None:
            return None
        result.append(parted[1])
    return source, tuple(result[len(repeats) - len(shape(source)):])


def view_down(user: fx.Node, dims: Dims) -> Dims | None:
    """The dims of `user`, which shows a tensor with these dims in another layout; None at any other op."""
    name = op_name(user)
    if name in CASTS and value(user).dtype not in PRECISE:
        return None
    if name in COPIES or name in CASTS or is_inert_dropout(user):
        return dims
    if name in RESHAPES:
        return regroup(flat(dims), shape(user))
    if name in PERMUTATIONS:
        return tuple(dims[d] for d in permutation(user))
    if name in EXPANSIONS and same_shape(shape(user), shape(argument(user))):
        return dims
    if name == "slice" and same_shape(shape(user), shape(argument(user))):
        return dims
    return None


def op_name(node: fx.Node) -> str:
    """The name of a torch op without its overload, empty for anything else."""
    return node.target._opname if isinstance(node.target, OpOverload) else ""


def base_name(node: fx.Node) -> str:
    """The name of an ATen op without the underscore of its in-place form."""
    name = op_name(node)
    return name.removesuffix("_") if name and node.target._schema.is_mutable else name  # type: ignore[union-attr]


def permutation(node: fx.Node) -> list[int]:
    """Where each dim of a permuting op comes from."""
    named = arguments(node)
    rank = len(shape(named["self"]))
    order = list(range(rank))
    if "dims" in named:
        return [d % rank for d in named["dims"]]
    if "source" in named:  # movedim
        source, destination = ([x] if isinstance(x, int) else list(x) for x in (named["source"], named["destination"]))
        moved = {d % rank: s % rank for s, d in zip(source, destination, strict=True)}
        rest = iter([d for d in order if d not in moved.values()])
        return [moved[d] if d in moved else next(rest) for d in order]
    if op_name(node) == "numpy_T":
        return order[::-1]
    first, second = next(((named[a] % rank, named[b] % rank) for a, b in (("dim0", "dim1"), ("axis0", "axis1"))
                          if a in named), (max(rank - 2, 0), rank - 1))
    order[first], order[second] = order[second], order[first]
    return order


def broadcast(tensor: fx.Node, dims: Dims) -> Dims | None:
    """The dims of an operand that is broadcast to a result with `dims`; None where it is larger than the result."""
    sizes = shape(tensor)
    if len(sizes) > len(dims):
        return None
    own = dims[len(dims) - len(sizes):]
    result = tuple(() if is_one(size) else group for size, group in zip(sizes, own, strict=True))
    fits = all(not group or agree(extent(leaves(group)), size) for group, size in zip(result, sizes, strict=True))
    return result if fits and all(group or is_one(size) for group, size in zip(result, sizes, strict=True)) else None


def index_of(dims: Dims, layout: Sequence[tuple[sympy.Symbol, Group]]) -> tuple[sympy.Expr, ...]:
    """The element of a tensor with `dims` at an index of `layout`: one symbol per group of axes."""
    places: dict[Axis, sympy.Expr] = {}
    for symbol, group in layout:
        stride: sympy.Expr = sympy.Integer(1)
        for position, axis in reversed(list(enumerate(group))):
            place = symbol if stride == 1 else FloorDiv(symbol, stride)
            places[axis] = place if position == 0 else PythonMod(place, expression(axis.size))
            stride = stride * expression(axis.size)
    wholes = {group: symbol for symbol, group in layout}

    def place_of(group: Group) -> sympy.Expr:
        if group in wholes and group:
            return wholes[group]
        result: sympy.Expr = sympy.Integer(0)
        for axis in group:
            result = result * expression(axis.size) + places[axis]
        return result

    return tuple(place_of(group) for group in resolve(dims))
