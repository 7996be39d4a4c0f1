"""`sparsify.export` to an AOTInductor package: it needs nothing of ours, and garbage is never handed over."""

import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsify
from sparsify.errors import ExportError
from sparsify.exporters import aot_inductor, formats
from sparsify.kernels import native
from sparsify.models.loading import load_model
from sparsify.ops import planned
from sparsify.plan import Bucket, Budget, Plan
from tests.exporters.models import ALWAYS, EDGE, SECOND_EDGE, TWO_EDGES, Attend, bert, vit

pytestmark = pytest.mark.skipif(native.shim() is None, reason="no C++ compiler on this machine")
RUNNER = Path(__file__).with_name("runner")
SHAPES = [{0: Dim.AUTO, 1: Dim.AUTO}]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> tuple[Path, sparsify.ExportReport, nn.Module]:
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("package") / "model.pt2", Attend()
    report = sparsify.export(model, torch.randn(2, 700, 32), path, plan=TWO_EDGES, dynamic_shapes=SHAPES,
                             target="aot_inductor")
    return path, report, model


def test_every_bucket_is_equal_to_the_graph(package):
    path, report, _ = package
    assert [row.bucket for row in report.checks] == [f"[1, {EDGE})", f"[{EDGE}, {SECOND_EDGE})",
                                                     f"[{SECOND_EDGE}, inf)"]
    assert max(row.difference for row in report.checks) < 1e-5 < report.checks[-1].plan_error
    assert formats.format_of(path) is aot_inductor
    contents = aot_inductor.describe(path)
    assert contents.target == "aot_inductor" and contents.plan == TWO_EDGES
    assert "AOTInductor package" in report.to_markdown()


def test_a_process_without_sparsify_runs_it(package, tmp_path):
    path, _, model = package
    x = torch.randn(1, 450, 32)
    torch.save(x, tmp_path / "x")
    code = ("import sys, torch\n"
            "model = torch._inductor.aoti_load_package(sys.argv[1])\n"
            "torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
            "assert 'sparsify' not in sys.modules")
    subprocess.run([sys.executable, "-I", "-c", code, str(path), str(tmp_path / "x"), str(tmp_path / "out")],
                   check=True, cwd=tmp_path)
    (expected,) = aot_inductor.load(path)(x)
    assert torch.equal(torch.load(tmp_path / "out"), expected)
    with torch.no_grad():
        assert float((expected - model(x)).abs().max()) > 1e-5  # the twin: it is not the dense model


def test_a_damaged_package_is_refused(package, tmp_path):
    copy = tmp_path / "model.pt2"
    copy.write_bytes(package[0].read_bytes()[:-1000])
    with pytest.raises(ExportError, match="damaged"):
        aot_inductor.load(copy)


def test_a_package_for_another_processor_is_refused(package, monkeypatch):
    """A call would end the process by an illegal instruction."""
    monkeypatch.setattr(native, "instructions", lambda: frozenset(aot_inductor.describe(package[0]).processor[1:]))
    with pytest.raises(ExportError, match="was compiled for a processor with"):
        aot_inductor.load(package[0])
    monkeypatch.undo()
    aot_inductor.load(package[0])


