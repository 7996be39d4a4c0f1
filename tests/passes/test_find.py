"""The finder reads attention by its mathematics; every form it reads has a twin that it must refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from graphs import find, qkv

from sparsify.passes import AttentionSite, Refused


def chain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) @ v


def softmax_method(q, k, v):
    return q.matmul(k.mT).mul(0.3).softmax(dim=3).matmul(v)


def float32_softmax(q, k, v):
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.3
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.0) @ v


def scale_on_queries(q, k, v):
    return torch.softmax((q * 0.3) @ k.transpose(2, 3), -1) @ v


def scale_on_transposed_keys(q, k, v):
    return torch.softmax(q @ (k.transpose(2, 3) * 0.3), -1) @ v


def dropout_in_eval(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=False) @ v


def added_mask_first(q, k, v):
    mask = torch.zeros(q.shape[2], k.shape[2])
    return torch.softmax(mask + q @ k.mT, -1) @ v


def filled_in_place(q, k, v):
    scores = q @ k.mT
    scores = scores.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, -1) @ v


def scaled_in_place(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.5)
    return torch.softmax(scores, -1) @ v


def kept_where(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax(torch.where(keep, q @ k.mT, torch.finfo(q.dtype).min), -1) @ v


@pytest.mark.parametrize("function", [chain, softmax_method, float32_softmax, scale_on_queries,
                                      scale_on_transposed_keys, dropout_in_eval, added_mask_first, filled_in_place,
                                      scaled_in_place,                                      kept_where])
def test_hand_written_attention_is_found(function):
    (site,) = find(function, *qkv(9, 11))
    assert isinstance(site, AttentionSite), site
    assert site.form == "softmax chain"
    assert site.origin.line.startswith("test_find.py:")


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT, 2) @ v


def weights_returned(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def scores_used_twice(q, k, v):
    scores = q @ k.mT
    return torch.softmax(scores, -1) @ v + scores.sum()


def written_behind_the_walk(q, k, v):
    scores = q @ k.mT
    scores[:, :, 0].mul_(0.5)  # the view is not used again: a walk along arguments alone would miss it
    return torch.softmax(scores, -1) @ v


def keys_written_before_the_output(q, k, v):
    k = k.clone()
    weights = torch.softmax(q @ k.mT, -1)
    k.add_(1)
    return weights @ v + k.sum()


def values_written_before_the_output(q, k, v):
    v = v.clone()
    repeated = v.repeat_interleave(1, 1)
    v.add_(1)
    return torch.softmax(q @ k.mT, -1) @ repeated + v.sum()


def soft_cap(q, k, v):
    return torch.softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v


def scaled_after_the_mask(q, k, v):
    mask = torch.zeros(q.shape[2], k.shape[2])
    return torch.softmax((q @ k.mT + mask) * 0.3, -1) @ v


def weights_scaled(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * 2) @ v


def dropout_in_training(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=True) @ v


def values_on_the_left(q, k, v):
    return v.mT @ torch.softmax(q @ k.mT, -1).mT


def tensor_scale(q, k, v):
    return torch.softmax(q @ k.mT * v.sum(), -1) @ v


def three_dims(q, k, v):
    return torch.softmax(q[:, 0] @ k[:, 0].mT, -1) @ v[:, 0]


def float64(q, k, v):
    return torch.softmax(q.double() @ k.double().mT, -1) @ v.double()


@pytest.mark.parametrize(("function", "why"), [
    (softmax_over_queries, "softmax runs over dim 2"),
    (weights_returned, "used elsewhere"),
    (scores_used_twice, "used elsewhere"),
    (written_behind_the_walk, "used elsewhere"),
    (keys_written_before_the_output, "key is written to in place"),
    (values_written_before_the_output, "value is written to in place"),
    (soft_cap, "stands between"),
    (scaled_after_the_mask, "scaled after"),
    (weights_scaled, "stands between"),
    (dropout_in_training, "dropout is active"),
    (values_on_the_left, "stands between"),
    (tensor_scale, "scale of the scores is a tensor"),
    (three_dims, "3 dims"),
    (float64, "float64"),
])
def test_near_misses_are_refused_with_the_reason(function, why):
    (site,) = find(function, *qkv(9))
    assert isinstance(site, Refused), site
    assert why in site.why
    assert site.origin.line.startswith("test_find.py:")


@pytest.mark.parametrize("arguments", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.0},
    {"attn_mask": "bool"}, {"attn_mask": "float"},
], ids=str)
def test_sdpa_is_found_in_every_argument_form(arguments):
    def attention(q, k, v):
        masks = {"bool": q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool), "float": q.new_zeros(1, k.shape[2])}
        named = {name: masks[x] if name == "attn_mask" else x for name, x in arguments.items()}
        return F.scaled_dot_product_attention(q, k, v, **named)

    (site,) = find(attention, *qkv(9))
    assert isinstance(site, AttentionSite), site
    assert site.form == "sdpa"
    assert site.is_causal == arguments.get("is_causal", False)
    assert len(site.masks) == ("attn_mask" in arguments)


def test_sdpa_with_positional_arguments_is_found():
    (site,) = find(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.0, False), *qkv(9),
                   torch.ones(9, 9, dtype=torch.bool))
    assert isinstance(site, AttentionSite)
    assert site.masks[0].kind == "keep"


def test_sdpa_with_dropout_is_refused():
    (site,) = find(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), *qkv(9))
    assert isinstance(site, Refused)
    assert "dropout" in site.why


def expand_reshape(x, n):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, n, length, dim).reshape(batch, heads * n, length, dim)


REPEATS = {
    "expand": expand_reshape,
    "contiguous": lambda x, n: expand_reshape(x, n).contiguous(),
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "flatten": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2),
}


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("form", ["sdpa", "softmax chain"])
def test_grouped_heads_are_unrepeated(repeat, form):
    def attention(q, k, v):
        k, v = REPEATS[repeat](k, 2), REPEATS[repeat](v, 2)
        if form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    (site,) = find(attention, *qkv(9, heads=4, kv_heads=2))
    assert isinstance(site, AttentionSite), site
    assert site.key.meta["val"].shape[1] == site.value.meta["val"].shape[1] == 2


def test_heads_repeated_in_another_order_stay_repeated():
    def attention(q, k, v):  # head h reads KV head h % 2, not h // 2
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    (site,) = find(attention, *qkv(9, heads=4, kv_heads=2))
    assert site.key.meta["val"].shape[1] == 4


def test_enable_gqa_is_found_grouped():
    (site,) = find(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                   *qkv(9, heads=4, kv_heads=2))
    assert site.key.meta["val"].shape[1] == 2


def test_gradients_are_refused_and_no_grad_regions_are_not():
    q, k, v = qkv(9)
    q.requires_grad_()

    def both(q, k, v):
        with torch.no_grad():
            free = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v) + free

    with torch.enable_grad():
        first, second = find(both, q, k, v)
    assert isinstance(first, AttentionSite)
    assert isinstance(second, Refused)
    assert "torch.no_grad()" in second.why


def test_attention_in_a_checkpoint_is_recorded():
    def attention(q, k, v):
        return torch.utils.checkpoint.checkpoint(chain, q, k, v, use_reentrant=False)

    (site,) = find(attention, *qkv(9))
    assert isinstance(site, Refused)
    assert "checkpoint" in site.why


def test_a_softmax_that_is_no_attention_is_recorded():
    (site,) = find(lambda x: torch.softmax(x * 2, -1), torch.randn(3, 5))
    assert isinstance(site, Refused)
