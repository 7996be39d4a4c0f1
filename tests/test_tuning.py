"""Tuning: what is measured once decides from then on, and never harms a call. No test looks at a real clock."""

import json
import multiprocessing
import time
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from sparsify import ops, timings, tuning
from sparsify.cli import app
from sparsify.kernels import oracle
from sparsify.kernels.masks import Masks
from sparsify.ops import crossover, exact, stopwatch
from sparsify.plan import CROSSOVER, Plan
from sparsify.timings import ShapeClass, Table, Time, Times, expected_density, lower_end
from tests.numerics import assert_as_good_as_torch
from tests.ops.cases import EXTRAS, MASKS, Case, plain_attention
from tests.small_model import save_small_model

SHAPE = ShapeClass("float32", 1, 4, 2, 16, 16, 1024, 1024, 0b111, 0)
HERE = {"type": "cpu", "device": "a test"}
NO_MASKS = (None, None, None, None, None, None, 0.0, None)
CAUSAL = (0, *NO_MASKS[1:])
BUDGET = (0.9, 1, 1, 6, 0, ops.VERSION)


def times(shape=SHAPE, dense=1.0, selection=0.1, attention=None, singles=6, **exact_seconds):
    """A record whose kernels take these milliseconds."""
    kernels = {name: Time(1e-3 * ms, 0.0) for name, ms in (exact_seconds or {"sdpa": dense}).items()}
    points = {0.1: 0.1, 0.5: 0.5} if attention is None else attention
    return Times(shape, kernels, singles, Time(1e-3 * selection, 0.0),
                 {density: Time(1e-3 * ms, 0.0) for density, ms in points.items()})


