"""The passes as parts: in front of any backend, and on any graph, without `sparsify.compile`."""

import pytest
import torch
from graphs import qkv
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from sparsify.passes import AttentionSite, find_attention, normalise, rewrite, run
from sparsify.plan import Bucket, Budget, Plan


def attention(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_pass_chains_in_front_of_any_backend(inner):
    told = []

    def backend(gm, example_inputs):
        graph, records = run(gm, example_inputs, Plan((Bucket(1, None, Budget(0.0)),)))
        told.extend(records)
        return lookup_backend(inner)(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    for length in (9, 14):
        inputs = qkv(length)
        torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    assert {(record.outcome, record.mask) for record in told} == {("sparse", "causal")}


def test_looking_for_attention_changes_nothing():
    found = []

    def backend(gm, example_inputs):
        before = gm.print_readable(print_output=False)
        found.extend(find_attention(normalise(gm, example_inputs)))
        assert gm.print_readable(print_output=False) == before
        return gm.forward

    torch._dynamo.reset()
    inputs = qkv(9)
    torch.testing.assert_close(torch.compile(attention, backend=backend)(*inputs), attention(*inputs))
    (site,) = found
    assert isinstance(site, AttentionSite)
    assert site.origin.line.startswith("test_alone.py:")


def test_an_exported_program_is_a_graph_too():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    inputs = qkv(9)
    exported = torch.export.export(Model(), inputs).module(check_guards=False)
    graph, records = run(exported, inputs, Plan.dense())
    assert [(record.outcome, record.mask) for record in records] == [("exact", "causal")]
    torch.testing.assert_close(graph(*inputs), attention(*inputs))


def test_an_exported_length_is_never_compared():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    inputs = qkv(40)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Model(), inputs, dynamic_shapes=[{2: length}] * 3)
    graph = normalise(exported.module(check_guards=False), inputs)
    plan = Plan((Bucket(1, 64, Budget(0.1)), Bucket(64, None, Budget(0.3))))
    (record,) = rewrite(graph, plan)
    assert record.outcome == "sparse"
    longer = qkv(100)
    assert graph(*longer).shape == longer[0].shape
