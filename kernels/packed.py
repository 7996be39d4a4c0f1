"""Selection and attention as one op that AOTInductor opens: its Triton kernels are packed into a file as machine code.

    q, k, v   as in attend.py, on a GPU
    key_mask  bool [B or 1, S] or None
    out       [B, H, L, Dv], in memory [B, L, H, Dv]
    errors    none here: `exporters/buckets.py` says which sites this op serves

The launchers of the other files ask for the value of a shape (a logarithm of the last block's size), which a graph for
all lengths does not have. Here the last block is always read by its own count, as under a key mask. Plain Triton on
every GPU: Inductor does not take Gluon kernels (torch 2.11 to 2.13), nor `maxnreg`.

Source: attend.py, statistics.py and select.py, whose kernels run here.
"""

import math

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from sparsify.kernels.attend import _block_sparse_attention, _configuration, _shared_memory
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, capacity, count_blocks
from sparsify.kernels.launch import multiprocessors
from sparsify.kernels.scores import LOG2_E
from sparsify.kernels.select import (
    PACK_WARPS,
    PACK_WIDTH,
    PROGRAMS_PER_MULTIPROCESSOR,
    STAGES,
    _estimate_peaks,
    _pack_lists,
)
from sparsify.kernels.select import _configuration as _estimator
from sparsify.kernels.statistics import LARGEST, NUM_WARPS, _summarise_keys


@triton_op("sparsify::packed_attention", mutates_args={})
def packed_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, causal_offset: int | None,
                     tolerance: float, max_density: float, sinks: int, local: int, singles: int) -> Tensor:
    """Select key blocks and attend to them; a budget's numbers as in `sparsify.Budget`, `scale` above 0."""
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    DV = v.shape[3]
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(S, KEY_BLOCK)
    room = capacity(key_blocks)
    masks = 1 if key_mask is None else key_mask.shape[0]
    shown = torch.ones(1, S, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    mask_strides = (0 if masks == 1 else shown.stride(0), shown.stride(1))
    count_stride = 0 if masks == 1 else key_blocks
    D_PAD = max(16, triton.next_power_of_2(D))

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Flat: strides that are asked whether a size is 1 would fix whether there is one chunk or more."""
        return torch.empty(math.prod(sizes), dtype=dtype, device=q.device)

    vectors = [empty(B, Hkv, singles, key_blocks, D, dtype=k.dtype),
               *(empty(B, Hkv, key_blocks, D, dtype=k.dtype) for _ in range(2)),
               *(empty(masks, key_blocks, dtype=torch.int32) for _ in range(2))]
    wrap_triton(_summarise_keys.kernel)[(key_blocks, Hkv, B)](
        k, shown, *vectors, *k.stride(), *mask_strides, S, masks, LARGEST[k.dtype], SINGLES=singles, BLOCK=KEY_BLOCK,
        D=D, D_PAD=D_PAD, HAS_KEY_MASK=key_mask is not None, num_warps=NUM_WARPS)

    units = B * H * query_blocks
    chunk, warps = _estimator(q.element_size())
    chunks = count_blocks(key_blocks, chunk)
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device)
    mass_type = torch.float32 if q.element_size() == 4 else torch.float16
    scratch = empty(programs, chunks, QUERY_BLOCK, chunk, dtype=mass_type)
    scratch_peaks, peaks = empty(programs, chunks, QUERY_BLOCK), empty(B, H, query_blocks, key_blocks)
    offset = S + KEY_BLOCK if causal_offset is None else causal_offset
    wrap_triton(_estimate_peaks.kernel)[(programs,)](
        q, k, shown, *vectors, peaks, scratch, scratch_peaks, *q.stride(), *k.stride(), *mask_strides, count_stride,
        query_blocks, key_blocks, units, H, H // Hkv, L, S, offset, scale * LOG2_E, scale * math.sqrt(LOG2_E), 0.0, 0.0,
        SINGLES=singles, STAGES=STAGES, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, CHUNK=chunk, D=D, D_PAD=D_PAD,
        HAS_KEY_MASK=True, num_warps=warps, num_stages=1)

    kept, counts = empty(B, H, query_blocks, room, dtype=torch.int32), empty(B, H, query_blocks, dtype=torch.int32)
    # Where a flag says that a tensor is absent, another stands in its place and is not read. In this kernel one of its
    # own: Inductor takes all of its tensors for written (places follow from a function's results), and so for distinct.
    absent = [empty(1, dtype=torch.int32) for _ in range(2)]
    wrap_triton(_pack_lists.kernel)[(units,)](
        peaks, *vectors[3:], *absent, kept, counts, count_stride, 0, 0, query_blocks, key_blocks, room,
        H, L, offset, tolerance, 1.0, max_density, sinks, local, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, WIDTH=PACK_WIDTH,
        PLAIN=True, HAS_KEY_MASK=key_mask is not None, SHIFTS=0, PROTECTED=False, num_warps=PACK_WARPS)

    out, lse = torch.empty(B, L, H, DV, dtype=q.dtype, device=q.device), empty(B, H, L)
    DV_PAD = max(16 if q.element_size() == 4 else 64, triton.next_power_of_2(DV))
    rows, warps, stages = _configuration(max(D_PAD, DV_PAD), q.element_size(), _shared_memory(q.device), 0)
    wrap_triton(_block_sparse_attention.kernel)[(units * (QUERY_BLOCK // rows),)](
        q, k, v, kept, counts, shown, out, lse, *q.stride(), *k.stride(), *v.stride(), *mask_strides, room,
        query_blocks, H, H // Hkv, L, S, S if causal_offset is None else causal_offset, scale * LOG2_E, 0, counts,
        counts, 0, 0, q, 0, 0, 0, 0, 0.0, q, ROWS=rows, QUERY_BLOCK=QUERY_BLOCK, BLOCK=KEY_BLOCK, D=D, DV=DV,
        D_PAD=D_PAD, DV_PAD=DV_PAD, HAS_KEY_MASK=key_mask is not None, PLAIN=True, WINDOWED=False, HAS_DOCUMENTS=False,
        MASK=0, CAPPED=False, HAS_SINKS=False, IN_PIECES=False, num_warps=warps, num_stages=stages)
    return out.transpose(1, 2)
