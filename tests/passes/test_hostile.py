"""Near-misses of attention: each computes what eager computes, and stays as it was for the right reason.

A case is *left* (no rewrite of it would be right, or none is offered), *exact* (it is attention, in a disguise that
must be read to the letter), or *either* (a rewrite is possible, and right only if it carries everything). All are
compiled under the dense plan and called at two lengths. Reasons are judged loosely: one of some phrases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import qkv, rewritten
from torch import Tensor

from sparsify.passes import SiteRecord
from tests.numerics import assert_as_good_as_torch

LENGTHS = (9, 14)
INF = torch.inf
LOWEST = torch.finfo(torch.float32).min
UNITS = 32.0
"""Rounding units of the outputs: a handful of steps on scores of size 10."""


@dataclass(frozen=True)
class Case:
    """A function of q, k, v and what `extra` makes of them; `reasons`: phrases of which a refusal must hold one."""

    function: Callable[..., Any]
    fate: str
    reasons: tuple[str, ...] = ()
    mask: str = ""
    extra: Callable[..., tuple[Any, ...]] = lambda q, k, v: ()
    kv_len: Callable[[int], int] = lambda length: length


CASES: list[Case] = []


def left(*reasons: str, **settings: Any) -> Callable[..., Any]:
    return lambda function: CASES.append(Case(function, "left", reasons, **settings)) or function


def either(*reasons: str, **settings: Any) -> Callable[..., Any]:
    return lambda function: CASES.append(Case(function, "either", reasons, **settings)) or function


def exact(mask: str = "", **settings: Any) -> Callable[..., Any]:
    return lambda function: CASES.append(Case(function, "exact", mask=mask, **settings)) or function


def fate(function: Callable[..., Any], *inputs: tuple[Any, ...]) -> list[SiteRecord]:
    """Compile `function`, compare it with eager on each of `inputs`, and return what became of its attention."""
    ours = rewritten(function)
    for given in inputs:
        outputs = [_call(f, given, dtype) for f, dtype in (
            (ours.call, torch.float32), (function, torch.float32), (function, torch.float64))]
        for x, plain, truth in zip(*outputs, strict=True):
            assert x.dtype == plain.dtype and x.shape == plain.shape
            defined = ~truth.isnan()  # rows that see nothing are zeros in the ops
            assert_as_good_as_torch(*(t.where(defined, 0.0) for t in (x, plain, truth)), UNITS)
    return ours.records


def _call(function: Callable[..., Any], inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Outputs on fresh copies, and what became of the inputs: a write to them is an output too."""
    torch.manual_seed(7)
    given = tuple(x.to(dtype if x.is_floating_point() else x.dtype, copy=True) for x in inputs)
    result = function(*given)
    return [*(result if isinstance(result, tuple) else (result,)), *given]


