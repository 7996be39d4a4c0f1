"""`sparsify.compile`: in place, checked before anything changes, and never worse than torch.compile when it fails."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified

import sparsify
from sparsify import Bucket, Budget, DeviceError, MaskError, ModelError, OptionError, Plan, PlanError, ShapeError
from sparsify import backend as backend_module
from sparsify.bounds import Bounds, Promise
from sparsify.explanation import ExplainedSite, Explanation
from sparsify.passes import SiteRecord, pipeline

ROOT = Path(__file__).resolve().parent.parent
PLAN = Plan((Bucket(1, 32, Budget.dense()), Bucket(32, None, Budget(0.0))))


class Attention(nn.Module):
    """One causal attention layer, hand-written."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_compiles_in_place_and_returns_the_model():
    model = Attention().eval()
    x = torch.randn(2, 40, 16)
    expected, names = model(x), list(model.state_dict())
    assert sparsify.compile(model, PLAN, backend="eager") is model
    assert type(model) is Attention
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_every_inner_backend_runs_the_op(inner):
    model = Attention().eval()
    x = torch.randn(2, 40, 16)
    expected = model(x)
    sparsify.compile(model, PLAN, backend=inner, fullgraph=True)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    explained = sparsify.explain(model, x)
    assert [site.record.outcome for site in explained.sites] == ["sparse"]


def test_parameters_stay_static_inputs():
    """What is not static, CUDA graphs copy before every replay."""
    found = []

    def compiler(gm, inputs):
        def record(inner, _):
            found.append(torch._guards.TracingContext.get().fw_metadata.static_input_indices)
            return make_boxed_func(inner)

        return aot_module_simplified(gm, inputs, fw_compiler=record, inference_compiler=record)

    plain, ours = Attention(), Attention()
    plain.compile(backend=compiler, dynamic=True)
    sparsify.compile(ours, PLAN, backend=compiler)
    for model in (plain, ours):
        model(torch.randn(2, 40, 16))
    assert [len(indices) for indices in found] == [2, 2]


def test_a_callable_comes_back_wrapped():
    model = Attention().eval()

    def function(x):
        return model(x) + 1

    compiled = sparsify.compile(function, PLAN, backend="eager", fullgraph=True)
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(compiled(x), function(x))
    assert sparsify.explain(compiled, x).sites[0].density == 1.0


def test_the_entry_point_runs_the_same_pass(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    model = Attention().eval()
    x = torch.randn(2, 40, 16)
    expected = model(x)
    for plan in (PLAN, str(tmp_path / "plan.json"), PLAN.to_dict()):
        torch._dynamo.reset()
        seen = []
        original = backend_module.rewrite_graph
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend_module, "rewrite_graph",
                          lambda *a, seen=seen: seen.append(original(*a)) or seen[-1])  # noqa: B023
            compiled = torch.compile(model, backend=backend_module.backend, fullgraph=True, options={"plan": plan})
            torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        assert seen[0][1][0].outcome == "sparse"


def test_torch_knows_the_name():
    assert "sparsify" in torch._dynamo.list_backends()


@pytest.mark.parametrize(("arguments", "error"), [
    ({"plan": "no-such-plan.json"}, PlanError),
    ({"plan": 3}, PlanError),
    ({"plan": {"schema": 99}}, PlanError),
    ({"mode": "fastest"}, OptionError),
    ({"options": {"no_such_option": 1}}, OptionError),
    ({"options": {"plan": PLAN}}, OptionError),
    ({"mode": "default", "options": {"max_autotune": True}}, OptionError),
    ({"options": {"verify_masks": 1}}, OptionError),
    ({"guarantee": 0.95}, PlanError),
    ({"plan": PLAN, "guarantee": 0.95}, PlanError),
    ({"protect": torch.ones(2, 40, dtype=torch.bool)}, OptionError),
    ({"backend": "no-such-backend"}, OptionError),
    ({"backend": "sparsify"}, OptionError),
])
def test_bad_arguments_raise_and_leave_the_model_alone(arguments, error):
    model = Attention()
    with pytest.raises(error) as caught:
        sparsify.compile(model, **arguments)
    assert model._compiled_call_impl is None
    assert len(str(caught.value)) > 30  # names the value and the way out


