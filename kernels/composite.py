"""Exact attention in plain torch, some rows at a time: whatever no kernel covers, on any device.

    q       [B, H, q_len, D]          any floating dtype; half precisions are computed in float32
    k, v    [B, Hkv, kv_len, D | Dv]  same dtype; any strides
    out     [B, H, q_len, Dv]         in the dtype of q; a row that sees no key gives zeros
    cost    the dense products; a workspace of `WORKSPACE` scores, or one row of all heads

Source: the definition in kernels/masks.py.
"""

import torch
from torch import Tensor

from sparsify.kernels.masks import Masks

WORKSPACE = 1 << 23  # scores per step: 32 MB


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, masks: Masks) -> Tensor:
    """Softmax attention over all visible keys."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(dtype).mT, v.to(dtype)
    out = q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    sinks = None if masks.sink_logits is None else masks.sink_logits.to(dtype)[:, None, None]
    step = max(1, WORKSPACE // (batch * heads * kv_len))
    for first in range(0, q_len, step):
        queries = q[:, :, first: first + step].to(dtype)
        count = queries.shape[2]
        grouped = queries.reshape(batch, kv_heads, -1, queries.shape[3])  # the heads of a group, one behind the other
        products = (grouped @ keys).view(batch, heads, count, kv_len)
        scores = masks.of_rows(first, count).scores(products, scale).to(dtype)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        if sinks is not None:
            top = torch.maximum(top, sinks)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks - top)
        mixed = (weights.view(batch, kv_heads, -1, kv_len) @ values).view(batch, heads, count, v.shape[3])
        out[:, :, first: first + step] = (mixed / total.masked_fill(total == 0, 1.0)).to(q.dtype)
    return out