def qkv(length=1024, batch=1, dtype=torch.float32, device="cpu", kv_len=None, heads=4):
    return [torch.randn(batch, n, h, 16, dtype=dtype, device=device).transpose(1, 2)
            for n, h in ((length, heads), (kv_len or length, heads // 2), (kv_len or length, heads // 2))]


def adaptive(tensors, tolerance=0.2, masks=CAUSAL):
    return ops.adaptive_attention(*tensors, 0.25, *masks, tolerance, *BUDGET)


@pytest.fixture(autouse=True)
def _a_plain_processor(monkeypatch):
    """What is usual on a CPU depends on its products."""
    monkeypatch.setattr(exact.native, "uses_matrix_registers", lambda: False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, switched on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSIFY_TUNE", raising=False)
    crossover.forget()
    yield timings.path()
    crossover.forget()


@pytest.fixture
def table(cache):
    return crossover.table_of(torch.device("cpu"))


@pytest.fixture
def measured(monkeypatch):
    """Calls on a CPU measure too, by a stand-in: the classes that it was asked for."""
    asked = []

    def measure(q, k, v, scale, masks, shape, singles=None):
        assert type(q) is torch.Tensor and not torch.compiler.is_compiling()
        asked.append((shape, singles))
        return times(shape, singles=singles) if singles else Times(shape, {"sdpa": Time(2e-3, 0.0),
                                                                           "lists": Time(1e-3, 0.0)})

    monkeypatch.setattr(crossover, "MEASURED_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(crossover, "measure", measure)
    return asked


# What follows from times.


def test_ranges_have_two_ends_a_doubling():
    ends = sorted({lower_end(n) for n in range(1, 5000)})
    assert ends == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
                    4096]
    assert all(lower_end(n) <= n < 2 * lower_end(n) for n in range(1, 5000))
    assert [timings._rank(end) for end in ends] == [0, *range(2, 2 + len(ends) - 1)]


@pytest.mark.parametrize(("seconds", "kernel"), [
    ({"sdpa": (1.0, 0), "lists": (0.9, 0)}, "lists"),
    ({"sdpa": (1.0, 0), "lists": (0.98, 0)}, "sdpa"),  # noise
    ({"sdpa": (1.0, 0), "lists": (0.5, 0.8)}, "sdpa"),  # the host would leave the device idle
    ({"sdpa": (1.0, 0), "lists": (0.5, 0.4), "cudnn": (0.7, 0.1)}, "lists"),
    ({"sdpa": (1.0, 5.0), "cudnn": (0.99, 0.1)}, "sdpa"),  # what runs anyway may have a slow launch
    ({"lists": (1.0, 0), "sdpa": (3.0, 0)}, "lists"),
    ({"lists": (1.0, 0)}, "lists"),
])
def test_the_fastest_exact_kernel_must_be_faster_by_more_than_noise(seconds, kernel):
    assert Times(SHAPE, {name: Time(*pair) for name, pair in seconds.items()}).kernel == kernel


@pytest.mark.parametrize(("given", "density"), [
    (times(dense=1 / 0.97, selection=0.6), 0.4),  # 0.6 + density = 1
    (times(dense=1 / 0.97, selection=0.95), 0.0),  # forced blocks alone take longer
    (times(dense=1 / 0.97, selection=1.2), 0.0),
    (times(dense=1 / 0.97, selection=0.1), 0.5),  # nothing is known beyond
    (times(sdpa=2 / 0.97, lists=2.0, selection=0.5), 0.5 + 0.5 * 0.94 / 1.5),  # on the line from (0.5, 0.5) to (1, 2)
    (times(sdpa=9.0, lists=8.0, selection=7.0), 0.5 + 0.5 * (0.97 * 8 - 7.5) / 7.5),  # of the fastest, not the usual
    (times(sdpa=9.0, lists=9.5, selection=0.1, attention={0.5: 1.0, 0.9: 1.0}), 0.9 + 0.1 * 7.63 / 8.5),
])
def test_break_even_is_where_selection_and_attention_take_as_long_as_dense(given, density):
    assert given.break_even == pytest.approx(density, abs=1e-3)


@pytest.mark.parametrize(("length", "dtype", "registers", "name"), [
    (1024, torch.float32, True, "lists"), (1023, torch.float32, True, "sdpa"), (1024, torch.float32, False, "sdpa"),
    (2048, torch.bfloat16, True, "sdpa"),
])
def test_long_dense_attention_on_a_cpu_is_ours_if_faster(length, dtype, registers, name, monkeypatch):
    monkeypatch.setattr(exact.native, "uses_matrix_registers", lambda: registers)
    q = torch.empty(1, 2, length, 16, dtype=dtype)
    assert exact.usual_kernel(q, q, q, Masks(0)) == name


@pytest.mark.parametrize(("length", "dtype", "pays"), [
    (4096, torch.float32, True), (4096, torch.float16, True), (8192, torch.bfloat16, False),
    (16384, torch.bfloat16, True),
])
def test_sparse_bfloat16_pays_late_on_a_cpu(length, dtype, pays, monkeypatch):
    monkeypatch.setenv("SPARSIFY_TUNE", "0")
    q = torch.empty(1, 2, length, 16, dtype=dtype)
    assert crossover.selection_pays(q, q, q, 0.25, Masks(0), 0.03, 6) == pays


@pytest.mark.parametrize(("device", "dtype", "keys", "heads", "batch", "pays"), [
    ("cpu", torch.float32, 1024, 1, 1, True),
    ("cpu", torch.float32, 1023, 32, 4, False),
    ("cpu", torch.float16, 4096, 32, 1, False),  # computed in float32, and SDPA is not
    ("cuda", torch.bfloat16, 4096, 32, 1, True),
    ("cuda", torch.bfloat16, 1024, 32, 1, False),  # over before the op is launched
    ("cuda", torch.bfloat16, 4096, 4, 1, False),
    ("cuda", torch.bfloat16, 4096, 4, 4, True),
    ("mps", torch.float32, 4096, 32, 4, False),
])
def test_the_exact_op_stands_in_for_sdpa_where_it_may_gain(device, dtype, keys, heads, batch, pays):
    assert crossover.op_may_beat_sdpa(device, dtype, keys, heads, 256, batch) == pays


@pytest.mark.parametrize(("peaks", "pays"), [(0.0, False), (0.2 * 1024 * 0.03, True), (0.9 * 1024 * 0.03, False)])
def test_a_calibrated_density_decides_in_place_of_the_guess(peaks, pays, table):
    table.add(times())  # breaks even near 0.8; the guess is a density of 1
    assert 0.3 < table.break_evens[SHAPE, 6] < 0.9
    tensors = qkv()
    assert crossover.selection_pays(*tensors, 0.25, Masks(0), 0.03, 6, peaks) == pays
    with ops.counting() as counters:
        ops.adaptive_attention(*tensors, 0.25, *CAUSAL, 0.03, *BUDGET, peaks=peaks)
    assert (counters.blocks(0) == (1, 1)) != pays  # (1, 1): it ran exact


def test_times_for_a_call_are_measured_where_they_are_not_known(table, monkeypatch):
    asked = []

    def measure(q, k, v, scale, masks, shape, singles, seconds):
        asked.append((shape.kv_len, singles))
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return times(shape, singles=singles)

    monkeypatch.setattr(crossover, "measure", measure)
    tensors = qkv()
    for singles in (6, 6, 2):
        assert crossover.times_for(*tensors, 0.25, Masks(0), singles).singles == singles
    assert asked == [(1024, 6), (1024, 2)]
    assert Table(timings.path(), table.fingerprint).times.keys() == table.times.keys()  # kept for the ops to find
    assert crossover.times_for(*tensors, 0.25, Masks(0), 12) is None  # the third: it could not be measured
    monkeypatch.setenv("SPARSIFY_TUNE", "read")
    assert crossover.times_for(*qkv(768), 0.25, Masks(0), 6).shape.kv_len == 1024  # the nearest
    assert crossover.times_for(*tensors, 0.25, Masks(0), 3) is None
    assert crossover.times_for(*qkv(100), 0.25, Masks(0), 6) is None
    assert len(asked) == 3


def test_sparse_never_pays_where_its_launches_take_longer_than_dense():
    given = times(dense=1.0, selection=0.1)
    slow = Times(given.shape, given.exact, 6, Time(1e-4, 5e-4), {d: Time(t.device, 3e-4) for d, t in
                                                                 given.attention.items()})
    assert slow.break_even == 0.0
    assert slow.break_even_in_graph == given.break_even > 0.0  # a CUDA graph launches them itself
    assert Times(SHAPE, {"sdpa": Time(1.0, 0.0)}).break_even is None


def test_expected_density_falls_with_length_and_tolerance_to_a_floor():
    assert expected_density(1024, 0.03) == 1.0
    assert expected_density(8192, 0.03) == pytest.approx(timings.PEAKS / 8192 / 0.03)
    assert expected_density(8192, 0.0) == expected_density(1, 0.5) == 1.0
    assert expected_density(2**20, 0.03) == timings.LEAST_DENSITY
    assert expected_density(8192, 0.03, 20.0) == pytest.approx(20 / 8192 / 0.03)  # calibrated: no floor
    assert expected_density(100, 0.03, 20.0) == expected_density(8192, 0.0, 20.0) == 1.0


# The file.


def test_what_is_added_is_read_back(tmp_path):
    path = tmp_path / "deep" / "tuning.jsonl"
    first, second = Table(path, HERE), times(SHAPE._replace(kv_len=2048, window=96, masks=0b1000001))
    first.add(times())
    first.add(second)
    first.add(Times(SHAPE._replace(heads=8), {"sdpa": Time(1e-3, 2e-5)}))
    again = Table(path, HERE)
    assert again.times.keys() == first.times.keys()
    assert again.kernels == first.kernels and again.break_evens == pytest.approx(first.break_evens)
    assert again.times[second.shape, 6].to_dict() == second.to_dict()
    assert (SHAPE._replace(heads=8), 0) not in again.break_evens


def test_the_last_record_of_a_class_counts(tmp_path):
    table = Table(tmp_path / "t", HERE)
    table.add(times(sdpa=1.0, lists=0.5))
    table.add(times(sdpa=1.0, lists=2.0))
    assert Table(tmp_path / "t", HERE).kernels == table.kernels == {SHAPE: "sdpa"}


@pytest.mark.parametrize("change", [{"device": "another"}, {"type": "cuda"}, {"torch": "9"}], ids=str)
def test_another_fingerprint_is_another_table(change, tmp_path):
    Table(tmp_path / "t", HERE).add(times())
    assert not Table(tmp_path / "t", HERE | change).times
    assert Table(tmp_path / "t", HERE).times


def test_a_broken_file_costs_no_more_than_what_is_broken(tmp_path):
    path = tmp_path / "t"
    good = json.dumps({"fingerprint": HERE, **times().to_dict()})
    shape = times().to_dict()["shape"]
    bad = [b"\xff\x00\xfe", b"{", b"[]", b"null", b"3", b'{"fingerprint": 3}', good[:-20].encode(),
           *(json.dumps({"fingerprint": HERE, **times().to_dict(), **change}).encode() for change in (
               {"exact": {}}, {"exact": {"sdpa": [0, 0]}}, {"exact": {"sdpa": [1]}}, {"exact": 3},
               {"shape": {**shape, "masks": ["no such mask"]}}, {"shape": {**shape, "more": 1}},
               {"shape": {**shape, "heads": "4"}}, {"attention": [[1]]}, {"selection": [float("nan"), 0]}))]
    path.write_bytes(b"\n".join([*bad, good.encode(), good[:40].encode()]))  # the last writer was killed
    table = Table(path, HERE)
    assert list(table.times) == [(SHAPE, 6)]
    table.add(times(SHAPE._replace(heads=8)))
    assert len(Table(path, HERE).times) == 2


def test_a_file_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "t", HERE)
    table.add(times())
    assert table.kernels[SHAPE] == "sdpa"
    (tmp_path / "folder").mkdir()
    Table(tmp_path / "folder", HERE).add(times())


def _write(path, writer):
    table = Table(path, HERE)
    for i in range(40):
        table.add(times(SHAPE._replace(heads=1000 * writer + i + 1)))


def test_parallel_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path / "t", i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {shape.heads for shape, _ in Table(tmp_path / "t", HERE).times} == {
        1000 * writer + i + 1 for writer in range(4) for i in range(40)}


def test_neighbours_stand_in_within_a_factor_of_two(tmp_path):
    table = Table(tmp_path / "t", HERE)
    table.add(times(SHAPE._replace(q_len=4096, kv_len=4096)))
    table.add(times(SHAPE._replace(q_len=16384, kv_len=16384)))

    def near(length, **change):
        found = table.near(SHAPE._replace(q_len=length, kv_len=length, **change), 6)
        return found and found.shape.kv_len

    assert [near(n) for n in (1536, 2048, 6144, 8192, 12288, 32768)] == [None, 4096, 4096, 4096, 16384, 16384]
    assert near(4096, batch=2) == 4096
    assert near(4096, batch=4) is None
    assert near(4096, heads=8) is near(4096, masks=0) is near(4096, dtype="float16") is None
    assert table.near(SHAPE._replace(q_len=4096, kv_len=4096), 2) is None
    table.add(times(SHAPE._replace(q_len=1024, kv_len=1024)))
    assert near(1536) == 1024


# The stopwatch.


class FakeClock:
    """Every call takes what it returns; a drift makes all slower as time goes by."""

    def __init__(self, drift=0.0):
        self.total, self.drift = 0.0, drift
        self.log = []

    def now(self):
        return self.total

    def time(self, call):
        name, seconds = call()
        self.log.append(name)
        seconds *= 1 + self.drift * self.total
        self.total += seconds
        return Time(seconds, seconds / 10)


def test_rounds_are_interleaved_and_medians_taken():
    seconds = iter([0, 3, 1, 9, 2, 2])  # the first is the warm-up
    clock = FakeClock()
    calls = {"a": lambda: ("a", next(seconds)), "b": lambda: ("b", 4)}
    assert stopwatch.time_in_turns(calls, clock, 1e9) == {"a": Time(2, 0.2), "b": Time(4, 0.4)}
    assert clock.log == ["a", "b", "b", "a"] * 2 + ["a", "b"]


def test_a_drifting_clock_hits_everybody_alike():
    times = stopwatch.time_in_turns({"a": lambda: ("a", 1.0), "b": lambda: ("b", 1.0)}, FakeClock(0.1), 1e9)
    assert times["a"].device == pytest.approx(times["b"].device, rel=0.1)


def test_a_rival_far_behind_is_timed_once_and_others_always():
    clock = FakeClock()
    calls = {name: partial(lambda n, s: (n, s), name, seconds) for name, seconds in
             (("sdpa", 10), ("lists", 14), ("flash", 20), ("selection", 90))}
    times = stopwatch.time_in_turns(calls, clock, 1e9, rivals=("sdpa", "lists", "flash"))
    assert [clock.log.count(name) for name in calls] == [5, 5, 1, 5]
    assert times["flash"].device == 20


def test_time_is_limited_but_everybody_has_a_turn():
    clock = FakeClock()
    assert len(stopwatch.time_in_turns({"a": lambda: ("a", 9), "b": lambda: ("b", 9)}, clock, 5)) == 2
    assert clock.log == ["a", "b"]


def test_a_call_that_cannot_run_is_left_out():
    def broken():
        raise torch.OutOfMemoryError("no memory")

    assert list(stopwatch.time_in_turns({"a": broken, "b": lambda: ("b", 1)}, FakeClock(), 1e9)) == ["b"]


# Classes and measuring.


def test_no_new_length_and_no_new_batch_makes_a_class_without_need():
    def of(masks=None, **sizes):
        return crossover.class_of(*qkv(**sizes), masks or Masks(0))

    assert of() == SHAPE
    assert {of(length=n) for n in (1024, 1025, 1300, 1535)} == {SHAPE}
    assert of(length=1536) != SHAPE
    assert of(batch=3) == of(batch=2) != of(batch=4)
    assert of(dtype=torch.bfloat16) != SHAPE
    assert of(batch=0) is of(length=127, kv_len=4096) is of(length=500) is of(dtype=torch.float64) is None
    assert of(Masks(5000)) == of(Masks()) != SHAPE  # all see all
    key_mask, bias = torch.ones(1, 1024, dtype=torch.bool), torch.zeros(1, 1, 1, 1024)
    distinct = [Masks(0), Masks(), Masks(7), Masks(0, 100), Masks(0, 200), Masks(0, key_mask=key_mask),
                Masks(softcap=3.0), Masks(0, attn_mask=bias), Masks(0, attn_mask=bias > 0),
                Masks(sink_logits=torch.zeros(4)),
                Masks(0, query_documents=key_mask.int(), key_documents=key_mask.int())]
    assert len({of(masks) for masks in distinct}) == len(distinct)
    assert of(Masks(0, 100)) == of(Masks(0, 127))
    assert of(Masks(3072), kv_len=4096) != of(Masks(0), kv_len=4096)
    huge = torch.empty(1, 4, 2**20, 16, device="meta")
    assert crossover.class_of(huge, huge, huge, Masks(0)).kv_len == timings.LONGEST


@pytest.mark.parametrize("shape", [*MASKS, *EXTRAS], ids=str)
def test_a_class_is_measured_at_its_lower_end_whatever_the_masks(shape, rng, device, monkeypatch):
    monkeypatch.setattr(crossover, "SHORTEST", 1)
    monkeypatch.setattr(crossover, "QUERY_BLOCK", 1)
    case = Case.random(rng, device, *shape)
    found = crossover.class_of(*case.qkv, case.masks)
    q, k, v, masks = crossover._part(*case.qkv, case.masks, found)
    assert (q.shape[2], k.shape[2], v.shape[2]) == (lower_end(shape[0]), lower_end(shape[1]), lower_end(shape[1]))
    part = Case(q, k, v, masks)
    out = ops.exact_attention(*part.qkv, *part.arguments, ops.VERSION)  # its checks find what does not fit together
    assert out.shape == q.shape[:3] + v.shape[3:]
    assert crossover.class_of(q, k, v, masks) == found


def test_large_layers_are_measured_in_part(monkeypatch):
    monkeypatch.setattr(crossover, "LARGEST_SECONDS", 0.0)
    tensors = qkv(batch=3)
    masks = Masks(0, attn_mask=torch.zeros(3, 4, 1, 1024), sink_logits=torch.zeros(4))
    q, k, v, part = crossover._part(*tensors, masks, crossover.class_of(*tensors, masks))
    assert q.shape[:2] == (1, 2) and k.shape[:2] == v.shape[:2] == (1, 1)
    assert part.attn_mask.shape == (1, 2, 1, 1024) and part.sink_logits.shape == (2,)


class CountingClock:
    """Runs calls for real; the n-th takes n microseconds."""

    def __init__(self):
        self.count = 0

    def now(self):
        return 0.0

    def time(self, call):
        call()
        self.count += 1
        return Time(1e-6 * self.count, 0.0)


def test_measuring_times_every_kernel_and_selection_and_two_densities(device):
    tensors, random = qkv(device=device), torch.random.get_rng_state()
    shape = crossover.class_of(*tensors, Masks(0))
    found = crossover.measure(*tensors, 0.25, Masks(0), shape, 6, CountingClock())
    assert set(found.exact) >= {"sdpa", "lists"}
    assert found.singles == 6 and found.selection is not None
    low, high = found.attention
    assert 0.125 <= low < high <= 1
    assert torch.equal(random, torch.random.get_rng_state())
    exact_only = crossover.measure(*tensors, 0.25, Masks(0), shape, None, CountingClock())
    assert exact_only.selection is None and exact_only.singles == 0


@pytest.mark.parametrize("shape", [*MASKS, *EXTRAS], ids=str)
def test_all_exact_kernels_agree(shape, rng, device):
    case = Case.random(rng, device, *shape)
    truth, _ = oracle.attention(*case.double().qkv, **case.named)
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        one = case.to(dtype)
        names = exact.kernels_of(*one.qkv, one.masks)
        assert names[0] == exact.usual_kernel(*one.qkv, one.masks)
        for name in (*names, "composite"):
            out = exact.run(name, *one.qkv, one.scale, one.masks)
            if dtype == torch.float32:
                assert_as_good_as_torch(out, plain_attention(one), truth, one.units)
            assert out.transpose(1, 2).is_contiguous() and out.dtype == dtype


# Look-ups in calls.


def test_the_table_decides_for_every_length_of_the_class(table):
    for length in (1024, 1400):
        tensors = qkv(length)
        shape = crossover.class_of(*tensors, Masks(0))
        assert crossover.exact_kernel(*tensors, 0.25, Masks(0)) == "sdpa"
        table.add(times(shape, sdpa=1.0, lists=0.5))
        assert crossover.exact_kernel(*tensors, 0.25, Masks(0)) == "lists"
        table.times.clear(), table.kernels.clear()


def runs_sparse(tensors, **arguments):
    with ops.counting() as counters:
        adaptive(tensors, **arguments)
    return counters.density(0) != 1.0


def test_a_class_that_does_not_pay_runs_exact(table):
    tensors = qkv(3000)
    assert runs_sparse(tensors)  # on a CPU constants say yes
    shape = crossover.class_of(*tensors, Masks(0))
    table.add(times(shape, dense=1.0, selection=0.95))
    assert not runs_sparse(tensors)
    table.add(times(shape, sdpa=1.0, lists=1.0, selection=0.4))  # pays up to 0.53
    assert runs_sparse(tensors)
    assert not runs_sparse(tensors, tolerance=0.05)  # 0.6 is to be expected
    table.add(times(shape, dense=1.0, selection=0.95))
    expected = ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION)
    assert torch.equal(adaptive(tensors), expected)


def test_a_table_of_other_singles_says_nothing(table):
    tensors = qkv(3000)
    table.add(times(crossover.class_of(*tensors, Masks(0)), dense=1.0, selection=0.95, singles=2))
    assert runs_sparse(tensors)


def test_a_class_is_measured_once(measured, cache):
    for length in (1024, 1100, 1500):
        ops.exact_attention(*qkv(length), 0.25, *CAUSAL, ops.VERSION)
    assert measured == [(SHAPE, None)]
    for length in (1024, 1100, 1500):
        adaptive(qkv(length))
    assert measured == [(SHAPE, None), (SHAPE, 6)]
    crossover.forget()  # another process
    ops.exact_attention(*qkv(1200), 0.25, *CAUSAL, ops.VERSION)
    adaptive(qkv(1200))
    assert len(measured) == 2
    assert len(cache.read_text().split()) > 2
    ops.exact_attention(*qkv(1536), 0.25, *CAUSAL, ops.VERSION)
    assert len(measured) == 3


def test_a_failure_is_the_tables_own_business(measured, monkeypatch):
    def fail(error, *arguments):
        measured.append(arguments)
        raise error

    tensors = qkv()
    for i, error in enumerate((torch.OutOfMemoryError("no memory"), AssertionError("a bug")), 1):
        monkeypatch.setattr(crossover, "measure", partial(fail, error))
        crossover.forget()
        for _ in range(3):
            ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION)
        assert len(measured) == i
    assert crossover._measuring.acquire(blocking=False)
    crossover._measuring.release()


def test_while_one_thread_measures_others_go_on(measured):
    with crossover._measuring:
        ops.exact_attention(*qkv(), 0.25, *CAUSAL, ops.VERSION)
        assert not measured
    ops.exact_attention(*qkv(), 0.25, *CAUSAL, ops.VERSION)
    assert len(measured) == 1


def test_a_kernel_that_fails_a_call_gives_way_to_the_usual_one(table, monkeypatch):
    tensors = qkv()
    expected = ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION)
    table.add(times(SHAPE, sdpa=1.0, lists=0.5))

    def run(name, *arguments):
        if name == "lists":
            raise RuntimeError("no plan for this length")
        return run_it(name, *arguments)

    run_it = exact.run
    monkeypatch.setattr(exact, "run", run)
    assert torch.equal(ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION), expected)


