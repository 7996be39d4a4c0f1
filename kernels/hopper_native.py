"""Selection and attention on Hopper by launches from C++ (hopper_calls.h): what a call takes of the host.

    q, k, v   [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, Dv], fp16 or bf16, on one device, current or not
    masks     plain: causality and a key mask
    results   those of select.py and hopper.py, by the same kernels
    errors    RuntimeError where the driver refuses a launch

Launched from Python, a selecting call took the host .39 ms on the machine of an H200, .17 of it in Triton's launcher
(benchmarks/results/profile_call.md). The library is built by the machine's C++ compiler on first use and kept in the
user's cache; without a compiler, and for whatever `None` is said to below, the callers launch from Python.
"""

import ctypes
import functools
import logging
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import native
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, KeptLists, capacity, count_blocks
from sparsify.kernels.hopper_code import AttentionKernels, SelectionKernels, boxes_of
from sparsify.kernels.hopper_coverage import is_describable
from sparsify.kernels.hopper_kind import plain_kind
from sparsify.kernels.launch import is_only_compiling, is_watched
from sparsify.kernels.masks import Masks

SELECTION = struct.Struct("P8qP8q P2q q 3d 3q 2P 4q q")  # the structs of hopper_calls.h
ATTENTION = struct.Struct("P8qP8qP8qP8q P2q q d 3P q 4q q")
BOX = struct.Struct("4i4I")
EVERY_KEY = (1 << 63) - 1  # a causal offset under which every row sees every key

log = logging.getLogger("sparsify")
_found: dict[SelectionKernels | AttentionKernels, Future[tuple[Any, tuple[int, ...]] | None]] = {}
_adding = threading.Lock()


def select_blocks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, tolerance: float, max_density: float,
                  sinks: int, local: int, singles: int) -> KeptLists | None:
    """As `select.select_blocks`, for calls that hopper_select.py covers.

    None where q or k has other strides than multiples of 16 elements, where a mask of keys is not dense, or where
    somebody listens to Triton's launches. Inside `compiling_ahead` lists that nothing has written.
    """
    mask = masks.key_mask
    if scale <= 0 or is_watched() or not (_is_aligned(q) and _is_aligned(k) and _is_dense(mask)):
        return None
    found = _find(SelectionKernels(q.dtype, q.shape[3], singles, mask is not None))
    if found is None and not is_only_compiling():
        return None
    B, H, L, _ = q.shape
    query_blocks = count_blocks(L, QUERY_BLOCK)
    kept = torch.empty(B, H, query_blocks, capacity(count_blocks(k.shape[2], KEY_BLOCK)), dtype=torch.int32,
                       device=q.device)
    counts = torch.empty(B, H, query_blocks, dtype=torch.int32, device=q.device)
    if found is None:
        return KeptLists(kept, counts)
    library, numbers = found
    call = SELECTION.pack(*_rows(q), *_rows(k), *_shown(mask), _offset(masks), scale, tolerance, max_density, sinks,
                          local, singles, kept.data_ptr(), counts.data_ptr(), *numbers, _device(q))
    _run(library, library.memory_of_selection, library.select_blocks, call, q)
    return KeptLists(kept, counts)


def attend(q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor, *,
           scale: float, masks: Masks, pieces: int = 0) -> bool:
    """Fill `out` and `lse` as `hopper.block_sparse_attention` does, or without lists `hopper.attention`.

    `pieces`: to cut the lists into, all together (`splits.units_for`); 0: none. False, and nothing done, where masks
    are not plain, a mask of keys is not dense, heads are wider than 128, or somebody listens to Triton's launches.
    """
    mask = masks.key_mask
    if scale <= 0 or is_watched() or not masks.is_plain or not _is_dense(mask):
        return False
    kind = plain_kind(q.shape[3], v.shape[3], mask is not None, walks_all=lists is None, in_pieces=pieces > 0)
    if kind.is_wide:
        return False
    found = _find(AttentionKernels(q.dtype, kind, v.shape[3]))
    if found is None:
        return is_only_compiling()
    library, numbers = found
    kept, counts = (0, 0) if lists is None else (x.data_ptr() for x in lists)
    forward, *others = numbers
    facts = 0 if mask is None else others.pop()
    order, merge = (*others, 0, 0)[:2]
    call = ATTENTION.pack(*_rows(q), *_rows(k), *_rows(v), *_rows(out), *_shown(mask), _offset(masks), scale, kept,
                          counts, lse.data_ptr(), pieces, forward, order, facts, merge, _device(q))
    _run(library, library.memory_of_attention, library.attend_blocks, call, q)
    return True


