"""Block-sparse attention forward in plain Triton: every call, on any GPU. hopper.py is faster where it applies.

    q         [B, H, L, D]      fp16, bf16 or fp32; any strides; D and Dv from 1 to 256, padded inside
    k, v      [B, Hkv, S, D], [B, Hkv, S, Dv]     as q; query head h reads KV head h // (H // Hkv)
    kept      [B, H, blocks of 128 rows, capacity]  int32 lists of 64-key blocks, see `KeptLists`
    counts    [B, H, blocks of 128 rows]            int32
    masks     see kernels/masks.py; every one of them
    out       [B, H, L, Dv]     in the dtype of q, in memory [B, L, H, Dv]
    lse       [B, H, L]         float32, natural log of the row's sum, sink included; a row that sees no key: zeros
                                and, without a sink, -inf
    errors    none here: the op (sparsify/ops) checks shapes and dtypes

Under causality alone the blocks that need a mask (the diagonal, a ragged end, padding ids) are the last entries of a
list: the main loop has no mask. Under anything else every block is masked.

Where query blocks alone would leave most of the card idle, lists are cut into pieces (splits.py): a program then takes
a unit in place of a query block, and writes what the merge reads.

Source: FlashAttention-2 (arXiv 2307.08691) over a list of blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, count_blocks
from sparsify.kernels.launch import launched, multiprocessors
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E, finish_scores, first_peak, in_float32, read_documents, score_arguments
from sparsify.kernels.splits import cut_lists, merge_pieces, read_unit, room_for, units_for

REGISTERS = 255  # all of them; left alone, ptxas took 32 for wide float32 heads and spilled the rest


@triton.jit
def _attend_block(query, k_tile, v_tile, key_mask, weighted, peak, total, key_block, row_inside, last_key, S,
                  stride_ks, stride_vs, stride_mask, scale_log2, window, row_documents, key_documents, attn_mask,
                  stride_ms, stride_mt, cap_log2, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  D_PAD: tl.constexpr, DV_PAD: tl.constexpr, MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
                  PLAIN: tl.constexpr, WINDOWED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, MASK: tl.constexpr,
                  CAPPED: tl.constexpr):
    """One step of the online softmax: the 64 keys of `key_block`; `k_tile` and `v_tile` point to those of block 0."""
    keys = key_block * BLOCK + tl.arange(0, BLOCK)
    inside = keys < S
    first_key = key_block.to(tl.int64) * BLOCK
    k_tile += first_key * stride_ks
    v_tile += first_key * stride_vs
    dim_inside = (tl.arange(0, D_PAD) < D)[:, None]
    value_dim_inside = (tl.arange(0, DV_PAD) < DV)[None, :]
    if MASKED:
        key_values = tl.load(k_tile, inside[None, :] & dim_inside, other=0.0)
    elif D_PAD != D:
        key_values = tl.load(k_tile, dim_inside, other=0.0)
    else:
        key_values = tl.load(k_tile)
    scores = tl.dot(query, key_values, input_precision="ieee")
    if MASKED:
        shown = inside
        if HAS_KEY_MASK:
            shown &= tl.load(key_mask + keys * stride_mask, inside, other=0) != 0
        if PLAIN:
            visible = keys[None, :] <= last_key[:, None]
            if HAS_KEY_MASK:
                visible &= shown[None, :]
            scores = tl.where(visible, scores, -float("inf"))
        else:
            scores = finish_scores(scores * scale_log2, row_inside, last_key, key_block, keys, shown, window,
                                   row_documents, key_documents, attn_mask, stride_ms, stride_mt, cap_log2, WINDOWED,
                                   HAS_DOCUMENTS, MASK, CAPPED)
            scale_log2 = 1.0
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if MASKED:
        values = tl.load(v_tile, inside[:, None] & value_dim_inside, other=0.0)
    elif DV_PAD != DV:
        values = tl.load(v_tile, value_dim_inside, other=0.0)
    else:
        values = tl.load(v_tile)
    weighted = tl.dot(weights.to(values.dtype), values, weighted * shrink[:, None], input_precision="ieee")
    return weighted, new_peak, total


@launched
@triton.jit(do_not_specialize=["list_capacity", "query_blocks", "H", "GROUP", "L", "S", "offset", "window"])
def _block_sparse_attention(q, k, v, kept, counts, key_mask, out, lse,
                            stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
                            stride_vb, stride_vh, stride_vs, stride_vd, stride_mask_batch, stride_mask,
                            list_capacity, query_blocks, H, GROUP, L, S, offset, scale_log2,
                            window, query_documents, key_documents, stride_query_documents, stride_key_documents,
                            attn_mask, stride_mb, stride_mh, stride_ms, stride_mt, cap_log2, sinks,
                            ROWS: tl.constexpr, QUERY_BLOCK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
                            DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
                            PLAIN: tl.constexpr, WINDOWED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
                            MASK: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr,
                            IN_PIECES: tl.constexpr):
    scale_log2, cap_log2 = in_float32(scale_log2), in_float32(cap_log2)
    if IN_PIECES:  # `counts` are units, `out` and `lse` what the merge reads
        unit = tl.load(counts + tl.program_id(0) // (QUERY_BLOCK // ROWS))
        if unit < 0:
            return
        slot, block_row, first_entry, count = read_unit(unit)
        head_row = block_row // query_blocks
        part_of_block = tl.program_id(0) % (QUERY_BLOCK // ROWS)
        part = block_row % query_blocks * (QUERY_BLOCK // ROWS) + part_of_block
    else:  # late query blocks of a causal head are the heavy ones: first
        parts = query_blocks * (QUERY_BLOCK // ROWS)
        head_row = tl.program_id(0) // parts
        part = parts - 1 - tl.program_id(0) % parts
    batch, head = head_row // H, head_row % H
    first_row = part * ROWS
    rows = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, D_PAD)
    value_dims = tl.arange(0, DV_PAD)
    # int64: a batch of long sequences passes 2**31 elements.
    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k += batch.to(tl.int64) * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    key_mask += batch.to(tl.int64) * stride_mask_batch
    in_block = tl.arange(0, BLOCK).to(tl.int64)
    k_tile = k + in_block[None, :] * stride_ks + dims[:, None] * stride_kd
    v_tile = v + in_block[:, None] * stride_vs + value_dims[None, :] * stride_vd
    row_inside = rows < L
    query = tl.load(q + rows.to(tl.int64)[:, None] * stride_qs + dims[None, :] * stride_qd,
                    row_inside[:, None] & (dims < D)[None, :], other=0.0)

    last_key = tl.minimum(rows + offset, S - 1) if PLAIN else rows + offset
    if IN_PIECES:
        key_blocks = kept + block_row.to(tl.int64) * list_capacity + first_entry
    else:
        block_row = head_row * query_blocks + first_row // QUERY_BLOCK
        key_blocks = kept + block_row.to(tl.int64) * list_capacity
        count = tl.load(counts + block_row)
    # At most the last four entries need a mask: three blocks under the diagonal of 128 rows, and a padding id.
    entries = count - 1 - tl.arange(0, 4)
    ends = tl.load(key_blocks + entries, entries >= 0, other=0) * BLOCK + BLOCK - 1
    seen_whole = tl.minimum(first_row + offset, S - 1)
    tail = tl.sum(((ends > seen_whole) & (entries >= 0)).to(tl.int32), 0)
    unmasked = count - tail
    if HAS_KEY_MASK:
        unmasked = count * 0

    row_documents = read_documents(query_documents, stride_query_documents, batch, rows, row_inside, HAS_DOCUMENTS)
    key_documents += batch.to(tl.int64) * stride_key_documents
    attn_mask += batch.to(tl.int64) * stride_mb + head.to(tl.int64) * stride_mh + first_row.to(tl.int64) * stride_ms
    peak, total = first_peak(sinks, head, ROWS, HAS_SINKS)
    weighted = tl.zeros([ROWS, DV_PAD], tl.float32)
    if PLAIN:
        for entry in tl.range(0, unmasked):
            weighted, peak, total = _attend_block(
                query, k_tile, v_tile, key_mask, weighted, peak, total, tl.load(key_blocks + entry), row_inside,
                last_key, S, stride_ks, stride_vs, stride_mask, scale_log2, window, row_documents, key_documents,
                attn_mask, stride_ms, stride_mt, cap_log2, BLOCK, D, DV, D_PAD, DV_PAD, False, HAS_KEY_MASK, PLAIN,
                WINDOWED, HAS_DOCUMENTS, MASK, CAPPED)
    else:
        unmasked = count * 0
    for entry in tl.range(unmasked, count):
        weighted, peak, total = _attend_block(
            query, k_tile, v_tile, key_mask, weighted, peak, total, tl.load(key_blocks + entry), row_inside,
            last_key, S, stride_ks, stride_vs, stride_mask, scale_log2, window, row_documents, key_documents,
            attn_mask, stride_ms, stride_mt, cap_log2, BLOCK, D, DV, D_PAD, DV_PAD, True, HAS_KEY_MASK, PLAIN,
            WINDOWED, HAS_DOCUMENTS, MASK, CAPPED)

    weighted = weighted / tl.where(total > 0, total, 1.0)[:, None]
    if IN_PIECES:
        at = slot * QUERY_BLOCK + part_of_block * ROWS + tl.arange(0, ROWS)
        tl.store(out + at[:, None] * DV_PAD + value_dims[None, :], weighted)
        tl.store(lse + at, peak + tl.log2(total))
    else:
        row_lse = (peak + tl.log2(total)) * 0.6931471805599453
        out_at = out + ((batch.to(tl.int64) * L + rows[:, None]) * H + head) * DV + value_dims[None, :]
        tl.store(out_at, weighted.to(out.dtype.element_ty), row_inside[:, None] & (value_dims < DV)[None, :])
        tl.store(lse + head_row.to(tl.int64) * L + rows, row_lse, row_inside)


def _configuration(widest: int, itemsize: int, shared_memory: int, mask_itemsize: int) -> tuple[int, int, int]:
    """Rows of a program, warps and stages for the wider of the padded head dims; measured on an H100 (README.md).

    64 rows fit the registers of four warps. Heads wider than 128 want 128 rows, where shared memory allows that.
    float32 products run on ordinary cores, out of registers: few rows. A mask tensor (`mask_itemsize` above 0) is
    staged beside keys and values, and wants the registers of eight warps: with four, 64 rows spilled 0.9 KB.
    """
    if itemsize == 4:
        return (16, 4, 1) if widest > 128 else (32, 8, 1)
    rows, warps = (QUERY_BLOCK, 8) if widest > 128 and shared_memory >= 192 * 1024 and not mask_itemsize else (64, 4)
    stage = 2 * KEY_BLOCK * widest * itemsize + rows * KEY_BLOCK * mask_itemsize
    stages = max(1, min(3, (shared_memory - rows * widest * itemsize) // stage))
    return (rows, 8, min(2, stages)) if mask_itemsize else (rows, warps, stages)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":  # Triton's interpreter
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch 2.13's stub lacks it


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Launch `_block_sparse_attention`; arguments as above."""
    causal_offset, key_mask = masks.causal_offset, masks.key_mask
    q, scale = positive_scale(q, scale)
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    DV = v.shape[3]
    out = torch.empty(B, L, H, DV, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    query_blocks = counts.shape[2]
    D_PAD = max(16, triton.next_power_of_2(D))
    # A tile of values narrower than 128 bytes that is not copied asynchronously gets a wrong descriptor from
    # Triton 3.6.0: its product reads past the end of shared memory.
    DV_PAD = max(16 if q.element_size() == 4 else 64, triton.next_power_of_2(DV))
    rows, warps, stages = _configuration(max(D_PAD, DV_PAD), q.element_size(), _shared_memory(q.device),
                                          0 if masks.attn_mask is None else masks.attn_mask.element_size())
    mask_strides = (0, 0) if key_mask is None else (key_mask.stride(0) * (len(key_mask) > 1), key_mask.stride(1))
    extras, constants = score_arguments(masks, q)
    units, written, cut = counts, (out, lse), None
    # Two programs a multiprocessor; a unit is as many programs as a query block.
    wanted = units_for(counts.numel(), count_blocks(S, KEY_BLOCK), 2 * multiprocessors(q.device) * rows // QUERY_BLOCK)
    if wanted:
        cut = cut_lists(counts, 1, wanted)
        units, written = cut.units, room_for(cut, DV_PAD)
        constants["HAS_SINKS"] = False  # the merge counts them
    _block_sparse_attention[(units.numel() * (QUERY_BLOCK // rows),)](
        q, k, v, kept, units, q if key_mask is None else key_mask, *written, *q.stride(), *k.stride(), *v.stride(),
        *mask_strides, kept.shape[3], query_blocks, H, H // Hkv, L, S,
        S if causal_offset is None else causal_offset,  # at an offset of S every row sees every key
        scale * LOG2_E, *extras, ROWS=rows, QUERY_BLOCK=QUERY_BLOCK, BLOCK=KEY_BLOCK, D=D, DV=DV, D_PAD=D_PAD,
        DV_PAD=DV_PAD, HAS_KEY_MASK=key_mask is not None, PLAIN=masks.is_plain, **constants, IN_PIECES=cut is not None,
        num_warps=warps, num_stages=stages, maxnreg=REGISTERS)
    if cut is not None:
        merge_pieces(*written, cut, masks.sink_logits, out, lse)
    return out, lse


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0: kernels take a row's maximum before they scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)
