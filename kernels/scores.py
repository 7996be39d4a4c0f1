"""Triton: from products q k^T to scores, for masks that are not plain; shared by attention and selection.

Scores are in units of log2 (times log2 e), so that exp2 serves; a soft cap and a bias are brought into them here.
The kernels take what this needs in one run of arguments, in the order of `score_arguments`.

Source: the definition in kernels/masks.py; tanh is Cephes' polynomial below 0.625, where 1 - e^-2x cancels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.blocks import QUERY_BLOCK
from sparsify.kernels.masks import Masks

LOG2_E = 1.4426950408889634
NO_MASK, BOOL_MASK, BIAS = 0, 1, 2


@triton.jit
def in_float32(x):
    """A number of the launch as float32: Inductor launches with float64 where Triton does with float32."""
    return tl.full((), x, tl.float32)


@triton.jit
def cap_scores(scores, cap_log2):
    """cap * tanh(scores / cap)"""
    x = scores / cap_log2
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    size = tl.abs(x)
    shrunk = tl.exp2(size * -2.8853900817779268)  # e^-2x
    large = (1.0 - shrunk) / (1.0 + shrunk)
    return cap_log2 * tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def finish_scores(scores, row_inside, last_key, key_block, keys, key_inside, window, row_documents, key_documents,
                  attn_mask, stride_ms, stride_mt, cap_log2, WINDOWED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
                  MASK: tl.constexpr, CAPPED: tl.constexpr):
    """Cap, bias and masks on the scaled products [rows, keys] of one block; a key mask is part of `key_inside`.

    `last_key` is the last key that every row may see; `key_documents` those of this batch row; `attn_mask` points to
    this batch row, head and first row. Inside a block the mask is addressed by 32 bits: 64-bit tiles spilled.
    """
    if CAPPED:
        scores = cap_scores(scores, cap_log2)
    visible = (keys[None, :] <= last_key[:, None]) & key_inside[None, :]
    if WINDOWED:
        visible &= keys[None, :] > last_key[:, None] - window
    if HAS_DOCUMENTS:
        visible &= row_documents[:, None] == tl.load(key_documents + keys, key_inside, other=0)[None, :]
    if MASK != 0:
        ROWS: tl.constexpr = scores.shape[0]
        BLOCK: tl.constexpr = scores.shape[1]
        attn_mask += key_block.to(tl.int64) * BLOCK * stride_mt
        mask_at = attn_mask + (tl.arange(0, ROWS)[:, None] * stride_ms + tl.arange(0, BLOCK)[None, :] * stride_mt)
        loaded = row_inside[:, None] & key_inside[None, :]
        if MASK == 1:
            visible &= tl.load(mask_at, loaded, other=0) != 0
        else:
            scores += tl.load(mask_at, loaded, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def read_documents(query_documents, stride_query_documents, batch, rows, row_inside, HAS_DOCUMENTS: tl.constexpr):
    """The documents of some rows; anything where there are none."""
    documents = rows
    if HAS_DOCUMENTS:
        documents = tl.load(query_documents + batch.to(tl.int64) * stride_query_documents + rows, row_inside, other=0)
    return documents


@triton.jit
def first_peak(sinks, head, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Peak and total of rows that have met no key yet, but perhaps a sink.

    The floor keeps a row finite that sees nothing at all: its weights are exp2(-inf) = 0.
    """
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
        total = tl.where(peak == sink, 1.0, 0.0)
    return peak, total


def score_arguments(masks: Masks, placeholder: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a kernel from `window` to `sinks`, and its constants; the placeholder stands for absent tensors."""
    mask, kind = masks.attn_mask, NO_MASK
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if masks.bias is None else BIAS
        mask = mask.view(torch.uint8) if masks.bias is None else mask
        if QUERY_BLOCK * max(mask.stride()[2:]) >= 2**31:  # a block is addressed by 32 bits
            mask = mask.contiguous()
        mask_strides = tuple(mask.stride(dim) if mask.shape[dim] > 1 else 0 for dim in range(4))
    queries, keys = (None if ids is None else ids.contiguous() for ids in (masks.query_documents, masks.key_documents))
    documents = (*(placeholder if ids is None else ids for ids in (queries, keys)),
                 *(0 if ids is None or len(ids) == 1 else ids.stride(0) for ids in (queries, keys)))
    arguments = (masks.window or 0, *documents, placeholder if mask is None else mask, *mask_strides,
                 masks.softcap * LOG2_E, placeholder if masks.sink_logits is None else masks.sink_logits.contiguous())
    return arguments, {"WINDOWED": masks.window is not None, "HAS_DOCUMENTS": queries is not None, "MASK": kind,
                       "CAPPED": masks.softcap > 0, "HAS_SINKS": masks.sink_logits is not None}
