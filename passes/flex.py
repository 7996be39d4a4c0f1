"""Write the mathematics of every flex_attention call beside it, where the finder can read it.

Given   a flex_attention call that normalise.py is tracing, its operands as traced fake tensors.
Leaves  the call as it was, and behind it a *shadow* that nothing reads: product, scale, score_mod and mask_mod on
        index grids, softmax, product. `meta["stands_for"]` of its last node is the output of the call,
        `meta["shadow_of"]` of its softmax the call. A site that is rewritten replaces the call's output; otherwise the
        shadow is dead code, and would be far too large to run. `meta["refusal"]` of a call without a shadow says why.
Never   reads the blocks of a block mask. Where they tell full blocks from partial ones, as create_block_mask makes
        them, they follow from the mask_mod; where they do not, they may hide more (MoBA, NSA), and the call stays.

    flex_attention(q, k, v, score_mod, (..., mask_mod), scale)[0]
        <-  softmax(where(mask_mod(b, h, i, j), score_mod(q @ k^T * scale, b, h, i, j), -inf)) @ v
            with b [B, 1, 1, 1], h [1, H, 1, 1], i [1, 1, L, 1], j [1, 1, 1, S]
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

ONE_BLOCK = 1 << 30
"""The block size of a call without a block mask (torch 2.13, `_LARGE_SPARSE_BLOCK_SIZE`)."""
FULL_BLOCKS = 4
"""Where the numbers of full blocks are in a block mask as a tuple, None without (torch 2.13, `BlockMask.as_tuple`)."""
ELEMENTWISE = {"__and__", "__or__", "absolute", "alias", "clone", "detach", "divide", "floor_divide", "full",
               "full_like", "greater", "greater_equal", "index", "less", "less_equal", "lift_fresh_copy", "masked_fill",
               "multiply", "negative", "new_full", "new_ones", "new_zeros", "not_equal", "ones", "ones_like", "rsub",
               "scalar_tensor", "select", "subtract", "to", "_to_copy", "true_divide", "where", "zeros",
               "zeros_like"}
"""Ops of a mod, beside those tagged pointwise, that do to a grid what they do to each of its scalars."""
ALWAYS = {aten.new_ones.default, aten.ones.default, aten.ones_like.default}
"""What a mask_mod that hides nothing returns."""


class _NotInlined(Exception):
    """A mod cannot be written on grids."""


def add_shadow(tracer: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """Trace the shadow of a flex_attention call whose `outputs` are tracked already."""
    output = _node(outputs[0], tracer)
    call = output.args[0]
    assert isinstance(call, fx.Node)
    try:
        attended, weights = _attention(tracer, args, outputs[0].dtype)
    except _NotInlined as why:
        call.meta["refusal"] = str(why)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        call.meta["refusal"] = f"its mods do not run on index grids: {type(error).__name__}: {error}".splitlines()[0]
    else:
        last = _node(attended, tracer)
        last.meta["stands_for"] = output
        _node(weights, tracer).meta["shadow_of"] = call
        last.append(output)  # what takes its place may read the shadow


def drop_useless_shadows(graph: fx.Graph) -> None:
    """Refuse the calls of which more than the output is read: a rewrite would leave the call there."""
    for node in list(graph.nodes):
        output = node.meta.get("stands_for")
        if output is None:
            continue
        call = output.args[0]
        if any(user is not output and user.users for user in call.users):
            call.meta["refusal"] = "the logsumexp or the maxima of flex_attention are used"
        if "refusal" in call.meta or not output.users:
            _erase(node)


def _erase(node: fx.Node) -> None:
    """Erase a node, and what only it read."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op in ("call_function", "get_attr"):
            _erase(source)


def _node(x: Tensor, tracer: Any) -> fx.Node:
    node: fx.Node = proxy_tensor.get_proxy_slot(x, tracer).proxy.node
    return node


