"""Turn a Dynamo graph into functional-looking ATen in which attention is still whole.

Given   the graph and example inputs that Dynamo hands to a backend.
Leaves  a new graph in the dialect of torch.export before decomposition: every spelling of softmax, matmul and
        scaled_dot_product_attention is one OpOverload. `meta["val"]` holds fake values with Dynamo's own symbols, so a
        comparison on them is a guard; `meta["stack_trace"]` and `meta["nn_module_stack"]` point at the user's code;
        `meta["requires_grad"]` says whether autograd will record the node. The given graph is untouched.
Never   functionalises (mutations stay as they were written), differentiates, or opens a higher-order op: bodies of
        checkpoint, cond, flex_attention ... are carried whole.

    torch: q.matmul(k.transpose(2, 3)).softmax(-1)   ->   aten.transpose.int, aten.matmul.default, aten.softmax.int
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._functorch import predispatch
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace `gm` into pre-dispatch ATen."""
    mode, fakes = _fake_inputs(example_inputs)

    def interpret(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta(), _Interpreter(gm) as interpreter:
            return interpreter.run(*args)

    # Pre-dispatch tracing turns grad mode switches of the graph into calls: ours must be as it was afterwards.
    with mode, torch.set_grad_enabled(torch.is_grad_enabled()):
        trace = make_fx(interpret, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True,
                        _error_on_data_dependent_ops=False)
        normal = trace(*fakes)
    normal.meta.update(gm.meta)
    _mark_requires_grad(normal.graph, fakes)
    return normal


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


class _Interpreter(fx.Interpreter):
    """Replays a Dynamo graph under make_fx; every new node keeps the stack trace and module of the old one.

    A context manager: regions that an exception leaves open (autocast, vmap) are closed.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._regions: list[contextlib.AbstractContextManager[Any]] = []
        self._vmap_depth = 0

    def __enter__(self) -> "_Interpreter":
        return self

    def __exit__(self, *error: object) -> None:
        while self._regions:
            self._regions.pop().__exit__(None, None, None)

    def run_node(self, node: fx.Node) -> Any:
        with fx.traceback.set_current_meta(node):
            if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                return _carry_whole(node.target, args, kwargs)
            if node.target is torch.amp.autocast_mode._enter_autocast:
                args, _ = self.fetch_args_kwargs_from_env(node)
                return self._enter(torch.autocast(*args))  # under make_fx the plain call only leaves a node
            if node.target is torch.amp.autocast_mode._exit_autocast:
                return self._leave()
            if node.target is predispatch._vmap_increment_nesting:
                self._vmap_depth += 1
                if self._vmap_depth == 1:
                    self._enter(_tracing_below_functorch())
            result = super().run_node(node)
            if node.target is predispatch._vmap_decrement_nesting:
                self._vmap_depth -= 1
                if self._vmap_depth == 0:
                    self._leave()
            return result

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


def _carry_whole(op: HigherOrderOperator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Emit a higher-order op as it is: make_fx would run or re-trace it, and fails on checkpoint and flex_attention."""
    tracer = _tracer()
    for body in pytree.tree_leaves((args, kwargs)):
        if isinstance(body, fx.GraphModule) and not any(body is known for known in tracer.root.children()):
            tracer.root.register_module(f"body_{len(list(tracer.root.children()))}", body)
    proxy_args, proxy_kwargs = pytree.tree_map(tracer.unwrap_proxy, (tuple(args), kwargs))
    with proxy_tensor.disable_proxy_modes_tracing(), proxy_tensor._temp_remove_pre_dispatch_torch_function_mode():
        if op is torch.ops.higher_order.tag_activation_checkpoint:
            result = fx.Interpreter(args[0]).run(*args[1:])  # its eager form wants a context that only AOT makes
        else:
            with torch.no_grad():
                result = op(*args, **kwargs)
    proxy = tracer.create_proxy("call_function", op, proxy_args, proxy_kwargs)
    return proxy_tensor.track_tensor_tree(result, proxy, constant=None, tracer=tracer)


def _tracer() -> Any:
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None, "only called while make_fx traces"
    return mode.tracer


def _mark_requires_grad(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Set `meta["requires_grad"]`: conservative, since traced values are detached snapshots."""
    enabled = torch.is_grad_enabled()
    rest = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            x = next(rest)
            recorded = isinstance(x, torch.Tensor) and x.requires_grad
        elif node.target is torch._C._set_grad_enabled:
            enabled, recorded = bool(node.args[0]), False
        else:
            differentiable = node.target not in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)
            recorded = enabled and differentiable and any(x.meta["requires_grad"] for x in node.all_input_nodes)
        node.meta["requires_grad"] = recorded and _is_differentiable(node.meta.get("val"))


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, tuple | list)
