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

Exponentials are two multiply-adds: scores become the bits of a bfloat16, that is 2^x with its mantissa on the chord
(Schraudolph 1999, centred: within 3 % either way). They are relative to the edge blocks and not to a running maximum:
between 2^-100 and 2^64 they are what they should be; a mass beyond that counts as 2^64 and its block is kept.

Two programs a multiprocessor take query block after query block. In each one warp loads summaries (TMA) and a warpgroup
weighs, two products in flight. Masses wait for the row sums in a scratch that stays in L2.

Source: this project's own (ARCHITECTURE.md, "selection").
"""

import math
from functools import partial

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
from sparsify.kernels.hopper import why_not_here
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E
from sparsify.kernels.statistics import split_keys

CHUNK = 32  # key blocks at once
STAGES = 8  # tiles of summaries in flight
SAMPLES, SPLITS = 512, 4  # keys of a head that the scale of e4m3 is taken from, and programs that share them
LARGEST = 448.0  # of e4m3
HEADROOM = 8.0  # a key beyond it is cut off there: it outweighs all others as it is
LOWEST_EXPONENT, EXPONENTS = -100.0, 164.0
PROGRAMS_PER_MULTIPROCESSOR = 2  # one fetches queries or adds up while the other multiplies
REGISTERS = 128  # for 2 programs of 8 warps; the loader's four of them give most of their share to the others
LOADER_REGISTERS = 24


@triton.jit(do_not_specialize=["S", "Hkv", "spacing"])
def _sample_keys(k, key_mask, parts, stride_b, stride_h, stride_s, stride_d, stride_mask_batch, stride_mask, S, Hkv,
                 spacing, BLOCK: tl.constexpr, D: tl.constexpr, HAS_KEY_MASK: tl.constexpr):
    """Sum, lowest, highest and number of the visible among a share of the sampled keys of a head, by channel."""
    split, head_row = tl.program_id(0), tl.program_id(1)
    k += (head_row // Hkv).to(tl.int64) * stride_b + (head_row % Hkv).to(tl.int64) * stride_h
    dims = tl.arange(0, D)
    total = tl.zeros([BLOCK, D], tl.float32)
    low = tl.full([BLOCK, D], float("inf"), tl.float32)
    high = tl.full([BLOCK, D], -float("inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    samples = tl.cdiv(S, spacing)
    for start in range(split * BLOCK, samples, tl.num_programs(0) * BLOCK):
        sample = start + tl.arange(0, BLOCK)
        visible = sample < samples
        if HAS_KEY_MASK:
            mask_at = key_mask + (head_row // Hkv).to(tl.int64) * stride_mask_batch + sample * spacing * stride_mask
            visible &= tl.load(mask_at, visible, other=0) != 0
        inside = visible[:, None]
        count += tl.where(visible, 1.0, 0.0)
        keys_at = k + (sample * spacing).to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
        keys = tl.load(keys_at, inside, other=0.0).to(tl.float32)
        total += keys
        low = tl.where(inside, tl.minimum(low, keys), low)
        high = tl.where(inside, tl.maximum(high, keys), high)
    out = parts + (head_row * tl.num_programs(0) + split).to(tl.int64) * (4 * D) + dims
    tl.store(out, tl.sum(total, 0))
    tl.store(out + D, tl.min(low, 0))
    tl.store(out + 2 * D, tl.max(high, 0))
    tl.store(out + 3 * D, tl.zeros([D], tl.float32) + tl.sum(count, 0))


@triton.jit(do_not_specialize=["S", "Hkv", "room", "MASKS"])
def _quantise_keys(k, key_mask, parts, vectors, whole, counts, units, stride_b, stride_h, stride_s, stride_d,
                   stride_mask_batch, stride_mask, S, Hkv, room, MASKS, SPLITS: tl.constexpr, SINGLES: tl.constexpr,
                   BLOCK: tl.constexpr, D: tl.constexpr, LARGEST: tl.constexpr, HEADROOM: tl.constexpr,
                   HAS_KEY_MASK: tl.constexpr):
    """One key block in e4m3, less the head's center: variance, mean and singles into `vectors`, keys into `whole`."""
    key_block, head_row = tl.program_id(0), tl.program_id(1)
    batch = head_row // Hkv
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    splits = tl.arange(0, SPLITS)
    part = parts + (head_row * SPLITS + splits).to(tl.int64)[:, None] * (4 * D) + dims[None, :]
    center = tl.sum(tl.load(part), 0) / tl.maximum(tl.sum(tl.load(part + 3 * D), 0), 1.0)
    low = tl.min(tl.load(part + D), 0)
    high = tl.max(tl.load(part + 2 * D), 0)
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
    singles = out[None, :] + ((rank + 2) * room * D)[:, None]
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
def _loader(vectors, whole, tiles, full, empty, query_blocks, heads, H, GROUP, L, S, offset, key_blocks, room,
            VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
            CHUNK: gl.constexpr, D: gl.constexpr):
    """Feed the warpgroup with the summaries of chunk after chunk."""
    step = 0
    for unit in range(gl.program_id(0), query_blocks * heads, gl.num_programs(0)):
        head_row = unit % heads
        kv_row = (head_row // H) * (H // GROUP) + (head_row % H) // GROUP
        query_block = query_blocks - 1 - unit // heads
        first, allowed = _edges_of(query_block * ROWS, offset, L, S, key_blocks, ROWS, BLOCK)
        from_block, to_block = _reference_of(query_block, query_blocks, first, allowed, S, BLOCK)
        for tile in range(from_block * (BLOCK // CHUNK), to_block * (BLOCK // CHUNK)):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), CHUNK * D)
            tma.async_copy_global_to_shared(whole, [kv_row * room * BLOCK + tile * CHUNK, 0], full.index(stage),
                                            tiles.index(stage))
            step += 1
        for chunk in range(0, gl.cdiv(first, CHUNK)):
            for vector in gl.static_range(VECTORS):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), CHUNK * D)
                tma.async_copy_global_to_shared(vectors, [(kv_row * VECTORS + vector) * room + chunk * CHUNK, 0],
                                                full.index(stage), tiles.index(stage))
                step += 1


@gluon.jit
def _product(query, tiles, full, step, zero, STAGES: gl.constexpr):
    """Start the product of a query tile with the tile of this step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(query, tiles.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)


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
def _weigher(q, key_mask, counts, units_of_keys, peaks, scratch, query_tiles, tiles, full, empty, stride_qb, stride_qh,
             stride_qs, stride_mask_batch, stride_mask, stride_counts, heads, query_blocks, key_blocks, H, GROUP, L, S,
             offset, scale_log2, spread_log2, log2_count, VECTORS: gl.constexpr, STAGES: gl.constexpr,
             ROWS: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr, D: gl.constexpr, LOWEST: gl.constexpr,
             EXPONENTS: gl.constexpr, HAS_KEY_MASK: gl.constexpr):
    """Weigh query block after query block. Those at the end of all heads come first: they are the long ones."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 32])
    product_rows: gl.constexpr = gl.SliceLayout(1, products)
    query_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    query_rows: gl.constexpr = gl.SliceLayout(1, query_layout)
    # Masses go to the scratch in whole lines; a thread reads back what it wrote itself.
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHUNK, CHUNK // 8], [4, 1], [1, 0])
    stored_rows: gl.constexpr = gl.SliceLayout(1, stored)
    zero = gl.zeros([ROWS, CHUNK], gl.float32, products)
    columns = gl.arange(0, CHUNK, gl.SliceLayout(0, products))
    local_rows = gl.arange(0, ROWS, product_rows)
    query_local = gl.arange(0, ROWS, query_rows)
    dims = gl.arange(0, D, gl.SliceLayout(0, query_layout))
    out_columns = gl.arange(0, CHUNK, gl.SliceLayout(0, stored))
    scratch_at = gl.arange(0, ROWS, stored_rows)[:, None] * CHUNK + out_columns[None, :]
    q_tile = query_tiles.index(0)
    squares_tile = query_tiles.index(1)

    step = 0
    for unit in range(gl.program_id(0), query_blocks * heads, gl.num_programs(0)):
        head_row = unit % heads
        batch = head_row // H
        head = head_row % H
        kv_row = batch * (H // GROUP) + head // GROUP
        query_block = query_blocks - 1 - unit // heads
        first_row = query_block * ROWS
        first, allowed = _edges_of(first_row, offset, L, S, key_blocks, ROWS, BLOCK)
        chunks = gl.cdiv(first, CHUNK)

        query_at = (q + batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
                    + (first_row + query_local).to(gl.int64)[:, None] * stride_qs + dims[None, :])
        query = gl.load(query_at, (first_row + query_local < L)[:, None], other=0.0)
        # The unit of a row is a power of two: its largest element is 128 to 256 units, its largest square 64 to 256.
        largest = gl.maximum(gl.max(gl.abs(query), 1).to(gl.float32), 1.0e-20)
        power = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
        query = query.to(gl.float32)
        q_tile.store((query * (128.0 / power)[:, None]).to(gl.float8e4nv))
        query = query * (8.0 / power)[:, None]
        squares_tile.store((query * query).to(gl.float8e4nv))
        fence_async_shared()
        row_unit = gl.convert_layout(power * (1.0 / 128.0), product_rows)
        score_unit = row_unit * (gl.load(units_of_keys + kv_row * 2) * scale_log2)
        rows = first_row + local_rows
        last_key = gl.where(rows < L, gl.minimum(rows + offset, S - 1), -1)
        mask_row = key_mask + batch.to(gl.int64) * stride_mask_batch
        peak = gl.full([ROWS], -1.0e30, gl.float32, product_rows)
        total = gl.zeros([ROWS], gl.float32, product_rows)
        from_block, to_block = _reference_of(query_block, query_blocks, first, allowed, S, BLOCK)
        for tile in range(from_block * (BLOCK // CHUNK), to_block * (BLOCK // CHUNK)):
            scores = _product(q_tile, tiles, full, step, zero, STAGES)
            scores = warpgroup_mma_wait(0, deps=(scores,)) * score_unit[:, None]
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
            keys = tile * CHUNK + columns
            shown = keys[None, :] <= last_key[:, None]
            if HAS_KEY_MASK:
                shown &= (gl.load(mask_row + keys * stride_mask, keys < S, other=0) != 0)[None, :]
            scores = gl.where(shown, scores, -float("inf"))
            new_peak = gl.maximum(peak, gl.max(scores, 1))
            total = total * gl.exp2(peak - new_peak) + gl.sum(gl.exp2(scores - new_peak[:, None]), 1)
            peak = new_peak
        # A row that sees no key there (padding) refers to 0: scores of keys around their mean are not far from it.
        sees = total > 0.0
        edge = gl.where(sees, peak + gl.log2(total), 0.0)
        total = gl.where(sees & (allowed > first), 1.0, 0.0)
        # Scores in units of EXPONENTS, from LOWEST up: what the exponentials take.
        slope = score_unit * (1.0 / EXPONENTS)
        start = (-edge - LOWEST) * (1.0 / EXPONENTS)
        spread_unit = row_unit * row_unit * (gl.load(units_of_keys + kv_row * 2 + 1) * spread_log2 * 256.0)

        for chunk in range(0, chunks):
            spread = _product(squares_tile, tiles, full, step, zero, STAGES)
            middle = _product(q_tile, tiles, full, step + 1, zero, STAGES)
            log2_rest = log2_count
            if HAS_KEY_MASK:
                count = gl.load(counts + batch * stride_counts + chunk * CHUNK + columns)
                rest_count = count - (VECTORS - 2)
                log2_rest = gl.log2(gl.maximum(rest_count, 1).to(gl.float32))[None, :]
            spread = warpgroup_mma_wait(1, deps=(spread,))
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            spread = spread * spread_unit[:, None]
            gain = gl.where(spread < 2.0 * log2_rest, spread * (0.5 / EXPONENTS) + log2_rest * (1.0 / EXPONENTS),
                            gl.sqrt(spread * (2.0 / (EXPONENTS * EXPONENTS)) * log2_rest))
            ahead = middle
            if VECTORS > 2:
                ahead = _product(q_tile, tiles, full, step + 2, zero, STAGES)
                middle = warpgroup_mma_wait(1, deps=(middle,))
            else:
                middle = warpgroup_mma_wait(0, deps=(middle,))
            mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
            if HAS_KEY_MASK:
                middle = gl.where((rest_count > 0)[None, :], middle, -float("inf"))
            masses = _first_exponentials(middle, slope[:, None], start[:, None] + gain)
            for single in gl.static_range(VECTORS - 2):
                now = ahead
                if single < VECTORS - 3:
                    ahead = _product(q_tile, tiles, full, step + 3 + single, zero, STAGES)
                    now = warpgroup_mma_wait(1, deps=(now,))
                else:
                    now = warpgroup_mma_wait(0, deps=(now,))
                mbarrier.arrive(empty.index((step + 2 + single) % STAGES), count=1)
                if HAS_KEY_MASK:
                    now = gl.where((single < count)[None, :], now, -float("inf"))
                masses = _add_exponentials(masses, now, slope[:, None], start[:, None])
            step += VECTORS
            if (chunk + 1) * CHUNK > first:
                masses = gl.where((chunk * CHUNK + columns < first)[None, :], masses, gl.zeros_like(masses))
            total += gl.sum(masses.to(gl.float32), 1)
            gl.store(scratch + chunk * (ROWS * CHUNK) + scratch_at, gl.convert_layout(masses, stored))

        # A mass cut off at 2^64 may be any share: it counts as all. A row of nothing but the lowest masses sees no key.
        weights = gl.where((last_key >= 0) & (total > 1.0e-24), 1.0 / gl.minimum(total, 1.8446744e19), 0.0)
        weights = gl.convert_layout(weights, stored_rows).to(gl.bfloat16)[:, None]
        out = peaks + (head_row * query_blocks + query_block).to(gl.int64) * key_blocks
        ahead_masses = gl.load(scratch + scratch_at)
        for chunk in range(0, chunks):
            masses = ahead_masses
            ahead_masses = gl.load(scratch + gl.minimum(chunk + 1, chunks - 1) * (ROWS * CHUNK) + scratch_at)
            blocks = chunk * CHUNK + out_columns
            gl.store(out + blocks, gl.max(_weighted(masses, weights), 0).to(gl.float32), blocks < first)
        for chunk in range(first // CHUNK, gl.cdiv(key_blocks, CHUNK)):
            blocks = chunk * CHUNK + out_columns
            gl.store(out + blocks, gl.where(blocks < allowed, 1.0, 0.0), (blocks >= first) & (blocks < key_blocks))


@gluon.jit(do_not_specialize=["heads", "query_blocks", "key_blocks", "room", "H", "GROUP", "L", "S", "offset"])
def _estimate_peaks(q, vectors, whole, key_mask, counts, units_of_keys, peaks, scratch, stride_qb, stride_qh, stride_qs,
                    stride_mask_batch, stride_mask, stride_counts, heads, query_blocks, key_blocks, room, H, GROUP, L,
                    S, offset, scale_log2, spread_log2, log2_count,
                    VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
                    CHUNK: gl.constexpr, D: gl.constexpr, LOWEST: gl.constexpr, EXPONENTS: gl.constexpr,
                    LOADER_REGISTERS: gl.constexpr, HAS_KEY_MASK: gl.constexpr):
    small: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, D], gl.float8e4nv)
    large: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], gl.float8e4nv)
    query_tiles = gl.allocate_shared_memory(gl.float8e4nv, [2, ROWS, D], large)
    tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, CHUNK, D], small)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    scratch += gl.program_id(0).to(gl.int64) * gl.cdiv(key_blocks, CHUNK) * (ROWS * CHUNK)
    gl.warp_specialize([
        (_weigher, (q, key_mask, counts, units_of_keys, peaks, scratch, query_tiles, tiles, full, empty, stride_qb,
                    stride_qh, stride_qs, stride_mask_batch, stride_mask, stride_counts, heads, query_blocks,
                    key_blocks, H, GROUP, L, S, offset, scale_log2, spread_log2, log2_count, VECTORS, STAGES, ROWS,
                    BLOCK, CHUNK, D, LOWEST, EXPONENTS, HAS_KEY_MASK)),
        (_loader, (vectors, whole, tiles, full, empty, query_blocks, heads, H, GROUP, L, S, offset, key_blocks, room,
                   VECTORS, STAGES, ROWS, BLOCK, CHUNK, D)),
    ], [1], [LOADER_REGISTERS])


