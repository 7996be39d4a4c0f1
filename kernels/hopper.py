"""Block-sparse attention forward for Hopper, in Gluon: the fast path, also at density 1.

    q       [B, H, L, D]       fp16 or bf16; D is 64 or 128; last dimension dense, other strides multiples of 16 bytes
    k, v    [B, Hkv, S, D]     as q; query head h reads KV head h // (H // Hkv)
    kept    [B, H, blocks of 128 rows, capacity]  int32 lists of 64-key blocks, see `KeptLists`; walked two at a time
    counts  [B, H, blocks of 128 rows]            int32, even, at least 2
    out     [B, H, L, D]       in the dtype of q, in memory [B, L, H, D]
    lse     [B, H, L]          float32, natural log of the row's sum; a row that sees no key: zeros and -inf
    key j is visible to query i when j <= i + causal_offset (None: always)
    errors  none here: the op checks shapes, `why_not` says which calls this kernel does not cover

One program per multiprocessor takes query blocks from a queue, longest list first. In a program one warp loads (TMA),
two warpgroups compute, 64 rows each, with all their softmax state: no data crosses warpgroups. Lists are walked from
the end: the blocks that need a mask are the last entries, so the mask sits in the first step or two and the main loop
has none. The last product of a query block is issued together with the first of the next: short lists leave no bubble.

Source: the structure of FlashAttention-3 (arXiv 2407.08608), less what did not pay here (README.md in this folder).
"""

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
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE
from sparsify.kernels.masks import Masks

STAGES = 2  # K and V tiles in flight; a third changed nothing (-6 .. +4 %, noise) and would need O to share Q's room
LEVELS = 256  # list lengths the queue tells apart
QUEUE_CHUNK = 1024  # rows the queue sorts at once
# 168 registers x 384 threads are the register file. The loader's group gives most of its share to the two warpgroups,
# which then hold scores, weights and output (160 registers) without a spill. 24 for the loader spill.
REGISTERS = 168
WARPGROUP_REGISTERS = 232
LOADER_REGISTERS = 40
LOG2_E = 1.4426950408889634


@gluon.jit
def _read_pair(kept_pairs, row, pair_capacity, pair):
    """Key blocks of pair number `pair` of a list, one in each half of an int64; a read ahead of pair 0 gives pair 0."""
    return gl.load(kept_pairs + row.to(gl.int64) * pair_capacity + gl.maximum(pair, 0))


@gluon.jit
def _load_pair(source, batch, head, pair, full, tile, BLOCK: gl.constexpr, D: gl.constexpr):
    """Start copying the two key blocks of `pair` into the halves of `tile`; keys past the end arrive as zeros."""
    mbarrier.expect(full, 2 * BLOCK * D * 2)
    first = (pair & 0xFFFFFFFF).to(gl.int32) * BLOCK
    second = (pair >> 32).to(gl.int32) * BLOCK
    tma.async_copy_global_to_shared(source, [batch, head, first, 0], full, tile.slice(0, BLOCK, 0))
    tma.async_copy_global_to_shared(source, [batch, head, second, 0], full, tile.slice(BLOCK, BLOCK, 0))


