"""Launches from C++ give what launches from Python do, to the last bit: they are of the same kernels."""

import pytest
import torch
from kernel_cases import RULE, Case, assert_attention_is_right, draw_masks, on_hopper, qkv, random_lists
from test_splits import HOPPER, HOPPER_MASKED

from sparsify.kernels import hopper, hopper_native, select, splits

pytestmark = [pytest.mark.gpu, on_hopper]
BUDGET = {"scale": 0.1, "tolerance": 0.02, "max_density": 0.9, "singles": 6, **RULE}
CASES = [
    Case(1, 8, 2, 4096, 4096, 128, 128, 0),
    Case(2, 16, 1, 513, 9000, 64, 64, 9000 - 513),
    Case(1, 40, 4, 777, 5555, 128, 128, None),
    Case(2, 36, 3, 1024, 500, 128, 128, -100),  # rows that see nothing
    Case(1, 80, 1, 129, 65, 64, 64, 0),
    Case(4, 20, 2, 700, 2900, 128, 64, 2200, padding=True),
    Case(3, 24, 4, 513, 1500, 64, 128, None, padding=True),
    Case(1, 4, 2, 300, 9000, 128, 128, 8700),  # lists are cut from here on
    Case(2, 2, 1, 700, 5000, 64, 80, None, padding=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_from_c_are_those_of_python(case, dtype, rng, poisoned_memory, monkeypatch):
    q, k, v = qkv(rng, case, dtype)
    masks = draw_masks(rng, case)
    assert masks.is_plain and (hopper._units_for(q, k) > 0) == (case in CASES[-2:])
    results = []
    for by_python in (False, True):
        if by_python:
            monkeypatch.setattr(hopper_native, "_find", lambda kernels: None)
        lists = select.select_blocks(q, k, masks=masks, **BUDGET)
        results.append((*lists, *hopper.block_sparse_attention(q, k, v, *lists, scale=0.1, masks=masks),
                        *hopper.attention(q, k, v, scale=0.1, masks=masks)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert not any(results[0][i].isnan().any() for i in (2, 4))


PLAIN = [case for case in (*HOPPER, *HOPPER_MASKED) if not case.extras and max(case.D, case.Dv) <= 128]


@pytest.fixture
def short_lists_are_cut(monkeypatch):
    monkeypatch.setattr(splits, "FEWEST_KEY_BLOCKS", 0)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_pieces_from_c_are_those_of_python(case, density, short_lists_are_cut, rng, poisoned_memory, monkeypatch):
    q, k, v = qkv(rng, case, torch.float16)
    masks = draw_masks(rng, case)
    assert hopper._units_for(q, k) > 0
    lists = random_lists(rng, case, masks, density)
    ours = hopper.block_sparse_attention(q, k, v, *lists, scale=0.1, masks=masks)
    monkeypatch.setattr(hopper_native, "attend", lambda *args, **call: False)
    theirs = hopper.block_sparse_attention(q, k, v, *lists, scale=0.1, masks=masks)
    assert all(map(torch.equal, ours, theirs)) and not ours[0].isnan().any()


@pytest.mark.parametrize("case", [*CASES, *PLAIN], ids=str)
def test_attention_from_c_is_as_good_as_torch(case, short_lists_are_cut, rng, poisoned_memory, monkeypatch):
    monkeypatch.setattr(hopper, "kind_of", lambda *args: pytest.fail("launched from Python"))
    assert_attention_is_right(hopper.block_sparse_attention, rng, case, torch.bfloat16, 0.4, scale=case.D**-0.5)


def test_calls_that_c_does_not_launch_fall_back(rng):
    q, k, _ = qkv(rng, CASES[0], torch.bfloat16)
    given = {"masks": draw_masks(rng, CASES[0]), **BUDGET}
    assert hopper_native.select_blocks(q, k, **given) is not None
    odd = torch.empty(*k.shape[:3], 136, device=k.device, dtype=k.dtype)[..., :128].copy_(k)  # strides of 8 elements
    assert hopper_native.select_blocks(q, odd, **given) is None
    assert all(map(torch.equal, select.select_blocks(q, odd, **given), select.select_blocks(q, k, **given)))
    assert hopper_native.select_blocks(q, k, **{**given, "scale": -0.1}) is None
