"""The ONNX text of attention, run by onnxruntime, beside the op and the truth in float64."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from sparsify import ops
from sparsify.kernels import oracle
from sparsify.kernels.blocks import KeptLists, protected_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.rule import keep, unpack
from sparsify.ops.planned import FEW_QUERIES
from tests.ops.cases import EXTRAS, MASKS, Case

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from sparsify.exporters import onnx_steps  # noqa: E402
from sparsify.exporters.onnx_attention import DOMAIN, OPSETS, Kind, function_text, selection_text  # noqa: E402

TYPES = {torch.float32: "float", torch.float16: "float16", torch.bool: "bool", torch.int32: "int32",
         torch.int64: "int64"}
TOLERANCE = 0.7  # of random inputs, peaked in single keys: drops up to half of the blocks
TABLE = {"edges": [100], "tolerances": [0.0, TOLERANCE], "max_densities": [0.9, 0.9], "sinks": [0, 1], "local": [0, 1],
         "singles": [2, 6]}
BUDGET = (TOLERANCE, 0.9, 1, 1, 6)
TIE = 1e-5
"""How near to the tolerance a peak must be for rounding to decide over its block: float32 sums of few hundred terms."""


def kind_of(case: Case, **more: bool) -> Kind:
    masks = case.masks
    return Kind(sparse=True, causal=masks.causal_offset is not None, anchored=masks.causal_offset == 0,
                window=masks.window is not None, key_mask=masks.key_mask is not None,
                documents=masks.query_documents is not None, mask=masks.attn_mask is not None and masks.bias is None,
                bias=masks.bias is not None, softcap=masks.softcap > 0, sinks=masks.sink_logits is not None, **more)


def run(case: Case, kind: Kind, text=function_text, opset: int = 23, table=TABLE, shifts=None,
        protected: Tensor | None = None) -> Tensor:
    """A model of one node that calls the function of a kind, run on a case."""
    masks = {field.name: getattr(case.masks, field.name) for field in fields(Masks)}
    if masks["attn_mask"] is not None and masks["attn_mask"].dtype == torch.bfloat16:
        masks["attn_mask"] = masks["attn_mask"].float()  # numpy knows no bfloat16
    tensors = {"q": case.q, "k": case.k, "v": case.v, **masks, "protected": protected,
               "causal_offset": torch.tensor(masks["causal_offset"] or 0)}
    given = {name: tensors[name] for name in ("q", "k", "v", *kind.inputs)}
    attributes = {"scale": case.scale, "window": masks["window"], "softcap": masks["softcap"], "shifts": shifts,
                  **table}
    function = onnx.parser.parse_function(text(kind, opset))
    helper = onnx.helper
    result = "BOOL" if text is selection_text else TYPES[case.q.dtype].upper()
    node = helper.make_node(function.name, list(given), ["out"], domain=DOMAIN,
                            **{name: attributes[name] for name in kind.attributes})
    graph = helper.make_graph(
        [node], "attend",
        [helper.make_tensor_value_info(name, getattr(onnx.TensorProto, TYPES[x.dtype].upper()), [None] * x.dim())
         for name, x in given.items()],
        [helper.make_tensor_value_info("out", getattr(onnx.TensorProto, result), [None] * 4)])
    model = helper.make_model(graph, functions=[function], ir_version=10,
                              opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)])
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.contiguous().numpy() for name, x in given.items()})[0])


def near_ties(case: Case, shifts=None, protected: Tensor | None = None) -> Tensor:
    """Blocks that rounding may decide over, by the truth: peaks at the tolerance, and rows with such a peak, where it
    decides whether nearly all is kept and which block evens out the list."""
    truth = case.double()
    peaks = oracle.peaks(oracle.estimated_shares(truth.q, truth.k, singles=6, **truth.named))
    sizes = {**case.sizes, "max_density": 0.9, "sinks": 1, "local": 1, "masks": case.masks, "shifts": shifts,
             "protected": None if protected is None else protected_blocks(protected)}
    low, high = (keep(peaks, tolerance=TOLERANCE + step, **sizes) for step in (-TIE, TIE))
    spare = peaks.masked_fill(high, -1).sort(-1).values
    is_close = (spare[..., -1:] - spare[..., -2:-1] < TIE) if spare.shape[-1] > 1 else torch.zeros_like(high[..., :1])
    return ((low != high).any(-1, keepdim=True) | is_close).expand_as(low)


def selected(case: Case, shifts=None, protected: Tensor | None = None) -> Tensor:
    lists = ops.select_blocks(case.q, case.k, *case.arguments, *BUDGET, shifts, protected)
    return unpack(KeptLists(*lists), -(-case.k.shape[2] // 64))


@pytest.mark.parametrize("shape", [*MASKS, *EXTRAS], ids=str)
def test_keeps_what_the_op_keeps_and_is_exact_over_it(shape, rng):
    case = Case.random(rng, torch.device("cpu"), *shape)
    kind, kept, truth = kind_of(case), None, case.double()
    if case.k.shape[2] >= TABLE["edges"][0] and case.q.shape[2] > FEW_QUERIES:
        kept = run(case, kind, selection_text)
        ties = near_ties(case)
        assert torch.equal(kept | ties, selected(case) | ties)
    exact = oracle.attention(*truth.qkv, **truth.named, kept=kept)[0]
    bound = 2 * case.units * torch.finfo(torch.float32).eps * float(case.v.abs().max()) + 1e-6
    assert float((run(case, kind) - exact).abs().max()) <= bound


def test_a_sparse_bucket_drops_blocks_and_a_dense_one_does_not(rng):
    case = Case.random(rng, torch.device("cpu"), 500, 700, 200, None)
    dense = {**TABLE, "edges": [701]}
    allowed = run(case, kind_of(case), selection_text, table=dense)
    kept = run(case, kind_of(case), selection_text)
    assert kept.sum() < 0.9 * allowed.sum()
    assert not (kept & ~allowed).any()
    exact = oracle.attention(*case.double().qkv, **case.double().named)[0]
    assert float((run(case, kind_of(case), table=dense) - exact).abs().max()) < 1e-5
    assert float((run(case, kind_of(case)) - exact).abs().max()) > 1e-3


def test_shifts_and_protected_keys_are_those_of_the_bucket(rng):
    case = Case.random(rng, torch.device("cpu"), 400, 900, 500, "left")
    shifts = [1.0] * 4 + [0.5, 0.0, 0.3, 0.1]
    protected = torch.rand(1, 900, generator=rng) > 0.998
    kind = kind_of(case, shifts=True, protected=True)
    ours = run(case, kind, selection_text, shifts=shifts, protected=protected)
    ties = near_ties(case, shifts[4:], protected)
    assert torch.equal(ours | ties, selected(case, shifts[4:], protected) | ties)
    assert not torch.equal(ours | ties, selected(case) | ties)  # the twin: they matter
    lists = ops.planned_attention(*case.qkv, *case.arguments, *TABLE.values(), [0.0, 0.0], 0, ops.VERSION, shifts,
                                  protected)
    assert float((run(case, kind, shifts=shifts, protected=protected) - lists).abs().max()) < 1e-2


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_gives_the_same(opset, rng):
    case = Case.random(rng, torch.device("cpu"), 300, 500, 200, "left", (65, "documents", "bias", "cap", "sinks"))
    assert torch.equal(run(case, kind_of(case), opset=opset), run(case, kind_of(case)))


@pytest.mark.parametrize("offset", [0, None])
@pytest.mark.parametrize("length", [20, 300, 800])
def test_dense_buckets_are_exact_by_every_way_to_them(length, offset, rng):
    case = Case.random(rng, torch.device("cpu"), length, length, offset, None)
    dense, kind = {**TABLE, "edges": [length + 1]}, kind_of(case)
    assert ("Attention<" in function_text(kind, 23)) and "Attention<" not in function_text(kind, 22)
    exact = oracle.attention(*case.double().qkv, **case.double().named)[0]
    for opset in (22, 23):
        assert float((run(case, kind, opset=opset, table=dense) - exact).abs().max()) < 1e-5


def test_half_precision_is_computed_in_float32(rng):
    case = Case.random(rng, torch.device("cpu"), 300, 300, 0, None)
    half = case.to(torch.float16)
    out = run(half, kind_of(half))
    assert out.dtype == torch.float16
    assert torch.equal(out, run(half.to(torch.float32), kind_of(half)).half())


@pytest.mark.parametrize("shared", [1, 1 << 30])  # a list a step; all of them, padded to the longest
@pytest.mark.parametrize("shape", [(700, 900, 200, "left"), (500, 500, None, "right"),
                                   (300, 500, 200, None, ("sinks",))], ids=str)
def test_how_many_lists_share_a_step_changes_nothing(shape, shared, rng, monkeypatch):
    case = Case.random(rng, torch.device("cpu"), *shape)
    kind = kind_of(case)
    usual, kept, dense = run(case, kind), run(case, kind, selection_text), {**TABLE, "edges": [901]}
    usual_dense = run(case, kind, table=dense)
    monkeypatch.setattr(onnx_steps, "SHARED", shared)
    monkeypatch.setattr(onnx_steps, "MOST", shared)
    ties = near_ties(case)
    assert torch.equal(run(case, kind, selection_text) | ties, kept | ties)
    torch.testing.assert_close(run(case, kind, table=dense), usual_dense, rtol=1e-5, atol=1e-5)
    if not ties.any():
        torch.testing.assert_close(run(case, kind), usual, rtol=1e-5, atol=1e-5)
    assert not kept.all() and float((usual - usual_dense).abs().max()) > 1e-4  # the twin: lists differ in length


@pytest.mark.parametrize("edge", [1, 1000], ids=["sparse", "dense"])
def test_where_no_key_is_visible_at_all_the_output_is_zero(edge, rng):
    case = Case.random(rng, torch.device("cpu"), 300, 600, None, "left")
    table = {**TABLE, "edges": [edge]}
    assert run(case, kind_of(case), table=table).abs().amax((1, 2, 3)).min() > 0  # the twin
    case.masks.key_mask.zero_()
    assert torch.equal(run(case, kind_of(case), table=table), torch.zeros_like(case.q))


def test_only_standard_operators(rng):
    everything = Kind(**{field.name: True for field in fields(Kind)})
    function = onnx.parser.parse_function(function_text(everything, 20))

    def domains(nodes) -> set[str]:
        inner = [a.g.node for node in nodes for a in node.attribute if a.HasField("g")]
        return {node.domain for node in nodes}.union(*map(domains, inner))

    assert domains(function.node) == {""}
    assert len({Kind(causal=True).name, Kind(key_mask=True).name, everything.name}) == 3
