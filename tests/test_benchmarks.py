"""The kernel benchmarks: their arithmetic, what they save, and every part of them at tiny sizes on a CPU."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import (
    bars,
    charts,
    clock,
    crossover,
    figures,
    graphs,
    profile_call,
    records,
    roofline,
    run,
    sanitize,
    small_grids,
)
from benchmarks.charts import Series
from benchmarks.dense import bare_calls, dense_calls
from benchmarks.roofline import Roof
from benchmarks.workloads import MIXED, SPARSEST, WORKLOADS, Layer, Workload
from sparsify.kernels import rule
from sparsify.kernels.masks import Masks
from sparsify.ops import crossover as op_crossover
from sparsify.plan import Bucket, Budget, Plan

ROOT = Path(__file__).resolve().parent.parent
TINY = Workload("cpu_layer", "cpu", 4, 2, 16, torch.float32, (300, 500), (1.0, 0.3, MIXED))
SHAPES = [TINY, replace(TINY, causal=False), replace(TINY, fewer_queries=4), replace(TINY, batch=3, padding=True),
          replace(TINY, batch=2, padding=True, fewer_queries=3), replace(TINY, batch=2, causal=False, padding=True)]
FACTS = {"device": "here", "commit": "one"}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Figures go to a file of the test's; a roof of nothing much."""
    monkeypatch.setattr(figures, "FILE", tmp_path / "figures.json")
    monkeypatch.setitem(roofline.PRODUCT_SIZE, "cpu", 32)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setattr(run, "environment", lambda device: FACTS)


def rows_at(length, **changed):
    """What `run_length` gives, without running."""
    times = {"cudnn": 2.0, "flash": 4.0, "selection": 0.2, "selection m=2": 0.1, "lists 0.1": 0.3}
    rows = run.rows_of(times | changed, ["cudnn", "flash"], {"lists 0.1": 0.11}, {"cudnn": 1e-3, "lists 0.1": 2e-3},
                       ["selection", "selection m=2"], flop=6e11, moved=3_000_000, roof=Roof(500.0, 2000.0))
    return [{"length": length, **row} for row in rows]


# Times


def test_rounds_alternate_and_medians_are_taken():
    calls, order = {"a": None, "b": None}, []
    samples = {"a": iter([1.0, 5.0, 7.0, 1.0]), "b": iter([1.0, 2.0, 2.0, 9.0])}

    def timer(call, device, repeats):
        name = "a" if call is a else "b"
        order.append(name)
        return next(samples[name])

    calls["a"] = a = lambda: None
    calls["b"] = lambda: 0
    assert clock.interleave(calls, "cpu", 3, 1.0, timer=timer) == {"a": 5.0, "b": 2.0}
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_a_rival_far_behind_is_timed_in_one_round():
    calls = {name: (lambda name=name: name) for name in ("near", "far", "ours")}
    seen = []

    def timer(call, device, repeats):
        seen.append(call())
        return {"near": 1.0, "far": 2.0, "ours": 9.0}[call()]

    times = clock.interleave(calls, "cpu", 4, 1.0, rivals=["near", "far"], timer=timer)
    assert times == {"near": 1.0, "far": 2.0, "ours": 9.0}
    assert seen.count("far") == 2 and seen.count("near") == seen.count("ours") == 5


@pytest.mark.parametrize("timer", [clock.time_queued, clock.time_looped])
def test_a_cpu_call_is_timed_whole(timer):
    assert timer(lambda: torch.ones(4).sum(), "cpu", 3) > 0


# Workloads


def test_every_workload_runs_on_whole_heads():
    for workload in WORKLOADS.values():
        assert workload.heads % workload.kv_heads == 0
        assert all(isinstance(density, float) or density == MIXED for density in workload.densities)


def test_the_issues_axes_are_all_there():
    gpu = [w for w in WORKLOADS.values() if w.device == "cuda"]
    head = WORKLOADS["cuda_layer"]
    assert (min(head.lengths), max(head.lengths)) == (1024, 262144)
    assert {0.03, 1.0, MIXED} <= set(head.densities)
    assert {w.head_dim for w in gpu} == {64, 128, 256} and {w.batch for w in gpu} == {1, 4}
    assert {w.causal for w in gpu} == {True, False}
    assert any(w.padding for w in gpu) and any(w.fewer_queries > 1 for w in gpu)


