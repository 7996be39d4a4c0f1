"""Selection and attention for packages on Hopper: as packed.py, with the kernels that the compiled model runs.

    q, k, v   [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv], fp16 or bf16; D is 64 or 128, Dv up to 128, a multiple of 8
    key_mask  bool [B or 1, S] or None
    out       [B, H, L, Dv], in memory [B, L, H, Dv]
    errors    none here: `kernels_for` says which sites this op serves

AOTInductor takes no Gluon kernels (torch 2.11 to 2.13). So the op is a C function to it: hopper_shim.cpp, which is
linked into the package with the machine code of all sites' kernels (`source`). In Python it has no body.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK
from sparsify.kernels.hopper_code import TYPES, AttentionKernels, SelectionKernels, boxes_of
from sparsify.kernels.hopper_kind import plain_kind

WIDEST = 128  # head dim of v: wider heads are another layout of the kernel
SiteKernels = tuple[SelectionKernels, AttentionKernels, AttentionKernels]

_OPS = torch.library.Library("sparsify", "FRAGMENT")
_OPS.define("packed_attention_on_hopper(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale, "
            "SymInt? causal_offset, float tolerance, float max_density, int sinks, int local, int singles, "
            "int first_kernel) -> Tensor")
DECLARATIONS = {torch.ops.sparsify.packed_attention_on_hopper.default: [
    "AOTITorchError aoti_torch_cuda_packed_attention_on_hopper(AtenTensorHandle q, AtenTensorHandle k, "
    "AtenTensorHandle v, AtenTensorHandle* key_mask, double scale, int64_t* causal_offset, double tolerance, "
    "double max_density, int64_t sinks, int64_t local, int64_t singles, int64_t first, AtenTensorHandle* result)"]}
"""The C function of hopper_shim.cpp, as AOTInductor's code declares it."""


@torch.library.register_fake("sparsify::packed_attention_on_hopper")
def _(q, k, v, key_mask, scale, causal_offset, tolerance, max_density, sinks, local, singles, first_kernel):
    B, H, L, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]).transpose(1, 2)


def kernels_for(q: Tensor, v: Tensor, has_key_mask: bool, singles: int) -> SiteKernels | None:
    """The kernels of a site, for tensors like these (fakes will do); None if it is left to packed.py."""
    D, DV = q.shape[3], v.shape[3]
    if q.dtype not in TYPES or D not in (64, 128) or DV > WIDEST or DV % 8 or singles >= KEY_BLOCK:
        return None
    kinds = (plain_kind(D, DV, has_key_mask, in_pieces=in_pieces) for in_pieces in (False, True))
    whole, pieces = (AttentionKernels(q.dtype, kind, DV) for kind in kinds)
    return SelectionKernels(q.dtype, D, singles, has_key_mask), whole, pieces


def first_kernel(sites: Sequence[SiteKernels], wanted: SiteKernels) -> int:
    """The number in `source` of the first kernel of one of the sites."""
    return sum(len(some.compilers()) for kernels in sites[:sites.index(wanted)] for some in kernels)


def source(sites: Sequence[SiteKernels]) -> str:
    """hopper_shim.cpp with the machine code of these sites' kernels: C++ that wants this folder and torch's on its
    path."""
    parts, entries = [], []
    compiled = [kernel for kernels in sites for some in kernels for kernel in some.compiled()]
    for number, kernel in enumerate(compiled):
        facts, boxes = kernel.metadata, boxes_of(kernel)
        image = ",".join(map(str, kernel.asm["cubin"]))
        parts.append(f"alignas(64) const unsigned char IMAGE_{number}[] = {{{image}}};\n")
        if boxes:
            rows = ", ".join(f"{{{', '.join(map(str, box[:4]))}, {{{', '.join(map(str, box[4:]))}}}}}" for box in boxes)
            parts.append(f"const Box BOXES_{number}[] = {{{rows}}};\n")
        entries.append(f'{{IMAGE_{number}, "{facts.name}", {facts.shared}, {32 * facts.num_warps}, '
                       f"{f'BOXES_{number}' if boxes else 'nullptr'}}}")
    table = f"const Kernel KERNELS[] = {{{', '.join(entries)}}};\n"
    return f'#include "hopper_shim.cpp"\nnamespace {{\n{"".join(parts)}{table}}}\n'