def _attention(tracer: Any, args: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = args
    query, key, value = (_cast(x, dtype) for x in (query, key, value))  # autocast casts inside the call
    key, value = (_repeated(x, query) for x in (key, value))
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    grids = [torch.arange(size, device=query.device).view([-1 if i == dim else 1 for i in range(4)])
             for dim, size in enumerate(sizes)]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    scores = _cast(query @ key.transpose(-2, -1), precise) * scale
    scores = _on_grids(tracer, "score_mod", score_mod, scores, *grids, *score_buffers)
    one_block = all(statically_known_true(size >= ONE_BLOCK) for size in block_mask[-3:-1])
    visible = _on_grids(tracer, "mask_mod", block_mask[-1], *grids, *mask_buffers)
    if _node(visible, tracer).target not in ALWAYS:
        if block_mask[FULL_BLOCKS] is None and not one_block:
            raise _NotInlined("a block mask without full blocks: its blocks may hide keys that its mask_mod shows")
        scores = torch.where(visible, scores, float("-inf"))
    elif not one_block:
        raise _NotInlined("a block mask without a mask_mod: which keys it hides stands in its blocks alone")
    weights = torch.softmax(scores, -1)
    return _cast(weights, dtype) @ value, weights


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values for every head and batch of the query."""
    batch, heads, length, dim = x.shape
    if not statically_known_true(heads == query.shape[1]):
        repeats = query.shape[1] // heads
        x = x.unsqueeze(2).expand(batch, heads, repeats, length, dim).reshape(batch, query.shape[1], length, dim)
    return x.expand(query.shape[0], -1, -1, -1) if statically_known_true(batch == 1) else x


def _on_grids(tracer: Any, name: str, mod: Any, *args: Any) -> Tensor:
    """Evaluate a mod for all scores at once; only where each op does to a grid what it does to a scalar."""
    if not isinstance(mod, fx.GraphModule):
        raise _NotInlined(f"the {name} is no graph")
    last = next(iter(reversed(tracer.graph.nodes)))
    result = _OnGrids(mod, name).run(*args)
    for node in reversed(tracer.graph.nodes):
        if node is last:
            break
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool) or node.op == "get_attr":
            continue
        if not (isinstance(node.target, OpOverload) and not node.target._schema.is_mutable
                and (node.target.overloadpacket.__name__ in ELEMENTWISE or torch.Tag.pointwise in node.target.tags)):
            raise _NotInlined(f"the {name} calls {node.target}, which is not elementwise")
    assert isinstance(result, Tensor)
    return result


@dataclass(frozen=True)
class _Row:
    """A tensor of which the first dims are indexed: `table[h]` before the `[i]` of `table[h][i]`."""

    tensor: Tensor
    indices: tuple[Any, ...]


class _OnGrids(fx.Interpreter):
    """Runs a mod, written for scalars, on grids: an index must be complete, or its grids would meet as dims."""

    def __init__(self, mod: fx.GraphModule, name: str) -> None:
        super().__init__(mod)
        self.name = name

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem and isinstance(args[0], Tensor | _Row):
            row = args[0] if isinstance(args[0], _Row) else _Row(args[0], ())
            indices = (*row.indices, *(args[1] if isinstance(args[1], tuple) else (args[1],)))
            if not all(isinstance(i, Tensor | int | torch.SymInt) for i in indices):
                raise _NotInlined(f"the {self.name} slices a tensor")
            whole = len(indices) == row.tensor.dim()
            return row.tensor[indices] if whole else _Row(row.tensor, indices)
        self._refuse_rows(*args, *kwargs.values())
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_rows(*args, *kwargs.values())
        return super().call_method(target, args, kwargs)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_rows(*args)
        return super().output(target, args, kwargs)

    def _refuse_rows(self, *args: Any) -> None:
        if any(isinstance(x, _Row) for x in pytree.tree_leaves(args)):
            raise _NotInlined(f"the {self.name} computes with a whole row of a tensor")
