"""The Hopper forward computes what the lists say, and says which calls it does not cover."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    Case,
    assert_attention_is_right,
    assert_hidden_keys_do_not_matter,
    draw_masks,
    on_hopper,
    qkv,
)

from sparsify.kernels.hopper import attention, block_sparse_attention
from sparsify.kernels.hopper_coverage import why_not
from sparsify.kernels.masks import Masks

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
MASKED = [
    Case(2, 4, 1, 1000, 1000, 128, 128, 0, padding=True),
    Case(2, 4, 2, 513, 777, 128, 128, None, padding=True),
    Case(1, 4, 1, 1000, 1000, 128, 128, 0, extras=(300,)),
    Case(1, 2, 2, 300, 200, 128, 128, -60, extras=(1,)),  # one key a row, or none
    Case(1, 16, 1, 777, 1555, 64, 64, 778, extras=(701, "sinks")),
    Case(2, 4, 2, 900, 900, 128, 128, 0, extras=("documents",)),
    Case(2, 4, 4, 513, 777, 128, 128, None, extras=("documents",)),
    Case(2, 4, 4, 513, 777, 64, 64, 264, padding=True, extras=(200, "documents", "cap", "sinks")),
    Case(1, 32, 2, 2000, 2000, 128, 128, 0, extras=("sinks",)),  # more query blocks than programs
    Case(1, 2, 1, 300, 200, 128, 128, -150, extras=("sinks",)),  # rows that see a sink and nothing else
    Case(1, 4, 4, 1000, 1000, 128, 128, 0, extras=("cap",)),
    Case(2, 4, 2, 513, 778, 128, 128, None, padding=True, extras=("bias",)),  # even rows: read in pairs
    Case(1, 32, 8, 1111, 1111, 128, 128, 0, extras=("alibi",)),
    Case(2, 4, 2, 600, 1111, 64, 64, 511, extras=("bool",)),
    Case(1, 2, 2, 300, 300, 128, 128, None, extras=("rows",)),
    Case(2, 4, 1, 600, 1111, 128, 128, 511, padding=True, extras=(400, "documents", "bool", "cap", "sinks")),
    Case(2, 4, 1, 300, 200, 128, 128, -100, padding=True, extras=(150, "documents", "bias", "cap", "sinks")),
]
HEAD_DIMS = [
    Case(1, 4, 2, 1000, 1000, 96, 96, 0),
    Case(2, 2, 1, 300, 500, 40, 80, 200),
    Case(1, 4, 1, 777, 1000, 192, 128, 223),
    Case(1, 32, 4, 1100, 1100, 192, 128, 0),  # more query blocks than programs
    Case(2, 4, 2, 1000, 1000, 256, 256, 0),
    Case(1, 32, 8, 1100, 1200, 256, 256, 100),  # more query blocks than programs
    Case(1, 2, 1, 300, 200, 256, 256, -150),
    Case(1, 2, 2, 129, 300, 64, 200, None),
    Case(1, 1, 1, 1, 1, 256, 256, 0),
    Case(2, 4, 2, 513, 777, 256, 256, 264, padding=True, extras=(200, "documents", "cap", "sinks")),
    Case(2, 4, 1, 300, 200, 256, 256, -100, padding=True, extras=(150, "documents", "bool", "cap", "sinks")),
]
# One dtype each: every case is a compilation.
MIXED = [(case, (torch.bfloat16, torch.float16)[i % 2]) for i, case in enumerate([*MASKED, *HEAD_DIMS])]


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
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(("case", "dtype"), MIXED, ids=str)
def test_masks_and_head_dims(case, dtype, density, rng, poisoned_memory):
    assert why_not(*qkv(rng, case, dtype), draw_masks(rng, case)) is None
    assert_attention_is_right(block_sparse_attention, rng, case, dtype, density, scale=case.D**-0.5)


def attend_all(q, k, v, kept, counts, *, scale, masks):
    """Exact attention where others take lists."""
    return attention(q, k, v, scale=scale, masks=masks)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.bfloat16) for case in CASES), *MIXED], ids=str)
def test_the_walk_over_all_blocks_needs_no_lists(case, dtype, rng, poisoned_memory):
    assert_attention_is_right(attend_all, rng, case, dtype, 1.0, scale=case.D**-0.5)


@pytest.mark.gpu
@on_hopper
def test_the_walk_drops_nothing(rng):
    """The twin: lists that drop blocks give something else."""
    with pytest.raises(AssertionError):
        assert_attention_is_right(attend_all, rng, CASES[7], torch.bfloat16, 0.3, scale=0.3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("side", ["left", "right", "all"])
@pytest.mark.parametrize("batch", [1, 2])
def test_padding_leaves_most_blocks_whole(side, batch, rng, poisoned_memory):
    """Only the block in which padding ends is masked; one mask may serve the whole batch."""
    case = Case(2, 4, 2, 700, 1000, 128, 128, 300)
    shown = torch.ones(batch, case.S, dtype=torch.bool, device=rng.device)
    shown[-1, {"left": slice(0, 333), "right": slice(871, None), "all": slice(None)}[side]] = False
    masks = Masks(case.causal_offset, key_mask=shown)
    assert_attention_is_right(block_sparse_attention, rng, case, torch.bfloat16, 0.5, case.D**-0.5, masks)


@pytest.mark.gpu
@on_hopper
def test_masks_may_lie_anywhere_in_memory(rng, poisoned_memory):
    """Every second key of a wider mask, and ids that differ in their upper halves alone."""
    case = Case(2, 4, 2, 300, 500, 128, 128, 200)
    shown = torch.rand(2, 2 * case.S, generator=rng, device=rng.device)[:, ::2] > 0.2
    rows, keys = (torch.arange(length, device=rng.device)[None] // 130 << 32 for length in (case.L, case.S))
    masks = Masks(case.causal_offset, key_mask=shown, query_documents=rows, key_documents=keys.expand(2, -1))
    assert_attention_is_right(block_sparse_attention, rng, case, torch.float16, 0.5, case.D**-0.5, masks)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("first", [1, 2])  # at odd addresses element by element, at even ones in pairs
def test_rows_of_a_mask_may_begin_anywhere(first, rng, poisoned_memory):
    case = Case(2, 4, 2, 300, 500, 128, 128, None)
    shown = torch.rand(2, 1, case.L, case.S + 2, generator=rng, device=rng.device) > 0.3
    masks = Masks(attn_mask=shown[..., first: first + case.S])
    assert_attention_is_right(block_sparse_attention, rng, case, torch.bfloat16, 0.5, case.D**-0.5, masks)


@pytest.mark.gpu
@on_hopper
def test_hidden_keys_may_hold_anything(rng):
    assert_hidden_keys_do_not_matter(block_sparse_attention, rng, MASKED[0], torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_may_have_any_sign(scale, rng):
    assert_attention_is_right(block_sparse_attention, rng, CASES[1], torch.float16, density=0.5, scale=scale)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("case", "changed"), [
    (CASES[1], lambda masks: {"causal_offset": masks.causal_offset - 1}),
    (MASKED[0], lambda masks: {"key_mask": masks.key_mask.roll(1, 1)}),
    (MASKED[2], lambda masks: {"window": masks.window + 1}),
    (MASKED[5], lambda masks: {"key_documents": masks.key_documents.roll(1, 1)}),
    (MASKED[8], lambda masks: {"sink_logits": masks.sink_logits + 0.1}),
    (MASKED[10], lambda masks: {"softcap": masks.softcap * 1.01}),
    (MASKED[12], lambda masks: {"attn_mask": masks.attn_mask.roll(1, 1)}),
    (MASKED[13], lambda masks: {"attn_mask": masks.attn_mask.mT.roll(1, 2).mT}),
], ids=["offset", "key mask", "window", "documents", "sinks", "cap", "bias", "bool"])
def test_a_wrong_mask_is_noticed(case, changed, rng):
    """The twin: one key more or less is beyond the tolerance."""
    def wrong(q, k, v, kept, counts, *, masks, **call):
        return block_sparse_attention(q, k, v, kept, counts, masks=replace(masks, **changed(masks)), **call)
    with pytest.raises(AssertionError, match="error"):
        assert_attention_is_right(wrong, rng, case, torch.bfloat16, density=0.5)


@pytest.mark.gpu
@on_hopper
def test_what_is_not_covered_is_said(rng):
    q, k, v = qkv(rng, Case(1, 2, 1, 64, 64, 64, 64, 0), torch.float16)
    assert "float32" in why_not(q.float(), k.float(), v.float(), Masks(0))
    assert "head dims" in why_not(q, k, v[..., :20], Masks(0))
    wide = q.new_zeros(1, 2, 64, 264)
    assert "head dims" in why_not(wide, wide, v, Masks(0))
    assert "k has strides" in why_not(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, Masks(0))


def test_other_devices_are_refused():
    q = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    assert why_not(q, q, q, Masks(0)) == "the device is not a Hopper GPU"
