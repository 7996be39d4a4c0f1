"""Turn a Dynamo graph into functional-looking ATen in which attention is still whole.

Given   the graph and example inputs that Dynamo hands to a backend.
Leaves  a new graph in the dialect of torch.export before decomposition: every spelling of softmax, matmul and
        scaled_dot_product_attention is one OpOverload. `meta["val"]` holds fake values with Dynamo's own symbols, so a
        comparison on them is a guard; `meta["stack_trace"]` and `meta["nn_module_stack"]` point at the user's code;
        `meta["requires_grad"]` says whether autograd will record the node, `meta["source"]` of an input what the user
        calls it. The given graph is untouched.
        Attention that arrives fused is opened (fused.py), and so are the bodies of checkpoint, cond, while_loop and
        invoke_subgraph: `graphs` lists them.
Never   functionalises (mutations stay as they were written) or differentiates. Any other higher-order op is carried
        whole.

    torch: q.matmul(k.transpose(2, 3)).softmax(-1)   ->   aten.transpose.int, aten.matmul.default, aten.softmax.int
"""

import contextlib
import functools
import itertools
import operator
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._functorch import predispatch
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes import shape_prop

from sparsify.passes.emit import size_node
from sparsify.passes.flex import add_shadow, drop_useless_shadows
from sparsify.passes.fused import OPENED
from sparsify.passes.graph import same
from sparsify.passes.replay import Metadata, Template, Traced, Unrepeatable, key_of, template

OURS = ("aten", "prims")
"""Namespaces of ops that do nothing but return their result, unless their schema says so."""
NORMALISED = "normalised"
"""Marks the body of a higher-order op that was opened: `meta[NORMALISED]` is the body as Dynamo made it."""


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace `gm` into pre-dispatch ATen."""
    mode, fakes = _fake_inputs(example_inputs)

    def interpret(*args: Any) -> Any:
        return _interpret(gm, *args)

    # Pre-dispatch tracing turns grad mode switches of the graph into calls: ours must be as it was afterwards.
    with mode, torch.set_grad_enabled(torch.is_grad_enabled()), _no_memory_formats():
        trace = make_fx(interpret, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True,
                        _error_on_data_dependent_ops=False)
        normal = trace(*fakes)
    normal.meta.update(gm.meta)
    for old, new in zip(*(graph.find_nodes(op="placeholder") for graph in (gm.graph, normal.graph)), strict=True):
        new.meta["source"] = _source(old)
        # AOTAutograd tells by these which inputs are static. CUDA graphs copy all others at every run: parameters, too.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]
    if hasattr(gm, "_param_name_to_source"):
        normal._param_name_to_source = gm._param_name_to_source
    _forget_readers_of_metadata(normal.graph)
    _remove_dead_code(normal)
    _mark_requires_grad(normal, [isinstance(x, torch.Tensor) and x.requires_grad for x in fakes])
    return normal


def _source(placeholder: fx.Node) -> str:
    """What the user calls an input: "attention_mask", "self.layers.0.bias"."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    inside = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", source.name)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", inside)


def graphs(normal: fx.GraphModule) -> list[fx.GraphModule]:
    """The normalised graphs: `normal` itself, then the bodies of its higher-order ops, outer ones first."""
    found = [normal]
    for node in normal.graph.nodes:
        body = getattr(normal, node.target, None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule) and body.meta.get(NORMALISED) and body not in found:
            found += [inner for inner in graphs(body) if inner not in found]
    return found


def _fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """The inputs as fakes of a mode of our own on Dynamo's ShapeEnv: same symbols, same guards.

    Dynamo's own fakes belong to a mode that is over; a mode of our own also keeps what tracing does to its fakes away
    from AOTAutograd.
    """
    context = TracingContext.try_get()
    outer = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    mode = FakeTensorMode(shape_env=outer.shape_env if outer is not None else None, allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x  # SymInts are Dynamo's already
        symbolic = context.tensor_to_context.get(x) if context is not None else None
        if symbolic is not None:
            return mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source)
        return mode.from_tensor(x, static_shapes=None if detect_fake_mode(x) is not None else True)

    return mode, [fake(x) for x in example_inputs]


