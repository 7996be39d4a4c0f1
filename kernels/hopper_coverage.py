"""Which calls the kernels for Hopper cover, and how the copy engine sees the tensors of those.

    q, k, v   [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv]
    errors    none: `why_not` is a sentence
"""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsify.kernels.blocks import KEY_BLOCK
from sparsify.kernels.launch import descriptor, is_hopper
from sparsify.kernels.masks import Masks

WIDEST = 256  # head dim
ROWS_OF_A_HEAD = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # of descriptors


def why_not_here(q: Tensor) -> str | None:
    """Why no kernel for Hopper takes this tensor, as `why_not`: device and dtype."""
    if not is_hopper(q.device):
        return "the device is not a Hopper GPU"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {q.dtype}, not float16 or bfloat16"
    return None


def why_not(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str | None:
    """Why this call is not covered, in one sentence; None if it is."""
    if unsuited := why_not_here(q):
        return unsuited
    if max(q.shape[3], v.shape[3]) > WIDEST or v.shape[3] % 8:
        return (f"the head dims are {q.shape[3]} and {v.shape[3]}: both must be at most {WIDEST}, that of v a "
                "multiple of 8")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not is_describable(tensor):
            return f"{name} has strides {tensor.stride()}: rows must be dense, everything a multiple of 16 bytes"
    return None


def is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address a tensor of 2-byte elements as it lies."""
    strides = [tensor.stride(i) for i in range(3) if tensor.shape[i] > 1]
    return (tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in strides))


def describe(tensor: Tensor) -> TensorDescriptor:
    """The copy engine's view: boxes of 64 rows of one head, clipped at the tensor's own length and head dim."""
    dim = padded(tensor.shape[3])
    # The stride of a dimension of size 1 means nothing to torch, but the engine checks it.
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else dim for i in range(3)]
    return descriptor(tensor, [*strides, 1], [1, 1, KEY_BLOCK, dim], ROWS_OF_A_HEAD)


def padded(dim: int) -> int:
    """A head dim as the kernel has it: the copy engine fills up with zeros."""
    return max(64, 1 << (dim - 1).bit_length())
