"""Selection and attention for packages on Hopper: as packed.py, with the Gluon kernels that the compiled model runs.

    q, k, v   [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv], fp16 or bf16; D is 64 or 128, Dv up to 128, a multiple of 8
    key_mask  bool [B or 1, S] or None
    out       [B, H, L, Dv], in memory [B, L, H, Dv]
    errors    none here: `kernels_for` says which sites this op serves

AOTInductor opens the op, as it does packed.py's, and compiles the Triton kernels in it. It takes no Gluon kernels
(torch 2.11 to 2.13): those two are compiled here, to machine code that serves every batch, length and stride, and
hopper_shim.cpp, which is linked into the package, launches them. So the two ops that stand for them have no body in
Python. Lists are not cut into pieces (splits.py) where query blocks are few.

Source: hopper_select.py and hopper.py, whose kernels run here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.experimental.gluon._runtime import GluonASTSource

from sparsify.kernels import hopper_facts, hopper_queue, hopper_select
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE, capacity, count_blocks
from sparsify.kernels.hopper_coverage import ROWS_OF_A_HEAD
from sparsify.kernels.hopper_forward import _block_sparse_attention
from sparsify.kernels.hopper_kind import LOADER_REGISTERS, REGISTERS, WARPGROUP_REGISTERS, Kind, kind_of
from sparsify.kernels.masks import Masks
from sparsify.kernels.select import PACK_WARPS, PACK_WIDTH, _pack_lists

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDEST = 128  # head dim of v: wider heads are another layout of the kernel
ALIGNED = [["tt.divisibility", 16]]

_OPS = torch.library.Library("sparsify", "FRAGMENT")
_OPS.define("hopper_peaks(Tensor q, Tensor vectors, Tensor whole, Tensor? key_mask, Tensor counts, Tensor units, "
            "SymInt kv_len, SymInt? causal_offset, float scale, int singles, int kernel) -> Tensor")
_OPS.define("hopper_attention(Tensor q, Tensor k, Tensor v, Tensor kept, Tensor queue, Tensor cursors, "
            "Tensor? key_facts, SymInt? causal_offset, float scale, int kernel) -> Tensor")
_HANDLE = "AtenTensorHandle"
DECLARATIONS = {
    torch.ops.sparsify.hopper_peaks.default: [
        f"AOTITorchError aoti_torch_cuda_hopper_peaks({_HANDLE} q, {_HANDLE} vectors, {_HANDLE} whole, "
        f"{_HANDLE}* key_mask, {_HANDLE} counts, {_HANDLE} units, int64_t kv_len, int64_t* causal_offset, "
        f"double scale, int64_t singles, int64_t kernel, {_HANDLE}* result)"],
    torch.ops.sparsify.hopper_attention.default: [
        f"AOTITorchError aoti_torch_cuda_hopper_attention({_HANDLE} q, {_HANDLE} k, {_HANDLE} v, {_HANDLE} kept, "
        f"{_HANDLE} queue, {_HANDLE} cursors, {_HANDLE}* key_facts, int64_t* causal_offset, double scale, "
        f"int64_t kernel, {_HANDLE}* result)"],
}
"""The C functions of hopper_shim.cpp, as AOTInductor's code declares them."""


@torch.library.register_fake("sparsify::hopper_peaks")
def _(q, vectors, whole, key_mask, counts, units, kv_len, causal_offset, scale, singles, kernel):
    B, H, L, _ = q.shape
    return q.new_empty(B * H * count_blocks(L, QUERY_BLOCK) * count_blocks(kv_len, KEY_BLOCK), dtype=torch.float32)


@torch.library.register_fake("sparsify::hopper_attention")
def _(q, k, v, kept, queue, cursors, key_facts, causal_offset, scale, kernel):
    B, H, L, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]).transpose(1, 2)


@dataclass(frozen=True)
class PeaksKernel:
    """Which `_estimate_peaks` a site needs."""

    dtype: torch.dtype
    dim: int
    singles: int
    has_key_mask: bool


@dataclass(frozen=True)
class AttentionKernel:
    """Which `_block_sparse_attention` a site needs."""

    dtype: torch.dtype
    kind: Kind


def source(kernels: Sequence[PeaksKernel | AttentionKernel]) -> str:
    """hopper_shim.cpp with the machine code of these kernels, whose places are their numbers: C++ that wants this
    folder and torch's on its path."""
    parts, entries = [], []
    for number, wanted in enumerate(kernels):
        compiled = compile_peaks(wanted) if isinstance(wanted, PeaksKernel) else compile_attention(wanted)
        facts = compiled.metadata
        image = ",".join(map(str, compiled.asm["cubin"]))
        boxes = ", ".join(map(_box, facts.tensordesc_meta))
        parts.append(f"alignas(64) const unsigned char IMAGE_{number}[] = {{{image}}};\n"
                     f"const Box BOXES_{number}[] = {{{boxes}}};\n")
        entries.append(f'{{IMAGE_{number}, "{facts.name}", {facts.shared}, {32 * facts.num_warps}, BOXES_{number}}}')
    table = f"const Kernel KERNELS[] = {{{', '.join(entries)}}};\n"
    return f'#include "hopper_shim.cpp"\nnamespace {{\n{"".join(parts)}{table}}}\n'


