"""Find the attention sites of a graph.

Given   ATen from normalise.py: softmax, matmul and SDPA still whole, fake values set.
Leaves  the graph untouched; one AttentionSite or Refused per softmax and per SDPA call, in graph order.
Never   guesses: what cannot be read exactly comes back Refused. No module class, no model is known here.

    scores = matmul(q, transpose(k))                q: [B, H, L, D]   k: [B, H, S, D]
    probs  = softmax(add(mul(scores, scale), mask))
    out    = matmul(probs, v)                    ->  AttentionSite(q, k, v, scale, mask, out)

The walk starts at the softmax: up through casts, masks and scales to the product with the keys, down through casts and
inert dropout to the product with the values. Every node on it must have one user, the next: then nothing else reads
the scores or the weights, and no in-place op changes them behind our back.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from sparsify.passes.graph import (
    agree,
    arguments,
    aten,
    is_inert_dropout,
    is_tensor,
    mutations,
    origin,
    same,
    same_shape,
    shape,
    storage_root,
    value,
)
from sparsify.passes.site import NEEDS_GRADIENTS, AttentionSite, Form, MaskTerm, Refused, Scale

CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default, aten.clone.default,
         aten.alias.default}
SCALINGS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
DIVISIONS = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}
WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
VIEWS_OF_SAME_SHAPE = {aten.view.default, aten.reshape.default, aten.expand.default}
RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def find_attention(gm: fx.GraphModule) -> list[AttentionSite | Refused]:
    """List every attention of `gm`, those inside bodies of higher-order ops too."""
    writes = _Writes(gm.graph)
    found: list[AttentionSite | Refused] = []
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            found += _read_higher_order(node)
        elif node.target in READERS:
            found.append(READERS[node.target](node, writes))
    return found


def _refuse(form: Form, node: fx.Node, why: str) -> Refused:
    return Refused(form, origin(node), why, node.name)


def _read_sdpa(node: fx.Node, writes: "_Writes") -> AttentionSite | Refused:
    named = arguments(node)
    query, key, mask, dropout, scale = (named[x] for x in ("query", "key", "attn_mask", "dropout_p", "scale"))
    if dropout != 0:
        return _refuse("sdpa", node, "dropout is active: dropping key blocks would change what it draws")
    if scale is None:
        scale = int(shape(query)[-1]) ** -0.5  # fixes a symbolic head dim: no model calls with another
    masks: tuple[MaskTerm, ...] = ()
    if mask is not None:
        masks = (MaskTerm("keep" if value(mask).dtype == torch.bool else "add", mask),)
    site = AttentionSite("sdpa", origin(node), query, key, named["value"], False, (Scale(scale),), masks,
                         named["is_causal"], node)
    return _complete(site, node, writes)


def _read_softmax(softmax: fx.Node, writes: "_Writes") -> AttentionSite | Refused:
    rank = len(shape(softmax))
    dim = softmax.args[1]
    if dim not in (-1, rank - 1):
        return _refuse("softmax chain", softmax, f"softmax runs over dim {dim}, the keys are dim {rank - 1}")
    above = _walk_up(softmax, softmax.args[0], (), ())
    if isinstance(above, Refused):
        return above
    product, scales, masks = above
    below = _walk_down(softmax)
    if isinstance(below, Refused):
        return below
    if not same_shape(shape(product), shape(softmax)):
        return _refuse("softmax chain", softmax, f"a mask widens the scores from {shape(product)} to {shape(softmax)}")
    factors, weighted = arguments(product), arguments(below)
    site = AttentionSite("softmax chain", origin(below), factors["self"], factors["other"], weighted["other"], True,
                         scales, masks, False, below)
    return _complete(site, product, writes)


def _walk_up(user: fx.Node, node: Any, scales: tuple[Scale, ...], masks: tuple[MaskTerm, ...],
             ) -> tuple[fx.Node, tuple[Scale, ...], tuple[MaskTerm, ...]] | Refused:
    """From the softmax to the product with the keys: (product, scales, masks)."""
    if not is_tensor(node):
        return _refuse("softmax chain", user, "the scores are no tensor of this graph")
    if len(node.users) != 1:
        return _refuse("softmax chain", node, "the scores are used elsewhere too")
    target, args = node.target, node.args
    if target is aten.matmul.default:
        return node, scales, masks
    if target in CASTS or (target in VIEWS_OF_SAME_SHAPE and same_shape(shape(node), shape(args[0]))):
        return _walk_up(node, args[0], scales, masks)
    if target in SCALINGS | DIVISIONS:
        if is_tensor(args[1]):
            return _refuse("softmax chain", node, "the scale of the scores is a tensor")
        if "rounding_mode" in node.kwargs:
            return _refuse("softmax chain", node, "the scores are rounded")
        return _walk_up(node, args[0], (Scale(args[1], target in DIVISIONS), *scales), masks)

    terms: list[tuple[Any, MaskTerm]] = []  # (where the scores may be, what hides them)
    if target in ADDITIONS and node.kwargs.get("alpha", 1) == 1 and is_tensor(args[1]):
        terms = [(args[0], MaskTerm("add", args[1]))]
        if target is aten.add.Tensor:  # either operand may be the scores; in place it is the first
            terms.append((args[1], MaskTerm("add", args[0])))
    elif target in FILLS:
        terms = [(args[0], MaskTerm("hide", args[1], args[2]))]
    elif target in WHERES:
        terms = [(args[1], MaskTerm("keep", args[0], args[2])), (args[2], MaskTerm("hide", args[0], args[1]))]
    if not terms:
        return _refuse("softmax chain", node, f"{target} stands between the keys and the softmax")
    if scales:
        return _refuse("softmax chain", node, "the scores are scaled after they are masked")
    results = [_walk_up(node, scores, scales, (term, *masks)) for scores, term in terms]
    return next((result for result in results if not isinstance(result, Refused)), results[0])


def _walk_down(softmax: fx.Node) -> fx.Node | Refused:
    """From the softmax to the product with the values."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return _refuse("softmax chain", node, "the attention weights are used elsewhere too")
        (user,) = node.users
        if user.target is aten.matmul.default and user.args[0] is node and user.args[1] is not node:
            return user
        if user.op == "output":
            return _refuse("softmax chain", node, "the attention weights are returned")
        if user.target in (aten.dropout.default, aten.dropout_.default) and not is_inert_dropout(user):
            return _refuse("softmax chain", user, "dropout is active: dropping key blocks would change what it draws")
        same_view = user.target in VIEWS_OF_SAME_SHAPE and same_shape(shape(user), shape(node))
        if not (user.target in CASTS or is_inert_dropout(user) or same_view):
            return _refuse("softmax chain", user, f"{user.target} stands between the softmax and the values")
        node = user


