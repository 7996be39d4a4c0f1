"""Split summaries of key blocks: what selection reads in place of the keys.

    k             [B, Hkv, S, D]            fp16, bf16 or fp32; any strides; S >= 1
    key_mask      [B or 1, S]               bool, True where the key may be attended, or None
    singles       [B, Hkv, m, blocks, D]    the m visible keys farthest from their block's mean, in the dtype of k;
                                            zeros where a block has fewer visible keys
    mean          [B, Hkv, blocks, D]       mean of the other visible keys; zeros where there are none
    variance      [B, Hkv, blocks, D]       their biased variance per channel
    single_count  [B or 1, blocks]          int32, singles that are real keys
    rest_count    [B or 1, blocks]          int32, keys behind mean and variance
    cost          one read of k; m + 2 vectors written per block of 64 keys
    errors        none here: the op (sparsify/ops) checks shapes and dtypes

Source: this project's own (ARCHITECTURE.md, "selection"); surprise as distance from the mean, after Titans
(arXiv 2501.00663), which ranks by it what to remember.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, SplitSummaries, count_blocks
from sparsify.kernels.launch import launched

NUM_WARPS = 4  # a tile of 64 x 128 keys in float32 is 64 registers a thread
LARGEST = {torch.float16: 65504.0, torch.bfloat16: 3.3e38, torch.float32: 3.3e38}  # an infinite variance times 0 is NaN


@triton.jit
def split_keys(keys, visible, dim_inside, rows, SINGLES: tl.constexpr):
    """The rank of every key by its distance from the mean, mean and variance of those behind `SINGLES`, and counts.

    keys float32 [BLOCK, D_PAD], zeros where not visible. Ranks: 0 is farthest; of equals the first; hidden keys last.
    """
    count = tl.sum(visible.to(tl.int32), 0)
    from_mean = keys - (tl.sum(keys, 0) / tl.maximum(count, 1))[None, :]
    from_mean = tl.where(dim_inside[None, :], from_mean, 0.0)
    distance = tl.where(visible, tl.sum(from_mean * from_mean, 1), -1.0)
    others = tl.trans(tl.broadcast_to(distance[:, None], [keys.shape[0], keys.shape[0]]))
    before = (others == distance[:, None]) & (rows[None, :] < rows[:, None])
    rank = tl.sum(((others > distance[:, None]) | before).to(tl.int32), 1)
    rest = visible & (rank >= SINGLES)
    rest_count = tl.maximum(count - SINGLES, 0)
    many = tl.maximum(rest_count, 1)
    mean = tl.sum(tl.where(rest[:, None], keys, 0.0), 0) / many
    deviation = tl.where(rest[:, None], keys - mean[None, :], 0.0)
    variance = tl.sum(deviation * deviation, 0) / many
    return rank, mean, variance, count, rest_count


@launched
@triton.jit(do_not_specialize=["S", "MASKS"])
def _summarise_keys(k, key_mask, singles, mean, variance, single_count, rest_count,
                    stride_b, stride_h, stride_s, stride_d, stride_mask_batch, stride_mask, S, MASKS, largest,
                    SINGLES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                    HAS_KEY_MASK: tl.constexpr):
    key_block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    rows = tl.arange(0, BLOCK)
    positions = key_block * BLOCK + rows
    dims = tl.arange(0, D_PAD)
    dim_inside = dims < D
    # int64: 2**20 keys x 16 heads x 128 dims are 2**31 elements.
    k += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    visible = positions < S
    if HAS_KEY_MASK:
        mask_at = key_mask + batch.to(tl.int64) * stride_mask_batch + positions * stride_mask
        visible &= tl.load(mask_at, visible, other=0) != 0
    keys_at = k + positions.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
    keys = tl.load(keys_at, visible[:, None] & dim_inside[None, :], other=0.0).to(tl.float32)

    rank, rest_mean, spread, count, rest_keys = split_keys(keys, visible, dim_inside, rows, SINGLES)
    head_row = (batch * tl.num_programs(1) + head).to(tl.int64)
    single_at = singles + ((head_row * SINGLES + rank) * blocks + key_block)[:, None] * D + dims[None, :]
    tl.store(single_at, keys.to(singles.dtype.element_ty), (rank < SINGLES)[:, None] & dim_inside[None, :])
    rest_at = (head_row * blocks + key_block) * D + dims
    tl.store(mean + rest_at, rest_mean.to(mean.dtype.element_ty), dim_inside)
    tl.store(variance + rest_at, tl.minimum(spread, largest).to(variance.dtype.element_ty), dim_inside)
    if (head == 0) & (batch < MASKS):
        tl.store(single_count + batch * blocks + key_block, count - rest_keys)
        tl.store(rest_count + batch * blocks + key_block, rest_keys)


def summarise_keys(k: Tensor, singles: int, key_mask: Tensor | None) -> SplitSummaries:
    """Launch `_summarise_keys`; shapes as above."""
    B, Hkv, S, D = k.shape
    blocks = count_blocks(S, KEY_BLOCK)
    masks = 1 if key_mask is None else len(key_mask)
    mask_strides = (0, 0) if key_mask is None else (key_mask.stride(0) * (masks > 1), key_mask.stride(1))
    summaries = SplitSummaries(
        singles=torch.empty(B, Hkv, singles, blocks, D, dtype=k.dtype, device=k.device),
        mean=torch.empty(B, Hkv, blocks, D, dtype=k.dtype, device=k.device),
        variance=torch.empty(B, Hkv, blocks, D, dtype=k.dtype, device=k.device),
        single_count=torch.empty(masks, blocks, dtype=torch.int32, device=k.device),
        rest_count=torch.empty(masks, blocks, dtype=torch.int32, device=k.device),
    )
    _summarise_keys[(blocks, Hkv, B)](
        k, k if key_mask is None else key_mask, *summaries, *k.stride(), *mask_strides, S, masks, LARGEST[k.dtype],
        SINGLES=singles, BLOCK=KEY_BLOCK, D=D, D_PAD=max(16, triton.next_power_of_2(D)),
        HAS_KEY_MASK=key_mask is not None, num_warps=NUM_WARPS)
    return summaries
