"""The budget of a graph is right for every call of it, and a guard is made only where one may be."""

import pytest
import torch
import torch.nn.functional as F
from graphs import qkv, rewritten

from sparsify.plan import Bucket, Budget, Plan

PLAN = Plan((Bucket(1, 16, Budget.dense()), Bucket(16, 64, Budget(0.01)), Bucket(64, None, Budget(0.1))))


def attention(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def test_each_length_runs_its_own_bucket():
    function = rewritten(attention, PLAN)
    for length in (100, 5, 20, 63, 15, 64, 7, 16, 1000):
        function.call(*qkv(length))
        tolerance = PLAN.bucket_of(length).budget.tolerance
        assert [arguments[12] for arguments in function.ops] == ([] if tolerance is None else [tolerance])
    assert len(function.graphs) == 3


def test_a_static_length_needs_no_guard():
    function = rewritten(attention, PLAN, dynamic=False)
    function.call(*qkv(20))
    assert (function.records[0].bucket, function.records[0].why) == ("[16, 64)", "the key length is 20")


def test_equal_neighbours_are_one_graph():
    plan = Plan((Bucket(1, 16, Budget(0.1)), Bucket(16, None, Budget(0.1))))
    function = rewritten(attention, plan)
    for length in (5, 20):
        function.call(*qkv(length))
    assert len(function.graphs) == 1


@pytest.mark.parametrize(("most", "budget"), [(60, "dense"), (15, "dense")])
def test_a_promised_range_across_an_edge_gets_its_most_exact_budget(most, budget):
    function = rewritten(attention, PLAN, dynamic=None)
    q, k, v = qkv(10)
    torch._dynamo.mark_dynamic(q, 2, min=2, max=most)
    torch._dynamo.mark_dynamic(k, 2, min=2, max=most)
    torch._dynamo.mark_dynamic(v, 2, min=2, max=most)
    function.call(q, k, v)
    (record,) = function.records
    assert record.budget == budget
    assert ("no guard may narrow" in record.why) == (most == 60)


def test_a_promised_range_inside_a_bucket_is_known():
    function = rewritten(attention, PLAN, dynamic=None)
    q, k, v = qkv(20)
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 2, min=17, max=60)
    function.call(q, k, v)
    assert function.records[0].why == "known from the range of the key length"
    assert function.records[0].budget == "tolerance 0.01"


def test_an_unbacked_length_gets_the_most_exact_budget():
    plan = Plan((Bucket(1, 16, Budget(0.1)), Bucket(16, None, Budget(0.01))))

    def cut(q, k, v, n):
        length = n.sum().item()
        torch._check(length >= 2)
        torch._check(length <= k.shape[2])
        return attention(q, k[:, :, :length], v[:, :, :length])

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function = rewritten(cut, plan)
        inputs = (*qkv(20), torch.tensor([6, 4]))
        torch.testing.assert_close(function.call(*inputs), cut(*inputs))
    (record,) = function.records
    assert "unbacked" in record.why
    assert record.budget == "tolerance 0.01"


def test_a_single_query_stays_dense_in_one_graph():
    def decode(q, k, v):
        return F.scaled_dot_product_attention(q[:, :, -1:], k, v, k.new_zeros(1, k.shape[2]))

    function = rewritten(decode, PLAN)
    for length in (5, 20, 100):
        function.call(*qkv(length))
    assert len(function.graphs) == 1
    assert function.records[0].outcome == "exact"
