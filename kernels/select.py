"""Selection: which key blocks every query block keeps.

    q         [B, H, L, D]      fp16, bf16 or fp32; any strides
    k         [B, Hkv, S, D]    as q; query head h reads KV head h // (H // Hkv)
    masks     see kernels/masks.py; every one of them
    peaks     [B, H, blocks of 128 rows, blocks of 64 keys]  float32, the largest share of attention that any row of
                                the query block gives the key block, as the split summaries estimate it; boundary
                                blocks exact; 0 where nothing is visible
    kept, counts                see `KeptLists`
    errors    none here: the op (sparsify/ops) checks shapes, dtypes and ranges

Peaks need every row's sum over all its blocks before the first share is known. One sweep over the summaries leaves
each block's mass, relative to the row's largest score so far, in a scratch that stays in L2 (a program's own, 128 rows
long); a second sweep reads it back and takes the maximum over rows. That is 7 exponentials and a square root per row
and block (m = 6), and no logarithm.

Masks that are not plain have a kernel of their own, which reads the kind of every block from a map (`block_kinds`):
the plain one knows where the causal edge is and has no use for it.

Source: this project's own (ARCHITECTURE.md, "selection"): absolute tolerance on estimated row maxima.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.attend import positive_scale
from sparsify.kernels.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    KeptLists,
    SplitSummaries,
    block_bias,
    block_kinds,
    capacity,
    count_blocks,
    visible_keys,
)
from sparsify.kernels.launch import launched, multiprocessors
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import (
    LOG2_E,
    cap_scores,
    finish_scores,
    first_peak,
    in_float32,
    read_documents,
    score_arguments,
)
from sparsify.kernels.statistics import summarise_keys

STAGES = 2  # summary vectors in flight
PACK_WARPS = 4
PACK_WIDTH = 256  # key blocks at once
REGISTERS = 255  # all of them; left alone, ptxas took 32 for float32 and spilled the rest
PROGRAMS_PER_MULTIPROCESSOR = 2  # one computes exponentials while the other waits for vectors


@triton.jit
def _add_mass(mass, peak, scores, scale_log2):
    """Add exp2(scores * scale_log2) to `mass`, which is relative to exp2(peak); the peak of a row rises as needed."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    added = tl.exp2(scores * scale_log2 - new_peak[:, None])
    return mass * tl.exp2(peak - new_peak)[:, None] + added, new_peak


@triton.jit
def _load_vectors(vectors, vector, inside, MASKED: tl.constexpr, PADDED: tl.constexpr):
    if MASKED or PADDED:
        return tl.load(vectors + vector, inside, other=0.0)
    return tl.load(vectors + vector)


