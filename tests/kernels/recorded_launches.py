"""What hopper_shim.cpp launches on some calls, as JSON: `python -m tests.kernels.recorded_launches`, without Triton's
interpreter and without a GPU. test_hopper_packed.py reads it.

For each launch: its grid, threads and shared memory, what the machine code was compiled for, and every parameter by its
name in the kernel, told apart by the types in its PTX.
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

import torch

from sparsify.kernels import hopper_packed, native
from tests.kernels.handles import Arguments, returned

HERE = Path(__file__).parent
FORMATS = {"u64": "q", "u32": "i", "f32": "f"}
SINGLES, B, H, HKV, L, S, D = 6, 2, 8, 2, 300, 500, 64


def main() -> None:
    """Print the launches of both kernels, without and with a key mask."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder) / "libcuda.so.1", HERE / "recorded_driver.cpp", "-Wl,-soname,libcuda.so.1")
        for masked in (False, True):
            told += record(Path(folder), driver, masked)
    json.dump(told, sys.stdout)


def record(folder: Path, driver: ctypes.CDLL, masked: bool) -> list[dict[str, Any]]:
    """Of one call of each kernel."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, L, H, D, generator=rng).bfloat16().transpose(1, 2)
    k, v = (torch.randn(B, HKV, S, D, generator=rng).bfloat16() for _ in range(2))
    kernels = hopper_packed.kernels_for(q, v, masked, SINGLES)
    source, torch_root = folder / f"shim{masked}.cpp", Path(torch.__file__).parent
    source.write_text(hopper_packed.source(kernels))
    shim = build(folder / f"shim{masked}.so", source, f"-I{Path(native.__file__).parent}",
                 f"-I{torch_root / 'include'}", str(folder / "libcuda.so.1"), f"-L{torch_root / 'lib'}", "-ltorch_cpu",
                 "-lc10")

    room, blocks = 32, 8
    vectors, whole = (torch.zeros(B * HKV * rows * room * D, dtype=torch.uint8) for rows in (SINGLES + 2, 64))
    counts, units = torch.zeros((2 if masked else 1) * room, dtype=torch.int32), torch.zeros(B * HKV * 2)
    mask = torch.ones(2, S, dtype=torch.bool) if masked else None
    kept = torch.zeros(B * H * 3 * (blocks + 2), dtype=torch.int32)
    queue, cursors = torch.zeros(B * H * 3, dtype=torch.int64), torch.zeros(257, dtype=torch.int32)
    facts = torch.zeros(2 * (blocks + 2) * 3, dtype=torch.int64) if masked else None
    tensors = {"q": q, "k": k, "v": v, "vectors": vectors, "whole": whole, "counts": counts, "units_of_keys": units,
               "key_mask": mask, "kept_pairs": kept, "queue": queue, "counter": cursors[256:], "key_facts": facts}
    places = {x.data_ptr(): name for name, x in tensors.items() if x is not None}

    given = Arguments()
    offset = given.optional(S - L, ctypes.c_int64)
    common = [offset, ctypes.c_double(0.125)]
    peaks = [*map(given.tensor, (q, vectors, whole)), given.optional(mask, None), *map(given.tensor, (counts, units)),
             ctypes.c_int64(S), *common, ctypes.c_int64(SINGLES), ctypes.c_int64(0)]
    attention = [*map(given.tensor, (q, k, v, kept, queue, cursors)), given.optional(facts, None), *common,
                 ctypes.c_int64(1)]
    compiled = hopper_packed.compile_peaks(kernels[0]), hopper_packed.compile_attention(kernels[1])
    calls = (shim.aoti_torch_cuda_hopper_peaks, peaks), (shim.aoti_torch_cuda_hopper_attention, attention)
    return [launch(driver, *call, kernel, places) for call, kernel in zip(calls, compiled, strict=True)]


def build(target: Path, source: Path, *flags: str) -> ctypes.CDLL:
    """The library, loaded; one that looks for the driver by its name finds the one that is loaded."""
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(source), *flags, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def launch(driver: ctypes.CDLL, function: Any, arguments: list[Any], compiled: Any,
           places: dict[int, str]) -> dict[str, Any]:
    """Call the C function and read what it launched."""
    head, _ = compiled.asm["ptx"].split(".entry", 1)[1].split("\n{", 1)
    types = ["map" if size else kind for kind, size in re.findall(r"\.param [^\n]*?\.(b8|u64|u32|f32) [^\n]*?"
                                                                  r"_param_\d+(\[128\])?", head)]
    sizes = [128 if kind == "map" else struct.calcsize(FORMATS[kind]) for kind in types]
    driver.expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
    out = returned(function, *arguments)
    content, numbers = ctypes.create_string_buffer(128 * 128), (ctypes.c_uint * 3)()
    driver.recorded(content, numbers)
    names = names_of(compiled)
    values: dict[str, Any] = {}
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        raw = content.raw[128 * i: 128 * (i + 1)]
        if kind == "map":
            values[name] = list(struct.unpack("16Q", raw))
            values[name][0] = places.get(values[name][0], "own")
        else:
            (value,) = struct.unpack_from(FORMATS[kind], raw)
            values[name] = places.get(value, value) if kind == "u64" else value
    return {"kernel": compiled.metadata.name, "grid": numbers[0], "threads": numbers[1], "shared": numbers[2],
            "compiled_threads": 32 * compiled.metadata.num_warps, "compiled_shared": compiled.metadata.shared,
            "threads_of_code": int(head.split(".reqntid ", 1)[1].split()[0].strip(",")), "shape": list(out.shape),
            "strides": list(out.stride()), "parameters": values}


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
