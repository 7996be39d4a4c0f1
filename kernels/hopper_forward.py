"""Gluon: the kernel of the Hopper forward. What it takes and gives: hopper.py.

One program per multiprocessor takes query blocks from a queue, longest list first. Exact attention (`attention`) has
neither lists nor a queue: a place in the order says the query block, and that the keys. In a program one warp loads
(TMA), two warpgroups compute, 64 rows each, with all their softmax state: no data crosses warpgroups. Lists are walked
from the end, two key blocks (a pair) at a time: under causality alone the blocks that need a mask are the last
entries, so the mask sits in the first step or two and the main loop has none. The last product of a query block is
issued together with the first of the next: short lists leave no bubble. Where query blocks alone would leave most of
the card idle, lists are in pieces (splits.py): a unit stands for a query block, and `out` and `lse` are what the merge
reads.

Under a key mask, a window or documents any pair may need a mask, and few do. The loader knows: it compares the edges of
the pair with those of the query block, and looks the blocks up in a table of facts (the shown keys as bits, the lowest
and highest document). Its verdict lies beside every K tile. A mask tensor is read by the warpgroups at every step.

With a mask tensor, or heads wider than 128, a tile is one key block and a pair is just that. Wide heads fill shared
memory: queries of one query block at a time, and nothing of the next begins before the last is done.

Source: the structure of FlashAttention-3 (arXiv 2407.08608), less what did not pay here (README.md in this folder).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsify.kernels.hopper_loader import load_tiles, pairs_of, query_place, row_of, slot_of
from sparsify.kernels.hopper_scores import cap_scores, first_notes, mask_scores, read_notes, view_of
from sparsify.kernels.launch import launched


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
    if not (KIND.shares_room or KIND.in_pieces):
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
        (load_tiles, (q, k, v, q_tiles, k_tiles, v_tiles, notes, mail, bars, kept_pairs, queue, counter, blocks,
                   pair_capacity, query_blocks, H, GROUP, L, S, offset, window, facts, ROWS, BLOCK, KIND)),
    ], [4, 1], [WARPGROUP_REGISTERS, LOADER_REGISTERS])


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
    last, first_shown, second_shown = first_notes(notes, 0, last, block >= 0, KIND)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    view = view_of(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
    head = (row_of(block, KIND) // query_blocks) % H
    exponentials, peak, total = _first_softmax(scores, last, first_shown, second_shown, view, extras, rows, columns, S,
                                               scale_log2, head, BLOCK, KIND)
    weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
    acc = gl.zeros([HALF, D], gl.float32, acc_layout)

    while block >= 0:
        pairs = pairs_of(block, KIND)
        row = row_of(block, KIND)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        q_slot, q_phase = query_place(turn, KIND)
        q_tile = q_tiles.index(q_slot * 2 + WARPGROUP)
        # Under causality alone at most four entries need a mask: three blocks under the diagonal of 128 rows, and a
        # padding id.
        view = view_of(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
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
        q_slot, q_phase = query_place(turn, KIND)
        # The first scores of the next query block with the last product of this one. Behind the last query block
        # they are taken of stale tiles and thrown away.
        if not KIND.is_wide:
            mbarrier.wait(q_full.index(q_slot), q_phase, pred=more)
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=more)
            scores = warpgroup_mma(q_tiles.index(q_slot * 2 + WARPGROUP), k_tiles.index(stage).permute([1, 0]), zero,
                                   use_acc=False, is_async=True)
            last, first_shown, second_shown = first_notes(notes, stage, last, more, KIND)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
        if not KIND.is_wide:
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1, pred=more)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        # The merge of pieces weighs in units of log2.
        row_lse = (peak + gl.log2(total)) * (1.0 if KIND.in_pieces else 0.6931471805599453)
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        acc = acc * gl.convert_layout(inverse, acc_rows)[:, None]
        if KIND.in_pieces:
            own = slot_of(block) * ROWS
            value_rows = own + WARPGROUP * HALF + gl.arange(0, HALF, acc_rows)
            gl.store(out + value_rows[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, acc_layout))[None, :], acc)
            gl.store(lse + own + rows, row_lse)
        else:
            tma.store_wait(0)
            out_tile = out_tiles.index(WARPGROUP)
            out_tile.store(acc.to(dtype))
            fence_async_shared()
            batch = head_row // H
            tma.async_copy_shared_to_global(out, [batch, head_row - batch * H, first_row + WARPGROUP * HALF, 0],
                                            out_tile)
            gl.store(lse + head_row.to(gl.int64) * L + first_row + rows, row_lse, mask=first_row + rows < L)

        if KIND.is_wide:
            if KIND.shares_room:
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(q_slot), count=1)
            mbarrier.wait(q_full.index(q_slot), q_phase, pred=more)
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=more)
            scores = warpgroup_mma(q_tiles.index(q_slot * 2 + WARPGROUP), k_tiles.index(stage).permute([1, 0]), zero,
                                   use_acc=False, is_async=True)
            last, first_shown, second_shown = first_notes(notes, stage, last, more, KIND)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1, pred=more)

        view = view_of(following, rows, query_blocks, H, L, S, offset, window, extras, ROWS, KIND)
        head = gl.maximum(row_of(following, KIND) // query_blocks, 0) % H
        exponentials, peak, total = _first_softmax(scores, last, first_shown, second_shown, view, extras, rows,
                                                   columns, S, scale_log2, head, BLOCK, KIND)
        weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
        acc = gl.zeros([HALF, D], gl.float32, acc_layout)
        block = following
    tma.store_wait(0)


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
        noted, first_shown, second_shown = read_notes(notes, stage, KIND)
        masked = noted < 0
        pair = gl.where(masked, -1 - noted, noted)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if KIND.capped:
        scores = cap_scores(scores, scale_log2, extras[9])
    elif KIND.has_bias:
        scores = scores * scale_log2
    if KIND.has_mask:
        scores = mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
    elif masked:  # a branch: in a loop of its own, the masked step made 64 instructions a step that repack weights
        scores = mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
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
        scores = cap_scores(scores, scale_log2, extras[9])
    elif KIND.has_bias:
        scores = scores * scale_log2
    scores = mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK, KIND)
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