def test_a_meta_model_is_refused():
    with torch.device("meta"):
        model = Attention()
    with pytest.raises(ModelError, match="project.weight"):
        sparsify.compile(model)
    assert model._compiled_call_impl is None


def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(backend_module, "DEVICES", ("cuda",))
    with pytest.raises(DeviceError, match="cpu"):
        sparsify.compile(Attention())


@pytest.mark.parametrize("model", [3, "model"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ModelError):
        sparsify.compile(model)


def test_an_empty_sequence_is_refused():
    model = sparsify.compile(Attention().eval(), PLAN, backend="eager")
    with pytest.raises(ShapeError, match="at least one token"):
        model(torch.randn(2, 0, 16))


def attend_with_cache(past_k, past_v, q, k, v):
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    hidden = torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None] + past_k.shape[2]
    return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v, k, v


def test_a_cache_that_is_given_first_may_be_empty():
    compiled = sparsify.compile(attend_with_cache, PLAN, backend="eager")
    past = (torch.randn(2, 4, 0, 8),) * 2
    for length in (40, 1, 3):
        new = torch.randn(3, 2, 4, length, 8).unbind()
        out, *after = attend_with_cache(*past, *new)
        torch.testing.assert_close(compiled(*past, *new)[0], out)
        (site,) = sparsify.explain(compiled, *past, *new).sites
        assert site.record.outcome == ("sparse" if length > 1 else "exact")  # one query would gain nothing
        past = after


@pytest.mark.parametrize("shapes", [
    [(2, 4, 0, 8)] * 5,  # nothing to attend to
    [(2, 0), (2, 0)],
    [(2, 4, 0, 8), (8, 8)],  # a weight is no sequence
], ids=str)
def test_an_empty_sequence_is_refused_beside_other_tensors(shapes):
    compiled = sparsify.compile(lambda *xs: sum(x.sum() for x in xs), PLAN, backend="eager")
    with pytest.raises(ShapeError, match="at least one token"):
        compiled(*(torch.randn(shape) for shape in shapes))


def test_a_wrapped_model_is_refused():
    with pytest.raises(ModelError, match="_orig_mod"):
        sparsify.compile(torch.compile(Attention()))


