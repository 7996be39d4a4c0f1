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

WORKSPACE = 1 << 19  # scores per batch of query blocks: 2 MB stay in the second-level cache; 2**19 to 2**23 were tried
LOOSE = 4  # last entries of a list that may need a mask: at most 3 boundary blocks, and the padding id


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           causal_offset: int | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of the kept blocks; a row that sees none gives zeros and -inf."""
    batch, heads, q_len, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = heads // k.shape[1]
    out = q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=dtype)
    whole = q_len // QUERY_BLOCK  # query blocks of full height; a last shorter one is a batch of its own
    parts = [(0, whole, QUERY_BLOCK), (whole, 1, q_len - whole * QUERY_BLOCK)]
    for b in range(batch):
        shown = None if key_mask is None else key_mask[b % len(key_mask)]
        for kv_head in range(k.shape[1]):
            keys = _as_blocks(k[b, kv_head], dtype).mul_(scale)
            values = _as_blocks(v[b, kv_head], dtype)
            mine = slice(kv_head * group, (kv_head + 1) * group)
            for first, tiles, rows in parts:
                if tiles and rows:
                    run = slice(first * QUERY_BLOCK, first * QUERY_BLOCK + tiles * rows)
                    lists = slice(first, first + tiles)
                    _attend(q[b, mine, run].unflatten(1, (tiles, rows)), keys, values, kept[b, mine, lists],
                            counts[b, mine, lists], first * QUERY_BLOCK, k.shape[2], causal_offset, shown,
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
            causal_offset: int | None, shown: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Write out and lse of the query blocks q [heads, query blocks, rows, D], the first of which starts at first_row.

    `keys` are scaled; `shown` is bool [kv_len] or None.
    """
    rows, dtype = q.shape[2], lse.dtype
    inside = torch.arange(KEY_BLOCK, dtype=torch.int32)
    for head, tile in _batches(counts, rows):
        count = counts[head, tile]
        width, sure = int(count[0]), int(count[-1])
        ids = kept[head, tile, :width]
        found = ids.clamp(max=len(keys) - 1).flatten()  # a padding id reads some block; the mask hides it
        scores = torch.bmm(q[head, tile].to(dtype), _gather(keys, found, len(tile)).transpose(1, 2))

        loose = 0 if shown is not None else max(0, sure - LOOSE)
        key = (ids[:, loose:, None] * KEY_BLOCK + inside).flatten(1)
        key = key.masked_fill_(torch.arange(loose, width).repeat_interleave(KEY_BLOCK) >= count[:, None], kv_len)
        hidden = (key >= kv_len)[:, None]
        if causal_offset is not None:
            row = tile[:, None] * QUERY_BLOCK + torch.arange(first_row, first_row + rows)
            hidden = hidden | (key[:, None] > (row + causal_offset).int()[..., None])
        if shown is not None:
            hidden = hidden | ~shown[key.clamp(max=kv_len - 1).long()][:, None]
        scores[:, :, loose * KEY_BLOCK:].masked_fill_(hidden, -torch.inf)

        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top.clamp(min=torch.finfo(dtype).min)).exp_()
        total = weights.sum(-1, keepdim=True)
        mixed = torch.bmm(weights, _gather(values, found, len(tile)))
        out[head, tile] = mixed.div_(total.clamp(min=torch.finfo(dtype).tiny)).to(out.dtype)
        lse[head, tile] = (top + total.log()).squeeze(-1)


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