@pytest.mark.parametrize("workload", SHAPES, ids=lambda w: f"{w.batch}-{w.causal}-{w.fewer_queries}-{w.padding}")
def test_pairs_shares_and_errors_are_those_of_the_mask(workload):
    """Counted one by one, and dense attention and ours are right by `relative_error`."""
    layer = Layer(workload, 300)
    visible = layer.masks.visible(layer.q_len, 300, torch.device("cpu"))
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else visible
    visible = visible.expand(workload.batch, 1, layer.q_len, 300)
    assert layer.flop == 4 * int(visible.sum()) * workload.heads * workload.head_dim
    for density in workload.densities:
        lists = layer.lists(density)
        kept = rule.unpack(lists, 5).repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :layer.q_len, :300]
        share = int((kept & visible).sum()) / (int(visible.sum()) * workload.heads)
        assert math.isclose(layer.kept_share(lists), share)
        assert layer.relative_error(layer.sparse(lists)(), lists) < 1e-5
    assert layer.relative_error(dense_calls(layer)["sdpa"]()) < 1e-5
    assert layer.relative_error(layer.exact()()) < 1e-5


def test_an_error_is_noticed():
    layer = Layer(replace(TINY, densities=(0.3,)), 500)
    lists = layer.lists(0.3)
    assert layer.relative_error(layer.exact()(), lists) > 0.1
    assert layer.relative_error(layer.sparse(lists)()) > 0.1


def test_mixed_heads_are_spread_over_all_densities():
    densities = sorted(Layer(WORKLOADS["cuda_layer"], 1024).head_densities(MIXED))
    assert math.isclose(densities[0], SPARSEST) and densities[-1] == 1.0 and len(densities) == 32
    steps = [b / a for a, b in zip(densities, densities[1:], strict=False)]
    assert math.isclose(min(steps), max(steps))


def test_bare_kernels_are_given_no_mask():
    assert set(bare_calls(Layer(TINY, 300))) == {"sdpa"}
    with pytest.raises(ValueError, match="mask"):
        bare_calls(Layer(SHAPES[2], 300))


# Rows, roof and figures


def test_a_row_says_what_its_times_say():
    by = {row["contender"]: row for row in rows_at(8192)}
    lists = by["lists 0.1"]
    assert lists["speedup"] == 2.0 / 0.3 and lists["best_dense"] == "cudnn"
    assert math.isclose(lists["kept_rate_over_cudnn"], 0.11 * 2.0 / 0.3)
    assert math.isclose(lists["speedup_with_selection"], 2.0 / 0.5)
    assert math.isclose(lists["speedup_with_selection_m2"], 2.0 / 0.4)
    assert math.isclose(by["cudnn"]["tflops"], 300.0) and math.isclose(lists["tflops"], 220.0)
    assert math.isclose(by["selection"]["share_of_cudnn"], 0.1) and "tflops" not in by["selection"]
    assert math.isclose(lists["share_of_roof"], 220 / Roof(500, 2000).attainable(0.11 * 2e5))


def test_the_roof_is_the_lower_of_two():
    roof = Roof(500.0, 2000.0)
    assert roof.attainable(10.0) == 20.0 and roof.attainable(1000.0) == 500.0
    made = Roof.of_times(2.0, 4.0, "cpu")
    assert math.isclose(made.product_tflops, 2 * 32**3 / 2e-3 / 1e12)
    assert math.isclose(made.copy_gbs, 2 * (1 << 12) / 4e-3 / 1e9)


def test_every_bar_names_a_row_that_is_measured():
    for bar in bars.BARS:
        workload = WORKLOADS[bar.workload]
        assert bar.length in workload.lengths, bar
        kind, _, density = bar.contender.partition(" ")
        if kind == "lists":
            assert density in [x if isinstance(x, str) else f"{x:g}" for x in workload.densities], bar
        else:
            assert bar.contender in ("exact", "selection", "selection m=2"), bar
    names = [(bar.issue, bar.name) for bar in bars.BARS]
    assert len(names) == len(set(names))


