"""Graphs for pass tests: capture a function as the backend sees it, and watch what a rewritten one hands to the ops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.backend import compiled_call
from sparsify.passes import AttentionSite, Refused, SiteRecord, find_attention, normalise, run
from sparsify.plan import Plan


def compiled(function: Callable[..., Any], backend: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`function` through Dynamo under the settings of `sparsify.compile`."""
    torch._dynamo.reset()
    return compiled_call(function, backend, None, fullgraph=True, **settings)


def capture(function: Callable[..., Any], *inputs: Any, **settings: Any) -> fx.GraphModule:
    """The normalised graph of `function(*inputs)`."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(normalise(gm, example_inputs))
        return gm.forward

    compiled(function, backend, **settings)(*inputs)
    return graphs[-1]


def find(function: Callable[..., Any], *inputs: Any) -> list[AttentionSite | Refused]:
    """The sites of `function(*inputs)`."""
    found: list[AttentionSite | Refused] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found[:] = find_attention(normalise(gm, example_inputs))
        return gm.forward

    compiled(function, backend)(*inputs)
    return found


@dataclass
class Rewritten:
    """A function that runs rewritten: its last records, its graphs, and the arguments of the ops in its last call."""

    call: Callable[..., Any]
    records: list[SiteRecord] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    ops: list[tuple[Any, ...]] = field(default_factory=list)


def rewritten(function: Callable[..., Any], plan: Plan | None = None, **settings: Any) -> Rewritten:
    """`function` under `plan` (dense unless given)."""
    result = Rewritten(function)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph, result.records[:] = run(gm, example_inputs, plan or Plan.dense())
        result.graphs.append(graph)

        def run_and_watch(*args: Any) -> Any:
            with _OpArguments() as seen:
                output = graph(*args)
            result.ops[:] = seen.calls
            return output

        return run_and_watch

    result.call = compiled(function, backend, **settings)
    return result


def qkv(q_len: int, kv_len: int | None = None, batch: int = 2, heads: int = 4, kv_heads: int | None = None,
        dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    kv_shape = (batch, kv_heads or heads, kv_len or q_len, dim)
    return torch.randn(batch, heads, q_len, dim), torch.randn(kv_shape), torch.randn(kv_shape)


class _OpArguments(TorchDispatchMode):
    """Records the arguments of every sparsify op that runs."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparsify":
            self.calls.append(args)
        return func(*args, **(kwargs or {}))
