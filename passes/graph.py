"""Reading and writing FX graphs: what more than one pass needs."""

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

aten = torch.ops.aten
TORCH_ROOT = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Origin:
    """Where the user wrote something.

    line    "model.py:214", the innermost frame outside torch
    module  "model.layers.0.self_attn", empty outside any module
    """

    line: str
    module: str


def value(x: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return x.meta["val"] if isinstance(x, fx.Node) else x


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node: SymInts, and ints wherever they are known.

    Where size 1 is not specialised (`backed_size_oblivious`), a guard `s0 == 1` leaves `4 // s0` standing (torch 2.13).
    """
    return tuple(_fill_in_ones(size) if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape)


def _fill_in_ones(size: torch.SymInt) -> "int | torch.SymInt":
    env, expr = size.node.shape_env, size.node.expr
    ones = {symbol: 1 for symbol in expr.free_symbols
            if env._maybe_evaluate_static(sympy.Eq(symbol, 1)) == sympy.true}
    filled = expr.subs(ones)
    return int(filled) if filled.is_Integer else size


def expression(size: Any) -> sympy.Expr:
    """A size as sympy sees it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def is_tensor(x: Any) -> bool:
    """Whether `x` is a node that holds one tensor."""
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    return statically_known_true(a == b)


_MAY_GUARD: ContextVar[bool] = ContextVar("sparsify_may_guard", default=True)


@contextmanager
def without_guards() -> Iterator[None]:
    """Sizes agree only where they are known to be equal: for graphs whose guards nobody would check."""
    token = _MAY_GUARD.set(False)
    try:
        yield
    finally:
        _MAY_GUARD.reset(token)


def may_guard() -> bool:
    """Whether a guard would be checked."""
    return _MAY_GUARD.get()


def agree(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; sizes that happen to be equal are held to it by a guard."""
    if same(a, b):
        return True
    return may_guard() and not (free_unbacked_symbols(a) or free_unbacked_symbols(b)) and bool(a == b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are known to be equal, without a guard."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def agree_in_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal; held to it by guards."""
    return len(a) == len(b) and all(agree(x, y) for x, y in zip(a, b, strict=True))


def argument(node: fx.Node, place: int = 0) -> Any:
    """A positional argument of a call."""
    return node.args[place]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call to an ATen op by their names in its schema, defaults filled in."""
    schema = _schema(node)
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update(zip((a.name for a in schema), node.args, strict=False))
    return {**named, **node.kwargs}


def _schema(node: fx.Node) -> Any:
    assert isinstance(node.target, OpOverload)
    return node.target._schema.arguments


def origin(node: fx.Node) -> Origin:
    """Where the user wrote this node."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.stack_trace or "")
    outside = [frame for frame in frames if not frame[0].startswith(TORCH_ROOT)] or frames
    line = f"{Path(outside[-1][0]).name}:{outside[-1][1]}" if outside else "unknown line"
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0] if modules else ""
    # The model itself is no part of the path, whether Dynamo met it as self or as the first argument of a wrapper.
    return Origin(line, re.sub(r"^L\['(?:self'\]|args'\]\[0\])\.?|^L\['(\w+)'\]", r"\1", path))


def is_inert_dropout(node: fx.Node) -> bool:
    """Whether this is a dropout that drops nothing."""
    if node.target not in (aten.dropout.default, aten.dropout_.default):
        return False
    named = arguments(node)
    return named["train"] is False or named["p"] == 0


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage this one (perhaps) is a view of."""
    while True:
        if node.target is operator.getitem or is_inert_dropout(node):
            bases = list(node.args[:1])
        elif isinstance(node.target, OpOverload):
            pairs = zip(_schema(node), node.args, strict=False)
            bases = [x for argument, x in pairs if argument.alias_info is not None]
        else:
            return node
        if not bases or not isinstance(bases[0], fx.Node):
            return node
        node = bases[0]


def mutations(graph: fx.Graph) -> Mapping[fx.Node, list[fx.Node]]:
    """The nodes that write to a tensor in place, by the root of its storage."""
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            for written in _written(node):
                found[storage_root(written)].append(node)
    return found


def _written(node: fx.Node) -> Iterator[fx.Node]:
    for i, argument in enumerate(_schema(node)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            yield from (x for x in (given if isinstance(given, list | tuple) else [given]) if isinstance(x, fx.Node))


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Append a call at the graph's insertion point, with the fake value that it has."""
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), _fake_mode(graph):
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the graph's fake values; outside it, making a tensor of a symbolic size fixes the size."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(x.fake_mode for x in values if isinstance(x, FakeTensor))