def test_figures_come_from_rows():
    found = bars.figures_of("cuda_layer", rows_at(32768), "here", "again")
    speed = next(x for x in found if x.figure == "lists 0.1, 32768 keys, selection (m=6) included, over the best dense")
    assert math.isclose(speed.value, 4.0) and speed.bar == ">= 5.0" and not speed.met
    share = next(x for x in found if x.figure == "selection, 32768 keys, of the best dense time")
    assert math.isclose(share.value, 0.1) and not share.met
    assert not bars.figures_of("cuda_full", rows_at(8193), "here", "again")


def test_memory_is_held_to_both_issues():
    assert [(x.issue, x.met) for x in bars.memory_figures({"dense": 100.0, "adaptive": 108.0}, "here", "again")] == [
        ("line", True), ("kernels", False)]


# Files


def test_rows_of_the_same_commit_are_kept_and_others_are_not(tmp_path):
    run.save(TINY, rows_at(1024), FACTS, "again", tmp_path)
    run.save(TINY, rows_at(2048), FACTS, "again", tmp_path, memory={"dense": 1.0})
    saved = records.read_json(tmp_path / "cpu_layer.json")
    assert {row["length"] for row in saved["rows"]} == {1024, 2048} and saved["memory_mb"] == {"dense": 1.0}
    rows = run.save(TINY, rows_at(1024, cudnn=3.0), FACTS, "again", tmp_path)
    assert [row["ms"] for row in rows if row["contender"] == "cudnn"] == [3.0, 2.0]
    for length, commit in ((4096, "two"), (512, "two-dirty"), (300, "two-dirty")):
        run.save(TINY, rows_at(length), FACTS | {"commit": commit}, "again", tmp_path)
        assert {row["length"] for row in records.read_json(tmp_path / "cpu_layer.json")["rows"]} == {length}


def test_a_killed_run_keeps_every_length_that_it_finished(tmp_path, monkeypatch):
    lengths = []

    def run_length(workload, length, rounds, budget_ms, skip):
        lengths.append(length)
        if length == 3:
            raise KeyboardInterrupt
        if length == 2:
            raise RuntimeError("out of memory")
        return rows_at(length)

    monkeypatch.setattr(run, "run_length", run_length)
    with pytest.raises(KeyboardInterrupt):
        run.measure(TINY, (1, 2, 16384, 3, 4), 1, 1.0, (), tmp_path)
    assert lengths == [1, 2, 16384, 3]
    assert {row["length"] for row in records.read_json(tmp_path / "cpu_layer.json")["rows"]} == {1, 16384}
    assert "| 16384 | lists 0.1 |" in (tmp_path / "cpu_layer.md").read_text()
    assert {entry["issue"] for entry in json.loads(figures.FILE.read_text())} == {"line", "kernels"}


