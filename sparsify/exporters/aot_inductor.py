"""`.pt2` as an AOTInductor package: machine code, which runs where neither sparsify nor Python is.

    torch._inductor.aoti_load_package("model.pt2")            in Python, with torch alone
    torch::inductor::AOTIModelPackageLoader("model.pt2")      in C++, with libtorch

On a CPU the ops of the graph are C functions: AOTInductor writes calls of them and links kernels/shim.cpp into the
package, so a package is as fast as the compiled model, and the table of buckets is looked up inside. Like all code that
Inductor makes for a CPU, it is for processors like the one it was compiled on.

On CUDA there is a model for each bucket in the package (buckets.py): "bucket00" for the first, "bucket01" and so on.
`load` takes the one of each call; elsewhere whoever loads the package does, by the buckets in its sparsify.json. Calls
with few queries belong to a dense one: selection would read as many keys as attention does. No
name begins another: torch 2.11 takes all files whose path begins with the name, so "model" would run "model_bucket2".
"""

import contextlib
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2, package_pt2

from sparsify.errors import ExportError
from sparsify.exporters.archive import check_whole, read_contents
from sparsify.exporters.capture import PLANNED, Captured
from sparsify.exporters.contents import NAME, Contents
from sparsify.exporters.formats import Runner
from sparsify.kernels import native

OPTIONS: frozenset[str] = frozenset()

describe = read_contents

ATTENTION = """AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale, int64_t* causal_offset,
    int64_t* window, AtenTensorHandle* key_mask, AtenTensorHandle* query_documents, AtenTensorHandle* key_documents,
    AtenTensorHandle* attn_mask, double softcap, AtenTensorHandle* sink_logits"""
TABLE = """const int64_t* edges, int64_t, const double* tolerances, int64_t, const double* max_densities, int64_t,
    const int64_t* sinks, int64_t, const int64_t* local, int64_t, const int64_t* singles, int64_t, const double* peaks,
    int64_t, int64_t site, int64_t version, const double** shifts, int64_t, AtenTensorHandle* protected_keys"""
SHIMS = {
    torch.ops.sparsify.planned_attention.default: [
        f"AOTITorchError aoti_torch_cpu_planned_attention({ATTENTION}, {TABLE}, AtenTensorHandle* result)"],
    torch.ops.sparsify.exact_attention.default: [
        f"AOTITorchError aoti_torch_cpu_exact_attention({ATTENTION}, int64_t version, AtenTensorHandle* result)"],
}
"""The declarations of kernels/shim.cpp, as the generated code has them."""


def write(captured: Captured, path: Path) -> list[str]:
    """Compile the program and pack it, with what it says of itself as an extra file. Raises ExportError."""
    contents = Contents.of(captured, "aot_inductor")
    capability = _capability_of(captured)
    if capability is None:
        with _linked(_shim(), SHIMS) as options:
            models = {_name(0, 1): _compile(captured, captured.program, options)}
        contents = replace(contents, processor=tuple(sorted(native.instructions())))
        notes = ["compiled for this kind of processor; it needs torch to run, and nothing of sparsify"]
    else:
        models, notes = _compile_buckets(captured)
        contents = replace(contents, capability=capability)
    package_pt2(str(path), aoti_files=models, extra_files={NAME: contents.to_json()})
    return notes


def _compile_buckets(captured: Captured) -> tuple[dict[str, list[Any]], list[str]]:
    """A model for each bucket, as many as differ, and what is to be said of them."""
    from sparsify.exporters.buckets import needs_sparsify, program_for  # Triton: only here

    differ = bool(captured.program.graph.find_nodes(op="call_function", target=PLANNED))
    buckets = captured.buckets if captured.buckets and differ else (None,)
    kernels: list[Any] = []
    programs = [program_for(captured, bucket, kernels) for bucket in buckets]
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"aot_inductor.package": True}
        if kernels:
            from sparsify.kernels import hopper_packed  # Gluon: only for Hopper

            folder = stack.enter_context(tempfile.TemporaryDirectory())
            library = _built(hopper_packed.source(kernels), Path(folder) / "sparsify_hopper.o")
            options = stack.enter_context(_linked(library, hopper_packed.DECLARATIONS))
        models = {_name(i, len(buckets)): _compile(captured, program, options) for i, program in enumerate(programs)}
    notes = [f"{len(models)} models are in the file, one for each bucket, and weights are in each: "
             f"{', '.join(models)}" if len(models) > 1 else "one model is in the file",
             *needs_sparsify(captured)]
    return models, notes


def _name(bucket: int, buckets: int) -> str:
    """Of the models in a package: one, which torch takes by itself, or one for each bucket."""
    return "model" if buckets == 1 else f"bucket{bucket:02}"


def _capability_of(captured: Captured) -> tuple[int, int] | None:
    """Compute capability of the GPU that the example's inputs are on; None: they are on a CPU."""
    inputs = (x for x in pytree.tree_leaves((captured.args, dict(captured.kwargs))) if isinstance(x, Tensor))
    device = next((x.device for x in inputs if x.is_cuda), None)
    return None if device is None else torch.cuda.get_device_capability(device)


