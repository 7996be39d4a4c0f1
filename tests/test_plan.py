"""Plans: what is written is read back, and what cannot be meant is refused in words."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sparsify.bounds import Bounds, Promise
from sparsify.difference import differences
from sparsify.errors import PlanError
from sparsify.plan import SCHEMA, Bucket, Budget, Gate, Plan, SiteShape, graph_hash, resolve_plan

DENSE = Budget.dense()
THREE = Plan(
    (Bucket(1, 4096, DENSE), Bucket(4096, 16384, Budget(0.02), {0: DENSE, 3: Budget(0.01)}),
     Bucket(16384, None, Budget(0.05, max_density=0.5, sinks=2, local=3, singles=4))),
    name="three", fingerprint={"device": "cpu"},
)
GATE = Gate(4096, Budget(0.02, singles=2), True, 8, 0.1 + 0.2, 1 / 3, 0.4, 0.25, True, "8 documents", {0: DENSE}, 0.1,
            0.2, {"code": 0.3}, {0: 1.0, 11: 0.4})
BOUNDS = Bounds(12, 99, ("code",), {0.95: Promise(0.05, None, 0.9, 0.4, {1: (0.5, 1.0)})})
GRAPH = tuple(SiteShape(0, i, f"model.layers.{i}.self_attn", 9, 3, 64, 64, True) for i in range(3))
CALIBRATED = Plan(
    (Bucket(1, 2049, DENSE),
     Bucket(2049, 4097, replace(GATE.budget, peaks=33.5), {0: DENSE}, (GATE,), BOUNDS.to_dict()),
     Bucket(4097, None, Budget(0.01))),
    name="calibrated", fingerprint={"graph": graph_hash(GRAPH), "device": "cpu"},
    calibration={"metric": "kl", "documents": {"": 12}}, graph=GRAPH,
)


@pytest.mark.parametrize("plan", [Plan.dense(), Plan.default("cpu"), Plan.default("cuda"), THREE, CALIBRATED],
                         ids=lambda p: p.name)
def test_a_saved_plan_is_read_back_equal(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").hash == plan.hash
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(("length", "bucket"), [(1, 0), (4095, 0), (4096, 1), (16383, 1), (16384, 2), (10**9, 2)])
def test_every_length_has_one_bucket(length, bucket):
    assert THREE.bucket_of(length) is THREE.buckets[bucket]
    assert [length in b for b in THREE.buckets].count(True) == 1


def test_sites_override_the_budget_of_a_bucket():
    assert THREE.buckets[1].budget_of(0) == DENSE
    assert THREE.buckets[1].budget_of(1) == Budget(0.02)
    assert THREE.buckets[1].budget_of(3) == Budget(0.01)


def test_a_bucket_whose_sites_drop_blocks_is_not_called_dense():
    """As a plan with a guarantee has it: everything is in its sites."""
    assert Bucket(1, None, DENSE, {0: Budget(0.1), 1: Budget(0.2), 2: DENSE}).headline == "2 sites by their own"
    assert [bucket.headline for bucket in THREE.buckets[:2]] == ["dense", "tolerance 0.02"]


def test_equal_neighbours_merge_and_others_do_not():
    plan = Plan((Bucket(1, 10, DENSE), Bucket(10, 20, DENSE), Bucket(20, 30, Budget(0.1)),
                 Bucket(30, None, Budget(0.1), {0: DENSE})))
    assert [(b.lo, b.hi) for b in plan.merged().buckets] == [(1, 20), (20, 30), (30, None)]


def test_the_hash_follows_everything_but_the_name():
    def changed(**changes):
        return Plan.from_dict({**THREE.to_dict(), **changes}).hash

    assert changed(name="other") == THREE.hash
    assert changed(fingerprint={"device": "cuda"}) != THREE.hash
    assert changed(buckets=Plan.dense().to_dict()["buckets"]) != THREE.hash
    assert hash(Plan.from_dict(THREE.to_dict())) == hash(THREE)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_plan_is_dense_where_nothing_can_be_dropped(device):
    plan = Plan.default(device)
    assert all(plan.bucket_of(length).budget.is_dense for length in (1, 64, 1024, 2048))
    long = plan.bucket_of(2**20)
    assert not long.budget.is_dense
    assert long.budget_of(0).is_dense


def test_the_hash_follows_calibration_gates_bounds_and_graph():
    def changed(**changes):
        return replace(CALIBRATED, **changes).hash

    bucket = CALIBRATED.buckets[1]
    others = [CALIBRATED.hash, changed(calibration={}), changed(graph=GRAPH[:2])]
    for other in (replace(bucket, gates=()), replace(bucket, bounds={})):
        others.append(changed(buckets=(CALIBRATED.buckets[0], other, CALIBRATED.buckets[2])))
    assert len(set(others)) == 5


def test_a_file_of_schema_1_is_read():
    old = {name: value for name, value in THREE.to_dict().items() if name not in ("calibration", "graph")}
    buckets = [{name: x for name, x in bucket.items() if name not in ("gates", "bounds")} for bucket in old["buckets"]]
    assert Plan.from_dict({**old, "schema": 1, "buckets": buckets}) == THREE


def test_merged_buckets_keep_all_gates_and_other_bounds_apart():
    low, high = Bucket(1, 10, DENSE, {}, (GATE,)), Bucket(10, None, DENSE, {}, (replace(GATE, length=20),))
    [joined] = Plan((low, high)).merged().buckets
    assert [gate.length for gate in joined.gates] == [4096, 20]
    assert len(Plan((low, replace(high, bounds={"0.9": {}}))).merged().buckets) == 2


@pytest.mark.parametrize(("changes", "words"), [
    ({}, None),
    ({"module": "wrapped.model.layers.1.self_attn"}, None),
    ({"heads": 0, "kv_heads": 0, "head_dim": 0, "value_dim": 0}, None),  # left as it was: under grad mode, for one
    ({"causal": False}, None),
    ({"module": "model.layers.1.cross_attn"}, "its site 1 is model.layers.1.self_attn, 9 / 3 heads of 64; here site 1"),
    ({"kv_heads": 9}, "here site 1 is model.layers.1.self_attn, 9 / 9 heads of 64"),
    ({"value_dim": 32}, "9 / 3 heads of 64 and 32"),
])
def test_a_plan_knows_its_graph(changes, words):
    sites = (GRAPH[0], replace(GRAPH[1], **changes), GRAPH[2])
    if words is None:
        CALIBRATED.refuse_other_graph(sites)
    else:
        with pytest.raises(PlanError, match=words):
            CALIBRATED.refuse_other_graph(sites)


def test_a_plan_of_several_graphs_takes_each_and_one_of_none_takes_all():
    second = tuple(replace(site, graph=1) for site in GRAPH[:1])
    both = replace(CALIBRATED, graph=(*GRAPH, *second))
    for sites in (GRAPH, GRAPH[:1], ()):
        both.refuse_other_graph(sites)
    with pytest.raises(PlanError, match="it has 3 attention sites and this one 2"):
        both.refuse_other_graph(GRAPH[:2])
    THREE.refuse_other_graph(GRAPH[:2])


def test_differences_name_ranges_sites_and_facts():
    assert differences(CALIBRATED, CALIBRATED) == []
    bucket = replace(CALIBRATED.buckets[1], hi=3000, budget=Budget(0.05), sites={2: DENSE}, bounds={})
    other = replace(CALIBRATED, buckets=(CALIBRATED.buckets[0], bucket, Bucket(3000, None, Budget(0.01))), graph=(),
                    fingerprint={**CALIBRATED.fingerprint, "device": "cuda"})
    assert differences(CALIBRATED, other) == [
        "[2049, 3000): tolerance 0.02, singles 2 -> tolerance 0.05",
        "[2049, 3000), site 0: dense -> tolerance 0.05",
        "[2049, 3000), site 2: tolerance 0.02, singles 2 -> dense",
        "[2049, 3000): other bounds",
        "[3000, 4097): tolerance 0.02, singles 2 -> tolerance 0.01",
        "[3000, 4097), site 0: dense -> tolerance 0.01",
        "[3000, 4097): other bounds",
        "measured on, device: cpu -> cuda",
        "graph: 3 attention sites, the first model.layers.0.self_attn, 9 / 3 heads of 64 -> any",
    ]


@pytest.mark.parametrize(("gates", "lines"), [
    ([GATE], []),
    ([replace(GATE, passed=False)], ["gate at 4096, passed: True -> False"]),
    ([replace(GATE, budget=DENSE, densities={0: 1.0, 3: 0.5})],
     ["gate at 4096, budget: tolerance 0.02, singles 2 -> dense", "gate at 4096, densities 11: 0.4 -> not said",
      "gate at 4096, densities 3: not said -> 0.5"]),
    ([], [f"gate: {GATE} -> none"]),
    ([GATE, replace(GATE, length=3000)], [f"gate: none -> {replace(GATE, length=3000)}"]),
])
def test_differences_name_gates(gates, lines):
    low, middle, high = CALIBRATED.buckets
    other = replace(CALIBRATED, buckets=(low, replace(middle, gates=tuple(gates)), high))
    assert differences(CALIBRATED, other) == lines
    assert (other.hash == CALIBRATED.hash) == (not lines)


def test_a_plan_comes_from_whatever_a_caller_has(tmp_path):
    THREE.save(tmp_path / "plan.json")
    for given in (THREE, THREE.to_dict(), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert resolve_plan(given, "cpu") == THREE
    assert resolve_plan(None, "cuda") == Plan.default("cuda")
    with pytest.raises(PlanError, match="plan is a int"):
        resolve_plan(3, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [
    ("tolerance", -0.1), ("tolerance", 1.1), ("tolerance", float("nan")), ("tolerance", "0.1"), ("tolerance", True),
    ("max_density", 0), ("max_density", 1.5), ("sinks", -1), ("sinks", 1.0), ("local", 65), ("singles", 0),
    ("singles", 17), ("singles", True), ("peaks", 0), ("peaks", "1"),
])
def test_a_budget_out_of_range_names_field_and_value(field, value):
    with pytest.raises(PlanError, match=f"budget.{field} is {value!r}"):
        Budget(**{"tolerance": 0.1, field: value})


@pytest.mark.parametrize(("edges", "words"), [
    ([], "plan.buckets is empty"),
    ([(2, None)], r"plan.buckets\[0\].lo is 2 but the bucket before ends at 1: they leave a gap"),
    ([(1, 10), (12, None)], r"buckets\[1\].lo is 12 but .* ends at 10: they leave a gap"),
    ([(1, 10), (8, None)], r"buckets\[1\].lo is 8 but .* ends at 10: they overlap"),
    ([(1, None), (5, None)], r"buckets\[1\] follows a bucket without end"),
    ([(1, 1)], r"buckets\[0\].hi is 1, not above lo = 1"),
    ([(1, 10)], "plan.buckets end at 10"),
])
def test_buckets_that_do_not_touch_are_refused(edges, words):
    with pytest.raises(PlanError, match=words):
        Plan(tuple(Bucket(lo, hi, DENSE) for lo, hi in edges))


def one_bucket(**changes):
    bucket = {"lo": 1, "hi": None, "budget": {"tolerance": None}}
    return {"schema": SCHEMA, "buckets": [{**bucket, **changes}]}


def one_gate(**changes):
    [gate] = CALIBRATED.to_dict()["buckets"][1]["gates"]
    return one_bucket(gates=[{**gate, **changes}])


@pytest.mark.parametrize(("data", "words"), [
    ([], "the plan is a list"),
    ({}, "plan.schema is None"),
    ({"schema": "1"}, "plan.schema is '1'"),
    ({"schema": SCHEMA + 1}, f"plan.schema is {SCHEMA + 1}, newer than the {SCHEMA}"),
    ({"schema": SCHEMA}, "plan.buckets is None"),
    ({"schema": SCHEMA, "buckets": [3]}, r"plan.buckets\[0\] is 3"),
    ({**one_bucket(), "bucket": 1}, "plan has the unknown key 'bucket'"),
    (one_bucket(width=3), r"plan.buckets\[0\] has the unknown key 'width'"),
    (one_bucket(lo=None), r"plan.buckets\[0\].lo is None"),
    (one_bucket(hi=2.5), r"plan.buckets\[0\].hi is 2.5"),
    (one_bucket(budget=None), r"plan.buckets\[0\].budget is None"),
    (one_bucket(budget={}), r"plan.buckets\[0\].budget is {}"),
    (one_bucket(budget={"tolerance": 2}), r"plan.buckets\[0\].budget: budget.tolerance is 2"),
    (one_bucket(budget={"tolerance": None, "tau": 1}), r"budget has the unknown key 'tau'"),
    (one_bucket(sites={"first": {"tolerance": None}}), r"plan.buckets\[0\].sites has the key 'first'"),
    (one_bucket(gates=3), r"plan.buckets\[0\].gates is 3. It must be a list"),
    (one_bucket(gates=[{"length": 512}]), r"plan.buckets\[0\].gates\[0\].documents is None. .* whole number"),
    (one_bucket(bounds=[1]), r"plan.buckets\[0\].bounds is \[1\]. It must be an object"),
    ({**one_bucket(), "graph": [{}]}, r"plan.graph\[0\].causal is None"),
    ({**one_bucket(), "calibration": "yes"}, "plan.calibration is 'yes'. It must be an object"),
    (one_bucket(sites={"0": 0.1}), r"plan.buckets\[0\].sites\[0\] is 0.1"),
    (one_bucket(sites={"²": {"tolerance": None}}), r"plan.buckets\[0\].sites has the key '²'"),
    (one_gate(densities={"0": "abc"}), r"gates\[0\].densities\[0\] is 'abc'. It must be a number"),
    (one_gate(densities={"0": None}), r"gates\[0\].densities\[0\] is None"),
    (one_gate(densities={"٣": 0.5}), r"gates\[0\].densities has the key '٣'"),
    (one_gate(kinds={"code": "x"}), r"gates\[0\].kinds\[code\] is 'x'. It must be a number"),
    (one_gate(rise="x"), r"gates\[0\].rise is 'x' and rise_upper is 0.2. Both must be numbers"),
    (one_gate(rise_upper=None), r"gates\[0\].rise is 0.1 and rise_upper is None"),
    (one_gate(rise=None), r"gates\[0\].rise is None and rise_upper is 0.2"),
])
def test_a_dict_that_is_no_plan_says_where(data, words):
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(data)


@pytest.mark.parametrize("changes", [
    {}, {"rise": None, "rise_upper": None}, {"densities": None, "kinds": {}}, {"densities": {"10": 1}},
], ids=str)
def test_a_gate_is_read_and_printed(changes):
    plan = Plan.from_dict(one_gate(**changes))
    assert "passed, 0.3 (at most 0.33, 8 documents)" in str(plan)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_plan_file_that_cannot_be_read_names_its_path(tmp_path):
    missing, broken, newer = (tmp_path / name for name in ("missing.json", "broken.json", "newer.json"))
    broken.write_text("{")
    newer.write_text(json.dumps({"schema": SCHEMA + 1}))
    for path, words in ((missing, "cannot be read"), (broken, "is not JSON"), (newer, "newer than"),
                        (tmp_path, "cannot be read")):
        with pytest.raises(PlanError, match=words) as caught:
            Plan.load(path)
        assert str(path) in str(caught.value)


def test_a_plan_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "plan.json", tmp_path / "file" / "plan.json", tmp_path / "folder"):
        with pytest.raises(PlanError, match="cannot be written to .* Give the path of a file") as caught:
            THREE.save(path)
        assert repr(str(path)) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}  # and nothing is left beside it


def test_many_may_save_to_one_path(tmp_path):
    def save(number):
        for _ in range(20):
            replace(THREE, name=f"plan {number}").save(tmp_path / "plan.json")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))
    assert Plan.load(tmp_path / "plan.json") == replace(THREE, name=Plan.load(tmp_path / "plan.json").name)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_length_below_one_is_refused():
    with pytest.raises(PlanError, match="length is 0"):
        THREE.bucket_of(0)


def test_a_printed_plan_shows_every_bucket():
    assert str(THREE).splitlines()[1:] == [
        "  [1, 4096): dense", "  [4096, 16384): tolerance 0.02, site 0: dense, site 3: tolerance 0.01",
        "  [16384, inf): tolerance 0.05, max_density 0.5, sinks 2, local 3, singles 4", "  measured on: device cpu",
    ]