def test_no_length_is_begun_late(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_length", lambda *arguments: pytest.fail("begun"))
    assert run.measure(TINY, (300,), 1, 1.0, (), tmp_path, until=0.0) == ["cpu_layer at 300"]


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "results" / "x.json"
    records.write_json(file, [1])
    monkeypatch.setattr(records.os, "replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        records.write_json(file, [1, 2])
    assert records.read_json(file) == [1] and records.read_json(tmp_path / "none.json") is None


def test_one_command_writes_json_table_and_charts(tmp_path):
    assert run.measure(TINY, TINY.lengths, 2, 1.0, (), tmp_path) == []
    saved = records.read_json(tmp_path / "cpu_layer.json")
    contenders = ["sdpa", "exact", "selection", "selection m=2", "lists 1", "lists 0.3", "lists mixed"]
    assert [row["contender"] for row in saved["rows"]] == 2 * contenders
    for row in saved["rows"]:
        assert "selection" in row["contender"] or row["relative_error"] < 1e-5
    table = (tmp_path / "cpu_layer.md").read_text().splitlines()
    assert len(table) == 4 + len(saved["rows"]) and len({line.count("|") for line in table[2:]}) == 1
    for name in ("rate", "speedup", "roofline"):
        root = ElementTree.fromstring((tmp_path / f"cpu_layer_{name}.svg").read_text())
        assert len(root.findall("{*}polyline")) == {"rate": 6, "speedup": 4, "roofline": 1}[name]


def test_skipped_and_wrong_rivals_are_left_out(monkeypatch):
    layers = dense_calls(Layer(TINY, 300))
    wrong = {**layers, "wrong": lambda: torch.zeros(1, 4, 300, 16), "broken": lambda: torch.ones(2) @ torch.ones(3)}
    monkeypatch.setattr(run, "dense_calls", lambda layer, skip: {k: v for k, v in wrong.items() if k not in skip})
    rows = run.run_length(TINY, 300, 1, 1.0)
    assert {row["contender"] for row in rows} & set(wrong) == {"sdpa"}
    assert "product" not in {row["contender"] for row in rows}


# Charts


def test_a_chart_places_its_points():
    svg = charts.draw([Series("a & b", [(1024, 1.0), (4096, 3.0)]), Series("bound", [(1024, 2.0)], dashed=True)],
                      title="t < u", x="keys", y="x", log_x=True)
    root = ElementTree.fromstring(svg)
    line = root.find("{*}polyline").get("points").split()
    assert [float(point.split(",")[0]) for point in line] == [charts.LEFT, charts.WIDTH - charts.RIGHT]
    texts = {text.text for text in root.findall("{*}text")}
    assert {"a & b", "t < u", "1K", "2K", "4K"} <= texts
    assert len(root.findall("{*}circle")) == 2


# Crossover


@pytest.mark.parametrize(("length", "name"), [(300, "scaled_dot_product_attention"), (600, "adaptive_attention")])
def test_the_op_is_the_one_that_the_pass_emits(length, name):
    plan = Plan((Bucket(1, 512, Budget.dense()), Bucket(512, None, Budget(0.05), {0: Budget.dense()})))
    layer = Layer(TINY, length)
    emitted = crossover.emitted_op(layer, plan)
    assert emitted.name in ((name,) if length > 512 else crossover.DENSE_OPS)
    assert emitted.budget == (None if length < 512 else Budget(0.05))
    expected = layer.exact() if length < 512 else layer.adaptive(Budget(0.05))
    torch.testing.assert_close(emitted.call(), expected())


def test_queries_are_sharpened_until_enough_is_kept():
    layer, density = crossover.sharpened(Layer(TINY, 4000), Budget(0.05))
    assert density >= 90 / (4000 * 0.05) and layer.workload.sharpness >= 1
    assert math.isclose(layer.density(layer.select(6, Budget(0.05))), density)


def test_ratios_are_over_the_fastest_dense_kernel():
    ms = {"sdpa": 2.0, "cudnn": 1.9, "ours": 2.0, "exact": 1.0, "sdpa again": 2.1}
    row = crossover.ratios({"queued": ms}, ["sdpa", "cudnn"])
    assert row["queued_best"] == "cudnn" and row["queued_ratio"] == 0.95 and row["queued_exact_ratio"] == 1.9
    assert math.isclose(row["queued_noise"], 0.05)


def test_crossover_saves_every_length_and_records_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(crossover, "environment", lambda device: FACTS)
    workload = replace(TINY, name="batch 1, 4 heads", lengths=(300, 600))
    crossover.measure_layers([workload], 1, 1.0, False, tmp_path)
    saved = records.read_json(tmp_path / "crossover.json")
    assert [row["length"] for row in saved["layers"]["batch 1, 4 heads"]] == [300, 600]
    recorded = {entry["figure"]: entry["value"] for entry in json.loads(figures.FILE.read_text())}
    worst = min(row["looped_ratio"] for row in saved["layers"]["batch 1, 4 heads"])
    assert recorded["default plan over the best dense, batch 1, 4 heads, lowest of 1K to 32K, host time included"] \
        == worst
    assert not [name for name in recorded if name.startswith("exact op")]  # it is SDPA's kernel here
    row = saved["layers"]["batch 1, 4 heads"][0] | {"exact_kernel": "lists", "queued_exact_ratio": 1.02}
    [*_, ours] = crossover.figures_of({"a": [row]}, "here")
    assert ours.value == 1.02 and ours.bar == ">= 1.03" and not ours.met
    lines = (tmp_path / "crossover.md").read_text().splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines[2:]}) == 1


