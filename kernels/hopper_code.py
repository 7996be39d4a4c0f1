"""Machine code of the kernels that hopper_calls.h launches: selection and attention on Hopper under plain masks.

Triton compiles a kernel for the arguments of a call: an integer of 1 is a constant, one that 16 divides is known to be
so. Here types, constants and divisibility are written out, so that one kernel serves every batch, length and stride,
and no GPU is needed. The launches in hopper_calls.h pass the parameters in this order, which
tests/kernels/test_hopper_calls.py checks.

Source: hopper_select.py, select.py, hopper_queue.py, hopper_facts.py, splits.py and hopper_forward.py, whose kernels
these are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from sparsify.kernels import hopper_facts, hopper_queue, hopper_select, splits
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE
from sparsify.kernels.hopper_coverage import ROWS_OF_A_HEAD
from sparsify.kernels.hopper_forward import _block_sparse_attention
from sparsify.kernels.hopper_kind import LOADER_REGISTERS, REGISTERS, WARPGROUP_REGISTERS, Kind
from sparsify.kernels.launch import COMPILERS
from sparsify.kernels.select import PACK_WARPS, PACK_WIDTH, _pack_lists

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
ALIGNED = [["tt.divisibility", 16]]


class _Kernels(ABC):
    """Kernels that a call launches together, in an order that hopper_calls.h knows."""

    @abstractmethod
    def compilers(self) -> list[Callable[[], Any]]:
        """What makes them, one by one."""

    def compiled(self) -> list[Any]:
        """All of them, made at once."""
        with ThreadPoolExecutor(COMPILERS) as pool:
            return list(pool.map(lambda compiler: compiler(), self.compilers()))


@dataclass(frozen=True)
class SelectionKernels(_Kernels):
    """Samples, summaries, peaks, lists."""

    dtype: torch.dtype
    dim: int  # of heads: 64 or 128
    singles: int
    has_key_mask: bool

    def compilers(self) -> list[Callable[[], Any]]:
        return [self._sample, self._quantise, self._estimate, self._pack]

    def _sample(self) -> Any:
        kinds = self._of_keys() | {"ranges": "*fp32"}
        constants = self._constants() | {"SAMPLES": hopper_select.SAMPLES, "CHANNELS": hopper_select.CHANNELS}
        return _compile(hopper_select._sample_keys.kernel, kinds, constants,
                        ["k", "ranges", "stride_b", "stride_h", "stride_s"], num_warps=4)

    def _quantise(self) -> Any:
        kinds = self._of_keys() | {"ranges": "*fp32", "vectors": "*fp8e4nv", "whole": "*fp8e4nv", "counts": "*i32",
                                   "units": "*fp32"}
        constants = self._constants() | {"SINGLES": self.singles, "BLOCK": KEY_BLOCK, "LARGEST": hopper_select.LARGEST,
                                         "HEADROOM": hopper_select.HEADROOM}
        return _compile(hopper_select._quantise_keys.kernel, kinds, constants,
                        ["k", "ranges", "vectors", "whole", "counts", "units", "stride_b", "stride_h", "stride_s"],
                        num_warps=hopper_select.QUANTISE_WARPS)

    def _estimate(self) -> Any:
        tiles = {"vectors": hopper_select.CHUNK, "whole": hopper_select.EDGE * KEY_BLOCK}
        kinds = {name: _described("fp8e4nv", [tile, self.dim], hopper_select.layout_of(tile, self.dim))
                 for name, tile in tiles.items()}
        kinds |= {"q": f"*{TYPES[self.dtype]}", "key_mask": self._mask_type(), "counts": "*i32",
                  "units_of_keys": "*fp32", "peaks": "*fp32", "scratch": "*bf16", "stride_qb": "i64",
                  "scale_log2": "fp32", "spread_log2": "fp32", "log2_count": "fp32"}
        constants = self._constants() | {
            "VECTORS": self.singles + 2, "STAGES": hopper_select.STAGES, "ROWS": QUERY_BLOCK, "BLOCK": KEY_BLOCK,
            "EDGE": hopper_select.EDGE, "CHUNK": hopper_select.CHUNK, "LOWEST": hopper_select.LOWEST_EXPONENT,
            "EXPONENTS": hopper_select.EXPONENTS, "LOADER_REGISTERS": hopper_select.LOADER_REGISTERS}
        return _compile(hopper_select._estimate_peaks.kernel, kinds, constants,
                        ["q", "counts", "units_of_keys", "peaks", "scratch", "stride_qb", "stride_qh", "stride_qs",
                         "stride_counts"], num_warps=4, maxnreg=hopper_select.REGISTERS)

    def _pack(self) -> Any:
        kinds = {"peaks": "*fp32", "single_count": "*i32", "rest_count": "*i32", "kept": "*i32", "counts": "*i32",
                 "tolerance": "fp32", "max_density": "fp32"}
        absent = ["kinds", "guarded", "shifts"] + ([] if self.has_key_mask else ["single_count", "rest_count"])
        constants = {"stride_kinds_batch": 0, "stride_protected_batch": 0, **dict.fromkeys(absent),
                     "ROWS": QUERY_BLOCK, "BLOCK": KEY_BLOCK, "WIDTH": PACK_WIDTH, "PLAIN": True,
                     "HAS_KEY_MASK": self.has_key_mask, "SHIFTS": 0, "PROTECTED": False}
        present = [] if not self.has_key_mask else ["single_count", "rest_count"]
        return _compile(_pack_lists.kernel, kinds, constants, ["peaks", *present, "kept", "counts",
                                                               "stride_count_batch"], num_warps=PACK_WARPS)

    def _of_keys(self) -> dict[str, str]:
        return {"k": f"*{TYPES[self.dtype]}", "key_mask": self._mask_type(), "stride_b": "i64"}

    def _mask_type(self) -> str:
        return "*i1" if self.has_key_mask else "*i32"

    def _constants(self) -> dict[str, Any]:
        return {"stride_d": 1, "stride_mask": 1, "D": self.dim, "HAS_KEY_MASK": self.has_key_mask}


@dataclass(frozen=True)
class AttentionKernels(_Kernels):
    """The forward; what it goes by: the queue of its lists, or their cut and the merge of pieces; with a key mask the
    facts that it judges tiles by."""

    dtype: torch.dtype
    kind: Kind
    value_dim: int  # of heads, not padded

    def compilers(self) -> list[Callable[[], Any]]:
        kind = self.kind
        order = [] if kind.walks_all else [self._cut, self._merge] if kind.in_pieces else [self._queue]
        return [self._attend, *order, *([self._facts] if kind.key_mask else [])]

    def _queue(self) -> Any:
        kinds = {"counts": "*i32", "queue": "*i64", "cursors": "*i32"}
        constants = {"LEVELS": hopper_queue.LEVELS, "CHUNK": hopper_queue.CHUNK, "TILE": TILE}
        return _compile(hopper_queue._fill_queue.kernel, kinds, constants, list(kinds),
                        num_warps=hopper_queue.NUM_WARPS)

    def _cut(self) -> Any:
        kinds = {"counts": "*i32", "units": "*i64", "firsts": "*i32", "counter": "*i32"}
        constants = {"TILE": TILE, "ROWS": splits.MOST_ROWS, "SLOTS": splits.MOST_UNITS}
        return _compile(splits._cut_lists.kernel, kinds, constants, list(kinds), num_warps=splits.NUM_WARPS)

    def _merge(self) -> Any:
        padded, given = self.kind.value_dim, TYPES[self.dtype]
        kinds = {"partial": "*fp32", "sums": "*fp32", "firsts": "*i32", "sinks": "*fp32", "out": f"*{given}",
                 "lse": "*fp32"}
        constants = {"QUERY_BLOCK": QUERY_BLOCK, "ROWS": splits.MERGED_VALUES // padded, "PIECES": splits.MERGED_PIECES,
                     "DV": self.value_dim, "DV_PAD": padded, "HAS_SINKS": False}
        return _compile(splits._merge_pieces.kernel, kinds, constants, list(kinds), num_warps=splits.NUM_WARPS)

    def _attend(self) -> Any:
        kind, given = self.kind, TYPES[self.dtype]
        kinds = {name: _described(given, [1, 1, KEY_BLOCK, dim], ROWS_OF_A_HEAD) for name, dim in (
            ("q", kind.dim), ("k", kind.dim), ("v", kind.value_dim), ("out", kind.value_dim))}
        if kind.in_pieces:
            kinds["out"] = "*fp32"
        kinds |= {"lse": "*fp32", "kept_pairs": "*i64", "queue": "*i64", "counter": "*i32", "scale_log2": "fp32",
                  "query_documents": f"*{given}", "key_documents": f"*{given}", "attn_mask": f"*{given}",
                  "cap_log2": "fp32", "sinks": f"*{given}", "key_facts": "*i64", "row_facts": "*i64"}
        constants = {"ROWS": QUERY_BLOCK, "BLOCK": KEY_BLOCK, "KIND": kind, "WARPGROUP_REGISTERS": WARPGROUP_REGISTERS,
                     "LOADER_REGISTERS": LOADER_REGISTERS}
        aligned = ["lse", "kept_pairs", "queue", "counter", *(["out"] if kind.in_pieces else [])]
        return _compile(_block_sparse_attention.kernel, kinds, constants, aligned, num_warps=4, maxnreg=REGISTERS)

    def _facts(self) -> Any:
        kinds = {"shown": "*i1", "ids": "*i64", "facts": "*i64"}
        constants = {"stride_shown": 1, "BLOCK": KEY_BLOCK, "CHUNK": hopper_facts.CHUNK, "HAS_SHOWN": True,
                     "HAS_IDS": False}
        return _compile(hopper_facts._gather_facts.kernel, kinds, constants, ["ids", "facts"], num_warps=4)


def boxes_of(compiled: Any) -> list[list[int]]:
    """How a kernel wants its descriptors, as the fields of `Box` in hopper_calls.h."""
    return [[meta["swizzle"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["elem_size"], len(meta["block_size"]),
             *meta["block_size"], *[0] * (4 - len(meta["block_size"]))]
            for meta in getattr(compiled.metadata, "tensordesc_meta", None) or []]


def _compile(kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], aligned: list[str],
             **options: int) -> Any:
    """Machine code for sm_90; parameters without a kind are 32-bit integers, the `aligned` ones multiples of 16."""
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    values = {name: value for name, value in constants.items() if name in signature}
    attributes = {(kernel.arg_names.index(name),): ALIGNED for name in aligned}
    source = GluonASTSource if getattr(kernel, "is_gluon", lambda: False)() else ASTSource
    compiled = triton.compile(source(kernel, signature, values, attributes), target=TARGET, options=options)
    assert not compiled.metadata.global_scratch_size and not compiled.metadata.profile_scratch_size
    return compiled


def _described(dtype: str, box: list[int], layout: Any) -> str:
    return f"tensordesc<{dtype}{box},{layout!r}>"
