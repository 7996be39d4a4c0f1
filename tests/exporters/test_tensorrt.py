"""ONNX for TensorRT: a file a bucket that its parser and builder take; engines are built where its library is.

The tests that build and run need two folders: SPARSIFY_TENSORRT_RTX, which holds libtensorrt_rtx.so* and
libtensorrt_onnxparser_rtx.so* (the wheel onnxruntime-ep-nv-tensorrt-rtx-cu13 has them), and SPARSIFY_TENSORRT_HEADERS,
TensorRT's public headers. Building needs no GPU; running needs one that TensorRT-RTX supports.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.errors import ExportError, OptionError
from sparsify.exporters.capture import capture
from tests.exporters.models import BATCH, EDGE, SECOND_EDGE, TWO_EDGES, Attend, bert, decoder

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from sparsify.exporters import tensorrt as form  # noqa: E402

FREE = [{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}]
LIBRARIES, HEADERS = (os.environ.get(f"SPARSIFY_TENSORRT_{name}") for name in ("RTX", "HEADERS"))
REFUSES_GPU = re.compile(r"TensorRT-RTX does not support this compute capability|Target GPU SM \S+ is not supported")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return path, sparsify.export(Attend(), torch.randn(BATCH, 500, 32), path, plan=TWO_EDGES, target="tensorrt",
                                 dynamic_shapes=FREE)


def operators(path: Path) -> set[str]:
    model = onnx.load(path)
    assert not model.functions
    return {node.op_type for node in model.graph.node}


def test_there_is_a_file_for_every_bucket(exported):
    path, report = exported
    names = ["model.bucket1.onnx", "model.bucket2.onnx", "model.onnx", "model.onnx.md", "model.profiles.json"]
    assert sorted(x.name for x in path.parent.iterdir()) == names
    for name in names[:3]:
        assert not operators(path.with_name(name)) & {"If", "Loop", "NonZero"}
        assert ("TopK" in operators(path.with_name(name))) == ("bucket" in name)  # the first bucket is dense
    assert [row.length for row in report.checks] == [64, EDGE, SECOND_EDGE]
    assert "trtexec --onnx=model.bucket2.onnx" in report.to_markdown()


def test_profiles_meet_at_the_edges(exported):
    rows = json.loads((exported[0].parent / "model.profiles.json").read_text())
    assert [(row["lo"], row["hi"]) for row in rows] == [(1, EDGE), (EDGE, SECOND_EDGE), (SECOND_EDGE, None)]
    shapes = [row["shapes"]["x"] for row in rows]
    assert [x["min"] for x in shapes] == [[BATCH, length, 32] for length in (1, EDGE, SECOND_EDGE)]
    ends = (EDGE - 1, SECOND_EDGE - 1, 4 * SECOND_EDGE)
    assert [x["max"] for x in shapes] == [[BATCH, length, 32] for length in ends]


@pytest.mark.slow
@pytest.mark.parametrize("make", [decoder, bert])
def test_the_files_compute_what_the_graph_does_on_both_sides_of_every_edge(make, tmp_path):
    captured = capture(*make(), TWO_EDGES)
    form.write(captured, tmp_path / "model.onnx", room=100)
    run = form.load(tmp_path / "model.onnx")
    for length in (EDGE - 1, EDGE, SECOND_EDGE - 1, SECOND_EDGE, 700):
        args, kwargs = captured.inputs_at(length)
        with torch.no_grad():
            (theirs, *_), (dense, *_) = (program.module()(*args, **kwargs).values()
                                         for program in (captured.program, captured.dense))
        assert_is_the_graph(run(*args, **kwargs)[0], theirs, dense)
    assert (theirs - dense).abs().max() > 1e-3  # the twin: something was dropped


def assert_is_the_graph(ours: Tensor, theirs: Tensor, dense: Tensor) -> None:
    """Up to rounding; or, where rounding let another key block in, near next to what the graph itself drops."""
    gap, own = ours - theirs, theirs - dense
    assert gap.abs().max() < 1e-4 * theirs.abs().max() or gap.square().mean() < own.square().mean() / 16


def test_a_query_block_without_room_loses_the_least(tmp_path):
    torch.manual_seed(0)
    captured = capture(Attend(), torch.randn(BATCH, 700, 32), TWO_EDGES, FREE)
    outputs = []
    for room in (100, 1):
        notes = form.write(captured, tmp_path / "model.onnx", room=room)
        outputs.append(form.load(tmp_path / "model.onnx")(*captured.args, **captured.kwargs)[0])
    assert any("room for 1 key blocks" in note for note in notes)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


class Windowed(nn.Module):
    """Attention over the last 100 keys."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        place = torch.arange(x.shape[1])
        room = place[:, None] - place
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=(room >= 0) & (room < 100)).mean(1)