def _read_opaque(node: fx.Node, writes: "_Writes") -> Refused:
    return _refuse("other", node, f"{node.target} is called directly")


def _read_higher_order(node: fx.Node) -> Iterable[Refused]:
    """Attention inside a higher-order op: recorded, never rewritten."""
    if node.target is torch.ops.higher_order.flex_attention:
        yield _refuse("other", node, "flex_attention is called directly")
        return
    root = node.graph.owning_module
    for attribute in node.all_input_nodes:
        body = getattr(root, str(attribute.target), None) if attribute.op == "get_attr" else None
        for inner in body.graph.nodes if isinstance(body, fx.GraphModule) else ():
            name = inner.target if inner.op == "call_method" else getattr(inner.target, "__name__", "")
            if isinstance(inner.target, HigherOrderOperator):
                yield _refuse("other", inner, f"it is inside a {inner.target} inside a {node.target}")
            elif name in ("softmax", "scaled_dot_product_attention"):
                form: Form = "sdpa" if name != "softmax" else "softmax chain"
                yield _refuse(form, inner, f"it is inside the body of {node.target}")


READERS: dict[Any, Callable[[fx.Node, "_Writes"], AttentionSite | Refused]] = {
    aten.scaled_dot_product_attention.default: _read_sdpa,
    aten.softmax.int: _read_softmax,
    aten._softmax.default: _read_softmax,
    aten._native_multi_head_attention.default: _read_opaque,
    aten._transformer_encoder_layer_fwd.default: _read_opaque,
}


class _Writes:
    """Where the graph writes in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.by_storage = mutations(graph)

    def between(self, tensor: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node after `first` and before `last` writes to the storage of `tensor`."""
        start, end = self.position[first], self.position[last]
        return any(start < self.position[w] < end for w in self.by_storage.get(storage_root(tensor), ()))


