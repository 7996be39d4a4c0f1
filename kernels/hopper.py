"""Block-sparse attention forward for Hopper, in Gluon: the fast path, also at density 1.

    q       [B, H, L, D]       fp16 or bf16; D and Dv up to 256, Dv a multiple of 8; last dimension dense, other strides
                               multiples of 16 bytes
    k, v    [B, Hkv, S, D], [B, Hkv, S, Dv]       as q; query head h reads KV head h // (H // Hkv)
    kept    [B, H, blocks of 128 rows, capacity]  int32 lists of 64-key blocks, see `KeptLists`
    counts  [B, H, blocks of 128 rows]            int32, even, at least 2
    masks   see kernels/masks.py; every one of them
    out     [B, H, L, Dv]      in the dtype of q, in memory [B, L, H, Dv]
    lse     [B, H, L]          float32, natural log of the row's sum, sink included; a row that sees no key: zeros and,
                               without a sink, -inf
    errors  none here: the op checks shapes, `why_not` says which calls this kernel does not cover

One program per multiprocessor takes query blocks from a queue, longest list first. Exact attention (`attention`) has
neither lists nor a queue: a place in the order says the query block, and that the keys. In a program one warp loads
(TMA), two warpgroups compute, 64 rows each, with all their softmax state: no data crosses warpgroups. Lists are walked
from the end, two key blocks (a pair) at a time: under causality alone the blocks that need a mask are the last
entries, so the mask sits in the first step or two and the main loop has none. The last product of a query block is
issued together with the first of the next: short lists leave no bubble.

Under a key mask, a window or documents any pair may need a mask, and few do. The loader knows: it compares the edges of
the pair with those of the query block, and looks the blocks up in a table of facts (the shown keys as bits, the lowest
and highest document). Its verdict lies beside every K tile. A mask tensor is read by the warpgroups at every step.

With a mask tensor, or heads wider than 128, a tile is one key block and a pair is just that. Wide heads fill shared
memory: queries of one query block at a time, and nothing of the next begins before the last is done.

Source: the structure of FlashAttention-3 (arXiv 2407.08608), less what did not pay here (README.md in this folder).
"""

from dataclasses import dataclass, replace
from typing import Any

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
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE, count_blocks
from sparsify.kernels.launch import descriptor, is_hopper, launched, multiprocessors
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E, score_arguments

STAGES = 2  # K and V tiles in flight; a third changed nothing (-6 .. +4 %, noise) and would need O to share Q's room
LEVELS = 256  # list lengths the queue tells apart
QUEUE_CHUNK = 2048  # rows the queue sorts at once
# 168 registers x 384 threads are the register file. The loader's group gives most of its share to the two warpgroups,
# which then hold scores, weights and output (160 registers) without a spill. 24 for the loader spill.
REGISTERS = 168
WARPGROUP_REGISTERS = 232
LOADER_REGISTERS = 40
WIDEST = 256  # head dim
FACTS_CHUNK = 32  # blocks whose facts a program gathers
ROWS_OF_A_HEAD = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # of descriptors


@dataclass(frozen=True)
class Kind:
    """One compiled kernel. All of it in fields: Triton's cache on disk tells kernels apart by how this prints."""

    dim: int  # head dims as padded
    value_dim: int
    is_wide: bool  # heads fill shared memory: one query block at a time
    shares_room: bool  # a query block's output goes where its queries were
    tile: int  # key blocks of a compute tile
    stages: int  # K and V tiles in flight
    key_mask: bool  # from here on, what scores meet beyond causality
    window: bool
    documents: bool
    has_mask: bool
    has_bias: bool
    pair_bytes: int  # of two neighbours in a row of the mask tensor, if they can be read at once
    capped: bool
    sinks: bool
    noted: bool  # tiles before the last two of a list may need a mask: the loader notes of every tile if it does
    rescores: bool  # scores are brought to units of log2 before the softmax, which else does it in passing
    walks_all: bool  # exact attention: every block that causality and the window show, without lists