@pytest.mark.parametrize("wish", ["0", "read", "deterministic"])
def test_measuring_can_be_forbidden(wish, measured, cache, monkeypatch):
    tensors = qkv()
    crossover.table_of(torch.device("cpu")).add(times(SHAPE, sdpa=1.0, lists=0.5))
    crossover.forget()
    if wish == "deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        monkeypatch.setenv("SPARSIFY_TUNE", wish)
    try:
        assert crossover.exact_kernel(*tensors, 0.25, Masks(0)) == ("lists" if wish == "read" else "sdpa")
        ops.exact_attention(*qkv(8192, heads=2), 0.25, *CAUSAL, ops.VERSION)
        assert crossover.selection_pays(*tensors, 0.25, Masks(0), 0.05, 6) == (wish != "read")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured


def test_a_cpu_measures_nothing_by_itself(cache):
    ops.exact_attention(*qkv(), 0.25, *CAUSAL, ops.VERSION)
    adaptive(qkv())
    assert not cache.exists()


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def exact_module():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.exact_attention(q, k, v, 0.25, *CAUSAL, ops.VERSION)

    return Module()


@pytest.mark.parametrize("how", ["fake", "make_fx", "export", "mode"])
def test_nothing_is_measured_while_somebody_watches(how, measured):
    tensors = qkv()
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            exact_module()(*(fakes.from_tensor(x) for x in tensors))
    elif how == "make_fx":
        make_fx(exact_module(), tracing_mode="symbolic")(*tensors)
    elif how == "export":
        torch.export.export(exact_module(), tuple(tensors))
    else:
        with Recorder():
            exact_module()(*tensors)
    assert not measured


