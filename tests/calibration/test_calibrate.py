"""`calibrate` end to end on small random models: what the plan says is so, nothing is lost, mistakes are named."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import sparsify
from sparsify import timings
from sparsify.backend import backend
from sparsify.bounds import Bounds
from sparsify.calibration import gains
from sparsify.calibration.buckets import assemble, remeasure
from sparsify.calibration.journal import Journal
from sparsify.calibration.request import _model_hash
from sparsify.calibration.runs import Result, Runs, Trial
from sparsify.calibration.samples import Sample, Shares, Window
from sparsify.calibration.search import _Search, _solve
from sparsify.errors import DeviceError, ModelError, OptionError, PlanError, SampleError
from sparsify.measurement import Quality, measuring
from sparsify.plan import Bucket, Budget, Plan
from tests.calibration.conftest import LENGTHS, soft_model

ROOT = Path(__file__).resolve().parents[2]


def calibrate(model, samples, **options):
    return sparsify.calibrate(model, samples, **{"lengths": LENGTHS, "progress": False, **options})


def test_a_bucket_says_what_its_held_out_documents_said(calibrated, documents):
    """The judged error is what the compiled model makes under the plan, on documents that are in no choice."""
    plan, _, _ = calibrated
    gate = plan.bucket_of(1024).gates[-1]
    assert gate.passed and gate.length == 1024 and not plan.bucket_of(1024).budget.is_dense
    assert gate.mean <= gate.upper <= 0.005

    from sparsify.calibration.samples import held_out, read_documents, windows_of
    from sparsify.calibration.search import DOCUMENTS

    read = read_documents(documents, None, LENGTHS, dict.fromkeys(LENGTHS, 100))
    judges = windows_of(read, held_out(read, 0.3), 1024).judges[:DOCUMENTS["cpu"]["judges"][1]]
    assert len(judges) == gate.documents
    model = soft_model()
    errors = []
    with measuring(model):
        sparse = sparsify.compile(soft_model(), plan, backend="eager")
        for window in judges:
            quality = Quality()
            quality.add(model(window.ids[None]).logits[0], sparse(window.ids[None]).logits[0], window.ids)
            errors.append(quality.kl / quality.positions)
    assert sum(errors) / len(errors) == pytest.approx(gate.mean, rel=1e-3)


def test_buckets_end_at_their_lengths_and_nothing_is_extrapolated(calibrated):
    plan, _, _ = calibrated
    assert plan.bucket_of(256).budget.is_dense
    assert plan.bucket_of(1024) is not plan.bucket_of(512)
    assert plan.bucket_of(513) is plan.bucket_of(1024) is plan.bucket_of(10**6)
    assert {gate.length for bucket in plan.buckets for gate in bucket.gates} == set(LENGTHS)


def test_a_budget_says_what_density_to_reckon_with(calibrated):
    plan, _, _ = calibrated
    bucket = plan.bucket_of(1024)
    [gate] = [gate for gate in bucket.gates if gate.length == 1024]
    kept = [x for site, x in gate.densities.items() if site not in bucket.sites]
    assert timings.expected_density(1024, bucket.budget.tolerance, bucket.budget.peaks) == pytest.approx(
        sum(kept) / len(kept), rel=1e-3)


def test_a_calibrated_plan_gives_a_guarantee(calibrated, documents):
    """Its bounds are of the documents that chose and judged, and the compiled model runs under their shifts."""
    plan, _, lines = calibrated
    bucket = plan.bucket_of(1024)
    bounds = Bounds.from_dict(bucket.bounds)
    assert bounds.documents >= 5 and set(bounds.promises) == {0.9, 0.95, 0.99}
    assert all(promise.misses <= 1 - target for target, promise in bounds.promises.items())
    assert any("counting missed peaks" in line for line in lines)
    assert not plan.bucket_of(256).bounds  # dense: nothing to promise
    model = sparsify.compile(soft_model(), plan, guarantee=0.99, backend="eager")
    with torch.no_grad():
        explained = sparsify.explain(model, documents[0][None, :1024])
    budgets = plan.guaranteed(0.99).bucket_of(1024).sites
    assert {site.record.index: site.record.budget for site in explained.sites if site.record.outcome == "sparse"} == {
        site: str(budget) for site, budget in budgets.items()}
    assert budgets and all(len(budget.shifts) == 2 for budget in budgets.values())


def test_too_few_documents_give_a_plan_without_a_guarantee(calibrated, documents, monkeypatch):
    monkeypatch.setattr("sparsify.calibration.promises.LEAST_DOCUMENTS", 50)
    lines = []
    plan = calibrate(soft_model(), documents, out=calibrated[1].with_name("few.json"), progress=lines.append,
                     lengths=LENGTHS[1:])
    assert any("no guarantee" in line for line in lines)
    with pytest.raises(PlanError, match="has no bounds"):
        plan.guaranteed(0.95)


def test_a_plan_says_where_and_how_it_was_made(calibrated):
    plan, out, lines = calibrated
    assert plan.fingerprint["torch"] and plan.fingerprint["dtype"] == "float32" and len(plan.fingerprint["graph"]) == 12
    assert plan.calibration["metric"] == "KL, nats a token"
    assert plan.calibration["confidence"] == 0.95
    assert plan.calibration["documents"] == {"": 12}
    assert [str(site).split(", ")[1] for site in plan.graph] == 2 * ["2 / 1 heads of 16"]
    assert Plan.load(out) == plan
    assert any("judging, held-out document 2 of 4" in line for line in lines)
    assert "passed" in str(plan)


def test_a_second_call_runs_nothing_and_ends_with_the_same_file(calibrated, documents, monkeypatch):
    plan, out, _ = calibrated
    before = out.read_bytes()
    monkeypatch.setattr("sparsify.calibration.runs.Runs._run", None)
    assert calibrate(soft_model(), iter(documents[::-1]), out=out) == plan
    assert out.read_bytes() == before


@pytest.mark.parametrize("results", [30])
def test_a_run_that_was_killed_goes_on_where_it_was(results, calibrated, documents, tmp_path, monkeypatch):
    plan, before, _ = calibrated
    out = tmp_path / "plan.json"
    add, left = Journal.add, [results]

    def add_or_die(self, value, *key):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return add(self, value, *key)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_or_die)
        with pytest.raises(KeyboardInterrupt):
            calibrate(soft_model(), documents, out=out)
    assert not out.exists()
    assert len(out.with_suffix(".journal.jsonl").read_text().replace("\n\n", "\n").splitlines()) >= results
    assert calibrate(soft_model(), documents, out=out) == plan
    assert out.read_bytes() == before.read_bytes()


def test_another_model_shares_no_result(calibrated, documents, tmp_path):
    _, out, _ = calibrated
    other, copy = soft_model(), tmp_path / "plan.json"
    journal = copy.with_suffix(".journal.jsonl")
    journal.write_bytes(out.with_suffix(".journal.jsonl").read_bytes())
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    before = len(journal.read_text().split("\n"))
    assert calibrate(other, documents, out=copy, lengths=[512]).buckets
    assert len(journal.read_text().split("\n")) > before + 2 * 10
    scaled = soft_model()
    for layer in scaled.model.layers:
        layer.self_attn.scaling *= 2  # no weight, but another model
    assert len({_model_hash(model) for model in (soft_model(), soft_model(), other, scaled)}) == 3


class Pooled(nn.Module):
    """Attention over a quarter as many keys as tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.down = nn.Embedding(512, 16), nn.Conv1d(16, 64, 4, stride=4)
        self.up, self.head = nn.ConvTranspose1d(64, 16, 4, stride=4), nn.Linear(16, 512)

    def forward(self, ids):
        x = self.down(self.embed(ids).mT).mT
        heads = x.unflatten(-1, (2, 32)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.head(self.up(mixed.transpose(1, 2).flatten(2).mT).mT)


def test_trials_are_told_apart_by_the_keys_that_a_window_makes(without_inductor):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = Pooled().eval(), torch.randint(0, 512, (2400,))
    runs = Runs(model, "kl", Journal(None, {}), torch.device("cpu"), (6,))
    window = Window("a", "", (ids[None],), {}, ids)
    with measuring(model):
        assert runs.key_lengths(window) == {600}
        exact, coarse = runs.results(window, [Trial((Bucket(301, 601, Budget(x)),)) for x in (0.0, 0.9)])
        outside = runs.results(window, [Trial((Bucket(1201, 2401, Budget(0.9)),))])[0]
    assert exact.error < 1e-6 < coarse.error and outside.error == 0.0
    assert exact.densities[0] == 1.0 > coarse.densities[0]


def test_one_judge_of_every_kind_stays():
    def windows(share):
        return tuple(Window(f"{kind}{i}{share}", str(kind), (), {}) for i in range(3) for kind in range(10))

    search = SimpleNamespace(device=torch.device("cpu"))
    shares = _Search._capped(search, Shares(windows("c"), windows("j")), 8192)
    assert [len({x.kind for x in share}) for share in (shares.choosers, shares.judges)] == [10, 10]
    alike = Shares(windows("c")[::10], windows("j")[::10])
    assert _Search._capped(search, alike, 8192) == alike


def test_a_gate_says_which_kinds_did_not_judge(without_inductor, documents):
    kinds = [Sample(x, "prose") for x in documents[1:]] + [Sample(documents[0], "code")]
    plan = calibrate(soft_model(), kinds, lengths=[512])
    (gate,) = plan.bucket_of(512).gates
    assert set(gate.kinds) == {"prose"} and "no document of 'code' judged" in gate.why


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(4))
def test_a_killed_process_ends_with_the_same_plan(moment, calibrated, documents, tmp_path):
    """SIGKILL at random moments, as often as it takes."""
    _, before, _ = calibrated
    torch.save(documents, tmp_path / "documents.pt")
    code = ("import torch; from torch._inductor import compile_fx; compile_fx.compile_fx = lambda gm, x, **_: gm\n"
            "from tests.calibration.conftest import LENGTHS, soft_model; import sparsify\n"
            f"documents = torch.load({str(tmp_path / 'documents.pt')!r})\n"
            f"sparsify.calibrate(soft_model(), documents, lengths=LENGTHS, out={str(tmp_path / 'plan.json')!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kills = 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        wait = random.uniform(4, 14)
        print(f"killed after {wait} s")
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert (tmp_path / "plan.json").read_bytes() == before.read_bytes()


def test_a_plan_for_another_graph_is_refused_with_the_difference(calibrated):
    plan, _, _ = calibrated
    ids = torch.zeros(1, 64, dtype=torch.long)
    with torch.no_grad():
        with pytest.raises(PlanError, match="it has 2 attention sites and this one 3"):
            sparsify.compile(soft_model(layers=3), plan, backend="eager")(ids)
        wider = replace(plan, graph=tuple(replace(site, heads=4) for site in plan.graph))
        with pytest.raises(PlanError, match="4 / 1 heads of 16; here site 0 is model.layers.0.self_attn, 2 / 1 heads"):
            sparsify.compile(soft_model(), wider, backend="eager")(ids)
        with pytest.raises(Exception, match="was made for another graph"):
            torch.compile(soft_model(layers=3), backend=partial(backend, options={"plan": plan.to_dict()}))(ids)
        sparsify.compile(soft_model(), plan, backend="eager")(ids)

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = soft_model()

            def forward(self, ids):
                return self.inside(ids).logits

        sparsify.compile(Wrapped(), plan, backend="eager")(ids)  # the module path is longer, the sites are the same


class Diffusion(nn.Module):
    """A diffusion transformer in small: noisy patches and a time step to what the noise was."""

    def __init__(self):
        super().__init__()
        self.inward, self.time, self.outward = nn.Linear(4, 64), nn.Linear(1, 64), nn.Linear(64, 4)
        self.places = nn.Parameter(torch.randn(1, 640, 64))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
                                    for _ in range(2))

    def forward(self, noisy, step):
        x = self.inward(noisy) + self.places[:, :noisy.shape[1]] + self.time(step[:, None, None])
        for block in self.blocks:
            x = block(x)
        return {"sample": self.outward(x)}


