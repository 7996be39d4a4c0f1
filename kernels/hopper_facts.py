"""Facts of blocks that the loading warp of the Hopper forward judges tiles by.

    shown     bool [B or 1, length]            which positions a key mask shows, or None
    ids       int32 or int64 [B or 1, length]  documents, dense, or None
    facts     int64 [B or 1, blocks, 3]        shown positions as bits; lowest and highest document
    errors    none
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.launch import launched

CHUNK = 32  # blocks whose facts a program gathers


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


def block_facts(shown: Tensor | None, ids: Tensor | None, length: int, block: int, room: int,
                placeholder: Tensor) -> tuple[Tensor, int]:
    """Launch `_gather_facts` for `room` blocks: int64 [batch rows, room, 3], and its first stride, 0 if one row serves
    all; the placeholder without a key mask `shown` and without documents `ids`."""
    present = [x for x in (shown, ids) if x is not None]
    if not present:
        return placeholder, 0
    batch = max(len(x) for x in present)
    facts = torch.empty(batch, room, 3, dtype=torch.int64, device=present[0].device)
    strides = [0 if x is None or len(x) == 1 else x.stride(0) for x in (shown, ids)]
    _gather_facts[(triton.cdiv(room, CHUNK), batch)](
        facts if shown is None else shown, facts if ids is None else ids, facts, length, room, strides[0],
        0 if shown is None else shown.stride(1), strides[1], BLOCK=block, CHUNK=CHUNK,
        HAS_SHOWN=shown is not None, HAS_IDS=ids is not None)
    return facts, 0 if batch == 1 else facts.stride(0)
