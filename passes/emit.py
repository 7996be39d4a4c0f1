"""Write expressions back as nodes: sizes, the condition on keys and the document ids that a mask proof ends in.

    size expression   s1 - s0                            ->  operator.sub(sym_size(x, 1), sym_size(y, 1))
    key condition     (mask(b, k) != 0) & (k < n)        ->  bool tensor [B or 1, S]
    document ids      ids(b, q), k // 4                  ->  int64 tensors [B or 1, L], [B or 1, S]
"""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

from sparsify.passes.graph import aten, emit, expression, is_tensor, may_guard, same, shape, value
from sparsify.passes.reader import is_boolean
from sparsify.passes.site import BATCH, HEAD, KEY, QUERY

RELATIONS: Mapping[type, tuple[Any, Any]] = {
    sympy.Le: (aten.le.Tensor, aten.le.Scalar), sympy.Lt: (aten.lt.Tensor, aten.lt.Scalar),
    sympy.Ge: (aten.ge.Tensor, aten.ge.Scalar), sympy.Gt: (aten.gt.Tensor, aten.gt.Scalar),
    sympy.Eq: (aten.eq.Tensor, aten.eq.Scalar), sympy.Ne: (aten.ne.Tensor, aten.ne.Scalar),
}
CONNECTIVES: Mapping[type, Any] = {sympy.And: aten.logical_and.default, sympy.Or: aten.logical_or.default}
ARITHMETIC: Mapping[type, tuple[Any, Any]] = {
    sympy.Add: (aten.add.Tensor, aten.add.Tensor), sympy.Mul: (aten.mul.Tensor, aten.mul.Tensor),
    FloorDiv: (aten.floor_divide.default, None), PythonMod: (aten.remainder.Tensor, aten.remainder.Scalar),
    sympy.Abs: (aten.abs.default, None),
    sympy.Min: (aten.minimum.default, aten.clamp_max.default), Min: (aten.minimum.default, aten.clamp_max.default),
    sympy.Max: (aten.maximum.default, aten.clamp_min.default), Max: (aten.maximum.default, aten.clamp_min.default),
}


def is_condition_on(condition: Any, symbol: sympy.Symbol, leaves: Mapping[str, fx.Node]) -> bool:
    """Whether this condition can be written as a tensor over batch rows and `symbol` (KEY or QUERY) alone."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
        return all(is_condition_on(part, symbol, leaves) for part in condition.args)
    if not isinstance(condition, Relational) or not _is_tensor(condition, symbol, leaves):
        return False
    return is_writable(condition.lhs, symbol, leaves) and is_writable(condition.rhs, symbol, leaves)


def is_writable(expr: Any, symbol: sympy.Symbol, leaves: Mapping[str, fx.Node]) -> bool:
    """Whether this expression can be written as a tensor over batch rows and `symbol` (KEY or QUERY) alone, or as a
    number."""
    if expr.free_symbols & ({HEAD, QUERY, KEY} - {symbol}) or is_boolean(expr) or expr == BATCH:
        return False
    if not _is_tensor(expr, symbol, leaves):
        return not expr.is_number or isinstance(expr, sympy.Integer | sympy.Float)
    if isinstance(expr, sympy.Symbol):
        return True
    if isinstance(expr, AppliedUndef):
        # A leaf is read at a batch row and a position; a position that is read from a leaf, or depends on the row,
        # would need a gather.
        moving = [arg for arg in expr.args if _is_tensor(arg, symbol, leaves)]
        rows = [arg for arg in moving if arg == BATCH]
        positions = [arg for arg in moving if _is_position(arg, symbol, leaves)]
        return moving == [*rows, *positions] and len(rows) <= 1 and len(positions) <= 1
    return type(expr) in ARITHMETIC and all(is_writable(arg, symbol, leaves) for arg in expr.args)


def _is_position(expr: sympy.Expr, symbol: sympy.Symbol, leaves: Mapping[str, fx.Node]) -> bool:
    free = expr.free_symbols
    return (symbol in free and BATCH not in free and not expr.atoms(AppliedUndef)
            and not any(x.name in leaves for x in free) and is_writable(expr, symbol, leaves))


def _is_tensor(expr: sympy.Basic, symbol: sympy.Symbol, leaves: Mapping[str, fx.Node]) -> bool:
    """Whether an expression has the symbol, a batch row or a leaf."""
    return bool(expr.free_symbols & {BATCH, symbol} or expr.atoms(AppliedUndef)
                or any(x.name in leaves for x in expr.free_symbols))


def key_mask(condition: sympy.Basic, leaves: Mapping[str, fx.Node], batch: Any, kv_len: Any, at: fx.Node) -> fx.Node:
    """The condition on keys as a bool tensor [batch or 1, kv_len], built before `at`."""
    with at.graph.inserting_before(at):
        writer = _Writer(leaves, KEY, batch, kv_len, at)
        return writer.rows(writer.condition(condition))


def documents(ids: tuple[sympy.Expr, sympy.Expr], leaves: Mapping[str, fx.Node], batch: Any,
              lengths: tuple[Any, Any], at: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The ids of queries and keys as int64 tensors [batch or 1, q_len] and [batch or 1, kv_len], built before `at`."""
    with at.graph.inserting_before(at):
        written = []
        for expr, symbol, length in zip(ids, (QUERY, KEY), lengths, strict=True):
            writer = _Writer(leaves, symbol, batch, length, at)
            tensor = writer.rows(writer.tensor(expr))
            if value(tensor).dtype != torch.int64:
                tensor = emit(at.graph, aten.to.dtype, tensor, torch.int64)
            written.append(tensor)
    return written[0], written[1]


