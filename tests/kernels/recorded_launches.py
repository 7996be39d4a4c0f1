"""What hopper_calls.h launches, from Python, with lists and without, and in a package, as JSON.

    TRITON_INTERPRET=0 python -m tests.kernels.recorded_launches

Without Triton's interpreter and without a GPU; test_hopper_calls.py reads it.

A list for each call: without a key mask, with one of all rows, with one for all, and the first two with so many keys
that lists are cut. Of every launch its grid, threads and shared memory, what its machine code was compiled for, and
every parameter by its name in the kernel, told apart by the types in its PTX. Addresses are names of the call's
tensors, or m0, m1 ... for memory in the order in which it is met; the counter behind the cursors is called so.
"""

import ctypes
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparsify.kernels import hopper_code, hopper_native, hopper_packed, hopper_queue, native
from sparsify.kernels.hopper_kind import plain_kind
from sparsify.kernels.masks import Masks
from tests.kernels.handles import Arguments, returned

HERE = Path(__file__).parent
FORMATS = {"u64": "q", "u32": "i", "f32": "f"}
SINGLES, B, H, HKV, L, D = 6, 2, 8, 2, 300, 64
S, LONG = 500, 5000  # keys; the lists of the longer ones are cut
PROGRAMS = 132  # multiprocessors of the GPU that recorded_driver.cpp is
SCALE, TOLERANCE, MAX_DENSITY, SINKS, LOCAL = 0.125, 0.03, 0.9, 1, 2


