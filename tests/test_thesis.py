"""The experiments on trained models: estimates and rules by their definitions, arithmetic, every part at tiny size."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import figures
from benchmarks.thesis import __main__ as command
from benchmarks.thesis import attention, rules, shares, symbols, transfer
from benchmarks.thesis.attention import PolicyAttention, attend, kept_lists, key_weights
from benchmarks.thesis.policies import Criticals, Policy, choose, critical_amounts
from benchmarks.thesis.quality import (
    Change,
    compare,
    density_for,
    interval,
    kl_at,
    rank_correlation,
    ratio_interval,
)
from benchmarks.thesis.subject import Subject
from sparsify.kernels import oracle, rule
from sparsify.kernels.blocks import KeptLists, allowed_blocks, boundary_blocks, forced_blocks
from sparsify.kernels.masks import Masks
from sparsify.models.loading import TINY_LM
from sparsify.models.tasks import retrieval_rows
from sparsify.plan import Bucket, Budget, Plan
from tests.numerics import assert_as_good_as_torch, attention_units
from tests.small_model import save_small_model, small_model

SCALE = 0.5
RULES = [Policy("split-6", "share"), Policy("split-6", "share", by="mean"), Policy("split-6", "tokens"),
         Policy("split-6", "window"), Policy("split-6", "top-p"), Policy("split-6", "absolute")]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    """One query block at a time, and figures in a file of the test's."""
    monkeypatch.setattr(shares, "WORKSPACE", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(figures, "FILE", tmp_path / "figures.json")


def make_qkv(rng, length=500, heads=4, kv_heads=2, dim=16):
    """Queries that look at some keys much more than at others."""
    def draw(count):
        return torch.randn(1, count, length, dim, generator=rng, device=rng.device)

    return 2 * draw(heads), draw(kv_heads), draw(kv_heads)


def signals_like(rng, length=1000):
    """Shares of a softmax, as signals."""
    q, k, _ = make_qkv(rng, length)
    return shares.signals_of("oracle", q, k, SCALE)


def geometry(length, device):
    allowed = allowed_blocks(Masks(0), length, length, device)
    return allowed, forced_blocks(allowed, boundary_blocks(length, length, 0, device), 1, 1)


# Estimates


@pytest.mark.parametrize("length", [64, 129, 500])
def test_split_summaries_are_the_products(length, rng):
    q, k, _ = make_qkv(rng, length)
    found = shares.signals_of("split-6", q, k, SCALE)
    defined = oracle.estimated_shares(q, k, singles=6, scale=SCALE, causal_offset=0)
    torch.testing.assert_close(found.peaks, oracle.peaks(defined), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.means[..., -1, :], defined[:, :, (length - 1) // 128 * 128:].mean(2), rtol=1e-4,
                               atol=1e-5)


def test_the_oracle_is_the_true_attention(rng):
    q, k, _ = make_qkv(rng)
    found = shares.signals_of("oracle", q, k, SCALE)
    torch.testing.assert_close(found.peaks, oracle.peaks(oracle.true_shares(q, k, scale=SCALE, causal_offset=0)))
    torch.testing.assert_close(found.means.sum(-1), torch.ones_like(found.means[..., 0]))


def test_runs_are_means_of_runs_on_the_diagonal_too(rng):
    q, k, _ = make_qkv(rng, 512)
    means = k.unflatten(2, (-1, 8)).mean(3).repeat_interleave(2, 1)
    future = torch.arange(means.shape[2], device=q.device) * 8 > torch.arange(512, device=q.device)[:, None]
    scores = (q @ means.mT * SCALE).masked_fill(future, -torch.inf)
    torch.testing.assert_close(shares.signals_of("sub-8", q, k, SCALE).peaks,
                               oracle.peaks(scores.softmax(-1).unflatten(-1, (-1, 8)).sum(-1)))


@pytest.mark.parametrize("name", ["kmeans-8", "kmeans-7v"])
def test_clusters_find_what_is_clustered(name, rng):
    q, k, _ = make_qkv(rng, 512)
    few = k[:, :, :512].unflatten(2, (8, 64))
    k = few[:, :, :, torch.arange(64, device=k.device) % 7].flatten(2, 3)  # seven different keys in every block
    found, true = (shares.signals_of(each, q, k, SCALE) for each in (name, "oracle"))
    torch.testing.assert_close(found.peaks, true.peaks, rtol=1e-3, atol=1e-4)


def test_clusters_beat_one_mean(rng):
    q, k, _ = make_qkv(rng, 512)
    true = shares.signals_of("oracle", q, k, SCALE).peaks
    errors = {name: (shares.signals_of(name, q, k, SCALE).peaks - true).abs().mean()
              for name in ("kmeans-8", "kmeans-7v", "split-6", "sub-64")}
    assert max(errors["kmeans-8"], errors["kmeans-7v"], errors["split-6"]) < errors["sub-64"]


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'median'.*Give oracle"):
        shares.estimator("median")


# Rules


@pytest.mark.parametrize("policy", RULES, ids=str)
def test_a_larger_amount_keeps_more_and_always_the_forced_blocks(policy, rng):
    signals = signals_like(rng)
    allowed, forced = geometry(1000, signals.peaks.device)
    amounts = critical_amounts(policy, signals, 1000)[allowed[:, None].expand_as(signals.peaks)].quantile(
        torch.tensor([0.3, 0.6], device=signals.peaks.device)).abs().tolist()
    few, many = (choose(policy.at(amount), signals, 1000) for amount in amounts)
    assert (many >= few).all() and many.sum() > few.sum()
    assert (few >= forced[:, None]).all() and not (many & ~allowed[:, None]).any()


@pytest.mark.parametrize("policy", RULES, ids=str)
def test_an_amount_gives_the_density_it_was_asked_for(policy, rng):
    signals = signals_like(rng, 4000)
    allowed, _ = geometry(4000, signals.peaks.device)
    criticals = Criticals(policy.kind)
    criticals.add(signals, 4000)
    kept = choose(policy.at(criticals.amount(0.5)), signals, 4000)
    density = float(kept.sum() / allowed.sum() / kept.shape[1])
    step = 0.03 if policy.rule in ("tokens", "window") else 0.005  # whole blocks
    assert density == pytest.approx(0.5, abs=step)


def test_ours_is_the_products_rule(rng):
    signals = signals_like(rng)
    kept = choose(Policy("split-6", "absolute", 0.07, max_density=0.8, sinks=2, local=0), signals, 1000)
    assert (kept == rule.keep(signals.peaks, q_len=1000, kv_len=1000, tolerance=0.07, max_density=0.8, sinks=2, local=0,
                              masks=Masks(0))).all()


@pytest.mark.parametrize("by", ["peak", "mean"])
def test_a_share_keeps_the_same_share_of_every_query_block_the_best_ones(by, rng):
    signals = signals_like(rng)
    worth = signals.peaks if by == "peak" else signals.means
    allowed, forced = geometry(1000, signals.peaks.device)
    kept = choose(Policy("oracle", "share", 0.5, by=by), signals, 1000)
    wanted = torch.maximum((0.5 * allowed.sum(-1)).round(), forced.sum(-1))
    assert (kept.sum(-1) - wanted).abs().max() <= 0.5
    free = kept & ~forced[:, None]
    dropped = allowed[:, None] & ~kept
    lowest = torch.where(free, worth, torch.inf).amin(-1)
    assert (lowest >= torch.where(dropped, worth, -torch.inf).amax(-1)).all()


def test_top_p_keeps_the_fewest_blocks_that_cover(rng):
    signals = signals_like(rng)
    _, forced = geometry(1000, signals.peaks.device)
    kept = choose(Policy("oracle", "top-p", 0.8), signals, 1000)
    covered = (signals.means * kept).sum(-1)
    assert (covered >= 0.8 - 1e-5).all()
    free = kept & ~forced[:, None]
    least = torch.where(free, signals.means, torch.inf).amin(-1)
    assert (covered - least < 0.8 + 1e-5)[free.any(-1)].all()


def test_a_window_is_the_latest_blocks(rng):
    kept = choose(Policy("split-6", "window", 5), signals_like(rng), 1000)
    assert kept[0, 0, 7].nonzero()[:, 0].tolist() == [0, 12, 13, 14, 15]


def test_protected_blocks_are_kept_where_they_are_seen(rng):
    signals = signals_like(rng)
    protected = torch.zeros(1, 16, dtype=torch.bool, device=signals.peaks.device)
    protected[0, 6] = True
    plain = choose(Policy("split-6", "absolute", 1.0), signals, 1000)
    kept = choose(Policy("split-6", "absolute", 1.0, protect=True), signals, 1000, protected)
    assert (kept & ~plain).nonzero()[:, 3].unique().tolist() == [6]
    assert kept[..., 3:, 6].all() and not kept[..., :3, 6].any()


# Attention


def test_lists_hold_exactly_the_kept_blocks(rng):
    kept = choose(Policy("oracle", "absolute", 0.2), signals_like(rng), 1000)
    lists = kept_lists(kept)
    assert (rule.unpack(KeptLists(*lists), kept.shape[-1]) == kept).all() and (lists.counts % 2 == 0).all()


@pytest.mark.parametrize("length", [129, 500])
def test_attention_is_exact_over_the_kept_blocks(length, rng):
    q, k, v = make_qkv(rng, length)
    kept = choose(Policy("oracle", "absolute", 0.2), shares.signals_of("oracle", q, k, SCALE), length)
    out, lse = attend(q, k, v, kept, SCALE)

    def of(*qkv):
        return oracle.attention(*qkv, scale=SCALE, kept=kept, causal_offset=0)

    exact, exact_lse = of(q.double(), k.double(), v.double())
    plain, plain_lse = of(q, k, v)
    units = attention_units(q, k, SCALE) * (2 ** 16 if q.is_cuda else 1)  # bfloat16 there
    assert_as_good_as_torch(out, plain, exact, units)
    assert_as_good_as_torch(lse, plain_lse, exact_lse, units)


def test_dropped_blocks_of_equal_values_are_made_up_for_exactly(rng):
    """Where a block's values are equal and its mass is known, the zero-order correction is dense attention."""
    q, k, v = make_qkv(rng, 512)
    v = v.unflatten(2, (-1, 64))[:, :, :, :1].expand(-1, -1, -1, 64, -1).flatten(2, 3)
    dense = oracle.attention(q, k, v, scale=SCALE, causal_offset=0)[0]
    run = PolicyAttention()
    policy = Policy("oracle", "share", 0.5)
    with run.under(policy) as tally:
        plain = run(q, k, v, SCALE)
    assert float(tally.density()) < 0.9
    with run.under(replace(policy, variant="zero-order")):
        corrected = run(q, k, v, SCALE)
    worst = 2e-2 if q.is_cuda else 1e-5
    assert (plain - dense).abs().max() > 10 * worst > (corrected - dense).abs().max()


def test_feedback_corrects_the_next_query_block_only_by_what_was_kept(rng):
    q, k, _ = make_qkv(rng, 512)
    policy = Policy("sub-64", "share", 0.6)
    estimated, exact = (shares.signals_of(name, q, k, SCALE) for name in ("sub-64", "oracle"))
    found = attention._fed_back(estimated, exact, policy, 512)
    kept = choose(policy, estimated, 512)
    changed = found.peaks != estimated.peaks
    assert changed.any() and not changed[:, :, 0].any() and not (changed[:, :, 1:] & ~kept[:, :, :-1]).any()
    closer = exact.peaks[:, :, :-1] > estimated.peaks[:, :, :-1]
    rose = found.peaks[:, :, 1:] > estimated.peaks[:, :, 1:]
    assert (rose[changed[:, :, 1:]] == closer[changed[:, :, 1:]]).all()


def test_shared_lists_are_those_of_the_matching_heads(rng):
    run, heard = PolicyAttention(), []
    run.heads_of = {1: torch.tensor([2, 2, 0, 1])}
    with run.under(Policy("split-6", "share", 0.5, variant="shared"), on_kept=lambda layer, kept: heard.append(kept)):
        for _ in range(2):
            run(*make_qkv(rng), SCALE)
    assert (heard[1] == heard[0][:, [2, 2, 0, 1]]).all() and heard[0].float().mean() < 1


def test_a_policy_per_layer_and_density_per_document(rng):
    run = PolicyAttention()
    q, k, v = (torch.cat([x, y]) for x, y in zip(make_qkv(rng), make_qkv(rng), strict=True))
    with run.under([None, Policy("split-6", "share", 0.5)]) as tally:
        run(q, k, v, SCALE)
        run(q, k, v, SCALE)
    allowed = geometry(500, q.device)[0].sum() * 4
    kept = [layer.sum(-1) for layer in tally.kept]
    assert (kept[0] == allowed).all() and (kept[1] < allowed).all()
    torch.testing.assert_close(tally.density(), ((kept[0] + kept[1]) / (2 * allowed)).cpu())
    assert (tally.density(last_quarter=True) < tally.density()).all()  # a share of more blocks is less forced


def test_single_keys_by_share_and_by_tolerance(rng):
    q, k, v = make_qkv(rng, 300)
    dense = oracle.attention(q, k, v, scale=SCALE, causal_offset=0)[0]
    run = PolicyAttention()
    for policy in (Policy("keys", "share", 1.0), Policy("keys", "absolute", 0.0)):
        with run.under(policy) as tally:
            torch.testing.assert_close(run(q, k, v, SCALE), dense)
        assert float(tally.density()) == 1.0
    with run.under(Policy("keys", "share", 0.25)) as tally:
        run(q, k, v, SCALE)
    assert float(tally.density()) == pytest.approx(0.25, abs=0.01)
    weights = torch.cat([torch.nn.functional.pad(w, (0, 300 - w.shape[-1])) for _, w, _ in key_weights(q, k, SCALE)], 2)
    with run.under(Policy("keys", "absolute", 0.05)) as tally:
        out = run(q, k, v, SCALE)
    own = torch.eye(300, dtype=torch.bool, device=q.device)
    kept = (weights >= weights.amax(-1, keepdim=True).clamp(max=0.05)) | own
    thinned = (weights * kept) / (weights * kept).sum(-1, keepdim=True)
    torch.testing.assert_close(out, thinned @ v.repeat_interleave(2, 1))
    assert float(tally.kept[0].sum()) == float(kept.sum())


# Arithmetic


def test_kl_and_losses_are_their_definitions(rng):
    dense, sparse = (torch.randn(2, 9, 50, generator=rng, device=rng.device) for _ in range(2))
    ids = torch.randint(0, 50, (2, 9), generator=rng, device=rng.device)
    found = compare(dense, sparse, ids)
    p, q = dense.softmax(-1), sparse.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert found.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert found.kl_last == pytest.approx(kl[:, -2:].mean(1).tolist(), rel=1e-4)
    losses = [torch.nn.functional.cross_entropy(x[:-1], y[1:]).item() for x, y in zip(sparse, ids, strict=True)]
    assert found.loss == pytest.approx(losses, rel=1e-4)
    same = compare(dense, dense, ids)
    assert max(same.kl) < 1e-6 and same.loss_rise() == 0


def test_a_power_law_is_read_off_exactly():
    law = [(d, 0.004 * d ** -2.0) for d in (0.2, 0.5)]
    assert kl_at(law, 0.3) == pytest.approx(0.004 * 0.3 ** -2)
    assert density_for(law, 0.02) == pytest.approx((0.02 / 0.004) ** -0.5)
    assert kl_at(law, 1.0) == 0.0 and density_for(law, 1e-5) == 1.0
    assert kl_at([(0.4, 0.01)], 0.2) == pytest.approx(0.01 * 2 ** 2.7)


def test_points_on_both_sides_decide_the_slope():
    near_together = [(0.60, 0.0262), (0.58, 0.0279), (0.95, 0.0003)]
    assert 0.60 < density_for(near_together, 0.01) < 0.95
    noisy = [(0.5, 0.010), (0.6, 0.011)]  # KL may not rise with density
    assert kl_at(noisy, 0.7) < 0.011


def test_intervals_hold_the_mean_and_shrink_where_windows_agree():
    values = np.random.default_rng(1).normal(1, 0.1, 40).tolist()
    low, high = interval(values)
    assert low < np.mean(values) < high < low + 0.1
    doubled = [2 * value for value in values]
    assert ratio_interval(doubled, values) == pytest.approx((2.0, 2.0))
    assert all(math.isnan(x) for x in interval([1.0]))


def test_rank_correlation_shares_ranks_among_ties():
    a, b = np.array([1, 2, 2, 3.0]), np.array([10, 20, 30, 40.0])
    assert rank_correlation(a, b) == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert rank_correlation(a, -a) == pytest.approx(-1) and math.isnan(rank_correlation(a, np.ones(4)))


# Subjects and parts


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = save_small_model(tmp_path_factory.mktemp("small"))
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text that goes on, {i * i}\n" for i in range(900)), encoding="utf-8")
    return Subject.load(str(folder), [text], documents=3, device="cpu")


def test_dense_passes_are_the_model_itself(subject):
    ids = subject.windows(256)[:1]
    with torch.no_grad():
        expected = small_model()(ids).logits
    torch.testing.assert_close(subject.logits(ids, None), expected, rtol=1e-3, atol=1e-3)


def test_windows_are_disjoint_and_calibration_is_apart(subject):
    judged, apart = subject.windows(300), subject.calibration(300)
    whole = torch.cat(subject.texts)
    assert len(judged) >= 1 and len(apart) >= 1 and len(judged) <= 3
    starts = [next(i for i in range(len(whole) - 299) if torch.equal(whole[i: i + 300], row))
              for row in torch.cat([judged, apart])]
    assert all(abs(a - b) >= 300 for i, a in enumerate(starts) for b in starts[:i])


def test_an_outcome_is_measured_once_and_worse_at_less_density(subject, monkeypatch):
    gentle, harsh = (subject.run(Policy("split-6", "share", share), 1024) for share in (0.8, 0.3))
    assert gentle.density > harsh.density and gentle.kl < harsh.kl
    monkeypatch.setattr(subject, "forward", None)
    assert subject.run(Policy("split-6", "share", 0.3), 1024) is harsh


def test_a_plan_is_followed_layer_by_layer():
    plan = Plan((Bucket(1, 1024, Budget.dense()),
                 Bucket(1024, None, Budget(0.05, singles=2, sinks=2), {0: Budget.dense()})))
    assert transfer.plan_policies(plan, 1000, 3) == [None] * 3
    sparse = Policy("split-2", "absolute", 0.05, max_density=0.9, sinks=2)
    assert transfer.plan_policies(plan, 1024, 3) == [None, sparse, sparse]


def test_planted_statements_are_marked_and_filler_is_not(subject):
    rows = retrieval_rows(TINY_LM, "kv", 4096, 2)
    for ids, answers in zip(rows.ids, rows.answers, strict=True):
        marked = symbols.statements(subject, ids)
        assert all(marked[at // 64] for answer in answers for at in answer)
        assert 8 <= int(marked.sum()) <= 24  # eight pairs and four questions; the text has few such lines


def test_bars_are_the_issues():
    kinds = {str(kind): {"kl": 0.02} for kind in (rules.OURS, *rules.RIVALS)}
    kinds[str(rules.OURS)] = {"kl": 0.01}
    kinds[str(rules.SHARES[1])] = {"kl": 0.012}
    result = {"lengths": [{"length": length, "at": [{"policies": kinds}]} for length in (1024, 2048, 8192)]}
    found = rules.figures("SmolLM2-135M", result, "here", "command")
    assert [(figure.bar, figure.met) for figure in found] == [
        ("<= 1", True), ("<= 0.7", True), ("<= 0.75", False), ("<= 0.7", True), ("<= 1", True)]
    assert len(rules.figures("tiny-lm", result, "here", "command")) == 3


def _retrieval(*right):
    """Answers right of 25 at each of four depths."""
    by_depth = [{"right": found, "queries": 25} for found in right]
    return {"retrieval": {"kv": {"right": sum(right) / 100, "queries": 100, "by_depth": by_depth}}}


def test_a_shipped_plan_is_judged_at_every_length_and_the_default_is_not():
    row = {"length": 512, "dense": _retrieval(25, 25, 24, 25), "plan": {
        "kl": 0.02, "loss_rise": 0.001, "loss_rise_interval": [0, 0.004], **_retrieval(25, 24, 24, 24)}}
    found = transfer.figures("tiny-lm", {"plan_file": "plan.json", "lengths": [row]}, "here", "command")
    assert [(figure.value, figure.met) for figure in found] == [
        (0.02, False), (0.001, True), (0.004, True), (2.0, False), (4.0, False)]
    assert transfer.figures("tiny-lm", {"plan_file": None, "lengths": [row]}, "here", "command") == []


def test_answers_are_compared_at_every_depth():
    """One depth that is better hides none that is worse."""
    row = {"length": 512, "dense": _retrieval(25, 25, 24, 25), "plan": {
        "kl": 0.0, "loss_rise": 0.0, "loss_rise_interval": [0, 0], **_retrieval(25, 24, 25, 25)}}
    found = transfer.figures("tiny-lm", {"plan_file": "plan.json", "lengths": [row]}, "here", "command")
    assert [(figure.value, figure.met) for figure in found[-2:]] == [(0.0, True), (4.0, False)]


def test_every_part_runs_and_writes_numbers_and_charts(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(Subject, "load", lambda *arguments: replace(subject, documents=1))
    monkeypatch.setattr("sys.argv", ["thesis", "needed", "rules", "transfer", "static", "--lengths", "512", "640",
                                     "--device", "cpu", "--out", str(tmp_path)])
    command.main()
    written = {path.stem.partition("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")
               if path.name != "figures.json"}
    parts = {path.stem.rsplit("-", 1)[1] for path in tmp_path.glob("*-*.json")}
    assert parts == {"needed", "rules", "transfer", "static"} and written
    needed = json.loads(next(tmp_path.glob("*-needed.json")).read_text())
    for row in needed["lengths"]:
        assert 0 < row["coverage"]["0.9"]["density"] <= row["coverage"]["0.99"]["density"] <= 1
    for path in tmp_path.glob("*.svg"):
        ElementTree.fromstring(path.read_text())
    assert len(list(tmp_path.glob("*.svg"))) >= 5


@pytest.mark.parametrize(("commit", "again"), [("0123456789ab", [640]), ("ba9876543210", [512, 640])])
def test_a_part_that_was_killed_goes_on_on_the_same_commit(subject, tmp_path, monkeypatch, commit, again):
    asked = []

    def measure(subject, lengths):
        asked.extend(lengths)
        if lengths == [640] and len(asked) == 2:
            raise KeyboardInterrupt
        return {"lengths": [{"length": length, "kind": kind} for length in lengths for kind in "ab"]}

    def run():
        command.main()
        return json.loads(next(tmp_path.glob("*-static.json")).read_text())

    monkeypatch.setattr(Subject, "load", lambda *arguments: subject)
    monkeypatch.setattr(command.static, "measure", measure)
    monkeypatch.setattr(command.static, "charts", lambda name, result: {})
    monkeypatch.setattr("sys.argv", ["thesis", "static", "--lengths", "512", "640", "--device", "cpu", "--out",
                                     str(tmp_path)])
    monkeypatch.setattr(command, "environment", lambda device: {"device": "here", "commit": "0123456789ab"})
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(command, "environment", lambda device: {"device": "here", "commit": commit})
    asked[:] = [0, 0, 0]
    written = run()
    assert asked[3:] == again
    assert [(row["length"], row["kind"]) for row in written["lengths"]] == [
        (length, kind) for length in (512, 640) for kind in "ab"]
    assert written["command"].partition(" --lengths ")[2] == "512 640"


def test_signals_and_research_run_on_a_small_model(subject, monkeypatch):
    one = replace(subject, documents=1)
    monkeypatch.setattr(command.research, "CANDIDATES", (Policy("kmeans-8", "absolute"),
                                                         Policy("split-6", "absolute", variant="shared")))
    found = command.research.measure(one, [2048])["lengths"][0]["at"][0]["candidates"]
    assert set(found) == {"split-6, absolute", "oracle, absolute", "kmeans-8, absolute", "split-6, absolute, shared"}
    assert found["split-6, absolute"]["over_split_6"] == pytest.approx(1.0)
    signal = command.signal.measure(one, [2048])["lengths"][0]
    assert all(-1 <= one["mean"] <= 1 for one in signal["correlations"]) and len(signal["picture"]["density"]) == 16


def test_changes_are_averaged_over_windows():
    change = Change([0.1], [0.2], [2.0], [2.1])
    change.extend(Change([0.3], [0.4], [4.0], [4.2]))
    assert change.mean("kl") == pytest.approx(0.2) and change.loss_rise() == pytest.approx(0.05)


def test_masks_beyond_causality_are_refused(rng):
    """The model's own mask is not looked at, so what it cannot say must be refused: nothing is dropped in silence."""
    from benchmarks.thesis.subject import _register
    from sparsify.errors import OptionError

    _register(PolicyAttention())
    from transformers import AttentionInterface

    q, k, v = make_qkv(rng, 64)
    with pytest.raises(OptionError, match="sliding_window"):
        AttentionInterface._global_mapping["sparsify_thesis"](torch.nn.Identity(), q, k, v, None, scaling=SCALE,
                                                              sliding_window=32)