def _box(meta: dict[str, Any]) -> str:
    sizes = ", ".join(map(str, meta["block_size"]))
    return (f"{{{meta['swizzle']}, {TMA_DTYPE_DEVICE_TO_HOST[meta['elem_type']]}, {meta['elem_size']}, "
            f"{len(meta['block_size'])}, {{{sizes}}}}}")


def compile_peaks(wanted: PeaksKernel) -> Any:
    """`_estimate_peaks` for any batch, length and strides of 16 elements, as hopper_shim.cpp launches it."""
    tiles = {"vectors": hopper_select.CHUNK, "whole": hopper_select.EDGE * KEY_BLOCK}
    kinds = {name: _described("fp8e4nv", [tile, wanted.dim], hopper_select.layout_of(tile, wanted.dim))
             for name, tile in tiles.items()}
    kinds |= {"q": f"*{TYPES[wanted.dtype]}", "key_mask": "*i1" if wanted.has_key_mask else "*i32", "counts": "*i32",
              "units_of_keys": "*fp32", "peaks": "*fp32", "scratch": "*bf16", "stride_qb": "i64",
              "scale_log2": "fp32", "spread_log2": "fp32", "log2_count": "fp32"}
    constants = {"stride_mask": 1, "VECTORS": wanted.singles + 2, "STAGES": hopper_select.STAGES, "ROWS": QUERY_BLOCK,
                 "BLOCK": KEY_BLOCK, "EDGE": hopper_select.EDGE, "CHUNK": hopper_select.CHUNK, "D": wanted.dim,
                 "LOWEST": hopper_select.LOWEST_EXPONENT, "EXPONENTS": hopper_select.EXPONENTS,
                 "LOADER_REGISTERS": hopper_select.LOADER_REGISTERS, "HAS_KEY_MASK": wanted.has_key_mask}
    aligned = ["q", "counts", "units_of_keys", "peaks", "scratch", "stride_qb", "stride_qh", "stride_qs",
               "stride_counts"]
    return _compile(hopper_select._estimate_peaks.kernel, kinds, constants, aligned, hopper_select.REGISTERS)


def compile_attention(wanted: AttentionKernel) -> Any:
    """`_block_sparse_attention` for any batch, length and strides, as hopper_shim.cpp launches it."""
    kind, given = wanted.kind, TYPES[wanted.dtype]
    kinds = {name: _described(given, [1, 1, KEY_BLOCK, dim], ROWS_OF_A_HEAD) for name, dim in (
        ("q", kind.dim), ("k", kind.dim), ("v", kind.value_dim), ("out", kind.value_dim))}
    kinds |= {"lse": "*fp32", "kept_pairs": "*i64", "queue": "*i64", "counter": "*i32", "scale_log2": "fp32",
              "query_documents": f"*{given}", "key_documents": f"*{given}", "attn_mask": f"*{given}",
              "cap_log2": "fp32", "sinks": f"*{given}", "key_facts": "*i64", "row_facts": "*i64"}
    constants = {"ROWS": QUERY_BLOCK, "BLOCK": KEY_BLOCK, "KIND": kind, "WARPGROUP_REGISTERS": WARPGROUP_REGISTERS,
                 "LOADER_REGISTERS": LOADER_REGISTERS}
    aligned = ["lse", "kept_pairs", "queue", "counter"]
    return _compile(_block_sparse_attention.kernel, kinds, constants, aligned, REGISTERS)


def _compile(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], aligned: list[str], registers: int) -> Any:
    """Machine code for sm_90; parameters without a kind are 32-bit integers. Needs no GPU."""
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): ALIGNED for name in aligned}
    compiled = triton.compile(GluonASTSource(kernel, signature, constants, attributes), target=TARGET,
                              options={"num_warps": 4, "maxnreg": registers})
    assert not compiled.metadata.global_scratch_size and not compiled.metadata.profile_scratch_size
    return compiled


def _described(dtype: str, box: list[int], layout: Any) -> str:
    return f"tensordesc<{dtype}{box},{layout!r}>"


def kernels_for(q: Tensor, v: Tensor, has_key_mask: bool,
                singles: int) -> tuple[()] | tuple[PeaksKernel, AttentionKernel]:
    """The kernels of a site, for tensors like these (fakes will do); none if it is left to packed.py."""
    D, DV = q.shape[3], v.shape[3]
    if q.dtype not in TYPES or D not in (64, 128) or DV > WIDEST or DV % 8 or singles >= KEY_BLOCK:
        return ()
    kind = replace(kind_of(q, v, Masks(), q, 0, 0, 0, 0), key_mask=has_key_mask, noted=has_key_mask)
    return PeaksKernel(q.dtype, D, singles, has_key_mask), AttentionKernel(q.dtype, kind)


