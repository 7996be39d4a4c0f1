"""The ops: what a rewritten graph calls, and the only door to the kernels.

    exact_attention          dense buckets: nothing is dropped
    adaptive_attention       sparse buckets: select_blocks, then block_sparse_attention
    planned_attention        exported graphs: the table of a plan's buckets, looked up at each call
    select_blocks            the key blocks that every query block keeps
    block_sparse_attention   attention over kept lists
    check_mask               what a proof says of a mask, compared with the mask itself
    protect_keys             a marker in a model's code: these keys no attention may lose

Each is a `torch.library` op (`torch.ops.sparsify.*`) with a fake, a CPU and a CUDA implementation, and no host
synchronisation on CUDA. They have no autograd formula yet: under grad mode the pass leaves attention as it was.

Shapes, in all of them: q [B, H, q_len, D], k [B, Hkv, kv_len, D], v [B, Hkv, kv_len, Dv], any strides, H a multiple of
Hkv; query head h reads KV head h // (H // Hkv). `scale` multiplies q k^T. Behind it come, in this order:

    causal_offset    key j is visible to query i only if j <= i + causal_offset (kv_len - q_len is bottom-right
                     alignment); None: no causality
    window           and only if j > i + causal_offset - window; needs causal_offset. |i - j| <= w is causal_offset = w,
                     window = 2 * w + 1
    key_mask         bool [B or 1, kv_len], True where a key may be attended
    query_documents  int32 or int64 [B or 1, q_len], and
    key_documents    [B or 1, kv_len]: visible only if the ids are equal
    attn_mask        [B or 1, H or 1, q_len or 1, kv_len or 1], any strides; bool: True is visible; floating: added to
                     the scaled, capped scores, -inf hides
    softcap          0.0: none; else scores become softcap * tanh(scores / softcap)
    sink_logits      floating [H]: one logit per query head that takes part in the softmax and carries no value

All masks hold together. A row that sees no key gives zeros, with sink logits too.
"""

from sparsify.ops.attend import adaptive_attention, block_sparse_attention, exact_attention
from sparsify.ops.counters import Counters, counting
from sparsify.ops.planned import planned_attention
from sparsify.ops.probing import probing
from sparsify.ops.protect import protect_keys
from sparsify.ops.select import select_blocks
from sparsify.ops.verify import check_mask
from sparsify.ops.version import VERSION

__all__ = [
    "VERSION",
    "Counters",
    "adaptive_attention",
    "block_sparse_attention",
    "check_mask",
    "counting",
    "exact_attention",
    "planned_attention",
    "probing",
    "protect_keys",
    "select_blocks",
]
