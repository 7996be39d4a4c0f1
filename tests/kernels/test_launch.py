"""A launch finds the kernel that Triton would find."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")

from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from sparsify.kernels.launch import Launched, compiling_ahead, describe_arguments, descriptor  # noqa: E402

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
MEMORY = torch.zeros(1024, dtype=torch.bfloat16)
START = -MEMORY.data_ptr() % 16 // 2  # of the first element at a multiple of 16 bytes


def tensors():
    aligned = MEMORY[START:START + 512]
    yield from (aligned, aligned[1:], aligned[8:], aligned.view(torch.float16), aligned.view(torch.uint8)[1:])
    for box in ([16, 64], [8, 64]):
        yield TensorDescriptor.from_tensor(aligned.view(8, 64), box, LAYOUT)


ARGUMENTS = [0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63, True, False, 1.0,
             0.5, None, (0.5, 1.0), (0.5,), (0.25, 1.0), *tensors()]


def kind_of(x):
    return describe_arguments((x,))[0]


def specialisation(x, specialise):
    return native_specialize_impl(CUDABackend(GPUTarget("cuda", 90, 32)), x, False, specialise, True)


def test_equal_kinds_are_one_kernel_to_triton():
    pairs = 0
    for (a, b), specialise in itertools.product(itertools.combinations(ARGUMENTS, 2), (True, False)):
        if kind_of(a) == kind_of(b):
            assert specialisation(a, specialise) == specialisation(b, specialise), (a, b)
            pairs += 1
    assert pairs > 10


@pytest.mark.parametrize(("a", "b"), [(1, 2), (16, 17), (2**31 - 1, 2**31), (1, True), (2, 2.0), (MEMORY, MEMORY[1:]),
                                      (MEMORY, MEMORY.view(torch.float16)), ((0.5,), (0.5, 1.0)), (0, None)])
def test_what_triton_tells_apart_has_other_kinds(a, b):
    assert kind_of(a) != kind_of(b)


def test_a_descriptor_is_the_one_that_triton_makes():
    rows = MEMORY[START:START + 512].view(8, 64)
    assert descriptor(rows, [64, 1], [8, 64], LAYOUT).__dict__.keys() == TensorDescriptor.from_tensor(
        rows, [8, 64], LAYOUT).__dict__.keys()
    ours, theirs = descriptor(rows, [64, 1], [8, 64], LAYOUT), TensorDescriptor.from_tensor(rows, [8, 64], LAYOUT)
    assert (tuple(ours.shape), tuple(ours.strides), ours.block_shape, ours.layout, ours.padding) == (
        tuple(theirs.shape), tuple(theirs.strides), theirs.block_shape, theirs.layout, theirs.padding)
    assert ours.base is rows and specialisation(ours, True) == specialisation(theirs, True)


class Kernel:
    """A compiled kernel and its JIT function in one: remembers how it was launched."""

    arg_names = ("x", "n", "BLOCK")
    function, packed_metadata = 17, (4,)

    def __init__(self):
        self.slow, self.fast, self.compiled = [], [], []

    def __getitem__(self, grid):
        def launch(*args, **keywords):
            self.slow.append((grid, args, keywords))
            return self
        return launch

    def run(self, *args):
        self.fast.append(args)

    def warmup(self, *args, grid, **keywords):
        assert triton.runtime._async_compile.active_mode.get() is not None
        self.compiled.append((grid, args, keywords))


def fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    launched = Launched(Kernel())
    launched._is_compiled = launched._is_direct = True
    return launched, launched.kernel


def test_a_call_alike_goes_past_triton(monkeypatch):
    launched, kernel = fast(monkeypatch)
    launched[(3,)](MEMORY, 5, BLOCK=64, num_warps=4)
    launched[(7, 2)](MEMORY, 6, BLOCK=64, num_warps=4)
    assert len(kernel.slow) == 1
    assert kernel.fast == [(7, 2, 1, 99, 17, (4,), None, None, None, MEMORY.data_ptr(), 6, 64)]


def test_a_launcher_that_takes_other_arguments_is_left_to_its_triton(monkeypatch):
    launched, kernel = fast(monkeypatch)

    def refuse(*args):
        raise TypeError("function takes exactly 9 arguments (12 given)")

    monkeypatch.setattr(kernel, "run", refuse)
    for number in range(3):
        launched[(3,)](MEMORY, 5, BLOCK=64)
        assert len(kernel.slow) == number + 1
    monkeypatch.undo()
    launched[(3,)](MEMORY, 5, BLOCK=64)
    assert len(kernel.slow) == 4 and not kernel.fast, "once is enough to know"


def test_who_watches_launches_sees_them(monkeypatch):
    launched, kernel = fast(monkeypatch)
    hooks = triton.knobs.runtime.launch_enter_hook

    def watch(metadata):
        pass

    launched[(3,)](MEMORY, 5, BLOCK=64)
    hooks.add(watch)
    try:
        launched[(3,)](MEMORY, 5, BLOCK=64)
    finally:
        hooks.remove(watch)
    launched[(3,)](MEMORY, 5, BLOCK=64)
    assert len(kernel.slow) == 2 and len(kernel.fast) == 1


def test_ahead_of_calls_kernels_are_compiled_and_not_launched(monkeypatch):
    launched, kernel = fast(monkeypatch)
    with pytest.raises(KeyError), compiling_ahead():
        launched[(3,)](MEMORY, 5, BLOCK=64)
        raise KeyError
    assert len(kernel.compiled) == 1 and not kernel.slow
    launched[(3,)](MEMORY, 5, BLOCK=64)
    assert len(kernel.compiled) == 1 and len(kernel.slow) == 1


@pytest.mark.parametrize("change", [{"n": 1}, {"BLOCK": 32}, {"num_warps": 8}, {"x": MEMORY[1:]}])
def test_another_kernel_is_asked_of_triton(monkeypatch, change):
    launched, kernel = fast(monkeypatch)
    call = {"x": MEMORY, "n": 5, "BLOCK": 64, "num_warps": 4}
    for one in (call, {**call, **change}):
        x, n, keywords = one["x"], one["n"], {name: one[name] for name in ("BLOCK", "num_warps")}
        launched[(3,)](x, n, **keywords)
    assert len(kernel.slow) == 2 and not kernel.fast


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_selection_and_attention_launch_without_triton_the_second_time(monkeypatch):
    from sparsify import ops

    def call(length):
        q, k, v = torch.randn(3, 1, 8, length, 64, device="cuda", dtype=torch.bfloat16)
        lists = ops.select_blocks(q, k, 0.125, 0, None, None, None, None, None, 0.0, None, 0.01, 1.0, 1, 1, 6)
        ops.block_sparse_attention(q, k, v, *lists, 0.125, 0, None, None, None, None, None, 0.0, None)

    call(1024)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **keywords: pytest.fail("Triton was asked"))
    call(1024)
    with pytest.raises(pytest.fail.Exception, match="Triton was asked"):
        call(63)  # ragged: other kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_was_compiled_ahead_is_not_compiled_again(monkeypatch):
    from sparsify.kernels.hopper_queue import LEVELS, _fill_queue

    counts = torch.full((700,), 2, dtype=torch.int32, device="cuda")
    queue = torch.zeros(700, dtype=torch.int64, device="cuda")
    cursors = torch.zeros(LEVELS + 1, dtype=torch.int32, device="cuda")

    def call(warps):
        _fill_queue[(1,)](counts, queue, cursors, 700, 5, LEVELS=LEVELS, CHUNK=512, TILE=2, num_warps=warps)

    with compiling_ahead():
        call(2)
    assert not queue.any(), "nothing was launched"
    monkeypatch.setattr(_fill_queue.kernel, "compile", lambda *args, **keywords: pytest.fail("compiled"))
    call(2)
    assert queue.any()
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        call(1)
