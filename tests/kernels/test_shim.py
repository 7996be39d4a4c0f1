"""shim.cpp does what the ops do: the same kept lists, the same exact kernels, whatever the masks."""

import ctypes
import functools

import pytest
import torch

from sparsify import ops
from sparsify.kernels import native
from tests.kernels.handles import Arguments, returned
from tests.numerics import assert_as_good_as_torch
from tests.ops.cases import EXTRAS, MASKS, Case, plain_attention

pytestmark = pytest.mark.skipif(native.shim(shared=True) is None, reason="no C++ compiler on this machine")
TABLE = {"tolerances": [0.0, 0.1, 0.3], "max_densities": [0.9, 0.9, 0.8], "sinks": [1, 0, 1], "local": [1, 1, 0],
         "singles": [6, 6, 2], "peaks": [0.0, 0.0, 2.0]}


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.shim(shared=True)))


def arguments_of(given: Arguments, case: Case) -> list:
    m = case.masks
    return [*map(given.tensor, case.qkv), ctypes.c_double(case.scale),
            *(given.optional(x, ctypes.c_int64) for x in (m.causal_offset, m.window)),
            *(given.optional(x, None) for x in (m.key_mask, m.query_documents, m.key_documents, m.attn_mask)),
            ctypes.c_double(m.softcap), given.optional(m.sink_logits, None)]


def call(name: str, *arguments) -> torch.Tensor:
    return returned(getattr(library(), f"aoti_torch_cpu_{name}"), *arguments)


def planned(case: Case, edges, shifts=None, protected=None) -> torch.Tensor:
    given = Arguments()
    columns = [part for name, column in TABLE.items() for part in given.column(
        column, ctypes.c_double if name in ("tolerances", "max_densities", "peaks") else ctypes.c_int64)]
    factors = ctypes.c_void_p()
    if shifts is not None:
        holder = ctypes.cast(given.column(shifts, ctypes.c_double)[0], ctypes.c_void_p)
        given.alive.append(holder)
        factors = ctypes.byref(holder)
    return call("planned_attention", *arguments_of(given, case), *given.column(edges, ctypes.c_int64), *columns,
                ctypes.c_int64(0), ctypes.c_int64(ops.VERSION), factors, ctypes.c_int64(len(shifts or ())),
                given.optional(protected, None))


def judge(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same kernels over the same lists: not a bit of difference; masks are averaged in another order."""
    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 if ours.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, torch.float32) for shape in [*MASKS, *EXTRAS]), (MASKS[1], torch.bfloat16), (MASKS[0], torch.float16),
    (EXTRAS[6], torch.bfloat16), (EXTRAS[11], torch.float16)], ids=str)
def test_the_shim_is_the_op(shape, dtype, poisoned_memory):
    device = torch.device("cpu")
    case = Case.random(torch.Generator(device).manual_seed(sum(map(ord, str(shape)))), device, *shape).to(dtype)
    for edges in ([0, case.k.shape[2] + 1], [0, case.k.shape[2]]):
        theirs = ops.planned_attention(*case.qkv, *case.arguments, edges, *TABLE.values(), 0, ops.VERSION)
        judge(planned(case, edges), theirs)
    exact = plain_attention(case.double())
    dense = planned(case, [10_000, 20_000])
    assert_as_good_as_torch(dense, plain_attention(case), exact, case.units)
    given = Arguments()
    assert torch.equal(call("exact_attention", *arguments_of(given, case), ctypes.c_int64(ops.VERSION)), dense)


def test_blocks_are_dropped(rng):
    """The twin of the above: at these lengths most lists are short."""
    case = Case.random(torch.Generator().manual_seed(0), torch.device("cpu"), 1500, 1700, 200, "left")
    dense, sparse = planned(case, [2000, 3000]), planned(case, [0, 1])
    assert float((dense - sparse).abs().max()) > 1e-3
    judge(sparse, ops.planned_attention(*case.qkv, *case.arguments, [0, 1], *TABLE.values(), 0, ops.VERSION))


def test_shifts_and_protected_keys(rng):
    case = Case.random(torch.Generator().manual_seed(1), torch.device("cpu"), 900, 900, 0, None)
    shifts = [1.0] * 8 + [0.5, 0.0, 0.3, 0.1]
    for protected in (None, torch.arange(900)[None] % 200 == 7, (torch.arange(900) % 200 == 7).expand(2, -1)):
        theirs = ops.planned_attention(*case.qkv, *case.arguments, [0, 1], *TABLE.values(), 0, ops.VERSION, shifts,
                                       protected)
        judge(planned(case, [0, 1], shifts, protected), theirs)


@pytest.mark.parametrize("length", [300, 1100])
def test_dense_buckets_lay_out_what_torch_gives(length):
    """Grouped heads, SDPA inside: repeated heads, and the output as the fake promises it."""
    rng = torch.Generator().manual_seed(length)
    for strided in (True, False):
        for heads in (1, 2, 4):
            case = Case.random(rng, torch.device("cpu"), length, length, 0, None, strided=strided)
            case = Case(case.q, *(x[:, :1].expand(-1, heads, -1, -1) for x in (case.k, case.v)), case.masks)
            exact = plain_attention(case.double())
            out = planned(case, [2000, 3000])
            assert_as_good_as_torch(out, plain_attention(case), exact, case.units)
            assert out.stride() == ops.planned_attention(*case.qkv, *case.arguments, [2000, 3000], *TABLE.values(), 0,
                                                         ops.VERSION).stride()


def test_what_it_cannot_run_is_an_error_not_a_crash(capfd):
    case = Case.random(torch.Generator().manual_seed(0), torch.device("cpu"), 130, 130, 0, "left").to(torch.float64)
    with pytest.raises(AssertionError):
        planned(case, [0, 1])
    assert "attention runs in float32" in capfd.readouterr().err
