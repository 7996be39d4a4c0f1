"""Trace a call once: identical calls of other layers copy the nodes that the first one added.

Given   values of the graph that is being traced (`Traced`), and what a call added to it.
Leaves  a `Template` per call that may be repeated: same function, same constants, tensors of the same metadata, same
        autocast and grad mode. Repeating it costs a copy of a few nodes, where tracing runs fake tensors through every
        dispatcher: 32 layers cost little more than two.
Never   repeats what depends on more than metadata: values read with `.item()`, fresh symbols, constants, autograd
        history, in-place changes of a shape.
"""

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, is_accessor_node
from torch.fx.proxy import _COPY_META_FIELDS

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
CONSTANTS = {int, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format}


@dataclass(eq=False)
class Traced:
    """A tensor of the new graph.

    metadata  a number that tensors of the same shape, strides, dtype ... share; None: calls on it are always traced
    fake      the fake tensor that the tracer knows; None: none was needed yet
    node      the node, as long as there is no fake
    model     a fake value of the same metadata, to make the fake from
    """

    metadata: int | None
    fake: Tensor | None = None
    node: fx.Node | None = None
    model: Tensor | None = None

    def real(self, tracer: Any) -> Tensor:
        """The fake tensor; the tracer knows it."""
        if self.fake is None:
            assert self.model is not None and self.node is not None
            self.fake = proxy_tensor.snapshot_fake(self.model)
            assert self.fake is not None
            _track(tracer, self.fake, self.node)
        return self.fake

    def current(self, tracer: Any) -> fx.Node | None:
        """The node that holds the tensor now: the last in-place write. None: no node does, or it is a constant."""
        if self.fake is None:
            return self.node
        slot = proxy_tensor.get_proxy_slot(self.fake, tracer, None)
        return slot.proxy.node if slot is not None and slot.constant is None else None

    def move(self, tracer: Any, node: fx.Node) -> None:
        """`node` wrote to the tensor in place."""
        self.node = node
        if self.fake is not None:
            _track(tracer, self.fake, node)


def _track(tracer: Any, fake: Tensor, node: fx.Node) -> None:
    proxy_tensor.set_proxy_slot(fake, tracer, proxy_tensor._ProxyTensor(fx.Proxy(node, tracer), None))


@dataclass
class Metadata:
    """Numbers for what an op can know of a tensor without its values."""

    numbers: dict[Hashable, int] = field(default_factory=dict)

    def of(self, x: Tensor) -> int | None:
        """The number; None where this is no plain dense tensor."""
        with torch._C.DisableTorchFunction():
            if type(x) is not FakeTensor or x.layout is not torch.strided or x.is_quantized:
                return None
            known = (x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), _sizes(x.shape), _sizes(x.stride()),
                     _sizes((x.storage_offset(),)))
        return self.numbers.setdefault(known, len(self.numbers))


def _sizes(sizes: Sequence[Any]) -> tuple[Hashable, ...]:
    return tuple(size if type(size) is int else size.node.expr for size in sizes)


class Unrepeatable(Exception):
    """A call has an argument that no key can hold."""


def key_of(node: fx.Node, env: Mapping[fx.Node, Any], state: Hashable) -> tuple[Hashable, list[Traced]]:
    """What makes two calls the same, and the tensors among the arguments, each once. Raises Unrepeatable."""
    if isinstance(node.target, FunctionType) and not node.target.__module__.startswith("torch"):
        raise Unrepeatable  # a function of the user's may look at anything
    tensors: list[Traced] = []
    return (node.target, _freeze(node.args, env, tensors), _freeze(node.kwargs, env, tensors), state), tensors


def _freeze(x: Any, env: Mapping[fx.Node, Any], tensors: list[Traced]) -> Hashable:
    if isinstance(x, fx.Node):
        x = env[x]
    kind = type(x)
    if kind is Traced:
        if x.metadata is None:
            raise Unrepeatable
        place = next((i for i, known in enumerate(tensors) if known is x), len(tensors))
        if place == len(tensors):
            tensors.append(x)
        return Traced, place, x.metadata
    if kind in CONSTANTS:
        return kind, x
    if kind is float:
        return kind, x.hex()  # tells -0.0 from 0.0
    if isinstance(x, tuple | list):
        return kind, tuple(_freeze(part, env, tensors) for part in x)
    if isinstance(x, dict):
        return kind, tuple((name, _freeze(part, env, tensors)) for name, part in x.items())
    if kind is slice:
        return kind, _freeze((x.start, x.stop, x.step), env, tensors)
    if kind in SYMBOLIC:
        return kind, x.node.expr
    raise Unrepeatable