def _no_memory_formats() -> contextlib.AbstractContextManager[Any]:
    """make_fx asks every tensor for its memory format, and each answer that depends on a size is a guard.

    A square mask would fix that q_len is kv_len. `meta["tensor_meta"]` is for nobody: it comes without the format.
    """
    extract = functools.partial(shape_prop._extract_tensor_metadata, include_contiguity=False)
    return mock.patch.object(proxy_tensor, "_extract_tensor_metadata", extract)


def _interpret(gm: fx.GraphModule, *args: Any) -> Any:
    with fx.traceback.preserve_node_meta(), _Interpreter(gm) as interpreter:
        return interpreter.run(*args)


class _Interpreter(fx.Interpreter):
    """Replays a Dynamo graph under make_fx; every new node keeps the stack trace and module of the old one.

    Tensors travel as `Traced`; a call that was seen before is repeated from its template. A context manager: regions
    that an exception leaves open (autocast, vmap) are closed.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._tracer = _tracer()
        self._regions: list[contextlib.AbstractContextManager[Any]] = []
        self._autocast: list[tuple[Any, ...]] = []
        self._vmap_depth = 0
        self._metadata = Metadata()
        self._templates: dict[Hashable, Template] = {}

    def __enter__(self) -> "_Interpreter":
        return self

    def __exit__(self, *error: object) -> None:
        while self._regions:
            self._regions.pop().__exit__(None, None, None)

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "output":
            return self._arguments(node)[0][0]
        if node.op not in ("call_function", "call_method"):
            return self._wrap(super().run_node(node), {})
        if node.target is operator.getitem:
            whole: Any
            place: Any
            whole, place = (self.env[x] if isinstance(x, fx.Node) else x for x in node.args)
            if (isinstance(whole, tuple | list) and isinstance(place, int)) or isinstance(whole, dict):
                return whole[place]
        with contextlib.suppress(Unrepeatable):
            state = (torch.is_grad_enabled(), self._vmap_depth, tuple(self._autocast))
            key, tensors = key_of(node, self.env, state)
            if key in self._templates:
                return self._templates[key].repeat(self._tracer, tensors, node)
            return self._first(node, key, tensors)
        return self._traced(node)

    def _first(self, node: fx.Node, key: Hashable, tensors: list[Traced]) -> Any:
        """Trace a call that may be repeated later."""
        inputs = [x.current(self._tracer) for x in tensors]
        last = next(iter(reversed(self._tracer.graph.nodes)), None)
        result = self._traced(node)
        added = list(itertools.takewhile(lambda n: n is not last, reversed(self._tracer.graph.nodes)))[::-1]
        made = template(self._tracer, added, tensors, inputs, result, self._metadata)
        if made is not None:
            self._templates[key] = made
        return result

    def _traced(self, node: fx.Node) -> Any:
        args, kwargs, known = self._arguments(node)
        with fx.traceback.set_current_meta(node):
            return self._wrap(self._call(node.target, args, kwargs, node.op), known)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: str) -> Any:
        if op == "call_method":
            return self.call_method(target, args, kwargs)
        if target is torch.div and kwargs.get("rounding_mode") and all(isinstance(x, int) for x in args):
            # A size, made with torch.div of two ints: a tensor of a fake mode would have no value.
            return int(args[0] / args[1]) if kwargs["rounding_mode"] == "trunc" else args[0] // args[1]
        if isinstance(target, HigherOrderOperator):
            return _carry(target, args, kwargs)
        if target in OPENED:
            target = OPENED[target]
        if target is torch.amp.autocast_mode._enter_autocast:
            self._autocast.append(args)
            return self._enter(torch.autocast(*args))  # under make_fx the plain call only leaves a node
        if target is torch.amp.autocast_mode._exit_autocast:
            self._autocast.pop()
            return self._leave()
        if target is predispatch._vmap_increment_nesting:
            self._vmap_depth += 1
            if self._vmap_depth == 1:
                self._enter(_tracing_below_functorch())
        result = self.call_function(target, args, kwargs)
        if target is predispatch._vmap_decrement_nesting:
            self._vmap_depth -= 1
            if self._vmap_depth == 0:
                self._leave()
        return result

    def _arguments(self, node: fx.Node) -> tuple[Any, Any, dict[int, Traced]]:
        """The real arguments, and the `Traced` of each tensor among them by its id."""
        known: dict[int, Traced] = {}

        def real(x: Any) -> Any:
            if type(x) is not Traced:
                return x
            tensor = x.real(self._tracer)
            known[id(tensor)] = x
            return tensor

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: pytree.tree_map(real, self.env[n]))
        return args, kwargs, known

    def _wrap(self, result: Any, known: dict[int, Traced]) -> Any:
        def traced(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in known:
                return known[id(x)]
            return Traced(self._metadata.of(x) if self._vmap_depth == 0 else None, x)

        return pytree.tree_map(traced, result)

    def _enter(self, region: contextlib.AbstractContextManager[Any]) -> None:
        region.__enter__()
        self._regions.append(region)

    def _leave(self) -> None:
        self._regions.pop().__exit__(None, None, None)


@contextlib.contextmanager
def _tracing_below_functorch() -> Any:
    """Trace a vmap region after batching.

    Pre-dispatch proxies sit above functorch, where a batched tensor is no node of the graph.
    """
    key = torch._C._TorchDispatchModeKey.PROXY
    tracer = _tracer()
    with proxy_tensor._temp_remove_pre_dispatch_torch_function_mode():
        pre_dispatch = torch._ops.unset_mode_pre_dispatch(key)
        try:
            with proxy_tensor.ProxyTorchDispatchMode(tracer, "real", pre_dispatch=False):
                yield
        finally:
            torch._ops._set_mode_pre_dispatch(pre_dispatch)


def _carry(op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Emit a higher-order op as it is, its bodies normalised where their operands are known.

    make_fx would run or re-trace the op, and fails on checkpoint and flex_attention.
    """
    tracer = _tracer()
    opened = _open_bodies(op, args)
    for body in pytree.tree_leaves((opened, kwargs)):
        if isinstance(body, fx.GraphModule) and not any(body is known for known in tracer.root.children()):
            tracer.root.register_module(f"body_{len(list(tracer.root.children()))}", body)
    proxy_args, proxy_kwargs = pytree.tree_map(tracer.unwrap_proxy, (opened, kwargs))
    with proxy_tensor.disable_proxy_modes_tracing(), proxy_tensor._temp_remove_pre_dispatch_torch_function_mode():
        if op is torch.ops.higher_order.tag_activation_checkpoint:
            result = fx.Interpreter(args[0]).run(*args[1:])  # its eager form wants a context that only AOT makes
        else:
            with torch.no_grad():
                result = op(*args, **kwargs)
    proxy = tracer.create_proxy("call_function", op, proxy_args, proxy_kwargs)
    proxy_tensor.track_tensor_tree(result, proxy, constant=None, tracer=tracer)
    if op is HIGHER.flex_attention:
        add_shadow(tracer, args, result)
    return result


