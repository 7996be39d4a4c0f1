"""Bounds: sketches count what selection would do, and a promise holds on documents that had no part in it."""

from collections.abc import Sequence

import pytest
import torch
from transformers import AttentionInterface

from benchmarks.thesis import guarantee as measured_by
from sparsify.bounds import Bounds, Promise
from sparsify.calibration import guarantee
from sparsify.calibration.guarantee import BLOCKS, MASS, NEEDS, STEP, STEPS, Collector, Document, fit, sketch
from sparsify.errors import OptionError, PlanError
from sparsify.kernels import rule
from sparsify.kernels.blocks import allowed_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.true_peaks import true_peaks
from sparsify.ops.select import estimate_peaks
from sparsify.plan import Bucket, Budget, Plan
from tests.ops.cases import EXTRAS, MASKS, Case
from tests.small_model import small_model


@pytest.mark.parametrize("shape", [*MASKS, EXTRAS[0], EXTRAS[4], EXTRAS[10]], ids=str)
@pytest.mark.parametrize("budget", [Budget(0.05, max_density=0.6), Budget(0.3, max_density=1.0, sinks=0, local=2)],
                         ids=str)
def test_a_sketch_counts_what_a_lower_tolerance_keeps_and_misses(shape, budget, rng, device):
    case = Case.random(rng, device, *shape)
    q, k, _ = case.qkv
    found = sketch(q, k, case.scale, case.masks, budget).cpu()
    peaks, mass = true_peaks(q, k, scale=case.scale, masks=case.masks)
    estimate = estimate_peaks(q, k, case.scale, case.masks, budget.singles)
    allowed = allowed_blocks(case.masks, **case.sizes, device=device)[:, None].expand_as(peaks)
    for step in (0, 1, 7, 40, STEPS):
        tolerance = budget.tolerance * float(torch.tensor(-STEP * step).exp())
        lists = rule.choose_blocks(estimate, **case.sizes, tolerance=tolerance, max_density=budget.max_density,
                                   sinks=budget.sinks, local=budget.local, masks=case.masks)
        kept = rule.unpack(lists, peaks.shape[3])
        misses = (allowed & ~kept & (peaks >= budget.tolerance)).any(-1).sum((0, 2))
        assert torch.equal(found[NEEDS, :, step + 1:].sum(-1), misses.cpu().float())
        assert torch.equal(found[BLOCKS, :, : step + 1].sum(-1), kept.sum((0, 2, 3)).cpu().float())
        torch.testing.assert_close(found[MASS, :, : step + 1].sum(-1), (mass * kept).sum((0, 2, 3)).cpu(), rtol=1e-4,
                                   atol=1e-4)
    assert torch.equal(found[NEEDS].sum(-1), allowed.any(-1).sum((0, 2)).cpu().float())


def test_a_collector_keeps_documents_apart_and_passes_over_dense_sites(rng, device):
    case = Case.random(rng, device, 300, 300, 0, None)
    collector = Collector(lambda site: Budget.dense() if site == 0 else Budget(0.1))
    with collector.document("prose"):
        for site in (0, 1, 2, 1):
            collector.watch(site, *case.qkv, case.scale, case.masks)
    with pytest.raises(ZeroDivisionError), collector.document("prose"):
        collector.watch(1, *case.qkv, case.scale, case.masks)
        raise ZeroDivisionError
    collector.watch(1, *case.qkv, case.scale, case.masks)  # outside of any document
    (document,) = collector.documents
    assert document.kind == "prose" and sorted(document.sketches) == [1, 2]
    assert torch.equal(document.sketches[1], 2 * document.sketches[2])


