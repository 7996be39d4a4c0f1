"""Small grids: kept lists cut into pieces for a card that the query blocks alone would not fill, and their merge.

    counts    [B, H, query blocks]     int32 entries of each list, at least 1
    units     [slots]                  int64 pieces, longest first: see `cut_lists`; negative: none
    counter   [1]                      int32, 0: for who takes units from a queue
    firsts    [B * H * query blocks + 1]
                                       int32 first slot of each query block, whose pieces follow each other
    partial   [slots, 128, Dp]         float32 output of each piece, divided by its own sum; Dp: Dv as padded
    sums      [slots, 128]             float32, log2 of each row's sum over its piece alone, without sinks
    out, lse  as in attend.py
    errors    none

Few heads, short queries and long keys (a chunk of a prompt, on one card of several) give fewer query blocks than the
card has multiprocessors. A list is then cut into ranges of entries, each attended by itself; a row that sees no key of
a piece has a sum of 0 there, and the merge gives that piece no weight. Sinks are counted once: in the merge.

How many pieces: the host knows sizes alone and decides if any (`units_for`); the counts are on the device, and so is
the length of a piece, all entries over the units wanted. So heads of 1 % and of 100 % end at the same time.

Partial outputs are float32: rounded to 16 bits, they would add to the output an error of the size of its own rounding.

Source: Flash-Decoding's merge; work divided evenly as in Stream-K (arXiv 2301.03598).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.blocks import QUERY_BLOCK, count_blocks
from sparsify.kernels.launch import launched
from sparsify.kernels.scores import first_peak

# By arithmetic (benchmarks/notes/attention.md): pieces cost a launch for the merge, some microseconds, and lists of
# fewer blocks gain about as much.
FEWEST_KEY_BLOCKS = 64
SHORTEST = 8  # key blocks of a piece: at d = 128 its output is written and read like four of them
MOST_ROWS = 128  # query blocks that are cut
MOST_UNITS = 512
# A unit is slot << SLOT_AT | row << ROW_AT | first tile << FIRST_AT | tiles, in one integer.
FIRST_AT: tl.constexpr = tl.constexpr(22)
ROW_AT: tl.constexpr = tl.constexpr(44)
SLOT_AT: tl.constexpr = tl.constexpr(52)
TILES: tl.constexpr = tl.constexpr((1 << 22) - 1)  # the bits of a number of tiles: enough for 2**28 keys
ROW: tl.constexpr = tl.constexpr((1 << 8) - 1)
MERGED_VALUES = 512  # of a piece, in one program of the merge
MERGED_PIECES = 8  # read at once, so that their latencies are one
NUM_WARPS = 4


@dataclass(frozen=True)
class Cut:
    """Lists in pieces."""

    units: Tensor
    counter: Tensor
    firsts: Tensor

    @property
    def slots(self) -> int:
        """Room for pieces."""
        return len(self.units)


def units_for(rows: int, key_blocks: int, programs: int) -> int:
    """Pieces to cut the lists of `rows` query blocks into, all together, for a card with room for `programs`; 0: none.

    Cut is where at least half of the card would idle. Whole pieces are at most this many; what is left of each list
    is one more.
    """
    if 2 * rows > programs or rows > MOST_ROWS or key_blocks < FEWEST_KEY_BLOCKS:
        return 0
    return min(programs, MOST_UNITS - MOST_ROWS)


@launched
@triton.jit(do_not_specialize=["rows", "slots", "wanted", "shortest", "idle"])
def _cut_lists(counts, units, firsts, counter, rows, slots, wanted, shortest, idle, TILE: tl.constexpr,
               ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Program r cuts list r; all of them count all lists, so that nobody waits for another."""
    row = tl.program_id(0)
    every = tl.arange(0, ROWS)
    tiles = tl.load(counts + every, every < rows, other=0) // TILE
    length = tl.maximum((tl.sum(tiles, 0) + wanted - 1) // wanted, shortest)
    whole = tiles // length
    rest = tiles - whole * length
    pieces = whole + (rest > 0).to(tl.int32)
    own = every == row
    before = every < row
    own_tiles = tl.sum(tl.where(own, tiles, 0), 0)
    own_whole = tl.sum(tl.where(own, whole, 0), 0)
    own_rest = own_tiles - own_whole * length
    first = tl.sum(tl.where(before, pieces, 0), 0)
    own_pieces = own_whole + (own_rest > 0).to(tl.int32)
    tl.store(firsts + row + 1, first + own_pieces)
    tl.store(firsts, 0, row == 0)

    # Whole pieces first, then the rests, longest first: who takes them in this order ends about when all others do.
    longer = (rest > own_rest) | ((rest == own_rest) & before)
    place_of_rest = tl.sum(whole, 0) + tl.sum(longer.to(tl.int32), 0)
    piece = tl.arange(0, SLOTS)
    start = piece * length
    unit = ((first + piece).to(tl.int64) << SLOT_AT) | (row.to(tl.int64) << ROW_AT)
    unit |= start.to(tl.int64) << FIRST_AT
    unit |= tl.minimum(own_tiles - start, length).to(tl.int64)
    place = tl.where(piece < own_whole, tl.sum(tl.where(before, whole, 0), 0) + piece, place_of_rest)
    tl.store(units + place, unit, piece < own_pieces)

    # Behind the pieces there is nothing; but programs that cannot do without a first unit get a tile that nobody reads.
    total = tl.sum(pieces, 0)
    nothing = tl.where(piece < idle, (piece.to(tl.int64) << SLOT_AT) | 1, -1)
    tl.store(units + piece, nothing, (piece >= total) & (piece < slots) & (row == 0))
    tl.store(counter, 0, row == 0)


def cut_lists(counts: Tensor, tile: int, wanted: int, idle: int = 0) -> Cut:
    """Launch `_cut_lists`: about `wanted` pieces, in tiles of `tile` key blocks.

    The first `idle` units are never negative: where there are fewer pieces, the others are one tile each, for a slot
    that the merge does not read.
    """
    rows = counts.numel()
    units = torch.empty(wanted + rows, dtype=torch.int64, device=counts.device)
    counter = torch.empty(1, dtype=torch.int32, device=counts.device)
    firsts = torch.empty(rows + 1, dtype=torch.int32, device=counts.device)
    _cut_lists[(rows,)](counts, units, firsts, counter, rows, len(units), wanted, max(1, SHORTEST // tile), idle,
                        TILE=tile, ROWS=MOST_ROWS, SLOTS=MOST_UNITS, num_warps=NUM_WARPS)
    return Cut(units, counter, firsts)


@triton.jit
def read_unit(unit):
    """Slot, query block, first tile and tiles of a piece."""
    first = ((unit >> FIRST_AT) & TILES).to(tl.int32)
    row = ((unit >> ROW_AT) & ROW).to(tl.int32)
    return (unit >> SLOT_AT).to(tl.int32), row, first, (unit & TILES).to(tl.int32)


@launched
@triton.jit(do_not_specialize=["query_blocks", "H", "L"])
def _merge_pieces(partial, sums, firsts, sinks, out, lse, query_blocks, H, L, QUERY_BLOCK: tl.constexpr,
                  ROWS: tl.constexpr, PIECES: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
                  HAS_SINKS: tl.constexpr):
    PARTS: tl.constexpr = QUERY_BLOCK // ROWS
    query_block = tl.program_id(0) // PARTS
    in_block = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    head_row = query_block // query_blocks
    batch, head = head_row // H, head_row % H
    rows = query_block % query_blocks * QUERY_BLOCK + in_block
    row_inside = rows < L
    dims = tl.arange(0, DV_PAD)
    peak, total = first_peak(sinks, head, ROWS, HAS_SINKS)
    merged = tl.zeros([ROWS, DV_PAD], tl.float32)
    behind = tl.load(firsts + query_block + 1)
    for first in tl.range(tl.load(firsts + query_block), behind, PIECES):
        slots = first + tl.arange(0, PIECES)
        inside = (slots < behind)[:, None] & row_inside[None, :]
        at = slots[:, None] * QUERY_BLOCK + in_block[None, :]
        own = tl.load(sums + at, inside, other=-float("inf"))
        values = tl.load(partial + at[:, :, None] * DV_PAD + dims[None, None, :], inside[:, :, None], other=0.0)
        new_peak = tl.maximum(peak, tl.max(own, 0))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(own - new_peak[None, :])
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        peak = new_peak
    merged = merged / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out + ((batch.to(tl.int64) * L + rows[:, None]) * H + head) * DV + dims[None, :]
    tl.store(out_at, merged.to(out.dtype.element_ty), row_inside[:, None] & (dims < DV)[None, :])
    tl.store(lse + head_row.to(tl.int64) * L + rows, (peak + tl.log2(total)) * 0.6931471805599453, row_inside)


def merge_pieces(partial: Tensor, sums: Tensor, cut: Cut, sink_logits: Tensor | None, out: Tensor,
                 lse: Tensor) -> None:
    """Launch `_merge_pieces`, which fills `out` [B, H, L, Dv], in memory [B, L, H, Dv], and `lse` [B, H, L]."""
    B, H, L, DV = out.shape
    query_blocks, DV_PAD = count_blocks(L, QUERY_BLOCK), partial.shape[2]
    rows = MERGED_VALUES // DV_PAD
    _merge_pieces[(B * H * query_blocks * (QUERY_BLOCK // rows),)](
        partial, sums, cut.firsts, partial if sink_logits is None else sink_logits.contiguous(), out, lse,
        query_blocks, H, L, QUERY_BLOCK=QUERY_BLOCK, ROWS=rows, PIECES=MERGED_PIECES, DV=DV, DV_PAD=DV_PAD,
        HAS_SINKS=sink_logits is not None, num_warps=NUM_WARPS)


def room_for(cut: Cut, value_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised `partial` and `sums`, for values padded to `value_dim`."""
    device = cut.units.device
    return (torch.empty(cut.slots, QUERY_BLOCK, value_dim, dtype=torch.float32, device=device),
            torch.empty(cut.slots, QUERY_BLOCK, dtype=torch.float32, device=device))
