"""The Hopper forward computes what the lists say, and says which calls it does not cover."""

import pytest
import torch
from kernel_cases import Case, assert_attention_is_right, qkv

from sparsify.kernels.hopper import block_sparse_attention, why_not
from sparsify.kernels.masks import Masks

on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
                               reason="needs a Hopper GPU")
CASES = [
    Case(1, 4, 1, 1024, 1024, 128, 128, 0),
    Case(2, 4, 2, 1000, 1000, 128, 128, 0),  # ragged ends: no row of another head may leak in
    Case(2, 4, 2, 777, 1555, 64, 64, 1555 - 777),  # odd prefix: three blocks under the diagonal
    Case(1, 2, 2, 640, 704, 128, 128, 64),  # an odd number of allowed blocks: a padding id behind the diagonal
    Case(1, 2, 1, 300, 200, 64, 64, -150),  # rows that see nothing
    Case(1, 2, 1, 500, 70, 128, 128, None),
    Case(3, 4, 4, 129, 2049, 64, 64, None),
    Case(1, 32, 8, 4096, 4096, 128, 128, 0),  # more query blocks than programs
    Case(1, 1, 1, 1, 1, 128, 128, 0),
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forward_is_as_good_as_torch(case, dtype, density, rng, poisoned_memory):
    q, k, v = qkv(rng, case, dtype)
    assert why_not(q, k, v, Masks(case.causal_offset)) is None
    assert_attention_is_right(block_sparse_attention, rng, case, dtype, density, scale=case.D**-0.5)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_may_have_any_sign(scale, rng):
    assert_attention_is_right(block_sparse_attention, rng, CASES[1], torch.float16, density=0.5, scale=scale)


@pytest.mark.gpu
@on_hopper
def test_wrong_offset_is_noticed(rng):
    """The twin: one key more or less on the diagonal is beyond the tolerance."""
    def one_off(q, k, v, kept, counts, *, masks, **call):
        return block_sparse_attention(q, k, v, kept, counts, masks=Masks(masks.causal_offset - 1), **call)
    with pytest.raises(AssertionError, match="error"):
        assert_attention_is_right(one_off, rng, CASES[1], torch.float16, density=0.5)


@pytest.mark.gpu
@on_hopper
def test_what_is_not_covered_is_said(rng, device):
    q, k, v = qkv(rng, Case(1, 2, 1, 64, 64, 64, 64, 0), torch.float16)
    assert "float32" in why_not(q.float(), k.float(), v.float(), Masks(0))
    assert "head dims" in why_not(q[..., :32], k[..., :32], v[..., :32], Masks(0))
    assert "masked" in why_not(q, k, v, Masks(0, key_mask=torch.ones(1, 64, dtype=torch.bool, device=device)))
    ids = torch.zeros(1, 64, dtype=torch.int64, device=device)
    for more in (Masks(0, window=9), Masks(0, softcap=5.0), Masks(query_documents=ids, key_documents=ids),
                 Masks(0, attn_mask=q[:, :1, :, :1]), Masks(0, sink_logits=q[0, :, 0, 0])):
        assert "more than causality" in why_not(q, k, v, more)
    assert "k has strides" in why_not(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, Masks(0))


def test_other_devices_are_refused():
    q = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    assert why_not(q, q, q, Masks(0)) == "the device is not a Hopper GPU"
