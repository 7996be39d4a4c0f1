"""True peaks are the oracle's, under every mask, some query blocks at a time."""

import pytest
import torch
from kernel_cases import Case, draw_masks, named, qkv

from sparsify.kernels import oracle, true_peaks
from sparsify.kernels.blocks import QUERY_BLOCK, count_blocks

CASES = [
    Case(1, 2, 1, 300, 300, 16, 16, 0),
    Case(1, 2, 2, 129, 500, 16, 16, 371),
    Case(2, 2, 1, 200, 333, 16, 16, None, padding=True),
    Case(1, 2, 1, 300, 200, 16, 16, -100),
    Case(1, 2, 1, 200, 500, 16, 16, 300, extras=(170,)),
    Case(2, 4, 2, 300, 333, 16, 16, 33, padding=True, extras=("documents", "cap", "sinks")),
    Case(2, 2, 2, 130, 400, 16, 16, 270, padding=True, extras=("bias",)),
    Case(1, 2, 1, 70, 300, 16, 16, None, extras=("alibi", "bool")),
    Case(1, 1, 1, 1, 1, 16, 16, 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("workspace", [1, 1 << 30])
def test_peaks_and_mass_are_the_oracles(case, workspace, rng, monkeypatch, poisoned_memory):
    monkeypatch.setattr(true_peaks, "WORKSPACE", {"cpu": workspace, "cuda": workspace})
    q, k, _ = qkv(rng, case, torch.float32)
    masks = draw_masks(rng, case)
    peaks, mass = true_peaks.true_peaks(q, k, scale=0.3, masks=masks)
    shares = oracle.true_shares(q.double(), k.double(), scale=0.3, **named(masks))
    torch.testing.assert_close(peaks.double(), oracle.peaks(shares), atol=1e-5, rtol=1e-4)
    pad = count_blocks(case.L, QUERY_BLOCK) * QUERY_BLOCK - case.L
    rows = torch.nn.functional.pad(shares, (0, 0, 0, pad), value=torch.nan).unflatten(2, (-1, QUERY_BLOCK))
    torch.testing.assert_close(mass.double(), rows.nanmean(3), atol=1e-5, rtol=1e-4)


def test_half_precision_is_computed_in_float32(rng):
    case = Case(1, 2, 1, 300, 300, 16, 16, 0)
    q, k, _ = qkv(rng, case, torch.float16, spread=3.0)
    masks = draw_masks(rng, case)
    peaks, _ = true_peaks.true_peaks(q, k, scale=0.3, masks=masks)
    expected = oracle.peaks(oracle.true_shares(q.double(), k.double(), scale=0.3, **named(masks)))
    torch.testing.assert_close(peaks.double(), expected, atol=1e-5, rtol=1e-4)