def future(q: Tensor, k: Tensor, diagonal: int = 1) -> Tensor:
    """True where a causal mask hides."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(diagonal)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


# Who else reads or writes what the walk passes.

USED = ("used elsewhere", "used by", "read by", "also", "twice", "returned", "stored")


@left(*USED)
def scores_used_twice(q, k, v):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.mean()


@left(*USED)
def weights_used_twice(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.square().sum(-1, keepdim=True)


@left(*USED)
def weights_returned(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


@left(*USED, "copy_", extra=lambda q, k, v: (q.new_zeros(*q.shape[:3], k.shape[2]),))
def weights_stored(q, k, v, store):
    weights = scores(q, k).softmax(-1)
    store.copy_(weights)
    return weights @ v


@left(*USED)
def weights_of_two_values(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights @ v.flip(2)


@either(*USED, "written", "in place")
def keys_changed_between_the_products(q, k, v):
    k = k.clone()
    weights = scores(q, k).softmax(-1)
    k.mul_(2)
    return weights @ v + k.mean()


@either(*USED, "written", "in place")
def queries_changed_between_the_products(q, k, v):
    weights = scores(q, k).softmax(-1)
    q.add_(1)
    return weights @ v


@either(*USED, "written", "in place")
def values_changed_after_they_were_repeated(q, k, v):
    repeated = v[:, :2].repeat_interleave(2, 1)
    v.zero_()
    return scores(q, k).softmax(-1) @ repeated


@either(*USED, "written", "in place")
def values_changed_after_they_were_read(q, k, v):
    out = scores(q, k).softmax(-1) @ v
    v.zero_()
    return out


@left(*USED, "in place", "mul_", "stands")
def weights_changed_in_place(q, k, v):
    weights = scores(q, k).softmax(-1)
    weights[..., 0] *= 0.5
    return weights @ v


@left(*USED, "in place", "written", "fill", "stands")
def weights_zeroed_through_a_view(q, k, v):
    weights = scores(q, k).softmax(-1)
    weights.select(-1, 0).zero_()
    return weights @ v


@either(*USED, "in place", "copy", "stands")
def scores_changed_through_a_view(q, k, v):
    s = scores(q, k)
    s[:, 0].neg_()
    return s.softmax(-1) @ v


# What the softmax runs over.

DIMS = ("dim", "over", "quer", "stands", "no product")


@left(*DIMS)
def softmax_over_queries(q, k, v):
    return scores(q, k).softmax(2) @ v


@left(*DIMS)
def softmax_over_heads(q, k, v):
    return scores(q, k).softmax(1) @ v


@left(*DIMS, "view", "reshape")
def softmax_over_all_pairs(q, k, v):
    s = scores(q, k)
    return s.flatten(2).softmax(-1).view(s.shape) @ v


@left(*DIMS, "view", "reshape", "flatten", kv_len=lambda length: 2 * length)
def softmax_over_pairs_of_keys(q, k, v):
    s = scores(q, k)
    return s.unflatten(-1, (-1, 2)).softmax(-1).flatten(-2) @ v


@left(*DIMS, "used elsewhere", "sum")
def sum_over_the_wrong_dim(q, k, v):
    e = scores(q, k).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


@left(*DIMS, "product", "scores")
def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@either(*DIMS, "length", "symbolic", "head dim")
def channel_attention(q, k, v):
    return (scores(q.mT, k.mT).softmax(-1) @ v.mT).mT


@left(*DIMS, "transpose", "values", "mT", "permute")
def weights_transposed(q, k, v):
    return scores(q, k).softmax(-1).mT @ v


@left(*DIMS, "left", "values", "transpose", "sum")
def values_on_the_left_over_the_queries(q, k, v):
    return v.mT @ scores(q, k).softmax(-1)


@left(*DIMS, "einsum", "values", "sum", "permute", "bmm", "product")
def einsum_over_the_queries(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", scores(q, k).softmax(-1), v)


@left(*DIMS, "einsum", "values", "sum", "permute", "bmm", "product")
def einsum_over_queries_and_heads(q, k, v):
    return torch.einsum("bhqk,bhkd->bqd", scores(q, k).softmax(-1), v)


# What is no softmax.

@left("exp", "sum", "no ", "softmax")
def exp_without_the_sum(q, k, v):
    return (scores(q, k) * 0.1).exp() @ v


@left("exp", "log_softmax", "stands")
def log_softmax_without_exp(q, k, v):
    return scores(q, k).log_softmax(-1) @ v


@left("sum", "exp", "max", "used", "differ", "not the")
def exp_and_sum_of_different_scores(q, k, v):
    s = scores(q, k)
    return ((s - s.amax(-1, keepdim=True)).exp() / s.exp().sum(-1, keepdim=True)) @ v


@left("max", "sum", "add", "exp", "used", "stands")
def softmax_plus_one_with_the_max_taken_off(q, k, v):
    """One is added after the maximum was taken off: a sink of exp(max), not of one."""
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@either("sum", "add", "exp", "used", "stands")
def softmax_plus_a_fraction(q, k, v):
    e = scores(q, k).exp()
    return (e / (0.25 + e.sum(-1, keepdim=True))) @ v


@either("sum", "add", "exp", "used", "stands", "sub")
def softmax_minus_a_fraction(q, k, v):
    """A sink of negative weight has no logit."""
    e = (0.1 * scores(q, k)).exp()
    return (e / (e.sum(-1, keepdim=True) - 0.25)) @ v


@left("relu", "softmax", "no ")
def relu_attention(q, k, v):
    return (scores(q, k).relu() / k.shape[2]) @ v


@left("sigmoid", "softmax", "no ")
def sigmoid_attention(q, k, v):
    return scores(q, k).sigmoid() @ v


@left("relu", "sum", "no ", "clamp")
def sparsemax_like(q, k, v):
    s = scores(q, k)
    weights = (s - s.mean(-1, keepdim=True)).relu()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@left("softmax", "stands", "product", "no ")
def double_softmax(q, k, v):
    return scores(q, k).softmax(-1).softmax(-1) @ v


@left("exponential", "log", "scores", "random", "noise", "used", "stands", "product")
def gumbel_softmax(q, k, v):
    return F.gumbel_softmax(scores(q, k), tau=0.7, dim=-1) @ v


# What is done to the scores.

STANDS = ("stands between", "scores", "product")


@left(*STANDS, "pow")
def scores_squared(q, k, v):
    return scores(q, k).square().softmax(-1) @ v


@left(*STANDS, *USED, "mul", "scale")
def scores_times_themselves(q, k, v):
    s = scores(q, k)
    return (s * s).softmax(-1) @ v


@left(*STANDS, "clamp")
def scores_clamped(q, k, v):
    return scores(q, k).clamp(-1, 1).softmax(-1) @ v


@left(*STANDS, "round")
def scores_rounded(q, k, v):
    return (q @ k.mT).div(0.5, rounding_mode="floor").softmax(-1) @ v


@left(*STANDS, "abs")
def distances_of_scores(q, k, v):
    return (-scores(q, k).abs()).softmax(-1) @ v


@left(*STANDS, *USED, "norm", "mean")
def scores_normalised(q, k, v):
    return F.layer_norm(scores(q, k), (k.shape[2],)).softmax(-1) @ v


@left("differ between", "no queries share", *STANDS, extra=lambda q, k, v: (torch.randn(4, 4),))
def heads_mixed_before_the_softmax(q, k, v, mix):
    return torch.einsum("bhqk,hg->bgqk", scores(q, k), mix).softmax(-1) @ v


@either(*STANDS, "tensor", "scale", extra=lambda q, k, v: (torch.rand(k.shape[2]) + 0.5,))
def temperature_per_key(q, k, v, temperature):
    return (scores(q, k) * temperature).softmax(-1) @ v


@either(*STANDS, "tensor", "scale", extra=lambda q, k, v: (torch.rand(q.shape[2], 1) + 0.5,))
def temperature_per_query(q, k, v, temperature):
    return (scores(q, k) / temperature).softmax(-1) @ v


@either(*STANDS, "tensor", "scale", extra=lambda q, k, v: (torch.rand(q.shape[2], k.shape[2]),))
def temperature_per_pair(q, k, v, temperature):
    return (scores(q, k) * temperature).softmax(-1) @ v


@either(*STANDS, *USED, "random", "noise")
def noise_like_the_scores(q, k, v):
    s = scores(q, k)
    return (s + torch.randn_like(s)).softmax(-1) @ v


@either(*STANDS, "random", "noise")
def noise_of_its_own(q, k, v):
    return (scores(q, k) + torch.randn(q.shape[2], k.shape[2]).to(q.dtype)).softmax(-1) @ v


@either(*STANDS, "two", "add", "mask", "bias")
def sum_of_two_products(q, k, v):
    return (q @ k.mT + q.flip(2) @ k.flip(1).mT).softmax(-1) @ v


@either(*STANDS, "cat")
def two_sets_of_keys(q, k, v):
    both = torch.cat([scores(q, k), scores(q, -k)], -1)
    return both.softmax(-1) @ torch.cat([v, v.flip(2)], 2)


@either(*STANDS, "cat", "slice", extra=lambda q, k, v: (torch.randn(1, 4, 1, 2),))
def two_sink_columns(q, k, v, sinks):
    both = torch.cat([scores(q, k), sinks.expand(q.shape[0], -1, q.shape[2], -1)], -1)
    return both.softmax(-1)[..., :-2] @ v


@either(*STANDS, "cat", "slice", extra=lambda q, k, v: (torch.randn(1, 4, 1, 1),))
def first_weight_dropped_instead_of_the_sink(q, k, v, sinks):
    both = torch.cat([scores(q, k), sinks.expand(q.shape[0], -1, q.shape[2], -1)], -1)
    return both.softmax(-1)[..., 1:] @ v


@either("sink", "cat", extra=lambda q, k, v: (torch.randn(1, 4, q.shape[2], 1),))
def a_sink_per_query(q, k, v, sinks):
    both = torch.cat([scores(q, k), sinks.expand(q.shape[0], -1, -1, -1)], -1)
    return both.softmax(-1)[..., :-1] @ v


@either(*STANDS, "flip")
def keys_reversed_in_the_scores(q, k, v):
    return scores(q, k).flip(-1).softmax(-1) @ v


@either(*STANDS, "tanh", "cap")
def cap_of_two_numbers(q, k, v):
    return (torch.tanh(scores(q, k) / 2) * 3).softmax(-1) @ v


@exact()
def cap_below_zero(q, k, v):
    return (-(torch.tanh(scores(q, k) / 2) * 3)).softmax(-1) @ v


@left("capped at 0")
def cap_of_zero(q, k, v):
    return (torch.tanh(scores(q, k)) * 0).softmax(-1) @ v


@left(*STANDS, "tanh", "cap", "mask")
def cap_after_the_mask(q, k, v):
    """The cap brings what was hidden back to -2."""
    s = scores(q, k).masked_fill(future(q, k), -INF)
    return (torch.tanh(s / 2) * 2).softmax(-1) @ v


@either(*STANDS, "tanh", "cap")
def cap_twice(q, k, v):
    return torch.tanh(torch.tanh(scores(q, k)) * 2).softmax(-1) @ v


# What masks do not hide, or hide elsewhere.

NOT_LOW = ("low enough", "hide", "fill", "mask", "scaled after")


@either(*NOT_LOW, "bias", "add")
def bias_of_minus_five(q, k, v):
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(future(q, k), -5.0)
    return (scores(q, k) + mask).softmax(-1) @ v


def padding(q, k, v):
    return (torch.arange(k.shape[2]) < torch.tensor([[5], [k.shape[2]]]),)


@exact("bias", extra=padding)
def truth_added_as_a_number(q, k, v, pad):
    return (scores(q, k) + pad[:, None, None]).softmax(-1) @ v


@exact("bias", extra=padding)
def truth_of_two_added_as_a_number(q, k, v, pad):
    return (scores(q, k) + (pad[:, None, None] & ~future(q, k))).softmax(-1) @ v


@exact("keys where", extra=padding)
def truth_subtracted_often_enough_to_hide(q, k, v, pad):
    return torch.add(scores(q, k), ~pad[:, None, None], alpha=-1000000).softmax(-1) @ v


@either(*NOT_LOW)
def fill_of_zero(q, k, v):
    return scores(q, k).masked_fill(future(q, k), 0.0).softmax(-1) @ v


@either(*NOT_LOW)
def fill_of_minus_five(q, k, v):
    return scores(q, k).masked_fill(future(q, k), -5.0).softmax(-1) @ v


@either(*NOT_LOW)
def where_else_minus_five(q, k, v):
    return torch.where(~future(q, k), scores(q, k), -5.0).softmax(-1) @ v


@either(*NOT_LOW, *STANDS, "tensor")
def mask_multiplied_with_the_scores(q, k, v):
    return (scores(q, k) * (~future(q, k)).to(q.dtype)).softmax(-1) @ v


@either(*NOT_LOW)
def mask_shrunk_by_a_later_scale(q, k, v):
    """-1e4 becomes -1."""
    s = scores(q, k).masked_fill(future(q, k), -1e4)
    return (s * 1e-4).softmax(-1) @ v


@either(*NOT_LOW)
def mask_turned_round_by_a_later_scale(q, k, v):
    """-1e6 becomes +1e6: only what was hidden is seen, but for the last row."""
    s = scores(q, k).masked_fill(future(q, k), -1e6)
    return (s * -1.0).softmax(-1) @ v


@either(*NOT_LOW, *USED)
def mask_that_depends_on_the_scores(q, k, v):
    s = scores(q, k)
    return s.masked_fill(s < s.mean(-1, keepdim=True), -INF).softmax(-1) @ v


@left(*NOT_LOW, *USED, "scatter", "topk")
def only_the_top_scores(q, k, v):
    s = scores(q, k)
    lowest = s.topk(3, -1).values[..., -1:]
    return torch.where(s >= lowest, s, -INF).softmax(-1) @ v


@left(*USED, "topk", "stands")
def only_the_top_weights(q, k, v):
    weights = scores(q, k).softmax(-1)
    best, index = weights.topk(3, -1)
    return torch.zeros_like(weights).scatter(-1, index, best) @ v


@either("stands", "masked_fill", "after the softmax")
def mask_after_the_softmax(q, k, v):
    return scores(q, k).softmax(-1).masked_fill(future(q, k), 0.0) @ v


@either("stands", "mul", "scale", "tensor", "after the softmax")
def mask_multiplied_with_the_weights(q, k, v):
    return (scores(q, k).softmax(-1) * (~future(q, k)).to(q.dtype)) @ v


@left("stands", *USED, "mul", "tensor")
def weights_masked_and_renormalised(q, k, v):
    weights = scores(q, k).softmax(-1) * (~future(q, k)).to(q.dtype)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@exact("offset 1")
def one_key_of_the_future(q, k, v):
    return scores(q, k).masked_fill(future(q, k, 2), -INF).softmax(-1) @ v


@exact("offset -1")
def not_itself(q, k, v):
    """The first query sees nothing: NaN in eager."""
    return scores(q, k).masked_fill(future(q, k, 0), -INF).softmax(-1) @ v


@exact("offset 1")
def one_key_of_the_future_by_comparison(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return torch.where(j <= i + 1, scores(q, k), LOWEST).softmax(-1) @ v


@exact("causal", kv_len=lambda length: length + 4)
def top_left_where_keys_are_more(q, k, v):
    return scores(q, k).masked_fill(future(q, k), -INF).softmax(-1) @ v


@exact("offset", kv_len=lambda length: length + 4)
def bottom_right_where_keys_are_more(q, k, v):
    return scores(q, k).masked_fill(future(q, k, k.shape[2] - q.shape[2] + 1), -INF).softmax(-1) @ v


@either(*NOT_LOW, "proven", "causal")
def only_the_future(q, k, v):
    return scores(q, k).masked_fill(~future(q, k, 0), -INF).softmax(-1) @ v


@either(*NOT_LOW, "proven", "or", "causal")
def causal_or_the_first_keys(q, k, v):
    hidden = future(q, k) & (torch.arange(k.shape[2]) >= 3)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v


@either(*NOT_LOW, "proven", "head", "tensor")
def another_mask_per_head(q, k, v):
    reach = torch.tensor([1, 2, 3, 20])[:, None, None]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return torch.where(i - j < reach, scores(q, k), -INF).softmax(-1) @ v


@either(*NOT_LOW, "proven", "dilated", "tensor")
def every_other_key(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return torch.where((i - j) % 2 == 0, scores(q, k), -INF).softmax(-1) @ v


@either(*NOT_LOW, *USED, "written", "in place", "stale")
def mask_changed_after_it_was_used(q, k, v):
    hidden = future(q, k)
    s = scores(q, k).masked_fill(hidden, -INF)
    hidden.zero_()
    return s.softmax(-1) @ v


@either(*NOT_LOW, *USED, "written", "in place", "stale")
def mask_changed_before_it_is_used(q, k, v):
    hidden = future(q, k)
    view = hidden[:, :2]
    view.zero_()
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v


# What is done to the weights.

WEIGHTS = ("stands between", "weights", "values", "scaled")


@either(*WEIGHTS)
def weights_doubled(q, k, v):
    return (scores(q, k).softmax(-1) * 2) @ v


@either(*WEIGHTS, extra=lambda q, k, v: (torch.rand(k.shape[2]),))
def weights_scaled_per_key(q, k, v, factor):
    return (scores(q, k).softmax(-1) * factor) @ v


@left(*WEIGHTS)
def weights_plus_a_number(q, k, v):
    return (scores(q, k).softmax(-1) + 0.01) @ v


@left(*WEIGHTS, *USED)
def weights_minus_their_mean(q, k, v):
    weights = scores(q, k).softmax(-1)
    return (weights - weights.mean(-1, keepdim=True)) @ v


@left(*WEIGHTS)
def difference_of_two_weights(q, k, v):
    return (scores(q, k).softmax(-1) - 0.3 * scores(q.flip(1), k).softmax(-1)) @ v


@left(*WEIGHTS, "mean")
def weights_averaged_over_heads(q, k, v):
    return scores(q, k).softmax(-1).mean(1, keepdim=True) @ v


@left(*WEIGHTS, "einsum", "permute", extra=lambda q, k, v: (torch.randn(4, 4),))
def heads_mixed_after_the_softmax(q, k, v, mix):
    return torch.einsum("bhqk,hg->bgqk", scores(q, k).softmax(-1), mix) @ v


@left(*WEIGHTS, "round", "mul")
def weights_quantised(q, k, v):
    return (scores(q, k).softmax(-1) * 255).round() / 255 @ v


@left(*WEIGHTS, "roll")
def weights_moved_by_one_key(q, k, v):
    return scores(q, k).softmax(-1).roll(1, -1) @ v


@left(*WEIGHTS, "slice", "length")
def values_that_are_fewer(q, k, v):
    return scores(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]


@left(*WEIGHTS, "slice", "length", "pad")
def values_that_are_more(q, k, v):
    return F.pad(scores(q, k).softmax(-1), (0, 1), value=0.5) @ F.pad(v, (0, 0, 0, 1), value=1.0)


@left("dropout", "random", *WEIGHTS)
def dropout_on_the_weights(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.3, training=True) @ v


@left("dropout")
def dropout_in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)


@left("dropout", "random", *STANDS)
def dropout_on_the_scores(q, k, v):
    return F.dropout(scores(q, k), 0.3, training=True).softmax(-1) @ v


# What has no query, key or value.

@either("product", "dims", "batch", *WEIGHTS, extra=lambda q, k, v: (torch.randn(8, 5), torch.randn(5, 6)))
def router_with_a_soft_mixture(q, k, v, router, experts):
    return (q.transpose(1, 2).flatten(2)[..., :8] @ router).softmax(-1) @ experts


@left("product", "topk", *WEIGHTS, *USED, extra=lambda q, k, v: (torch.randn(5, 8), torch.randn(5, 8)))
def router_with_top_experts(q, k, v, router, experts):
    best, index = F.linear(q, router).softmax(-1).topk(2, -1)
    return (best[..., None] * experts[index]).sum(-2)


@either("product", "dim", "scores", *WEIGHTS, extra=lambda q, k, v: (torch.randn(8, 1),))
def pooling_by_learned_weights(q, k, v, score):
    return (k @ score).softmax(2).mT @ v


@either("product", "stands", "scores", "input")
def scores_that_came_from_elsewhere(q, k, v):
    return (q.cumsum(2)[..., :1] + k.sum(-1)[:, :, None]).softmax(-1) @ v


@left("returned", "product", "values", "no ", "used")
def classifier(q, k, v):
    return scores(q, k).softmax(-1)


@left("product", "sum", "stands", "mul", "no ")
def product_by_multiply_and_sum_with_a_norm(q, k, v):
    distance = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    return (-distance).softmax(-1) @ v


@exact()
def one_tensor_for_everything(q, k, v):
    return F.softmax(q @ q.mT, -1) @ q


@exact()
def attention_on_attention(q, k, v):
    first = scores(q, k).softmax(-1) @ v
    return scores(first, first).softmax(-1) @ first


@pytest.mark.parametrize("case", CASES, ids=[case.function.__name__ for case in CASES])
def test_near_misses(case):
    inputs = []
    for length in LENGTHS:
        operands = qkv(length, case.kv_len(length))
        inputs.append((*operands, *case.extra(*operands)))
    records = fate(case.function, *inputs)
    refused = [record for record in records if record.outcome == "refused"]
    taken = [record for record in records if record.outcome != "refused"]
    if case.fate == "exact":
        assert taken and not refused, refused
        assert case.mask in taken[0].mask
    if case.fate == "left":
        assert not taken, taken
    for record in refused:
        assert any(reason in record.why for reason in case.reasons), record.why
        assert record.line.startswith("test_hostile.py:")