def _complete(site: AttentionSite, product: fx.Node, writes: _Writes) -> AttentionSite | Refused:
    """Un-repeat grouped KV heads, then check what holds for both forms. `product` is the node that reads the keys."""

    def refuse(why: str) -> Refused:
        return _refuse(site.form, product, why)

    operands = {"query": site.query, "key": site.key, "value": site.value}
    for name, node in operands.items():
        if len(shape(node)) != 4:
            return refuse(f"{name} has {len(shape(node))} dims; [batch, heads, length, head_dim] is read")
        if value(node).dtype not in DTYPES:
            return refuse(f"{name} is {value(node).dtype}; the ops take float16, bfloat16 and float32")
    if site.output.meta["requires_grad"]:
        return refuse(NEEDS_GRADIENTS)
    compute, scores = value(site.output).dtype, value(product).dtype
    if scores.itemsize > compute.itemsize:
        return refuse(f"the scores are {scores} but the output is {compute}")

    # The op reads its operands where the output is; what each was read by until now comes second.
    key, key_reader, transposed = site.key, product, site.key_transposed
    if transposed and _swaps_last_dims(key):
        key, key_reader, transposed = arguments(key)["self"], key, False
    grouped_key, grouped_key_reader = (key, key_reader) if transposed else _unrepeat(key, key_reader)
    grouped_value, grouped_value_reader = _unrepeat(site.value, site.output)
    if same(shape(grouped_key)[1], shape(grouped_value)[1]):
        key, key_reader = grouped_key, grouped_key_reader
    else:
        grouped_value, grouped_value_reader = site.value, site.output
    site = replace(site, key=key, value=grouped_value, key_transposed=transposed)
    for name, node, reader in (("query", site.query, product), ("key", key, key_reader),
                               ("value", grouped_value, grouped_value_reader)):
        if writes.between(node, reader, site.output):
            return refuse(f"the {name} is written to in place before the output is computed")

    batch, heads, q_len, dim = shape(site.query)
    key_batch, kv_heads, kv_len, key_dim = (shape(key)[i] for i in ((0, 1, 3, 2) if transposed else (0, 1, 2, 3)))
    value_batch, value_heads, value_len, value_dim = shape(site.value)
    if not (agree(batch, key_batch) and agree(batch, value_batch)):
        return refuse(f"query, key and value have batches {batch}, {key_batch} and {value_batch}")
    if not agree(kv_heads, value_heads):
        return refuse(f"{kv_heads} key heads but {value_heads} value heads")
    if not agree(heads % kv_heads, 0):
        return refuse(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    if not (agree(dim, key_dim) and agree(kv_len, value_len)):
        return refuse(f"key {shape(key)} does not fit query {shape(site.query)} and value {shape(site.value)}")
    if not same_shape(shape(site.output), (batch, heads, q_len, value_dim)):
        return refuse(f"the output is {shape(site.output)}, not [batch, heads, query length, value dim]")
    return site


def _swaps_last_dims(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        named = arguments(node)
        return {named["dim0"] % 4, named["dim1"] % 4} == {2, 3}
    if node.target is aten.permute.default:
        return [dim % 4 for dim in arguments(node)["dims"]] == [0, 1, 3, 2]
    return node.target is aten.mT.default


def _unrepeat(node: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The grouped heads behind `repeat_interleave(x, n, 1)` or `x[:, :, None].expand(...).reshape(...)`.

    Returns the tensor and its reader; the arguments where nothing is repeated.
    """
    if node.target is aten.repeat_interleave.self_int:
        named = arguments(node)
        if named["dim"] in (1, -3):
            return named["self"], node
    if node.target not in RESHAPES:
        return node, reader
    expanded = _skip_copies(node.args[0])
    if expanded.target is not aten.expand.default or len(shape(expanded)) != 5:
        return node, reader
    unsqueezed = _skip_copies(expanded.args[0])
    if unsqueezed.target is not aten.unsqueeze.default or unsqueezed.args[1] not in (2, -3):
        return node, reader
    grouped = arguments(unsqueezed)["self"]
    batch, heads, repeats, length, dim = shape(expanded)
    if not (same_shape(shape(grouped), (batch, heads, length, dim))
            and same_shape(shape(node), (batch, heads * repeats, length, dim))):
        return node, reader
    return grouped, unsqueezed


def _skip_copies(node: Any) -> fx.Node:
    """Up through copies and slices that take everything."""
    while (node.target in (aten.contiguous.default, aten.clone.default)
           or (node.target is aten.slice.Tensor and same_shape(shape(node), shape(node.args[0])))):
        node = node.args[0]
    return node