class _Writer:
    """Writes expressions over one index at one place of a graph, as tensors that broadcast to [batch, length]."""

    def __init__(self, leaves: Mapping[str, fx.Node], symbol: sympy.Symbol, batch: Any, length: Any,
                 at: fx.Node) -> None:
        self.leaves, self.symbol, self.batch, self.at, self.graph = leaves, symbol, batch, at, at.graph
        self.device = value(at).device
        self.size, self.length_expr, self.length = length, expression(length), size_node(expression(length), at)

    def rows(self, node: fx.Node) -> fx.Node:
        """A tensor as [B or 1, length]."""
        for _ in range(2 - len(shape(node))):
            node = emit(self.graph, aten.unsqueeze.default, node, 0)
        if not same(shape(node)[1], self.size):
            node = emit(self.graph, aten.expand.default, node, [-1, self.length])
        return node

    def condition(self, expr: Any) -> fx.Node:
        if isinstance(expr, sympy.Not):
            return emit(self.graph, aten.logical_not.default, self.condition(expr.args[0]))
        if type(expr) in CONNECTIVES:
            result, *rest = (self.condition(part) for part in expr.args)
            for part in rest:
                result = emit(self.graph, CONNECTIVES[type(expr)], result, part)
            return result
        left, right = expr.args
        if not self.is_tensor(left):
            expr = expr.reversed
            left, right = expr.args
        tensor, scalar = RELATIONS[type(expr)]
        return emit(self.graph, tensor if self.is_tensor(right) else scalar, self.number(left), self.number(right))

    def is_tensor(self, expr: sympy.Basic) -> bool:
        return _is_tensor(expr, self.symbol, self.leaves)

    def tensor(self, expr: sympy.Expr) -> fx.Node:
        x = self.number(expr)
        if is_tensor(x):
            return x
        return emit(self.graph, aten.full.default, [1], x, dtype=torch.int64, device=self.device)

    def number(self, expr: sympy.Expr) -> Any:
        """A tensor, or a number."""
        if isinstance(expr, sympy.Piecewise):
            (yes, condition), (no, _) = expr.args
            return emit(self.graph, aten.where.self, self.condition(condition), self.tensor(yes), self.tensor(no))
        if not self.is_tensor(expr):
            return float(expr) if isinstance(expr, sympy.Float) else size_node(expr, self.at)
        if expr == self.symbol:
            return emit(self.graph, aten.arange.default, self.length, device=self.device)
        if isinstance(expr, sympy.Symbol):
            return self.whole(self.leaves[expr.name])
        if isinstance(expr, AppliedUndef):
            return self.leaf(expr)
        of_tensors, of_number = ARITHMETIC[type(expr)]
        if isinstance(expr, FloorDiv | PythonMod):  # the order counts
            divisor = self.number(expr.args[1])
            function = of_tensors if is_tensor(divisor) or of_number is None else of_number
            return emit(self.graph, function, self.tensor(expr.args[0]), divisor)
        if isinstance(expr, sympy.Abs):
            return emit(self.graph, of_tensors, self.number(expr.args[0]))
        result, *others = sorted((self.number(arg) for arg in expr.args), key=is_tensor, reverse=True)
        for operand in others:
            result = emit(self.graph, of_tensors if is_tensor(operand) else of_number, result, operand)
        return result

    def leaf(self, expr: AppliedUndef) -> fx.Node:
        """The elements of a leaf that an expression reads: [length], [batch, length] or [batch, 1]."""
        node = self.leaves[expr.func.__name__]
        is_moving = False
        for dim in reversed(range(len(expr.args))):
            position = expr.args[dim]
            if position == BATCH:
                # The user took the first rows of it. Not in an exported graph: it would narrow what the batch may be.
                if may_guard() and not same(shape(node)[dim], self.batch):
                    rows = size_node(expression(self.batch), self.at)
                    node = emit(self.graph, aten.slice.Tensor, node, dim, 0, rows)
                continue
            if self.symbol not in position.free_symbols:
                node = emit(self.graph, aten.select.int, node, dim, size_node(position, self.at))
                continue
            is_moving = True
            size = expression(shape(node)[dim])
            if position == self.symbol and size == self.length_expr:
                continue
            # Outside the leaf another part of the condition decides, but the index must be inside.
            last = size_node(size - 1, self.at)
            index = emit(self.graph, aten.clamp.default, self.number(position), 0, last)
            node = emit(self.graph, aten.index_select.default, node, dim, index)
        return self.whole(node if is_moving else emit(self.graph, aten.unsqueeze.default, node, -1))

    def whole(self, node: fx.Node) -> fx.Node:
        """Whole numbers in 64 bits: arithmetic on narrow ones would wrap where sympy's does not."""
        if value(node).is_floating_point() or value(node).dtype in (torch.bool, torch.int64):
            return node
        return emit(self.graph, aten.to.dtype, node, torch.int64)