@gluon.jit
def _loader(q, k, v, q_tiles, k_tiles, v_tiles, mail, bars, kept_pairs, queue, counter, blocks, pair_capacity,
            query_blocks, H, GROUP, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr):
    """Feed both warpgroups. V runs one tile behind K, also from one query block to the next."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0  # K tiles since the kernel began
    turn = 0  # query blocks since the kernel began
    v_pair = gl.to_tensor(0).to(gl.int64)
    v_batch = 0
    v_head = 0
    # A query block travels as (row << 32 | pairs) in one integer: Triton 3.6.0 mixes up old and new of two loop-carried
    # scalars of which one is loaded through the other. Negative: no more.
    block = gl.load(queue + gl.program_id(0))
    while block >= 0:
        pairs = (block & 0xFFFFFFFF).to(gl.int32)
        row = (block >> 32).to(gl.int32)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        batch = head_row // H
        head = head_row - batch * H
        ahead = _read_pair(kept_pairs, row, pair_capacity, pairs - 1)
        slot = turn & 1
        mbarrier.wait(mail_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mail.index(slot * 3).store(gl.full([1], block, gl.int64, one))
        mail.index(slot * 3 + 1).store(gl.full([1], ahead, gl.int64, one))
        before = _read_pair(kept_pairs, row, pair_capacity, pairs - 2)
        mail.index(slot * 3 + 2).store(gl.full([1], before, gl.int64, one))
        mbarrier.arrive(mail_full.index(slot), count=1)
        place = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        following = gl.load(queue + gl.minimum(place, blocks - 1))
        following = gl.where(place < blocks, following, -1)

        mbarrier.wait(q_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), ROWS * D * 2)
        tma.async_copy_global_to_shared(q, [batch, head, first_row, 0], q_full.index(slot), q_tiles.index(slot * 2))
        tma.async_copy_global_to_shared(q, [batch, head, first_row + ROWS // 2, 0], q_full.index(slot),
                                        q_tiles.index(slot * 2 + 1))
        turn += 1
        for done in range(0, pairs):
            pair = ahead
            ahead = _read_pair(kept_pairs, row, pair_capacity, pairs - 2 - done)
            stage = step % STAGES
            mbarrier.wait(k_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _load_pair(k, batch, head // GROUP, pair, k_full.index(stage), k_tiles.index(stage), BLOCK, D)
            if step > 0:
                stage = (step - 1) % STAGES
                mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
                _load_pair(v, v_batch, v_head, v_pair, v_full.index(stage), v_tiles.index(stage), BLOCK, D)
            v_pair = pair
            v_batch = batch
            v_head = head // GROUP
            step += 1
        block = following
    slot = turn & 1
    mbarrier.wait(mail_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    mail.index(slot * 3).store(gl.full([1], block, gl.int64, one))
    mbarrier.arrive(mail_full.index(slot), count=1)
    stage = (step - 1) % STAGES
    mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
    _load_pair(v, v_batch, v_head, v_pair, v_full.index(stage), v_tiles.index(stage), BLOCK, D)


@gluon.jit
def _mask_scores(scores, pair, last_key, columns, BLOCK: gl.constexpr):
    """-inf where the key lies past the last one that the row sees."""
    first = (pair & 0xFFFFFFFF).to(gl.int32) * BLOCK
    second = (pair >> 32).to(gl.int32) * BLOCK
    keys = columns + gl.where(columns < BLOCK, first, second - BLOCK)
    return gl.where(keys[None, :] <= last_key[:, None], scores, -float("inf"))


@gluon.jit
def _attend_pair(q_tile, k_tiles, v_tiles, bars, zero, weights, acc, peak, total, step, scale_log2, pair, last_key,
                 columns, masked, STAGES: gl.constexpr, BLOCK: gl.constexpr, weights_layout: gl.constexpr,
                 acc_rows: gl.constexpr):
    """Scores of the next K tile while the product of the previous weights with their V tile runs; then the softmax."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    v_stage = step % STAGES
    v_phase = (step // STAGES) & 1
    step += 1
    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if masked:  # a branch: in a loop of its own, the masked step made 64 instructions a step that repack weights
        scores = _mask_scores(scores, pair, last_key, columns, BLOCK)
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
def _first_softmax(scores, pair, last_key, columns, scale_log2, BLOCK: gl.constexpr):
    """Softmax of the first tile of a query block: weights, peak and total of every row."""
    scores = _mask_scores(scores, pair, last_key, columns, BLOCK)
    # The floor keeps a row finite that sees no key of this tile (or of any): its weights are exp2(-inf) = 0.
    peak = gl.maximum(gl.max(scores, 1) * scale_log2, -1.0e30)
    exponentials = gl.exp2(scores * scale_log2 - peak[:, None])
    return exponentials, peak, gl.sum(exponentials, 1)


@gluon.jit
def _last_keys(block, rows, query_blocks, S, offset, ROWS: gl.constexpr):
    """The last key that every row of a query block sees."""
    row = (block >> 32).to(gl.int32)
    return gl.minimum((row % query_blocks) * ROWS + rows + offset, S - 1)


@gluon.jit
def _warpgroup(WARPGROUP: gl.constexpr, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, mail, bars, query_blocks, H, L,
               S, offset, scale_log2, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr):
    """Compute half of the rows of every query block that arrives by mail."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = bars
    HALF: gl.constexpr = ROWS // 2
    dtype: gl.constexpr = q_tiles.dtype
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    zero = gl.zeros([HALF, 2 * BLOCK], gl.float32, scores_layout)
    rows = gl.arange(0, HALF, score_rows) + WARPGROUP * HALF
    columns = gl.arange(0, 2 * BLOCK, gl.SliceLayout(0, scores_layout))

    mbarrier.wait(mail_full.index(0), 0)
    block = gl.max(mail.index(0).load(one), 0)
    last = gl.max(mail.index(1).load(one), 0)
    before = gl.max(mail.index(2).load(one), 0)
    mbarrier.arrive(mail_empty.index(0), count=1)
    step = 0
    turn = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_tiles.index(WARPGROUP), k_tiles.index(0).permute([1, 0]), zero, use_acc=False,
                           is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    last_key = _last_keys(block, rows, query_blocks, S, offset, ROWS)
    exponentials, peak, total = _first_softmax(scores, last, last_key, columns, scale_log2, BLOCK)
    weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
    acc = gl.zeros([HALF, D], gl.float32, acc_layout)

    while block >= 0:
        pairs = (block & 0xFFFFFFFF).to(gl.int32)
        row = (block >> 32).to(gl.int32)
        head_row = row // query_blocks
        first_row = (row - head_row * query_blocks) * ROWS
        q_tile = q_tiles.index((turn & 1) * 2 + WARPGROUP)
        # At most four entries need a mask: three blocks under the diagonal of 128 rows, and a padding id.
        last_key = _last_keys(block, rows, query_blocks, S, offset, ROWS)
        seen_whole = gl.minimum(first_row + offset, S - 1)
        end = ((before >> 32).to(gl.int32) + 1) * BLOCK
        for pair in range(1, pairs):
            weights, acc, peak, total, step = _attend_pair(
                q_tile, k_tiles, v_tiles, bars, zero, weights, acc, peak, total, step, scale_log2, before, last_key,
                columns, (pair == 1) & (end - 1 > seen_whole), STAGES, BLOCK, weights_layout, acc_rows)
        mbarrier.arrive(q_empty.index(turn & 1), count=1)

        # The first scores of the next query block with the last product of this one. Behind the last query block
        # they are taken of stale tiles and thrown away.
        turn += 1
        slot = turn & 1
        mbarrier.wait(mail_full.index(slot), (turn >> 1) & 1)
        following = gl.max(mail.index(slot * 3).load(one), 0)
        last = gl.max(mail.index(slot * 3 + 1).load(one), 0)
        before = gl.max(mail.index(slot * 3 + 2).load(one), 0)
        mbarrier.arrive(mail_empty.index(slot), count=1)
        more = following >= 0
        v_stage = step % STAGES
        v_phase = (step // STAGES) & 1
        step += 1
        stage = step % STAGES
        mbarrier.wait(q_full.index(slot), (turn >> 1) & 1, pred=more)
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1, pred=more)
        scores = warpgroup_mma(q_tiles.index(slot * 2 + WARPGROUP), k_tiles.index(stage).permute([1, 0]), zero,
                               use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(weights, v_tiles.index(v_stage), acc, is_async=True)
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

        last_key = _last_keys(following, rows, query_blocks, S, offset, ROWS)
        exponentials, peak, total = _first_softmax(scores, last, last_key, columns, scale_log2, BLOCK)
        weights = gl.convert_layout(exponentials.to(dtype), weights_layout)
        acc = gl.zeros([HALF, D], gl.float32, acc_layout)
        block = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["blocks", "pair_capacity", "query_blocks", "H", "GROUP", "L", "S", "offset"])
def _block_sparse_attention(q, k, v, out, lse, kept_pairs, queue, counter, blocks, pair_capacity, query_blocks, H,
                            GROUP, L, S, offset, scale_log2, STAGES: gl.constexpr, ROWS: gl.constexpr,
                            BLOCK: gl.constexpr, D: gl.constexpr, WARPGROUP_REGISTERS: gl.constexpr,
                            LOADER_REGISTERS: gl.constexpr):
    dtype: gl.constexpr = q.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * BLOCK, D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [4, ROWS // 2, D], tile_layout)
    out_tiles = gl.allocate_shared_memory(dtype, [2, ROWS // 2, D], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 2 * BLOCK, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 2 * BLOCK, D], tile_layout)
    mail = gl.allocate_shared_memory(gl.int64, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
    gl.warp_specialize([
        (_warpgroup, (0, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, mail, bars, query_blocks, H, L, S, offset,
                      scale_log2, STAGES, ROWS, BLOCK, D)),
        (_warpgroup, (1, out, lse, q_tiles, k_tiles, v_tiles, out_tiles, mail, bars, query_blocks, H, L, S, offset,
                      scale_log2, STAGES, ROWS, BLOCK, D)),
        (_loader, (q, k, v, q_tiles, k_tiles, v_tiles, mail, bars, kept_pairs, queue, counter, blocks, pair_capacity,
                   query_blocks, H, GROUP, STAGES, ROWS, BLOCK, D)),
    ], [4, 1], [WARPGROUP_REGISTERS, LOADER_REGISTERS])


@triton.jit(do_not_specialize=["rows", "pair_capacity"])
def _fill_queue(counts, queue, cursors, rows, pair_capacity, LEVELS: tl.constexpr, CHUNK: tl.constexpr):
    """Counting sort of all query blocks, longest list first; behind the cursors lies the queue's counter."""
    levels = tl.arange(0, LEVELS)
    population = tl.zeros([LEVELS], tl.int32)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        pairs = tl.load(counts + row, row < rows, other=0) // 2
        level = LEVELS - 1 - (pairs * (LEVELS - 1)) // pair_capacity
        population += tl.histogram(level, LEVELS, mask=row < rows)
    tl.store(cursors + levels, tl.cumsum(population, 0) - population)
    tl.store(cursors + LEVELS, 0)
    tl.debug_barrier()
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        pairs = tl.load(counts + row, row < rows, other=0) // 2
        level = LEVELS - 1 - (pairs * (LEVELS - 1)) // pair_capacity
        place = tl.atomic_add(cursors + level, 1, mask=row < rows, sem="relaxed")
        tl.store(queue + place, (row.to(tl.int64) << 32) | pairs, mask=row < rows)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Launch `_block_sparse_attention`; arguments as above, covered by `why_not`."""
    q, scale = positive_scale(q, scale)
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    out = torch.empty(B, L, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    query_blocks, pair_capacity = counts.shape[2], kept.shape[3] // TILE
    blocks = counts.numel()
    queue = torch.empty(blocks, dtype=torch.int64, device=q.device)
    cursors = torch.empty(LEVELS + 1, dtype=torch.int32, device=q.device)
    _fill_queue[(1,)](counts, queue, cursors, blocks, pair_capacity, LEVELS=LEVELS, CHUNK=QUEUE_CHUNK, num_warps=8)
    programs = min(torch.cuda.get_device_properties(q.device).multi_processor_count, blocks)
    _block_sparse_attention[(programs,)](
        describe(q), describe(k), describe(v), describe(out), lse, kept.view(torch.int64), queue, cursors[LEVELS:],
        blocks, pair_capacity, query_blocks, H, H // Hkv, L, S,
        S if masks.causal_offset is None else masks.causal_offset,  # every row of an offset of S sees every key
        scale * LOG2_E, STAGES=STAGES, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, D=D,
        WARPGROUP_REGISTERS=WARPGROUP_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS)
    return out, lse


def why_not(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str | None:
    """Why this call is not covered, in one sentence; None if it is."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "the device is not a Hopper GPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {q.dtype}, not float16 or bfloat16"
    if not q.shape[3] == v.shape[3] or q.shape[3] not in (64, 128):
        return f"the head dims are {q.shape[3]} and {v.shape[3]}, not both 64 or both 128"
    if not masks.is_plain:
        return "scores meet more than causality: a window, documents, a mask tensor, a soft cap or sinks"
    if masks.key_mask is not None:
        return "keys are masked one by one"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not _is_describable(tensor):
            return f"{name} has strides {tensor.stride()}: rows must be dense, everything a multiple of 16 bytes"
    return None


def _is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address a tensor of 2-byte elements as it lies."""
    strides = [tensor.stride(i) for i in range(3) if tensor.shape[i] > 1]
    return (tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in strides))


def describe(tensor: Tensor) -> TensorDescriptor:
    """The copy engine's view: boxes of 64 rows of one head, clipped at the tensor's own length."""
    D = tensor.shape[3]
    # The stride of a dimension of size 1 means nothing to torch, but the engine checks it.
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else D for i in range(3)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, KEY_BLOCK, D], layout)