def smooth_images(count, size, channels=3):
    """Structured inputs: a few waves each, as no random pixels are."""
    generator = torch.Generator().manual_seed(count)
    at = torch.arange(size) / size
    for _ in range(count):
        waves = torch.randint(1, 6, (channels, 2), generator=generator)
        phases = 6.28 * torch.rand(channels, 1, 1, generator=generator)
        yield torch.sin(6.28 * (waves[:, :1, None] * at[None, :, None] + waves[:, 1:, None] * at) + phases)[None]


def test_a_diffusion_transformer_calibrates_with_the_same_call(without_inductor):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion().eval()
    samples = ((image.flatten(2).mT, torch.tensor([i / 12])) for i, image in
               enumerate(smooth_images(12, 25, channels=4)))
    plan = sparsify.calibrate(model, samples, max_error=0.05, progress=False)
    assert plan.calibration["metric"].startswith("relative output error")
    assert plan.calibration["judges"] == {"625": 4}
    [gate] = [gate for bucket in plan.buckets for gate in bucket.gates]
    assert gate.length == 625
    assert gate.rise is None
    assert gate.documents == 4
    assert plan.bucket_of(312).budget.is_dense
    assert [site.causal for site in plan.graph] == [False, False]


def test_a_vision_transformer_calibrates_with_the_same_call(without_inductor):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=400,
                       patch_size=16, initializer_range=0.05, num_labels=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).eval()
    plan = sparsify.calibrate(model, ({"pixel_values": image} for image in smooth_images(10, 400)), max_error=0.2,
                              progress=False)
    [gate] = [gate for bucket in plan.buckets for gate in bucket.gates]
    assert (gate.length, gate.passed) == (626, True)
    assert 0 < gate.mean < gate.upper <= 0.2
    assert gate.density < 0.9


