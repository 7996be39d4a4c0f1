"""Write expressions back as nodes: sizes, and the condition on keys that a mask proof ends in.

    size expression   s1 - s0                            ->  operator.sub(sym_size(x, 1), sym_size(y, 1))
    key condition     (mask(b, k) != 0) & (k < n)        ->  bool tensor [B or 1, S]
"""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

from sparsify.passes.graph import aten, emit, expression, is_tensor, same, shape
from sparsify.passes.reader import is_boolean
from sparsify.passes.site import BATCH, HEAD, KEY, QUERY

RELATIONS: Mapping[type, tuple[Any, Any]] = {
    sympy.Le: (aten.le.Tensor, aten.le.Scalar), sympy.Lt: (aten.lt.Tensor, aten.lt.Scalar),
    sympy.Ge: (aten.ge.Tensor, aten.ge.Scalar), sympy.Gt: (aten.gt.Tensor, aten.gt.Scalar),
    sympy.Eq: (aten.eq.Tensor, aten.eq.Scalar), sympy.Ne: (aten.ne.Tensor, aten.ne.Scalar),
}
CONNECTIVES: Mapping[type, Any] = {sympy.And: aten.logical_and.default, sympy.Or: aten.logical_or.default}
ARITHMETIC: Mapping[type, Any] = {sympy.Add: aten.add.Tensor, sympy.Mul: aten.mul.Tensor}


def is_key_condition(condition: sympy.Basic, leaves: Mapping[str, fx.Node]) -> bool:
    """Whether `key_mask` can write this condition: it speaks of keys and batch rows alone."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
        return all(is_key_condition(part, leaves) for part in condition.args)
    if not isinstance(condition, Relational) or not _speaks_of(condition, {BATCH, KEY}, leaves):
        return False
    return all(_is_writable(side, leaves) for side in condition.args)


def _speaks_of(expr: sympy.Basic, symbols: set[sympy.Symbol], leaves: Mapping[str, fx.Node]) -> bool:
    """Whether an expression has one of these symbols or a leaf: then it is a tensor."""
    return bool(expr.free_symbols & symbols or expr.atoms(AppliedUndef)
                or any(symbol.name in leaves for symbol in expr.free_symbols))


def _is_writable(expr: sympy.Basic, leaves: Mapping[str, fx.Node]) -> bool:
    if expr.free_symbols & {HEAD, QUERY} or is_boolean(expr) or expr == BATCH:
        return False
    if not _speaks_of(expr, {BATCH, KEY}, leaves) or isinstance(expr, sympy.Symbol):
        return True
    if isinstance(expr, AppliedUndef):
        if any(arg.atoms(AppliedUndef) for arg in expr.args):
            return False
        moving = [arg for arg in expr.args if arg.free_symbols & {BATCH, KEY}]
        rows = [arg for arg in moving if arg == BATCH]
        keys = [arg for arg in moving if BATCH not in arg.free_symbols and KEY not in (arg - KEY).free_symbols]
        return moving == [*rows, *keys] and len(rows) <= 1 and len(keys) <= 1
    return isinstance(expr, sympy.Add | sympy.Mul) and all(_is_writable(arg, leaves) for arg in expr.args)


def key_mask(condition: sympy.Basic, leaves: Mapping[str, fx.Node], kv_len: Any, at: fx.Node) -> fx.Node:
    """The condition as a bool tensor [B or 1, kv_len], built before `at`."""
    device = next(n.meta["val"].device for n in at.all_input_nodes if is_tensor(n))
    writer = _Writer(leaves, expression(kv_len), device, at)
    with at.graph.inserting_before(at):
        mask = writer.condition(condition)
        for _ in range(2 - len(shape(mask))):
            mask = emit(at.graph, aten.unsqueeze.default, mask, 0)
        if not same(shape(mask)[1], kv_len):
            mask = emit(at.graph, aten.expand.default, mask, [-1, writer.kv_len])
    return mask


class _Writer:
    """Writes one condition at one place of a graph."""

    def __init__(self, leaves: Mapping[str, fx.Node], kv_len: sympy.Expr, device: torch.device, at: fx.Node) -> None:
        self.leaves, self.device, self.at, self.graph = leaves, device, at, at.graph
        self.kv_len_expr, self.kv_len = kv_len, size_node(kv_len, at)

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
        return _speaks_of(expr, {BATCH, KEY}, self.leaves)

    def number(self, expr: sympy.Basic) -> Any:
        """A tensor that broadcasts to [B, kv_len], or a number."""
        if not self.is_tensor(expr):
            return float(expr) if isinstance(expr, sympy.Float) else size_node(expr, self.at)
        if expr == KEY:
            return emit(self.graph, aten.arange.default, self.kv_len, device=self.device)
        if isinstance(expr, sympy.Symbol):
            return self.leaves[expr.name]
        if isinstance(expr, AppliedUndef):
            return self.leaf(expr)
        tensors = [self.number(arg) for arg in expr.args if self.is_tensor(arg)]
        numbers = [self.number(arg) for arg in expr.args if not self.is_tensor(arg)]
        result = tensors[0]
        for operand in [*tensors[1:], *numbers]:
            result = emit(self.graph, ARITHMETIC[type(expr)], result, operand)
        return result

    def leaf(self, expr: AppliedUndef) -> fx.Node:
        """The elements of a leaf that the condition reads: [S], [B, S] or [B, 1]."""
        node = self.leaves[expr.func.__name__]
        has_keys = False
        for dim in reversed(range(len(expr.args))):
            position = expr.args[dim]
            if position == BATCH:
                continue
            if KEY not in position.free_symbols:
                node = emit(self.graph, aten.select.int, node, dim, size_node(position, self.at))
                continue
            has_keys = True
            size = expression(shape(node)[dim])
            if position == KEY and size == self.kv_len_expr:
                continue
            # Outside the leaf another part of the condition hides the key, but the index must be inside.
            last = size_node(size - 1, self.at)
            index = emit(self.graph, aten.clamp.default, self.number(position), 0, last)
            node = emit(self.graph, aten.index_select.default, node, dim, index)
        return node if has_keys else emit(self.graph, aten.unsqueeze.default, node, -1)


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