def test_a_failing_pass_warns_once_and_compiles_without_it(monkeypatch):
    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(backend_module.passes, "run", fail)
    backend_module._warn_once.cache_clear()
    reached = []
    model = Attention().eval()
    xs = [torch.randn(2, length, 16) for length in (8, 40)]
    expected = [model(x) for x in xs]
    sparsify.compile(model, PLAN, backend=lambda gm, inputs: reached.append(gm) or gm.forward, dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in zip(xs, expected, strict=True):
            torch.testing.assert_close(model(x), y)
    assert len(reached) == 2  # both graphs still went to the inner compiler
    assert [str(w.message).count("on purpose") for w in caught if "sparsify" in str(w.message)] == [1]


def fail_on_purpose(*args):
    raise RuntimeError("on purpose\nwith more lines")


@pytest.mark.parametrize("again", [False, True], ids=["first", "warned before"])
def test_explain_names_the_sites_of_a_failing_pass(monkeypatch, again):
    model, x = Attention().eval(), torch.randn(2, 40, 16)
    (fine,) = sparsify.explain(model, x).sites
    monkeypatch.setattr(backend_module.passes, "run", fail_on_purpose)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if again:
            sparsify.explain(model, x)
        (site,) = sparsify.explain(model, x).sites
    assert site.record.outcome == "refused"
    assert site.record.why == "the pass failed with RuntimeError: on purpose"
    assert [site.record.line, site.record.module] == [fine.record.line, fine.record.module]


def test_explain_says_that_a_pass_failed_where_no_site_can_be_found(monkeypatch):
    monkeypatch.setattr(backend_module.passes, "run", fail_on_purpose)
    monkeypatch.setattr(pipeline, "normalise", fail_on_purpose)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explained = sparsify.explain(Attention().eval(), torch.randn(2, 40, 16))
    assert [(site.record.outcome, "on purpose" in str(site)) for site in explained.sites] == [("refused", True)]


def test_a_failing_pass_makes_up_no_sites(monkeypatch):
    monkeypatch.setattr(backend_module.passes, "run", fail_on_purpose)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not sparsify.explain(lambda x: x * 2, torch.randn(2, 40, 16)).sites


def test_one_log_line_per_bucket(caplog):
    model = sparsify.compile(Attention().eval(), PLAN, backend="eager")
    with caplog.at_level(logging.INFO, logger="sparsify"):
        for length in (8, 40, 9, 50):
            model(torch.randn(2, length, 16))
    lines = [record.getMessage() for record in caplog.records if record.name == "sparsify"]
    assert len(lines) == 2
    assert "[1, 32)" in lines[0] and "dense" in lines[0] and "sparsify" in lines[0]
    assert "[32, inf)" in lines[1] and "tolerance 0" in lines[1]


def test_an_outer_compile_takes_the_model_in():
    model = Attention().eval()
    x = torch.randn(2, 40, 16)
    expected = model(x) + 1
    sparsify.compile(model, PLAN, backend="eager")
    outer = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(outer(x), expected)


def test_shapes_that_depend_on_values_break_no_graph():
    def attention(q, frames):
        for _ in range(2):
            kept = q[:, :, frames.nonzero()[:, 0]]
            q = torch.softmax(q @ kept.mT, -1) @ kept
        return q

    graphs = []
    compiled = sparsify.compile(attention, PLAN, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    q = torch.randn(1, 2, 40, 8)
    for frames in (torch.arange(40) % 3, torch.arange(40) % 2):
        torch.testing.assert_close(compiled(q, frames), attention(q, frames))
    assert len(graphs) == 1


def test_copies_and_pickles_are_not_compiled():
    model = sparsify.compile(Attention().eval(), PLAN, backend="eager")
    x = torch.randn(2, 40, 16)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._compiled_call_impl is None
        torch.testing.assert_close(other(x), expected)


def test_compiling_again_replaces_the_plan():
    model = sparsify.compile(Attention().eval(), PLAN, backend="eager")
    sparsify.compile(model, Plan.dense(), backend="eager")
    assert sparsify.explain(model, torch.randn(2, 40, 16)).sites[0].record.outcome == "exact"


def test_training_is_left_to_torch():
    model, twin = Attention(), Attention()
    twin.load_state_dict(model.state_dict())
    sparsify.compile(model, PLAN, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 40, 16)
    backend_module._warn_once.cache_clear()
    with torch.enable_grad(), pytest.warns(RuntimeWarning, match="gradients are needed"):
        model(x).square().sum().backward()
    with torch.enable_grad():
        twin(x).square().sum().backward()
    torch.testing.assert_close(model.project.weight.grad, twin.project.weight.grad)


def test_mode_and_options_reach_inductor(monkeypatch):
    seen = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx",
                        lambda gm, inputs, config_patches=None: seen.append(config_patches) or gm.forward)
    for arguments in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max-autotune": True}}):
        model = sparsify.compile(Attention().eval(), PLAN, **arguments)
        model(torch.randn(2, 40, 16))
    assert all(patches["max_autotune"] for patches in seen)
    assert len(seen) == 2


@pytest.mark.parametrize("verify", [True, False])
def test_verify_masks_reaches_the_pass_and_not_inductor(monkeypatch, verify):
    seen = []

    def run(gm, inputs, plan, verify_masks=False, protects=False):
        seen.append(verify_masks)
        return gm, []

    monkeypatch.setattr(backend_module.passes, "run", run)
    options, x = {"verify_masks": verify}, torch.randn(2, 40, 16)
    model = Attention().eval()
    sparsify.compile(Attention().eval(), PLAN, mode="default", options=options)  # mode beside it is no contradiction
    sparsify.compile(model, PLAN, backend="eager", options=options)(x)
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs: gm.forward)
    torch.compile(model.forward, backend="sparsify", options={"plan": PLAN, **options})(x)
    assert seen == [verify, verify]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_verify_masks_finds_a_proof_that_is_wrong(monkeypatch, inner):
    def layers(q, keep, bias):
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        q = (q @ q.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ q
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -1e9) + (1.0 - keep[:, None, None].float()) * -1e9
        q = (q @ q.mT + mask).softmax(-1) @ q
        return F.scaled_dot_product_attention(q, q, q, bias.masked_fill(hidden, -torch.inf))

    def inputs(length):
        return torch.randn(2, 4, length, 8), torch.arange(length) < torch.tensor([[length], [3]]), \
            torch.randn(4, length, length)

    compiled = sparsify.compile(layers, PLAN, backend=inner, options={"verify_masks": True})
    for x in (inputs(40), inputs(50)):
        torch.testing.assert_close(compiled(*x), layers(*x), atol=1e-5, rtol=1e-5)

    prove = pipeline.prove_masks

    def prove_wrongly(*arguments):
        first, *rest = prove(*arguments)
        return [replace(first, mask=replace(first.mask, causal_offset=first.mask.causal_offset + 1)), *rest]

    monkeypatch.setattr(pipeline, "prove_masks", prove_wrongly)
    torch._dynamo.reset()
    compiled = sparsify.compile(layers, PLAN, backend=inner, options={"verify_masks": True})
    with pytest.raises(MaskError, match=r"site 0 at test_backend.py:\d+: the proof shows key 1 to query 0"):
        compiled(*inputs(40))