def _run(library: Any, memory_of: Any, function: Any, call: bytes, q: Tensor) -> None:
    """Make the call on the current stream, in memory of torch's."""
    wanted = memory_of(call)
    memory = torch.empty(max(wanted, 0), dtype=torch.uint8, device=q.device)
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)
    if wanted < 0 or function(call, ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(stream)):
        raise RuntimeError(f"sparse attention could not be launched: {library.complaint().decode()}")


def _rows(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.shape, *x.stride()


def _shown(mask: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if mask is None else (mask.data_ptr(), len(mask), mask.stride(0))


def _device(x: Tensor) -> int:
    return x.device.index or 0  # tensors on a GPU say which


def _offset(masks: Masks) -> int:
    return EVERY_KEY if masks.causal_offset is None else masks.causal_offset


def _is_aligned(x: Tensor) -> bool:
    """Whether the kernels, compiled for strides of 16 elements, can read it."""
    return is_describable(x) and all(x.stride(i) % 16 == 0 or x.shape[i] == 1 for i in range(3))


def _is_dense(mask: Tensor | None) -> bool:
    return mask is None or mask.stride(1) == 1


def _find(wanted: SelectionKernels | AttentionKernels) -> tuple[Any, tuple[int, ...]] | None:
    """The library and its numbers of these kernels; None where either cannot be had, or shall only be compiled.

    Made by threads, the library and all kernels at once: inside `compiling_ahead` nobody waits for them.
    """
    with _adding:
        if wanted not in _found:
            _found[wanted] = _pool().submit(_add_all, _library(), wanted)
    return None if is_only_compiling() else _found[wanted].result()


def _add_all(opened: Future[Any], wanted: SelectionKernels | AttentionKernels) -> tuple[Any, tuple[int, ...]] | None:
    try:
        compiled = wanted.compiled()
    except Exception as error:  # of a Triton that takes these kernels otherwise: it may still launch them itself
        log.warning("sparsify launches attention from Python, which takes the host longer: %s", error)
        return None
    library = opened.result()
    return None if library is None else (library, tuple(_add(library, kernel) for kernel in compiled))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sparsify-compile")


def _add(library: Any, compiled: Any) -> int:
    facts, boxes = compiled.metadata, boxes_of(compiled)
    image = compiled.asm["cubin"]
    number: int = library.add_kernel(image, len(image), facts.name.encode(), facts.shared, 32 * facts.num_warps,
                                     b"".join(BOX.pack(*box) for box in boxes), len(boxes))
    assert number >= 0, library.complaint()
    return number


@functools.cache
def _library() -> Future[Any]:
    """The compiled library, when it is open; None where it cannot be built."""
    return _pool().submit(_open)


def _open() -> Any:
    sources = [native.FOLDER / name for name in ("hopper_native.cpp", "hopper_calls.h")]
    library = native.built(sources, ["-shared", "-ldl"], "hopper", ".so", lambda path: ctypes.CDLL(str(path)))
    if library is None:
        return None
    library.complaint.restype = ctypes.c_char_p
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.add_kernel.argtypes = [ctypes.c_char_p, number, ctypes.c_char_p, number, number, ctypes.c_char_p, number]
    for function in (library.memory_of_selection, library.memory_of_attention):
        function.argtypes = [ctypes.c_char_p]
    for function in (library.select_blocks, library.attend_blocks):
        function.argtypes = [ctypes.c_char_p, pointer, pointer]
    for name in ("add_kernel", "memory_of_selection", "memory_of_attention", "select_blocks", "attend_blocks"):
        getattr(library, name).restype = number
    return library
