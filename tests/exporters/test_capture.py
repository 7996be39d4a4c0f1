"""Captured programs: the plan is inside, and what torch.export said of the model still holds."""

import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsify
from sparsify.errors import ExportError, ModelError, OptionError, PlanError, ShapeError
from sparsify.exporters.capture import PLANNED, capture
from sparsify.plan import Bucket, Budget, Plan
from tests.exporters.models import ALWAYS, EDGE, PLAN, SECOND_EDGE, TWO_EDGES, Attend, bert, decoder, vit


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def planned(captured) -> list:
    return captured.program.graph.find_nodes(op="call_function", target=PLANNED)


def close(ours, theirs) -> None:
    """Equal to rounding: two orders of the same float32 sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("make", [decoder, pytest.param(bert, marks=pytest.mark.slow), vit])
def test_equals_the_compiled_model_on_both_sides_of_every_edge(make):
    model, inputs = make()
    captured = capture(model, inputs, TWO_EDGES if make is not vit else ALWAYS)
    sparsify.compile(model, captured.plan, backend="eager")
    lengths = [None] if make is vit else [EDGE - 1, EDGE, SECOND_EDGE - 1, SECOND_EDGE, 700]
    if make is not vit:
        assert len(planned(captured)) == 2
    for length in lengths:
        for batch in (1, 2):
            args, kwargs = captured.inputs_at(length, batch)
            ours = captured.program.module()(*args, **kwargs)
            theirs = model(*args, **kwargs)
            name = "logits" if "logits" in ours else "last_hidden_state"
            close(ours[name], theirs[name])
    dense = captured.dense.module()(*args, **kwargs)[name]
    assert float((ours[name] - dense).abs().max()) > 1e-3  # the twin: something was dropped


def test_a_round_trip_through_a_file_keeps_everything(tmp_path):
    captured = capture(*decoder(), TWO_EDGES)
    torch.export.save(captured.program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    args, kwargs = captured.inputs_at(SECOND_EDGE + 30, 1)
    assert torch.equal(loaded.module()(*args, **kwargs)["logits"], captured.program.module()(*args, **kwargs)["logits"])
    tables = [node.args[12:19] for node in loaded.graph.find_nodes(op="call_function", target=PLANNED)]
    assert tables == [node.args[12:19] for node in planned(captured)]
    assert str(loaded.range_constraints) == str(captured.dense.range_constraints)


class Buffers(nn.Module):
    """Counts its calls in a buffer, writes into its input, reads a constant, takes an input that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("bias", torch.ones(32), persistent=False)
        self.constant = torch.full((32,), 2.0)

    def forward(self, x, unused=None, *, factor):
        self.calls.add_(1)
        x.mul_(factor)
        mixed = self.attend(x)
        return {"out": mixed + self.bias + self.constant + self.calls, "raw": (mixed, x)}


