"""Geometry of the score area: which key blocks a query block may keep, and which it must.

    query block i   rows [128 i, 128 (i + 1)) of q, cut at q_len
    key block j     keys [64 j, 64 (j + 1)) of k, cut at kv_len
    masks           see kernels/masks.py; a block of attn_mask is not looked into

Four sets, as bool tensors [B or 1, query blocks, key blocks]:
    allowed         some row of the query block may see some key of the key block
    cut             allowed, but causality, the window or documents may hide part of it from some row
    boundary        cut by the causal edge
    forced          always kept: sinks, boundary, and `local` blocks before the boundary

Blocks of protected keys (`protected_blocks`) are kept too, by every query block that they are allowed to.

Kept lists are what selection hands to attention (see `KeptLists`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.masks import Masks

QUERY_BLOCK = 128
KEY_BLOCK = 64
TILE = 2  # key blocks per compute tile: tensor cores want 128 keys
HIDDEN, WHOLE, CUT = 0, 1, 2  # what a row of the query block sees of a key block: nothing, all of it, a part
MASK_WORKSPACE = 1 << 22  # elements of attn_mask that are averaged at a time: 16 MB


class KeptLists(NamedTuple):
    """The key blocks that every query block keeps.

    kept    int32 [B, H, query blocks, capacity(key blocks)]: ascending key-block ids; behind the count: 0
    counts  int32 [B, H, query blocks]: even, at least 2

    An odd number of kept blocks is evened out by the best block that is left; where none is left, by the padding id
    (the number of key blocks): a block wholly past the end, so every mask hides it.
    """

    kept: Tensor
    counts: Tensor


class SplitSummaries(NamedTuple):
    """Split summaries of all key blocks of a tensor of keys; Bm is the batch of the key mask, or 1.

    singles       [B, Hkv, m, key blocks, D]  the m keys farthest from the block's mean, in the dtype of k
    mean          [B, Hkv, key blocks, D]     mean of the other visible keys
    variance      [B, Hkv, key blocks, D]     their biased variance per channel
    single_count  int32 [Bm, key blocks]      singles that are real keys: min(m, visible keys)
    rest_count    int32 [Bm, key blocks]      keys behind mean and variance: visible keys - single_count
    """

    singles: Tensor
    mean: Tensor
    variance: Tensor
    single_count: Tensor
    rest_count: Tensor


def count_blocks(length: int, block: int) -> int:
    """Blocks that cover `length` positions."""
    return (length + block - 1) // block


def capacity(key_blocks: int) -> int:
    """Entries of a kept list: every block, evened out, and one tile that a prefetch may read past the end."""
    return count_blocks(key_blocks, TILE) * TILE + TILE


def visible_keys(key_mask: Tensor | None, kv_len: int, device: torch.device) -> Tensor:
    """Visible keys of every key block: int64 [B or 1, key blocks]."""
    blocks = count_blocks(kv_len, KEY_BLOCK)
    if key_mask is None:
        starts = torch.arange(blocks, device=device) * KEY_BLOCK
        return (kv_len - starts).clamp(max=KEY_BLOCK)[None]
    padded = torch.nn.functional.pad(key_mask, (0, blocks * KEY_BLOCK - kv_len))
    return padded.view(len(key_mask), blocks, KEY_BLOCK).sum(-1)


def allowed_blocks(masks: Masks, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Blocks in which some row may see some key: bool [B or 1, query blocks, key blocks]."""
    allowed = (visible_keys(masks.key_mask, kv_len, device) > 0)[:, None]
    first_row, first_key = _block_starts(q_len, kv_len, device)
    if masks.causal_offset is not None:
        last_row = (first_row + QUERY_BLOCK).clamp(max=q_len) - 1
        allowed = allowed & (first_key <= last_row + masks.causal_offset)
        if masks.window is not None:
            last_key = (first_key + KEY_BLOCK).clamp(max=kv_len) - 1
            allowed = allowed & (last_key > first_row + masks.causal_offset - masks.window)
    if masks.query_documents is not None:
        (row_low, row_high), (key_low, key_high) = _documents_of_blocks(masks)
        allowed = allowed & (row_low <= key_high) & (key_low <= row_high)
    return allowed.expand(-1, len(first_row), -1)


def boundary_blocks(q_len: int, kv_len: int, causal_offset: int | None, device: torch.device) -> Tensor:
    """Blocks that the first row of the query block does not see whole: bool [query blocks, key blocks]."""
    first_row, first_key = _block_starts(q_len, kv_len, device)
    if causal_offset is None:
        return torch.zeros(len(first_row), len(first_key), dtype=torch.bool, device=device)
    return first_key + KEY_BLOCK - 1 > first_row + causal_offset


