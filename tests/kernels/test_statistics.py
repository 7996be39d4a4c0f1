"""Split summaries: the m farthest keys word for word, mean and variance of the others to rounding."""

import pytest
import torch
from kernel_cases import Case, key_mask, qkv

from sparsify.kernels import oracle
from sparsify.kernels.statistics import summarise_keys
from tests.numerics import assert_as_good_as_torch

SMALL = [Case(1, 2, 2, 1, 200, 40, 16, None), Case(2, 1, 1, 1, 65, 16, 16, None), Case(1, 1, 1, 1, 1, 64, 16, None),
         Case(2, 2, 2, 1, 150, 128, 16, None, padding=True)]
LARGE = [Case(2, 8, 8, 1, 5001, 128, 16, None), Case(3, 4, 4, 1, 777, 96, 16, None, padding=True)]


def check(rng, case, dtype, singles):
    k = qkv(rng, case, dtype)[1]
    mask = key_mask(rng, case)
    ours = summarise_keys(k, singles, mask)
    plain = oracle.summarise_keys(k, singles, mask)
    exact = oracle.summarise_keys(k.double(), singles, mask)
    assert torch.equal(ours.single_count, exact.single_count)
    assert torch.equal(ours.rest_count, exact.rest_count)
    if singles:
        # Keys as far as each other (two visible keys are) may swap places.
        assert torch.equal(ours.singles.double().sort(2).values, exact.singles.sort(2).values)
    assert_as_good_as_torch(ours.mean, plain.mean, exact.mean)
    assert_as_good_as_torch(ours.variance, plain.variance, exact.variance)


@pytest.mark.parametrize("singles", [0, 2, 6])
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_summaries_are_as_good_as_torch(case, dtype, singles, rng, poisoned_memory):
    check(rng, case, dtype, singles)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_summaries_are_as_good_as_torch(case, dtype, rng, poisoned_memory):
    check(rng, case, dtype, singles=6)
