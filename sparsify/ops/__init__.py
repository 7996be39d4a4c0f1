"""The ops: what a rewritten graph calls, and the only door to the kernels.

    exact_attention          dense buckets: nothing is dropped
    adaptive_attention       sparse buckets: select_blocks, then block_sparse_attention
    select_blocks            the key blocks that every query block keeps
    block_sparse_attention   attention over kept lists

Each is a `torch.library` op (`torch.ops.sparsify.*`) with a fake, a CPU and a CUDA implementation, and no host
synchronisation on CUDA. They have no autograd formula yet: under grad mode the pass leaves attention as it was.

Shapes, in all of them: q [B, H, q_len, D], k [B, Hkv, kv_len, D], v [B, Hkv, kv_len, Dv], any strides, H a multiple of
Hkv; query head h reads KV head h // (H // Hkv). Masks are two arguments: `causal_offset` (key j is visible to query i
when j <= i + causal_offset; kv_len - q_len is bottom-right alignment; None: no causality) and `key_mask` (bool
[B or 1, kv_len], True where a key may be attended). A row that sees no key gives zeros. `scale` multiplies q k^T.
"""

from sparsify.ops.attend import adaptive_attention, block_sparse_attention, exact_attention
from sparsify.ops.counters import Counters, counting
from sparsify.ops.select import select_blocks
from sparsify.ops.version import VERSION

__all__ = [
    "VERSION",
    "Counters",
    "adaptive_attention",
    "block_sparse_attention",
    "counting",
    "exact_attention",
    "select_blocks",
]
