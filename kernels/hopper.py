"""Block-sparse attention forward for Hopper, in Gluon: the fast path, also at density 1.

    q       [B, H, L, D]       fp16 or bf16; D and Dv up to 256, Dv a multiple of 8; last dimension dense, other strides
                               multiples of 16 bytes
    k, v    [B, Hkv, S, D], [B, Hkv, S, Dv]       as q; query head h reads KV head h // (H // Hkv)
    kept    [B, H, blocks of 128 rows, capacity]  int32 lists of 64-key blocks, see `KeptLists`
    counts  [B, H, blocks of 128 rows]            int32, even, at least 2
    masks   see kernels/masks.py; every one of them
    out     [B, H, L, Dv]      in the dtype of q, in memory [B, L, H, Dv]
    lse     [B, H, L]          float32, natural log of the row's sum, sink included; a row that sees no key: zeros and,
                               without a sink, -inf
    errors  none here: the op checks shapes, `hopper_coverage.why_not` says which calls this kernel does not cover

The kernel is in hopper_forward.py, with its loading warp (hopper_loader.py) and what scores meet (hopper_scores.py);
hopper_kind.py says which of its forms a call gets, hopper_queue.py, hopper_facts.py and splits.py make what it reads.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsify.kernels import hopper_native
from sparsify.kernels.attend import positive_scale
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE, count_blocks
from sparsify.kernels.every import every_block
from sparsify.kernels.hopper_coverage import describe
from sparsify.kernels.hopper_facts import block_facts
from sparsify.kernels.hopper_forward import _block_sparse_attention
from sparsify.kernels.hopper_kind import LOADER_REGISTERS, REGISTERS, WARPGROUP_REGISTERS, Kind, kind_of
from sparsify.kernels.hopper_queue import fill_queue
from sparsify.kernels.launch import multiprocessors
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E, score_arguments
from sparsify.kernels.splits import cut_lists, merge_pieces, room_for, units_for


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Launch `_block_sparse_attention`; arguments as above, covered by `why_not`."""
    wanted = _units_for(q, k)
    out, lse = _outputs(q, v)
    if hopper_native.attend(q, k, v, (kept, counts), out, lse, scale=scale, masks=masks, pieces=wanted):
        return out, lse
    extras, _ = score_arguments(masks, q)
    kind = kind_of(q, v, masks, *extras[5:10])
    pair_capacity = kept.shape[3] // kind.tile
    kept_pairs = kept if kind.tile == 1 else kept.view(torch.int64)
    if not wanted:
        _launch(q, k, v, describe(out), lse, kept_pairs, pair_capacity, *fill_queue(counts, pair_capacity, kind.tile),
                kind, scale, masks, extras)
        return out, lse
    cut = cut_lists(counts, kind.tile, wanted, idle=multiprocessors(q.device))
    partial, sums = room_for(cut, kind.value_dim)
    _launch(q, k, v, partial, sums, kept_pairs, pair_capacity, cut.units, cut.counter,
            replace(kind, in_pieces=True, sinks=False, shares_room=False), scale, masks, extras)
    merge_pieces(partial, sums, cut, masks.sink_logits, out, lse)
    return out, lse


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, masks: Masks) -> tuple[Tensor, Tensor]:
    """Exact attention: as `block_sparse_attention` over lists of all blocks, without making or reading them.

    Documents and key masks hide keys, but no block is skipped for them. Lists are made where they are to be cut.
    """
    if _units_for(q, k):
        return block_sparse_attention(q, k, v, *every_block(q, k.shape[2], masks), scale=scale, masks=masks)
    out, lse = _outputs(q, v)
    if hopper_native.attend(q, k, v, None, out, lse, scale=scale, masks=masks):
        return out, lse
    extras, _ = score_arguments(masks, q)
    kind = replace(kind_of(q, v, masks, *extras[5:10]), walks_all=True)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _launch(q, k, v, describe(out), lse, counter, 0, counter, counter, kind, scale, masks, extras)
    return out, lse


def _units_for(q: Tensor, k: Tensor) -> int:
    """Pieces to cut the lists of a call into, as `units_for`."""
    rows = q.shape[0] * q.shape[1] * count_blocks(q.shape[2], QUERY_BLOCK)
    return units_for(rows, count_blocks(k.shape[2], KEY_BLOCK), multiprocessors(q.device))


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` and `lse`."""
    B, H, L, _ = q.shape
    return (torch.empty(B, L, H, v.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2),
            torch.empty(B, H, L, dtype=torch.float32, device=q.device))


def _launch(q: Tensor, k: Tensor, v: Tensor, out: TensorDescriptor | Tensor, lse: Tensor, kept_pairs: Tensor,
            pair_capacity: int, queue: Tensor, counter: Tensor, kind: Kind, scale: float, masks: Masks,
            extras: tuple[Any, ...]) -> None:
    """Launch the kernel of this kind; `extras` are the arguments of `score_arguments`."""
    q, scale = positive_scale(q, scale)
    B, H, L, _ = q.shape
    Hkv, S = v.shape[1:3]
    query_blocks = count_blocks(L, QUERY_BLOCK)
    blocks = len(queue) if kind.in_pieces else B * H * query_blocks
    row_documents, key_documents = extras[1:3] if kind.documents else (None, None)  # dense, unlike those of `masks`
    # A list may hold two padding ids: two blocks past the end.
    key_facts, stride_key_facts = block_facts(masks.key_mask, key_documents, S, KEY_BLOCK,
                                              count_blocks(S, KEY_BLOCK) + TILE, queue)
    row_facts, stride_row_facts = block_facts(None, row_documents, L, QUERY_BLOCK, query_blocks, queue)
    programs = min(multiprocessors(q.device), blocks)
    _block_sparse_attention[(programs,)](
        describe(q), describe(k), describe(v), out, lse, kept_pairs, queue, counter,
        blocks, pair_capacity, query_blocks, H, H // Hkv, L, S,
        S if masks.causal_offset is None else masks.causal_offset,  # every row of an offset of S sees every key
        scale * LOG2_E, *extras, key_facts, stride_key_facts, row_facts, stride_row_facts,
        ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, KIND=kind, WARPGROUP_REGISTERS=WARPGROUP_REGISTERS,
        LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4, maxnreg=REGISTERS)