def size_node(expr: sympy.Basic, at: fx.Node) -> "int | fx.Node":
    """A size expression as a number or a node, built before `at` from the sizes in the graph."""
    if isinstance(expr, sympy.Integer):
        return int(expr)
    with at.graph.inserting_before(at):
        sources = {symbol: _symbol_node(symbol, at) for symbol in expr.free_symbols}
        tracer = fx.proxy.GraphAppendingTracer(at.graph)
        proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in sources.items()}
        node = sympy_interp(OptimizedPythonReferenceAnalysis, proxies, expr).node
    values = {symbol: source.meta["val"] for symbol, source in sources.items()}
    node.meta["val"] = sympy_interp(OptimizedPythonReferenceAnalysis, values, expr)
    return node


def _symbol_node(symbol: sympy.Symbol, at: fx.Node) -> fx.Node:
    """A node before `at` that holds this size, or takes it from a tensor."""
    for node in at.graph.nodes:
        if node is at:
            break
        held = node.meta.get("val")
        if _is_symbol(held, symbol):
            return node
        for dim, size in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
            if _is_symbol(size, symbol):
                return emit(at.graph, aten.sym_size.int, node, dim)
    raise LookupError(f"no tensor before {at} has the size {symbol}")


def _is_symbol(size: Any, symbol: sympy.Symbol) -> bool:
    """By its own name, or by the one that a guard gave it since: `s1 == s0` renames s1 to s0."""
    return isinstance(size, torch.SymInt) and symbol in (size.node.expr, size.node._expr)
