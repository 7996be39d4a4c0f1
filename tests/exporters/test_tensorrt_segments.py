"""`.ep`: what can be said of it without TensorRT. No engine is built: that takes TensorRT, a GPU and a CUDA torch.

The partition needs SPARSIFY_TORCH_TENSORRT: the folder of an unpacked wheel of torch-tensorrt for this torch, its `lib`
removed (it links TensorRT's library, which no registry that a test may use holds).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.errors import ExportError
from sparsify.exporters.capture import capture
from tests.exporters.models import BATCH, TWO_EDGES, Attend

ROOT = Path(__file__).resolve().parents[2]
WHEEL = os.environ.get("SPARSIFY_TORCH_TENSORRT")


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is installed")
def test_without_torch_tensorrt_the_error_says_what_is_missing_and_nothing_is_left(tmp_path):
    with pytest.raises(ExportError, match="needs torch_tensorrt.*target=\"tensorrt\""):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.ep", plan=TWO_EDGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(WHEEL is None, reason="SPARSIFY_TORCH_TENSORRT is not set")
def test_the_partitioner_leaves_attention_to_torch_and_takes_the_rest(tmp_path):
    free = [{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}]
    program = capture(Attend(), torch.randn(BATCH, 300, 32), TWO_EDGES, free).program
    torch.export.save(program.run_decompositions({}), tmp_path / "program.pt2")
    command = [sys.executable, str(Path(__file__).with_name("partition.py")), str(WHEEL), str(tmp_path / "program.pt2")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
    parts = dict(line.split(" ", 1) for line in said.splitlines() if line.startswith("_run_on") and " " in line)
    (ours,) = [name for name, ops in parts.items() if "sparsify.planned_attention" in ops]
    assert "gpu" in ours  # the partitioner's word for torch
    assert sum("aten.linear" in ops for name, ops in parts.items() if "acc" in name) == 2
