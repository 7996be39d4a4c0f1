"""Protected keys reach every sparse site that has them, and where they cannot the record says so."""

import pytest
import torch
from graphs import qkv, rewritten

from sparsify.plan import Bucket, Budget, Plan

SPARSE = Plan((Bucket(1, None, Budget(0.3)),))
protect_keys = torch.ops.sparsify.protect_keys


def attention(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_mask_reaches_every_site_and_the_marker_is_gone():
    def model(q, k, v, mask):
        q = protect_keys(q, mask)
        return attention(attention(q, k, v), k, v)

    result = rewritten(model, SPARSE)
    for length in (300, 500):  # one graph: both lengths are the same symbol
        q, k, v = qkv(length)
        mask = torch.rand(2, length) > 0.9
        result.call(q, k, v, mask)
        assert len(result.ops) == 2 and all(torch.equal(call[-1], mask) for call in result.ops)
    assert len(result.graphs) == 1
    assert not result.graphs[0].graph.find_nodes(op="call_function", target=protect_keys.default)
    assert [record.protection for record in result.records] == ["protected keys are kept"] * 2
    assert not any(record.lacks_protection for record in result.records)


def test_without_a_marker_nothing_is_protected():
    """The twin: no argument, no word in the record."""
    result = rewritten(attention, SPARSE)
    result.call(*qkv(300))
    assert all(not isinstance(call[-1], torch.Tensor) for call in result.ops)
    assert [record.protection for record in result.records] == [""]


@pytest.mark.parametrize(("rows", "fits"), [(2, True), (1, True), (3, False)])
def test_a_mask_fits_by_its_batch_rows(rows, fits):
    result = rewritten(lambda q, k, v, mask: attention(protect_keys(q, mask), k, v), SPARSE)
    mask = torch.rand(rows, 300) > 0.9
    result.call(*qkv(300), mask)
    (record,) = result.records
    assert record.lacks_protection != fits
    assert isinstance(result.ops[0][-1], torch.Tensor) == fits
    if not fits:
        assert "protected keys are not kept: the mask is [" in record.protection


def test_a_site_with_other_keys_says_so_and_the_one_with_those_keys_does_not():
    def model(q, k, v, other, mask):
        q = protect_keys(q, mask)
        return attention(q, k, v) + attention(q, other, other)

    result = rewritten(model, SPARSE)
    q, k, v = qkv(300)
    result.call(q, k, v, qkv(300, 400)[1], torch.rand(2, 300) > 0.9)
    assert [record.lacks_protection for record in result.records] == [False, True]
    assert "keys" in result.records[1].protection
    assert [isinstance(call[-1], torch.Tensor) for call in result.ops] == [True, False]


def test_a_mask_of_all_keys_serves_queries_that_are_fewer():
    """As a later chunk of a prompt, whose first keys lie in a cache."""
    result = rewritten(lambda q, k, v, mask: attention(protect_keys(q, mask), k, v), SPARSE)
    mask = torch.rand(2, 500) > 0.9
    result.call(*qkv(200, 500), mask)
    assert torch.equal(result.ops[0][-1], mask)


def test_a_dense_site_has_nothing_to_protect():
    result = rewritten(lambda q, k, v, mask: attention(protect_keys(q, mask), k, v))
    result.call(*qkv(300), torch.rand(2, 300) > 0.9)
    assert [record.protection for record in result.records] == [""]


def test_the_innermost_of_two_masks_counts():
    def model(q, k, v, first, second):
        return attention(protect_keys(protect_keys(q, first), second), k, v)

    result = rewritten(model, SPARSE)
    first, second = torch.rand(2, 2, 300) > 0.9
    result.call(*qkv(300), first, second)
    assert torch.equal(result.ops[0][-1], second)


def test_a_site_inside_a_checkpoint_says_why_not():
    def model(q, k, v, mask):
        return torch.utils.checkpoint.checkpoint(attention, protect_keys(q, mask), k, v, use_reentrant=False)

    result = rewritten(model, SPARSE)
    with torch.enable_grad():
        result.call(*qkv(300), torch.rand(2, 300) > 0.9)
    (record,) = result.records
    assert record.outcome == "sparse" and "body of a higher-order op" in record.protection


def test_where_a_length_must_not_be_guarded_only_known_sizes_fit():
    """A strict range promises that no guard compares the length; the model ties mask and keys, or nobody does."""
    def model(q, k, v, mask):
        return attention(protect_keys(q, mask), k, v)

    for tied, kept in ((False, False), (True, True)):
        q, k, v = qkv(300)
        mask = torch.rand(2, 300) > 0.9

        def call(q, k, v, mask, tied=tied):
            return model(q, k, v, mask & (k[:, 0, :, 0] > -1e9) if tied else mask)

        result = rewritten(call, SPARSE)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2, min=2, max=4096)
        result.call(q, k, v, mask)
        assert isinstance(result.ops[0][-1], torch.Tensor) == kept, result.records


def test_the_marker_passes_values_and_gradients_through():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.enable_grad():
        y = protect_keys(x, torch.ones(1, 4, dtype=torch.bool))
        y.sum().backward()
    assert torch.equal(x, y) and torch.equal(x.grad, torch.ones(3, 4))
    torch.library.opcheck(protect_keys, (torch.randn(3, 4), torch.ones(1, 4, dtype=torch.bool)))
