"""Peaks of selection for Hopper, in Gluon: split summaries in eight bits, and no exponential unit.

    q        [B, H, L, D]      fp16 or bf16; D is 64 or 128; last dimension dense
    k        [B, Hkv, S, D]    as q; query head h reads KV head h // (H // Hkv)
    peaks    [B, H, blocks of 128 rows, blocks of 64 keys]  float32, the largest share of attention that any row of the
                               query block gives the key block, as the split summaries estimate it; 1 for edge blocks
                               (around the causal edge, or ragged), 0 for blocks that no row sees
    key j is visible to query i when j <= i + causal_offset (None: always), and by the key mask
    errors   none here: the op checks shapes, `why_not` says which calls these kernels do not cover

Three steps. The range of the keys, from a sample; keys and summaries, rounded to e4m3 around the mean key of their head
(a constant of a row moves no share); then for every row the log sum over its edge blocks, key by key, which is the
reference of its exponentials, the masses of all other blocks, their sum, and the maximum over rows of their shares.

Singles i and i + m/2, counted from the farthest, are a pair, and the larger stands for both, for exponentials are what
takes the time: a share is underestimated by half at most, where both weigh the same. Exponentials are two
multiply-adds: scores become the bits of a bfloat16, that is 2^x with its mantissa on the chord (Schraudolph 1999,
centred: within 3 % either way). They are relative to the edge blocks and not to a running maximum: between 2^-100 and
2^64 they are what they should be; a mass beyond that counts as 2^64 and its block is kept.

Two programs a multiprocessor take query block after query block. In each one warp loads keys and summaries (TMA) and a
warpgroup weighs: the two halves of the query block in turns, their queries in registers. Masses wait for the row sums
in a scratch that stays in L2, and come back in another order, so that the maximum over rows crosses no warps.

Source: this project's own (ARCHITECTURE.md, "selection").
"""

import math
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsify.kernels.attend import positive_scale
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, count_blocks
from sparsify.kernels.hopper_coverage import why_not_here
from sparsify.kernels.launch import descriptor, launched, multiprocessors
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E
from sparsify.kernels.statistics import split_keys

CHUNK = 32  # key blocks at once
STAGES = 8  # tiles of summaries in flight
EDGE = 2  # edge blocks at once; a causal diagonal has two, or three
SAMPLES = 512  # keys of a head that the scale of e4m3 is taken from
CHANNELS = 16  # that a program samples
QUANTISE_WARPS = 2  # 8K keys: .026 ms; 4 warps .033, 1 warp .051
LARGEST = 448.0  # of e4m3
HEADROOM = 8.0  # a key beyond it is cut off there: it outweighs all others as it is
LOWEST_EXPONENT, EXPONENTS = -100.0, 164.0
PROGRAMS_PER_MULTIPROCESSOR = 2  # one fetches queries or adds up while the other multiplies
REGISTERS = 128  # for 2 programs of 8 warps; the loader's four of them give most of their share to the others
LOADER_REGISTERS = 24