def main() -> None:
    """Print the launches."""
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # a torch for CPUs has no streams
    told: dict[str, list[Any]] = {"python": [], "package": [], "without lists": [], "refused": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver = build(folder / "libcuda.so.1", HERE / "recorded_driver.cpp", "-Wl,-soname,libcuda.so.1")
        driver.read_launch.restype = ctypes.c_char_p
        for number, (rows, length) in enumerate([(0, S), (B, S), (1, S), (0, LONG), (B, LONG)]):
            tensors = made(rows, length)
            sites = hopper_packed.kernels_for(tensors["q"], tensors["v"], rows > 0, SINGLES)
            assert sites is not None
            selection, whole, pieces = sites
            kernels = expected(driver, selection, pieces if length == LONG else whole)
            from_python(tensors, PROGRAMS if length == LONG else 0)
            told["python"].append(launches(driver, kernels, tensors))
            in_package(folder / f"shim{number}", tensors, hopper_packed.source([sites]))
            del tensors["kept"], tensors["counts"], tensors["out"], tensors["lse"]
            told["package"].append(launches(driver, kernels, tensors))
            if length == S:
                kind = plain_kind(D, D, rows > 0, walks_all=True)
                without_lists(tensors)
                every = expected(driver, hopper_code.AttentionKernels(torch.bfloat16, kind, D))
                told["without lists"].append(launches(driver, every, tensors))
        told["refused"] = refused(driver)
        assert driver.contexts() == 0  # all were given back
    json.dump(told, sys.stdout)


def expected(driver: ctypes.CDLL, *wanted: Any) -> dict[str, Any]:
    """Kernels by name, whose parameters the driver knows the sizes of from now on."""
    kernels = {kernel.metadata.name: kernel for some in wanted for kernel in some.compiled()}
    for name, kernel in kernels.items():
        sizes = [128 if kind == "map" else struct.calcsize(FORMATS[kind]) for kind in types_of(kernel)]
        driver.expect(name.encode(), (ctypes.c_int * len(sizes))(*sizes), len(sizes))
    return kernels


def made(mask_rows: int, length: int) -> dict[str, Tensor]:
    """The tensors of a call with so many keys."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, L, H, D, generator=rng).bfloat16().transpose(1, 2)
    k, v = (torch.randn(B, HKV, length, D, generator=rng).bfloat16() for _ in range(2))
    masks = {"key_mask": torch.ones(mask_rows, length, dtype=torch.bool)} if mask_rows else {}
    return {"q": q, "k": k, "v": v, **masks}


def from_python(tensors: dict[str, Tensor], pieces: int) -> None:
    """Select and attend; what they make is added to the tensors."""
    q, k, v = (tensors[name] for name in "qkv")
    masks = Masks(k.shape[2] - L, key_mask=tensors.get("key_mask"))
    out, lse = torch.empty(B, L, H, D, dtype=q.dtype).transpose(1, 2), torch.empty(B, H, L)
    lists = hopper_native.select_blocks(q, k, scale=SCALE, masks=masks, tolerance=TOLERANCE, max_density=MAX_DENSITY,
                                        sinks=SINKS, local=LOCAL, singles=SINGLES)
    assert lists is not None
    assert hopper_native.attend(q, k, v, lists, out, lse, scale=SCALE, masks=masks, pieces=pieces)
    tensors |= {"kept": lists.kept, "counts": lists.counts, "out": out, "lse": lse}


def refused(driver: ctypes.CDLL) -> list[str]:
    """Which calls are left to Python's launches, though the last is not."""
    q, k, v = made(0, S).values()
    expected(driver, hopper_code.SelectionKernels(q.dtype, D, SINGLES, has_key_mask=False))
    budget = {"scale": SCALE, "tolerance": TOLERANCE, "max_density": MAX_DENSITY, "sinks": SINKS, "local": LOCAL}
    odd = torch.zeros(B, HKV, S, D + 8, dtype=k.dtype)[..., :D]
    masks, sparse = Masks(S - L), Masks(S - L, key_mask=torch.ones(B, 2 * S, dtype=torch.bool)[:, ::2])
    calls = {"strides of 8 elements": {"k": odd}, "a negative scale": {"scale": -SCALE}, "a mask with gaps": {
        "masks": sparse}, "none": {}}
    found = [name for name, other in calls.items() if hopper_native.select_blocks(
        **{"q": q, "k": k, "masks": masks, "singles": SINGLES, **budget, **other}) is None]
    with mock.patch.object(hopper_code.SelectionKernels, "compiled", side_effect=TypeError("no such argument")):
        if hopper_native.select_blocks(q, k, masks=masks, singles=2, **budget) is None:
            found.append("another Triton")
    windowed, out, lse = Masks(S - L, window=100), torch.empty_like(q), torch.empty(B, H, L)
    if not hopper_native.attend(q, k, v, None, out, lse, scale=SCALE, masks=windowed):
        found.append("a window")
    return found


def without_lists(tensors: dict[str, Tensor]) -> None:
    """Exact attention; what it makes is added to the tensors."""
    q, k, v = (tensors[name] for name in "qkv")
    out, lse = torch.empty(B, L, H, D, dtype=q.dtype).transpose(1, 2), torch.empty(B, H, L)
    masks = Masks(S - L, key_mask=tensors.get("key_mask"))
    assert hopper_native.attend(q, k, v, None, out, lse, scale=SCALE, masks=masks)
    tensors |= {"out": out, "lse": lse}


def in_package(folder: Path, tensors: dict[str, Tensor], source: str) -> None:
    """The same call by the C function that AOTInductor calls."""
    folder.mkdir()
    code, torch_root = folder / "shim.cpp", Path(torch.__file__).parent
    code.write_text(source)
    shim = build(folder / "shim.so", code, f"-I{native.FOLDER}", f"-I{torch_root / 'include'}",
                 str(folder.parent / "libcuda.so.1"), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10")
    given, number, offset = Arguments(), ctypes.c_int64, tensors["k"].shape[2] - L
    out = returned(shim.aoti_torch_cuda_packed_attention_on_hopper, *(given.tensor(tensors[name]) for name in "qkv"),
                   given.optional(tensors.get("key_mask"), None), ctypes.c_double(SCALE),
                   given.optional(offset, number), ctypes.c_double(TOLERANCE), ctypes.c_double(MAX_DENSITY),
                   number(SINKS), number(LOCAL), number(SINGLES), number(0))
    assert out.shape == (B, H, L, D) and out.stride() == (L * H * D, D, H * D, 1)


def build(target: Path, source: Path, *flags: str) -> ctypes.CDLL:
    """The library, loaded; one that looks for the driver by its name finds the one that is loaded."""
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(source), *flags, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def launches(driver: ctypes.CDLL, kernels: dict[str, Any], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What the driver has kept, which it then forgets."""
    known = {x.data_ptr(): name for name, x in tensors.items()}
    told = []
    for number in range(driver.launched()):
        content, numbers = ctypes.create_string_buffer(128 * 128), (ctypes.c_uint * 4)()
        kernel = kernels[driver.read_launch(number, content, numbers).decode()]
        values: dict[str, Any] = {}
        for i, (name, kind) in enumerate(zip(names_of(kernel), types_of(kernel), strict=True)):
            raw = content.raw[128 * i: 128 * (i + 1)]
            if kind == "map":
                address, *facts = struct.unpack("16Q", raw)
                values[name] = [known.setdefault(address, f"m{len(known) - len(tensors)}"), *facts]
                continue
            (value,) = struct.unpack_from(FORMATS[kind], raw)
            is_address = kernel.src.signature.get(name, "").startswith("*")
            if is_address:
                behind = known.get(value - 4 * hopper_queue.LEVELS) if name == "counter" else None
                value = f"{behind}, counter" if behind else known.setdefault(value, f"m{len(known) - len(tensors)}")
            values[name] = value
        told.append({"kernel": kernel.metadata.name, "grid": list(numbers[:2]), "threads": numbers[2],
                     "shared": numbers[3], "compiled_threads": 32 * kernel.metadata.num_warps,
                     "compiled_shared": kernel.metadata.shared,
                     "threads_of_code": int(head_of(kernel).split(".reqntid ", 1)[1].split()[0].strip(",")),
                     "parameters": values})
    driver.forget()
    return told


def head_of(compiled: Any) -> str:
    """What its PTX declares."""
    return compiled.asm["ptx"].split(".entry", 1)[1].split("\n{", 1)[0]


def types_of(compiled: Any) -> list[str]:
    """Of the parameters: those of PTX, or "map"."""
    found = re.findall(r"\.param [^\n]*?\.(b8|u64|u32|f32) [^\n]*?_param_\d+(\[128\])?", head_of(compiled))
    return ["map" if size else kind for kind, size in found]


def names_of(compiled: Any) -> list[str]:
    """Of the parameters as the machine code has them: a descriptor is followed by its sizes and strides."""
    names = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        names.append(name)
        if kind.startswith("tensordesc"):
            rank = kind.split("[", 1)[1].split("]", 1)[0].count(",") + 1
            names += [f"{name}.{part}{d}" for part in ("size", "stride") for d in range(rank)]
    return [*names, "scratch of Triton", "scratch of its profiler"]


if __name__ == "__main__":
    main()