def estimated_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, singles: int) -> Tensor:
    """Launch the four steps; arguments as above, covered by `why_not`."""
    q, scale = positive_scale(q, scale)
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    heads, kv_heads = B * H, B * Hkv
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(S, KEY_BLOCK)
    room = count_blocks(key_blocks, CHUNK) * CHUNK
    offset = S + KEY_BLOCK if masks.causal_offset is None else masks.causal_offset
    new = partial(torch.empty, dtype=torch.float32, device=q.device)
    parts, units = new(kv_heads, SPLITS, 4, D), new(kv_heads, 2)
    vectors = new(kv_heads * (singles + 2) * room, D, dtype=torch.float8_e4m3fn)
    whole = new(kv_heads * room * KEY_BLOCK, D, dtype=torch.float8_e4m3fn)
    key_mask = masks.key_mask
    shown = 1 if key_mask is None else len(key_mask)
    counts = new(shown, room, dtype=torch.int32)
    mask_strides = (0, 0) if key_mask is None else (key_mask.stride(0) * (shown > 1), key_mask.stride(1))
    has_mask = {"HAS_KEY_MASK": key_mask is not None}
    mask = counts if key_mask is None else key_mask
    peaks = new(B, H, query_blocks, key_blocks)
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(query_blocks * heads, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    scratch = new(programs, room * QUERY_BLOCK, dtype=torch.bfloat16)

    _sample_keys[(SPLITS, kv_heads)](k, mask, parts, *k.stride(), *mask_strides, S, Hkv, count_blocks(S, SAMPLES),
                                     BLOCK=KEY_BLOCK, D=D, num_warps=8, **has_mask)
    _quantise_keys[(key_blocks, kv_heads)](
        k, mask, parts, vectors, whole, counts, units, *k.stride(), *mask_strides, S, Hkv, room, shown, SPLITS=SPLITS,
        SINGLES=singles, BLOCK=KEY_BLOCK, D=D, LARGEST=LARGEST, HEADROOM=HEADROOM, num_warps=4, **has_mask)
    layout = gl.NVMMASharedLayout.get_default_for([CHUNK, D], gl.float8e4nv)
    _estimate_peaks[(programs,)](
        q, TensorDescriptor.from_tensor(vectors, [CHUNK, D], layout),
        TensorDescriptor.from_tensor(whole, [CHUNK, D], layout), mask, counts, units, peaks, scratch, *q.stride()[:3],
        *mask_strides, room * (shown > 1), heads, query_blocks, key_blocks, room, H, H // Hkv, L, S, offset,
        scale * LOG2_E, scale * scale * LOG2_E, math.log2(KEY_BLOCK - singles), VECTORS=singles + 2, STAGES=STAGES,
        ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, CHUNK=CHUNK, D=D, LOWEST=LOWEST_EXPONENT, EXPONENTS=EXPONENTS,
        LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS, **has_mask)
    return peaks


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