@dataclass(frozen=True)
class Template:
    """What a call added to the graph, given tensors that were held by `inputs` and are held by `written` since."""

    nodes: Sequence[fx.Node]
    inputs: Sequence[fx.Node]
    written: Sequence[fx.Node]
    tensors: Sequence[Traced]
    result: Any
    result_nodes: Mapping[Traced, fx.Node]

    def repeat(self, tracer: Any, tensors: Sequence[Traced], source: fx.Node) -> Any:
        """The same call on other tensors, for the node `source` of the old graph."""
        now: dict[fx.Node, fx.Node] = {}
        for theirs, ours in zip(self.inputs, tensors, strict=True):
            node = ours.current(tracer)
            assert node is not None
            now[theirs] = node
        meta = {name: source.meta[name] for name in ("stack_trace", *_COPY_META_FIELDS) if name in source.meta}
        meta["from_node"] = [fx.traceback.NodeSource(source, "", fx.traceback.NodeSourceAction.CREATE)]
        graph = tracer.graph
        for node in self.nodes:
            if isinstance(node.meta["val"], SYMBOLIC):
                continue  # a size is what it was the first time
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: now.get(n, n))
            op: Any = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
            copy = graph.create_node(node.op, node.target, args, kwargs, graph._target_to_str(op.__name__))
            copy.meta = {**node.meta, **meta}
            now[node] = copy
        for ours, before, after in zip(tensors, self.inputs, self.written, strict=True):
            if after is not before:
                ours.move(tracer, now[after])

        def other(x: Any) -> Any:
            if type(x) is not Traced:
                return x
            if x in self.result_nodes:
                node = self.result_nodes[x]
                return Traced(x.metadata, node=now[node], model=node.meta["val"])
            return tensors[next(i for i, known in enumerate(self.tensors) if known is x)]

        return pytree.tree_map(other, self.result)


def template(tracer: Any, nodes: Sequence[fx.Node], tensors: Sequence[Traced], inputs: Sequence[fx.Node | None],
             result: Any, metadata: Metadata) -> Template | None:
    """The template of a call that was just traced; None where repeating it could be wrong."""
    written = [x.current(tracer) for x in tensors]
    leaves = [x for x in pytree.tree_leaves(result) if type(x) is Traced]
    made = {x: x.current(tracer) for x in leaves if not any(x is known for known in tensors)}
    known = {*inputs, *nodes}
    if None in known or None in written or not set(made.values()) <= set(nodes):
        return None
    if not all(x.metadata is not None for x in made):
        return None
    if not all(type(x) in (Traced, *CONSTANTS, float, *SYMBOLIC) for x in pytree.tree_leaves(result)):
        return None
    if not (nodes or tensors) or not all(_depends_on_metadata_only(node, known) for node in nodes):
        return None
    if torch.is_grad_enabled() and any(x.fake is not None and x.fake.requires_grad for x in (*tensors, *made)):
        return None  # a copy of a tensor has no autograd history
    if any(x.fake is not None and metadata.of(x.fake) != x.metadata for x in tensors):
        return None  # the call changed a shape in place
    return Template(nodes, inputs, written, list(tensors), result, made)  # type: ignore[arg-type]


def _depends_on_metadata_only(node: fx.Node, known: set[fx.Node | None]) -> bool:
    val = node.meta.get("val")
    if node.op != "call_function" or "val" not in node.meta or "unbacked_bindings" in node.meta:
        return False
    if isinstance(val, SYMBOLIC):
        sizes = all(isinstance(x.meta.get("val"), SYMBOLIC) for x in node.all_input_nodes)
        return sizes or is_accessor_node(node)
    if any(free_unbacked_symbols(x) for x in pytree.tree_leaves(val) if isinstance(x, Tensor)):
        return False
    if not (isinstance(node.target, OpOverload) or node.target is operator.getitem):
        return False
    return all(x in known or isinstance(x.meta.get("val"), SYMBOLIC) for x in node.all_input_nodes)
