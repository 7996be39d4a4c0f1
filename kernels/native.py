"""Block-sparse attention and its selection on a CPU, compiled from native.cpp and products.h on first use.

    q       [B, H, q_len, D]          fp32, bf16 or fp16; half precisions are computed in float32
    k, v    [B, Hkv, kv_len, D | Dv]  same dtype; any strides with a dense last dimension
    out     [B, H, q_len, Dv]         dtype of q, laid out in memory as [B, q_len, H, Dv]
    lse     float32 [B, H, q_len]

The library is built with the machine's C++ compiler (the one Inductor needs on a CPU too) in about three seconds, and
kept in the user's cache under a name that changes with the source and the processor. `available()` is False where
there is no compiler; gather.py and estimate.py then do the same in plain torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, block_bias, block_kinds, count_blocks
from sparsify.kernels.masks import Masks

log = logging.getLogger("sparsify")
FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("native.cpp", "products.h")]
SHIM = [FOLDER / name for name in ("shim.cpp", "handles.h")]
# Not -ffast-math: as a shared library it would switch denormals off for the whole process.
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-std=c++17",
         "-fPIC"]


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)]


class _Mask(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("kind", "batch", "head", "row",
                                                                                 "key"))]


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64)]


class _Problem(ctypes.Structure):
    """The `Problem` of native.cpp, field by field."""

    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("lse", "summaries", "alone", "rest", "peaks", "kept", "counts",
                                               "order")),
        *((name, _Rows) for name in ("shown", "kinds", "query_documents", "key_documents")),
        *((name, _Mask) for name in ("mask", "block_bias")),
        ("sinks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "q_len", "kv_len", "dim", "value_dim", "capacity",
                                              "singles", "causal_offset", "causal", "window", "windowed", "plain",
                                              "items")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("next", ctypes.c_int64),
    ]


Opened = TypeVar("Opened")
MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}


def available() -> bool:
    """Whether the library is, or can be, built here."""
    return _library() is not None


def uses_matrix_registers() -> bool:
    """Whether the library runs, and its products run on matrix registers (AMX)."""
    library = _library()
    return library is not None and bool(library.uses_matrix_registers())


def why_not(q: Tensor) -> str | None:
    """Why this dtype needs the plain torch path, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q.dtype} is not computed natively"
    return None if available() else "no C++ compiler was found"