def test_torch_logs_and_torch_trace_tell_what_the_pass_did(tmp_path):
    code = """
        import torch, sparsify
        from sparsify import Bucket, Budget, Plan

        def attention(q):
            hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
            return (q @ q.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ q

        compiled = sparsify.compile(attention, Plan((Bucket(1, None, Budget(0.0)),)), backend="eager")
        with torch.no_grad():
            compiled(torch.randn(1, 2, 9, 8))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))

    def run(**environment):
        result = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
        return result.stderr

    verbose = run(TORCH_LOGS="+sparsify", TORCH_TRACE=str(tmp_path / "trace"))
    assert "sparsify: compiled bucket [1, inf): tolerance 0 at 1 sites; 0 sites refused" in verbose
    assert "site 0: (no module) at script.py:7" in verbose and "softmax chain, mask: causal" in verbose
    (trace,) = (tmp_path / "trace").iterdir()
    entries = trace.read_text().split("\nV")
    before, after, sites = (next(entry for entry in entries if f'"name": "sparsify_{name}"' in entry)
                            for name in ("before", "after", "sites"))
    assert "softmax" in before and "adaptive_attention" not in before
    assert "torch.ops.sparsify.adaptive_attention" in after and "aten.softmax" not in after
    assert json.loads(sites[sites.index("\n"):])[0]["mask"] == "causal"

    assert "site 0" not in run(TORCH_LOGS="sparsify")
    assert "sparsify" not in run()


def test_explain_says_what_became_of_each_site():
    model = Attention().eval()
    sparsify.compile(model, PLAN, backend="eager")
    explanation = sparsify.explain(model, torch.randn(2, 40, 16))
    (site,) = explanation.sites
    told = {"graph": 0, "index": 0, "outcome": "sparse", "form": "softmax chain", "line": site.record.line,
            "module": "", "why": "guard on the key length", "node": site.record.node, "mask": "causal",
            "bucket": "[32, inf)", "budget": "tolerance 0", "op": "adaptive_attention", "depends": (), "heads": 2,
            "kv_heads": 2, "head_dim": 8, "value_dim": 8, "protection": "", "density": 1.0}
    assert site.to_dict() == told
    assert site.record.line.startswith("test_backend.py:")
    for word in ("causal", "[32, inf)", "tolerance 0", "test_backend.py", "density 1.000", "adaptive_attention"):
        assert word in str(explanation)
    assert explanation.to_dict()["sites"] == [site.to_dict()]


def test_explain_makes_a_page_of_its_own():
    def two_sites(q, mask):
        q = F.scaled_dot_product_attention(q, q, q, mask)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    explanation = sparsify.explain(two_sites, torch.randn(1, 2, 40, 8), torch.rand(40, 40) > 0.1)
    page = explanation.to_html()
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n").replace('<meta charset="utf-8">', ""))
    rows = [["".join(cell.itertext()) for cell in row.iter("td")] for row in root.find("body/table/tbody")]
    assert [row[0] for row in rows] == ["0.0", "0.1"]
    assert all("test_backend.py:" in row[1] and row[2] == "sdpa" for row in rows)
    assert "dropout is active" in rows[1][-1]
    assert explanation.sites[0].record.depends and ", ".join(explanation.sites[0].record.depends) in rows[0]
    for loads in ("http", "src=", "href=", "@import", "url(", "<script"):
        assert loads not in page
    assert len(page) < 4000


def test_a_page_escapes_what_models_are_named():
    record = SiteRecord(0, "refused", "other", "<b>.py:1", "a&b", "it's <i>not</i> \"read\"", "node")
    page = Explanation("<plan>", (ExplainedSite(0, record, None),)).to_html()
    for text in ("&lt;b&gt;.py:1", "a&amp;b", "&lt;i&gt;not&lt;/i&gt;", "&lt;plan&gt;"):
        assert text in page
    assert "<i>" not in page


def test_explain_works_on_a_plain_model_and_changes_nothing():
    model = Attention().eval()
    explanation = sparsify.explain(model, torch.randn(2, 40, 16))
    assert explanation.sites[0].record.budget == "dense"  # the default plan, below the crossover
    assert model._compiled_call_impl is None


def test_explain_says_why_not():
    def attention(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    explanation = sparsify.explain(attention, torch.randn(1, 2, 9, 8))
    assert "dropout is active" in str(explanation)


def test_explain_counts_graphs_apart():
    def two_graphs(q):
        q = F.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)

    compiled = sparsify.compile(two_graphs, PLAN, backend="eager")
    explanation = sparsify.explain(compiled, torch.randn(1, 2, 40, 8))
    assert [(site.graph, site.record.index, site.density) for site in explanation.sites] == [(0, 0, 1.0), (1, 0, 1.0)]


SHARP = Plan((Bucket(1, None, Budget(1.0, sinks=0, local=0)),))
"""Keeps the diagonal, and what else it must."""


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_protected_keys_are_kept_by_callable_and_by_call(inner):
    model = Attention().eval()
    x = torch.randn(2, 700, 16)
    exact = model(x)
    sparsify.compile(model, SHARP, backend=inner, protect=lambda x: torch.zeros(x.shape[:2], dtype=torch.bool))
    dropped = model(x)  # the twin: a mask of nothing protects nothing
    assert (dropped - exact).abs().max() > 1e-3
    torch.testing.assert_close(model(x, protect=torch.ones(1, 700, dtype=torch.bool)), exact)
    torch.testing.assert_close(model(x=x, protect=torch.ones(2, 700, dtype=torch.bool)), exact)
    one_row = torch.tensor([True, False])[:, None].expand(2, 700)
    torch.testing.assert_close(model(x, protect=one_row)[0], exact[0])
    torch.testing.assert_close(model(x, protect=one_row)[1], dropped[1])
    (site,) = sparsify.explain(model, x, protect=one_row).sites
    assert site.record.protection == "protected keys are kept" and 0.5 < site.density < 0.8
    assert "protected keys are kept" in str(sparsify.explain(model, x))


def test_calls_without_protection_share_their_graphs():
    graphs = []
    model = sparsify.compile(Attention().eval(), SHARP, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    for length in (300, 400):
        x = torch.randn(2, length, 16)
        model(x)
        model(x, protect=torch.ones(2, length, dtype=torch.bool))
    assert len(graphs) == 2  # one with the mask, one without


def test_protection_behind_a_graph_break_is_not_silent():
    def two_graphs(q):
        q = F.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)

    backend_module._warn_once.cache_clear()
    compiled = sparsify.compile(two_graphs, SHARP, backend="eager")
    q, mask = torch.randn(1, 2, 300, 8), torch.ones(1, 300, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="does not protect keys at 1 of 1 attention sites: .*graph breaks before"):
        compiled(q, protect=mask)
    explained = sparsify.explain(compiled, q, protect=mask).sites
    assert [site.record.lacks_protection for site in explained] == [True, True]  # Dynamo compiles each frame by itself


def test_a_model_with_an_argument_of_that_name_keeps_it():
    def model(q, protect=1.0):
        return F.scaled_dot_product_attention(q, q, q) * protect

    compiled = sparsify.compile(model, SHARP, backend="eager")
    q = torch.randn(1, 2, 300, 8)
    torch.testing.assert_close(compiled(q, protect=2.0), 2.0 * compiled(q))
    assert sparsify.explain(compiled, q, protect=2.0).sites[0].record.protection == ""


@pytest.mark.parametrize(("mask", "words"), [
    ([True], "protect is a list"), (torch.ones(2, 300), "protect is torch.float32"),
    (torch.ones(300, dtype=torch.bool), r"torch.bool \[300\]"),
])
def test_a_mask_that_is_none_is_refused(mask, words):
    model = sparsify.compile(Attention().eval(), SHARP, backend="eager")
    with pytest.raises(ShapeError, match=words):
        model(torch.randn(2, 300, 16), protect=mask)


def test_a_guarantee_reaches_the_op_as_shifts():
    promise = Promise(0.05, None, 0.9, 0.5, {0: (1.0, 0.0)})
    plan = Plan((Bucket(1, None, Budget(1.0, sinks=0, local=0),
                        bounds=Bounds(9, 99, (), {0.95: promise}).to_dict()),))
    model = Attention().eval()
    x = torch.randn(2, 700, 16)
    sparsify.compile(model, plan, backend="eager")
    (site,) = sparsify.explain(model, x).sites
    assert site.density < 0.5
    sparsify.compile(model, plan, guarantee=0.95, backend="eager")
    (site,) = sparsify.explain(model, x).sites
    assert 0.5 < site.density < 0.75  # the second head keeps everything
    assert site.record.budget == "tolerance 1 times 0 to 1 by head, sinks 0, local 0"
    torch.testing.assert_close(
        torch.compile(model.forward, backend="sparsify", options={"plan": plan, "guarantee": 0.95})(x), model(x))


@pytest.mark.parametrize(("device_type", "guarantee", "warns"), [
    ("cuda", 0.95, True), ("cpu", 0.95, False), ("", 0.95, False), ("cuda", None, False)])
def test_a_guarantee_of_another_device_says_so(device_type, guarantee, warns, recwarn):
    promise = Promise(0.05, None, 0.9, 0.5, {0: (1.0, 0.5)})
    plan = Plan((Bucket(1, None, Budget(1.0), bounds=Bounds(9, 99, (), {0.95: promise}, device_type).to_dict()),))
    sparsify.compile(Attention().eval(), plan, guarantee=guarantee, backend="eager")(torch.randn(2, 300, 16))
    assert sum("was calibrated on cuda and runs on cpu" in str(warning.message) for warning in recwarn) == warns


def test_shifts_for_other_heads_leave_a_site_exact():
    plan = Plan((Bucket(1, None, Budget(1.0, shifts=(0.5, 0.5, 0.5))),))
    model = Attention().eval()
    x = torch.randn(2, 300, 16)
    expected = model(x)
    sparsify.compile(model, plan, backend="eager")
    torch.testing.assert_close(model(x), expected)
    (site,) = sparsify.explain(model, x).sites
    assert site.record.outcome == "exact" and "shifts for 3 heads and this site has 2" in site.record.why
