"""What a rewrite leaves behind: the right op, nothing dead, and an output that no user of it can tell from the old."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, qkv, rewritten

import sparsify
from sparsify import ops
from sparsify.ops import crossover
from sparsify.plan import Bucket, Budget, Plan
from tests.numerics import assert_as_good_as_torch, attention_units

SPARSE = Plan((Bucket(1, None, Budget(0.0)),))
aten = torch.ops.aten


def causal_chain(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill_(hidden, -torch.inf)
    return F.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), 0.1, training=False) @ v


def targets(function):
    return [node.target for node in function.graphs[-1].graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("plan", "op"), [
    (Plan.dense(), torch.ops.sparsify.exact_attention.default),
    (SPARSE, torch.ops.sparsify.adaptive_attention.default),
], ids=["dense", "sparse"])
def test_one_op_is_all_that_is_left(plan, op):
    function = rewritten(causal_chain, plan)
    inputs = qkv(9)
    torch.testing.assert_close(function.call(*inputs), causal_chain(*inputs))
    assert [target for target in targets(function) if target is not aten.contiguous.default] == [op]


@pytest.mark.parametrize(("length", "op"), [
    (None, aten.scaled_dot_product_attention.default),  # as many queries as keys: is_causal says it
    (4, torch.ops.sparsify.exact_attention.default),  # fewer: is_causal would align them elsewhere
], ids=["self-attention", "last queries"])
def test_a_dense_site_is_sdpa_where_that_can_say_the_mask(length, op):
    def attention(x):
        return causal_chain(x if length is None else x[:, :, :length], x, x)

    function = rewritten(attention)
    x = qkv(9)[0]
    torch.testing.assert_close(function.call(x), attention(x))
    assert function.records[0].outcome == "exact"
    assert [target for target in targets(function) if target in (
        aten.scaled_dot_product_attention.default, torch.ops.sparsify.exact_attention.default)] == [op]


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_bias_may_have_another_dtype_than_the_scores(dtype, bias_dtype):
    def attention(q, k, v, bias):
        return (q @ k.mT + bias).softmax(-1).to(v.dtype) @ v

    function = rewritten(attention)
    inputs = (*(x.to(dtype) for x in qkv(9)), torch.randn(9, 9).to(bias_dtype))
    assert_as_good_as_torch(function.call(*inputs), attention(*inputs), attention(*(x.double() for x in inputs)),
                            attention_units(*inputs[:2], scale=1.0))
    assert function.records[0].op == "scaled_dot_product_attention"
    (sdpa,) = [x for x in function.graphs[-1].graph.nodes if x.target is aten.scaled_dot_product_attention.default]
    assert sdpa.args[3].meta["val"].dtype == (dtype if bias_dtype == dtype else torch.float32)


@pytest.mark.parametrize("attend", [
    lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1).to(v.dtype) @ v,
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
], ids=["softmax chain", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [Plan.dense(), SPARSE], ids=["dense", "sparse"])
def test_a_cache_in_fewer_bits_is_read_as_it_is_widened(attend, dtype, plan):
    def attention(q, k, v):
        return attend(q, k.to(q.dtype), v.to(q.dtype))

    q, k, v = qkv(9)
    inputs = (q, k.to(dtype), v.to(dtype))
    function = rewritten(attention, plan)
    assert_as_good_as_torch(function.call(*inputs), attention(*inputs), attend(*(x.double() for x in inputs)),
                            attention_units(q, inputs[1].double(), scale=0.3))
    assert function.records[0].outcome != "refused"


def test_the_op_is_told_its_budget_and_place():
    plan = Plan((Bucket(1, None, Budget(0.25, max_density=0.5, sinks=2, local=3, singles=4), {0: Budget.dense()}),))
    function = rewritten(lambda q, k, v: causal_chain(causal_chain(q, k, v), k, v), plan)
    function.call(*qkv(9))
    first, second = function.records
    assert (first.outcome, second.outcome) == ("exact", "sparse")
    assert function.ops[1][3:] == (pytest.approx(0.3), 0, *[None] * 5, 0.0, None, 0.25, 0.5, 2, 3, 4, 1, ops.VERSION)


def test_the_op_is_told_what_density_calibration_measured():
    function = rewritten(causal_chain, Plan((Bucket(1, None, Budget(0.25, peaks=31.5)),)), dynamic=False)
    function.call(*qkv(9))
    [site] = [node for node in function.graphs[-1].graph.nodes
              if node.target is torch.ops.sparsify.adaptive_attention.default]
    assert site.args[-2:] == (ops.VERSION, 31.5)
    record = function.records[0]
    assert (record.heads, record.kv_heads, record.head_dim, record.value_dim) == (4, 4, 8, 8)


def test_sdpa_without_a_mask_is_kept_where_the_plan_is_dense():
    function = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    function.call(*qkv(9))
    assert function.records[0].outcome == "kept dense"
    assert targets(function) == [aten.scaled_dot_product_attention.default]


def causal_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


LONG = Plan((Bucket(1, 1100, Budget(0.1)), Bucket(1100, None, Budget.dense())))


@pytest.mark.parametrize(("attention", "length", "dtype", "plan", "dynamic", "op"), [
    (causal_sdpa, 1100, torch.float32, Plan.dense(), False, "exact_attention"),
    (causal_chain, 1100, torch.float32, Plan.dense(), False, "exact_attention"),
    (causal_sdpa, 1000, torch.float32, Plan.dense(), False, "scaled_dot_product_attention"),  # too short to gain
    (causal_sdpa, 1100, torch.bfloat16, Plan.dense(), False, "scaled_dot_product_attention"),  # SDPA's are faster
    (causal_sdpa, 1100, torch.float32, LONG, True, "exact_attention"),  # no call of this graph is shorter
    (causal_sdpa, 1100, torch.float32, Plan.dense(), True, "scaled_dot_product_attention"),  # others may be
])
def test_a_dense_site_is_the_exact_op_where_every_call_is_long(attention, length, dtype, plan, dynamic, op):
    function = rewritten(lambda x: attention(x, x + 1, x - 1), plan, dynamic=None if dynamic else False)
    x, tolerance = qkv(length)[0].to(dtype), 1e-5 if dtype == torch.float32 else 2e-2
    if dynamic:
        torch._dynamo.mark_dynamic(x, 2)
    torch.testing.assert_close(function.call(x), attention(x, x + 1, x - 1), rtol=tolerance, atol=tolerance)
    assert [record.op.rpartition(".")[2] for record in function.records] == [op]


@pytest.mark.parametrize(("dynamic", "batch"), [(False, 3), (True, 1)])
def test_whether_the_exact_op_may_gain_is_asked_for_the_least_batch(dynamic, batch, monkeypatch):
    asked = []
    monkeypatch.setattr(crossover, "op_may_beat_sdpa", lambda *sizes, batch: asked.append((*sizes, batch)))
    x = torch.rand(3, 4, 100, 8)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    function = rewritten(lambda x: causal_sdpa(x, x + 1, x - 1), Plan.dense(), dynamic=None if dynamic else False)
    function.call(x)
    assert asked == [("cpu", torch.float32, 100, 4, 16, batch)]


def test_layers_share_one_key_mask():
    def layers(q, k, v, pad):
        mask = pad[:, None, None].long() > 0
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, mask)
        return q

    function = rewritten(layers)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[1, 5:] = False
    inputs = (*qkv(9), pad)
    torch.testing.assert_close(function.call(*inputs), layers(*inputs))
    assert len({id(arguments[5]) for arguments in function.ops}) == 1


def masked_keys(q, k, v, ids):
    return F.scaled_dot_product_attention(q, k, v, (ids > 0)[:q.shape[0], None, None])


def masked_keys_up_to_a_length(q, k, v, ids):
    rows = ids[:q.shape[0]] > 0
    lengths = ids.sum(-1)[:q.shape[0], None]
    return F.scaled_dot_product_attention(q, k, v, (rows & (torch.arange(k.shape[2]) < lengths))[:, None, None])


def same_ids(q, k, v, ids):
    ids = ids[:q.shape[0]]
    return F.scaled_dot_product_attention(q, k, v, (ids[:, None, :, None] == ids[:, None, None]))


@pytest.mark.parametrize("attention", [masked_keys, masked_keys_up_to_a_length, same_ids])
@pytest.mark.parametrize("spare", [0, 3])
def test_rows_of_a_mask_beyond_the_batch_are_left_out(attention, spare):
    function = rewritten(attention)
    for length in (9, 14):
        ids = torch.randint(0, 3, (2 + spare, length))
        ids[:, 0] = 1
        inputs = (*qkv(length), ids)
        torch.testing.assert_close(function.call(*inputs), attention(*inputs))
    assert [record.op for record in function.records] == ["exact_attention"]
    assert not any(record.mask.startswith("mask") for record in function.records)


def test_a_key_mask_has_the_rows_of_its_site():
    def two_batches(q, k, v, ids):
        return masked_keys(q, k, v, ids), masked_keys(q[:2], k[:2], v[:2], ids)

    function = rewritten(two_batches)
    ids = torch.randint(0, 3, (3, 9))
    ids[:, 0] = 1
    inputs = (*qkv(9, batch=3), ids)
    torch.testing.assert_close(function.call(*inputs), two_batches(*inputs))
    assert [arguments[6].shape[0] for arguments in function.ops] == [3, 2]


def outputs_in_order(first, second, v):
    out = first @ v
    return out, second @ v


def outputs_in_the_other_order(first, second, v):
    later = second @ v
    return first @ v, later


def values_of_a_later_site(first, second, v):
    return first @ (second @ v), v


@pytest.mark.parametrize("use", [outputs_in_order, outputs_in_the_other_order, values_of_a_later_site])
@pytest.mark.parametrize("plan", [Plan.dense(), SPARSE], ids=["dense", "sparse"])
def test_sites_that_share_a_mask_may_end_in_any_order(use, plan):
    def attention(q, k, v, pad):
        hidden = ~pad[:, None, None]
        first = (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
        second = (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
        return use(first, second, v)

    function = rewritten(attention, plan)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[1, 5:] = False
    inputs = (*qkv(9), pad)
    torch.testing.assert_close(function.call(*inputs), attention(*inputs))
    assert [(record.index, record.outcome == "refused") for record in function.records] == [(0, False), (1, False)]
    if plan is SPARSE:
        told = sorted((arguments[-2], arguments[3]) for arguments in function.ops)  # site and scale
        assert told == [(0, 1.0), (1, pytest.approx(0.3))]


@pytest.mark.parametrize("use", [
    lambda out: out,
    lambda out: out.view(out.shape[0], -1),
    lambda out: out.transpose(1, 2).contiguous().view(out.shape[0], out.shape[2], -1),
    lambda out: out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1),
    lambda out: out.flatten(0, 1).view(-1, 8) + 1,
    lambda out: out[:, :, -1:].view(-1, 8),
], ids=["returned", "view", "contiguous view", "reshape", "flatten view", "slice view"])
def test_users_of_the_output_see_the_strides_they_saw(use):
    def attention(q, k, v):
        return use(causal_chain(q, k, v))

    function = rewritten(attention)
    inputs = qkv(9)
    got, expected = function.call(*inputs), attention(*inputs)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
    assert function.records[0].outcome == "exact"


def test_the_usual_layout_costs_no_copy():
    def attention(q, k, v):
        return causal_chain(q, k, v).transpose(1, 2).contiguous().reshape(q.shape[0], q.shape[2], -1)

    function = rewritten(attention)
    function.call(*qkv(9))
    assert targets(function).count(aten.contiguous.default) == 1


def test_source_lines_stay():
    function = rewritten(causal_chain)
    function.call(*qkv(9))
    (node,) = [n for n in function.graphs[-1].graph.nodes if "exact_attention" in str(n.target)]
    assert "test_rewrite.py" in node.stack_trace


def test_masks_that_are_still_needed_stay():
    def attention(q, k, v):
        mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill_(
            torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, mask), mask

    function = rewritten(attention)
    inputs = qkv(9)
    for got, expected in zip(function.call(*inputs), attention(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_writes_to_inputs_stay():
    def attention(q, k, v, cache):
        cache.add_(1)
        return causal_chain(q, k, v)

    function = rewritten(attention)
    cache = torch.zeros(3)
    function.call(*qkv(9), cache)
    assert torch.equal(cache, torch.ones(3))


@pytest.mark.parametrize("function", [
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, k.new_zeros(q.shape[2], k.shape[2])),
    lambda q, k, v: torch.softmax(q @ k.mT, -1, dtype=torch.float32).to(v.dtype) @ v,
], ids=["sdpa", "softmax chain"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_decides_the_dtype(function, inside):
    def attention(q, k, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            return function(q, k, v)

    inputs = qkv(9)
    result = rewritten(attention if inside else function)
    if inside:
        got, expected = result.call(*inputs), attention(*inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = result.call(*inputs), function(*inputs)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)  # a few bfloat16 roundings of values up to 4


def wide_scores(q, k, v, ends):
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(q @ k.mT, -1)
    return ends(weights, v)


def wide_exponentials(q, k, v, ends):
    with torch.autocast("cpu", enabled=False):
        weights = torch.exp(q @ k.mT - 60)
        result = weights @ v
    return result / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(("scores", "ends"), [
    (wide_scores, torch.matmul), (wide_scores, lambda w, v: (w[..., None] * v[:, :, None]).sum(-2)),
    (wide_exponentials, None),
], ids=["product", "summed", "late division"])
def test_scores_that_are_kept_wide_under_autocast_stay_wide(scores, ends):
    def attention(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return scores(q, k, v, ends)

    q, k, v = qkv(33)
    q = q * 8  # large scores: their roundings to bfloat16 would show
    plain, exact = attention(q, k, v), torch.softmax(q.double() @ k.double().mT, -1) @ v.double()
    got = sparsify.compile(attention, Plan.dense(), backend="aot_eager")(q, k, v)
    assert got.dtype == plain.dtype
    assert_as_good_as_torch(got, plain, exact, attention_units(q, k, 1.0) if got.dtype == torch.float32 else 4.0)
    function = rewritten(attention)
    function.call(q, k, v)
    assert [record.op for record in function.records] == ["exact_attention"]


def test_scores_that_autocast_narrows_itself_are_sdpas():
    def attention(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.softmax(q @ k.mT, -1) @ v

    function = rewritten(attention)
    function.call(*qkv(33))
    assert [record.op for record in function.records] == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_prefill_builds_no_tensor_of_queries_and_keys(implementation, padded):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, intermediate_size=48, attn_implementation=implementation)
    model = transformers.LlamaForCausalLM(config).eval()
    length = 47  # no other size of the model
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5 * padded] = 0

    def logits(ids, mask):
        return model(ids, attention_mask=mask if padded else None, use_cache=False).logits

    def squares(graph):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        return [x for x in values if isinstance(x, torch.Tensor) and [int(size) for size in x.shape].count(length) == 2]

    ids = torch.randint(50, (2, length))
    function = rewritten(logits, dynamic=False)
    torch.testing.assert_close(function.call(ids, mask)[mask.bool()], logits(ids, mask)[mask.bool()])
    assert squares(capture(logits, ids, mask, dynamic=False)), "there were some"
    assert not squares(function.graphs[-1])


def test_a_view_behind_a_reshape_still_fits():
    def attention(q, k, v):  # its strides follow from those of the attention: one KV head's queries are views in eager
        q = q.unflatten(1, (2, 2)).flatten(2, 3)
        out = torch.softmax(q @ k.mT, -1) @ v
        return out.unflatten(2, (2, -1)).reshape(q.shape[0], 4, -1, v.shape[3]).view(q.shape[0], 4, -1)

    inputs = qkv(9, heads=4, kv_heads=2, batch=1)
    torch.testing.assert_close(rewritten(attention, dynamic=False).call(*inputs), attention(*inputs))
