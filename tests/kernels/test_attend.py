"""The plain forward computes what the lists say, in every situation the op accepts."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_attention_is_right, assert_hidden_keys_do_not_matter, key_mask, qkv, random_lists

from sparsify.kernels import oracle
from sparsify.kernels.attend import block_sparse_attention
from sparsify.kernels.masks import Masks

SMALL = [
    Case(1, 2, 1, 200, 300, 40, 24, 100),  # odd dims, prefix, ragged
    Case(2, 2, 2, 130, 65, 16, 16, -70),  # rows that see nothing
    Case(1, 2, 1, 129, 200, 64, 64, None),
    Case(1, 1, 1, 1, 1, 32, 32, 0),
    Case(1, 2, 1, 150, 150, 32, 16, 0),  # top-left, D != Dv
    Case(2, 2, 1, 70, 333, 32, 16, 263, padding=True),
    Case(2, 1, 1, 129, 100, 16, 32, None, padding=True),
]
MASKED = [
    Case(1, 2, 1, 200, 300, 40, 24, 100, extras=(90,)),
    Case(2, 2, 1, 150, 150, 16, 16, 30, padding=True, extras=(61, "sinks")),
    Case(1, 2, 1, 129, 200, 16, 16, None, extras=("documents",)),
    Case(2, 2, 1, 70, 333, 16, 16, 263, padding=True, extras=("bias", "cap")),
    Case(1, 2, 2, 130, 190, 16, 16, None, extras=("alibi", "sinks")),
    Case(2, 2, 2, 130, 190, 16, 16, -70, extras=(100, "documents", "bool", "cap", "sinks")),
]
LARGE = [
    Case(1, 8, 2, 1000, 1000, 128, 128, 0),
    Case(2, 4, 1, 513, 2048, 64, 64, 2048 - 513),
    Case(1, 4, 4, 777, 1555, 256, 256, None),
    Case(1, 4, 2, 300, 900, 80, 96, 600, padding=True),
    Case(2, 6, 3, 1024, 500, 96, 16, -100),
    Case(1, 4, 2, 2000, 2000, 128, 128, 0, extras=(700, "sinks")),
    Case(2, 4, 2, 900, 900, 64, 64, 0, extras=("documents", "cap")),
    Case(2, 4, 4, 513, 777, 128, 128, None, padding=True, extras=("bias",)),
    Case(2, 4, 1, 600, 1111, 256, 256, 511, padding=True, extras=(400, "documents", "bool", "cap", "sinks")),
]


@pytest.mark.parametrize("case", [*SMALL, *MASKED], ids=str)
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


@pytest.mark.parametrize(("case", "changed"), [
    (SMALL[4], {"causal_offset": -1}),
    (MASKED[0], {"window": 89}),
    (MASKED[2], {"query_documents": None, "key_documents": None}),
    (MASKED[3], {"attn_mask": None}),
    (MASKED[3], {"softcap": 0.0}),
    (MASKED[4], {"sink_logits": None}),
], ids=str)
def test_a_wrong_mask_is_noticed(case, changed, rng):
    """The twin: whatever is left out is beyond the tolerance, and so is one key more or less."""
    def wrong(q, k, v, kept, counts, *, masks, **call):
        return block_sparse_attention(q, k, v, kept, counts, masks=replace(masks, **changed), **call)
    with pytest.raises(AssertionError, match="error"):
        assert_attention_is_right(wrong, rng, case, torch.float32, density=1.0)


def test_padding_keys_may_hold_anything(rng):
    assert_hidden_keys_do_not_matter(block_sparse_attention, rng, SMALL[5], torch.float32)


def test_one_mask_serves_the_whole_batch(rng):
    case = Case(2, 1, 1, 64, 130, 16, 16, None, padding=True)
    q, k, v = qkv(rng, case, torch.float32)
    mask = key_mask(rng, case)[:1]
    masks = Masks(key_mask=mask)
    lists = random_lists(rng, case, masks, 1.0)
    out, _ = block_sparse_attention(q, k, v, *lists, scale=0.3, masks=masks)
    exact, _ = oracle.attention(q.double(), k.double(), v.double(), scale=0.3, key_mask=mask)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
