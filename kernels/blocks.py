"""Geometry of the score area: which key blocks a query block may keep, and which it must.

    query block i   rows [128 i, 128 (i + 1)) of q, cut at q_len
    key block j     keys [64 j, 64 (j + 1)) of k, cut at kv_len
    causal_offset   key j is visible to query i when j <= i + causal_offset; None: every key
                    (kv_len - q_len is bottom-right alignment, 0 is top-left)
    key_mask        bool [B or 1, kv_len], True where the key may be attended; None: every key

Three sets, as bool tensors [B or 1, query blocks, key blocks]:
    allowed         some row of the query block may see some key of the key block
    boundary        allowed, but the causal edge runs through it: not every row sees all of it
    forced          always kept: sinks, boundary, and `local` blocks before the boundary

Kept lists are what selection hands to attention (see `KeptLists`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 128
KEY_BLOCK = 64
TILE = 2  # key blocks per compute tile: tensor cores want 128 keys


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


def allowed_blocks(q_len: int, kv_len: int, causal_offset: int | None, key_mask: Tensor | None,
                   device: torch.device) -> Tensor:
    """Blocks in which some row may see some key: bool [B or 1, query blocks, key blocks]."""
    has_key = (visible_keys(key_mask, kv_len, device) > 0)[:, None]
    first_row, first_key = _block_starts(q_len, kv_len, device)
    if causal_offset is None:
        return has_key.expand(-1, len(first_row), -1)
    last_row = (first_row + QUERY_BLOCK).clamp(max=q_len) - 1
    return has_key & (first_key <= last_row[:, None] + causal_offset)


def boundary_blocks(q_len: int, kv_len: int, causal_offset: int | None, device: torch.device) -> Tensor:
    """Blocks that the first row of the query block does not see whole: bool [query blocks, key blocks]."""
    first_row, first_key = _block_starts(q_len, kv_len, device)
    if causal_offset is None:
        return torch.zeros(len(first_row), len(first_key), dtype=torch.bool, device=device)
    return first_key + KEY_BLOCK - 1 > first_row[:, None] + causal_offset


def forced_blocks(allowed: Tensor, boundary: Tensor, sinks: int, local: int) -> Tensor:
    """Blocks that are kept whatever the estimate says: bool, shaped as `allowed`."""
    first = allowed & (allowed.cumsum(-1) <= sinks)
    before_boundary = boundary
    for _ in range(local):
        before_boundary = before_boundary | torch.nn.functional.pad(before_boundary[:, 1:], (0, 1))
    has_boundary = boundary.any(-1, keepdim=True)
    return first | (allowed & before_boundary & has_boundary)


def _block_starts(q_len: int, kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first_row = torch.arange(count_blocks(q_len, QUERY_BLOCK), device=device) * QUERY_BLOCK
    first_key = torch.arange(count_blocks(kv_len, KEY_BLOCK), device=device) * KEY_BLOCK
    return first_row, first_key
