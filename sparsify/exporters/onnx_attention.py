"""The attention of an ONNX file: standard operators of opset 20 to 24, one function for every kind of site.

    function_text(Kind(causal=True, sparse=True), 23)  ->  text of the function PlannedAttention_sparse_causal

It computes what `sparsify::planned_attention` computes, in float32 whatever the dtype of q:

    inputs      q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], then `Kind.inputs`, shaped as in `sparsify.ops`;
                causal_offset is an int64 scalar
    attributes  `Kind.attributes`; edges, tolerances ...: the plan's buckets, as the op has them
    out         [B, H, L, Dv] in the dtype of q

    If few queries, or few keys in a dense bucket: all scores at once             onnx_call.py
    else:   blocks of q, k, v and masks; which pairs are allowed, cut, free       onnx_blocks.py
            If tolerance of the bucket of S is 0: attention over what is allowed
            else: which blocks are kept                                           onnx_selection.py
                  attention over them

Attention is a Loop over lists of blocks, several of about the same length a step (onnx_steps.py): in sparse buckets one
list for every query block of a head, in dense ones one for all heads of the KV head. Its softmax has a ghost where
there are sinks; else rows that see nothing are cleared behind it.
"""

from sparsify.exporters.onnx_blocks import Blocks
from sparsify.exporters.onnx_call import DOMAIN, GHOST, OPSETS, PLAN, Call, Kind
from sparsify.exporters.onnx_selection import Selection
from sparsify.exporters.onnx_steps import Steps
from sparsify.exporters.onnx_text import FLOAT, Text, Value
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK

__all__ = ["DOMAIN", "OPSETS", "PLAN", "Kind", "function_text", "selection_text"]

FEW_KEYS, FEW_FOR_OPERATOR = 512, 640
"""Up to so many keys a dense bucket makes all scores at once, or calls ONNX's own operator, where there is one and it
has a word for the masks: blocks cost more nodes than they save products. Measured in onnxruntime, two threads."""
OPERATOR_SINCE = 23
"""Opset of ONNX's operator Attention."""


def function_text(kind: Kind, opset: int) -> str:
    """The function, as `onnx.parser.parse_function` reads it."""
    text = Text()
    call = Call(text, kind)
    few, at_once = FEW_KEYS, call.at_once
    if opset >= OPERATOR_SINCE and kind.is_for_operator:
        few, at_once = FEW_FOR_OPERATOR, call.by_operator
    out = text.branch(call.is_small(few), at_once, lambda: _by_blocks(call))
    out = text.CastLike(out, text.input("q"))
    return text.function(DOMAIN, kind.name, opset, ("q", "k", "v", *kind.inputs), kind.attributes, out)


def selection_text(kind: Kind, opset: int) -> str:
    """Selection alone, for tests: bool [B, H, query blocks, key blocks], what a call of many queries keeps."""
    text = Text()
    blocks = Selection(Call(text, kind))
    kept = text.branch(blocks.call.tolerance <= text.real(0),
                       lambda: text.Expand(blocks.allowed.unsqueeze(1, 3), blocks.kept_shape), blocks.kept)
    kept = text.Transpose(kept, perm=[0, 1, 3, 2, 4]).reshape(0, -1, blocks.q_blocks, blocks.k_blocks)
    return text.function(DOMAIN, f"Selection_{kind.name}", opset, ("q", "k", "v", *kind.inputs), kind.attributes, kept)


def _by_blocks(call: Call) -> Value:
    if not call.kind.sparse:
        return _attend_to_all(Blocks(call))
    blocks = Selection(call)
    return call.text.branch(call.tolerance <= call.text.real(0), lambda: _attend_to_all(blocks),
                            lambda: attend(blocks, blocks.kept(), call.text.ints(1)))


def _attend_to_all(blocks: Blocks) -> Value:
    call = blocks.call
    shape = blocks.text.shape(call.batch, call.kv_heads, blocks.q_blocks, 1, blocks.k_blocks)
    return attend(blocks, blocks.text.Expand(blocks.allowed.unsqueeze(1, 3), shape), call.group)


def attend(blocks: Blocks, kept: Value, heads: Value) -> Value:
    """Attention of all query blocks over kept key blocks: float [B, H, L, Dv].

    kept    bool [B, Hkv, query blocks, lists, key blocks], where lists * heads = group
    heads   int64 [1]: how many heads share a list
    """
    text, call = blocks.text, blocks.call
    rows = heads * text.ints(QUERY_BLOCK)
    ghosts, lists = blocks.ghosts.reshape(-1, rows, 1), call.group // heads
    free_pairs = blocks.free.unsqueeze(1, 3)
    free, cut = ((kept & pairs).reshape(-1, blocks.k_blocks) for pairs in (free_pairs, ~free_pairs))
    steps = Steps(blocks, free, cut, blocks.q_count * lists, rows * text.ints(KEY_BLOCK), call.added is not None)
    # What is free for all lists of a step needs no bias. Behind it come blocks that are cut, and what fills up.
    longest, common = steps.most(steps.counts), text.ReduceMin(steps.firsts, text.ints(1, 2), keepdims=0)
    widths = text.Concat(common.unsqueeze(1), (longest - common).unsqueeze(1), axis=1)
    query_blocks, first_heads = steps.rows // lists, steps.rows % lists * heads
    last_block = blocks.k.size(0) - text.ints(1)
    pieces = blocks.by_list(heads).take(steps.rows)
    no_value = text.real(0).expand(steps.alike, 1, call.value_dim)

    def step(at: Value) -> Value:
        some = blocks.q_of_heads.take(pieces.take(at)).reshape(0, rows, call.dim)
        places = steps.part(steps.starts.take(at), steps.counts.take(at), longest.take(at))
        width, some_places = widths.take(at), text.Min(places, last_block)
        open_places, other_places = text.Split(some_places, width, axis=1, outputs=2)
        _, hidden_places = text.Split(places, width, axis=1, outputs=2)
        bias = blocks.bias(hidden_places, query_blocks.take(at), first_heads.take(at), heads)
        scores = [blocks.scores(some, open_places, None, heads), blocks.scores(some, other_places, bias, heads)]
        values = blocks.v.take(some_places).reshape(0, -1, call.value_dim)
        if call.kind.sinks:
            scores.append(ghosts.take(steps.rows.take(at)))
            values = text.Concat(values, no_value, axis=1)
        joined = text.Concat(*scores, axis=2)
        mixed = text.MatMul(text.Softmax(joined, axis=2), values)
        if call.kind.sinks or not call.kind.hides:
            return mixed
        sees = text.ReduceMax(joined, text.ints(2), keepdims=1) > text.real(GHOST)
        return mixed * sees.to(FLOAT)

    found, place = steps.each(step)
    return blocks.by_row(found.reshape(-1, QUERY_BLOCK, call.value_dim), place.unsqueeze(1) * heads
                         + text.range(heads.scalar()))
