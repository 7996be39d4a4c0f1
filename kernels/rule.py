"""The rule of selection: from peaks to kept lists, in plain torch. The CPU path runs it; tests hold the GPU's to it.

    peaks      [B, H, query blocks, key blocks]: largest share that any row of a query block gives a key block
    masks      see kernels/masks.py; what they hide is not allowed, and the causal edge is always kept
    tolerance  a block is kept where its peak reaches it; `max_density`, `sinks`, `local` as in `sparsify.Budget`
    shifts     a factor per query head on the tolerance, 0 to 1; None: 1 for all. A head of 0 keeps everything
    protected  bool [B or 1, key blocks]: blocks that every query block keeps where they are allowed, or None

Source: absolute tolerance on row peaks, this project's own (ARCHITECTURE.md, "Peaks under one absolute tolerance").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.kernels.blocks import TILE, KeptLists, allowed_blocks, boundary_blocks, capacity, forced_blocks
from sparsify.kernels.masks import Masks


def choose_blocks(peaks: Tensor, *, q_len: int, kv_len: int, tolerance: float, max_density: float, sinks: int,
                  local: int, masks: Masks, shifts: Sequence[float] | None = None,
                  protected: Tensor | None = None) -> KeptLists:
    """From peaks to kept lists: the rule, then lists."""
    kept = keep(peaks, q_len=q_len, kv_len=kv_len, tolerance=tolerance, max_density=max_density, sinks=sinks,
                local=local, masks=masks, shifts=shifts, protected=protected)
    return pack(kept, peaks, allowed_blocks(masks, q_len, kv_len, peaks.device))


def keep(peaks: Tensor, *, q_len: int, kv_len: int, tolerance: float, max_density: float, sinks: int, local: int,
         masks: Masks, shifts: Sequence[float] | None = None, protected: Tensor | None = None) -> Tensor:
    """The rule: bool, shaped as `peaks`. Before lists are evened out."""
    allowed = allowed_blocks(masks, q_len, kv_len, peaks.device)
    boundary = boundary_blocks(q_len, kv_len, masks.causal_offset, peaks.device)
    forced = forced_blocks(allowed, boundary, sinks, local)[:, None]
    if protected is not None:
        forced = forced | protected[:, None, None]
    threshold = torch.full((), tolerance, dtype=peaks.dtype, device=peaks.device)
    if shifts is not None:
        threshold = (threshold * torch.tensor(shifts, dtype=peaks.dtype, device=peaks.device))[:, None, None]
    allowed = allowed[:, None].expand_as(peaks)
    kept = allowed & (forced | (peaks >= threshold))
    nearly_all = kept.sum(-1, keepdim=True) > max_density * allowed.sum(-1, keepdim=True)
    return kept | (allowed & nearly_all)


def pack(kept: Tensor, peaks: Tensor, allowed: Tensor) -> KeptLists:
    """Kept blocks as lists, evened out, see `KeptLists`. `allowed` is bool [B or 1, query blocks, key blocks]."""
    blocks = kept.shape[-1]
    odd = kept.sum(-1, keepdim=True) % TILE == 1
    # Highest peak, then highest id: a later block wins a tie because `argmax` of the flipped row finds it first.
    spare = torch.where(allowed[:, None] & ~kept, peaks, -1.0)
    best = blocks - 1 - spare.flip(-1).argmax(-1, keepdim=True)
    has_spare = (spare >= 0).any(-1, keepdim=True)
    chosen = torch.zeros_like(kept).scatter(-1, best, True) & odd & has_spare
    kept = kept | chosen
    rows = kept.flatten(0, -2)
    count = rows.sum(-1)
    row, block = rows.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=kept.device) - (count.cumsum(0) - count)[row]
    lists = torch.zeros(len(rows), capacity(blocks), dtype=torch.int32, device=kept.device)
    lists[row, place] = block.int()
    padding = torch.where(count == 0, TILE, count % TILE)
    for extra in range(TILE):
        short = padding > extra
        lists[short, count[short] + extra] = blocks + extra
    shape = kept.shape[:-1]
    return KeptLists(lists.view(*shape, capacity(blocks)), (count + padding).int().view(shape))


def every_block(allowed: Tensor, batch: int, heads: int) -> KeptLists:
    """Lists of all `allowed` blocks (bool [B or 1, query blocks, key blocks]), made without waiting for the device."""
    blocks = allowed.shape[-1]
    entry = torch.arange(capacity(blocks), device=allowed.device)
    ids = torch.where(allowed, entry[:blocks], blocks).sort(-1).values
    ids = torch.nn.functional.pad(ids, (0, capacity(blocks) - blocks))
    count = allowed.sum(-1, keepdim=True)
    even = (count + count % TILE).clamp(min=TILE)
    lists = torch.where(entry < count, ids, torch.where(entry < even, blocks + entry - count, 0)).int()
    return KeptLists(lists[:, None].expand(batch, heads, -1, -1).contiguous(),
                     even[:, None, :, 0].int().expand(batch, heads, -1).contiguous())


def unpack(lists: KeptLists, key_blocks: int) -> Tensor:
    """Kept lists as a bool mask [B, H, query blocks, key blocks]; padding ids are gone."""
    entry = torch.arange(lists.kept.shape[-1], device=lists.kept.device)
    ids = torch.where(entry < lists.counts[..., None], lists.kept, key_blocks).long().clamp(max=key_blocks)
    mask = torch.zeros(*lists.counts.shape, key_blocks + 1, dtype=torch.bool, device=lists.kept.device)
    return mask.scatter(-1, ids, True)[..., :key_blocks]
