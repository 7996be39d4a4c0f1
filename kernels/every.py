"""Kept lists of all allowed blocks, in one launch: what exact attention by lists walks.

    masks           causality and a window (kernels/masks.py); nothing else decides which blocks are allowed here
    kept, counts    see `KeptLists`; as kernels/rule.py's `every_block` makes them
    errors          none here: `covers` says which masks these lists are for
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE, KeptLists, capacity, count_blocks
from sparsify.kernels.launch import launched
from sparsify.kernels.masks import Masks

WIDTH = 1024  # entries at once


@launched
@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "room", "L", "S", "offset", "window"])
def _list_every_block(kept, counts, query_blocks, key_blocks, room, L, S, offset, window, ROWS: tl.constexpr,
                      BLOCK: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    first_row = row % query_blocks * ROWS
    last_row = tl.minimum(first_row + ROWS, L) - 1
    behind = tl.maximum(tl.minimum((last_row + offset + BLOCK) >> 6, key_blocks), 0)  # arithmetic shift: floor
    # The first block that holds a key behind the window's far edge; a ragged block may end before it.
    nearest = tl.maximum(first_row + offset - window + 1, 0)
    first = tl.minimum(tl.where(nearest < S, nearest >> 6, key_blocks), behind)
    count = behind - first
    even = tl.maximum((count + TILE - 1) // TILE * TILE, TILE)
    for start in range(0, room, WIDTH):
        entry = start + tl.arange(0, WIDTH)
        block = tl.where(entry < count, first + entry, tl.where(entry < even, key_blocks + entry - count, 0))
        tl.store(kept + row.to(tl.int64) * room + entry, block, entry < room)
    tl.store(counts + row, even)


def every_block(q: Tensor, kv_len: int, masks: Masks) -> KeptLists:
    """Launch `_list_every_block` for queries [B, H, q_len, D] on `kv_len` keys."""
    B, H, L, _ = q.shape
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(kv_len, KEY_BLOCK)
    kept = torch.empty(B, H, query_blocks, capacity(key_blocks), dtype=torch.int32, device=q.device)
    counts = torch.empty(B, H, query_blocks, dtype=torch.int32, device=q.device)
    offset = kv_len if masks.causal_offset is None else masks.causal_offset
    window = L + kv_len + abs(offset) if masks.window is None else masks.window
    _list_every_block[(counts.numel(),)](
        kept, counts, query_blocks, key_blocks, kept.shape[3], L, kv_len, offset, window, ROWS=QUERY_BLOCK,
        BLOCK=KEY_BLOCK, TILE=TILE, WIDTH=WIDTH, num_warps=4)
    return KeptLists(kept, counts)


def covers(masks: Masks) -> bool:
    """Whether causality and the window alone say which blocks are allowed."""
    return masks.key_mask is None and masks.query_documents is None