def cut_blocks(masks: Masks, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Blocks that some row may see in part: bool [B or 1, query blocks, key blocks]. Outside of allowed ones: anything.

    Neither a key mask nor attn_mask cuts: a summary leaves out masked keys, and the mask of a block is averaged.
    """
    cut = boundary_blocks(q_len, kv_len, masks.causal_offset, device)[None]
    if masks.causal_offset is not None and masks.window is not None:
        first_row, first_key = _block_starts(q_len, kv_len, device)
        cut = cut | (first_key <= first_row + QUERY_BLOCK - 1 + masks.causal_offset - masks.window)
    if masks.query_documents is not None:
        (row_low, row_high), (key_low, key_high) = _documents_of_blocks(masks)
        cut = cut | (row_low != row_high) | (key_low != key_high) | (row_low != key_low)
    return cut


def block_kinds(masks: Masks, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """HIDDEN, WHOLE or CUT: uint8 [B or 1, query blocks, key blocks]; what kernels read where masks are not plain."""
    kinds = torch.where(cut_blocks(masks, q_len, kv_len, device), CUT, WHOLE)
    return torch.where(allowed_blocks(masks, q_len, kv_len, device), kinds, HIDDEN).byte().contiguous()


def block_bias(masks: Masks, kv_len: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """What attn_mask adds to the log mass of a block: log of the mean of exp(attn_mask) over the block's visible keys.

    Exact for the mean of a block's masses where mask and scores are independent; a visible key is never lost.
    Returns [B or 1, H or 1, q_len or 1, key blocks], `MASK_WORKSPACE` elements of attn_mask at a time, or None.
    """
    mask = masks.attn_mask
    if mask is None:
        return None
    blocks = count_blocks(kv_len, KEY_BLOCK)
    shown = None if masks.key_mask is None else masks.key_mask[:, None, None]
    batch = max(len(mask), 1 if shown is None else len(shown))
    bias = torch.empty(batch, *mask.shape[1:3], blocks, dtype=dtype, device=mask.device)
    step = max(1, MASK_WORKSPACE // (batch * mask.shape[1] * kv_len))
    for first in range(0, mask.shape[2], step):
        part = mask[:, :, first: first + step]
        if not mask.is_floating_point():
            part = torch.zeros_like(part, dtype=dtype).masked_fill_(~part, -torch.inf)
        part = part.to(dtype).expand(-1, -1, -1, kv_len)
        if shown is not None:
            part = part.masked_fill(~shown, -torch.inf)
        part = torch.nn.functional.pad(part, (0, blocks * KEY_BLOCK - kv_len), value=-torch.inf)
        bias[:, :, first: first + step] = part.unflatten(-1, (blocks, KEY_BLOCK)).logsumexp(-1)
    count = visible_keys(masks.key_mask, kv_len, mask.device).clamp(min=1)
    return bias.sub_(count.to(dtype).log()[:, None, None])


def forced_blocks(allowed: Tensor, boundary: Tensor, sinks: int, local: int) -> Tensor:
    """Blocks that are kept whatever the estimate says: bool, shaped as `allowed`."""
    first = allowed & (allowed.cumsum(-1) <= sinks)
    before_boundary = boundary
    for _ in range(local):
        before_boundary = before_boundary | torch.nn.functional.pad(before_boundary[:, 1:], (0, 1))
    has_boundary = boundary.any(-1, keepdim=True)
    return first | (allowed & before_boundary & has_boundary)


def protected_blocks(protected: Tensor) -> Tensor:
    """Key blocks with a protected key: bool [B or 1, key blocks] of bool [B or 1, kv_len]."""
    padded = torch.nn.functional.pad(protected, (0, -protected.shape[1] % KEY_BLOCK))
    return padded.view(len(padded), -1, KEY_BLOCK).any(-1)


def _block_starts(q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First rows [query blocks, 1] and first keys [key blocks]."""
    first_row = torch.arange(count_blocks(q_len, QUERY_BLOCK), device=device) * QUERY_BLOCK
    first_key = torch.arange(count_blocks(kv_len, KEY_BLOCK), device=device) * KEY_BLOCK
    return first_row[:, None], first_key


def _documents_of_blocks(masks: Masks) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Lowest and highest document of every query block [B or 1, ..., 1], and of every key block's visible keys."""
    assert masks.query_documents is not None and masks.key_documents is not None  # both or neither
    row_low, row_high = _range_of_blocks(masks.query_documents, QUERY_BLOCK, None)
    key_low, key_high = _range_of_blocks(masks.key_documents, KEY_BLOCK, masks.key_mask)
    return (row_low[..., None], row_high[..., None]), (key_low[:, None], key_high[:, None])


def _range_of_blocks(ids: Tensor, block: int, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest of the shown ids of every block; where none is shown, a range that is empty."""
    limits = torch.iinfo(ids.dtype)

    def of_blocks(fill: int) -> Tensor:
        filled = ids if shown is None else torch.where(shown, ids, fill)
        # Not `pad`: its value is a double, which makes the least int64 of the greatest.
        rest = filled.new_full((len(filled), -ids.shape[1] % block), fill)
        return torch.cat([filled, rest], 1).unflatten(-1, (-1, block))

    return of_blocks(limits.max).amin(-1), of_blocks(limits.min).amax(-1)
