"""Selection keeps what the float64 rule keeps, save blocks whose peak is within rounding of the tolerance."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import RULE, Case, assert_lists_obey, draw_masks, named, qkv

from sparsify.kernels import oracle, select
from sparsify.kernels.blocks import protected_blocks
from sparsify.kernels.select import estimated_peaks, runs_on_hopper, select_blocks
from tests.numerics import judge

SMALL = [
    Case(1, 2, 1, 200, 300, 40, 40, 100),
    Case(2, 2, 2, 130, 65, 16, 16, -70),
    Case(1, 2, 1, 129, 200, 64, 64, None),
    Case(1, 1, 1, 1, 1, 32, 32, 0),
    Case(1, 2, 1, 257, 1000, 16, 16, 743),
    Case(2, 2, 1, 70, 333, 32, 32, 263, padding=True),
    Case(1, 1, 1, 40, 4200, 16, 16, None),  # more than one chunk of key blocks
]
MASKED = [
    Case(1, 2, 1, 200, 500, 16, 16, 300, extras=(170,)),
    Case(1, 2, 1, 257, 700, 16, 16, 443, extras=(330, "cap", "sinks")),
    Case(2, 2, 1, 200, 333, 16, 16, None, padding=True, extras=("documents",)),
    Case(2, 2, 2, 130, 400, 16, 16, 270, padding=True, extras=("bias", "cap")),
    Case(1, 2, 1, 70, 1300, 16, 16, None, extras=("alibi", "sinks")),
    Case(2, 2, 1, 300, 200, 16, 16, -100, extras=(150, "documents", "bool", "cap", "sinks")),
]
LARGE = [
    Case(1, 8, 2, 4096, 4096, 128, 128, 0),
    Case(2, 4, 1, 513, 9000, 64, 64, 9000 - 513),
    Case(1, 4, 4, 777, 5555, 128, 128, None),
    Case(2, 4, 2, 700, 2900, 80, 80, 2200, padding=True),
    Case(2, 6, 3, 1024, 500, 96, 96, -100),
    Case(1, 4, 2, 2000, 5000, 128, 128, 3000, extras=(1500, "sinks")),
    Case(2, 4, 2, 900, 2900, 64, 64, None, padding=True, extras=("documents", "cap")),
    Case(2, 4, 4, 513, 2777, 128, 128, None, extras=("bias",)),
]


def draw_protected(rng, case):
    """A few keys of each batch row, [B, keys]; more in the second half."""
    luck = torch.rand(case.B, case.S, generator=rng, device=rng.device)
    return luck > torch.linspace(0.998, 0.99, case.S, device=rng.device)


def reference(q, k, masks, singles, scale):
    return oracle.peaks(oracle.estimated_shares(q, k, singles=singles, scale=scale, **named(masks)))


def check(rng, case, dtype, *, tolerance, max_density=1.0, singles=6, shifts=None, protected=None, told=None,
          **changed):
    """`changed` fields of the masks, and what is `told`, are what the kernel gets instead of the truth."""
    q, k, _ = qkv(rng, case, dtype, spread=1.5)
    masks = draw_masks(rng, case)
    scale = case.D**-0.5
    call = {"scale": scale, "masks": replace(masks, **changed), "singles": singles}
    peaks = estimated_peaks(q, k, **call)
    exact = reference(q.double(), k.double(), masks, singles, scale)
    plain = reference(q, k, masks, singles, scale)
    error, band = judge(peaks.to(dtype), plain.to(dtype), exact, units=16)
    assert error <= band, f"peaks: error {error:.3g}, allowed {band:.3g}"

    if runs_on_hopper(q, k, masks, singles):  # in eight bits: test_hopper_select.py
        return
    given = {"shifts": shifts, "protected": None if protected is None else protected_blocks(protected)} | (told or {})
    lists = select_blocks(q, k, **call, tolerance=tolerance, max_density=max_density, **RULE, **given)
    if shifts is not None:
        tolerance = tolerance * torch.tensor(shifts, device=q.device)[:, None, None]
    assert_lists_obey(lists, exact, band, case, masks, tolerance, max_density, protected)


@pytest.mark.parametrize("case", [*SMALL, *MASKED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_selection_follows_the_float64_rule(case, dtype, rng, poisoned_memory):
    check(rng, case, dtype, tolerance=0.1, max_density=0.7)


@pytest.mark.parametrize("singles", [0, 2])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 1.0])
def test_every_tolerance_and_number_of_singles(singles, tolerance, rng):
    check(rng, SMALL[4], torch.float32, tolerance=tolerance, singles=singles)


@pytest.mark.parametrize("case", [SMALL[4], SMALL[5], MASKED[0], MASKED[2]], ids=str)
def test_shifts_and_protected_keys_are_part_of_the_rule(case, rng, poisoned_memory):
    protected = draw_protected(rng, case)
    check(rng, case, torch.float32, tolerance=0.3, shifts=[1.0, 0.1], protected=protected)
    check(rng, case, torch.float32, tolerance=0.3, shifts=[0.0, 0.5], protected=protected[:1], max_density=0.7)


@pytest.mark.parametrize(("case", "width"), [(SMALL[4], 4), (SMALL[5], 4), (MASKED[2], 2), (SMALL[6], 32)], ids=str)
@pytest.mark.parametrize("max_density", [0.6, 1.0])
def test_lists_are_packed_some_blocks_at_a_time(case, width, max_density, rng, poisoned_memory, monkeypatch):
    """One kernel for every length: lists longer than its width are the same."""
    monkeypatch.setattr(select, "PACK_WIDTH", width)
    check(rng, case, torch.float32, tolerance=0.2, max_density=max_density)
    check(rng, case, torch.float32, tolerance=0.3, shifts=[1.0, 0.1][:case.H], protected=draw_protected(rng, case))


@pytest.mark.parametrize("told", [{"shifts": None}, {"shifts": [0.1, 1.0]}, {"protected": None}], ids=str)
def test_forgotten_shifts_and_protected_keys_are_noticed(told, rng):
    """The twin: uniform, the heads exchanged, nothing protected."""
    with pytest.raises(AssertionError):
        check(rng, SMALL[4], torch.float32, tolerance=0.3, shifts=[1.0, 0.02],
              protected=draw_protected(rng, SMALL[4]), told=told)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[3], LARGE[6]], ids=str)
def test_large_shifts_and_protected_keys(case, rng, poisoned_memory):
    shifts = [1 - i / case.H for i in range(case.H)]
    check(rng, case, torch.float32, tolerance=0.05, shifts=shifts, protected=draw_protected(rng, case), max_density=0.8)


@pytest.mark.gpu
def test_shifts_and_protected_keys_run_in_a_cuda_graph(rng, device):
    """Nothing waits or is copied from the host, also at the first call, and the mask is read at each replay."""
    case = LARGE[0]
    q, k, _ = qkv(rng, case, torch.bfloat16, spread=1.5)
    call = {"scale": case.D**-0.5, "masks": draw_masks(rng, case), "singles": 6, "tolerance": 0.05, "max_density": 0.9,
            **RULE}
    select_blocks(q, k, **call, shifts=[0.9] * case.H, protected=protected_blocks(draw_protected(rng, case)))
    flags = protected_blocks(draw_protected(rng, case))
    shifts = [0.3 + 0.05 * i for i in range(case.H)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = select_blocks(q, k, **call, shifts=shifts, protected=flags)
    for _ in range(2):
        flags.copy_(protected_blocks(draw_protected(rng, case)))
        graph.replay()
        expected = select_blocks(q, k, **call, shifts=shifts, protected=flags)
        assert torch.equal(lists.kept, expected.kept) and torch.equal(lists.counts, expected.counts)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.01, 0.05])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_selection_follows_the_float64_rule(case, dtype, tolerance, rng, poisoned_memory):
    check(rng, case, dtype, tolerance=tolerance, max_density=0.8)


@pytest.mark.parametrize(("case", "changed"), [
    (SMALL[4], {"causal_offset": 742}),
    (MASKED[0], {"window": 169}),
    (MASKED[1], {"softcap": 0.0}),
    (MASKED[1], {"sink_logits": None}),
    (MASKED[2], {"query_documents": None, "key_documents": None}),
    (MASKED[3], {"attn_mask": None}),
], ids=str)
def test_a_wrong_mask_is_noticed(case, changed, rng):
    """The twin: whatever is left out is beyond the tolerance, and so is a boundary one key off."""
    with pytest.raises(AssertionError):
        check(rng, case, torch.float32, tolerance=0.1, **changed)
