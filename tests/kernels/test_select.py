"""Selection keeps what the float64 rule keeps, save blocks whose peak is within rounding of the tolerance."""

import pytest
import torch
from kernel_cases import Case, key_mask, qkv

from sparsify.kernels import blocks, oracle, rule
from sparsify.kernels.select import estimated_peaks, select_blocks
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
LARGE = [
    Case(1, 8, 2, 4096, 4096, 128, 128, 0),
    Case(2, 4, 1, 513, 9000, 64, 64, 9000 - 513),
    Case(1, 4, 4, 777, 5555, 128, 128, None),
    Case(2, 4, 2, 700, 2900, 80, 80, 2200, padding=True),
    Case(2, 6, 3, 1024, 500, 96, 96, -100),
]
RULE = {"sinks": 1, "local": 1}


def reference(q, k, case, mask, singles, scale):
    return oracle.peaks(oracle.estimated_shares(q, k, singles=singles, scale=scale, causal_offset=case.causal_offset,
                                                key_mask=mask))


def check(rng, case, dtype, *, tolerance, max_density=1.0, singles=6, off_by=0):
    q, k, _ = qkv(rng, case, dtype, spread=1.5)
    mask = key_mask(rng, case)
    scale = case.D**-0.5
    call = {"scale": scale, "key_mask": mask, "singles": singles,
            "causal_offset": case.causal_offset if not off_by else case.causal_offset + off_by}
    peaks = estimated_peaks(q, k, **call)
    exact = reference(q.double(), k.double(), case, mask, singles, scale)
    plain = reference(q, k, case, mask, singles, scale)
    error, band = judge(peaks, plain, exact, units=16)
    assert error <= band, f"peaks: error {error:.3g}, allowed {band:.3g}"

    lists = select_blocks(q, k, **call, tolerance=tolerance, max_density=max_density, **RULE)
    assert_lists_obey(lists, exact, band, case, mask, tolerance, max_density)


def assert_lists_obey(lists, exact, band, case, mask, tolerance, max_density):
    device = exact.device
    allowed = blocks.allowed_blocks(case.L, case.S, case.causal_offset, mask, device)
    boundary = blocks.boundary_blocks(case.L, case.S, case.causal_offset, device)
    forced = blocks.forced_blocks(allowed, boundary, **RULE)[:, None]
    allowed = allowed[:, None].expand_as(exact)
    kept = rule.unpack(lists, case.blocks)
    # The layout: exactly what `pack` makes of the same set, which the even fill has already evened out.
    repacked = rule.pack(kept, exact, allowed[:, 0])
    assert torch.equal(lists.kept, repacked.kept) and torch.equal(lists.counts, repacked.counts)

    surely = allowed & (forced | (exact >= tolerance + band))
    maybe = allowed & (forced | (exact >= tolerance - band))
    total = allowed.sum(-1, keepdim=True)
    may_be_full = maybe.sum(-1, keepdim=True) > max_density * total
    must_be_full = surely.sum(-1, keepdim=True) > max_density * total
    assert not (surely & ~kept).any(), "a block above the tolerance was dropped"
    assert not (must_be_full & allowed & ~kept).any(), "a row above max_density was not kept whole"
    extra = kept & ~maybe
    assert not (extra & ~allowed).any(), "a block was kept that no row may see"
    number = extra.sum(-1, keepdim=True)
    full = (kept == allowed).all(-1, keepdim=True) & may_be_full
    assert ((number <= 1) | full).all(), "more was kept than the rule and the even fill explain"
    best_left = torch.where(allowed & ~kept, exact, -1.0).amax(-1, keepdim=True)
    assert ((exact >= best_left - 2 * band) | ~extra).all(), "the even fill is not the best block left"


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_selection_follows_the_float64_rule(case, dtype, rng, poisoned_memory):
    check(rng, case, dtype, tolerance=0.1, max_density=0.7)


@pytest.mark.parametrize("singles", [0, 2])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 1.0])
def test_every_tolerance_and_number_of_singles(singles, tolerance, rng):
    check(rng, SMALL[4], torch.float32, tolerance=tolerance, singles=singles)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.01, 0.05])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_selection_follows_the_float64_rule(case, dtype, tolerance, rng, poisoned_memory):
    check(rng, case, dtype, tolerance=tolerance, max_density=0.8)


def test_wrong_offset_is_noticed(rng):
    """The twin: a boundary one key off is beyond the tolerance."""
    with pytest.raises(AssertionError):
        check(rng, SMALL[4], torch.float32, tolerance=0.1, off_by=-1)
