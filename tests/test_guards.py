"""One graph per bucket, whatever is called in whatever order, and every call under its own bucket's budget."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsify
from sparsify import Bucket, Budget, Plan, backend, ops
from sparsify.kernels import oracle, rule

MASKED_BATCH_ONE = 0 if torch.__version__ >= (2, 13) else 1
"""Graphs that torch adds by itself: before 2.13, tracing SDPA with a mask tells a batch of 1 apart."""

EDGES = Plan((Bucket(1, 32, Budget.dense()), Bucket(32, 96, Budget(0.01)), Bucket(96, None, Budget(0.1))))


class TinyModel(nn.Module):
    """One layer of attention: hand-written or SDPA, causal or not, padded or not."""

    def __init__(self, form: str, causal: bool, heads: int = 2, dim: int = 8):
        super().__init__()
        self.form, self.causal, self.heads = form, causal, heads
        self.embed = nn.Embedding(50, heads * dim)
        self.project = nn.Linear(heads * dim, 3 * heads * dim)

    def queries_keys_values(self, ids):
        parts = self.project(self.embed(ids)).chunk(3, -1)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts]

    def forward(self, ids, padding=None):
        q, k, v = self.queries_keys_values(ids)
        length = ids.shape[1]
        keep = None
        if self.causal:
            keep = torch.arange(length)[None] <= torch.arange(length)[:, None]
        if padding is not None:
            keep = padding[:, None, None] if keep is None else keep & padding[:, None, None]
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2)
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        if keep is not None:
            scores = scores + torch.where(keep, 0.0, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        yield


@pytest.fixture
def graphs(monkeypatch):
    """(bucket, budget) of every graph that was compiled."""
    compiled = []
    monkeypatch.setattr(backend, "log_records", lambda records: compiled.append(
        [(record.bucket, record.budget) for record in records]))
    return compiled


def random_length(most: int = 4096) -> int:
    """From 2 (a length of 1 is a graph of its own), mostly short."""
    return min(most, int(2 ** random.uniform(1, 8)) if random.random() < 0.97 else random.randint(256, most))


def random_padding(batch: int, length: int) -> torch.Tensor:
    padding = torch.ones(batch, length, dtype=torch.bool)
    for row in padding:
        cut = random.randrange(length)
        row[cut + 1:] = False
        if random.random() < 0.5:
            row.copy_(row.flip(0))
    return padding


def test_random_lengths_in_random_order_compile_one_graph_per_bucket(graphs):
    model = sparsify.compile(TinyModel("sdpa", causal=True), EDGES, backend="eager", fullgraph=True)
    for _ in range(60):
        length, batch = random.randint(2, 200), random.randint(1, 3)
        with ops.counting() as counters:
            model(torch.randint(50, (batch, length)))
        assert (counters.density(0) is None) == EDGES.bucket_of(length).budget.is_dense
    assert sorted(graphs) == sorted([[("[1, 32)", "dense")], [("[32, 96)", "tolerance 0.01")],
                                     [("[96, inf)", "tolerance 0.1")]])


@pytest.mark.parametrize("first", [1, 2, 3])
def test_batch_one_and_duck_shapes_share_a_graph(graphs, first):
    model = sparsify.compile(TinyModel("softmax chain", causal=True), EDGES, backend="eager", fullgraph=True)
    for batch in (first, 2, 1, 3, 8):  # 2 is the number of heads, 8 the head dim
        model(torch.randint(50, (batch, 8)))
    model(torch.randint(50, (2, 2)))
    assert len(graphs) == 1


def test_a_length_of_one_runs(graphs):
    model = TinyModel("sdpa", causal=True)
    expected = model(torch.tensor([[3]]))
    sparsify.compile(model, EDGES, backend="eager", fullgraph=True)
    torch.testing.assert_close(model(torch.tensor([[3]])), expected)
    assert len(graphs) == 1


def test_many_buckets_never_fall_back_to_eager(graphs):
    plan = Plan(tuple(Bucket(1 + 4 * i, 5 + 4 * i if i < 19 else None, Budget(i / 40)) for i in range(20)))
    model = sparsify.compile(TinyModel("sdpa", causal=False), plan, backend="eager")
    for i in range(20):
        model(torch.randint(50, (2, 3 + 4 * i)))
    assert len(graphs) == 20


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("form", ["sdpa", "softmax chain"])
def test_random_calls_are_exact_under_a_dense_plan(form, causal, graphs):
    model = TinyModel(form, causal)
    compiled = sparsify.compile(lambda *inputs: model(*inputs), Plan.dense(), backend="eager", fullgraph=True)
    for _ in range(50):
        batch, length = random.randint(1, 3), random_length()
        ids = torch.randint(50, (batch, length))
        inputs = (ids, random_padding(batch, length)) if random.random() < 0.5 else (ids,)
        got, expected = compiled(*inputs), model(*inputs)
        sees = _rows_that_see(length, causal, inputs[1] if len(inputs) > 1 else None).expand(batch, -1)
        torch.testing.assert_close(got[sees], expected[sees], atol=1e-5, rtol=1e-5)
    assert len(graphs) <= 2 + MASKED_BATCH_ONE  # padded and not


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_random_calls_are_the_tolerances_own_reference_under_a_sparse_plan(causal, graphs):
    budget = Budget(0.03)
    model = TinyModel("sdpa", causal)
    with torch.no_grad():
        model.project.weight.mul_(6)  # peaks: most blocks fall below the tolerance
    compiled = sparsify.compile(lambda *inputs: model(*inputs), Plan((Bucket(1, None, budget),)), backend="eager",
                                fullgraph=True)
    dropped = 0
    for _ in range(25):
        batch, length = random.randint(1, 3), random_length(1024)
        ids = torch.randint(50, (batch, length))
        inputs = (ids, random_padding(batch, length)) if random.random() < 0.5 else (ids,)
        with ops.counting() as counters:
            got = compiled(*inputs)
        dropped += counters.density(0) < 1
        expected = _sparse_reference(model, inputs, budget)
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) <= 2 + MASKED_BATCH_ONE  # padded and not
    print(f"{dropped} of 25 calls dropped blocks")


def _rows_that_see(length, causal, padding):
    seen = oracle.visible(length, length, 0 if causal else None, padding, torch.device("cpu"))
    return seen.any(-1)[:, 0]


def _sparse_reference(model, inputs, budget):
    """Attention in float64 over the blocks that selection keeps."""
    q, k, v = model.queries_keys_values(inputs[0])
    masks = {"scale": 8**-0.5, "causal_offset": 0 if model.causal else None,
             "key_mask": inputs[1] if len(inputs) > 1 else None}
    lists = ops.select_blocks(q, k, masks["scale"], masks["causal_offset"], None, masks["key_mask"], None, None, None,
                              0.0, None, budget.tolerance, budget.max_density, budget.sinks, budget.local,
                              budget.singles)
    blocks = (k.shape[2] + 63) // 64
    kept = rule.unpack(oracle.KeptLists(*lists), blocks)
    out, _ = oracle.attention(q.double(), k.double(), v.double(), kept=kept, **masks)
    return out.transpose(1, 2).flatten(2)


def test_the_settings_of_tracing_do_not_leak():
    from torch.fx.experimental import _config as shapes

    before = (shapes.use_duck_shape, shapes.backed_size_oblivious, torch._dynamo.config.recompile_limit)
    model = sparsify.compile(TinyModel("sdpa", causal=True), EDGES, backend="eager")
    model(torch.randint(50, (2, 9)))
    with pytest.raises(Exception):  # noqa: B017
        model("no ids")
    assert (shapes.use_duck_shape, shapes.backed_size_oblivious, torch._dynamo.config.recompile_limit) == before