@triton.jit
def _weigh_chunk(query, squared, singles, mean, variance, single_stride, blocks, inside, single_keys, log2_count, peak,
                 scale_log2, cap_log2, bias, SINGLES: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
                 D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
                 BIASED: tl.constexpr):
    """Masses of a chunk of key blocks for every row, relative to exp2 of the peak that comes back with them.

    MASKED: blocks outside `inside` weigh nothing, and a block has `single_keys` singles. Else: all blocks are whole.
    CAPPED and BIASED go with MASKED; `bias` [rows, CHUNK] is in units of log2.
    """
    dims = tl.arange(0, D_PAD)
    vector = blocks[None, :] * D + dims[:, None]
    loaded = inside[None, :] & (dims < D)[:, None]
    PADDED: tl.constexpr = D_PAD != D
    variances = _load_vectors(variance, vector, loaded, MASKED, PADDED)
    means = _load_vectors(mean, vector, loaded, MASKED, PADDED)
    spread = tl.dot(squared, variances, input_precision="ieee")
    center = tl.dot(query, means, input_precision="ieee")
    # log2 of the mean of exp over n Gaussian scores: the second cumulant while it can be true, then the largest of n.
    double = 2.0 * tl.maximum(log2_count, 0.0)
    if MASKED:
        double = double[None, :]
        log2_count = tl.where(inside, log2_count, -float("inf"))[None, :]
    gain = tl.where(spread < double, 0.5 * spread, tl.sqrt(double * spread) - 0.5 * double)
    mass = tl.zeros([query.shape[0], CHUNK], tl.float32)
    if CAPPED:
        middle = cap_scores(center * scale_log2 + gain, cap_log2) + log2_count
    else:
        middle = center * scale_log2 + (gain + log2_count)
    if BIASED:
        middle += bias
    mass, peak = _add_mass(mass, peak, middle, 1.0)
    for single in tl.range(0, SINGLES, num_stages=STAGES):
        keys = _load_vectors(singles + single * single_stride, vector, loaded, MASKED, PADDED)
        scores = tl.dot(query, keys, input_precision="ieee")
        if MASKED:
            hidden = tl.where(inside & (single < single_keys), 0.0, -float("inf"))
            scores = scores * scale_log2
            if CAPPED:
                scores = cap_scores(scores, cap_log2)
            if BIASED:
                scores += bias
            mass, peak = _add_mass(mass, peak, scores + hidden[None, :], 1.0)
        else:
            mass, peak = _add_mass(mass, peak, scores, scale_log2)
    return mass, peak


