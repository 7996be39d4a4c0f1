"""Gluon: what a warpgroup of the Hopper forward (hopper_forward.py) does to the scores of a tile before the softmax.

Soft cap, bias and masks, as kernels/masks.py defines them; and the loading warp's notes, which say where masks are
needed. All arguments as the kernel's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsify.kernels.hopper_loader import blocks_of_pair, row_of


@gluon.jit
def view_of(block, rows, query_blocks, H, L, S, offset, window, extras, ROWS: gl.constexpr, KIND: gl.constexpr):
    """What the rows of a query block see: each one's last key, the last key before its window, its document; the
    documents of all keys; the address of the first row's mask, and the rows that are left from there on."""
    row = row_of(block, KIND)
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
def read_notes(notes, stage, KIND: gl.constexpr):
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
def first_notes(notes, stage, pair, more, KIND: gl.constexpr):
    """The pair of the first tile of a query block, and its shown keys. Where there is no more, notes are stale."""
    first_shown = pair
    second_shown = pair
    if KIND.noted:
        noted, first_shown, second_shown = read_notes(notes, stage, KIND)
        pair = gl.where(more, gl.where(noted < 0, -1 - noted, noted), 0)
    return pair, first_shown, second_shown


@gluon.jit
def mask_scores(scores, pair, first_shown, second_shown, view, extras, rows, columns, S, BLOCK: gl.constexpr,
                 KIND: gl.constexpr):
    """-inf where a mask hides the key from the row; a bias is added to scores in units of log2."""
    last_key, hidden, documents, own_documents, mask_rows, mask_height = view
    first, second = blocks_of_pair(pair, KIND)
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
def _are_shown(first_shown, second_shown, columns, BLOCK: gl.constexpr):
    """Bit number `column` of both blocks' bits. A shift per thread and a constant bit: a shift per key costs double."""
    half: gl.constexpr = BLOCK // 2
    low = gl.where(columns < BLOCK, first_shown.to(gl.int32), second_shown.to(gl.int32))
    high = gl.where(columns < BLOCK, (first_shown >> half).to(gl.int32), (second_shown >> half).to(gl.int32))
    bits = gl.where(columns & half == 0, low, high) >> (columns & 7)
    return (bits & (1 << (columns & (half - 8)))) != 0


@gluon.jit
def cap_scores(products, scale_log2, cap_log2):
    """cap * tanh(scores / cap), as cap - 2 cap / (1 + e^(2 scores / cap)): wrong by a rounding unit of the cap."""
    growth = gl.exp2(products * (scale_log2 / cap_log2 * 2.8853900817779268))
    return cap_log2 - 2 * cap_log2 * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + growth], dtype=gl.float32, is_pure=True, pack=1)
