"""Gluon: the loading warp of the Hopper forward (hopper_forward.py), which walks queue and lists and starts all copies.

It takes a query block, tells both warpgroups by mail, copies the queries, and then K and V tile by tile: V one tile
behind K. Where tiles may need a mask, it notes beside every K tile whether it does. All arguments as the kernel's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sparsify.kernels.splits import FIRST_AT, ROW, ROW_AT, SLOT_AT, TILES


@gluon.jit
def load_tiles(q, k, v, q_tiles, k_tiles, v_tiles, notes, mail, bars, kept_pairs, queue, counter, blocks,
               pair_capacity, query_blocks, H, GROUP, L, S, offset, window, facts, ROWS: gl.constexpr,
               BLOCK: gl.constexpr, KIND: gl.constexpr):
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
        pairs = pairs_of(block, KIND)
        row = row_of(block, KIND)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        batch = head_row // H
        head = head_row - batch * H
        first_block, behind = _shown_blocks(first_row, L, S, offset, window, ROWS, BLOCK, KIND)
        own_pairs = kept_pairs
        if KIND.in_pieces:
            own_pairs += first_pair_of(block)
        ahead = _read_pair(own_pairs, row, pair_capacity, pairs - 1, first_block, KIND)
        slot = turn & 1
        mbarrier.wait(mail_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mail.index(slot * 3).store(gl.full([1], block, gl.int64, one))
        if not KIND.noted:
            mail.index(slot * 3 + 1).store(gl.full([1], ahead, gl.int64, one))
            before = _read_pair(own_pairs, row, pair_capacity, pairs - 2, first_block, KIND)
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

        q_slot, q_phase = query_place(turn, KIND)
        mbarrier.wait(q_empty.index(q_slot), q_phase ^ 1)
        mbarrier.expect(q_full.index(q_slot), ROWS * KIND.dim * 2)
        tma.async_copy_global_to_shared(q, [batch, head, first_row, 0], q_full.index(q_slot), q_tiles.index(q_slot * 2))
        tma.async_copy_global_to_shared(q, [batch, head, first_row + ROWS // 2, 0], q_full.index(q_slot),
                                        q_tiles.index(q_slot * 2 + 1))
        turn += 1
        for done in range(0, pairs):
            pair = ahead
            ahead = _read_pair(own_pairs, row, pair_capacity, pairs - 2 - done, first_block, KIND)
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
def _take(queue, place, blocks, query_blocks, L, S, offset, window, ROWS: gl.constexpr, BLOCK: gl.constexpr,
          KIND: gl.constexpr):
    """The query block at this place of the order, longest list first, as (row << 32 | pairs); -1 behind the last.

    Where lists are in pieces, the unit at this place.
    """
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
def blocks_of_pair(pair, KIND: gl.constexpr):
    """The first and the last key block of a pair; in lists that are walked one by one, the same."""
    first = (pair & 0xFFFFFFFF).to(gl.int32)
    if KIND.tile == 1:
        return first, first
    return first, (pair >> 32).to(gl.int32)


@gluon.jit
def _load_pair(source, batch, head, pair, full, tile, D: gl.constexpr, BLOCK: gl.constexpr, KIND: gl.constexpr):
    """Start copying the key blocks of `pair` into the halves of `tile`; keys past the end arrive as zeros."""
    mbarrier.expect(full, KIND.tile * BLOCK * D * 2)
    first, second = blocks_of_pair(pair, KIND)
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
    first, second = blocks_of_pair(pair, KIND)
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
def query_place(turn, KIND: gl.constexpr):
    """Slot and phase of the query block of this turn."""
    if KIND.is_wide:
        return 0, turn & 1
    return turn & 1, (turn >> 1) & 1


@gluon.jit
def pairs_of(block, KIND: gl.constexpr):
    """Pairs of a query block as it travels, or of a unit (splits.py)."""
    if KIND.in_pieces:
        return (block & TILES).to(gl.int32)
    return (block & 0xFFFFFFFF).to(gl.int32)


@gluon.jit
def row_of(block, KIND: gl.constexpr):
    """Which query block it is, or is a piece of; -1 behind the last."""
    if KIND.in_pieces:
        row = ((block >> ROW_AT) & ROW).to(gl.int32)
        return gl.where(block >= 0, row, -1)
    return (block >> 32).to(gl.int32)


@gluon.jit
def first_pair_of(unit):
    """Where a piece begins in its list."""
    return ((unit >> FIRST_AT) & TILES).to(gl.int32)


@gluon.jit
def slot_of(unit):
    """Where the output of a piece goes."""
    return (unit >> SLOT_AT).to(gl.int32)