def _open_bodies(op: HigherOrderOperator, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every body that can be opened normalised."""
    if op not in OPERANDS:
        return args
    operands = OPERANDS[op](args)
    return tuple(_open(body, operands) if isinstance(body, fx.GraphModule) else body for body in args)


def _open(body: fx.GraphModule, operands: Sequence[Any]) -> fx.GraphModule:
    """The normalised body; one that several calls share is opened once."""
    root = _tracer().root
    for known in root.children():
        if isinstance(known, fx.GraphModule) and known.meta.get(NORMALISED) is body:
            return known
    normal = reenter_make_fx(functools.partial(_interpret, body))(*operands)
    normal.meta.update(body.meta)
    normal.meta[NORMALISED] = body
    _forget_readers_of_metadata(normal.graph)
    _remove_dead_code(normal)
    root.register_module(f"body_{len(list(root.children()))}", normal)
    return normal


HIGHER = torch.ops.higher_order
OPERANDS: dict[HigherOrderOperator, Callable[[tuple[Any, ...]], Sequence[Any]]] = {
    HIGHER.tag_activation_checkpoint: lambda args: args[1:],
    HIGHER.invoke_subgraph: lambda args: args[2:],
    HIGHER.cond: lambda args: args[3],
    HIGHER.while_loop: lambda args: (*args[2], *args[3]),
}
"""What the bodies of a higher-order op are called with."""


def _tracer() -> Any:
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None, "only called while make_fx traces"
    return mode.tracer


def _forget_readers_of_metadata(graph: fx.Graph) -> None:
    """Calls that read no more of a tensor than its shape or dtype are told those instead: it may vanish then."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # torch.export's; it asserts what the fakes say
            graph.erase_node(node)
            continue
        make = {aten.expand_as.default: aten.expand.default, aten.view_as.default: aten.view.default,
                aten.reshape_as.default: aten.reshape.default}.get(node.target)
        if node.target is aten.type_as.default:
            node.target, node.args = aten.to.dtype, (node.args[0], node.meta["val"].dtype)
        elif make is not None:
            node.target, node.args = make, (node.args[0], _sizes(node))
        elif node.target in FILLED and _is_contiguous(tensor := node.meta["val"]):
            fill = FILLED[node.target]
            node.args = (_sizes(node), node.args[1] if fill is None else fill)
            node.kwargs = {"dtype": tensor.dtype, "device": tensor.device}
            node.target = aten.full.default


def _is_contiguous(tensor: Any) -> bool:
    """Whether a tensor is known to be as `full` would make it."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return tensor.layout is torch.strided and all(map(same, tensor.stride(), strides))


def _sizes(node: fx.Node) -> list[Any]:
    return [size if isinstance(size, int) else size_node(size.node.expr, node) for size in node.meta["val"].shape]


FILLED = {torch.ops.aten.full_like.default: None, torch.ops.aten.zeros_like.default: 0,
          torch.ops.aten.ones_like.default: 1}
PRODUCTS = {torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default,
            torch.ops.aten.einsum.default, torch.ops.aten.scaled_dot_product_attention.default}


def _remove_dead_code(normal: fx.GraphModule) -> None:
    """Erase what nothing reads: weights that are computed and dropped are not in use.

    A call that brings a symbol into the graph stays, and so do an op of someone else's and the shadows of flex.py.
    """

    def is_needed(node: fx.Node) -> bool:
        if node.target in PRODUCTS:
            return True  # attention whose result nobody reads is found, and removed after that
        if "unbacked_bindings" in node.meta or "stands_for" in node.meta:
            return True
        return node.is_impure() or (isinstance(node.target, OpOverload) and node.target.namespace not in OURS)

    normal.graph.eliminate_dead_code(is_needed)
    drop_useless_shadows(normal.graph)
    normal.graph.eliminate_dead_code(is_needed)


def _mark_requires_grad(normal: fx.GraphModule, inputs: Sequence[bool]) -> None:
    """Set `meta["requires_grad"]`: conservative, since traced values are detached snapshots."""
    enabled = torch.is_grad_enabled()
    rest = iter(inputs)
    for node in normal.graph.nodes:
        if node.op == "placeholder":
            recorded = next(rest)
        elif node.target is torch._C._set_grad_enabled:
            enabled, recorded = bool(node.args[0]), False
        else:
            differentiable = node.target not in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)
            recorded = enabled and differentiable and any(x.meta["requires_grad"] for x in node.all_input_nodes)
        node.meta["requires_grad"] = recorded and _is_differentiable(node.meta.get("val"))
        if node.target in OPERANDS:
            for body in (getattr(normal, x.target) for x in node.all_input_nodes if x.op == "get_attr"):
                if isinstance(body, fx.GraphModule):
                    operands = OPERANDS[node.target](node.args)
                    with torch.set_grad_enabled(enabled):
                        _mark_requires_grad(body, [isinstance(x, fx.Node) and x.meta["requires_grad"]
                                                   for x in operands])


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, tuple | list)