def _compile(captured: Captured, program: ExportedProgram, options: dict[str, Any]) -> list[Any]:
    with torch.no_grad(), arrays_declared():
        files = torch._inductor.aot_compile(program.module(check_guards=False), captured.args, dict(captured.kwargs),
                                            options=options)
    assert isinstance(files, list)  # as a package is asked for
    for file in files:
        _check_linked(file)
    return files


@contextlib.contextmanager
def arrays_declared() -> Iterator[None]:
    """Have Inductor declare every array of sizes that it names.

    torch 2.11 remembers which it has declared by the id of a bound method, which is gone by then: another takes the id
    over, and now and then a package does not compile ("int_array_8 was not declared in this scope"). torch 2.13 takes
    the id of the object. Here the methods are kept alive.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    original = wrapper.codegen_int_array_var
    alive: list[Any] = []

    def declare(self: Any, array: str, writeline: Any, *args: Any, **kwargs: Any) -> str:
        alive.append(writeline)
        return original(self, array, writeline, *args, **kwargs)

    wrapper.codegen_int_array_var = declare
    try:
        yield
    finally:
        wrapper.codegen_int_array_var = original


def _check_linked(file: Any) -> None:
    """Raise ExportError for a library with a C++ runtime of its own inside: torch's objects in it end the process.

    GCC links libstdc++.a without a word where the link libstdc++.so is missing; the first std::locale then crashes.
    """
    if sys.platform != "linux" or not str(file).endswith(".so"):
        return
    with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as library:  # weights too
        is_shared = any(library.find(name) >= 0 for name in (b"libstdc++.so", b"libc++.so"))
    if not is_shared:
        raise ExportError(f"the C++ compiler {os.environ.get('CXX', 'g++')!r} links a C++ runtime of its own into "
                          "libraries, and a package with one crashes as it is loaded. It finds no shared libstdc++, or "
                          "is told not to use it: install its development files, or name another compiler by CXX.")


def _shim() -> Path:
    library = native.shim()
    if library is None:
        raise ExportError("no C++ compiler was found that can compile our kernels, and an AOTInductor package is "
                          "compiled by one. Install g++, or name one by the environment variable CXX; what it says is "
                          "in the log named sparsify, at level INFO.")
    return library


def _built(source: str, target: Path) -> Path:
    try:
        return native.build_object(source, target)
    except OSError as error:
        raise ExportError(f"an AOTInductor package is compiled by a C++ compiler: {error}. Install g++, or name "
                          "another one by the environment variable CXX.") from error


@contextlib.contextmanager
def _linked(library: Path, declarations: dict[Any, list[str]]) -> Iterator[dict[str, Any]]:
    """Options under which AOTInductor calls C functions in place of ops, and links the object file they are in."""
    before = os.environ.get("LIBRARY_PATH")  # where the linker looks; Inductor has no option for it
    os.environ["LIBRARY_PATH"] = os.pathsep.join([str(library.parent), *([before] if before else [])])
    try:
        yield {"aot_inductor.package": True, "aot_inductor.custom_ops_to_c_shims": declarations,
               "aot_inductor.custom_op_libs": [f":{library.name}"]}
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def _check_capability(wanted: tuple[int, int] | None, path: Path) -> None:
    """Raise ExportError where no GPU is, or none that runs machine code for this compute capability."""
    if wanted is None:
        return
    compiled = f"file {str(path)!r} was compiled for GPUs of compute capability {wanted[0]}.{wanted[1]}"
    if not torch.cuda.is_available():
        raise ExportError(f"{compiled}, and torch finds no GPU here. Run it where there is one.")
    here = torch.cuda.get_device_capability()
    # Machine code runs on the same generation, as new or newer; what uses Hopper's own instructions there alone.
    if here[0] != wanted[0] or here < wanted:
        raise ExportError(f"{compiled}, and this one has {here[0]}.{here[1]}. Export the model on a GPU like this one, "
                          "or as an ExportedProgram.")


def load(path: Path) -> Runner:
    """The package as a call. Raises ExportError."""
    contents = read_contents(path)
    check_whole(path)
    missing = sorted(set(contents.processor) - native.instructions())
    if missing:
        raise ExportError(f"file {str(path)!r} was compiled for a processor with {', '.join(missing)}, which this one "
                          "has not. Export the model on a processor like this one, or as an ExportedProgram.")
    _check_capability(contents.capability, path)
    try:
        models = load_pt2(str(path)).aoti_runners
    except Exception as error:  # what torch raises for a package of another version is of many kinds
        raise ExportError(f"file {str(path)!r} is whole, but this torch ({torch.__version__}) cannot load it: {error}. "
                          "Export the model again.") from error

    ends = len(models) > 1 or (contents.buckets and contents.buckets[-1][1] is not None)

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        place = contents.program_of(args, kwargs) if ends else 0
        model = models[_name(place, len(models))]
        return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]

    return run
