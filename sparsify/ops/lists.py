"""Attention over kept lists, on the kernel of the device: the ops' way to it."""

from torch import Tensor

from sparsify.kernels import gather, native
from sparsify.kernels.masks import Masks

WIDEST_ON_CUDA = 256  # head dim of our kernels there


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Whether block-sparse attention of ours takes this dtype and head dim; on a CPU it takes all."""
    return not q.is_cuda or (q.element_size() < 8 and max(q.shape[3], v.shape[3]) <= WIDEST_ON_CUDA)


def attend_lists(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, scale: float,
                 masks: Masks) -> tuple[Tensor, Tensor]:
    """Output, laid out in memory as [B, q_len, H, Dv], and lse; see `block_sparse_attention`."""
    if not q.is_cuda:
        cpu = gather if native.why_not(q) else native
        return cpu.block_sparse_attention(q, k, v, kept, counts, scale=scale, masks=masks)
    from sparsify.kernels import attend, hopper, hopper_coverage  # Triton: imported when a CUDA op runs, not before

    kernel = attend if hopper_coverage.why_not(q, k, v, masks) else hopper
    return kernel.block_sparse_attention(q, k, v, kept, counts, scale=scale, masks=masks)
