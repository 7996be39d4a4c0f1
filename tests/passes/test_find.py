"""The finder reads attention by its mathematics; every form it reads has a twin that it must refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from graphs import find, qkv, rewritten

from sparsify.passes import AttentionSite, Refused
from sparsify.passes.axes import op_name


def assert_equal_to_rounding(ours, eager, exact):
    error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, eager))
    assert error <= 2 * allowed + 64 * torch.finfo(ours.dtype).eps * float(exact.abs().max())


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


def soft_cap(q, k, v):
    return torch.softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v


def scaled_after_the_mask(q, k, v):
    mask = torch.zeros(q.shape[2], k.shape[2])
    return torch.softmax((q @ k.mT + mask) * 0.3, -1) @ v


def values_on_the_left(q, k, v):
    return v.mT @ torch.softmax(q @ k.mT, -1).mT


def tensor_scale(q, k, v):
    return torch.softmax(q @ k.mT * v.sum(), -1) @ v


def scale_per_head(q, k, v):
    return torch.softmax(q @ k.mT / (1 + v.sum((0, 2, 3), keepdim=True).abs()), -1) @ v


def scale_per_key(q, k, v):
    return torch.softmax(q @ k.mT * v.sum(-1)[:, :, None], -1) @ v


def three_dims(q, k, v):
    return torch.softmax(q[:, 0] @ k[:, 0].mT, -1) @ v[:, 0]


def two_dims(q, k, v):
    return torch.softmax(q[0, 0] @ k[0, 0].mT, -1) @ v[0, 0]


def folded_heads(q, k, v):
    weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (2, 4))


def folded_heads_masked_unfolded(q, k, v):
    batch, heads, length = q.shape[:3]
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(batch, heads, length, k.shape[2])
    scores = scores + torch.full((length, k.shape[2]), -torch.inf).triu(3)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v.flatten(0, 1)).view(batch, heads, length, v.shape[3])


def baddbmm(q, k, v):
    bias = q.new_ones(1, 1, k.shape[2])
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view_as(q)


def length_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("blhd,bshd->bhls", q, k).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


def einsum_with_ellipsis(q, k, v):
    return torch.einsum("...ls,...sd->...ld", torch.einsum("...ld,...sd->...ls", q, k).softmax(-1), v)


def scores_length_first(q, k, v):
    weights = torch.einsum("bhld,bhsd->blhs", q, k).softmax(-1)
    return torch.einsum("blhs,bhsd->bhld", weights, v)


def transposed_scores(q, k, v):
    return (k @ q.mT).softmax(-2).mT @ v


def multiply_and_sum(q, k, v):
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(3)


def five_dims(q, k, v):
    q = q.unflatten(1, (2, 2))
    return (torch.softmax(q @ k[:, :2, None].mT, -1) @ v[:, :2, None]).flatten(1, 2)


def exponentials(q, k, v):
    scores = q @ k.mT
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def exponentials_without_the_maximum(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1)[..., None]) @ v


def divided_late(q, k, v):
    scores = q @ k.mT
    e = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
    return e @ v / e.sum(-1, keepdim=True)


def log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT, -1).exp() @ v


def logsumexp(q, k, v):
    scores = q @ k.mT
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


def softmax_plus_one(q, k, v):
    e = torch.exp(q @ k.mT)
    return e / (1 + e.sum(-1, keepdim=True)) @ v


def softmax_plus_one_without_overflow(q, k, v):
    scores = q @ k.mT
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(scores - top)
    return e / (e.sum(-1, keepdim=True) + torch.exp(-top)) @ v


def sink_column_of_folded_heads(q, k, v):
    batch, heads = q.shape[:2]
    sinks = v[0, :, 0, 0].view(1, -1, 1, 1).expand(batch, heads, 1, 1).flatten(0, 1).expand(-1, q.shape[2], -1)
    scores = torch.cat([q.flatten(0, 1) @ k.flatten(0, 1).mT, sinks], -1)
    return (scores.softmax(-1)[..., :-1] @ v.flatten(0, 1)).view(batch, heads, q.shape[2], -1)


def filled_with_a_tensor(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.where(hidden, torch.tensor(-1e9, dtype=q.dtype), q @ k.mT).softmax(-1) @ v


def zero_column(q, k, v):
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


def sink_column(q, k, v):
    sinks = v[0, :, 0, 0].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    scores = torch.cat([q @ k.mT, sinks], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def not_a_number_to_zero(q, k, v):
    return torch.nan_to_num(torch.softmax(q @ k.mT, -1)) @ v


def bias_of_a_second_product(q, k, v):
    return torch.softmax(q @ k.mT + q @ v.mT, -1) @ v


def per_query_constant(q, k, v):
    return torch.softmax(q @ k.mT - q.sum(-1, keepdim=True) + 3, -1) @ v


def weights_that_are_dropped(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    weights.mean(1)
    return weights @ v


def weights_scaled(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * 2) @ v


def weights_scaled_by_row(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * q.sum(-1, keepdim=True) / (1 + q.square().sum((2, 3), keepdim=True))) @ v


def weights_scaled_by_key(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * v.sum(-1)[:, :, None]) @ v


def rows_emptied_after_the_softmax(q, k, v):
    return torch.softmax(q @ k.mT, -1).masked_fill((torch.arange(q.shape[2]) % 3 == 0)[:, None], 0.0) @ v


def hidden_twice(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT).masked_fill(hidden, -1e9), -1).masked_fill(hidden, 0.0) @ v


def rows_of_nan_emptied(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights.masked_fill(weights.isnan(), 0.0) @ v


def softmin(q, k, v):
    return F.softmin(q @ k.mT, -1) @ v


def bias_then_temperature(q, k, v):
    return torch.softmax((q @ k.mT + v.sum(-1)[:, :, None]) / (1 + v.square().sum()), -1) @ v


def masked_then_temperature(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT).masked_fill(hidden, -torch.inf) / (1 + v.square().sum()), -1) @ v


def hidden_to_two_depths(q, k, v):  # the first query sees nothing but itself, and that is hidden less deep
    length = torch.arange(max(q.shape[2], k.shape[2]))
    scores = (q @ k.mT).masked_fill(torch.eye(k.shape[2], dtype=torch.bool)[: q.shape[2]], -1e5)
    scores = scores.masked_fill(length[None, : k.shape[2]] > length[: q.shape[2], None], -1e9)
    return scores.softmax(-1) @ v


def pooled_by_a_vector(q, k, v):
    return torch.softmax(k[:, 0] @ q[0, 0, 0], -1)[:, None] @ v[:, 0]


def rows_of_nan_emptied_by_where(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


def divided_by_the_sum_and_a_little(q, k, v):
    scores = q @ k.mT
    e = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    return e / (e.sum(-1, keepdim=True) + 1e-9) @ v


def softmax_plus_half(q, k, v):
    e = torch.exp(q @ k.mT)
    return e / (e.sum(-1, keepdim=True) + 0.5) @ v


def cosine(q, k, v):
    return torch.softmax(q @ k.mT / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]), -1) @ v


def copied_keys_written_to(q, k, v):
    k, v = k.clone(), v.repeat(1, 1, 1, 1)
    k[:, :, 0] = 0
    v[:, 1] = 1
    return torch.softmax(q @ k.mT, -1) @ v


def repeated_keys_written_to(q, k, v):
    k, v = k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)
    k[:, 1] = 0
    return torch.softmax(q @ k.mT, -1) @ v


def striped(q, k, v):
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    scores = (q @ k.mT).masked_fill((rows[:, None] % 3) != (keys % 3), -1e9).masked_fill(keys % 7 == 6, -1e9)
    return scores.softmax(-1) @ v


def filled_by_index(q, k, v):
    scores = q @ k.mT
    shown = torch.arange(k.shape[2]) < torch.arange(3, 3 + q.shape[0])[:, None]
    scores[~shown[:, None, None].expand_as(scores)] = -1e6
    return scores.softmax(-1) @ v


def times_the_reciprocal(q, k, v):
    e = torch.exp(q @ k.mT)
    return e * e.sum(-1, keepdim=True).reciprocal() @ v


def times_the_reciprocal_late(q, k, v):
    e = torch.exp(q @ k.mT)
    return (e @ v) * (1 / e.sum(-1))[..., None]


def sdpa_mapped_over_the_batch(q, k, v):
    return torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)


def sdpa_mapped_with_rows_that_see_nothing(q, k, v):
    mask = (torch.arange(q.shape[2])[:, None] - 2) >= torch.arange(k.shape[2])
    return torch.func.vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))(q, k, v)


FOUND = [sdpa_mapped_over_the_batch, sdpa_mapped_with_rows_that_see_nothing,
         times_the_reciprocal, times_the_reciprocal_late, filled_by_index, rows_of_nan_emptied_by_where,
         divided_by_the_sum_and_a_little, softmax_plus_half, cosine, copied_keys_written_to,
         repeated_keys_written_to, striped, weights_scaled, weights_scaled_by_row, weights_scaled_by_key,
         rows_emptied_after_the_softmax, hidden_twice, rows_of_nan_emptied, softmin, bias_then_temperature,
         masked_then_temperature, hidden_to_two_depths, pooled_by_a_vector, chain, softmax_method, float32_softmax,
         scale_on_queries, scale_on_transposed_keys, dropout_in_eval, added_mask_first, filled_in_place,
         scaled_in_place, kept_where, soft_cap, scaled_after_the_mask, values_on_the_left, tensor_scale,
         scale_per_head, scale_per_key, three_dims, two_dims, folded_heads, folded_heads_masked_unfolded, baddbmm,
         length_first, einsum_with_ellipsis, scores_length_first, transposed_scores, multiply_and_sum, five_dims,
         exponentials, exponentials_without_the_maximum, divided_late, log_softmax, logsumexp, softmax_plus_one,
         softmax_plus_one_without_overflow, sink_column_of_folded_heads, filled_with_a_tensor, zero_column,
         sink_column, not_a_number_to_zero, bias_of_a_second_product, per_query_constant, weights_that_are_dropped]


@pytest.mark.parametrize("function", FOUND)
def test_attention_is_found_in_any_spelling_and_stays_what_it_was(function):
    q, k, v = qkv(9, 11)
    attention = rewritten(function)
    assert_equal_to_rounding(attention.call(q, k, v), function(q, k, v), function(q.double(), k.double(), v.double()))
    (record,) = attention.records
    assert record.outcome == "exact", record
    assert record.form in ("softmax chain", "exp chain")
    assert record.line.startswith("test_find.py:")
    left = {op_name(node) for node in attention.graphs[-1].graph.nodes}
    assert not {"softmax", "_safe_softmax", "exp"} & left, "the scores are gone"


def test_every_head_of_a_loop_is_a_site():
    def attention(q, k, v):
        return torch.stack([torch.softmax(q[:, h] @ k[:, h].mT, -1) @ v[:, h] for h in range(q.shape[1])], 1)

    assert all(isinstance(site, AttentionSite) for site in find(attention, *qkv(9)))
    assert len(find(attention, *qkv(9))) == 4


def test_query_chunks_are_sites():
    def attention(q, k, v):
        return torch.cat([torch.softmax(part @ k.mT, -1) @ v for part in q.split(5, 2)], 2)

    sites = find(attention, *qkv(10))
    assert [int(site.q_len) for site in sites] == [5, 5]


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT, 2) @ v


def safe_softmax_over_queries(q, k, v):
    return torch.ops.aten._safe_softmax(q @ k.mT, 2) @ v


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
    weights = torch.softmax(q @ k.mT, -1)
    k.add_(1)
    return weights @ v + k.sum()


def values_written_before_the_output(q, k, v):
    repeated = v.repeat_interleave(1, 1)
    v.add_(1)
    return torch.softmax(q @ k.mT, -1) @ repeated + v.sum()


def dropout_in_training(q, k, v):
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=True) @ v


def weights_masked_by_queries_and_keys(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * torch.ones(q.shape[2], k.shape[2]).tril()) @ v


def squared_weights(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return (weights * weights) @ v


def nan_to_one(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights.masked_fill(weights.isnan(), 1.0) @ v


def masked_then_scaled_by_a_tensor(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT).masked_fill(hidden, -1e4) * v.sum(), -1) @ v


def linear_attention(q, k, v):
    return torch.softmax(q @ k[0, 0].mT, -1) @ (v[:, :, :9].mT @ v[:, :, :9]).repeat(1, 1, 2, 1)[:, :, :9]


def softmax_over_two_dims(q, k, v):
    return torch.softmax((q @ k.mT).flatten(2), -1).view(2, 4, 9, 9) @ v


def exponentials_divided_by_the_wrong_sum(q, k, v):
    e = torch.exp(q @ k.mT)
    return e / e.sum(-1)[:, :, None] @ v  # as many keys as queries: it broadcasts


def times_the_sum(q, k, v):
    e = torch.exp(q @ k.mT)
    return e * e.sum(-1, keepdim=True) @ v


def exponentials_over_queries(q, k, v):
    e = torch.exp(q @ k.mT)
    return e / e.sum(-2, keepdim=True) @ v


def one_beside_shifted_exponentials(q, k, v):
    scores = q @ k.mT
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / (e.sum(-1, keepdim=True) + 1) @ v  # the one is not shifted: a logit of its own for every row


def sink_with_a_value(q, k, v):
    return F.pad(q @ k.mT, (1, 0)).softmax(-1) @ F.pad(v, (0, 0, 1, 0), value=1.0)


def wrong_column_cut(q, k, v):
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., :-1] @ v


def mixed_heads(q, k, v):
    scores = torch.einsum("bhls,hg->bgls", q @ k.mT, v[0, :, 0, :4])
    return scores.softmax(-1) @ v


def routing(q, k, v):
    return torch.einsum("bhle,bhled->bhld", torch.softmax(q @ k[0, 0].mT, -1), v[:, :, :, None] * k[0, 0])


def two_scores_side_by_side(q, k, v):
    return torch.cat([q @ k.mT, q @ v.mT], -1).softmax(-1) @ torch.cat([v, k], 2)


def float64(q, k, v):
    return torch.softmax(q.double() @ k.double().mT, -1) @ v.double()


def scores_in_eight_bits(q, k, v):
    return (q @ k.mT).to(torch.float8_e4m3fn).float().softmax(-1) @ v


def scores_as_whole_numbers(q, k, v):
    return (q @ k.mT).to(torch.int8).float().softmax(-1) @ v


def weights_in_eight_bits(q, k, v):
    return (q @ k.mT).softmax(-1).to(torch.float8_e4m3fn).float() @ v


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_may_be_cast_between_what_attention_runs_in(narrow):
    site, = find(lambda q, k, v: (q @ k.mT).to(narrow).float().softmax(-1).to(narrow).float() @ v, *qkv(9))
    assert isinstance(site, AttentionSite)


@pytest.mark.parametrize(("function", "why"), [
    (softmax_over_queries, "does not sum over what the softmax runs over"),
    (safe_softmax_over_queries, "does not sum over what the softmax runs over"),
    (weights_returned, "weights are returned"),
    (scores_used_twice, "used elsewhere"),
    (written_behind_the_walk, "used elsewhere"),
    (keys_written_before_the_output, "key is written to in place"),
    (values_written_before_the_output, "value is written to in place"),
    (weights_masked_by_queries_and_keys, "over queries and keys"),
    (squared_weights, "stands between"),
    (nan_to_one, "used elsewhere"),
    (linear_attention, "share their keys"),
    (dropout_in_training, "dropout is active"),
    (softmax_over_two_dims, "does not run over the keys"),
    (exponentials_divided_by_the_wrong_sum, "not divided by the sum of their row"),
    (times_the_sum, "not divided by their sum"),
    (exponentials_over_queries, "does not sum over"),
    (one_beside_shifted_exponentials, "not divided by their sum"),
    (sink_with_a_value, "carries a value"),
    (wrong_column_cut, "stands between"),
    (mixed_heads, "share their keys"),
    (routing, "share their keys"),
    (two_scores_side_by_side, "side by side"),
    (float64, "float64"),
    (scores_in_eight_bits, "the scores are cast to torch.float8_e4m3fn"),
    (scores_as_whole_numbers, "the scores are cast to torch.int8"),
    (weights_in_eight_bits, "stands between the softmax and the values"),
])
def test_near_misses_are_refused_with_the_reason(function, why):
    (site,) = find(function, *qkv(9))
    assert isinstance(site, Refused), site
    assert why in site.why
    assert site.origin.line.startswith("test_find.py:")


def test_a_mask_of_unknown_depth_is_refused():
    attention = rewritten(masked_then_scaled_by_a_tensor)
    q, k, v = qkv(9)
    torch.testing.assert_close(attention.call(q, k, v), masked_then_scaled_by_a_tensor(q, k, v))
    assert [record.outcome for record in attention.records] == ["refused"]
    assert "scaled by a tensor after they are masked" in attention.records[0].why


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
    "index": lambda x, n: x[:, torch.arange(x.shape[1] * n) // n],
    "index_select": lambda x, n: x.index_select(1, torch.arange(x.shape[1]).repeat_interleave(n)),
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
    assert site.kv_heads == 2
    assert site.key.node.meta["val"].numel() == 2 * 2 * 9 * 8, "read before it is repeated"


def test_heads_repeated_in_another_order_are_unrepeated():
    def attention(q, k, v):  # head h reads KV head h % 2, not h // 2
        return torch.softmax(q @ k.repeat(1, 2, 1, 1).mT, -1) @ v.repeat(1, 2, 1, 1)

    q, k, v = qkv(9, heads=4, kv_heads=2)
    (site,) = find(attention, q, k, v)
    assert site.kv_heads == 2
    torch.testing.assert_close(rewritten(attention).call(q, k, v), attention(q, k, v))


def test_enable_gqa_is_found_grouped():
    (site,) = find(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                   *qkv(9, heads=4, kv_heads=2))
    assert site.kv_heads == 2


def test_one_kv_head_serves_all():
    def attention(q, k, v):
        return torch.softmax(torch.einsum("bhld,bsd->bhls", q, k[:, 0]), -1) @ v[:, :1]

    (site,) = find(attention, *qkv(9))
    assert (int(site.heads), int(site.kv_heads)) == (4, 1)


def test_a_single_query_of_grouped_heads_is_one_query():
    (site,) = find(lambda q, k, v: torch.softmax(q @ k.repeat_interleave(2, 1).mT, -1) @ v.repeat_interleave(2, 1),
                   *qkv(1, 9, heads=4, kv_heads=2))
    assert (site.q_len, int(site.heads), int(site.kv_heads)) == (1, 4, 2)


def test_a_mask_tells_the_queries_from_the_heads():
    def attention(q, k, v):  # [B, L, H, S]: both L and H are axes of the queries alone
        scores = torch.einsum("bhld,bsd->blhs", q, k[:, 0])
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1)[:, None], -torch.inf)
        return torch.einsum("blhs,bsd->blhd", scores.softmax(-1), v[:, 0])

    q, k, v = qkv(9)
    (site,) = find(attention, q, k, v)
    assert (int(site.heads), int(site.q_len)) == (4, 9)
    torch.testing.assert_close(rewritten(attention).call(q, k, v), attention(q, k, v))


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


def test_a_softmax_that_is_no_attention_is_recorded():
    (site,) = find(lambda x: torch.softmax(x * 2, -1), torch.randn(3, 5))
    assert isinstance(site, Refused)