def test_a_metric_of_the_callers_own_sees_whole_outputs(without_inductor, documents):
    seen = []

    def worst(dense, sparse):
        seen.append((type(dense), type(sparse)))
        return float((dense.logits - sparse.logits).abs().max())

    plan = calibrate(soft_model(), documents, metric=worst, max_error=100.0, lengths=[512])
    assert plan.calibration["metric"] == "the caller's own function"
    assert {x.__name__ for pair in seen for x in pair} == {"CausalLMOutputWithPast"}


def on_two_devices():
    model = Plain().eval()
    model.other = nn.Linear(2, 2, device="meta")
    return model


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4096, 16)

    def forward(self, ids):
        return self.embed(ids)


@pytest.mark.parametrize(("make", "options", "error", "words"), [
    (lambda: soft_model().train(), {}, ModelError, "model is in training mode"),
    (lambda: Plain().eval(), {}, ModelError, "no attention site .* no attention was found"),
    (on_two_devices, {}, DeviceError, "model is on cpu, meta. Move it to one device"),
    (lambda: Plain().eval().to("meta"), {}, DeviceError, "model is on meta. There are kernels for: cpu, cuda"),
    (lambda: 3, {}, ModelError, "model is a int"),
    (soft_model, {"max_error": 0}, OptionError, "max_error is 0"),
    (soft_model, {"holdout": 1}, OptionError, "holdout is 1"),
    (soft_model, {"metric": "bleu"}, OptionError, "metric is 'bleu'"),
    (soft_model, {"lengths": []}, OptionError, r"lengths is \[\]"),
    (soft_model, {"lengths": [4096]}, OptionError, "lengths holds 4096 and the model has 2048 positions"),
    (soft_model, {"lengths": [512, 2048]}, SampleError, "samples has 0 documents of 2048 keys"),
    (soft_model, {"lengths": [2000]}, SampleError, "as long as 2000 tokens, .* the longest has 1210"),
    (soft_model, {"out": "."}, OptionError, "out is '.', a folder"),
])
def test_a_mistake_is_named(make, options, error, words, without_inductor, documents):
    with pytest.raises(error, match=words):
        calibrate(make(), documents, **options)