@launched
@triton.jit(do_not_specialize=["S", "Hkv", "spacing"])
def _sample_keys(k, key_mask, ranges, stride_b, stride_h, stride_s, stride_d, stride_mask_batch, stride_mask, S, Hkv,
                 spacing, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, HAS_KEY_MASK: tl.constexpr):
    """Mean, lowest and highest of some channels over the visible among the sampled keys of a head."""
    head_row = tl.program_id(1)
    k += (head_row // Hkv).to(tl.int64) * stride_b + (head_row % Hkv).to(tl.int64) * stride_h
    dims = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    positions = tl.arange(0, SAMPLES) * spacing
    visible = positions < S
    if HAS_KEY_MASK:
        mask_at = key_mask + (head_row // Hkv).to(tl.int64) * stride_mask_batch + positions * stride_mask
        visible &= tl.load(mask_at, visible, other=0) != 0
    inside = visible[:, None]
    keys_at = k + positions.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
    keys = tl.load(keys_at, inside, other=0.0).to(tl.float32)
    out = ranges + head_row.to(tl.int64) * (3 * D) + dims
    tl.store(out, tl.sum(keys, 0) / tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0))
    tl.store(out + D, tl.min(tl.where(inside, keys, float("inf")), 0))
    tl.store(out + 2 * D, tl.max(tl.where(inside, keys, -float("inf")), 0))


@launched
@triton.jit(do_not_specialize=["S", "Hkv", "room", "MASKS"])
def _quantise_keys(k, key_mask, ranges, vectors, whole, counts, units, stride_b, stride_h, stride_s, stride_d,
                   stride_mask_batch, stride_mask, S, Hkv, room, MASKS, SINGLES: tl.constexpr,
                   BLOCK: tl.constexpr, D: tl.constexpr, LARGEST: tl.constexpr, HEADROOM: tl.constexpr,
                   HAS_KEY_MASK: tl.constexpr):
    """One key block in e4m3, less the head's center: variance, mean and singles into `vectors`, keys into `whole`."""
    key_block, head_row = tl.program_id(0), tl.program_id(1)
    batch = head_row // Hkv
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    range_at = ranges + head_row.to(tl.int64) * (3 * D) + dims
    center = tl.load(range_at)
    low = tl.load(range_at + D)
    high = tl.load(range_at + 2 * D)
    reach = tl.max(tl.maximum(high - center, center - low), 0) * HEADROOM
    # No variance between two bounds is larger than a quarter of their squared distance (Popoviciu).
    spread = tl.max((high - low) * (high - low), 0) * (0.25 * HEADROOM)
    reach = tl.where((reach > 0.0) & (reach < float("inf")), reach, 1.0)  # infinite where no sampled key is visible
    spread = tl.where((spread > 0.0) & (spread < float("inf")), spread, 1.0)
    if key_block == 0:
        tl.store(units + head_row * 2, reach / LARGEST)
        tl.store(units + head_row * 2 + 1, spread / LARGEST)

    k += batch.to(tl.int64) * stride_b + (head_row % Hkv).to(tl.int64) * stride_h
    positions = key_block * BLOCK + rows
    visible = positions < S
    if HAS_KEY_MASK:
        mask_at = key_mask + batch.to(tl.int64) * stride_mask_batch + positions * stride_mask
        visible &= tl.load(mask_at, visible, other=0) != 0
    keys_at = k + positions.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
    keys = tl.load(keys_at, visible[:, None], other=0.0).to(tl.float32)
    rank, mean, variance, count, _ = split_keys(keys, visible, dims < D, rows, SINGLES)
    finest = vectors.dtype.element_ty
    out = vectors + head_row.to(tl.int64) * ((SINGLES + 2) * room * D) + key_block * D + dims
    tl.store(out, (variance * (LARGEST / spread)).to(finest))
    tl.store(out + room * D, ((mean - center) * (LARGEST / reach)).to(finest))
    small = ((keys - center[None, :]) * (LARGEST / reach)).to(finest)
    HALF: tl.constexpr = (SINGLES + 1) // 2
    place = tl.where(rank < HALF, 2 * rank, 2 * (rank - HALF) + 1)  # pairs lie side by side
    singles = out[None, :] + ((place + 2) * room * D)[:, None]
    tl.store(singles, small, (rank < SINGLES)[:, None])
    whole += (head_row.to(tl.int64) * room + key_block) * (BLOCK * D)
    tl.store(whole + rows[:, None] * D + dims[None, :], small)
    if HAS_KEY_MASK:
        if (head_row % Hkv == 0) & (batch < MASKS):
            tl.store(counts + batch * room + key_block, count)


@triton.jit
def _edges_of(first_row, offset, L, S, key_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first edge block of a query block, and the first block that no row of it sees.

    Edge blocks begin with the last one that the first row sees, so that every row sees a key of them.
    """
    last_row = tl.minimum(first_row + ROWS, L) - 1
    allowed = tl.maximum(tl.minimum((last_row + offset + BLOCK) >> 6, key_blocks), 0)  # arithmetic shift: floor
    first = tl.maximum(tl.minimum((first_row + offset) >> 6, S // BLOCK), 0)
    return tl.minimum(first, allowed), allowed


@triton.jit
def _reference_of(query_block, query_blocks, first, allowed, S, BLOCK: tl.constexpr):
    """The blocks that exponentials refer to, first and behind the last: the edge, or the one beside the diagonal."""
    beside = query_block * (S // BLOCK) // query_blocks
    has_edge = first < allowed
    return tl.where(has_edge, first, tl.minimum(beside, allowed)), \
        tl.where(has_edge, allowed, tl.minimum(beside + 1, allowed))


@gluon.jit
def _load_tile(source, row, tiles, full, empty, step, STAGES: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Start copying rows of `source`, as many as a tile has, into the stage of this step."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), ROWS * D)
    tma.async_copy_global_to_shared(source, [row, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def _loader(vectors, whole, tiles, edge_tile, bars, query_blocks, heads, H, GROUP, L, S, offset, key_blocks, room,
            VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
            EDGE: gl.constexpr, CHUNK: gl.constexpr, D: gl.constexpr):
    """Feed the warpgroup: the keys of the edge, then the summaries of chunk after chunk."""
    full, empty, edge_full, edge_empty = bars
    step = 0
    edge_step = 0
    for unit in range(gl.program_id(0), query_blocks * heads, gl.num_programs(0)):
        head_row = unit % heads
        kv_row = (head_row // H) * (H // GROUP) + (head_row % H) // GROUP
        query_block = query_blocks - 1 - unit // heads
        first, allowed = _edges_of(query_block * ROWS, offset, L, S, key_blocks, ROWS, BLOCK)
        from_block, to_block = _reference_of(query_block, query_blocks, first, allowed, S, BLOCK)
        for block in range(from_block, to_block, EDGE):
            _load_tile(whole, (kv_row * room + block) * BLOCK, edge_tile, edge_full, edge_empty, edge_step, 1,
                       EDGE * BLOCK, D)
            edge_step += 1
        for chunk in range(0, gl.cdiv(first, CHUNK)):
            for vector in gl.static_range(VECTORS):
                _load_tile(vectors, (kv_row * VECTORS + vector) * room + chunk * CHUNK, tiles, full, empty, step,
                           STAGES, CHUNK, D)
                step += 1


@gluon.jit
def _product(query, tiles, step, zero, STAGES: gl.constexpr):
    """Start the product of queries with the tile of this step."""
    return warpgroup_mma(query, tiles.index(step % STAGES).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _wait_tile(full, step, STAGES: gl.constexpr):
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def _read_queries(q, unit, units, stride_qb, stride_qh, stride_qs, heads, query_blocks, H, L, local, dims,
                  ROWS: gl.constexpr):
    """Some queries of a unit of work, by their place in it; zeros past the end of either."""
    head_row = unit % heads
    rows = (query_blocks - 1 - unit // heads) * ROWS + local
    at = (q + (head_row // H).to(gl.int64) * stride_qb + (head_row % H).to(gl.int64) * stride_qh
          + rows.to(gl.int64)[:, None] * stride_qs + dims[None, :])
    return gl.load(at, ((rows < L) & (unit < units))[:, None], other=0.0)


@gluon.jit
def _quantise_queries(read, q_tile, squares_tile):
    """Queries and their squares in e4m3, into their tiles; the unit of every row."""
    # The unit of a row is a power of two: its largest element is 128 to 256 units, its largest square 64 to 256.
    largest = gl.maximum(gl.max(gl.abs(read), 1).to(gl.float32), 1.0e-20)
    power = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    query = read.to(gl.float32)
    q_tile.store((query * (128.0 / power)[:, None]).to(gl.float8e4nv))
    query = query * (8.0 / power)[:, None]
    squares_tile.store((query * query).to(gl.float8e4nv))
    return power * (1.0 / 128.0)


@gluon.jit
def _exp2(x):
    """2^x; not by gl.exp2, which takes three instructions more for results below 2^-126."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _add_edge(scores, peak, total, score_unit, keys, last_key, shown):
    """Online softmax: peak and sum of every row, with the scores of some keys of its edge."""
    scores = gl.where((keys[None, :] <= last_key[:, None]) & shown[None, :], scores, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * score_unit)
    exponentials = _exp2(scores * score_unit[:, None] - new_peak[:, None])
    return new_peak, total * _exp2(peak - new_peak) + gl.sum(exponentials, 1)


@gluon.jit
def _frozen_gain(spread, log2_rest, EXPONENTS: gl.constexpr):
    """What the variance of the rest adds to its mean score, and its number, in units of EXPONENTS."""
    return gl.where(spread < 2.0 * log2_rest, spread * (0.5 / EXPONENTS) + log2_rest * (1.0 / EXPONENTS),
                    gl.sqrt(spread * (2.0 / (EXPONENTS * EXPONENTS)) * log2_rest))


@gluon.jit
def _first_exponentials(scores, slope, start):
    """2^x as bfloat16, x = (scores * slope + start) * EXPONENTS + LOWEST_EXPONENT, see the head of this file.

    The second multiply-add, by 128 EXPONENTS, leaves the bits of the bfloat16 in the low half of a float of size 2^23;
    5 of them are the centring.
    """
    return gl.inline_asm_elementwise("""{
        .reg .f32 a, b;
        fma.rn.sat.f32 a, $1, $3, $5;
        fma.rn.sat.f32 b, $2, $4, $6;
        fma.rn.f32 a, a, 0f46A40000, 0f4B400D7B;
        fma.rn.f32 b, b, 0f46A40000, 0f4B400D7B;
        prmt.b32 $0, a, b, 0x5410;
    }""", "=r,f,f,f,f,f,f", [scores, slope, start], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def _add_exponentials(masses, scores, slope, start):
    """masses + `_first_exponentials`"""
    return gl.inline_asm_elementwise("""{
        .reg .f32 a, b;
        .reg .b32 p;
        fma.rn.sat.f32 a, $2, $4, $6;
        fma.rn.sat.f32 b, $3, $5, $7;
        fma.rn.f32 a, a, 0f46A40000, 0f4B400D7B;
        fma.rn.f32 b, b, 0f46A40000, 0f4B400D7B;
        prmt.b32 p, a, b, 0x5410;
        add.rn.bf16x2 $0, $1, p;
    }""", "=r,r,f,f,f,f,f,f", [masses, scores, slope, start], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def _weighted(masses, weights):
    """Packed products of two bfloat16."""
    return gl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [masses, weights], dtype=gl.bfloat16,
                                     is_pure=True, pack=2)


@gluon.jit
def _place(rows, columns, ROWS: gl.constexpr, CHUNK: gl.constexpr):
    """Where masses lie in the scratch: by chunk, then by 8 x 8 fragments, which a warp writes as 128 bytes in a row."""
    column = columns % CHUNK
    place = ((rows // 8 * (CHUNK * 8) + rows % 8 * 8)[:, None]
             + (columns // CHUNK * (ROWS * CHUNK) + column // 8 * 64 + column % 8)[None, :])
    return gl.max_contiguous(gl.multiple_of(place, [1, 8]), [1, 8])


@gluon.constexpr_function
def _rank_of(vector, singles):
    """How many keys must be farther from the mean for this vector to be there: the mean comes behind all singles."""
    place, half = vector - 2, (singles + 1) // 2
    if place < 0:
        return singles
    return place // 2 + half * (place % 2)


@gluon.jit
def _weigher(q, key_mask, counts, units_of_keys, peaks, scratch, q_tiles, row_weights, tiles, edge_tile, bars,
             stride_qb, stride_qh, stride_qs, stride_mask_batch, stride_mask, stride_counts, heads, query_blocks,
             key_blocks, H, GROUP, L, S, offset, scale_log2, spread_log2, log2_count, VECTORS: gl.constexpr,
             STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, EDGE: gl.constexpr, CHUNK: gl.constexpr,
             D: gl.constexpr, LOWEST: gl.constexpr, EXPONENTS: gl.constexpr, HAS_KEY_MASK: gl.constexpr):
    """Weigh query block after query block. Those at the end of all heads come first: they are the long ones.

    Two halves of 64 rows take turns: one multiplies while the other adds up.
    """
    full, empty, edge_full, edge_empty = bars
    HALF: gl.constexpr = ROWS // 2
    SWEPT: gl.constexpr = 128
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 32])
    product_rows: gl.constexpr = gl.SliceLayout(1, products)
    operand: gl.constexpr = gl.DotOperandLayout(0, products, 4)
    edge_products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE * BLOCK, 32])
    edge_rows: gl.constexpr = gl.SliceLayout(1, edge_products)
    edge_operand: gl.constexpr = gl.DotOperandLayout(0, edge_products, 4)
    query_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    swept: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])
    zero = gl.zeros([HALF, CHUNK], gl.float32, products)
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, products))
    local_rows = gl.arange(0, HALF, product_rows)
    edge_zero = gl.zeros([HALF, EDGE * BLOCK], gl.float32, edge_products)
    edge_columns = gl.arange(0, EDGE * BLOCK, gl.SliceLayout(0, edge_products))
    query_local = gl.arange(0, HALF, gl.SliceLayout(1, query_layout))
    dims = gl.arange(0, D, gl.SliceLayout(0, query_layout))
    scratch_at = _place(local_rows, columns, ROWS, CHUNK)
    swept_columns = gl.arange(0, SWEPT, gl.SliceLayout(0, swept))
    swept_at = _place(gl.arange(0, ROWS, gl.SliceLayout(1, swept)), swept_columns, ROWS, CHUNK)

    step = 0
    edge_step = 0
    units = query_blocks * heads
    read0 = _read_queries(q, gl.program_id(0), units, stride_qb, stride_qh, stride_qs, heads, query_blocks, H, L,
                          query_local, dims, ROWS)
    read1 = _read_queries(q, gl.program_id(0), units, stride_qb, stride_qh, stride_qs, heads, query_blocks, H, L,
                          HALF + query_local, dims, ROWS)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        head_row = unit % heads
        batch = head_row // H
        kv_row = batch * (H // GROUP) + head_row % H // GROUP
        query_block = query_blocks - 1 - unit // heads
        first_row = query_block * ROWS
        first, allowed = _edges_of(first_row, offset, L, S, key_blocks, ROWS, BLOCK)
        chunks = gl.cdiv(first, CHUNK)

        row_unit0 = gl.convert_layout(_quantise_queries(read0, q_tiles.index(0), q_tiles.index(2)), product_rows)
        row_unit1 = gl.convert_layout(_quantise_queries(read1, q_tiles.index(1), q_tiles.index(3)), product_rows)
        fence_async_shared()
        queries0 = q_tiles.index(0).load(operand)
        queries1 = q_tiles.index(1).load(operand)
        key_unit = gl.load(units_of_keys + kv_row * 2) * scale_log2
        rows = first_row + local_rows
        last_key0 = gl.where(rows < L, gl.minimum(rows + offset, S - 1), -1)
        last_key1 = gl.where(rows + HALF < L, gl.minimum(rows + HALF + offset, S - 1), -1)
        peak0 = gl.full([HALF], -1.0e30, gl.float32, edge_rows)
        total0 = gl.zeros([HALF], gl.float32, edge_rows)
        peak1 = peak0
        total1 = total0
        edge_unit0 = gl.convert_layout(row_unit0 * key_unit, edge_rows)
        edge_unit1 = gl.convert_layout(row_unit1 * key_unit, edge_rows)
        edge_key0 = gl.convert_layout(last_key0, edge_rows)
        edge_key1 = gl.convert_layout(last_key1, edge_rows)
        from_block, to_block = _reference_of(query_block, query_blocks, first, allowed, S, BLOCK)
        for block in range(from_block, to_block, EDGE):
            mbarrier.wait(edge_full.index(0), edge_step & 1)
            scores0 = warpgroup_mma(gl.convert_layout(queries0, edge_operand), edge_tile.index(0).permute([1, 0]),
                                    edge_zero, use_acc=False, is_async=True)
            scores1 = warpgroup_mma(gl.convert_layout(queries1, edge_operand), edge_tile.index(0).permute([1, 0]),
                                    edge_zero, use_acc=False, is_async=True)
            keys = block * BLOCK + edge_columns
            shown = keys < gl.minimum(S, to_block * BLOCK)
            if HAS_KEY_MASK:
                mask_at = key_mask + batch.to(gl.int64) * stride_mask_batch + keys * stride_mask
                shown = gl.load(mask_at, shown, other=0) != 0
            scores0 = warpgroup_mma_wait(1, deps=(scores0,))
            peak0, total0 = _add_edge(scores0, peak0, total0, edge_unit0, keys, edge_key0, shown)
            scores1 = warpgroup_mma_wait(0, deps=(scores1,))
            mbarrier.arrive(edge_empty.index(0), count=1)
            peak1, total1 = _add_edge(scores1, peak1, total1, edge_unit1, keys, edge_key1, shown)
            edge_step += 1
        peak0 = gl.convert_layout(peak0, product_rows)
        peak1 = gl.convert_layout(peak1, product_rows)
        total0 = gl.convert_layout(total0, product_rows)
        total1 = gl.convert_layout(total1, product_rows)
        # A row that sees no key there (padding) refers to 0: scores of keys around their mean are not far from it.
        # Scores in units of EXPONENTS, from LOWEST up, are what the exponentials take.
        start0 = (-gl.where(total0 > 0.0, peak0 + gl.log2(total0), 0.0) - LOWEST) * (1.0 / EXPONENTS)
        start1 = (-gl.where(total1 > 0.0, peak1 + gl.log2(total1), 0.0) - LOWEST) * (1.0 / EXPONENTS)
        total0 = gl.where((total0 > 0.0) & (allowed > first), 1.0, 0.0)
        total1 = gl.where((total1 > 0.0) & (allowed > first), 1.0, 0.0)
        slope0 = row_unit0 * (key_unit * (1.0 / EXPONENTS))
        slope1 = row_unit1 * (key_unit * (1.0 / EXPONENTS))
        key_spread = gl.load(units_of_keys + kv_row * 2 + 1) * spread_log2 * 256.0
        spread_unit0 = row_unit0 * row_unit0 * key_spread
        spread_unit1 = row_unit1 * row_unit1 * key_spread

        for chunk in range(0, chunks):
            log2_rest = log2_count
            if HAS_KEY_MASK:
                count = gl.load(counts + batch * stride_counts + chunk * CHUNK + columns)
                log2_rest = gl.log2(gl.maximum(count - (VECTORS - 2), 1).to(gl.float32))[None, :]
            _wait_tile(full, step, STAGES)
            ahead = _product(q_tiles.index(2), tiles, step, zero, STAGES)
            for vector in gl.static_range(VECTORS):
                now = ahead
                if vector == 0:
                    ahead = _product(q_tiles.index(3), tiles, step, zero, STAGES)
                else:
                    ahead = _product(queries1, tiles, step, zero, STAGES)
                now = warpgroup_mma_wait(1, deps=(now,))
                if HAS_KEY_MASK:
                    if vector > 0:  # the mean if there is a rest, a single if there are so many keys
                        here = (count > _rank_of(vector, VECTORS - 2))[None, :]
                        now = gl.where(here, now, -float("inf"))
                if vector == 0:
                    gain0 = _frozen_gain(now * spread_unit0[:, None], log2_rest, EXPONENTS)
                elif vector == 1:
                    masses0 = _first_exponentials(now, slope0[:, None], start0[:, None] + gain0)
                elif vector % 2 == 0 and vector + 1 < VECTORS:
                    held0 = now
                else:
                    if vector % 2 == 1:
                        now = gl.maximum(now, held0)
                    masses0 = _add_exponentials(masses0, now, slope0[:, None], start0[:, None])
                now = ahead
                if vector + 1 < VECTORS:
                    _wait_tile(full, step + 1, STAGES)
                    ahead = _product(queries0, tiles, step + 1, zero, STAGES)
                    now = warpgroup_mma_wait(1, deps=(now,))
                else:
                    now = warpgroup_mma_wait(0, deps=(now,))
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
                if HAS_KEY_MASK:
                    if vector > 0:
                        now = gl.where(here, now, -float("inf"))
                if vector == 0:
                    gain1 = _frozen_gain(now * spread_unit1[:, None], log2_rest, EXPONENTS)
                elif vector == 1:
                    masses1 = _first_exponentials(now, slope1[:, None], start1[:, None] + gain1)
                elif vector % 2 == 0 and vector + 1 < VECTORS:
                    held1 = now
                else:
                    if vector % 2 == 1:
                        now = gl.maximum(now, held1)
                    masses1 = _add_exponentials(masses1, now, slope1[:, None], start1[:, None])
            if (chunk + 1) * CHUNK > first:
                seen = (chunk * CHUNK + columns < first)[None, :]
                masses0 = gl.where(seen, masses0, gl.zeros_like(masses0))
                masses1 = gl.where(seen, masses1, gl.zeros_like(masses1))
            total0 += gl.sum(masses0.to(gl.float32), 1)
            total1 += gl.sum(masses1.to(gl.float32), 1)
            gl.store(scratch + chunk * (ROWS * CHUNK) + scratch_at, masses0)
            gl.store(scratch + chunk * (ROWS * CHUNK) + HALF * CHUNK + scratch_at, masses1)

        read0 = _read_queries(q, unit + gl.num_programs(0), units, stride_qb, stride_qh, stride_qs, heads,
                              query_blocks, H, L, query_local, dims, ROWS)
        read1 = _read_queries(q, unit + gl.num_programs(0), units, stride_qb, stride_qh, stride_qs, heads,
                              query_blocks, H, L, HALF + query_local, dims, ROWS)
        row_weights.slice(0, HALF, 0).store(_weight(total0, last_key0))
        row_weights.slice(HALF, HALF, 0).store(_weight(total1, last_key1))
        gl.thread_barrier()  # the masses, too, are read back by other threads
        weights = row_weights.load(gl.SliceLayout(1, swept)).to(gl.bfloat16)[:, None]
        out = peaks + (head_row * query_blocks + query_block).to(gl.int64) * key_blocks
        for start in range(0, chunks * CHUNK, SWEPT):
            blocks = start + swept_columns
            masses = gl.load(scratch + start * ROWS + swept_at, (blocks < chunks * CHUNK)[None, :], other=0.0)
            gl.store(out + blocks, gl.max(_weighted(masses, weights), 0).to(gl.float32), blocks < first)
        for start in range(first // SWEPT * SWEPT, key_blocks, SWEPT):
            blocks = start + swept_columns
            gl.store(out + blocks, gl.where(blocks < allowed, 1.0, 0.0), (blocks >= first) & (blocks < key_blocks))
        gl.thread_barrier()


@gluon.jit
def _weight(total, last_key):
    """One over the sum of a row. A mass cut off at 2^64 may be any share: it counts as all.

    A row of nothing but the lowest masses sees no key.
    """
    return gl.where((last_key >= 0) & (total > 1.0e-24), 1.0 / gl.minimum(total, 1.8446744e19), 0.0)


@launched
@gluon.jit(do_not_specialize=["heads", "query_blocks", "key_blocks", "room", "H", "GROUP", "L", "S", "offset"])
def _estimate_peaks(q, vectors, whole, key_mask, counts, units_of_keys, peaks, scratch, stride_qb, stride_qh, stride_qs,
                    stride_mask_batch, stride_mask, stride_counts, heads, query_blocks, key_blocks, room, H, GROUP, L,
                    S, offset, scale_log2, spread_log2, log2_count,
                    VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
                    BLOCK: gl.constexpr, EDGE: gl.constexpr, CHUNK: gl.constexpr, D: gl.constexpr, LOWEST: gl.constexpr,
                    EXPONENTS: gl.constexpr, LOADER_REGISTERS: gl.constexpr, HAS_KEY_MASK: gl.constexpr):
    small: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, D], gl.float8e4nv)
    large: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS // 2, D], gl.float8e4nv)
    q_tiles = gl.allocate_shared_memory(gl.float8e4nv, [4, ROWS // 2, D], large)  # both halves, then their squares
    row_weights = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, CHUNK, D], small)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([EDGE * BLOCK, D], gl.float8e4nv)
    edge_tile = gl.allocate_shared_memory(gl.float8e4nv, [1, EDGE * BLOCK, D], wide)
    edge_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    edge_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(edge_full.index(0), count=1)
    mbarrier.init(edge_empty.index(0), count=1)
    bars = (full, empty, edge_full, edge_empty)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    scratch += gl.program_id(0).to(gl.int64) * gl.cdiv(key_blocks, CHUNK) * (ROWS * CHUNK)
    gl.warp_specialize([
        (_weigher, (q, key_mask, counts, units_of_keys, peaks, scratch, q_tiles, row_weights, tiles, edge_tile, bars,
                    stride_qb, stride_qh, stride_qs, stride_mask_batch, stride_mask, stride_counts, heads,
                    query_blocks, key_blocks, H, GROUP, L, S, offset, scale_log2, spread_log2, log2_count, VECTORS,
                    STAGES, ROWS, BLOCK, EDGE, CHUNK, D, LOWEST, EXPONENTS, HAS_KEY_MASK)),
        (_loader, (vectors, whole, tiles, edge_tile, bars, query_blocks, heads, H, GROUP, L, S, offset, key_blocks,
                   room, VECTORS, STAGES, ROWS, BLOCK, EDGE, CHUNK, D)),
    ], [1], [LOADER_REGISTERS])


