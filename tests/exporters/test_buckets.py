"""A program for each bucket: what packages for CUDA are compiled from. Here its kernels run in Triton's interpreter."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsify
import tests.interpreter  # noqa: F401
from sparsify import ops
from sparsify.errors import ExportError, OptionError
from sparsify.exporters import aot_inductor, buckets
from sparsify.exporters.capture import PLANNED, capture, with_graph
from sparsify.exporters.contents import Contents
from sparsify.kernels import native, packed
from sparsify.plan import Bucket, Budget, Plan
from tests.exporters.models import TWO_EDGES, Attend
from tests.ops.cases import Case

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, on a CPU")
PACKED = torch.ops.sparsify.packed_attention.default
SMALL = Plan((Bucket(1, 130, Budget.dense()), Bucket(130, 200, Budget(0.1)), Bucket(200, None, Budget(0.4, local=0))))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """torch 2.11 wraps no function of the interpreter; outside a trace the wrapper is the kernel itself."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(packed, "wrap_triton", lambda kernel: kernel)


@ON_CPU
@pytest.mark.parametrize("shape", [(130, 130, 0, None), (130, 200, 70, "left"), (130, 260, None, "holes")], ids=str)
def test_the_packed_op_is_the_op(shape):
    case = Case.random(torch.Generator().manual_seed(0), torch.device("cpu"), *shape, head_dims=(16, 16))
    ours = packed.packed_attention(*case.qkv, case.masks.key_mask, case.scale, case.masks.causal_offset, 0.3, 0.9, 0, 0,
                                   2)
    theirs = ops.adaptive_attention(*case.qkv, *case.arguments, 0.3, 0.9, 0, 0, 2, 0, ops.VERSION)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.stride() == theirs.stride()


class Masked(Attend):
    """With a mask of keys, that one row of the batch is wholly hidden by."""

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        shape = x.shape[1], x.shape[1]
        hidden = torch.ones(shape, dtype=torch.bool, device=x.device).triu(1) | ~mask[:, None, None]
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(hidden, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@ON_CPU
@pytest.mark.parametrize("masked", [False, True])
def test_each_program_is_the_table_in_its_bucket(masked):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 150, 32), torch.rand(2, 150) > 0.2
    length = Dim("length", max=1000)
    captured = (capture(Masked(), (x, mask), SMALL, [{1: length}, {1: length}]) if masked else
                capture(Attend(), x, SMALL, [{1: length}]))
    assert captured.records[0].mask.startswith("causal")
    contents = Contents.of(captured, "aot_inductor")
    for place, (bucket, at) in enumerate(zip(captured.buckets, (100, 150, 250), strict=True)):
        program = buckets.program_for(captured, bucket, [])
        assert not program.graph.find_nodes(op="call_function", target=PLANNED)
        assert len(program.graph.find_nodes(op="call_function", target=PACKED)) == (place > 0)
        args, _ = captured.inputs_at(at)
        torch.testing.assert_close(program.module()(*args), captured.program.module()(*args), rtol=1e-4, atol=1e-5)
        assert contents.program_of(args, {}) == place
        assert str(program.range_constraints) == str(captured.program.range_constraints)


def test_sites_that_cannot_be_packed_are_named():
    class Window(Attend):
        def forward(self, x):
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            place = torch.arange(x.shape[1])
            seen = (place[:, None] >= place) & (place[:, None] < place + 50)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)

    captured = capture(Window(), torch.randn(2, 150, 32), SMALL, [{1: Dim("length", max=1000)}])
    (line,) = buckets.needs_sparsify(captured)
    assert "window" in line
    program = buckets.program_for(captured, captured.buckets[1], [])
    assert len(program.graph.find_nodes(op="call_function", target=PLANNED)) == 1
    assert not buckets.needs_sparsify(capture(Attend(), torch.randn(2, 150, 32), SMALL, [{1: Dim.AUTO}]))
    wide = capture(Attend(4 * 136), torch.randn(2, 150, 4 * 136), SMALL, [{1: Dim.AUTO}])
    assert "heads of 136 in torch.float32" in buckets.needs_sparsify(wide)[0]


class Cached(Attend):
    """The last of the tokens attend to those of a cache, too."""

    def forward(self, x, past):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        k, v = (torch.cat([past, part], 2) for part in (k, v))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past.shape[2])
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


def test_a_call_with_few_queries_runs_a_program_that_drops_nothing():
    given = torch.randn(1, 40, 32), torch.randn(1, 4, 200, 8)
    shapes = [{1: Dim("new", max=500)}, {2: Dim("past", max=500)}]
    contents = Contents.of(capture(Cached(), given, SMALL, shapes), "aot_inductor")
    assert contents.query_length == contents.inputs[0].sizes[1]

    def program(queries, past, contents=contents):
        return contents.program_of((torch.empty(1, queries, 32), torch.empty(1, 4, past, 8)), {})

    assert [program(queries, 200) for queries in (1, 32, 33, 300)] == [0, 0, 2, 2]
    assert [program(queries, 110) for queries in (10, 32, 33)] == [0, 0, 1]
    sparse = Plan((Bucket(1, 200, Budget(0.1)), Bucket(200, None, Budget(0.4))))
    assert program(1, 200, Contents.of(capture(Cached(), given, sparse, shapes), "aot_inductor")) == 1