def test_compiling_measures_nothing_and_the_compiled_graph_does(measured):
    counts = []

    def backend(graph, inputs):
        counts.append(len(measured))
        return graph

    with torch.no_grad():
        torch.compile(exact_module(), backend=backend, fullgraph=True)(*qkv())
    assert counts == [0]
    assert measured == [(SHAPE, None)]


# The default plan.


@pytest.mark.parametrize(("lengths", "edge"), [
    ({1024: 0.2, 2048: 0.8, 3072: 0.98, 4096: 0.9}, 3072),
    ({2048: 1.0, 3072: 0.1, 4096: 0.9}, 4096),  # a gain must hold from there on
    ({3072: 0.99, 16384: 0.0}, 4096),
    ({8192: 0.9}, 4096),  # never later: other layers were not measured
    ({512: 1.0}, 1024),
    ({}, 4096),
])
def test_the_default_plan_begins_where_tuned_layers_gain(lengths, edge, table):
    for length, break_even in lengths.items():
        shape = SHAPE._replace(q_len=length, kv_len=length)
        line = {0.0001: 0.0001, 1.0: 1.0}
        table.add(times(shape, dense=10.0, selection=9.7 - break_even, attention=line))
        other = {"masks": 0b1001} if length > 1024 else {"window": 64}
        table.add(times(shape._replace(**other), dense=10.0, selection=0.0001, attention=line))
    if lengths:
        assert table.break_evens[shape, 6] == pytest.approx(break_even, abs=1e-3)
    assert Plan.default("cpu").buckets[0].hi == edge
    assert Plan.default("cuda").buckets[0].hi == CROSSOVER["cuda"]  # another device


