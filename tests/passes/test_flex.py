"""flex_attention is rewritten where its mods can be read, and left whole with the reason where they cannot."""

import pytest
import torch
from graphs import capture, qkv, rewritten
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention

LENGTH = 40
documents = torch.tensor([0] * 10 + [1] * 21 + [2] * 9)
slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
table = torch.randn(4, 2 * LENGTH)


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q >= k) & (q - k < 8)


def one_document(b, h, q, k):
    return documents[q] == documents[k]


def capped(score, b, h, q, k):
    return 20 * torch.tanh(score / 20)


def capped_below_zero(score, b, h, q, k):
    return -20 * torch.tanh(score / 20)


def alibi(score, b, h, q, k):
    return score + slopes[h] * (k - q)


def relative(score, b, h, q, k):
    return score + table[h, q - k + LENGTH]


def relative_row_by_row(score, b, h, q, k):
    return score + table[h][q - k + LENGTH]


def attend(mask_mod=None, score_mod=None, **options):
    def function(q, k, v):
        lengths = q.shape[2], k.shape[2]
        blocks = None if mask_mod is None else create_block_mask(mask_mod, None, None, *lengths, device="cpu")
        return flex_attention(q, k, v, score_mod, blocks, **options)

    return function


@pytest.mark.parametrize("mask_mod, score_mod", [
    (None, None), (causal, None), (and_masks(window, one_document), None), (None, capped), (None, capped_below_zero),
    (causal, relative),
    (window, alibi), (None, relative_row_by_row),
])
def test_what_torch_computes_is_computed_by_an_op(mask_mod, score_mod):
    inputs, function = qkv(LENGTH, kv_heads=2), attend(mask_mod, score_mod, enable_gqa=True, scale=0.3)
    run = rewritten(function)
    torch.testing.assert_close(run.call(*inputs), function(*inputs))
    assert [record.outcome for record in run.records] == ["exact"]
    assert not any(node.target is torch.ops.higher_order.flex_attention for node in run.graphs[-1].graph.nodes)


def from_blocks(q, k, v):
    number, indices = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    return flex_attention(q, k, v, None, BlockMask.from_kv_blocks(number, indices, seq_lengths=(LENGTH, LENGTH)))


def chosen_blocks(q, k, v):
    """As in MoBA: the blocks choose the keys, the mask_mod is only causal. Uncompiled flex_attention ignores them."""
    number, indices = torch.ones(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 5, dtype=torch.int32)
    return flex_attention(q, k, v, None, BlockMask.from_kv_blocks(number, indices, BLOCK_SIZE=8, mask_mod=causal))


def logsumexp_too(q, k, v):
    return flex_attention(q, k, v, return_lse=True)


def sums_a_row(score, b, h, q, k):
    return score + table[h].sum()


def sorts(score, b, h, q, k):
    return score.cumsum(0)


@pytest.mark.parametrize("function, reason", [
    (from_blocks, "a block mask without a mask_mod"), (chosen_blocks, "a block mask without full blocks"),
    (logsumexp_too, "the logsumexp or the maxima"),
    (attend(None, sums_a_row), "a whole row of a tensor"), (attend(None, sorts), "not elementwise"),
], ids=["blocks", "chosen-blocks", "logsumexp", "row", "not-elementwise"])
def test_a_call_that_cannot_be_read_stays(function, reason):
    inputs = qkv(LENGTH)
    run = rewritten(function)
    torch.testing.assert_close(run.call(*inputs), function(*inputs))
    assert [record.outcome for record in run.records] == ["refused"]
    assert reason in run.records[0].why
    assert not run.ops


def test_the_output_alone_is_read_where_the_logsumexp_is_dropped():
    run = rewritten(lambda q, k, v: logsumexp_too(q, k, v)[0])
    run.call(*qkv(LENGTH))
    assert [record.outcome for record in run.records] == ["exact"]


def test_a_shadow_stands_for_its_call_and_nothing_reads_it():
    graph = capture(attend(causal, alibi), *qkv(LENGTH))
    (last,) = (node for node in graph.graph.nodes if "stands_for" in node.meta)
    (softmax,) = (node for node in graph.graph.nodes if "shadow_of" in node.meta)
    assert not last.users
    assert last.meta["stands_for"].args[0] is softmax.meta["shadow_of"]
    assert softmax.meta["shadow_of"].target is torch.ops.higher_order.flex_attention