def test_a_call_beyond_the_last_bucket_is_refused():
    captured = capture(Attend(), torch.randn(2, 150, 32), SMALL, [{1: Dim("length", max=1000)}])
    contents = Contents.of(captured, "aot_inductor")
    assert contents.program_of((torch.empty(1, 1000, 32),), {}) == 2
    with pytest.raises(OptionError, match="key length of 1001"):
        contents.program_of((torch.empty(1, 1001, 32),), {})


@ON_CPU
def test_each_call_runs_the_model_of_its_bucket(tmp_path, monkeypatch):
    """As on CUDA: a package of several models, here with the number of its bucket in each one's output.

    torch 2.11 takes for a model all files whose path begins with its name: it ran "model_bucket2" for "model".
    """
    def numbered(captured, bucket, kernels):
        graph = copy.deepcopy(captured.program.graph_module)
        (output,) = graph.graph.find_nodes(op="output")
        with graph.graph.inserting_before(output):
            new = graph.graph.call_function(torch.ops.aten.mul.Tensor,
                                            (output.args[0][0], 1.0 + captured.buckets.index(bucket)))
        new.meta = dict(output.args[0][0].meta)
        output.args = ((new,),)
        return with_graph(captured.program, graph)

    captured = capture(Attend(), torch.randn(2, 150, 32), SMALL, [{1: Dim("length", max=1000)}])
    with monkeypatch.context() as patch:
        patch.setattr(aot_inductor, "_capability_of", lambda captured: (9, 0))
        patch.setattr(buckets, "program_for", numbered)
        aot_inductor.write(captured, tmp_path / "model.pt2")
    with pytest.raises(ExportError, match="for GPUs of compute capability 9.0, and torch finds no GPU here"):
        aot_inductor.load(tmp_path / "model.pt2")
    monkeypatch.setattr(aot_inductor, "_check_capability", lambda wanted, path: None)
    run, whole = aot_inductor.load(tmp_path / "model.pt2"), captured.program.module()
    for place, length in enumerate((100, 150, 250)):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x)[0], whole(x) * (1 + place), rtol=1e-4, atol=1e-5)
    names = [aot_inductor._name(i, 12) for i in range(12)]
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]


@pytest.mark.parametrize(("wanted", "here", "runs"), [
    ((9, 0), (9, 0), True), ((8, 0), (8, 6), True), ((8, 6), (8, 0), False), ((9, 0), (10, 0), False),
    (None, None, True)])
