"""Normalised graphs compute what the function computes, in one spelling, and know where they come from."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, compiled, qkv, rewritten
from torch._dynamo.backends.debugging import aot_eager
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from sparsify.backend import tracing_config
from sparsify.passes.normalise import graphs, normalise

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


def loop(q, k, v):
    def body(i, x, k, v):
        return i + 1, F.scaled_dot_product_attention(x, k, v), k.clone(), v.clone()

    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, x, k, v: i < 2, body, (start, q, k, v))[1]


@torch.compiler.nested_compile_region
def region(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def regions(q, k, v):
    return region(region(q, k, v), k, v)


def masked_in_place(q, k, v):
    for _ in range(3):
        scores = q @ k.mT
        scores.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), float("-inf"))
        q = torch.softmax(scores, -1) @ v
        q.mul_(0.5).add_(k)
    return q


def cached(q, k, v):
    keys, values = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 8)
    for start in (0, 3):
        keys.index_copy_(2, torch.arange(q.shape[2]) + start, k)
        values[:, :, start:start + q.shape[2]] = v
        q = F.scaled_dot_product_attention(q, keys, values)
    return q


def packed(q, k, v):
    for _ in range(3):
        a, b, c = torch.cat([q, k, v], -1).chunk(3, -1)
        q = F.scaled_dot_product_attention(a, b, c) + a.unbind(-1)[0].unsqueeze(-1)
    return q


def no_grad_inside(q, k, v):
    for _ in range(2):
        with torch.no_grad():
            q = F.scaled_dot_product_attention(q, k, v)
        q = q + k
    return q


def autocast_layers(q, k, v):
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            inner = q @ k.mT
        q = inner.float() @ v + (q @ k.mT).softmax(-1) @ v
    return q


def turned_in_place(q, k, v):
    for _ in range(2):
        a, b = q + 0, k + 0
        a.transpose_(-2, -1)
        q = (a.transpose(-2, -1) + b).cos()
    return q


def constants(q, k, v):
    for factor in (2.0, 3.0):
        q = (q * torch.tensor([factor])).cos() + torch.tensor(factor)
    return q


def signed_zeros(q, k, v):
    return torch.copysign(q, torch.full_like(q, 0.0)) + 2 * torch.copysign(q, torch.full_like(q, -0.0))


def one_or_true(q, k, v):
    positive = q > 0
    return (positive + 1) * q + (positive + True) * k + (positive + 1.0) * v


@pytest.mark.parametrize("function", [
    multi_head, vmapped_mask, checkpointed, branch, loop, regions, autocast_region, written, masked_in_place, cached,
    packed, no_grad_inside, autocast_layers, turned_in_place, constants, signed_zeros, one_or_true,
], ids=lambda function: function.__name__)
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


@pytest.mark.parametrize("function, bodies", [(checkpointed, 1), (branch, 2), (loop, 2), (regions, 1)],
                         ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dynamic", [True, False])
def test_bodies_are_normalised(function, bodies, dynamic):
    given, found = [], []

    def backend(gm, example_inputs):
        given[:] = [x for x in gm.modules() if isinstance(x, torch.fx.GraphModule)]
        found[:] = graphs(normalise(gm, example_inputs))
        return gm.forward

    compiled(function, backend, dynamic=dynamic)(*qkv(9, heads=2))
    assert len(found) == len(given)
    # Where sizes are symbols, torch 2.11 takes a region for another one at every call.
    assert len(given) == 1 + bodies or (dynamic and function is regions)
    assert all("val" in node.meta and "requires_grad" in node.meta
               for graph in found for node in graph.graph.nodes if node.op == "placeholder")


def test_attention_in_a_body_is_rewritten():
    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-1))

    def function(q, k, v):
        return causal(checkpoint(causal, q, k, v, use_reentrant=False), k, v)

    inputs, run = qkv(9), rewritten(function)
    torch.testing.assert_close(run.call(*inputs), function(*inputs))
    assert [(record.index, record.outcome) for record in run.records] == [(0, "exact"), (1, "exact")]
    assert sorted(x for op in run.ops for x in op if type(x) is int and x < 0) == [-1, -1]  # the causal offsets


def test_no_length_is_fixed():
    """Neither where sizes of 1 are traced apart: there torch guards on whatever it is asked about a size."""
    def function(q, k, v, ids):
        return F.scaled_dot_product_attention(q, k, v, ids[:, None, : q.shape[2], None] == ids[:, None, None])

    seen = []

    def backend(gm, example_inputs):
        seen.append(normalise(gm, example_inputs))
        return seen[-1].forward

    torch._dynamo.reset()
    call = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    with tracing_config({}, size_oblivious=False):
        for q_len, kv_len in ((9, 9), (7, 12)):
            inputs = *qkv(q_len, kv_len), torch.arange(kv_len).expand(2, -1) // 3
            torch.testing.assert_close(call(*inputs), function(*inputs))
    assert len(seen) == 1


def test_every_copied_node_points_at_its_own_source():
    def function(x):
        first = torch.softmax(x, -1)
        return torch.softmax(first, -1)

    graph = capture(function, torch.randn(3, 5))
    first, second = (n for n in graph.graph.nodes if n.target is aten.softmax.int)
    assert "first = " in first.stack_trace and "return " in second.stack_trace
    assert second.args[0] is first


class Scaled(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


def test_numbers_of_layers_are_not_mixed_up():
    layers = torch.nn.Sequential(*(Scaled(scale) for scale in (0.5, 3.0, 7.0)))
    x = torch.randn(3, 5)
    run = rewritten(layers)
    torch.testing.assert_close(run.call(x), layers(x))


def test_lengths_that_are_read_from_tensors_are_not_mixed_up():
    def function(x, lengths):
        parts = []
        for i in range(2):
            length = lengths[i].item()
            torch._check(length >= 1)
            torch._check(length < x.shape[0])
            parts.append(x[:length].sum(0))
        return torch.stack(parts)

    x, lengths = torch.randn(9, 4), torch.tensor([3, 5])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = rewritten(function)
        torch.testing.assert_close(run.call(x, lengths), function(x, lengths))


def test_what_is_computed_and_dropped_is_gone():
    def function(x):
        weights = torch.softmax(x, -1)
        weights.sum()
        return x + 1

    assert targets(capture(function, torch.randn(3, 5))) == [aten.add.Tensor]


def test_inputs_have_the_names_that_the_user_gave_them():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    graph = capture(lambda x, mask: model(x) * mask["keys"], torch.randn(3, 4), {"keys": torch.ones(4)}, dynamic=False)
    names = {node.meta["source"] for node in graph.graph.find_nodes(op="placeholder")}
    assert names == {"x", "mask['keys']", "model.0.weight", "model.0.bias"}


def test_gradients_flow_through_copied_calls():
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def function(x):
        for layer in layers:
            with torch.no_grad():
                gate = (x @ x.mT).softmax(-1)
            x = checkpoint(lambda x, layer=layer: layer(x).relu_() + x, gate @ x, use_reentrant=False)
        return x

    def backend(gm, example_inputs):
        from sparsify.passes import normalise

        return aot_eager(normalise(gm, example_inputs), example_inputs)

    torch._dynamo.reset()
    with torch.enable_grad():
        x = torch.randn(2, 5, 8)
        expected = torch.autograd.grad(function(x).cos().sum(), list(layers.parameters()))
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).cos().sum(), list(layers.parameters())), expected)
