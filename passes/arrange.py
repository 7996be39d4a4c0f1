"""Write a tensor in another layout: from its dims to the dims that an op, or a user of its result, wants."""

from torch import fx

from sparsify.passes.axes import Dims, Size, extent, flat, resolve
from sparsify.passes.emit import size_node
from sparsify.passes.graph import aten, emit, expression


def rearrange(node: fx.Node, dims: Dims, layout: Dims, at: fx.Node, *, broadcast_groups: bool = False) -> fx.Node:
    """`node`, whose dims are `dims`, as a tensor with one dim per group of `layout`, built before `at`.

    Axes that it lacks are expanded; with `broadcast_groups`, a group of which it has none stays a dim of size 1.
    """
    with at.graph.inserting_before(at):
        return _rearrange(node, resolve(dims), layout, at, broadcast_groups)


def _rearrange(node: fx.Node, dims: Dims, layout: Dims, at: fx.Node, broadcast_groups: bool) -> fx.Node:
    graph = at.graph
    present = flat(dims)
    wanted = tuple(() if broadcast_groups and not set(group) & set(present) else group for group in layout)
    if dims == wanted:
        return node
    if any(len(group) != 1 for group in dims) and dims != tuple((axis,) for axis in present):
        node = emit(graph, aten.reshape.default, node, [_size(axis.size, at) for axis in present])
    order = [axis for group in wanted for axis in group if axis in present]
    if order != list(present):
        node = emit(graph, aten.permute.default, node, [present.index(axis) for axis in order])
    missing = [axis for group in wanted for axis in group if axis not in present]
    if missing:
        full = [axis for group in wanted for axis in group]
        node = emit(graph, aten.reshape.default, node, [_size(a.size, at) if a in present else 1 for a in full])
        node = emit(graph, aten.expand.default, node, [_size(axis.size, at) for axis in full])
        order = full
    if tuple((axis,) for axis in order) != wanted:
        node = emit(graph, aten.reshape.default, node, [_size(extent(group), at) for group in wanted])
    return node


def _size(size: Size, at: fx.Node) -> "int | fx.Node":
    return size if isinstance(size, int) else size_node(expression(size), at)