# Small grids


def test_small_grids_are_measured_whole_and_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(small_grids, "environment", lambda device: FACTS)
    small_grids.measure(replace(TINY, lengths=(600,), densities=(1.0, MIXED)), (150, 300), 1, 1.0, tmp_path)
    rows = json.loads((tmp_path / "small_grids.json").read_text())["rows"]
    assert [(row["queries"], row["contender"]) for row in rows] == [
        (queries, name) for queries in (150, 300) for name in ("all blocks", "lists 1", "lists mixed")]
    assert all(row["whole_error"] < 1e-5 and row["pieces_error"] < 1e-5 and row["best_dense"] == "sdpa" for row in rows)
    assert [entry["value"] for entry in json.loads(figures.FILE.read_text())] == [min(row["gain"] for row in rows)]


def test_whole_lists_are_those_without_pieces():
    splits = pytest.importorskip("sparsify.kernels.splits", reason="needs Triton")
    asked = lambda: splits.units_for(16, 512, 132)  # noqa: E731
    assert small_grids._whole(asked)() == 0 and asked() == 132


# Graphs


def test_ops_are_replayed_on_new_inputs():
    rows = graphs.measure_ops(Layer(TINY, 300), 1, 1.0)
    assert [row["op"] for row in rows] == ["sdpa", "exact", "adaptive", "sparse"]
    assert all(row["equal"] and row["graph_ms"] > 0 for row in rows)


def test_a_replay_that_differs_is_noticed(monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda call, device: (lambda: None, call().clone()))
    rows = graphs.measure_ops(Layer(TINY, 300), 1, 1.0)
    assert not any(row["equal"] for row in rows)
    assert not graphs.figures_of({"ops": rows}, "here")[0].met


def test_both_sides_of_the_model_are_measured():
    with torch.no_grad():
        rows = list(graphs.measure_model(TINY, (300, 500), graphs.SPARSE, True, 1, 1.0, None, "eager"))
    assert [row["length"] for row in rows] == [300, 500]
    for row in rows:
        assert row["same_bits"] and not row["skipped_graphs"] and row["error"] < 1e-5 and row["plain_error"] < 1e-5
        assert row["density"] is not None  # never exact
    assert op_crossover.selection_pays.__name__ == "selection_pays"
    for figure in graphs.figures_of({"model": rows}, "here"):
        assert figure.met


def test_first_calls_count_time_and_kernels(tmp_path, monkeypatch):
    counts = iter([0, 3, 3, 3])
    monkeypatch.setattr(graphs, "_count_kernels", lambda cache: next(counts))
    with torch.inference_mode():
        rows = graphs.first_calls(TINY, (300, 500), tmp_path)
    assert [row["kernels"] for row in rows] == [3, 0] and all(row["adaptive_s"] > 0 for row in rows)
    slow = [rows[0], rows[1] | {"exact_s": 11.0, "kernels": 1}]
    found = {x.figure: x for x in graphs.figures_of({"first": {"empty caches": slow, "second process": rows[1:]}},
                                                   "here")}
    assert not found["first call of a length class, empty caches, longest"].met
    assert found["kernels compiled for lengths after the first"].value == 1
    assert found["kernels compiled by a second process"].met
    text = graphs.table({"ops": [], "model": [], "first": {"empty caches": slow}}, FACTS)
    assert "| empty caches | 500 |" in text


# Where the host's time goes