def estimated_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, singles: int) -> Tensor:
    """Largest estimated share that any row of a query block gives a key block: float32 [B, H, query, key blocks]."""
    q, k = _dense_float(q), _dense_float(k)
    batch, kv_heads, kv_len, dim = k.shape
    blocks = count_blocks(kv_len, KEY_BLOCK)
    library = _library()
    assert library is not None  # `why_not` was asked
    summaries = torch.empty(batch, kv_heads, library.summary_floats(blocks, singles, dim))
    alone, rest = torch.empty(2, batch, kv_heads, blocks, dtype=torch.int32)
    peaks = torch.zeros(batch, q.shape[1], count_blocks(q.shape[2], QUERY_BLOCK), blocks)
    tensors = {"q": q, "k": k, "summaries": summaries, "alone": alone, "rest": rest, "peaks": peaks}
    numbers = {"scale": scale, "singles": singles}
    _run("summarise", alone.numel(), tensors, numbers, Masks(key_mask=masks.key_mask))
    bias = block_bias(masks, kv_len)
    _run("estimate", peaks[..., 0].numel(), tensors, numbers, masks, bias)
    return peaks


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, *, scale: float,
                           masks: Masks) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of the kept blocks; a row that sees none gives zeros.

    lse is -inf for such a row, or its sink logit.
    """
    batch, heads, q_len, _ = q.shape
    out = torch.empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len)
    order = counts.flatten().argsort(descending=True)
    tensors = {"q": _dense_float(q), "k": _dense_float(k), "v": _dense_float(v), "out": out, "lse": lse,
               "kept": kept.contiguous(), "counts": counts.contiguous(), "order": order}
    _run("attend", counts.numel(), tensors, {"scale": scale}, masks)
    return out.to(q.dtype), lse


def _dense_float(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(3) == 1 else x.contiguous()


def _run(function: str, items: int, tensors: dict[str, Tensor], numbers: dict[str, float], masks: Masks,
         bias: Tensor | None = None) -> None:
    """Call one entry of native.cpp on every thread that torch would use; they share the items among them.

    `bias` is the `block_bias` of the masks, for entries that read summaries.
    """
    q, k = tensors["q"], tensors["k"]
    problem = _Problem(heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2], dim=q.shape[3],
                       items=items)
    for name, value in numbers.items():
        setattr(problem, name, value)
    if "kept" in tensors:
        problem.capacity, problem.value_dim = tensors["kept"].shape[3], tensors["v"].shape[3]
    alive = _describe(problem, masks, bias, q.shape[2], k.shape[2])
    for name, x in tensors.items():
        if name in ("q", "k", "v", "out"):
            setattr(problem, name, _Tensor(x.data_ptr(), *x.stride()[:3]))
        else:
            setattr(problem, name, x.data_ptr())
    entry = getattr(_library(), function)
    threads = min(torch.get_num_threads(), items)
    others = [_pool().submit(entry, ctypes.byref(problem)) for _ in range(threads - 1)]
    entry(ctypes.byref(problem))
    for other in others:
        other.result()
    del alive


def _describe(problem: _Problem, masks: Masks, bias: Tensor | None, q_len: int, kv_len: int) -> list[Tensor]:
    """Write the masks into the problem; returns the tensors that it points to."""
    problem.plain = int(masks.is_plain)
    problem.causal, problem.causal_offset = int(masks.causal_offset is not None), masks.causal_offset or 0
    problem.windowed, problem.window = int(masks.window is not None), masks.window or 0
    problem.softcap = masks.softcap
    rows = {"shown": masks.key_mask}
    if not masks.is_plain:
        rows["kinds"] = block_kinds(masks, q_len, kv_len, torch.device("cpu"))
        rows["query_documents"], rows["key_documents"] = (
            None if ids is None else ids.long() for ids in (masks.query_documents, masks.key_documents))
    alive = []
    for name, tensor in rows.items():
        if tensor is not None:
            alive.append(tensor.contiguous())
            setattr(problem, name, _Rows(alive[-1].data_ptr(), _stride(alive[-1], 0)))
    for name, tensor in (("mask", masks.attn_mask), ("block_bias", bias)):
        if tensor is not None:
            alive.append(tensor.detach() if tensor.dtype in MASK_KINDS else tensor.detach().float())
            setattr(problem, name, _Mask(alive[-1].data_ptr(), MASK_KINDS[alive[-1].dtype],
                                         *(_stride(alive[-1], dim) for dim in range(4))))
    if masks.sink_logits is not None:
        alive.append(masks.sink_logits.detach().float().contiguous())
        problem.sinks = alive[-1].data_ptr()
    return alive


def _stride(tensor: Tensor, dim: int) -> int:
    """0 where one element serves all."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="sparsify")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork inherits the pool, but none of its threads


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, from the cache or built now; None where it cannot be built.

    Where the system keeps the matrix registers from this process, the one that does without.
    """
    library = build()
    return library if library is None or library.ready() else build("-DNO_MATRIX_REGISTERS")


def build(*flags: str) -> ctypes.CDLL | None:
    """The library with more flags than usual."""
    library = built(SOURCES, ["-shared", *flags], "native", ".so", lambda path: ctypes.CDLL(str(path)))
    if library is not None:
        library.summary_floats.restype = ctypes.c_int64
        library.summary_floats.argtypes = [ctypes.c_int64] * 3
    return library


def shim(*, shared: bool = False) -> Path | None:
    """shim.cpp, native.cpp in it, as an object file to be linked into another library; None without a compiler.

    shared: as a library of its own, for tests.
    """
    torch_root = Path(torch.__file__).parent
    flags = ["-fvisibility=hidden", f"-I{torch_root / 'include'}"]
    flags += ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"] if shared else ["-c"]
    return built([*SHIM, *SOURCES], flags, "shim", ".so" if shared else ".o", lambda path: path)


def build_object(source: str, target: Path) -> Path:
    """An object file of C++ that includes files of this folder and of torch. Raises OSError that says why not."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("none was found")
    code = target.with_suffix(".cpp")
    code.write_text(source)
    folders = [FOLDER, Path(torch.__file__).parent / "include"]
    _build([compiler, "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", *(f"-I{folder}" for folder in folders),
            "-c", str(code)], target)
    return target


def _compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)


def built(sources: Sequence[Path], flags: Sequence[str], name: str, suffix: str,
          opened: Callable[[Path], Opened]) -> Opened | None:
    """The file that the compiler makes of the first source, from the cache or built now; None where it cannot be
    built, or opened. Its name in the cache changes with all sources and flags."""
    compiler = _compiler()
    if compiler is None:
        return None
    content = b"".join(source.read_bytes() for source in sources)
    key = hashlib.sha256(content + " ".join([compiler, *FLAGS, *flags, _processor()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify"
    for folder in (cache, None):
        try:
            target = (folder or Path(tempfile.mkdtemp(prefix="sparsify-"))) / f"{name}-{key}{suffix}"
            if not target.exists():
                _build([compiler, *FLAGS, str(sources[0]), *flags], target)  # libraries behind what needs them
            return opened(target)
        except OSError as error:  # a read-only home, a compiler that cannot
            log.info("sparsify: %s could not be built in %s: %s", sources[0].name, folder or "a temporary folder",
                     error)
    return None


def _build(command: list[str], target: Path) -> None:
    """Run the compiler. Raises OSError with its last words."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as partial:
        command = [*command, "-o", partial.name]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(partial.name, target)  # whole or not at all, also when two processes build at once
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[-1000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} was not done after {error.timeout:g} seconds") from error
    finally:
        Path(partial.name).unlink(missing_ok=True)


def instructions() -> frozenset[str]:
    """The names of the vector and matrix instructions of this processor, as far as the system tells them."""
    return frozenset(re.findall(r"\b(?:avx|amx|fma|bmi|f16c|gfni|vaes|sse4|sve|asimd)\w*", _processor()))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()