def test_signature_buffers_constants_and_writes_survive(tmp_path):
    model, x, factor = Buffers(), torch.randn(2, 300, 32), torch.tensor(0.5)
    kwargs = {"x": x, "unused": torch.ones(3), "factor": factor}
    captured = capture(model, kwargs, ALWAYS, {"x": {0: Dim("batch", max=64), 1: Dim("length", max=4096)},
                                               "unused": None, "factor": None})
    assert [record.op for record in captured.records] == ["planned_attention"]
    assert planned(captured)[0].args[12:14] == ([], [0.4])
    for field in ("parameters", "buffers", "user_inputs", "lifted_tensor_constants", "non_persistent_buffers"):
        assert getattr(captured.program.graph_signature, field) == getattr(captured.dense.graph_signature, field)
    assert {str(r) for r in captured.program.range_constraints.values()} == {"VR[0, 64]", "VR[0, 4096]"}
    torch.export.save(captured.program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    before = float(model.calls)
    for call in (1, 2):
        given = torch.randn(1, 77, 32)
        expected = model(given.clone(), factor=factor)
        out = program(x=given, unused=torch.ones(3), factor=factor)
        close(out["out"], expected["out"])
        close(out["raw"][1], expected["raw"][1])
        assert torch.equal(given, out["raw"][1])  # written in place
        assert float(program.calls) == before + call


class Tril(Attend):
    """Its causal mask is a part of a buffer, as in many models written by hand; `moves` writes to it in each call."""

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self.register_buffer("tril", torch.ones(1024, 1024, dtype=torch.bool).tril(), persistent=False)
        self.moves = moves

    def forward(self, x):
        if self.moves:
            self.tril.logical_and_(self.tril)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        hidden = ~self.tril[: x.shape[1], : x.shape[1]]
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(hidden, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_mask_in_a_buffer_is_read():
    x = torch.randn(2, 300, 32)
    (record,) = capture(Tril(), x, TWO_EDGES, [{1: Dim("length", max=1000)}]).records
    assert (record.mask, record.op) == ("causal", "planned_attention")
    captured = capture(Tril(moves=True), x, TWO_EDGES, [{1: Dim("length", max=1000)}])  # the twin
    assert captured.records[0].mask != "causal"
    for model in (Tril(), Tril(moves=True)):
        captured = capture(model, x, ALWAYS, [{1: Dim("length", max=1000)}])
        args, _ = captured.inputs_at(500)
        dense = model(*args)
        ours = captured.program.module()(*args)
        assert 1e-5 < float((ours - dense).abs().max()) < 0.5


def test_protected_keys_are_in_the_program():
    class Protecting(Attend):
        def forward(self, x, mask):
            return super().forward(torch.ops.sparsify.protect_keys(x, mask))

    length = Dim("length", max=1024)
    x, mask = torch.randn(2, 700, 32), torch.arange(700)[None] % 250 == 100
    captured = capture(Protecting(), (x, mask), ALWAYS, [{1: length}, {1: length}])
    assert captured.records[0].protection == "protected keys are kept"
    (node,) = planned(captured)
    assert node.args[22].name == "mask"
    kept, free = (captured.program.module()(x, m) for m in (mask, torch.zeros_like(mask)))
    assert float((kept - free).abs().max()) > 1e-6


def test_no_length_is_compared(monkeypatch):
    """The pass leaves the range of every length as torch.export made it, however many edges the plan has."""
    plan = Plan(tuple(Bucket(1 if i == 0 else 64 * i, 64 * (i + 1) if i < 9 else None, Budget(0.01 * (i + 1)))
                      for i in range(10)))
    captured = capture(Attend(), (torch.randn(2, 100, 32),), plan, [{1: Dim("length", max=100_000)}])
    (record,) = captured.records
    assert record.op == "planned_attention"
    assert [str(r) for r in captured.program.range_constraints.values()] == ["VR[0, 100000]"]
    assert [(b.lo, b.hi) for b in captured.buckets][:: 9] == [(1, 64), (576, 100_001)]
    for length in (1, 63, 64, 639, 700):
        args, _ = captured.inputs_at(length)
        assert captured.program.module()(*args).shape == args[0].shape


def test_a_comparison_in_the_pass_is_refused(monkeypatch):
    """The twin: a pass that narrows a range does not get through."""
    capture_module = sys.modules[capture.__module__]
    honest = capture_module.run_exported

    def narrowing(gm, inputs, plan, constants):
        assert inputs[-1].shape[1] < 256
        return honest(gm, inputs, plan, constants)

    monkeypatch.setattr(capture_module, "run_exported", narrowing)
    with pytest.raises(ExportError, match="narrowed the lengths"):
        capture(Attend(), (torch.randn(2, 100, 32),), PLAN, [{1: Dim.AUTO}])


def test_buckets_out_of_reach_are_left_out():
    captured = capture(Attend(), (torch.randn(2, 300, 32),), TWO_EDGES, [{0: Dim.AUTO}])
    assert captured.records[0].budget == "tolerance 0.05"
    assert planned(captured)[0].args[12:14] == ([], [0.05])
    assert captured.buckets == ()
    captured = capture(Attend(), (torch.randn(2, 300, 32),), TWO_EDGES, [{1: Dim("length", min=EDGE, max=380)}])
    assert planned(captured)[0].args[12:14] == ([], [0.05])
    assert [(b.lo, b.hi) for b in captured.buckets] == [(EDGE, 381)]
    captured = capture(Attend(), (torch.randn(2, 200, 32),), TWO_EDGES, [{1: Dim("length", max=EDGE - 1)}])
    assert [record.op for record in captured.records] == ["scaled_dot_product_attention"]


def test_shifts_go_into_the_table():
    shifts = (1.0, 0.5, 0.25, 0.0)
    plan = Plan((Bucket(1, EDGE, Budget.dense()), Bucket(EDGE, None, Budget(0.1, shifts=shifts))))
    captured = capture(Attend(), (torch.randn(2, 300, 32),), plan, [{1: Dim.AUTO}])
    (node,) = planned(captured)
    assert list(node.args[21]) == [1.0] * 4 + list(shifts)
    assert node.args[12] == [EDGE]
    wrong = Plan((Bucket(1, EDGE, Budget.dense()), Bucket(EDGE, None, Budget(0.1, shifts=(1.0,)))))
    captured = capture(Attend(), (torch.randn(2, 300, 32),), wrong, [{1: Dim.AUTO}])
    (record,) = captured.records
    assert record.outcome != "sparse"


def test_a_compiled_model_is_captured_with_its_plan():
    model = sparsify.compile(Attend(), PLAN, backend="eager")
    call = model._compiled_call_impl
    captured = capture(model, (torch.randn(2, 300, 32),))
    assert captured.plan.name == PLAN.name
    assert model._compiled_call_impl is call


class TwoLengths(nn.Module):
    """Cross attention, and a sum that asks both lengths to be equal only if somebody compares them."""

    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k)


def test_equal_lengths_of_the_example_are_not_made_one():
    q = torch.randn(2, 2, 300, 16)
    captured = capture(TwoLengths(), (q, q.clone()), PLAN, [{2: Dim.AUTO}, {2: Dim.AUTO}])
    for lengths in ((300, 300), (77, 400), (400, 77)):
        inputs = [torch.randn(2, 2, length, 16) for length in lengths]
        assert captured.program.module()(*inputs).shape == inputs[0].shape


def test_an_example_may_be_part_of_a_larger_tensor():
    captured = capture(Attend(), torch.randn(2, 400, 32)[:, :300], TWO_EDGES)
    args, _ = captured.inputs_at(batch=1)
    assert captured.program.module()(*args).shape == (1, 300, 32)


def test_a_dtype_without_kernels_is_left_and_listed():
    captured = capture(Attend().double(), torch.randn(2, 300, 32).double(), TWO_EDGES, [{1: Dim.AUTO}])
    (record,) = captured.records
    assert record.outcome == "refused" and "float64" in record.why


@pytest.mark.parametrize(("inputs", "error", "words"), [
    (3, OptionError, "inputs is a int"),
    ((), OptionError, "inputs holds no tensor"),
    (torch.ones(1, 0, 32), ShapeError, "empty sequence"),
])
def test_inputs_that_are_none_are_refused(inputs, error, words):
    with pytest.raises(error, match=words):
        capture(Attend(), inputs, PLAN)


def test_other_mistakes_are_named():
    with pytest.raises(ModelError, match="function"):
        capture(lambda x: x, torch.ones(1), PLAN)
    captured = capture(Attend(), torch.randn(2, 300, 32), TWO_EDGES, [{1: Dim("length", min=16, max=512)}])
    captured.inputs_at(512)
    for length in (15, 513):
        with pytest.raises(OptionError, match="from 16 to 512"):
            captured.inputs_at(length)
    shapes = sparsify.backend.site_shapes([captured.records])
    other = Plan(PLAN.buckets, graph=(*shapes, *shapes))
    with pytest.raises(PlanError, match="another graph"):
        capture(Attend(), torch.randn(2, 300, 32), other)

    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch.export cannot"):
        capture(Untraceable(), torch.randn(2, 3), PLAN)