def test_a_switched_off_table_moves_no_plan(table, monkeypatch):
    table.add(times(SHAPE, dense=10.0, selection=0.1, attention={0.1: 0.1, 1.0: 1.0}))
    assert Plan.default("cpu").buckets[0].hi == 1024
    monkeypatch.setenv("SPARSIFY_TUNE", "0")
    assert Plan.default("cpu").buckets[0].hi == CROSSOVER["cpu"]


# On the command line.


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


@pytest.fixture
def quick(monkeypatch):
    """One round, at once."""
    monkeypatch.setattr(crossover, "clock_of", lambda device: CountingClock())


def test_tune_prints_and_keeps_what_the_ops_read(quick, cache):
    result = run("--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--lengths", "1024,512,512", "--device", "cpu")
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    assert head.split()[0] == "length" and [row.split()[0] for row in rows] == ["512", "1024"]
    assert f"stored in {cache}" in result.stderr.replace("\n", "") and "not stored" not in result.stderr
    crossover.forget()
    assert SHAPE in crossover.table_of(torch.device("cpu")).kernels


def test_tune_reads_a_model(quick, tmp_path):
    save_small_model(tmp_path / "model")
    result = run(tmp_path / "model", "--lengths", 512, "--device", "cpu", "--json", "--full", "--batch", 3)
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout)["rows"]
    assert row["shape"]["masks"] == [] and row["shape"]["batch"] == 2
    assert row["shape"]["heads"] % row["shape"]["kv_heads"] == 0
    assert row["sparse"] == (row["break_even"] >= row["expected_density"])