def test_time_is_given_to_the_innermost_part():
    account = profile_call.Account()
    with profile_call.accounting(account, {"sums": ("torch:sum", "nowhere:sum"), "masks": (
            "sparsify.kernels.masks:Masks.of_rows",)}):
        account.enter("op")
        Masks(3).of_rows(1, 2)
        torch.sum(torch.ones(2))
        account.leave()
        torch.sum(torch.ones(2))  # outside: nobody's
    assert account.calls == {"op": 1, "sums": 1, "masks": 1} and not account.stack
    assert all(seconds > 0 for seconds in account.seconds.values())
    assert torch.sum.__name__ == "sum"


def test_every_named_function_exists():
    """A part whose functions are gone would count nothing."""
    for part, places in profile_call.PARTS.items():
        assert any(profile_call._find(place)[0] is not None for place in places), part


def test_parts_add_up_to_the_call():
    rows = profile_call.account_for(Layer(TINY, 300).adaptive(), calls=5)
    *parts, whole = rows
    assert whole["part"] == "all, not wrapped" and {"allocations", "checks of arguments"} <= {x["part"] for x in parts}
    assert sum(x["us"] for x in parts) < 3 * whole["us"]
    text = profile_call.table({"a": {"account": rows, "device": {"cuLaunch": 2.0}}}, FACTS)
    assert "| a | look-up of times |" in text and "| a | cuLaunch | 2.0 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="it profiles there")
def test_without_a_gpu_the_profile_explains_itself():
    ran = subprocess.run([sys.executable, "-m", "benchmarks.profile_call"], cwd=ROOT, capture_output=True, text=True,
                         check=True)
    assert "Needs CUDA" in ran.stdout


# The sanitizer

MEMCHECK = """========= COMPUTE-SANITIZER
...                                                                      [100%]
========= Invalid __global__ read of size 2 bytes
=========     at _fill_queue+0x1a0 in hopper.py:620
=========     by thread (3,0,0) in block (0,0,0)
=========     Host Frame: launch [0x1234] in _fill_queue.so
========= Invalid __global__ write of size 4 bytes
=========     at void at::native::fill(int)+0x70
12 passed in 61.20s (0:01:01)
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= Error: Race reported between Write access at _estimate_peaks+0x120 in hopper_select.py:300
=========     and Read access at _estimate_peaks+0x1f0 in hopper_select.py:310 [64 hazards]
1 failed, 11 passed in 41.20s
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
KERNELS = ["_estimate_peaks", "_fill_queue"]


def test_reports_about_our_kernels_are_told_apart():
    verdict = sanitize.read_verdict("memcheck", MEMCHECK, KERNELS, 61.0)
    assert verdict == sanitize.Verdict("memcheck", 2, 1, 12, 0, 61.0) and not verdict.is_clean
    assert sanitize.read_verdict("memcheck", MEMCHECK, ["_pack_lists"], 61.0).is_clean


def test_a_failed_test_or_no_summary_is_not_clean():
    race = sanitize.read_verdict("racecheck", RACECHECK, KERNELS, 41.0)
    assert (race.reports, race.ours, race.passed, race.failed) == (1, 2, 11, 1)
    unfinished = sanitize.read_verdict("racecheck", "stopped after 120 s", KERNELS, 120.0)
    assert unfinished.reports == -1 and not unfinished.is_clean
    clean = sanitize.read_verdict("racecheck", "3 passed in 1.00s\n= RACECHECK SUMMARY: 0 hazards displayed", [], 1.0)
    assert clean.is_clean
    assert [x.met for x in sanitize.figures_of([unfinished, clean], "here")] == [False, True, True, True]


def test_the_small_suite_exists_and_reaches_every_kernel():
    tests = sanitize.read_tests()
    listed = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *tests], cwd=ROOT,
                            capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout[-2000:]
    kernels = {"_block_sparse_attention", "_estimate_peaks", "_pack_lists", "_quantise_keys"}
    assert kernels <= set(sanitize.kernel_names())
    for room in ("hopper", "hopper_select", "select", "attend", "splits", "statistics"):
        assert any(test.startswith(f"tests/kernels/test_{room}.py") for test in tests)
