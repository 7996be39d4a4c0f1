"""What estimates are judged by: the true share of attention that the rows of a query block give every key block.

    q       [B, H, q_len, D]     any floating dtype, any strides; computed in float32, float64 stays
    k       [B, Hkv, kv_len, D]  as q; query head h reads KV head h // (H // Hkv)
    masks   see kernels/masks.py; every one of them
    peaks   [B, H, query blocks, key blocks]  the largest share that a row of the query block gives the key block
    mass    the same shape: the mean share over the query block's rows
    cost    one product QK^T and one exponential a score; rows that see no key give zeros

Some query blocks of all heads at a time, against no more keys than they may see: the workspace is `WORKSPACE` scores,
or one query block of all heads. For calibration and measurement, on any device, with no wait for it.
Source: the definition, kernels/oracle.py.
"""

import torch
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, count_blocks
from sparsify.kernels.masks import Masks

WORKSPACE = {"cpu": 1 << 21, "cuda": 1 << 27}  # scores at a time: 8 MB stays near a core's cache; 512 MB fills a GPU


def true_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks) -> tuple[Tensor, Tensor]:
    """Peaks and mass of all blocks, as the head of this file says."""
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    rows, blocks = count_blocks(q_len, QUERY_BLOCK), count_blocks(kv_len, KEY_BLOCK)
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(dtype).transpose(-1, -2)
    peaks, mass = q.new_zeros(2, batch, heads, rows, blocks, dtype=dtype)
    room = WORKSPACE.get(q.device.type, WORKSPACE["cpu"])
    step = max(1, room // (batch * heads * QUERY_BLOCK * kv_len))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        start, stop = first * QUERY_BLOCK, min(last * QUERY_BLOCK, q_len)
        seen = kv_len
        if masks.causal_offset is not None:
            seen = min(kv_len, max(0, stop + masks.causal_offset))
        if seen == 0:
            continue
        part = q[:, :, start:stop].to(dtype).reshape(batch, kv_heads, -1, dim)
        products = (part @ keys[..., :seen]).view(batch, heads, stop - start, seen)
        shares = _shares(products, scale, masks.of_rows(start, stop - start).of_keys(seen))
        upto = shares.shape[-1]
        shares = torch.nn.functional.pad(shares, (0, 0, 0, (last - first) * QUERY_BLOCK - (stop - start)))
        shares = shares.unflatten(2, (-1, QUERY_BLOCK))
        peaks[:, :, first:last, :upto] = shares.amax(3)
        inside = (q_len - torch.arange(first, last, device=q.device) * QUERY_BLOCK).clamp(max=QUERY_BLOCK)
        mass[:, :, first:last, :upto] = shares.sum(3) / inside[:, None]
    return peaks, mass


def _shares(products: Tensor, scale: float, masks: Masks) -> Tensor:
    """Every row's share of attention per key block; `products` may be overwritten."""
    scores = masks.scores(products, scale)
    top = scores.amax(-1, keepdim=True)
    if masks.sink_logits is not None:
        sinks = masks.sink_logits.to(scores.dtype)[:, None, None]
        top = torch.maximum(top, sinks)
    top = top.clamp(min=torch.finfo(scores.dtype).min)  # a row that sees nothing: not -inf - -inf
    weights = scores.sub_(top).exp_()
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % KEY_BLOCK))
    weights = weights.unflatten(-1, (-1, KEY_BLOCK)).sum(-1)
    total = weights.sum(-1, keepdim=True)
    if masks.sink_logits is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.clamp(min=torch.finfo(scores.dtype).tiny)