@gluon.jit
def _take(queue, place, blocks, query_blocks, L, S, offset, window, ROWS: gl.constexpr, BLOCK: gl.constexpr,
          KIND: gl.constexpr):
    """The query block at this place of the order, longest list first, as (row << 32 | pairs); -1 behind the last."""
    if KIND.walks_all:
        head_rows = blocks // query_blocks
        query_block = query_blocks - 1 - place // head_rows
        first, behind = _shown_blocks(query_block * ROWS, L, S, offset, window, ROWS, BLOCK, KIND)
        pairs = gl.maximum((behind - first + KIND.tile - 1) // KIND.tile, 1)
        row = place % head_rows * query_blocks + query_block
        taken = (row.to(gl.int64) << 32) | pairs.to(gl.int64)
    else:
        taken = gl.load(queue + gl.minimum(place, blocks - 1))
    return gl.where(place < blocks, taken, -1)


@gluon.jit
def _shown_blocks(first_row, L, S, offset, window, ROWS: gl.constexpr, BLOCK: gl.constexpr, KIND: gl.constexpr):
    """The first key block that a row of this query block sees by causality and the window, and the one behind the last;
    equal where no row sees any."""
    last_row = gl.minimum(first_row + ROWS, L) - 1
    behind = gl.minimum(gl.maximum(last_row + offset + BLOCK, 0) // BLOCK, (S + BLOCK - 1) // BLOCK)
    first = behind * 0
    if KIND.window:
        first = gl.minimum(gl.maximum(first_row + offset - window + 1, 0) // BLOCK, behind)
    return first, behind


@gluon.jit
def _read_pair(kept_pairs, row, pair_capacity, pair, first_block, KIND: gl.constexpr):
    """Key blocks of pair number `pair` of a list, one in each half of an int64; a read ahead of pair 0 gives pair 0.

    Without lists, neighbours from `first_block` on. The second may lie behind all that is shown, where the last tile,
    which is always masked, hides it.
    """
    if KIND.walks_all:
        block = (first_block + gl.maximum(pair, 0) * KIND.tile).to(gl.int64)
        if KIND.tile == 2:
            block = block | ((block + 1) << 32)
        return block
    return gl.load(kept_pairs + row.to(gl.int64) * pair_capacity + gl.maximum(pair, 0)).to(gl.int64)


@gluon.jit
def _blocks(pair, KIND: gl.constexpr):
    """The first and the last key block of a pair; in lists that are walked one by one, the same."""
    first = (pair & 0xFFFFFFFF).to(gl.int32)
    if KIND.tile == 1:
        return first, first
    return first, (pair >> 32).to(gl.int32)


@gluon.jit
def _load_pair(source, batch, head, pair, full, tile, D: gl.constexpr, BLOCK: gl.constexpr, KIND: gl.constexpr):
    """Start copying the key blocks of `pair` into the halves of `tile`; keys past the end arrive as zeros."""
    mbarrier.expect(full, KIND.tile * BLOCK * D * 2)
    first, second = _blocks(pair, KIND)
    first *= BLOCK
    second *= BLOCK
    tma.async_copy_global_to_shared(source, [batch, head, first, 0], full, tile.slice(0, BLOCK, 0))
    if KIND.tile == 2:
        tma.async_copy_global_to_shared(source, [batch, head, second, 0], full, tile.slice(BLOCK, BLOCK, 0))


@gluon.jit
def _judge_pair(pair, key_facts, row_low, row_high, last_whole, first_whole, BLOCK: gl.constexpr, KIND: gl.constexpr):
    """What the loader notes of a pair: itself, or -1 - pair if it needs a mask; the shown keys of both blocks as bits.

    All rows see the keys from `first_whole` to `last_whole`, and are of documents `row_low` to `row_high`.
    """
    first, second = _blocks(pair, KIND)
    cut = second * BLOCK + BLOCK - 1 > last_whole
    if KIND.window:
        cut = cut | (first * BLOCK < first_whole)
    first_shown = pair
    second_shown = pair
    if KIND.key_mask:
        first_shown = gl.load(key_facts + first * 3)
        second_shown = gl.load(key_facts + second * 3)
        cut = cut | ((first_shown & second_shown) != -1)
    if KIND.documents:
        low = gl.minimum(gl.load(key_facts + first * 3 + 1), gl.load(key_facts + second * 3 + 1))
        high = gl.maximum(gl.load(key_facts + first * 3 + 2), gl.load(key_facts + second * 3 + 2))
        cut = cut | (gl.minimum(low, row_low) != gl.maximum(high, row_high))
    return gl.where(cut, -1 - pair, pair), first_shown, second_shown


@gluon.jit
def _q_place(turn, KIND: gl.constexpr):
    """Slot and phase of the query block of this turn."""
    if KIND.is_wide:
        return 0, turn & 1
    return turn & 1, (turn >> 1) & 1


@gluon.jit
def _loader(q, k, v, q_tiles, k_tiles, v_tiles, notes, mail, bars, kept_pairs, queue, counter, blocks, pair_capacity,
            query_blocks, H, GROUP, L, S, offset, window, facts, ROWS: gl.constexpr, BLOCK: gl.constexpr,
            KIND: gl.constexpr):
    """Feed both warpgroups. V runs one tile behind K, also from one query block to the next unless heads are wide."""
    STAGES: gl.constexpr = KIND.stages
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    key_facts, stride_key_facts, row_facts, stride_row_facts = facts
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0  # K tiles since the kernel began
    turn = 0  # query blocks since the kernel began
    v_pair = gl.to_tensor(0).to(gl.int64)
    v_batch = 0
    v_head = 0
    # A query block travels as (row << 32 | pairs) in one integer: Triton 3.6.0 mixes up old and new of two loop-carried
    # scalars of which one is loaded through the other. Negative: no more.
    block = _take(queue, gl.program_id(0), blocks, query_blocks, L, S, offset, window, ROWS, BLOCK, KIND)
    while block >= 0:
        pairs = (block & 0xFFFFFFFF).to(gl.int32)
        row = (block >> 32).to(gl.int32)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        batch = head_row // H
        head = head_row - batch * H
        first_block, behind = _shown_blocks(first_row, L, S, offset, window, ROWS, BLOCK, KIND)
        ahead = _read_pair(kept_pairs, row, pair_capacity, pairs - 1, first_block, KIND)
        slot = turn & 1
        mbarrier.wait(mail_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mail.index(slot * 3).store(gl.full([1], block, gl.int64, one))
        if not KIND.noted:
            mail.index(slot * 3 + 1).store(gl.full([1], ahead, gl.int64, one))
            before = _read_pair(kept_pairs, row, pair_capacity, pairs - 2, first_block, KIND)
            mail.index(slot * 3 + 2).store(gl.full([1], before, gl.int64, one))
        mbarrier.arrive(mail_full.index(slot), count=1)
        place = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        following = _take(queue, place, blocks, query_blocks, L, S, offset, window, ROWS, BLOCK, KIND)
        if KIND.noted:
            last_whole = gl.minimum(first_row + offset, S - 1)
            first_whole = first_row + ROWS + offset - window
            own_facts = key_facts + batch.to(gl.int64) * stride_key_facts
            row_low = block
            row_high = block
            if KIND.documents:
                own_rows = row_facts + batch.to(gl.int64) * stride_row_facts + (row - head_row * query_blocks) * 3
                row_low = gl.load(own_rows + 1)
                row_high = gl.load(own_rows + 2)

        q_slot, q_phase = _q_place(turn, KIND)
        mbarrier.wait(q_empty.index(q_slot), q_phase ^ 1)
        mbarrier.expect(q_full.index(q_slot), ROWS * KIND.dim * 2)
        tma.async_copy_global_to_shared(q, [batch, head, first_row, 0], q_full.index(q_slot), q_tiles.index(q_slot * 2))
        tma.async_copy_global_to_shared(q, [batch, head, first_row + ROWS // 2, 0], q_full.index(q_slot),
                                        q_tiles.index(q_slot * 2 + 1))
        turn += 1
        for done in range(0, pairs):
            pair = ahead
            ahead = _read_pair(kept_pairs, row, pair_capacity, pairs - 2 - done, first_block, KIND)
            stage = step % STAGES
            if KIND.noted:
                noted, first_shown, second_shown = _judge_pair(pair, own_facts, row_low, row_high, last_whole,
                                                               first_whole, BLOCK, KIND)
                mbarrier.wait(k_empty.index(stage), ((step // STAGES) & 1) ^ 1)
                notes.index(stage * 3).store(gl.full([1], noted, gl.int64, one))
                if KIND.key_mask:
                    notes.index(stage * 3 + 1).store(gl.full([1], first_shown, gl.int64, one))
                    notes.index(stage * 3 + 2).store(gl.full([1], second_shown, gl.int64, one))
            else:
                mbarrier.wait(k_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_pair(k, batch, head // GROUP, pair, k_full.index(stage), k_tiles.index(stage), KIND.dim,
                       BLOCK, KIND)
            if (done if KIND.is_wide else step) > 0:
                stage = (step - 1) % STAGES
                mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
                _load_pair(v, v_batch, v_head, v_pair, v_full.index(stage), v_tiles.index(stage), KIND.value_dim,
                           BLOCK, KIND)
            v_pair = pair
            v_batch = batch
            v_head = head // GROUP
            step += 1
        if KIND.is_wide:  # the room of the next query block frees up only behind this tile
            stage = (step - 1) % STAGES
            mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
            _load_pair(v, v_batch, v_head, v_pair, v_full.index(stage), v_tiles.index(stage), KIND.value_dim, BLOCK,
                       KIND)
        block = following
    slot = turn & 1
    mbarrier.wait(mail_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    mail.index(slot * 3).store(gl.full([1], block, gl.int64, one))
    mbarrier.arrive(mail_full.index(slot), count=1)
    if not KIND.is_wide:
        stage = (step - 1) % STAGES
        mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
        _load_pair(v, v_batch, v_head, v_pair, v_full.index(stage), v_tiles.index(stage), KIND.value_dim, BLOCK, KIND)


@gluon.jit
def _read_notes(notes, stage, KIND: gl.constexpr):
    """What `_judge_pair` said of the K tile in this stage."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    noted = gl.max(notes.index(stage * 3).load(one), 0)
    first_shown = noted
    second_shown = noted
    if KIND.key_mask:
        first_shown = gl.max(notes.index(stage * 3 + 1).load(one), 0)
        second_shown = gl.max(notes.index(stage * 3 + 2).load(one), 0)
    return noted, first_shown, second_shown


@gluon.jit
def _first_notes(notes, stage, pair, more, KIND: gl.constexpr):
    """The pair of the first tile of a query block, and its shown keys. Where there is no more, notes are stale."""
    first_shown = pair
    second_shown = pair
    if KIND.noted:
        noted, first_shown, second_shown = _read_notes(notes, stage, KIND)
        pair = gl.where(more, gl.where(noted < 0, -1 - noted, noted), 0)
    return pair, first_shown, second_shown


@gluon.jit
def _are_shown(first_shown, second_shown, columns, BLOCK: gl.constexpr):
    """Bit number `column` of both blocks' bits. A shift per thread and a constant bit: a shift per key costs double."""
    half: gl.constexpr = BLOCK // 2
    low = gl.where(columns < BLOCK, first_shown.to(gl.int32), second_shown.to(gl.int32))
    high = gl.where(columns < BLOCK, (first_shown >> half).to(gl.int32), (second_shown >> half).to(gl.int32))
    bits = gl.where(columns & half == 0, low, high) >> (columns & 7)
    return (bits & (1 << (columns & (half - 8)))) != 0


@gluon.jit
def _mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK: gl.constexpr,
                 KIND: gl.constexpr):
    """-inf where a mask hides the key from the row; a bias is added to scores in units of log2."""
    last_key, hidden, documents, own_documents, mask_rows, mask_height = view
    first, second = _blocks(pair, KIND)
    keys = columns + gl.where(columns < BLOCK, first * BLOCK, second * BLOCK - BLOCK)
    visible = keys[None, :] <= last_key[:, None]
    if KIND.window:
        visible = visible & (keys[None, :] > hidden[:, None])
    if KIND.key_mask:
        visible = visible & _are_shown(first_shown, second_shown, columns, BLOCK)[None, :]
    if KIND.documents:
        ids = gl.load(own_documents + keys, mask=keys < S, other=0)
        visible = visible & (ids[None, :] == documents[:, None])
    if KIND.has_mask:
        at = (first.to(gl.int64) * BLOCK + columns.to(gl.int64)) * extras[8]
        pointers = mask_rows[:, None] + at[None, :]
        inside = (rows < mask_height)[:, None] & (keys < S)[None, :]
        PAIR_BYTES: gl.constexpr = KIND.pair_bytes
        if PAIR_BYTES != 0:
            pointers = gl.max_contiguous(gl.multiple_of(pointers, [1, PAIR_BYTES]), [1, 2])
            inside = gl.max_constancy(inside, [1, 2])
        given = gl.load(pointers, mask=inside, other=0)
        if KIND.has_bias:
            scores += given.to(gl.float32) * 1.4426950408889634
        else:
            visible = visible & (given != 0)
    return gl.where(visible, scores, -float("inf"))


@gluon.jit
def _cap_scores(products, scale_log2, cap_log2):
    """cap * tanh(scores / cap), as cap - 2 cap / (1 + e^(2 scores / cap)): wrong by a rounding unit of the cap."""
    growth = gl.exp2(products * (scale_log2 / cap_log2 * 2.8853900817779268))
    return cap_log2 - 2 * cap_log2 * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + growth], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _attend_pair(q_tile, k_tiles, v_tiles, notes, bars, zero, weights, acc, peak, total, step, scale_log2, pair, view,
                 extras, rows, columns, S, masked, BLOCK: gl.constexpr, weights_layout: gl.constexpr,
                 acc_rows: gl.constexpr, KIND: gl.constexpr):
    """Scores of the next K tile while the product of the previous weights with their V tile runs; then the softmax."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    STAGES: gl.constexpr = KIND.stages
    v_stage = step % STAGES
    v_phase = (step // STAGES) & 1
    step += 1
    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
    first_shown = pair
    second_shown = pair
    if KIND.noted:
        noted, first_shown, second_shown = _read_notes(notes, stage, KIND)
        masked = noted < 0
        pair = gl.where(masked, -1 - noted, noted)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if KIND.capped:
        scores = _cap_scores(scores, scale_log2, extras[9])
    elif KIND.has_bias:
        scores = scores * scale_log2
    if KIND.has_mask:
        scores = _mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
    elif masked:  # a branch: in a loop of its own, the masked step made 64 instructions a step that repack weights
        scores = _mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
    if KIND.rescores:
        scale_log2 = 1.0
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    shrink = gl.exp2(peak - new_peak)
    exponentials = gl.exp2(scores * scale_log2 - new_peak[:, None])
    total = total * shrink + gl.sum(exponentials, 1)
    new_weights = gl.convert_layout(exponentials.to(weights.dtype), weights_layout)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
    return new_weights, acc, new_peak, total, step


@gluon.jit
def _first_softmax(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, scale_log2, head,
                   BLOCK: gl.constexpr, KIND: gl.constexpr):
    """Softmax of the first tile of a query block: weights, peak and total of every row."""
    if KIND.capped:
        scores = _cap_scores(scores, scale_log2, extras[9])
    elif KIND.has_bias:
        scores = scores * scale_log2
    scores = _mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
    if KIND.rescores:
        scale_log2 = 1.0
    # The floor keeps a row finite that sees no key of this tile (or of any): its weights are exp2(-inf) = 0.
    peak = gl.maximum(gl.max(scores, 1) * scale_log2, -1.0e30)
    if KIND.sinks:
        sink = gl.load(extras[10] + head).to(gl.float32) * 1.4426950408889634
        peak = gl.maximum(peak, sink)
    exponentials = gl.exp2(scores * scale_log2 - peak[:, None])
    total = gl.sum(exponentials, 1)
    if KIND.sinks:
        total += gl.exp2(sink - peak)
    return exponentials, peak, total


@gluon.jit
def _view(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS: gl.constexpr, KIND: gl.constexpr):
    """What the rows of a query block see: each one's last key, the last key before its window, its document; the
    documents of all keys; the address of the first row's mask, and the rows that are left from there on."""
    row = (block >> 32).to(gl.int32)
    last_key = gl.minimum((row % query_blocks) * ROWS + rows + offset, S - 1)
    hidden = last_key
    documents = last_key
    own_documents = row
    mask_rows = row
    mask_height = row
    if KIND.noted:
        query_documents, key_documents, stride_query_documents, stride_key_documents = extras[:4]
        attn_mask, stride_mb, stride_mh, stride_ms, stride_mt = extras[4:9]
        row = gl.maximum(row, 0)  # behind the last query block there is none: anything that is inside
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        batch = (head_row // H).to(gl.int64)
        if KIND.window:
            hidden = first_row + rows + offset - window
        if KIND.documents:
            own_documents = key_documents + batch * stride_key_documents
            documents = gl.load(query_documents + batch * stride_query_documents + first_row + rows,
                                mask=first_row + rows < L, other=0)
        if KIND.has_mask:
            mask_rows = (attn_mask + batch * stride_mb + (head_row % H).to(gl.int64) * stride_mh
                         + (first_row + rows).to(gl.int64) * stride_ms)
            mask_height = L - first_row
    return last_key, hidden, documents, own_documents, mask_rows, mask_height


@gluon.jit
def _warpgroup(WARPGROUP: gl.constexpr, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, notes, mail, bars,
               query_blocks, H, L, S, offset, scale_log2, window, extras, ROWS: gl.constexpr, BLOCK: gl.constexpr,
               KIND: gl.constexpr):
    """Compute half of the rows of every query block that arrives by mail."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    HALF: gl.constexpr = ROWS // 2
    STAGES: gl.constexpr = KIND.stages
    D: gl.constexpr = KIND.value_dim
    KEYS: gl.constexpr = KIND.tile * BLOCK
    dtype: gl.constexpr = q_tiles.dtype
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    zero = gl.zeros([HALF, KEYS], gl.float32, scores_layout)
    rows = gl.arange(0, HALF, score_rows) + WARPGROUP * HALF
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, scores_layout))

    mbarrier.wait(mail_full.index(0), 0)
    block = gl.max(mail.index(0).load(one), 0)
    last = block
    before = block
    if not KIND.noted:
        last = gl.max(mail.index(1).load(one), 0)
        before = gl.max(mail.index(2).load(one), 0)
    mbarrier.arrive(mail_empty.index(0), count=1)
    step = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_tiles.index(WARPGROUP), k_tiles.index(0).permute([1, 0]), zero, use_acc=False,
                           is_async=True)
    last, first_shown, second_shown = _first_notes(notes, 0, last, block >= 0, KIND)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    view = _view(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
    head = ((block >> 32).to(gl.int32) // query_blocks) % H
    exponentials, peak, total = _first_softmax(scores, last, first_shown, second_shown, view, extras, rows, columns, S,
                                               scale_log2, head, BLOCK, KIND)
    weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
    acc = gl.zeros([HALF, D], gl.float32, acc_layout)

    while block >= 0:
        pairs = (block & 0xFFFFFFFF).to(gl.int32)
        row = (block >> 32).to(gl.int32)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        q_slot, q_phase = _q_place(turn, KIND)
        q_tile = q_tiles.index(q_slot * 2 + WARPGROUP)
        # Under causality alone at most four entries need a mask: three blocks under the diagonal of 128 rows, and a
        # padding id.
        view = _view(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
        seen_whole = gl.minimum(first_row + offset, S - 1)
        end = ((before >> 32).to(gl.int32) + 1) * BLOCK
        for pair in range(1, pairs):
            weights, acc, peak, total, step = _attend_pair(
                q_tile, k_tiles, v_tiles, notes, bars, zero, weights, acc, peak, total, step, scale_log2, before, view,
                extras, rows, columns, S, (pair == 1) & (end - 1 > seen_whole), BLOCK, weights_layout, acc_rows,
                KIND)
        if not KIND.shares_room:
            mbarrier.arrive(q_empty.index(q_slot), count=1)

        turn += 1
        slot = turn & 1
        mbarrier.wait(mail_full.index(slot), (turn >> 1) & 1)
        following = gl.max(mail.index(slot * 3).load(one), 0)
        last = following
        before = following
        if not KIND.noted:
            last = gl.max(mail.index(slot * 3 + 1).load(one), 0)
            before = gl.max(mail.index(slot * 3 + 2).load(one), 0)
        mbarrier.arrive(mail_empty.index(slot), count=1)
        more = following >= 0
        v_stage = step % STAGES
        v_phase = (step // STAGES) & 1
        step += 1
        stage = step % STAGES
        q_slot, q_phase = _q_place(turn, KIND)
        # The first scores of the next query block with the last product of this one. Behind the last query block
        # they are taken of stale tiles and thrown away.
        if not KIND.is_wide:
            mbarrier.wait(q_full.index(q_slot), q_phase, pred=more)
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=more)
            scores = warpgroup_mma(q_tiles.index(q_slot * 2 + WARPGROUP), k_tiles.index(stage).permute([1, 0]), zero,
                                   use_acc=False, is_async=True)
            last, first_shown, second_shown = _first_notes(notes, stage, last, more, KIND)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
        if not KIND.is_wide:
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1, pred=more)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        row_lse = (peak + gl.log2(total)) * 0.6931471805599453
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        acc = acc * gl.convert_layout(inverse, acc_rows)[:, None]
        tma.store_wait(0)
        out_tile = out_tiles.index(WARPGROUP)
        out_tile.store(acc.to(dtype))
        fence_async_shared()
        batch = head_row // H
        tma.async_copy_shared_to_global(out, [batch, head_row - batch * H, first_row + WARPGROUP * HALF, 0], out_tile)
        gl.store(lse + head_row.to(gl.int64) * L + first_row + rows, row_lse, mask=first_row + rows < L)

        if KIND.is_wide:
            if KIND.shares_room:
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(q_slot), count=1)
            mbarrier.wait(q_full.index(q_slot), q_phase, pred=more)
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=more)
            scores = warpgroup_mma(q_tiles.index(q_slot * 2 + WARPGROUP), k_tiles.index(stage).permute([1, 0]), zero,
                                   use_acc=False, is_async=True)
            last, first_shown, second_shown = _first_notes(notes, stage, last, more, KIND)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1, pred=more)

        view = _view(following, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
        head = gl.maximum((following >> 32).to(gl.int32) // query_blocks, 0) % H
        exponentials, peak, total = _first_softmax(scores, last, first_shown, second_shown, view, extras, rows,
                                                   columns, S, scale_log2, head, BLOCK, KIND)
        weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
        acc = gl.zeros([HALF, D], gl.float32, acc_layout)
        block = following
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["blocks", "pair_capacity", "query_blocks", "H", "GROUP", "L", "S", "offset", "window",
                              "stride_query_documents", "stride_key_documents", "stride_mb", "stride_mh",
                              "stride_key_facts", "stride_row_facts"])
def _block_sparse_attention(q, k, v, out, lse, kept_pairs, queue, counter, blocks, pair_capacity, query_blocks, H,
                            GROUP, L, S, offset, scale_log2, window, query_documents, key_documents,
                            stride_query_documents, stride_key_documents, attn_mask, stride_mb, stride_mh, stride_ms,
                            stride_mt, cap_log2, sinks, key_facts, stride_key_facts, row_facts, stride_row_facts,
                            ROWS: gl.constexpr, BLOCK: gl.constexpr, KIND: gl.constexpr,
                            WARPGROUP_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr):
    dtype: gl.constexpr = q.dtype
    STAGES: gl.constexpr = KIND.stages
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KIND.tile * BLOCK, KIND.dim], dtype)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KIND.tile * BLOCK, KIND.value_dim], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2 if KIND.is_wide else 4, ROWS // 2, KIND.dim], tile_layout)
    out_tiles = q_tiles
    if not KIND.shares_room:
        out_tiles = gl.allocate_shared_memory(dtype, [2, ROWS // 2, KIND.value_dim], value_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, KIND.tile * BLOCK, KIND.dim], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, KIND.tile * BLOCK, KIND.value_dim], value_layout)
    mail = gl.allocate_shared_memory(gl.int64, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = mail
    if KIND.noted:
        notes = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(mail_full.index(i), count=1)
        mbarrier.init(mail_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty)
    facts = (key_facts, stride_key_facts, row_facts, stride_row_facts)
    extras = (query_documents, key_documents, stride_query_documents, stride_key_documents, attn_mask, stride_mb,
              stride_mh, stride_ms, stride_mt, cap_log2, sinks)
    gl.warp_specialize([
        (_warpgroup, (0, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, notes, mail, bars, query_blocks, H, L, S,
                      offset, scale_log2, window, extras, ROWS, BLOCK, KIND)),
        (_warpgroup, (1, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, notes, mail, bars, query_blocks, H, L, S,
                      offset, scale_log2, window, extras, ROWS, BLOCK, KIND)),
        (_loader, (q, k, v, q_tiles, k_tiles, v_tiles, notes, mail, bars, kept_pairs, queue, counter, blocks,
                   pair_capacity, query_blocks, H, GROUP, L, S, offset, window, facts, ROWS, BLOCK, KIND)),
    ], [4, 1], [WARPGROUP_REGISTERS, LOADER_REGISTERS])


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


@launched
@triton.jit(do_not_specialize=["length", "blocks", "stride_batch", "stride_ids"])
def _gather_facts(shown, ids, facts, length, blocks, stride_batch, stride_shown, stride_ids, BLOCK: tl.constexpr,
                  CHUNK: tl.constexpr, HAS_SHOWN: tl.constexpr, HAS_IDS: tl.constexpr):
    """Of every block: which positions are shown, as bits; lowest and highest id. A block past the end: nothing."""
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    in_block = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + in_block[None, :]
    inside = at < length
    own_facts = facts + (batch * blocks + block) * 3
    if HAS_SHOWN:
        seen = tl.load(shown + batch * stride_batch + at.to(tl.int64) * stride_shown, inside, other=0) != 0
        tl.store(own_facts, tl.sum(seen.to(tl.int64) << in_block[None, :], 1), block < blocks)
    if HAS_IDS:
        own_ids = tl.load(ids + batch * stride_ids + at, inside, other=0).to(tl.int64)
        low = tl.min(tl.where(inside, own_ids, 0x7FFFFFFFFFFFFFFF), 1)
        high = tl.max(tl.where(inside, own_ids, -0x8000000000000000), 1)
        tl.store(own_facts + 1, low, block < blocks)
        tl.store(own_facts + 2, high, block < blocks)


def _facts(shown: Tensor | None, ids: Tensor | None, length: int, block: int, room: int,
           placeholder: Tensor) -> tuple[Tensor, int]:
    """Launch `_gather_facts` for `room` blocks: int64 [batch rows, room, 3], and its first stride, 0 if one row serves
    all; the placeholder without a key mask `shown` and without documents `ids`."""
    present = [x for x in (shown, ids) if x is not None]
    if not present:
        return placeholder, 0
    batch = max(len(x) for x in present)
    facts = torch.empty(batch, room, 3, dtype=torch.int64, device=present[0].device)
    strides = [0 if x is None or len(x) == 1 else x.stride(0) for x in (shown, ids)]
    _gather_facts[(triton.cdiv(room, FACTS_CHUNK), batch)](
        facts if shown is None else shown, facts if ids is None else ids, facts, length, room, strides[0],
        0 if shown is None else shown.stride(1), strides[1], BLOCK=block, CHUNK=FACTS_CHUNK,
        HAS_SHOWN=shown is not None, HAS_IDS=ids is not None)
    return facts, 0 if batch == 1 else facts.stride(0)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Launch `_block_sparse_attention`; arguments as above, covered by `why_not`."""
    blocks = counts.numel()
    queue = torch.empty(blocks, dtype=torch.int64, device=q.device)
    cursors = torch.empty(LEVELS + 1, dtype=torch.int32, device=q.device)
    extras, _ = score_arguments(masks, q)
    kind = _kind(q, v, masks, *extras[5:10])
    pair_capacity = kept.shape[3] // kind.tile
    _fill_queue[(1,)](counts, queue, cursors, blocks, pair_capacity, LEVELS=LEVELS, CHUNK=QUEUE_CHUNK,
                      TILE=kind.tile, num_warps=16)
    return _launch(q, k, v, kept if kind.tile == 1 else kept.view(torch.int64), pair_capacity, queue, cursors[LEVELS:],
                   kind, scale, masks, extras)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, masks: Masks) -> tuple[Tensor, Tensor]:
    """Exact attention: as `block_sparse_attention` over lists of all blocks, without making or reading them.

    Documents and key masks hide keys, but no block is skipped for them.
    """
    extras, _ = score_arguments(masks, q)
    kind = replace(_kind(q, v, masks, *extras[5:10]), walks_all=True)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    return _launch(q, k, v, counter, 0, counter, counter, kind, scale, masks, extras)


def _launch(q: Tensor, k: Tensor, v: Tensor, kept_pairs: Tensor, pair_capacity: int, queue: Tensor, counter: Tensor,
            kind: Kind, scale: float, masks: Masks, extras: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Launch the kernel of this kind; `extras` are the arguments of `score_arguments`."""
    q, scale = positive_scale(q, scale)
    B, H, L, _ = q.shape
    Hkv, S, DV = v.shape[1:]
    out = torch.empty(B, L, H, DV, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    query_blocks = count_blocks(L, QUERY_BLOCK)
    blocks = B * H * query_blocks
    row_documents, key_documents = extras[1:3] if kind.documents else (None, None)  # dense, unlike those of `masks`
    # A list may hold two padding ids: two blocks past the end.
    key_facts, stride_key_facts = _facts(masks.key_mask, key_documents, S, KEY_BLOCK, count_blocks(S, KEY_BLOCK) + TILE,
                                         queue)
    row_facts, stride_row_facts = _facts(None, row_documents, L, QUERY_BLOCK, query_blocks, queue)
    programs = min(multiprocessors(q.device), blocks)
    _block_sparse_attention[(programs,)](
        describe(q), describe(k), describe(v), describe(out), lse, kept_pairs, queue, counter,
        blocks, pair_capacity, query_blocks, H, H // Hkv, L, S,
        S if masks.causal_offset is None else masks.causal_offset,  # every row of an offset of S sees every key
        scale * LOG2_E, *extras, key_facts, stride_key_facts, row_facts, stride_row_facts,
        ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, KIND=kind, WARPGROUP_REGISTERS=WARPGROUP_REGISTERS,
        LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS)
    return out, lse


def why_not_here(q: Tensor) -> str | None:
    """Why no kernel for Hopper takes this tensor, as `why_not`: device and dtype."""
    if not is_hopper(q.device):
        return "the device is not a Hopper GPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {q.dtype}, not float16 or bfloat16"
    return None


def why_not(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str | None:
    """Why this call is not covered, in one sentence; None if it is."""
    if unsuited := why_not_here(q):
        return unsuited
    if max(q.shape[3], v.shape[3]) > WIDEST or v.shape[3] % 8:
        return (f"the head dims are {q.shape[3]} and {v.shape[3]}: both must be at most {WIDEST}, that of v a "
                "multiple of 8")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not _is_describable(tensor):
            return f"{name} has strides {tensor.stride()}: rows must be dense, everything a multiple of 16 bytes"
    return None


def _padded(dim: int) -> int:
    """A head dim as the kernel has it: the copy engine fills up with zeros."""
    return max(64, 1 << (dim - 1).bit_length())


def _kind(q: Tensor, v: Tensor, masks: Masks, mask: Tensor, stride_mb: int, stride_mh: int, stride_ms: int,
          stride_mt: int) -> Kind:
    """The kernel over lists for these head dims and masks; `mask` and its strides as the kernel gets them."""
    D, S, DV = q.shape[3], *v.shape[2:]
    dim, value_dim = _padded(D), _padded(DV)
    is_wide = max(dim, value_dim) > 128
    has_mask, has_bias, capped = masks.attn_mask is not None, masks.bias is not None, masks.softcap > 0
    # Wide outputs or the elements of a mask leave registers for 64 keys: with 128, masks spilled up to 0.6 KB.
    tile = 1 if is_wide or has_mask else TILE
    pair_bytes = 2 * mask.element_size()
    even = stride_mt == 1 and not any(x % 2 for x in (stride_mb, stride_mh, stride_ms, S))
    if not has_mask or not even or mask.data_ptr() % pair_bytes:
        pair_bytes = 0
    key_mask, window, documents = (x is not None for x in (masks.key_mask, masks.window, masks.query_documents))
    return Kind(dim, value_dim, is_wide, shares_room=is_wide and dim == value_dim, tile=tile,
                stages=STAGES if is_wide else STAGES * TILE // tile, key_mask=key_mask, window=window,
                documents=documents, has_mask=has_mask, has_bias=has_bias, pair_bytes=pair_bytes, capped=capped,
                sinks=masks.sink_logits is not None, noted=key_mask or window or documents or tile == 1,
                rescores=capped or has_bias, walks_all=False)


def _is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address a tensor of 2-byte elements as it lies."""
    strides = [tensor.stride(i) for i in range(3) if tensor.shape[i] > 1]
    return (tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in strides))


def describe(tensor: Tensor) -> TensorDescriptor:
    """The copy engine's view: boxes of 64 rows of one head, clipped at the tensor's own length and head dim."""
    dim = _padded(tensor.shape[3])
    # The stride of a dimension of size 1 means nothing to torch, but the engine checks it.
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else dim for i in range(3)]
    return descriptor(tensor, [*strides, 1], [1, 1, KEY_BLOCK, dim], ROWS_OF_A_HEAD)
