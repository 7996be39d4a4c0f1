"""The parts of a calibration, each by itself: bounds, journal, metrics, gains, progress."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparsify.calibration.gains import SiteCall, gain
from sparsify.calibration.gate import Evidence, judge, t_quantile, upper_bound
from sparsify.calibration.journal import Journal
from sparsify.calibration.ladder import LADDERS, Judged, climb, largest_passing
from sparsify.calibration.metrics import error_of, identity_of, name_of, tensor_of
from sparsify.calibration.progress import Progress
from sparsify.errors import ModelError, OptionError
from sparsify.plan import Budget
from sparsify.timings import ShapeClass, Time, Times


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 6.313751514675), (2, 2.919985580354), (7, 1.894578605090),
                                                   (30, 1.697260886593), (1000, 1.646378818)])
def test_t_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-9)


def test_the_upper_bound_holds_as_often_as_it_says(rng, device):
    draws = torch.randn(4000, 5, generator=rng, device=device).tolist()
    held = sum(upper_bound(values) >= 0 for values in draws) / len(draws)
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / len(draws)))
    assert upper_bound([1.0]) == math.inf
    assert upper_bound([2.0, 2.0]) == 2.0


def evidence(errors, rises=None, kind=""):
    losses = [None] * len(errors) if rises is None else [(2.0, 2.0 * (1 + rise / 100)) for rise in rises]
    return [Evidence(kind, error, loss) for error, loss in zip(errors, losses, strict=True)]


def test_the_gate_asks_for_the_bound_not_the_mean():
    few = judge(evidence([0.004, 0.002]), 0.005, False)
    assert few.mean < 0.005 < few.upper
    assert not few.passed
    assert judge(evidence([0.004, 0.002] * 10), 0.005, False).passed


def test_the_gate_asks_that_the_loss_does_not_rise():
    errors = [0.001] * 8
    assert judge(evidence(errors, [0.2, 0.3] * 4), 0.005, True).passed
    steep, scattered = (judge(evidence(errors, rises), 0.005, True) for rises in ([0.35] * 8, [-1.5, 1.5] * 4))
    assert not steep.passed
    assert not scattered.passed
    assert scattered.rise == pytest.approx(0, abs=1e-9)
    assert scattered.rise_upper > 0.5
    assert judge(evidence(errors, [0.35] * 8), 0.005, False).passed


def test_every_kind_must_pass_by_its_mean():
    mixed = evidence([0.001] * 30, kind="prose") + evidence([0.008] * 2, kind="code")
    verdict = judge(mixed, 0.005, False)
    assert verdict.upper < 0.005
    assert verdict.failures == ("error 0.008 on code, above 0.005",)
    assert verdict.kinds == {"prose": pytest.approx(0.001), "code": pytest.approx(0.008)}


def test_a_journal_gives_back_what_was_added_to_the_last_bit(tmp_path):
    path = tmp_path / "new" / "plan.journal.jsonl"
    value = {"error": 0.1 + 0.2, "losses": [1 / 3, 2e-308], "densities": {"0": 0.7}}
    Journal(path, "settings").add(value, "result", "window", [1, 2])
    again = Journal(path, "settings")
    assert again.find("result", "window", [1, 2]) == value
    assert again.find("result", "window", [1, 3]) is None
    assert Journal(path, "other settings").find("result", "window", [1, 2]) is None


@pytest.mark.parametrize("torn", ['{"key": "a", "val', "\x00\xff", '{"value": 3}', "[]"])
def test_a_torn_line_hides_no_other(tmp_path, torn):
    path = tmp_path / "plan.journal.jsonl"
    Journal(path, "s").add(1, "first")
    with path.open("a") as file:
        file.write(torn)
    Journal(path, "s").add(2, "second")
    journal = Journal(path, "s")
    assert (journal.find("first"), journal.find("second")) == (1, 2)
    assert journal.get(lambda: 3, "second") == 2
    assert journal.get(lambda: 3, "third") == 3
    assert Journal(path, "s").find("third") == 3


def test_a_journal_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="out is next to"):
        Journal(tmp_path / "file" / "plan.journal.jsonl", "s")


IDS = torch.tensor([3, 1, 2, 0, 3])


def test_kl_and_loss_are_what_float64_says(rng):
    dense, sparse = (torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    log_p, log_q = dense[0].double().log_softmax(-1), sparse[0].double().log_softmax(-1)
    error, losses = error_of("kl", "kl", dense, sparse, IDS)
    assert error == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert losses == pytest.approx([float(torch.nn.functional.nll_loss(x[:-1], IDS[1:])) for x in (log_p, log_q)],
                                   rel=1e-5)
    assert error_of("loss", "loss", dense, sparse, IDS)[0] == pytest.approx(losses[1] - losses[0])


def test_tokens_that_a_model_never_gives_change_no_kl(rng):
    """Models hide parts of a vocabulary by -inf: there 0 log 0 is 0, and NaN was taken for it."""
    dense, sparse = (torch.randn(1, 50, 64, generator=rng, device=rng.device) for _ in range(2))
    expected = error_of("kl", "kl", dense, sparse, IDS)[0]
    hidden = [torch.cat([x, torch.full((1, 50, 1), -math.inf, device=rng.device)], 2) for x in (dense, sparse)]
    assert error_of("kl", "kl", *hidden, IDS)[0] == pytest.approx(expected, rel=1e-6) and expected > 0.1
    sparse[0, 7, 3] = math.nan
    with pytest.raises(ModelError, match="logits gave NaN"):
        error_of("kl", "kl", dense, sparse, IDS)


SCALE = 2.0


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, dense, sparse):
        return self.by


def scaled(by):
    return lambda dense, sparse: by * abs(dense - sparse)


def by_a_global(dense, sparse):
    return SCALE * abs(dense - sparse)


@pytest.mark.parametrize(("metric", "same", "other"), [
    ("kl", "kl", "loss"),
    (lambda a, b: abs(a - b) * 1.0, None, lambda a, b: abs(a - b) * 2.0),
    (lambda a, b: a.abs(), None, lambda a, b: a.exp()),
    (scaled(1), scaled(1), scaled(2)),
    (scaled(torch.ones(3)), scaled(torch.ones(3)), scaled(torch.zeros(3))),
    (partial(by_a_global, 1), partial(by_a_global, 1), partial(by_a_global, 2)),
    (Scaled(1), Scaled(1), Scaled(2)),
    (lambda a, b, c=1: c, None, lambda a, b, c=2: c),
], ids=["name", "constants", "names", "closure", "tensor", "partial", "object", "defaults"])
def test_metrics_that_differ_share_no_results(metric, same, other):
    mine = identity_of(metric)
    assert json.dumps(mine) == json.dumps(identity_of(metric if same is None else same)) != json.dumps(
        identity_of(other))


def test_a_metric_depends_on_the_numbers_that_it_finds_by_name(monkeypatch):
    before = identity_of(by_a_global)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert identity_of(by_a_global) != before


def test_the_output_error_is_relative():
    dense = torch.tensor([3.0, 4.0])
    assert error_of("output", "kl", dense, dense + torch.tensor([0.0, 0.5]), None) == (pytest.approx(0.1), None)
    assert error_of("output", "kl", (dense, 1), (dense, 2), None)[0] == 0.0


def test_a_callable_sees_what_the_model_returns():
    def metric(dense, sparse):
        return dense["a"] - sparse["a"]

    assert name_of(metric, {"a": 3}, None) == "callable"
    assert error_of("callable", metric, {"a": 3}, {"a": 1}, None) == (2.0, None)
    with pytest.raises(OptionError, match="metric returned None"):
        error_of("callable", lambda dense, sparse: None, 1, 1, None)
    with pytest.raises(ModelError, match="NaN"):
        error_of("callable", lambda dense, sparse: math.nan, 1, 1, None)
    with pytest.raises(ModelError, match="gave inf"):
        error_of("callable", lambda dense, sparse: math.inf, 1, 1, None)


def test_only_logits_of_the_tokens_are_logits():
    logits = torch.zeros(1, 5, 4)
    assert name_of("kl", logits, IDS) == "kl"
    assert name_of("kl", logits, None) == "output"  # whole inputs
    assert name_of("kl", logits[..., :3], IDS) == "output"  # hidden states: fewer than there are tokens
    assert name_of("kl", logits[:, 0], IDS) == "output"  # a class
    with pytest.raises(OptionError, match="metric is 'loss'"):
        name_of("loss", logits, None)


def test_the_main_output_is_found_by_name_then_by_place():
    first, main = torch.zeros(1), torch.ones(1)
    assert tensor_of({"hidden": first, "sample": main}) is main
    assert tensor_of([torch.tensor(1), first, main]) is first
    with pytest.raises(ModelError, match="without a floating-point tensor"):
        tensor_of([torch.tensor(1)])


SHAPE = ShapeClass("float32", 1, 2, 2, 16, 16, 1024, 1024, 0, 0)
TIMES = Times(SHAPE, {"sdpa": Time(1.0, 0.0), "lists": Time(1.2, 0.0)}, 6, Time(0.1, 0.0),
              {0.125: Time(0.2, 0.0), 0.5: Time(0.5, 0.0)})


@pytest.mark.parametrize(("density", "time"), [(0.125, 0.3), (0.3125, 0.45), (0.5, 0.6), (0.75, 0.95), (1.0, 1.3),
                                               (0.05, 0.24), (0.0, 0.2)])
def test_time_is_linear_between_what_was_measured(density, time):
    assert TIMES.relative(density) == pytest.approx(time)


def test_relative_time_and_break_even_agree():
    assert TIMES.relative(TIMES.break_even) == pytest.approx(0.97)
    assert Times(SHAPE, {"sdpa": Time(1.0, 0.0)}).relative(0.5) is None


def test_a_gain_counts_sites_by_what_they_cost():
    calls = [SiteCall(0, 1024, 3.0, False, {6: TIMES}), SiteCall(1, 1024, 1.0, False, {6: TIMES}),
             SiteCall(2, 77, 1.0, True)]
    budget = Budget(0.1)
    densities = {0: 0.5, 1: 0.125, 2: 0.1}
    assert gain(calls, densities, dict.fromkeys(range(3), budget)) == pytest.approx(1 - (3 * 0.6 + 0.3 + 1) / 5)
    assert gain(calls, densities, {0: Budget.dense(), 1: budget, 2: budget}) == pytest.approx(1 - (3 + 0.3 + 1) / 5)
    assert [SiteCall.from_dict(json.loads(json.dumps(call.to_dict()))) for call in calls] == [
        SiteCall.from_dict(call.to_dict()) for call in calls]


def test_more_singles_never_seem_to_cost_less():
    noisy = replace(TIMES, singles=12, selection=Time(0.02, 0.0))
    call = SiteCall(0, 1024, 1.0, False, {6: TIMES, 12: noisy})
    assert call.relative(0.5, Budget(0.1, singles=12)) == call.relative(0.5, Budget(0.1)) == pytest.approx(0.6)


def test_without_times_a_density_is_taken_for_the_time_and_selection_for_its_vectors():
    call = SiteCall(0, 1024, 1.0)
    cheap, usual = (gain([call], {0: 0.4}, {0: Budget(0.1, singles=m)}) for m in (2, 6))
    assert usual == pytest.approx(1 - 0.4 - 0.15)
    assert cheap == pytest.approx(1 - 0.4 - 0.075)


def test_progress_tells_the_time_that_is_left():
    lines: list[str] = []
    progress = Progress(lines.append, [512, 1024], [10, 20], {512: 1.0, 1024: 3.0}.get)
    progress.enter(0)
    progress.step("choosing", 4)
    progress.enter(1)
    progress.step("judging", 25)
    assert lines == ["[1/2] 512 keys: choosing, about 66 s left", "[2/2] 1024 keys: judging"]


def _errors_meet(limit, tried):
    """Held-out documents whose error meets 0.005 at one tolerance."""
    def judge_all(tolerances):
        tried.extend(tolerances)
        return {tolerance: Judged(judge([Evidence("", 0.005 * (tolerance / limit) ** 2 * x, None) for x in (1, 1, 1)],
                                        0.005, False), {}) for tolerance in tolerances}

    return judge_all


@pytest.mark.parametrize(("limit", "refinements", "least"), [
    (0.9, (2, 2), 2 ** -(1 / 16)), (1.05, (2, 2), 2 ** -(1 / 16)), (1.55, (2, 2), 2 ** -(1 / 16)),
    (9.0, (2, 2), 0.18), (0.4, (2, 2), 2 ** -(1 / 8)), (0.9, (0, 0), 2 ** -0.25), (9.0, (0, 0), 0.13),
    (0.1, (2, 2), None)])
def test_the_ladder_ends_close_below_the_limit(limit, refinements, least):
    tried: list[float] = []
    judged = climb(0.03, _errors_meet(0.03 * limit, tried), LADDERS, *refinements)
    best = largest_passing(judged)
    assert (best is None) == (least is None)
    if best is not None:
        assert 0.999 * least <= best / (0.03 * limit) <= 1
    assert len(set(tried)) == len(tried) <= 9, "nothing is judged twice"


def test_above_one_that_fails_nothing_passes():
    """However it looks: documents that by chance pass a larger tolerance do not make it safe."""
    found = _errors_meet(0.03, [])([0.02, 0.04]) | {0.05: _errors_meet(0.03, [])([0.01])[0.01]}
    assert found[0.05].verdict.passed and largest_passing(found) == 0.02
