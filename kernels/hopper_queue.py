"""The queue of the Hopper forward: all query blocks, longest list first.

    counts    [B, H, query blocks]   int32 entries of each list
    queue     [B * H * query blocks] int64 (row << 32 | tiles)
    counter   [1]                    int32, 0: the place that is taken next, less what programs take at once
    errors    none
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.launch import launched

LEVELS = 256  # list lengths the queue tells apart
CHUNK = 2048  # rows sorted at once
NUM_WARPS = 16


@launched
@triton.jit(do_not_specialize=["rows", "pair_capacity"])
def _fill_queue(counts, queue, cursors, rows, pair_capacity, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
                TILE: tl.constexpr):
    """Counting sort of all query blocks, longest list first; behind the cursors lies the queue's counter."""
    levels = tl.arange(0, LEVELS)
    population = tl.zeros([LEVELS], tl.int32)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        pairs = tl.load(counts + row, row < rows, other=0) // TILE
        level = LEVELS - 1 - (pairs * (LEVELS - 1)) // pair_capacity
        population += tl.histogram(level, LEVELS, mask=row < rows)
    tl.store(cursors + levels, tl.cumsum(population, 0) - population)
    tl.store(cursors + LEVELS, 0)
    tl.debug_barrier()
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        pairs = tl.load(counts + row, row < rows, other=0) // TILE
        level = LEVELS - 1 - (pairs * (LEVELS - 1)) // pair_capacity
        place = tl.atomic_add(cursors + level, 1, mask=row < rows, sem="relaxed")
        tl.store(queue + place, (row.to(tl.int64) << 32) | pairs, mask=row < rows)


def fill_queue(counts: Tensor, tile_capacity: int, tile: int) -> tuple[Tensor, Tensor]:
    """Launch `_fill_queue` for lists of at most `tile_capacity` tiles of `tile` key blocks: queue and counter."""
    rows = counts.numel()
    queue = torch.empty(rows, dtype=torch.int64, device=counts.device)
    cursors = torch.empty(LEVELS + 1, dtype=torch.int32, device=counts.device)
    _fill_queue[(1,)](counts, queue, cursors, rows, tile_capacity, LEVELS=LEVELS, CHUNK=CHUNK, TILE=tile,
                      num_warps=NUM_WARPS)
    return queue, cursors[LEVELS:]
