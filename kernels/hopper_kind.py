"""Which compiled kernel a call of the Hopper forward gets: head dims, tiles and masks as one constant, and registers.

    q         [B, H, L, D]        fp16 or bf16; v [B, Hkv, S, Dv] as q
    masks     see kernels/masks.py
    errors    none: `hopper_coverage.why_not` says which calls there is no kernel for
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sparsify.kernels.blocks import TILE
from sparsify.kernels.hopper_coverage import padded
from sparsify.kernels.masks import Masks

STAGES = 2  # K and V tiles in flight; a third changed nothing (-6 .. +4 %, noise) and would need O to share Q's room
# 168 registers x 384 threads are the register file. The loader's group gives most of its share to the two warpgroups,
# which then hold scores, weights and output (160 registers) without a spill. 24 for the loader spill.
REGISTERS = 168
WARPGROUP_REGISTERS = 232
LOADER_REGISTERS = 40


@dataclass(frozen=True)
class Kind:
    """One compiled kernel. All of it in fields: Triton's cache on disk tells kernels apart by how this prints."""

    dim: int  # head dims as padded
    value_dim: int
    is_wide: bool  # heads fill shared memory: one query block at a time
    shares_room: bool  # a query block's output goes where its queries were
    tile: int  # key blocks of a compute tile
    stages: int  # K and V tiles in flight
    key_mask: bool  # from here on, what scores meet beyond causality
    window: bool
    documents: bool
    has_mask: bool
    has_bias: bool
    pair_bytes: int  # of two neighbours in a row of the mask tensor, if they can be read at once
    capped: bool
    sinks: bool
    noted: bool  # tiles before the last two of a list may need a mask: the loader notes of every tile if it does
    rescores: bool  # scores are brought to units of log2 before the softmax, which else does it in passing
    walks_all: bool  # exact attention: every block that causality and the window show, without lists
    in_pieces: bool  # lists are cut (splits.py); never with sinks, which the merge counts


def kind_of(q: Tensor, v: Tensor, masks: Masks, mask: Tensor, stride_mb: int, stride_mh: int, stride_ms: int,
            stride_mt: int) -> Kind:
    """The kernel over lists for these head dims and masks; `mask` and its strides as the kernel gets them."""
    D, S, DV = q.shape[3], *v.shape[2:]
    dim, value_dim = padded(D), padded(DV)
    is_wide = max(dim, value_dim) > 128
    has_mask, has_bias, capped = masks.attn_mask is not None, masks.bias is not None, masks.softcap > 0
    # Wide outputs or the elements of a mask leave registers for 64 keys: with 128, masks spilled up to 0.6 KB.
    tile = 1 if is_wide or has_mask else TILE
    pair_bytes = 2 * mask.element_size()
    even = stride_mt == 1 and not any(x % 2 for x in (stride_mb, stride_mh, stride_ms, S))
    if not has_mask or not even or mask.data_ptr() % pair_bytes:
        pair_bytes = 0
    key_mask, window, documents = (x is not None for x in (masks.key_mask, masks.window, masks.query_documents))
    return Kind(dim, value_dim, is_wide, shares_room=is_wide and dim == value_dim, tile=tile,
                stages=STAGES if is_wide else STAGES * TILE // tile, key_mask=key_mask, window=window,
                documents=documents, has_mask=has_mask, has_bias=has_bias, pair_bytes=pair_bytes, capped=capped,
                sinks=masks.sink_logits is not None, noted=key_mask or window or documents or tile == 1,
                rescores=capped or has_bias, walks_all=False, in_pieces=False)


@lru_cache
def plain_kind(dim: int, value_dim: int, has_key_mask: bool, *, walks_all: bool = False,
               in_pieces: bool = False) -> Kind:
    """The kernel for heads of these dims, under causality and perhaps a key mask."""
    q, v = (torch.empty(1, 1, 1, size, device="meta") for size in (dim, value_dim))
    kind = kind_of(q, v, Masks(causal_offset=0), q, 0, 0, 0, 0)
    return replace(kind, key_mask=has_key_mask, noted=kind.noted or has_key_mask, walks_all=walks_all,
                   in_pieces=in_pieces)