def test_too_few_documents_say_how_many_it_takes(without_inductor, documents):
    with pytest.raises(SampleError, match="samples has 3 documents of 512 keys, 1 of them held out. .* takes 5"):
        calibrate(soft_model(), documents[:3])


def test_nan_is_an_error_and_loses_nothing(without_inductor, documents, tmp_path):
    model, out = soft_model(), tmp_path / "plan.json"
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="model returns NaN for sample"):
        calibrate(model, documents, out=out)
    calls = []

    def metric(dense, sparse):
        calls.append(1)
        return 0.01 if len(calls) < 9 else float("nan")

    with pytest.raises(ModelError, match="gave NaN"):
        calibrate(soft_model(), documents, metric=metric, out=out)
    assert len(out.with_suffix(".journal.jsonl").read_text().split()) >= 8


def test_inputs_that_the_model_does_not_take_are_named(without_inductor):
    with pytest.raises(SampleError, match="does not take a sample of 3 arguments"):
        sparsify.calibrate(Diffusion().eval(), [(torch.randn(1, 600, 4),) * 3 for _ in range(6)], progress=False)


def test_a_tolerance_is_solved_for_between_points_and_never_above_them():
    def points(**errors):
        return {float(t.replace("t", "0.")): [Result(error, None, {})] * 3 for t, error in errors.items()}

    assert _solve(points(t02=0.001, t04=0.004), 0.002) == (pytest.approx(0.02 * 2 ** 0.5), pytest.approx(2.0))
    assert _solve(points(t02=0.001, t04=0.004), 0.01)[0] == 0.04
    assert _solve(points(t02=0.0, t04=9.0), 0.01)[0] < 0.04
    assert _solve(points(t02=0.004, t04=0.016), 0.001)[0] == pytest.approx(0.01)