def test_a_fake_that_lies_about_strides_is_caught(tmp_path, monkeypatch):
    """The first silent fault: the package would read the op's output in another layout, and return garbage."""
    monkeypatch.setattr(planned, "empty_out", lambda q, v: q.new_empty(*q.shape[:3], v.shape[3]))
    with pytest.raises(ExportError, match="differs from the model"):
        sparsify.export(Attend(), torch.randn(2, 300, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                        dynamic_shapes=SHAPES, target="aot_inductor")
    assert list(tmp_path.iterdir()) == []


class Cond(Attend):
    """torch.cond of a contiguous copy of a transposed operand: AOTInductor of torch 2.13 makes garbage of it."""

    def forward(self, x):
        heads = self.qkv(x)[..., :32].unflatten(-1, (4, 8)).transpose(1, 2)
        mixed = torch.cond(x.shape[1] < 256, lambda h: h.sin().contiguous(), lambda h: h.cos().contiguous(),
                           (heads.contiguous(),))
        return super().forward(mixed.transpose(1, 2).flatten(2))


@pytest.mark.slow
def test_cond_over_a_copied_operand_is_right_or_refused(tmp_path):
    """The second silent fault, in a model's own cond: the file is right, or there is none."""
    model, path = Cond(), tmp_path / "model.pt2"
    arguments = {"plan": ALWAYS, "dynamic_shapes": [{1: Dim("length", min=8, max=4096)}], "lengths": [128, 512]}
    x = torch.randn(1, 128, 32)
    report = sparsify.export(model, x, tmp_path / "program.pt2", **arguments)  # the twin: the program itself is right
    assert all(row.difference == 0 for row in report.checks)
    try:
        sparsify.export(model, x, path, target="aot_inductor", **arguments)
    except ExportError as error:
        assert "differs from the model" in str(error) and not path.exists()
        return
    for length in (128, 512):
        x = torch.randn(1, length, 32)
        expected = torch.export.load(tmp_path / "program.pt2").module()(x)
        torch.testing.assert_close(aot_inductor.load(path)(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_library_with_its_own_runtime_is_refused(package, tmp_path):
    """It is what GCC links without libstdc++.so; loaded, it ends the process with a segmentation fault."""
    with zipfile.ZipFile(package[0]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        library = archive.read(name)
    for content, fits in ((library, True), (library.replace(b"libstdc++.so", b"libm.so.0000"), False)):
        (tmp_path / "model.so").write_bytes(content)
        with nullcontext() if fits else pytest.raises(ExportError, match="g\\+\\+.*shared libstdc.*CXX"):
            aot_inductor._check_linked(str(tmp_path / "model.so"))


def test_without_a_compiler_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "shim", lambda: None)
    before = os.environ.get("LIBRARY_PATH")
    with pytest.raises(ExportError, match="no C\\+\\+ compiler"):
        sparsify.export(Attend(), torch.randn(2, 300, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                        dynamic_shapes=SHAPES, target="aot_inductor")
    assert os.environ.get("LIBRARY_PATH") == before


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, vit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoders(make, dtype, tmp_path):
    model, inputs = make(*([700] if make is bert else []))
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    report = sparsify.export(model.to(dtype), inputs, tmp_path / "model.pt2", plan=ALWAYS if make is vit else TWO_EDGES,
                             target="aot_inductor")
    assert all(site.outcome == "sparse" for site in report.contents.sites)
    assert report.checks[-1].plan_error > 1e-2


@pytest.mark.slow
def test_tiny_lm_equals_the_compiled_model(tmp_path):
    """On both sides of every edge, batch 1 and 2, up to 16K tokens."""
    model = load_model().model
    model.config.use_cache = False
    plan = Plan((Bucket(1, 1024, Budget.dense()), Bucket(1024, 4096, Budget(0.02), {0: Budget.dense()}),
                 Bucket(4096, None, Budget(0.03), {0: Budget.dense()})))
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4000, (2, 16384), generator=rng)
    sparsify.export(model, {"input_ids": ids[:, :512]}, tmp_path / "model.pt2", plan=plan, target="aot_inductor")
    package = aot_inductor.load(tmp_path / "model.pt2")
    sparsify.compile(model, plan, backend="eager")
    for batch, length in ((1, 1), (1, 256), (2, 1023), (1, 1024), (2, 4095), (1, 4096), (1, 16384)):
        given = ids[:batch, :length].contiguous()
        with torch.no_grad():
            ours, theirs = package(input_ids=given)[0], model(given).logits
        # Ties at the tolerance may fall otherwise; rounding moves logits of magnitude 20 by 1e-4.
        assert float((ours - theirs).square().mean().sqrt()) < 1e-3, (batch, length)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake on this machine")
@pytest.mark.skipif(torch.version.cuda is not None and shutil.which("nvcc") is None,
                    reason="the CMake files of a CUDA build of torch ask for the CUDA toolkit")
def test_a_program_in_cpp_runs_it(package, tmp_path):
    path, _, _ = package
    build = tmp_path / "build"
    subprocess.run(["cmake", "-S", str(RUNNER), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                    f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    for length in (100, 300, 500):
        x = torch.randn(1, length, 32)
        x.numpy().tofile(tmp_path / "x.bin")
        subprocess.run([str(build / "runner"), str(path), str(tmp_path / "x.bin"), str(tmp_path / "out.bin"),
                        *map(str, x.shape)], check=True)
        out = torch.from_file(str(tmp_path / "out.bin"), size=x.numel()).view(x.shape)
        torch.testing.assert_close(out, aot_inductor.load(path)(x)[0], rtol=1e-5, atol=1e-6)


def test_every_array_of_sizes_is_declared_where_it_is_used():
    """torch 2.11 told places of declarations apart by ids that others take over: it left some out, now and then."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.utils import IndentedBuffer

    wrapper = object.__new__(CppWrapperCpu)
    wrapper.int_array_id, wrapper.declared_int_array_vars = itertools.count(), set()
    wrapper.codegen_int_array_var_cache = {}
    places = [IndentedBuffer() for _ in range(50)]
    with aot_inductor.arrays_declared():
        names = [wrapper.codegen_int_array_var("{1L, }", place.writeline) for place in places]
    assert all(f" {name}[]" in place.getvalue() for name, place in zip(names, places, strict=True))
