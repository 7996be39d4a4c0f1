"""Attention over kept lists on a CPU: gather the kept blocks of many query blocks at once, then two batched products.

    q       [B, H, q_len, D]          fp64, fp32, bf16 or fp16; any strides
    k, v    [B, Hkv, kv_len, D | Dv]  same dtype; any strides
    kept    int32 [B, H, query blocks, capacity], counts int32 [B, H, query blocks]: see `KeptLists`
    out     [B, H, q_len, Dv]         dtype of q, laid out in memory as [B, q_len, H, Dv]
    lse     [B, H, q_len]             natural log of every row's sum; float32 (float64 for float64)

One KV head at a time: its keys and values are copied once (contiguous, in the dtype of the products, so half
precisions are computed in float32), its query blocks are sorted by how much they keep, so that those of one batch need
almost no filling up. Work is proportional to the kept blocks; the workspace is `WORKSPACE` scores and one KV head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, count_blocks
from sparsify.kernels.masks import Masks

WORKSPACE = 1 << 19  # scores per batch of query blocks: 2 MB stay in the second-level cache; 2**19 to 2**23 were tried
LOOSE = 4  # last entries of a list that causality may cut: at most 3 boundary blocks, and the padding id


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of the kept blocks; a row that sees none gives zeros.

    lse is -inf for such a row, or its sink logit.
    """
    batch, heads, q_len, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = heads // k.shape[1]
    out = q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=dtype)
    whole = q_len // QUERY_BLOCK  # query blocks of full height; a last shorter one is a batch of its own
    parts = [(0, whole, QUERY_BLOCK), (whole, 1, q_len - whole * QUERY_BLOCK)]
    for b in range(batch):
        mine_only = masks.of_batch(b)
        for kv_head in range(k.shape[1]):
            keys = _as_blocks(k[b, kv_head], dtype).mul_(scale)
            values = _as_blocks(v[b, kv_head], dtype)
            mine = slice(kv_head * group, (kv_head + 1) * group)
            for first, tiles, rows in parts:
                if tiles and rows:
                    run = slice(first * QUERY_BLOCK, first * QUERY_BLOCK + tiles * rows)
                    lists = slice(first, first + tiles)
                    _attend(q[b, mine, run].unflatten(1, (tiles, rows)), keys, values, kept[b, mine, lists],
                            counts[b, mine, lists], first * QUERY_BLOCK, k.shape[2], kv_head * group, mine_only,
                            out[b, mine, run].unflatten(1, (tiles, rows)),
                            lse[b, mine, run].unflatten(1, (tiles, rows)))
    return out, lse


def _as_blocks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x [kv_len, D] as [key blocks, KEY_BLOCK * D], zeros behind the end."""
    blocks = count_blocks(len(x), KEY_BLOCK)
    copy = torch.empty(blocks * KEY_BLOCK, x.shape[1], dtype=dtype)
    copy[: len(x)] = x
    copy[len(x):] = 0
    return copy.view(blocks, -1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, kept: Tensor, counts: Tensor, first_row: int, kv_len: int,
            first_head: int, masks: Masks, out: Tensor, lse: Tensor) -> None:
    """Write out and lse of the query blocks q [heads, query blocks, rows, D], from first_row and first_head on.

    `keys` are scaled; `masks` are those of one batch row.
    """
    rows, dtype = q.shape[2], lse.dtype
    inside = torch.arange(KEY_BLOCK, dtype=torch.int32)
    some_rows = torch.arange(first_row, first_row + rows)
    only_causal = masks.is_plain and masks.key_mask is None
    for head, tile in _batches(counts, rows):
        count = counts[head, tile]
        width, sure = int(count[0]), int(count[-1])
        ids = kept[head, tile, :width]
        found = ids.clamp(max=len(keys) - 1).flatten()  # a padding id reads some block; the mask hides it
        scores = torch.bmm(q[head, tile].to(dtype), _gather(keys, found, len(tile)).transpose(1, 2))

        loose = max(0, sure - LOOSE) if only_causal else 0
        key = (ids[:, loose:, None] * KEY_BLOCK + inside).flatten(1)
        key = key.masked_fill_(torch.arange(loose, width).repeat_interleave(KEY_BLOCK) >= count[:, None], kv_len)
        row = tile[:, None] * QUERY_BLOCK + some_rows
        scores = masks.cap(scores)
        if masks.attn_mask is not None:
            scores += _mask_at(masks.attn_mask[0], first_head + head, row, key.long().clamp(max=kv_len - 1))
        scores[:, :, loose * KEY_BLOCK:].masked_fill_(_hidden(masks, row, key, kv_len), -torch.inf)

        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        if masks.sink_logits is not None:
            sink = masks.sink_logits.to(dtype)[first_head + head, None, None]
            top = torch.maximum(top, sink)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if masks.sink_logits is not None:
            total = total + torch.exp(sink - top)
        mixed = torch.bmm(weights, _gather(values, found, len(tile)))
        out[head, tile] = mixed.div_(total.clamp(min=torch.finfo(dtype).tiny)).to(out.dtype)
        lse[head, tile] = (top + total.log()).squeeze(-1)


def _hidden(masks: Masks, row: Tensor, key: Tensor, kv_len: int) -> Tensor:
    """Which of the keys [tiles, keys] no row [tiles, rows] may see: bool, broadcastable to [tiles, rows, keys]."""
    hidden = (key >= kv_len)[:, None]
    place = key.clamp(max=kv_len - 1).long()
    if masks.causal_offset is not None:
        ends = (row + masks.causal_offset)[..., None]
        hidden = hidden | (key[:, None] > ends)
        if masks.window is not None:
            hidden = hidden | (key[:, None] <= ends - masks.window)
    if masks.key_mask is not None:
        hidden = hidden | ~masks.key_mask[0, place][:, None]
    if masks.query_documents is not None and masks.key_documents is not None:
        hidden = hidden | (masks.query_documents[0, row][..., None] != masks.key_documents[0, place][:, None])
    return hidden


def _mask_at(mask: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """What attn_mask [H or 1, q_len or 1, kv_len or 1] adds to the scores [tiles, rows, keys]."""
    place = [index if size > 1 else 0 for index, size in
             zip((head[:, None, None], row[:, :, None], key[:, None]), mask.shape, strict=True)]
    part = mask[tuple(place)]
    return part if part.is_floating_point() else torch.zeros(part.shape).masked_fill_(~part, -torch.inf)


def _gather(blocks: Tensor, ids: Tensor, tiles: int) -> Tensor:
    """The blocks `ids` [tiles * n] as [tiles, n * KEY_BLOCK, D]."""
    return blocks.index_select(0, ids).view(tiles, len(ids) // tiles * KEY_BLOCK, -1)


def _batches(counts: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Query blocks as (head, query block) index vectors, longest lists first, `WORKSPACE` scores at a time."""
    flat = counts.flatten()
    order = flat.argsort(descending=True)
    longest = flat[order].tolist()
    start = 0
    while start < len(order):
        index = order[start: start + max(1, WORKSPACE // (longest[start] * KEY_BLOCK * rows))]
        start += len(index)
        yield index // counts.shape[1], index % counts.shape[1]