def sparse(lo, hi, tolerance):
    return Bucket(lo, hi, Budget(tolerance))


def test_uncovered_lengths_are_dense_and_six_buckets_suffice():
    assert [str(x) for x in assemble([sparse(257, 513, 0.1), sparse(2049, 4097, 0.05)])] == [
        "[1, 257)", "[257, 513)", "[513, 2049)", "[2049, inf)"]
    tolerances = [0.2, 0.1, 0.09, 0.05, 0.02, 0.01, 0.005]
    edges = [1 << i for i in range(9, 17)]
    joined = assemble([sparse(lo + 1, hi + 1, t) for lo, hi, t in zip(edges, edges[1:], tolerances, strict=False)])
    assert len(joined) == 6
    assert Plan(joined)
    for hi, tolerance in zip(edges[1:], tolerances, strict=False):  # joining makes no length less exact
        assert Plan(joined).bucket_of(hi).budget.tolerance <= tolerance
    assert Plan(joined).bucket_of(256).budget.is_dense


def test_other_hardware_keeps_thresholds_and_measures_gains_again(calibrated, monkeypatch):
    plan, _, _ = calibrated

    def factor(times):
        monkeypatch.setattr(gains.SiteCall, "relative",
                            lambda self, density, budget: 1.0 if budget.is_dense else times * density)
        return remeasure(plan, torch.device("cpu"), torch.float32)

    slow, fast = factor(2.0), factor(0.5)
    assert all(bucket.budget.is_dense for bucket in slow.buckets)
    assert fast.bucket_of(1024).budget == plan.bucket_of(1024).budget
    again = remeasure(slow, torch.device("cpu"), torch.float32)
    assert again.bucket_of(1024).budget == plan.bucket_of(1024).budget  # a threshold outlives a machine that needs none
    assert fast.bucket_of(512).gates[0].budget == plan.bucket_of(512).gates[0].budget
    assert json.dumps(fast.to_dict())
    assert fast.fingerprint == plan.fingerprint
    moved = remeasure(replace(plan, fingerprint={**plan.fingerprint, "device": "another"}), torch.device("cpu"),
                      torch.float32)
    assert moved.fingerprint == plan.fingerprint  # it was measured here now
    stricter = replace(plan.buckets[-1], budget=Budget(0.01), sites={0: Budget.dense()})
    edited = remeasure(replace(plan, buckets=(*plan.buckets[:-1], stricter)), torch.device("cpu"), torch.float32)
    assert edited.buckets[-1] == stricter and edited.bucket_of(512) == fast.bucket_of(512)
    with pytest.raises(PlanError, match="holds no gates"):
        remeasure(Plan.default("cpu"), torch.device("cpu"), torch.float32)

