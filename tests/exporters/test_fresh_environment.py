"""Exported files in a virtual environment of their own, with what they say they need and nothing else.

Opt-in, for it installs packages from an index, torch among them: set SPARSIFY_FRESH_ENVIRONMENTS=1. Without, tests of
test_onnx.py and test_aot_inductor.py run the files in processes that cannot import what they do not need.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.exporters import formats
from tests.exporters.models import BATCH, TWO_EDGES, Attend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SPARSIFY_FRESH_ENVIRONMENTS") != "1",
                       reason="SPARSIFY_FRESH_ENVIRONMENTS is not 1: it installs onnxruntime, and torch"),
]
LENGTHS = (100, 300, 700)  # one in every bucket

NOTHING_ELSE = """
import importlib.util, os, sys
for name in ("sparsify", "transformers", "onnx", *sys.argv[4:]):
    assert importlib.util.find_spec(name) is None, name
"""
RUNS = {
    "model.onnx": NOTHING_ELSE + """
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
for length in os.listdir(sys.argv[2]):
    x = numpy.fromfile(f"{sys.argv[2]}/{length}", numpy.float32).reshape(2, -1, 32)
    session.run(None, {name: x})[0].tofile(f"{sys.argv[3]}/{length}")
""",
    "model.pt2": NOTHING_ELSE + """
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for length in os.listdir(sys.argv[2]):
    x = torch.frombuffer(bytearray(open(f"{sys.argv[2]}/{length}", "rb").read()), dtype=torch.float32)
    out = model(x.reshape(2, -1, 32)).contiguous().flatten()
    open(f"{sys.argv[3]}/{length}", "wb").write(bytes(out.untyped_storage()))
""",
}


def environment(folder: Path, *packages: str) -> Path:
    """The interpreter of a new virtual environment with these packages in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
                   check=True)
    return python


@pytest.mark.parametrize(("file", "target", "packages", "absent"), [
    ("model.onnx", None, ["onnxruntime", "numpy"], ["torch"]),
    ("model.pt2", "aot_inductor", ["torch"], ["numpy", "onnxruntime"]),
])
def test_the_file_gives_there_what_it_gives_here(file, target, packages, absent, tmp_path):
    pytest.importorskip(packages[0], reason=f"{packages[0]} is not installed here")
    torch.manual_seed(0)
    model, path = Attend().eval(), tmp_path / file
    dynamic = [{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}]
    options = {} if target is None else {"target": target}
    sparsify.export(model, torch.randn(BATCH, 700, 32), path, plan=TWO_EDGES, dynamic_shapes=dynamic, **options)
    given, found = tmp_path / "given", tmp_path / "found"
    given.mkdir()
    found.mkdir()
    inputs = {length: torch.randn(BATCH, length, 32) for length in LENGTHS}
    for length, x in inputs.items():
        x.numpy().tofile(given / str(length))

    versions = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in packages]
    python = environment(tmp_path / "environment", *versions)
    subprocess.run([str(python), "-I", "-c", RUNS[file], str(path), str(given), str(found), *absent], check=True,
                   cwd=tmp_path)

    run = formats.format_of(path).load(path)
    for length, x in inputs.items():
        there = torch.frombuffer(bytearray((found / str(length)).read_bytes()), dtype=torch.float32).view_as(x)
        here = run(x)[0]
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert (float((there - model(x)).abs().max()) > 1e-4) == (length == LENGTHS[-1])  # the twin: it is sparse
