"""The plain forward computes what the lists say, in every situation the op accepts."""

import pytest
import torch
from kernel_cases import Case, assert_attention_is_right, key_mask, qkv, random_lists

from sparsify.kernels import oracle
from sparsify.kernels.attend import block_sparse_attention

SMALL = [
    Case(1, 2, 1, 200, 300, 40, 24, 100),  # odd dims, prefix, ragged
    Case(2, 2, 2, 130, 65, 16, 16, -70),  # rows that see nothing
    Case(1, 2, 1, 129, 200, 64, 64, None),
    Case(1, 1, 1, 1, 1, 32, 32, 0),
    Case(1, 2, 1, 150, 150, 32, 16, 0),  # top-left, D != Dv
    Case(2, 2, 1, 70, 333, 32, 16, 263, padding=True),
    Case(2, 1, 1, 129, 100, 16, 32, None, padding=True),
]
LARGE = [
    Case(1, 8, 2, 1000, 1000, 128, 128, 0),
    Case(2, 4, 1, 513, 2048, 64, 64, 2048 - 513),
    Case(1, 4, 4, 777, 1555, 256, 256, None),
    Case(1, 4, 2, 300, 900, 80, 96, 600, padding=True),
    Case(2, 6, 3, 1024, 500, 96, 16, -100),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_forward_is_as_good_as_torch(case, dtype, rng, poisoned_memory):
    assert_attention_is_right(block_sparse_attention, rng, case, dtype, density=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_forward_is_as_good_as_torch(case, dtype, density, rng, poisoned_memory):
    assert_attention_is_right(block_sparse_attention, rng, case, dtype, density, scale=case.D**-0.5)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scale_may_have_any_sign(scale, rng):
    assert_attention_is_right(block_sparse_attention, rng, SMALL[0], torch.float32, density=0.5, scale=scale)


def test_wrong_offset_is_noticed(rng):
    """The twin: one key more or less on the diagonal is beyond the tolerance."""
    def one_off(q, k, v, kept, counts, *, causal_offset, **call):
        return block_sparse_attention(q, k, v, kept, counts, causal_offset=causal_offset - 1, **call)
    with pytest.raises(AssertionError, match="error"):
        assert_attention_is_right(one_off, rng, SMALL[4], torch.float32, density=0.5)


def test_padding_keys_may_hold_anything(rng):
    """Keys and values behind the mask are garbage in practice; the output does not move."""
    case = SMALL[5]
    q, k, v = qkv(rng, case, torch.float32)
    mask = key_mask(rng, case)
    lists = random_lists(rng, case, mask, 0.5)
    call = {"scale": 0.3, "causal_offset": case.causal_offset, "key_mask": mask}
    before = block_sparse_attention(q, k, v, *lists, **call)
    hidden = ~mask[:, None, :, None]
    after = block_sparse_attention(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), *lists, **call)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_one_mask_serves_the_whole_batch(rng):
    case = Case(2, 1, 1, 64, 130, 16, 16, None, padding=True)
    q, k, v = qkv(rng, case, torch.float32)
    mask = key_mask(rng, case)[:1]
    call = {"scale": 0.3, "causal_offset": None, "key_mask": mask}
    lists = random_lists(rng, case, mask, 1.0)
    out, _ = block_sparse_attention(q, k, v, *lists, **call)
    exact, _ = oracle.attention(q.double(), k.double(), v.double(), **call)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