def test_a_package_for_another_gpu_is_refused(wanted, here, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    if runs:
        aot_inductor._check_capability(wanted, Path("model.pt2"))
        return
    with pytest.raises(ExportError, match=rf"capability {wanted[0]}\.{wanted[1]}, and this one has {here[0]}\."):
        aot_inductor._check_capability(wanted, Path("model.pt2"))


@ON_CPU
@pytest.mark.parametrize(("compiler", "why"), [
    ("/nowhere/g++", "/nowhere/g\\+\\+"), ("false", "false failed"), (None, "none was found")])
def test_a_compiler_that_fails_is_quoted(compiler, why, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_compiler", lambda: compiler)
    with pytest.raises(ExportError, match=f"compiled by a C\\+\\+ compiler: .*{why}.* environment variable CXX"):
        aot_inductor._built("int f();", tmp_path / "f.o")


@ON_CPU
def test_a_compiler_says_what_is_wrong(tmp_path):
    with pytest.raises(ExportError, match="does not name a type"):
        aot_inductor._built("wrong f();", tmp_path / "f.o")


OPENED = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from sparsify.kernels import packed

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Module(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return torch.ops.sparsify.packed_attention(q, k, v, mask, 0.125, 0, 0.03, 0.9, 1, 1, 6)

triton.runtime.driver.set_active(Driver())
packed.multiprocessors, packed._shared_memory = lambda device: 132, lambda device: 232448
length = Dim("length", min=2, max=131072)
with FakeTensorMode(shape_env=ShapeEnv()):
    q, k, v = (torch.empty(2, heads, 300, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    mask = torch.empty(2, 300, device="cuda", dtype=torch.bool)
program = torch.export.export(Module(), (q, k, v, mask), dynamic_shapes=[{2: length}] * 3 + [{1: length}])
fakes = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
env = fakes[0].fake_mode.shape_env
before = len(env.guards)
with fakes[0].fake_mode, torch.no_grad():
    graph, _ = aot_export_module(program.graph_module, fakes, trace_joint=False)
for node in graph.graph.nodes:
    if "triton_kernel" in str(node.target):
        written = node.kwargs["tensors_to_clone"]
        print(len(written) - len({node.kwargs["kwargs"][name] for name in written}), sorted(written))
print(env.guards[before:])
"""

ON_HOPPER = OPENED.replace("import packed", "import hopper_packed, packed").replace(
    "packed_attention(q, k, v, mask, 0.125, 0, 0.03, 0.9, 1, 1, 6)",
    "packed_attention_on_hopper(q, k, v, mask, 0.125, 0, 0.03, 0.9, 1, 1, 6, 0)")

COMPILED = """
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.compiler import ASTSource

WORDS = set("and auto bool break case catch char class const default delete do double else enum explicit export extern "
            "float for friend goto if inline int long new not operator or private protected public register return "
            "short signed static struct switch template this throw try typedef union unsigned using virtual void "
            "volatile while xor".split())

def describe(x, size):
    if isinstance(x, torch.Tensor):
        return {torch.int32: "*i32", torch.bool: "*i1", torch.float32: "*fp32", torch.bfloat16: "*bf16",
                torch.float16: "*fp16"}[x.dtype]
    if isinstance(x, torch.SymInt):
        return size
    return "fp64" if isinstance(x, float) else "constexpr" if x == 1 else "i32"

for node in graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional):
    given = {**node.kwargs["kwargs"], **kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])}
    given = {name: x.meta["val"] if isinstance(x, torch.fx.Node) else x for name, x in given.items()}
    autotuner = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    kernel, config = autotuner.fn, autotuner.configs[0]
    assert not WORDS & set(kernel.arg_names), "names of arguments become names in C++"
    for size in ("i32", "i64"):
        kinds = {parameter.name: "constexpr" if parameter.is_constexpr else describe(given[parameter.name], size)
                 for parameter in kernel.params}
        constants = {name: given[name] for name, kind in kinds.items() if kind == "constexpr"}
        made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": config.num_warps, "num_stages": config.num_stages})
        print(kernel.__name__, size, len(made.asm["ptx"]) > 0)
"""


def _told_by(code):
    """Lines that a process without Triton's interpreter prints."""
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"},
                          capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stderr[-2000:]
    return told.stdout.splitlines()


@ON_CPU
def test_the_op_opens_into_kernels_without_a_guard():
    """Sizes of scratch memory are no reason to compare a length: AOTInductor would keep the answer to itself. Nor may a
    tensor that it takes for written have two names: it would copy it, and torch 2.11 fails at that.

    In a process of its own: what Triton's interpreter runs cannot be traced. The target is a GPU that is not here.
    """
    summaries, estimates, lists, attention, guards = _told_by(OPENED)[-5:]
    assert summaries == "0 ['mean', 'rest_count', 'single_count', 'singles', 'variance']"
    assert estimates == "0 ['peaks', 'scratch', 'scratch_peaks']" and attention == "0 ['lse', 'out']"
    assert lists.startswith("0 ") and "'kept'" in lists
    assert guards == "[]"


@ON_CPU
def test_the_op_for_hopper_makes_no_guard():
    assert _told_by(ON_HOPPER)[-1] == "[]"


@ON_CPU
def test_the_kernels_compile_with_the_types_that_inductor_gives_their_arguments():
    """Numbers with 64 bits, ones as constants, lengths with 32 or 64 bits; Triton's own launches have 32 bits alone.
    And their arguments have names that C++ takes.
    """
    kernels = ("_summarise_keys", "_estimate_peaks", "_pack_lists", "_block_sparse_attention")
    expected = [f"{kernel} {size} True" for kernel in kernels for size in ("i32", "i64")]
    assert _told_by(OPENED + COMPILED)[-8:] == expected


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "masked"), [(128, False), (256, True)], ids=["plain Triton", "Gluon"])
def test_a_package_for_cuda_runs_without_sparsify(width, masked, tmp_path):
    """Written, checked and loaded; then in a process that knows torch alone. Gluon kernels take heads of 64: on Hopper
    the second keeps the blocks that the graph keeps."""
    torch.manual_seed(0)
    model = (Masked if masked else Attend)(width).cuda().bfloat16()
    x = torch.randn(2, 700, width, device="cuda", dtype=torch.bfloat16)
    inputs = (x, torch.rand(2, 700, device="cuda") > 0.2) if masked else (x,)
    path, length = tmp_path / "model.pt2", Dim("length", max=4096)
    report = sparsify.export(model, inputs, path, plan=TWO_EDGES, dynamic_shapes=[{1: length}] * len(inputs),
                             target="aot_inductor")
    assert len(report.checks) == 3 and not any("needs sparsify" in note for note in report.notes)
    if masked and torch.cuda.get_device_capability()[0] == 9:
        assert all(check.difference_rms < check.plan_error_rms / 4 for check in report.checks[1:])
    torch.save(inputs, tmp_path / "inputs")
    code = ("import sys, torch\n"
            "from torch._inductor.package import load_package\n"
            "out = load_package(sys.argv[1], 'bucket02')(*torch.load(sys.argv[2]))\n"
            "assert 'sparsify' not in sys.modules\n"
            "torch.save(out, sys.argv[3])")
    subprocess.run([sys.executable, "-I", "-c", code, str(path), str(tmp_path / "inputs"), str(tmp_path / "out")],
                   check=True, cwd=tmp_path)
    (expected,) = aot_inductor.load(path)(*inputs)
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected, rtol=0, atol=0)
