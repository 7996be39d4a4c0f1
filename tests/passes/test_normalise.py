"""Normalised graphs compute what the function computes, in one spelling, and know where they come from."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, qkv
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("spelling", [
    lambda x: torch.softmax(x, -1), lambda x: x.softmax(dim=-1), lambda x: F.softmax(x, -1),
    lambda x: torch.nn.Softmax(-1)(x),
])
def test_every_spelling_of_softmax_is_one_op(spelling):
    assert targets(capture(spelling, torch.randn(3, 5))) == [aten.softmax.int]


@pytest.mark.parametrize("spelling", [lambda x, y: x @ y, torch.matmul, lambda x, y: x.matmul(y)])
def test_every_spelling_of_matmul_is_one_op(spelling):
    assert targets(capture(spelling, torch.randn(3, 5), torch.randn(5, 4))) == [aten.matmul.default]


def multi_head(q, k, v):
    x = q.flatten(2)[:, :, :8]
    weight = torch.eye(24, 8)
    return F.multi_head_attention_forward(x, x, x, 8, 2, weight, None, None, None, False, 0.0, torch.eye(8), None,
                                          training=False, need_weights=False)[0]


def vmapped_mask(q, k, v):
    rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    mask = torch.vmap(lambda i: torch.vmap(lambda j: j <= i)(columns))(rows)
    return F.scaled_dot_product_attention(q, k, v, mask)


def checkpointed(q, k, v):
    return checkpoint(lambda q: F.scaled_dot_product_attention(q, k, v), q, use_reentrant=False)


def branch(q, k, v):
    return torch.cond(q.sum() > 0, lambda q: q.sin(), lambda q: q.cos(), (q,))


def autocast_region(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        q = q @ k.mT
    return q.float() @ v


def written(q, k, v):
    scores = q @ k.mT
    scores[:, :, 0].mul_(0.5)
    scores.add_(1)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("function", [multi_head, vmapped_mask, checkpointed, branch, autocast_region, written],
                         ids=lambda function: function.__name__)
def test_the_numbers_stay(function):
    inputs = qkv(9, heads=2, dim=8)
    seen = []

    def backend(gm, example_inputs):
        from sparsify.passes import normalise

        seen.append(normalise(gm, example_inputs))
        return seen[-1].forward

    torch._dynamo.reset()
    got = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, function(*inputs))
    assert seen


def test_the_dtype_of_an_autocast_region_is_seen():
    graph = capture(autocast_region, *qkv(9))
    first = next(node for node in graph.graph.nodes if node.target is aten.matmul.default)
    assert first.meta["val"].dtype == torch.bfloat16


def test_a_failure_inside_a_region_leaves_no_autocast_behind():
    def backend(gm, example_inputs):
        from sparsify.passes import normalise

        gm.graph.find_nodes(op="output")[0].args = (("not", torch.nn.ReLU()),)
        for node in gm.graph.nodes:
            if node.op == "call_function" and "_exit_autocast" in str(node.target):
                node.target = broken
        gm.recompile()
        with pytest.raises(RuntimeError, match="on purpose"):
            normalise(gm, example_inputs)
        return lambda *inputs: (inputs[0],)

    def broken(*args):
        raise RuntimeError("on purpose")

    torch._dynamo.reset()
    torch.compile(autocast_region, backend=backend, dynamic=False)(*qkv(9))
    assert not torch.is_autocast_enabled("cpu")


def test_nodes_know_their_source_and_whether_gradients_flow():
    weight = torch.randn(8, 8, requires_grad=True)

    def function(x):
        with torch.no_grad():
            free = x @ weight
        return free.cos() + (x @ weight).sin() + (x @ weight).detach().exp()

    with torch.enable_grad():
        graph = capture(function, torch.randn(3, 8))
    recorded = {str(node.target): node.meta["requires_grad"] for node in graph.graph.nodes}
    assert not recorded["aten.cos.default"]
    assert recorded["aten.sin.default"]
    assert not recorded["aten.exp.default"]
    assert all("test_normalise.py" in n.stack_trace for n in graph.graph.nodes if n.target is aten.matmul.default)