def estimated_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, singles: int) -> Tensor:
    """Launch the three steps; arguments as above, covered by `why_not`."""
    q, scale = positive_scale(q, scale)
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    heads, kv_heads = B * H, B * Hkv
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(S, KEY_BLOCK)
    room = count_blocks(key_blocks, CHUNK) * CHUNK
    offset = S + KEY_BLOCK if masks.causal_offset is None else masks.causal_offset
    new = partial(torch.empty, dtype=torch.float32, device=q.device)
    ranges, units = new(kv_heads, 3, D), new(kv_heads, 2)
    vectors = new(kv_heads * (singles + 2) * room, D, dtype=torch.float8_e4m3fn)
    whole = new(kv_heads * room * KEY_BLOCK, D, dtype=torch.float8_e4m3fn)
    key_mask = masks.key_mask
    shown = 1 if key_mask is None else len(key_mask)
    counts = new(shown, room, dtype=torch.int32)
    mask_strides = (0, 0) if key_mask is None else (key_mask.stride(0) * (shown > 1), key_mask.stride(1))
    has_mask = {"HAS_KEY_MASK": key_mask is not None}
    mask = counts if key_mask is None else key_mask
    peaks = new(B, H, query_blocks, key_blocks)
    programs = min(query_blocks * heads, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device))
    scratch = new(programs, room * QUERY_BLOCK, dtype=torch.bfloat16)

    _sample_keys[(D // CHANNELS, kv_heads)](
        k, mask, ranges, *k.stride(), *mask_strides, S, Hkv, count_blocks(S, SAMPLES), SAMPLES=SAMPLES,
        CHANNELS=CHANNELS, D=D, num_warps=4, **has_mask)
    _quantise_keys[(key_blocks, kv_heads)](
        k, mask, ranges, vectors, whole, counts, units, *k.stride(), *mask_strides, S, Hkv, room, shown,
        SINGLES=singles, BLOCK=KEY_BLOCK, D=D, LARGEST=LARGEST, HEADROOM=HEADROOM, num_warps=QUANTISE_WARPS, **has_mask)
    _estimate_peaks[(programs,)](
        q, _describe(vectors, CHUNK), _describe(whole, EDGE * KEY_BLOCK), mask, counts, units, peaks, scratch,
        *q.stride()[:3], *mask_strides, room * (shown > 1), heads, query_blocks, key_blocks, room, H, H // Hkv, L, S,
        offset, scale * LOG2_E, scale * scale * LOG2_E, math.log2(KEY_BLOCK - singles), VECTORS=singles + 2,
        STAGES=STAGES, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, EDGE=EDGE, CHUNK=CHUNK, D=D, LOWEST=LOWEST_EXPONENT,
        EXPONENTS=EXPONENTS, LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS, **has_mask)
    return peaks


def _describe(rows: Tensor, tile: int) -> TensorDescriptor:
    """The copy engine's view of e4m3 rows, `tile` of them at once."""
    dim = rows.shape[1]
    return descriptor(rows, [dim, 1], [tile, dim], layout_of(tile, dim))


@cache
def layout_of(tile: int, dim: int) -> gl.NVMMASharedLayout:
    """Of a tile of e4m3 rows in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([tile, dim], gl.float8e4nv)


def why_not(q: Tensor, k: Tensor, masks: Masks, singles: int) -> str | None:
    """Why this call is not covered, in one sentence; None if it is."""
    if unsuited := why_not_here(q):
        return unsuited
    if q.shape[3] not in (64, 128):
        return f"the head dim is {q.shape[3]}, not 64 or 128"
    if not masks.is_plain:
        return "scores meet more than causality and a key mask"
    if q.stride(3) != 1:
        return f"q has strides {q.stride()}: rows must be dense"
    if k.shape[2] < KEY_BLOCK or singles >= KEY_BLOCK:
        return "a block is ragged or has no rest"
    return None