@launched
@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "units", "H", "GROUP", "L", "S", "offset"])
def _estimate_peaks(q, k, key_mask, singles, mean, variance, single_count, rest_count, peaks, scratch, scratch_peaks,
                    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
                    stride_mask_batch, stride_mask, stride_count_batch,
                    query_blocks, key_blocks, units, H, GROUP, L, S, offset, scale_log2, spread_scale,
                    log2_count, log2_last_count,
                    SINGLES: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    CHUNK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr):
    scale_log2, spread_scale = in_float32(scale_log2), in_float32(spread_scale)
    log2_count, log2_last_count = in_float32(log2_count), in_float32(log2_last_count)
    dims = tl.arange(0, D_PAD)
    dim_inside = dims < D
    columns = tl.arange(0, CHUNK)
    in_block = tl.arange(0, BLOCK)
    local_rows = tl.arange(0, ROWS)
    chunks = tl.cdiv(key_blocks, CHUNK)
    scratch += tl.program_id(0).to(tl.int64) * chunks * (ROWS * CHUNK)
    scratch_peaks += tl.program_id(0).to(tl.int64) * chunks * ROWS
    tile = local_rows[:, None] * CHUNK + columns[None, :]

    # Late query blocks of all heads come first, so that programs with a static share of them end together.
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        heads = units // query_blocks
        query_block = query_blocks - 1 - unit // heads
        head_row = unit % heads
        batch, head = head_row // H, head_row % H
        first_row = query_block * ROWS
        rows = first_row + local_rows
        row_inside = rows < L
        # int64: a batch of long sequences passes 2**31 elements.
        q_head = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        query = tl.load(q_head + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :] * stride_qd,
                        row_inside[:, None] & dim_inside[None, :], other=0.0)
        spread_query = query.to(tl.float32) * spread_scale
        squared = (spread_query * spread_query).to(query.dtype)
        rest_head = (batch * (H // GROUP) + head // GROUP).to(tl.int64) * key_blocks * D
        single_stride = key_blocks * D
        last_row = tl.minimum(first_row + ROWS, L) - 1
        allowed = tl.maximum(tl.minimum((last_row + offset + BLOCK) >> 6, key_blocks), 0)  # arithmetic shift: floor
        boundary = tl.maximum(tl.minimum((first_row + offset + 1) >> 6, allowed), 0)
        out = peaks + (head_row * query_blocks + query_block).to(tl.int64) * key_blocks

        peak = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        whole = tl.minimum(boundary, S // BLOCK) // CHUNK
        if HAS_KEY_MASK:
            whole = whole * 0
        for chunk in range(0, whole):
            blocks = chunk * CHUNK + columns
            old_peak = peak
            mass, peak = _weigh_chunk(query, squared, singles + rest_head * SINGLES, mean + rest_head,
                                      variance + rest_head, single_stride, blocks, blocks >= 0, 0, log2_count, peak,
                                      scale_log2, 0.0, 0.0, SINGLES, STAGES, CHUNK, D, D_PAD, False, False, False)
            total = total * tl.exp2(old_peak - peak) + tl.sum(mass, 1)
            tl.store(scratch + chunk * (ROWS * CHUNK) + tile, mass.to(scratch.dtype.element_ty))
            tl.store(scratch_peaks + chunk * ROWS + local_rows, peak)
        for chunk in range(whole, tl.cdiv(boundary, CHUNK)):
            blocks = chunk * CHUNK + columns
            inside = blocks < boundary
            if HAS_KEY_MASK:
                counts_at = batch * stride_count_batch + blocks
                single_keys = tl.load(single_count + counts_at, inside, other=0)
                log2_counts = tl.log2(tl.load(rest_count + counts_at, inside, other=0).to(tl.float32))
            else:
                ragged = (blocks + 1) * BLOCK > S
                single_keys = tl.where(ragged, S % BLOCK, SINGLES)
                log2_counts = tl.where(ragged, log2_last_count, log2_count)
            old_peak = peak
            mass, peak = _weigh_chunk(query, squared, singles + rest_head * SINGLES, mean + rest_head,
                                      variance + rest_head, single_stride, blocks, inside, single_keys, log2_counts,
                                      peak, scale_log2, 0.0, 0.0, SINGLES, STAGES, CHUNK, D, D_PAD, True, False,
                                      False)
            total = total * tl.exp2(old_peak - peak) + tl.sum(mass, 1)
            tl.store(scratch + chunk * (ROWS * CHUNK) + tile, mass.to(scratch.dtype.element_ty))
            tl.store(scratch_peaks + chunk * ROWS + local_rows, peak)

        # Boundary blocks: their own keys, as every row sees them. At most three, so the masses stay in registers.
        last_key = tl.minimum(rows + offset, S - 1)
        slot = tl.arange(0, 4)
        boundary_mass = tl.zeros([ROWS, 4], tl.float32)
        for edge in tl.range(0, allowed - boundary):
            keys = (boundary + edge) * BLOCK + in_block
            key_inside = keys < S
            k_head = k + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
            key_tile = tl.load(k_head + keys.to(tl.int64)[None, :] * stride_ks + dims[:, None] * stride_kd,
                               key_inside[None, :] & dim_inside[:, None], other=0.0)
            visible = keys[None, :] <= last_key[:, None]
            if HAS_KEY_MASK:
                mask_at = key_mask + batch.to(tl.int64) * stride_mask_batch + keys * stride_mask
                visible &= (tl.load(mask_at, key_inside, other=0) != 0)[None, :]
            scores = tl.where(visible, tl.dot(query, key_tile, input_precision="ieee") * scale_log2, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            edge_mass = tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
            shrink = tl.exp2(peak - new_peak)
            boundary_mass = tl.where(slot[None, :] == edge, edge_mass[:, None], boundary_mass * shrink[:, None])
            total = total * shrink + edge_mass
            peak = new_peak

        shares = tl.where(row_inside & (total > 0), 1.0 / total, 0.0)
        tl.store(out + boundary + slot, tl.max(boundary_mass * shares[:, None], 0), boundary + slot < allowed)
        tl.debug_barrier()  # masses may come back to other threads than wrote them
        for chunk in range(0, tl.cdiv(boundary, CHUNK)):
            blocks = chunk * CHUNK + columns
            mass = tl.load(scratch + chunk * (ROWS * CHUNK) + tile).to(tl.float32)
            weight = tl.exp2(tl.load(scratch_peaks + chunk * ROWS + local_rows) - peak) * shares
            tl.store(out + blocks, tl.max(mass * weight[:, None], 0), blocks < boundary)
        for chunk in range(allowed // CHUNK, chunks):
            blocks = chunk * CHUNK + columns
            tl.store(out + blocks, tl.zeros([CHUNK], tl.float32), (blocks >= allowed) & (blocks < key_blocks))
        tl.debug_barrier()  # and the next query block writes them anew


@launched
@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "units", "H", "GROUP", "L", "S", "offset", "window"])
def _estimate_masked_peaks(q, k, key_mask, kinds, bias, singles, mean, variance, single_count, rest_count, peaks,
                           scratch, scratch_peaks,
                           stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
                           stride_mask_batch, stride_mask, stride_kinds_batch, stride_bb, stride_bh, stride_bs,
                           stride_count_batch, query_blocks, key_blocks, units, H, GROUP, L, S, offset, scale_log2,
                           spread_scale,
                           window, query_documents, key_documents, stride_query_documents, stride_key_documents,
                           attn_mask, stride_mb, stride_mh, stride_ms, stride_mt, cap_log2, sinks,
                           SINGLES: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                           CHUNK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
                           BIASED: tl.constexpr, WINDOWED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
                           MASK: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr):
    dims = tl.arange(0, D_PAD)
    dim_inside = dims < D
    columns = tl.arange(0, CHUNK)
    in_block = tl.arange(0, BLOCK)
    local_rows = tl.arange(0, ROWS)
    chunks = tl.cdiv(key_blocks, CHUNK)
    scratch += tl.program_id(0).to(tl.int64) * chunks * (ROWS * CHUNK)
    scratch_peaks += tl.program_id(0).to(tl.int64) * chunks * ROWS
    tile = local_rows[:, None] * CHUNK + columns[None, :]

    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        heads = units // query_blocks
        query_block = query_blocks - 1 - unit // heads
        head_row = unit % heads
        batch, head = head_row // H, head_row % H
        rows = query_block * ROWS + local_rows
        row_inside = rows < L
        last_key = rows + offset
        q_head = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        k_head = k + batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
        query = tl.load(q_head + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :] * stride_qd,
                        row_inside[:, None] & dim_inside[None, :], other=0.0)
        spread_query = query.to(tl.float32) * spread_scale
        squared = (spread_query * spread_query).to(query.dtype)
        rest_head = (batch * (H // GROUP) + head // GROUP).to(tl.int64) * key_blocks * D
        out = peaks + (head_row * query_blocks + query_block).to(tl.int64) * key_blocks
        kinds_at = kinds + batch.to(tl.int64) * stride_kinds_batch + query_block.to(tl.int64) * key_blocks
        bias_at = bias + batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh
        row_documents = read_documents(query_documents, stride_query_documents, batch, rows, row_inside, HAS_DOCUMENTS)
        document_keys = key_documents + batch.to(tl.int64) * stride_key_documents
        mask_rows = (attn_mask + batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh
                     + query_block.to(tl.int64) * ROWS * stride_ms)

        peak, total = first_peak(sinks, head, ROWS, HAS_SINKS)
        for chunk in range(0, chunks):
            blocks = chunk * CHUNK + columns
            exists = blocks < key_blocks
            kind = tl.load(kinds_at + blocks, exists, other=0).to(tl.int32)
            most = tl.max(kind, 0)
            if most > 0:  # not wholly hidden
                bias_tile = 0.0
                if BIASED:
                    bias_tile = tl.load(bias_at + rows.to(tl.int64)[:, None] * stride_bs + blocks[None, :],
                                        row_inside[:, None] & exists[None, :], other=0.0) * 1.4426950408889634
                counts_at = batch * stride_count_batch + blocks
                single_keys = tl.load(single_count + counts_at, exists, other=0)
                log2_counts = tl.log2(tl.load(rest_count + counts_at, exists, other=0).to(tl.float32))
                old_peak = peak
                mass, peak = _weigh_chunk(query, squared, singles + rest_head * SINGLES, mean + rest_head,
                                          variance + rest_head, key_blocks * D, blocks, kind == 1, single_keys,
                                          log2_counts, peak, scale_log2, cap_log2, bias_tile, SINGLES, STAGES, CHUNK,
                                          D, D_PAD, True, CAPPED, BIASED)
                for column in range(0, tl.where(most == 2, CHUNK, 0)):  # blocks seen in part: their own keys
                    block = chunk * CHUNK + column
                    if tl.load(kinds_at + block, block < key_blocks, other=0).to(tl.int32) == 2:
                        keys = block * BLOCK + in_block
                        shown = keys < S
                        key_tile = tl.load(k_head + keys.to(tl.int64)[None, :] * stride_ks + dims[:, None] * stride_kd,
                                           shown[None, :] & dim_inside[:, None], other=0.0)
                        if HAS_KEY_MASK:
                            mask_at = key_mask + batch.to(tl.int64) * stride_mask_batch + keys * stride_mask
                            shown &= tl.load(mask_at, shown, other=0) != 0
                        scores = finish_scores(tl.dot(query, key_tile, input_precision="ieee") * scale_log2,
                                               row_inside, last_key, block, keys, shown, window, row_documents,
                                               document_keys, mask_rows, stride_ms, stride_mt, cap_log2, WINDOWED,
                                               HAS_DOCUMENTS, MASK, CAPPED)
                        new_peak = tl.maximum(peak, tl.max(scores, 1))
                        own = tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
                        mass = tl.where(columns[None, :] == column, own[:, None],
                                        mass * tl.exp2(peak - new_peak)[:, None])
                        peak = new_peak
                total = total * tl.exp2(old_peak - peak) + tl.sum(mass, 1)
                tl.store(scratch + chunk * (ROWS * CHUNK) + tile, mass.to(scratch.dtype.element_ty))
                tl.store(scratch_peaks + chunk * ROWS + local_rows, peak)

        shares = tl.where(row_inside & (total > 0), 1.0 / total, 0.0)
        tl.debug_barrier()  # masses may come back to other threads than wrote them
        for chunk in range(0, chunks):
            blocks = chunk * CHUNK + columns
            exists = blocks < key_blocks
            highest = tl.zeros([CHUNK], tl.float32)
            if tl.max(tl.load(kinds_at + blocks, exists, other=0).to(tl.int32), 0) > 0:
                mass = tl.load(scratch + chunk * (ROWS * CHUNK) + tile).to(tl.float32)
                weight = tl.exp2(tl.load(scratch_peaks + chunk * ROWS + local_rows) - peak) * shares
                highest = tl.max(mass * weight[:, None], 0)
            tl.store(out + blocks, highest, exists)
        tl.debug_barrier()  # and the next query block writes them anew


@triton.jit
def _judge_blocks(start, seen, peaks, single_count, rest_count, kinds, guarded, row, batch, first_row,
                  stride_count_batch, stride_protected_batch, key_blocks, L, offset, sinks, local, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr, WIDTH: tl.constexpr, PLAIN: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
                  PROTECTED: tl.constexpr):
    """Of WIDTH key blocks from `start` on: ids, peaks, which a query block may keep, and which of them it must.

    `seen` are the allowed ones before; comes back with those in here.
    """
    blocks = start + tl.arange(0, WIDTH)
    inside = blocks < key_blocks
    peak = tl.load(peaks + row.to(tl.int64) * key_blocks + blocks, inside, other=0.0)
    if PLAIN:
        last_row = tl.minimum(first_row + ROWS, L) - 1
        allowed = inside & (blocks * BLOCK <= last_row + offset)
        if HAS_KEY_MASK:
            counts_at = batch * stride_count_batch + blocks
            keys = tl.load(single_count + counts_at, inside, other=0) + tl.load(rest_count + counts_at, inside, other=0)
            allowed &= keys > 0
    else:
        allowed = tl.load(kinds + blocks, inside, other=0) != 0
    boundary = tl.maximum((first_row + offset + 1) >> 6, 0)  # the first; an arithmetic shift is a floor
    forced = seen + tl.cumsum(allowed.to(tl.int32), 0) <= sinks
    forced |= (blocks >= boundary - local) & (boundary < key_blocks)
    if PROTECTED:
        forced |= tl.load(guarded + batch.to(tl.int64) * stride_protected_batch + blocks, inside, other=0) != 0
    return blocks, peak, allowed, forced, seen + tl.sum(allowed.to(tl.int32), 0)


@launched
@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "list_capacity", "H", "L", "offset", "sinks", "local",
                               "tolerance", "max_density"])
def _pack_lists(peaks, single_count, rest_count, kinds, guarded, kept, counts, stride_count_batch,
                stride_kinds_batch, stride_protected_batch, query_blocks, key_blocks, list_capacity, H, L, offset,
                tolerance, shifts, max_density, sinks, local,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PLAIN: tl.constexpr,
                HAS_KEY_MASK: tl.constexpr, SHIFTS: tl.constexpr, PROTECTED: tl.constexpr):
    row = tl.program_id(0)
    query_block = row % query_blocks
    batch = row // query_blocks // H
    first_row = query_block * ROWS
    if not PLAIN:
        kinds += batch.to(tl.int64) * stride_kinds_batch + query_block.to(tl.int64) * key_blocks
    threshold, key_blocks = in_float32(tolerance), tl.full((), key_blocks, tl.int32)  # a length may come as int64
    if SHIFTS > 0:  # numbers of the launch, not of memory: no copy to the device, so graphs capture it as it is
        head = row // query_blocks % H
        shift = 1.0
        for i in tl.static_range(SHIFTS):
            shift = tl.where(head == i, shifts[i], shift)
        threshold = threshold * shift

    # WIDTH blocks at a time, whatever the length: one kernel for all. First what the row keeps, and the best block that
    # is left, the later one of equals.
    total = 0
    count = 0
    best = -1.0
    chosen = -1
    for start in range(0, key_blocks, WIDTH):
        blocks, peak, allowed, forced, total = _judge_blocks(
            start, total, peaks, single_count, rest_count, kinds, guarded, row, batch, first_row, stride_count_batch,
            stride_protected_batch, key_blocks, L, offset, sinks, local, ROWS, BLOCK, WIDTH, PLAIN, HAS_KEY_MASK,
            PROTECTED)
        keep = allowed & (forced | (peak >= threshold))
        count += tl.sum(keep.to(tl.int32), 0)
        spare = tl.where(allowed & (keep == 0), peak, -1.0)
        best_here = tl.max(spare, 0)
        here = tl.max(tl.where((spare == best_here) & (spare >= 0.0), blocks, -1), 0)
        chosen = tl.where((here >= 0) & (best_here >= best), here, chosen)
        best = tl.maximum(best, best_here)
    if count > max_density * total:
        threshold = 0.0
        count = total
        chosen = -1
    chosen = tl.where(count % 2 == 1, chosen, -1)

    # Then the list: ascending, evened out by that block or by padding.
    entries = kept + row.to(tl.int64) * list_capacity
    total = 0
    count = 0
    for start in range(0, key_blocks, WIDTH):
        blocks, peak, allowed, forced, total = _judge_blocks(
            start, total, peaks, single_count, rest_count, kinds, guarded, row, batch, first_row, stride_count_batch,
            stride_protected_batch, key_blocks, L, offset, sinks, local, ROWS, BLOCK, WIDTH, PLAIN, HAS_KEY_MASK,
            PROTECTED)
        keep = (allowed & (forced | (peak >= threshold))) | (blocks == chosen)
        tl.store(entries + count + tl.cumsum(keep.to(tl.int32), 0) - 1, blocks, keep)
        count += tl.sum(keep.to(tl.int32), 0)
    even = tl.maximum((count + 1) // 2 * 2, 2)
    for start in range(0, list_capacity, WIDTH):
        entry = start + tl.arange(0, WIDTH)
        padding = tl.where(entry < even, key_blocks + entry - count, 0)
        tl.store(entries + entry, padding, (entry >= count) & (entry < list_capacity))
    tl.store(counts + row, even)


def select_blocks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, tolerance: float, max_density: float, sinks: int,
                  local: int, singles: int, shifts: Sequence[float] | None = None,
                  protected: Tensor | None = None) -> KeptLists:
    """Summaries, peaks, kept lists; arguments as above, in `sparsify.plan.Budget` and in kernels/rule.py."""
    B, H, L, _ = q.shape
    S = k.shape[2]
    kinds = single_count = rest_count = None
    count_stride = 0
    if runs_on_hopper(q, k, masks, singles):
        from sparsify.kernels import hopper_native, hopper_select  # Gluon: not for Triton's interpreter

        lists = None if shifts is not None or protected is not None else hopper_native.select_blocks(
            q, k, scale=scale, masks=masks, tolerance=tolerance, max_density=max_density, sinks=sinks, local=local,
            singles=singles)
        if lists is not None:
            return lists
        peaks = hopper_select.estimated_peaks(q, k, scale=scale, masks=masks, singles=singles)
        if masks.key_mask is not None:
            single_count = rest_count = visible_keys(masks.key_mask, S, q.device).int()
            count_stride = single_count.stride(0) if len(single_count) > 1 else 0
    else:
        q, k = _fit(q), _fit(k)
        summaries = summarise_keys(k, singles, masks.key_mask)
        single_count, rest_count, count_stride = summaries.single_count, summaries.rest_count, _count_stride(summaries)
        kinds = None if masks.is_plain else block_kinds(masks, L, S, q.device)
        peaks = _launch_peaks(q, k, summaries, scale, masks, kinds)
    query_blocks, key_blocks = peaks.shape[2:]
    kept = torch.empty(B, H, query_blocks, capacity(key_blocks), dtype=torch.int32, device=q.device)
    counts = torch.empty(B, H, query_blocks, dtype=torch.int32, device=q.device)
    _pack_lists[(counts.numel(),)](
        peaks, single_count, rest_count, kinds, protected, kept, counts, count_stride, _batch_stride(kinds),
        _batch_stride(protected), query_blocks, key_blocks, kept.shape[3], H, L, _offset(masks.causal_offset, S),
        tolerance, None if shifts is None else tuple(shifts), max_density, sinks, local,
        ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, WIDTH=PACK_WIDTH, PLAIN=kinds is None,
        HAS_KEY_MASK=masks.key_mask is not None, SHIFTS=0 if shifts is None else len(shifts),
        PROTECTED=protected is not None, num_warps=PACK_WARPS)
    return KeptLists(kept, counts)


def runs_on_hopper(q: Tensor, k: Tensor, masks: Masks, singles: int) -> bool:
    """Whether selection takes its peaks from hopper_select.py."""
    if not q.is_cuda:
        return False
    from sparsify.kernels import hopper_select

    return hopper_select.why_not(q, k, masks, singles) is None


def estimated_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, singles: int) -> Tensor:
    """Peaks alone, for calibration and tests; arguments as above."""
    q, k = _fit(q), _fit(k)
    kinds = None if masks.is_plain else block_kinds(masks, q.shape[2], k.shape[2], q.device)
    return _launch_peaks(q, k, summarise_keys(k, singles, masks.key_mask), scale, masks, kinds)


def _launch_peaks(q: Tensor, k: Tensor, summaries: SplitSummaries, scale: float, masks: Masks,
                  kinds: Tensor | None) -> Tensor:
    """Launch `_estimate_peaks`, or with the kinds of all blocks `_estimate_masked_peaks`."""
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    q, scale = positive_scale(q, scale)
    singles = summaries.singles.shape[2]
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(S, KEY_BLOCK)
    units = B * H * query_blocks
    programs = min(units, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device))
    chunk, warps = _configuration(q.element_size())
    chunks = count_blocks(key_blocks, chunk)
    # Masses are at most singles + 1, or a block's keys: half precision keeps eleven bits of every share above 6e-5.
    mass_type = torch.float32 if q.element_size() == 4 else torch.float16
    scratch = torch.empty(programs, chunks, QUERY_BLOCK, chunk, dtype=mass_type, device=q.device)
    scratch_peaks = torch.empty(programs, chunks, QUERY_BLOCK, dtype=torch.float32, device=q.device)
    peaks = torch.empty(B, H, query_blocks, key_blocks, dtype=torch.float32, device=q.device)
    key_mask = masks.key_mask
    mask_strides = (0, 0) if key_mask is None else (key_mask.stride(0) * (len(key_mask) > 1), key_mask.stride(1))
    inputs = (q, k, k if key_mask is None else key_mask)
    results = (*summaries, peaks, scratch, scratch_peaks, *q.stride(), *k.stride(), *mask_strides)
    sizes = (query_blocks, key_blocks, units, H, H // Hkv, L, S, _offset(masks.causal_offset, S), scale * LOG2_E,
             scale * math.sqrt(LOG2_E))
    constants: dict[str, Any] = {
        "SINGLES": singles, "STAGES": STAGES, "ROWS": QUERY_BLOCK, "BLOCK": KEY_BLOCK, "CHUNK": chunk, "D": D,
        "D_PAD": max(16, triton.next_power_of_2(D)), "HAS_KEY_MASK": key_mask is not None, "num_warps": warps,
        "num_stages": 1, "maxnreg": REGISTERS}
    if kinds is None:
        _estimate_peaks[(programs,)](*inputs, *results, _count_stride(summaries), *sizes, _log2(KEY_BLOCK - singles),
                                     _log2(S % KEY_BLOCK - singles), **constants)
        return peaks
    bias = block_bias(masks, S)
    bias_strides = (0, 0, 0) if bias is None else tuple(bias.stride(i) * (bias.shape[i] > 1) for i in range(3))
    extras, extra_constants = score_arguments(masks, q)
    _estimate_masked_peaks[(programs,)](*inputs, kinds, q if bias is None else bias, *results, _batch_stride(kinds),
                                        *bias_strides, _count_stride(summaries), *sizes, *extras, **constants,
                                        BIASED=bias is not None, **extra_constants)
    return peaks


def _batch_stride(flags: Tensor | None) -> int:
    """From one batch's flags to the next; 0 where all share one."""
    return 0 if flags is None or len(flags) == 1 else flags.stride(0)


def _fit(x: Tensor) -> Tensor:
    """float32 beyond 128 dims is estimated in bfloat16: a query block and its squares would overflow shared memory."""
    return x.bfloat16() if x.element_size() == 4 and x.shape[3] > 128 and x.is_cuda else x


def _offset(causal_offset: int | None, S: int) -> int:
    """Where there is no causality: past the end of a ragged last block, so that no block is a boundary."""
    return S + KEY_BLOCK if causal_offset is None else causal_offset


def _log2(count: int) -> float:
    return math.log2(count) if count > 0 else -math.inf


def _configuration(itemsize: int) -> tuple[int, int]:
    """Key blocks at once, and warps of a program.

    float32 products run on ordinary cores, out of registers: fewer columns, so that less of them spills.
    """
    return (16, 8) if itemsize == 4 else (64, 4)


def _count_stride(summaries: SplitSummaries) -> int:
    """From one batch's counts to the next; 0 where all share one."""
    masks, blocks = summaries.rest_count.shape
    return blocks if masks > 1 else 0
