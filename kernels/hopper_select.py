"""Peaks of selection for Hopper, in Gluon: split summaries in eight bits, and no exponential unit.

    q        [B, H, L, D]      fp16 or bf16; D is 64 or 128; last dimension dense
    k        [B, Hkv, S, D]    as q; query head h reads KV head h // (H // Hkv)
    peaks    [B, H, blocks of 128 rows, blocks of 64 keys]  float32, the largest share of attention that any row of the
                               query block gives the key block, as the split summaries estimate it; 1 for edge blocks
                               (around the causal edge, or ragged), 0 for blocks that no row sees
    key j is visible to query i when j <= i + causal_offset (None: always)
    errors   none here: the op checks shapes, `why_not` says which calls these kernels do not cover

Four steps. The range of the keys, from a sample; summaries, rounded to e4m3 around the mean key of their head (a
constant of a row moves no share); the exact log sum of every row over its edge blocks, which is the reference of its
exponentials; then the masses of all other blocks, their sum, and the maximum over rows of their shares.

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
EDGE_STEP = 2  # edge blocks at once: the tile of tensor cores; a causal diagonal has two, or three


@triton.jit(do_not_specialize=["S", "Hkv", "spacing"])
def _sample_keys(k, parts, stride_b, stride_h, stride_s, stride_d, S, Hkv, spacing, BLOCK: tl.constexpr,
                 D: tl.constexpr):
    """Mean, lowest and highest of every channel over a share of the sampled keys of a head."""
    split, head_row = tl.program_id(0), tl.program_id(1)
    k += (head_row // Hkv).to(tl.int64) * stride_b + (head_row % Hkv).to(tl.int64) * stride_h
    dims = tl.arange(0, D)
    total = tl.zeros([BLOCK, D], tl.float32)
    low = tl.full([BLOCK, D], float("inf"), tl.float32)
    high = tl.full([BLOCK, D], -float("inf"), tl.float32)
    samples = tl.cdiv(S, spacing)
    for start in range(split * BLOCK, samples, tl.num_programs(0) * BLOCK):
        sample = start + tl.arange(0, BLOCK)
        inside = (sample < samples)[:, None]
        keys_at = k + (sample * spacing).to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
        keys = tl.load(keys_at, inside, other=0.0).to(tl.float32)
        total += keys
        low = tl.where(inside, tl.minimum(low, keys), low)
        high = tl.where(inside, tl.maximum(high, keys), high)
    out = parts + (head_row * tl.num_programs(0) + split).to(tl.int64) * (3 * D) + dims
    tl.store(out, tl.sum(total, 0) / samples)
    tl.store(out + D, tl.min(low, 0))
    tl.store(out + 2 * D, tl.max(high, 0))


@triton.jit(do_not_specialize=["S", "Hkv", "room"])
def _quantise_summaries(k, parts, vectors, centers, units, stride_b, stride_h, stride_s, stride_d, S, Hkv, room,
                        SPLITS: tl.constexpr, SINGLES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
                        LARGEST: tl.constexpr, HEADROOM: tl.constexpr):
    """Split summaries of one key block in e4m3: variance, mean, then singles, the last two less the head's center."""
    key_block, head_row = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    splits = tl.arange(0, SPLITS)
    part = parts + (head_row * SPLITS + splits).to(tl.int64)[:, None] * (3 * D) + dims[None, :]
    center = tl.sum(tl.load(part), 0)
    low = tl.min(tl.load(part + D), 0)
    high = tl.max(tl.load(part + 2 * D), 0)
    reach = tl.max(tl.maximum(high - center, center - low), 0) * HEADROOM
    # No variance between two bounds is larger than a quarter of their squared distance (Popoviciu).
    spread = tl.max((high - low) * (high - low), 0) * (0.25 * HEADROOM)
    reach = tl.where(reach > 0.0, reach, 1.0)
    spread = tl.where(spread > 0.0, spread, 1.0)
    if key_block == 0:
        tl.store(centers + head_row * D + dims, center)
        tl.store(units + head_row * 2, reach / LARGEST)
        tl.store(units + head_row * 2 + 1, spread / LARGEST)

    k += (head_row // Hkv).to(tl.int64) * stride_b + (head_row % Hkv).to(tl.int64) * stride_h
    positions = key_block * BLOCK + rows
    visible = positions < S
    keys_at = k + positions.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
    keys = tl.load(keys_at, visible[:, None], other=0.0).to(tl.float32)
    rank, mean, variance, _, _ = split_keys(keys, visible, dims < D, rows, SINGLES)
    out = vectors + head_row.to(tl.int64) * ((SINGLES + 2) * room * D) + key_block * D + dims
    finest = vectors.dtype.element_ty
    tl.store(out, (variance * (LARGEST / spread)).to(finest))
    tl.store(out + room * D, ((mean - center) * (LARGEST / reach)).to(finest))
    singles = out[None, :] + ((rank + 2) * room * D)[:, None]
    tl.store(singles, ((keys - center[None, :]) * (LARGEST / reach)).to(finest), (rank < SINGLES)[:, None])


@triton.jit
def _edges_of(first_row, offset, L, S, key_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first edge block of a query block, and the first block that no row of it sees.

    Edge blocks begin with the last one that the first row sees, so that every row sees a key of them.
    """
    last_row = tl.minimum(first_row + ROWS, L) - 1
    allowed = tl.maximum(tl.minimum((last_row + offset + BLOCK) >> 6, key_blocks), 0)  # arithmetic shift: floor
    first = tl.maximum(tl.minimum((first_row + offset) >> 6, S // BLOCK), 0)
    return tl.minimum(first, allowed), allowed


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "H", "GROUP", "L", "S", "offset"])
def _weigh_edges(q, k, centers, edges, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks,
                 stride_kd, query_blocks, key_blocks, H, GROUP, L, S, offset, scale_log2,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr):
    """log2 of every row's sum over its edge blocks, or over the block beside the diagonal where it has none.

    Scores are those of keys less the head's center, as in the summaries.
    """
    query_block = tl.program_id(0) % query_blocks
    head_row = tl.program_id(0) // query_blocks
    batch, head = head_row // H, head_row % H
    first_row = query_block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    in_step = tl.arange(0, STEP * BLOCK)
    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    query = tl.load(q + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :] * stride_qd, (rows < L)[:, None],
                    other=0.0)
    kv_row = batch * (H // GROUP) + head // GROUP
    center = tl.load(centers + kv_row * D + dims)
    moved = tl.sum(query.to(tl.float32) * center[None, :], 1) * scale_log2

    first, allowed = _edges_of(first_row, offset, L, S, key_blocks, ROWS, BLOCK)
    beside = query_block * (S // BLOCK) // query_blocks
    last = tl.where(first < allowed, allowed, tl.minimum(beside + 1, allowed))
    first = tl.where(first < allowed, first, tl.minimum(beside, allowed))
    last_key = tl.minimum(rows + offset, S - 1)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(first, last, STEP):
        keys = block * BLOCK + in_step
        key_tile = tl.load(k + keys.to(tl.int64)[None, :] * stride_ks + dims[:, None] * stride_kd, (keys < S)[None, :],
                           other=0.0)
        shown = keys[None, :] <= tl.minimum(last_key, last * BLOCK - 1)[:, None]
        scores = tl.dot(query, key_tile) * scale_log2
        scores = tl.where(shown, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
        peak = new_peak
    tl.store(edges + head_row.to(tl.int64) * L + rows, peak + tl.log2(total) - moved, rows < L)


@gluon.jit
def _loader(vectors, tiles, full, empty, query_blocks, heads, H, GROUP, L, S, offset, key_blocks, room,
            VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
            CHUNK: gl.constexpr, D: gl.constexpr):
    """Feed the warpgroup with the summaries of chunk after chunk."""
    step = 0
    for unit in range(gl.program_id(0), query_blocks * heads, gl.num_programs(0)):
        head_row = unit % heads
        kv_row = (head_row // H) * (H // GROUP) + (head_row % H) // GROUP
        first_row = (query_blocks - 1 - unit // heads) * ROWS
        first, _ = _edges_of(first_row, offset, L, S, key_blocks, ROWS, BLOCK)
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
def _weigher(q, edges, units_of_keys, peaks, scratch, query_tiles, tiles, full, empty,
             stride_qb, stride_qh, stride_qs, heads, query_blocks, key_blocks, H, GROUP, L, S, offset,
             scale_log2, spread_log2, log2_count, VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
             BLOCK: gl.constexpr, CHUNK: gl.constexpr, D: gl.constexpr, LOWEST: gl.constexpr,
             EXPONENTS: gl.constexpr):
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
        rows = first_row + local_rows
        edge = gl.load(edges + head_row.to(gl.int64) * L + rows, rows < L, other=-float("inf"))
        sees = edge > -1.0e30
        edge = gl.where(sees, edge, 0.0)
        # Scores in units of EXPONENTS, from LOWEST up: what the exponentials take.
        slope = row_unit * (gl.load(units_of_keys + kv_row * 2) * scale_log2 * (1.0 / EXPONENTS))
        start = (-edge - LOWEST) * (1.0 / EXPONENTS)
        spread_unit = row_unit * row_unit * (gl.load(units_of_keys + kv_row * 2 + 1) * spread_log2 * 256.0)
        rest_start = start + log2_count * (1.0 / EXPONENTS)
        total = gl.where(allowed > first, 1.0, 0.0) + gl.zeros([ROWS], gl.float32, product_rows)

        for chunk in range(0, chunks):
            spread = _product(squares_tile, tiles, full, step, zero, STAGES)
            middle = _product(q_tile, tiles, full, step + 1, zero, STAGES)
            spread = warpgroup_mma_wait(1, deps=(spread,))
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            spread = spread * spread_unit[:, None]
            gain = gl.where(spread < 2.0 * log2_count, spread * (0.5 / EXPONENTS),
                            gl.sqrt(spread * (2.0 * log2_count / (EXPONENTS * EXPONENTS)))
                            - log2_count * (1.0 / EXPONENTS))
            ahead = middle
            if VECTORS > 2:
                ahead = _product(q_tile, tiles, full, step + 2, zero, STAGES)
                middle = warpgroup_mma_wait(1, deps=(middle,))
            else:
                middle = warpgroup_mma_wait(0, deps=(middle,))
            mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
            masses = _first_exponentials(middle, slope[:, None], rest_start[:, None] + gain)
            for single in gl.static_range(VECTORS - 2):
                now = ahead
                if single < VECTORS - 3:
                    ahead = _product(q_tile, tiles, full, step + 3 + single, zero, STAGES)
                    now = warpgroup_mma_wait(1, deps=(now,))
                else:
                    now = warpgroup_mma_wait(0, deps=(now,))
                mbarrier.arrive(empty.index((step + 2 + single) % STAGES), count=1)
                masses = _add_exponentials(masses, now, slope[:, None], start[:, None])
            step += VECTORS
            if (chunk + 1) * CHUNK > first:
                masses = gl.where((chunk * CHUNK + columns < first)[None, :], masses, gl.zeros_like(masses))
            total += gl.sum(masses.to(gl.float32), 1)
            gl.store(scratch + chunk * (ROWS * CHUNK) + scratch_at, gl.convert_layout(masses, stored))

        # A mass cut off at 2^64 may be any share: it counts as all.
        weights = gl.where(sees & (total > 0.0), 1.0 / gl.minimum(total, 1.8446744e19), 0.0)
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
def _estimate_peaks(q, vectors, edges, units_of_keys, peaks, scratch, stride_qb, stride_qh, stride_qs, heads,
                    query_blocks, key_blocks, room, H, GROUP, L, S, offset, scale_log2, spread_log2, log2_count,
                    VECTORS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
                    CHUNK: gl.constexpr, D: gl.constexpr, LOWEST: gl.constexpr, EXPONENTS: gl.constexpr,
                    LOADER_REGISTERS: gl.constexpr):
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
        (_weigher, (q, edges, units_of_keys, peaks, scratch, query_tiles, tiles, full, empty, stride_qb, stride_qh,
                    stride_qs, heads, query_blocks, key_blocks, H, GROUP, L, S, offset, scale_log2, spread_log2,
                    log2_count, VECTORS, STAGES, ROWS, BLOCK, CHUNK, D, LOWEST, EXPONENTS)),
        (_loader, (vectors, tiles, full, empty, query_blocks, heads, H, GROUP, L, S, offset, key_blocks, room, VECTORS,
                   STAGES, ROWS, BLOCK, CHUNK, D)),
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
    parts, centers, units = new(kv_heads, SPLITS, 3, D), new(kv_heads, D), new(kv_heads, 2)
    vectors = new(kv_heads * (singles + 2) * room, D, dtype=torch.float8_e4m3fn)
    edges, peaks = new(B, H, L), new(B, H, query_blocks, key_blocks)
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(query_blocks * heads, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    scratch = new(programs, room * QUERY_BLOCK, dtype=torch.bfloat16)

    _sample_keys[(SPLITS, kv_heads)](k, parts, *k.stride(), S, Hkv, count_blocks(S, SAMPLES), BLOCK=KEY_BLOCK, D=D,
                                     num_warps=8)
    _quantise_summaries[(key_blocks, kv_heads)](
        k, parts, vectors, centers, units, *k.stride(), S, Hkv, room, SPLITS=SPLITS, SINGLES=singles, BLOCK=KEY_BLOCK,
        D=D, LARGEST=LARGEST, HEADROOM=HEADROOM, num_warps=4)
    _weigh_edges[(heads * query_blocks,)](
        q, k, centers, edges, *q.stride(), *k.stride(), query_blocks, key_blocks, H, H // Hkv, L, S, offset,
        scale * LOG2_E, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, STEP=EDGE_STEP, D=D, num_warps=8, num_stages=1)
    layout = gl.NVMMASharedLayout.get_default_for([CHUNK, D], gl.float8e4nv)
    _estimate_peaks[(programs,)](
        q, TensorDescriptor.from_tensor(vectors, [CHUNK, D], layout), edges, units, peaks, scratch, *q.stride()[:3],
        heads, query_blocks, key_blocks, room, H, H // Hkv, L, S, offset, scale * LOG2_E,
        scale * scale * LOG2_E, math.log2(KEY_BLOCK - singles), VECTORS=singles + 2, STAGES=STAGES, ROWS=QUERY_BLOCK,
        BLOCK=KEY_BLOCK, CHUNK=CHUNK, D=D, LOWEST=LOWEST_EXPONENT, EXPONENTS=EXPONENTS,
        LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS)
    return peaks


def why_not(q: Tensor, k: Tensor, masks: Masks, singles: int) -> str | None:
    """Why this call is not covered, in one sentence; None if it is."""
    if unsuited := why_not_here(q):
        return unsuited
    if q.shape[3] not in (64, 128):
        return f"the head dim is {q.shape[3]}, not 64 or 128"
    if not masks.is_plain or masks.key_mask is not None:
        return "scores meet more than causality"
    if q.stride(3) != 1:
        return f"q has strides {q.stride()}: rows must be dense"
    if k.shape[2] < KEY_BLOCK or singles >= KEY_BLOCK:
        return "a block is ragged or has no rest"
    return None