def test_a_site_that_cannot_be_kept_sparse_is_dense_and_listed(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(BATCH, 500, 32)
    captured = capture(Windowed(), x, TWO_EDGES, FREE)
    assert captured.records[0].outcome == "sparse"
    notes = form.write(captured, tmp_path / "model.onnx")
    assert sum("attention 0 is dense" in note for note in notes) == 2  # in both sparse buckets
    torch.testing.assert_close(form.load(tmp_path / "model.onnx")(x)[0], Windowed()(x), rtol=1e-4, atol=1e-5)


def test_files_that_were_parted_are_refused(exported, tmp_path):
    shutil.copy(exported[0], tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="the first of 3 buckets"):
        form.load(tmp_path / "model.onnx")


def test_options_are_checked(tmp_path):
    with pytest.raises(OptionError, match="form is 'inline'"):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", target="tensorrt", form="inline")
    with pytest.raises(OptionError, match="room is 0"):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", target="tensorrt", room=0)
    with pytest.raises(OptionError, match="opset is 12"):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", target="tensorrt", opset=12)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[..., Path]:
    """Compiles a source beside this file against TensorRT."""
    if not LIBRARIES or not HEADERS:
        pytest.skip("SPARSIFY_TENSORRT_RTX and SPARSIFY_TENSORRT_HEADERS are not set")
    folder = tmp_path_factory.mktemp("tensorrt")
    for name in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
        found = max(Path(LIBRARIES).glob(f"{name}*"))
        version = found.name.removeprefix(f"{name}.").split(".")
        for link in (name, f"{name}.{version[0]}"):
            (folder / link).symlink_to(found.resolve())
    # The headers mention two handles of CUDA and nothing else of it.
    (folder / "cuda_runtime_api.h").write_text("typedef struct CUstream_st* cudaStream_t;\n"
                                               "typedef struct CUevent_st* cudaEvent_t;\n")
    major, minor, patch = map(int, version)

    def build(name: str, *options: str) -> Path:
        source, made = Path(__file__).with_name(f"{name}.cpp"), folder / name
        subprocess.run(["g++", "-std=c++17", "-O1", "-w", f"-DLIBRARY_VERSION={10000 * major + 100 * minor + patch}",
                        "-I", HEADERS, "-I", str(folder), str(source), "-o", str(made), f"-Wl,-rpath,{folder}",
                        *options, *(str(x) for x in folder.glob("lib*.so"))], check=True)
        return made

    return build


@pytest.fixture(scope="module")
def build_engine(compiled) -> Callable[[Path, Mapping[str, Any]], Path]:
    """Parses and builds a file under a row of its profiles."""
    program = compiled("build_engine")

    def build(folder: Path, row: Mapping[str, Any]) -> Path:
        sizes = {name: ["x".join(map(str, shape[which])) for which in ("min", "opt", "max")]
                 for name, shape in row["shapes"].items()}
        (folder / "profile").write_text("".join(f"{name} {' '.join(x)}\n" for name, x in sizes.items()))
        files = [folder / row["file"], folder / "profile", folder / f"{row['file']}.engine"]
        built = subprocess.run([program, *files], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return files[-1]

    return build


@pytest.mark.parametrize("make", [decoder, bert])
def test_tensorrt_parses_and_builds_every_file(make, build_engine, tmp_path):
    form.write(capture(*make(), TWO_EDGES), tmp_path / "model.onnx")
    for row in json.loads(form.profiles_path(tmp_path / "model.onnx").read_text()):
        assert build_engine(tmp_path, row).stat().st_size > 10_000


class Argument(ctypes.Structure):
    """A tensor as run_engine.cpp reads it."""

    _fields_ = [("name", ctypes.c_char_p), ("address", ctypes.c_void_p), ("rank", ctypes.c_int64),
                ("sizes", ctypes.c_int64 * 8)]

    @classmethod
    def of(cls, name: str, x: Tensor) -> "Argument":
        return cls(name.encode(), x.data_ptr(), x.dim(), tuple(x.shape))


@pytest.fixture(scope="module")
def run_engine(compiled) -> Callable[[bytes, Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """Runs an engine on the GPU, from contiguous inputs into contiguous outputs; skips if TensorRT refuses the GPU."""
    library = ctypes.CDLL(str(compiled("run_engine", "-shared", "-fPIC")))
    library.open_engine.restype, library.complaints.restype = ctypes.c_void_p, ctypes.c_char_p
    library.run_engine.restype = ctypes.c_bool

    def run(engine: bytes, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        opened = ctypes.c_void_p(library.open_engine(engine, ctypes.c_uint64(len(engine))))
        tensors = [Argument.of(name, x) for held in (inputs, outputs) for name, x in held.items()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        ran = bool(opened) and library.run_engine(opened, (Argument * len(tensors))(*tensors),
                                                  ctypes.c_uint64(len(tensors)), ctypes.c_void_p(stream.cuda_stream))
        stream.synchronize()
        said = library.complaints().decode().strip()
        library.close_engine(opened)
        if REFUSES_GPU.search(said):
            pytest.skip(said)
        assert ran and not said, said

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("make", [decoder, bert])
def test_engines_compute_what_the_graph_does(make, build_engine, run_engine, tmp_path):
    captured = capture(*make(), TWO_EDGES)
    form.write(captured, tmp_path / "model.onnx", room=100)
    for row in json.loads(form.profiles_path(tmp_path / "model.onnx").read_text()):
        args, inputs = captured.inputs_at(next(iter(row["shapes"].values()))["opt"][1])
        with torch.no_grad():
            theirs, dense = (program.module()(*args, **inputs) for program in (captured.program, captured.dense))
        ours = {name: torch.full(x.shape, torch.nan, device="cuda") for name, x in theirs.items()}
        given = {name: x.contiguous().cuda() for name, x in inputs.items()}
        run_engine(build_engine(tmp_path, row).read_bytes(), given, ours)
        for name, x in ours.items():
            assert_is_the_graph(x.cpu(), theirs[name], dense[name])
    assert (theirs[name] - dense[name]).abs().max() > 1e-3  # the twin: something was dropped
