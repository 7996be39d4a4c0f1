"""A proof is an equivalence: what the ops are told to hide is what the mask hid, at sizes the proof never saw."""

import pytest
import torch
import torch.nn.functional as F
from graphs import qkv, rewritten

from sparsify.kernels.oracle import visible

LOW = torch.finfo(torch.float32).min


def additive(keep, low=LOW):
    return torch.where(keep, 0.0, low)


def causal(q, k, pad):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def causal_bottom_right(q, k, pad):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


def causal_from_triu(q, k, pad):
    return ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


def causal_additive(q, k, pad):
    return torch.full((q.shape[2], k.shape[2]), LOW).triu(1)


def causal_infinite(q, k, pad):
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal(q, k, pad), -torch.inf)


def causal_in_place(q, k, pad):
    mask = torch.full((q.shape[2], k.shape[2]), -1e4)
    return mask.triu_(1)


def padding(q, k, pad):
    return pad[:, None, None]


def padding_from_integers(q, k, pad):
    return (pad.long()[:, None, None] == 1).expand(-1, 1, q.shape[2], -1)


def padding_additive(q, k, pad):
    return (1.0 - pad[:, None, None].float()) * LOW


def causal_and_padding(q, k, pad):
    return additive(causal(q, k, pad) & pad[:, None, None])


def causal_then_padding(q, k, pad):
    return additive(causal(q, k, pad)).masked_fill(~pad[:, None, None], -torch.inf)


def indexed_padding(q, k, pad):
    rows = torch.arange(pad.shape[0])[:, None, None, None]
    return causal(q, k, pad) & pad[rows, torch.arange(k.shape[2])]


def key_length(q, k, pad):
    return (torch.arange(k.shape[2]) < q.shape[2])[None, None, None]


def padded_to_length(q, k, pad):
    return F.pad(pad[:, 2:], (1, 1))[:, None, None]


def shifted_padding(q, k, pad):
    return torch.cat([pad[:, 1:], pad[:, :1]], 1)[:, None, None]


def one_document(q, k, pad):
    position = torch.arange(k.shape[2])[None]
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, : q.shape[2], None] == document[:, None, None]
    return causal(q, k, pad) & same


def window_that_hides_nothing(q, k, pad):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return causal(q, k, pad) & (distance < q.shape[2])


PROVEN = {
    causal: "causal",
    causal_bottom_right: "causal, offset",
    causal_from_triu: "causal",
    causal_additive: "causal",
    causal_infinite: "causal",
    causal_in_place: "causal",
    padding: "keys where",
    padding_from_integers: "keys where",
    padding_additive: "keys where",
    causal_and_padding: "causal; keys where",
    causal_then_padding: "causal; keys where",
    indexed_padding: "causal; keys where",
    key_length: "keys where",
    padded_to_length: "keys where",
    shifted_padding: "keys where",
    one_document: "causal",
    window_that_hides_nothing: "causal",
}


def attend_with(mask):
    return lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, mask(q, k, pad))


def random_padding(batch, length):
    pad = torch.rand(batch, length) < 0.7
    pad[:, 0] = True  # every row sees a key: what torch does with one that sees none differs between kernels
    return pad


@pytest.mark.parametrize("mask", PROVEN, ids=lambda mask: mask.__name__)
def test_proofs_hold_at_sizes_that_were_not_traced(mask):
    function = rewritten(attend_with(mask))
    for q_len, kv_len, batch in [(9, 9, 2), (7, 12, 3), (5, 31, 2)]:
        inputs = (*qkv(q_len, kv_len, batch), random_padding(batch, kv_len))
        got = function.call(*inputs)
        (record,) = function.records
        assert record.outcome == "exact", record.why
        assert record.mask.startswith(PROVEN[mask])
        ((_, _, _, _, offset, key_mask, _),) = function.ops
        told = visible(q_len, kv_len, offset, key_mask, torch.device("cpu"))
        meant = mask(*inputs[:2], inputs[3])
        meant = meant if meant.dtype == torch.bool else meant > -1e3
        assert torch.equal(*(x.expand(batch, 1, q_len, kv_len) for x in (told, meant)))
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs[:3], mask(*inputs[:2], inputs[3])))
    assert len(function.graphs) == 1  # telling the ops fixed no size


def window(q, k, pad):
    return causal(q, k, pad) & (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) < 3)


def chunks(q, k, pad):
    return torch.arange(q.shape[2])[:, None] // 4 == torch.arange(k.shape[2]) // 4


def anti_causal(q, k, pad):
    return torch.arange(k.shape[2]) >= torch.arange(q.shape[2])[:, None]


def every_other_causal(q, k, pad):
    return 2 * torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def prefix(q, k, pad):
    return causal(q, k, pad) | (torch.arange(k.shape[2]) < 3)


def documents(q, k, pad):
    document = pad.long().cumsum(-1)
    return document[:, None, : q.shape[2], None] == document[:, None, None]


def query_padding(q, k, pad):
    return pad[:, None, : q.shape[2], None] & causal(q, k, pad)


def bias(q, k, pad):
    return -0.5 * (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs().float()


def not_low_enough(q, k, pad):
    return additive(causal(q, k, pad), -5.0)


def bias_of_padding(q, k, pad):
    return pad.float()[:, None, None] * LOW  # hides what is true: proven, and so the twin of the next


def bias_of_integers(q, k, pad):
    counted = pad.long().flip(-1)  # read as integers that need not be 0 or 1
    return (1.0 - counted[:, None, None]) * -1e4


def written_through_a_view(q, k, pad):
    mask = torch.zeros(q.shape[2], k.shape[2])
    mask[:, 0] = -torch.inf
    return mask


@pytest.mark.parametrize("mask", [window, chunks, anti_causal, every_other_causal, prefix, documents, query_padding,
                                  bias, not_low_enough, bias_of_integers, written_through_a_view],
                         ids=lambda mask: mask.__name__)
def test_other_masks_leave_the_site_as_it_was(mask):
    function = rewritten(attend_with(mask))
    inputs = (*qkv(9, 9, 2), random_padding(2, 9))
    got = function.call(*inputs)
    (record,) = function.records
    assert record.outcome == "refused"
    assert record.why
    assert record.line.startswith("test_prove.py:")
    torch.testing.assert_close(got, attend_with(mask)(*inputs))


def test_a_mask_that_hides_what_is_true_is_read_right():
    function = rewritten(attend_with(bias_of_padding))
    inputs = (*qkv(9, 9, 2), ~random_padding(2, 9))
    torch.testing.assert_close(function.call(*inputs), attend_with(bias_of_padding)(*inputs))
    assert function.records[0].outcome == "exact"


def test_is_causal_is_top_left_when_lengths_differ():
    function = rewritten(lambda q, k, v: torch.softmax(
        (q @ k.mT).masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf), -1) @ v)
    inputs = qkv(5, 9)
    got = function.call(*inputs)
    assert function.records[0].mask == "causal"
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs, is_causal=True, scale=1.0))


def test_a_row_that_sees_nothing_gives_zeros():
    function = rewritten(attend_with(padding))
    q, k, v = qkv(9)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[0] = False
    got = function.call(q, k, v, pad)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    torch.testing.assert_close(got[1], F.scaled_dot_product_attention(q[1], k[1], v[1]))