@triton_op("sparsify::packed_attention_on_hopper", mutates_args={})
def packed_attention_on_hopper(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float,
                               causal_offset: int | None, tolerance: float, max_density: float, sinks: int, local: int,
                               singles: int, peaks_kernel: int, attention_kernel: int) -> Tensor:
    """As `packed_attention`, for at least one whole key block; the kernels by their numbers in `Kernels`."""
    B, H, L, D = q.shape
    Hkv, S = k.shape[1:3]
    query_blocks, key_blocks = count_blocks(L, QUERY_BLOCK), count_blocks(S, KEY_BLOCK)
    room = count_blocks(key_blocks, hopper_select.CHUNK) * hopper_select.CHUNK
    has_mask = key_mask is not None
    masks = 1 if key_mask is None else key_mask.shape[0]

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Flat, as in packed.py: strides that are asked whether a number of blocks is 1 would fix the answer."""
        return torch.empty(math.prod(sizes), dtype=dtype, device=q.device)

    # Where a flag says that a tensor is absent, another stands in its place: one of its own, as in packed.py.
    absent = [empty(1, dtype=torch.int32) for _ in range(4)]
    shown = absent[0] if key_mask is None else key_mask.contiguous()
    mask_strides = (0 if masks == 1 else S, 1)
    ranges, units = empty(B, Hkv, 3, D), empty(B, Hkv, 2)
    vectors, whole = (empty(B * Hkv, rows, room, D, dtype=torch.float8_e4m3fn) for rows in (singles + 2, KEY_BLOCK))
    counts = empty(masks, room, dtype=torch.int32)
    wrap_triton(hopper_select._sample_keys.kernel)[(D // hopper_select.CHANNELS, B * Hkv)](
        k, shown, ranges, *k.stride(), *mask_strides, S, Hkv, count_blocks(S, hopper_select.SAMPLES),
        SAMPLES=hopper_select.SAMPLES, CHANNELS=hopper_select.CHANNELS, D=D, HAS_KEY_MASK=has_mask, num_warps=4)
    wrap_triton(hopper_select._quantise_keys.kernel)[(key_blocks, B * Hkv)](
        k, shown, ranges, vectors, whole, counts, units, *k.stride(), *mask_strides, S, Hkv, room, masks,
        SINGLES=singles, BLOCK=KEY_BLOCK, D=D, LARGEST=hopper_select.LARGEST, HEADROOM=hopper_select.HEADROOM,
        HAS_KEY_MASK=has_mask, num_warps=hopper_select.QUANTISE_WARPS)
    mask = shown if has_mask else None
    peaks = torch.ops.sparsify.hopper_peaks(q, vectors, whole, mask, counts, units, S, causal_offset, scale, singles,
                                            peaks_kernel)

    kept = empty(B, H, query_blocks, capacity(key_blocks), dtype=torch.int32)
    lengths = empty(B, H, query_blocks, dtype=torch.int32)
    rest = torch.zeros_like(counts) if has_mask else absent[1]  # all visible keys are in `counts`
    wrap_triton(_pack_lists.kernel)[(B * H * query_blocks,)](
        peaks, counts, rest, absent[2], absent[3], kept, lengths, 0 if masks == 1 else room, 0, 0, query_blocks,
        key_blocks, capacity(key_blocks), H, L, S + KEY_BLOCK if causal_offset is None else causal_offset, tolerance,
        1.0, max_density, sinks, local, ROWS=QUERY_BLOCK, BLOCK=KEY_BLOCK, WIDTH=PACK_WIDTH, PLAIN=True,
        HAS_KEY_MASK=has_mask, SHIFTS=0, PROTECTED=False, num_warps=PACK_WARPS)
    rows = B * H * query_blocks
    queue, cursors = empty(rows, dtype=torch.int64), empty(hopper_queue.LEVELS + 1, dtype=torch.int32)
    wrap_triton(hopper_queue._fill_queue.kernel)[(1,)](
        lengths, queue, cursors, rows, capacity(key_blocks) // TILE, LEVELS=hopper_queue.LEVELS,
        CHUNK=hopper_queue.CHUNK, TILE=TILE, num_warps=hopper_queue.NUM_WARPS)
    facts = None
    if has_mask:
        facts = empty(masks, key_blocks + TILE, 3, dtype=torch.int64)
        wrap_triton(hopper_facts._gather_facts.kernel)[(count_blocks(key_blocks + TILE, hopper_facts.CHUNK), masks)](
            shown, absent[1], facts, S, key_blocks + TILE, *mask_strides, 0, BLOCK=KEY_BLOCK, CHUNK=hopper_facts.CHUNK,
            HAS_SHOWN=True, HAS_IDS=False)
    return torch.ops.sparsify.hopper_attention(q, k, v, kept, queue, cursors, facts, causal_offset, scale,
                                               attention_kernel)