def draw(generator: torch.Generator, kinds: Sequence[str], *, spread: float = 0.2, heads: int = 12,
         rows: int = 200, size: int = 30, **effects: float) -> list[Document]:
    """Documents whose query blocks need exp(normal): by head, by document (`spread`) and by kind (`effects`)."""
    of_heads = torch.linspace(-2.5, 0.0, heads, dtype=torch.float64)
    documents = []
    for kind in kinds:
        effect = effects.get(kind, 0.0) + spread * torch.randn((), generator=generator)
        needs = (of_heads[:, None] + effect + 0.8 * torch.randn(heads, rows, generator=generator)).exp()
        steps = (needs / STEP).ceil().clamp(max=STEPS + 1).long()
        counts = torch.zeros(3, heads, STEPS + 2)
        counts[NEEDS].scatter_add_(1, steps, torch.ones(heads, rows))
        counts[BLOCKS], counts[MASS] = size * counts[NEEDS], counts[NEEDS]
        documents.append(Document(kind, {3: counts[:, : heads // 2], 7: counts[:, heads // 2:]}))
    return documents


def measured(documents: Sequence[Document], promise: Promise) -> float:
    """The mean share of query blocks of these documents that miss a peak under the promise's shifts."""
    rates = []
    for document in documents:
        missed = total = 0.0
        for site, shifts in promise.shifts.items():
            for counts, shift in zip(document.sketches[site][NEEDS], shifts, strict=True):
                edge = STEPS + 1 if shift == 0 else round(-float(torch.tensor(shift).log()) / STEP)
                missed += float(counts[edge + 1:].sum())
                total += float(counts.sum())
        rates.append(missed / total)
    return sum(rates) / len(rates)


def test_a_promise_holds_on_new_documents():
    """In 20 calibrations of 20 documents each: at most one in twenty bounds may fail; four would be one in 6000."""
    generator = torch.Generator().manual_seed(1)
    new = draw(generator, ["a", "b"] * 100)
    broken = dict.fromkeys(guarantee.TARGETS, 0)
    for _ in range(20):
        bounds = fit(draw(generator, ["a", "b"] * 10))
        for target, promise in bounds.promises.items():
            assert promise.misses <= 1 - target + 1e-12
            rate = measured(new, promise)
            broken[target] += rate > 1 - target
            assert rate > 0.3 * (1 - target), "the promise is kept by keeping far too much"
    assert max(broken.values()) <= 4, broken


def test_shifts_of_one_document_kept_for_all_would_break_it():
    """The twin: quantiles of a single document, without a bound, promise what does not hold."""
    generator = torch.Generator().manual_seed(2)
    new = draw(generator, [""] * 100, spread=0.6)
    broken = 0
    for _ in range(20):
        data = guarantee._Counts(torch.cat(list(draw(generator, [""], spread=0.6)[0].sketches.values()), 1)
                                 .double()[None])
        steps = guarantee._steps(data.misses[0] / data.query_blocks[0][:, None], 0.05).tolist()
        shifts = tuple(0.0 if step > STEPS else float(torch.tensor(-STEP * step).exp()) for step in steps)
        broken += measured(new, Promise(0, None, 0, 0, {3: shifts[:6], 7: shifts[6:]})) > 0.05
    assert broken >= 6


def test_documents_that_differ_widen_the_bound():
    generator = torch.Generator().manual_seed(3)
    alike, unlike = (fit(draw(generator, [""] * 12, spread=spread)).promises[0.95] for spread in (0.05, 0.8))
    assert unlike.density > alike.density + 0.02
    few = fit(draw(generator, [""] * 5, spread=0.4)).promises[0.95]
    many = fit(draw(generator, [""] * 60, spread=0.4)).promises[0.95]
    assert few.density > many.density


def test_a_kind_that_differs_is_told_by_leaving_it_out():
    generator = torch.Generator().manual_seed(4)
    same = fit(draw(generator, ["a", "b", "c"] * 6)).promises[0.95]
    other = fit(draw(generator, ["a", "b", "c"] * 6, c=1.0)).promises[0.95]
    assert same.elsewhere is not None and same.elsewhere < 0.1
    assert other.elsewhere is not None and other.elsewhere > 0.15
    assert other.misses <= 0.05  # of a mixture with that kind in it the promise still holds
    assert fit(draw(generator, ["a"] * 6)).promises[0.95].elsewhere is None


def test_heads_of_few_query_blocks_are_drawn_toward_all():
    generator = torch.Generator().manual_seed(5)
    few = draw(generator, [""] * 6, rows=3, spread=0.0)
    data = guarantee._Counts(torch.stack([torch.cat(list(d.sketches.values()), 1) for d in few]).double())
    own = data.misses.sum(0) / data.query_blocks.sum(0)[:, None]
    shrunk = guarantee._shares(data, range(6))
    step = 8
    assert shrunk[:, step].std() < 0.95 * own[:, step].std()
    torch.testing.assert_close(shrunk[:, step].mean(), own[:, step].mean(), rtol=0.05, atol=0.0)
    many = guarantee._Counts(torch.stack([torch.cat(list(d.sketches.values()), 1) for d in
                                          draw(generator, [""] * 40, rows=500, spread=0.0)]).double())
    own = many.misses.sum(0) / many.query_blocks.sum(0)[:, None]
    torch.testing.assert_close(guarantee._shares(many, range(40))[:, step], own[:, step], rtol=0.02, atol=0.002)


def test_a_target_out_of_reach_keeps_everything():
    hopeless = torch.zeros(3, 2, STEPS + 2)
    hopeless[:, :, -1] = 50.0  # nothing short of all blocks will do
    promise = fit([Document("", {0: hopeless})] * 6).promises[0.99]
    assert promise.shifts == {0: (0.0, 0.0)}
    assert promise.density == 1.0 and promise.misses == 0.0


def test_where_nothing_is_missed_nothing_is_lowered():
    easy = torch.zeros(3, 2, STEPS + 2)
    easy[:, :, 0] = 50.0
    easy[BLOCKS, :, 9] = 50.0
    promise = fit([Document("", {0: easy})] * 6).promises[0.99]
    assert promise.shifts == {0: (1.0, 1.0)}
    assert promise.density == pytest.approx(0.5)


def test_too_few_documents_are_refused():
    with pytest.raises(OptionError, match="documents has 4 documents"):
        fit([Document("", {0: torch.ones(3, 2, STEPS + 2)})] * 4)


PROMISE = Promise(0.04, 0.07, 0.97, 0.41, {1: (1.0, 0.5), 2: (0.25, 0.0)})
BOUNDS = Bounds(12, 3456, ("code", "prose"), {0.9: PROMISE, 0.95: PROMISE})


def calibrated(bounds: Bounds | None = BOUNDS) -> Plan:
    return Plan((Bucket(1, 100, Budget.dense()),
                 Bucket(100, None, Budget(0.03, sinks=2), {0: Budget.dense(), 2: Budget(0.01)},
                        bounds={} if bounds is None else bounds.to_dict())))


def test_joined_bounds_are_of_a_device_that_both_are_of():
    on_cpu, on_cuda = (Bounds(8, 1000, (), {0.95: PROMISE}, device_type) for device_type in ("cpu", "cuda"))
    assert on_cpu.joined(on_cpu).device_type == "cpu" and on_cpu.joined(on_cuda).device_type == ""


def test_joined_bounds_hold_where_either_does():
    other = Promise(0.03, None, 0.95, 0.6, {1: (0.7, 0.8), 2: (0.1, 0.2), 5: (0.5,)})
    joined = BOUNDS.joined(Bounds(8, 1000, ("manual",), {0.95: other, 0.99: other}))
    assert joined == Bounds(8, 4456, ("code", "manual", "prose"), {
        0.95: Promise(0.04, 0.07, 0.95, 0.6, {1: (0.7, 0.5), 2: (0.1, 0.0)})})


def test_sites_that_share_a_number_get_no_promise(rng, device):
    wide, narrow = Case.random(rng, device, 300, 300, 0, None), Case.random(rng, device, 300, 300, 0, None)
    collector = Collector(lambda site: Budget(0.1))
    for _ in range(5):
        with collector.document():
            collector.watch(0, *wide.qkv, wide.scale, wide.masks)
            collector.watch(0, *(x[:, :2] for x in narrow.qkv), narrow.scale, narrow.masks)
            collector.watch(1, *wide.qkv, wide.scale, wide.masks)
    assert list(fit(collector.documents).promises[0.95].shifts) == [1]
    for document in collector.documents:
        del document.sketches[1]
    with pytest.raises(OptionError, match="no sparse site"):
        fit(collector.documents)


def test_bounds_and_shifts_are_part_of_a_plan(tmp_path):
    plan = calibrated()
    for saved in (plan, plan.guaranteed(0.95)):
        saved.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == saved
    assert len({plan.hash, calibrated(None).hash, plan.guaranteed(0.95).hash}) == 3
    assert Bounds.from_dict(plan.buckets[1].bounds) == BOUNDS
    assert "0.95: misses 0.040 (a new kind of text: 0.070), coverage 0.970, density 0.410" in str(plan)


def test_a_guarantee_becomes_shifts_and_leaves_other_sites_dense():
    bucket = calibrated().guaranteed(0.95).buckets[1]
    assert bucket.budget_of(0).is_dense and bucket.budget_of(3).is_dense
    assert bucket.budget_of(1) == Budget(0.03, sinks=2, shifts=(1.0, 0.5))
    assert bucket.budget_of(2) == Budget(0.01, shifts=(0.25, 0.0))
    assert Plan.dense().guaranteed(0.95).buckets == Plan.dense().buckets
    assert "tolerance 0.01 times 0 to 0.25 by head" in str(bucket.budget_of(2))


@pytest.mark.parametrize(("plan", "target", "words"), [
    (calibrated(None), 0.95, r"guarantee is 0.95 and plan.buckets\[1\] \[100, inf\) has no bounds"),
    (calibrated(), 0.99, "was calibrated for 0.9, 0.95"),
    (calibrated(), 1.0, "guarantee is 1.0"),
    (calibrated(), "high", "guarantee is 'high'"),
])
def test_a_guarantee_that_no_plan_gives_is_refused(plan, target, words):
    with pytest.raises(PlanError, match=words):
        plan.guaranteed(target)


@pytest.mark.parametrize("shifts", [(), (0.5, 1.5), (0.5, -0.1), ("a",), 0.5, (True,)])
def test_shifts_out_of_range_are_refused(shifts):
    with pytest.raises(PlanError, match="budget.shifts is"):
        Budget(0.1, shifts=shifts)


@pytest.mark.parametrize("bounds", [3, {"documents": 1}, {**BOUNDS.to_dict(), "targets": {"high": {}}}])
def test_bounds_that_cannot_be_read_say_where(bounds):
    data = calibrated().to_dict()
    data["buckets"][1]["bounds"] = bounds
    with pytest.raises(PlanError, match=r"plan.buckets\[1\].bounds (cannot be read|is 3)"):
        Plan.from_dict(data)


def test_the_benchmark_measures_what_a_sketch_counts():
    """On the documents that were fitted on; the one sparse site is the last: its inputs are those of the dense run."""
    attention = measured_by.Attention(Budget(0.05))
    AttentionInterface.register("sparsify_guarantee_test", attention)
    model = small_model()
    model.set_attn_implementation("sparsify_guarantee_test")
    windows = list(torch.randint(2, 4096, (6, 700), generator=torch.Generator().manual_seed(0)))
    bucket = measured_by.one_bucket(model, attention, {"text": windows + windows}, {}, 700)
    for row in bucket["targets"]:
        promise = attention.bounds.promise(row["target"])
        assert row["seen"]["density"] == pytest.approx(promise.density)
        assert row["seen"]["misses"] <= 1 - row["target"]
        assert row["seen"]["query_blocks"] == 6 * 2 * 6  # documents, heads, query blocks
    figures = measured_by.figures_of([bucket], "small", "here", "command")
    assert [figure.met for figure in figures] == [True, True, True, False]  # far fewer than 50,000
    assert measured_by.chart([bucket], "small").startswith("<svg")


def test_masks_of_fewer_keys_hide_what_they_hid(rng, device):
    case = Case.random(rng, device, 300, 500, 200, "left", (65, "documents"))
    part = case.masks.of_keys(130)
    assert torch.equal(part.visible(300, 130, device), case.masks.visible(300, 500, device)[..., :130])
    assert Masks().of_keys(3) == Masks()