def test_tune_says_what_could_not_be_stored(quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    crossover.forget()
    arguments = ("--heads", 4, "--head-dim", 16, "--lengths", 512, "--device", "cpu")
    printed, data = run(*arguments), run(*arguments, "--json")
    assert printed.stdout.splitlines()[1].split()[0] == "512"  # what was measured is shown all the same
    assert "stored in" not in printed.stderr
    assert f"not stored: {timings.path()} cannot be written" in printed.stderr
    assert json.loads(data.stdout)["stored"] is None and json.loads(data.stdout)["rows"][0]["exact"]


def test_tune_says_what_did_not_fit(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words.")

    monkeypatch.setattr(crossover, "measure_layer", fail)
    result = run("--heads", 4, "--lengths", 512, "--device", "cpu")
    assert result.exit_code == 0
    assert "not measured: CUDA out of memory." in result.stdout and "More words" not in result.stdout
    assert "stored" not in result.stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lengths", "512,many"], "lengths is '512,many'"),
    (["--lengths", "100"], "lengths is [100]"),
    (["--batch", "0"], "batch is 0"),
    (["--kv-heads", "4"], "kv_heads is 4 and heads is not given"),
    (["--head-dim", "64"], "head_dim is 64 and heads is not given"),
    (["--head-dim", "64", "./no-such-model"], "head_dim is 64 and heads is not given"),
    (["--heads", "0"], "heads is 0"),
    (["--heads", "4", "--kv-heads", "3"], "heads is 4 and kv_heads is 3"),
    (["--heads", "4", "somewhere"], "model is 'somewhere' and heads is 4"),
    (["./no-such-model"], "model './no-such-model' does not exist"),
    (["--singles", "0"], "budget.singles is 0"),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words):
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_tune_refuses_to_measure_for_nobody(monkeypatch):
    monkeypatch.setenv("SPARSIFY_TUNE", "0")
    crossover.forget()
    result = run("--heads", 4, "--device", "cpu")
    assert result.exit_code == 2 and "SPARSIFY_TUNE is 0" in result.stderr


def test_layers_of_models_are_read_from_their_configuration():
    class Config:
        num_attention_heads, hidden_size = 8, 512

        def get_text_config(self):
            return self

    class Latent(Config):
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 128, 64, 128

    assert tuning.Layer.of_config(Config()) == tuning.Layer(8, 8, 64, 64)
    assert tuning.Layer.of_config(Latent()) == tuning.Layer(8, 8, 192, 128)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_a_gpu_measures_at_the_first_call_in_less_than_a_second(causal, cache):
    masks = CAUSAL if causal else NO_MASKS
    tensors = [torch.randn(1, 2500, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
               for heads in (32, 8, 8)]
    adaptive(tensors, masks=masks)  # compiles
    for length in (2048, 1600):
        shorter = [x[:, :, :length] for x in tensors]
        random = torch.cuda.get_rng_state()
        torch.cuda.synchronize()
        start = time.perf_counter()
        adaptive(shorter, masks=masks)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        assert first < 1.0
        assert torch.equal(random, torch.cuda.get_rng_state())
    table = crossover.table_of(torch.device("cuda"))
    for (shape, singles), found in table.times.items():
        print(shape, singles, found.kernel, found.break_even, {n: 1e3 * t.device for n, t in found.exact.items()})
    assert {shape.kv_len for shape, singles in table.times if singles == 6} == {1536, 2048}
    assert cache.exists()


@pytest.mark.gpu
def test_measured_and_usual_kernels_agree(rng, device):
    case = Case.random(rng, device, 1100, 1100, 0, None, head_dims=(128, 128)).to(torch.bfloat16)
    truth, _ = oracle.attention(*case.double().qkv, **case.named)
    names = exact.kernels_of(*case.qkv, case.masks)
    assert {"sdpa", "flash", "lists"} <= set(names)
    for name in names:
        out = exact.run(name, *case.qkv, case.scale, case.masks)
        assert_as_good_as_torch(out, plain_attention(case), truth, case.units)


@pytest.mark.gpu
def test_backends_that_torch_is_told_to_leave_are_left(rng, device):
    case = Case.random(rng, device, 1100, 1100, 0, None, head_dims=(128, 128)).to(torch.bfloat16)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "flash" not in exact.kernels_of(*case.qkv, case.masks)
        assert not exact.can_run("flash", *case.qkv, case.masks)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_measured_while_a_graph_is_captured(known, monkeypatch):
    tensors = qkv(4096, dtype=torch.bfloat16, device="cuda")
    tensors = [x.repeat(1, 1, 1, 4) for x in tensors]
    monkeypatch.setenv("SPARSIFY_TUNE", "read")
    ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION)
    adaptive(tensors)  # compiles
    monkeypatch.delenv("SPARSIFY_TUNE")
    crossover.forget()
    if known:
        ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION)
        adaptive(tensors)
    before = len(crossover.table_of(tensors[0].device).times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION), adaptive(tensors)
    graph.replay()
    torch.cuda.synchronize()
    assert len(crossover.table_of(tensors[0].device).times) == before
    torch.testing.assert_close(out[0], ops.exact_attention(*tensors, 0.25, *CAUSAL, ops.VERSION))
    assert out[1].isfinite().all()
