"""The harness that times rivals: same pairs for everybody, honest errors, and a reason for whoever is missing."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.rivals import __main__ as command
from benchmarks.rivals import activations, kernels, methods, sources
from benchmarks.rivals.kernels import BLOCK, Case, Kernel, Shape
from benchmarks.rivals.methods import Activations, Method

SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu")


def visible(case):
    """Kept and visible pairs, written out: bool [heads, length, length]."""
    pairs = case.kept.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return pairs.tril() if case.causal else pairs


def masked(case, _):
    """A rival that works: dense attention under a mask tensor."""
    q, k, v = case.qkv
    mask = visible(case)[None]
    return lambda: scaled_dot_product_attention(q, k, v, mask, scale=case.scale, enable_gqa=True)


def broken(case, _):
    raise ValueError("needs a toolkit\nthat is not here")


def unmasked(case, _):
    return lambda: scaled_dot_product_attention(*case.qkv, scale=case.scale, enable_gqa=True)


@pytest.fixture
def inputs():
    q, k, v = (torch.randn(1, 700, heads, 16).bfloat16().transpose(1, 2) for heads in (4, 2, 2))
    return Activations("random", q, k, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_rows_keep_equally_many_blocks_and_all_pairs_are_counted(causal, density):
    case = Case(5 * BLOCK, density, causal, SHAPE)
    row = torch.arange(case.blocks)
    expected = (row + 1).clamp(max=case.count) if causal else torch.full_like(row, case.count)
    assert (case.kept.sum(-1) == expected).all()
    assert int(visible(case)[0].sum()) == case.kept_pairs
    if causal:
        assert case.kept[:, row, row].all() and (case.count == 1 or case.kept[:, :, 0].all())
    if density == 1.0:
        assert case.kept_share == 1.0


@pytest.mark.parametrize("rows, keys", [(1, 2), (2, 2)])
def test_smaller_blocks_hold_the_same_pairs(rows, keys):
    case = Case(4 * BLOCK, 0.5, True, SHAPE)
    ids, counts = kernels.indices(kernels.split(case.kept, rows, keys))
    rebuilt = torch.zeros(4, 4 * BLOCK, 4 * BLOCK, dtype=torch.bool)
    tall, wide = BLOCK // rows, BLOCK // keys
    for head in range(4):
        for row in range(ids.shape[2]):
            for key in ids[0, head, row, : counts[0, head, row]].tolist():
                rebuilt[head, row * tall: (row + 1) * tall, key * wide: (key + 1) * wide] = True
    assert torch.equal(rebuilt, case.kept.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_a_rival_on_the_same_lists_has_the_same_error_and_a_broken_one_a_reason(causal, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "KERNELS", {
        "ours": kernels.KERNELS["ours"], "fake": Kernel(masked, None, ("causal", "full"), "written out"),
        "broken": Kernel(broken, None, ("causal", "full"), ""), "FA4": kernels.KERNELS["FA4"],
        "wrong": Kernel(unmasked, None, ("causal", "full"), ""),
        "one-sided": Kernel(masked, None, ("full" if causal else "causal",), "")})
    results = command.Results({"device": "cpu"})
    case = Case(4 * BLOCK, 0.4, causal, SHAPE)
    command.run_kernels(case, command.Options(None, "cpu", rounds=1, budget_ms=1), results, list(command.KERNELS))
    assert [row["kernel"] for row in results.kernels] == ["ours", "fake"]
    assert all(row["relative_error"] < 1e-5 for row in results.kernels)
    assert results.kernels[0]["over_ours"] == 1.0
    mask = "causal" if causal else "full"
    assert results.absent[f"kernels: broken, {mask} 512, 0.4"] == "ValueError: needs a toolkit"
    assert "not the same attention" in results.absent[f"kernels: wrong, {mask} 512, 0.4"]
    assert "SPARSIFY_RIVALS" in results.absent[f"kernels: FA4, {mask} 512, 0.4"]
    results.write(tmp_path)
    assert f"| {mask}: length | kept | ours ms | fake ms |" in (tmp_path / "rivals.md").read_text()
    assert any(line.startswith("kernel of fake, same lists: ") for line in command.summary(results))


def test_errors_of_lost_keys_are_seen():
    case = Case(4 * BLOCK, 1.0, True, SHAPE)
    q, k, v = case.qkv
    assert case.relative_error(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)) < 1e-5
    assert case.relative_error(scaled_dot_product_attention(q, k, v, enable_gqa=True)) > 0.1


def test_methods_are_swept_and_compared_at_equal_error(inputs, monkeypatch, tmp_path):
    def near(x, _, noise):
        return scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True) * (1 + noise)

    monkeypatch.setattr(command, "METHODS", {
        "ours": methods.METHODS["ours"], "fake": Method(near, lambda *_: 0.5, None, "noise", (0.1, 0.02)),
        "PBS": methods.METHODS["PBS"]})
    results = command.Results({"device": "cpu"})
    command.run_methods(inputs, command.Options(tmp_path, "cpu", rounds=1, budget_ms=1), results,
                        list(command.METHODS))
    fake = [row for row in results.methods if row["method"] == "fake"]
    assert [row["relative_error"] for row in fake] == pytest.approx([0.1, 0.02], rel=0.2)
    ours = [row for row in results.methods if row["method"] == "ours"]
    assert [row["density"] for row in ours] == sorted(row["density"] for row in ours)
    assert all(0 < row["density"] <= 1 for row in ours)
    assert [name for name in results.absent if "PBS" in name] == ["methods: PBS 0.3, random"]  # once, not per setting
    assert set(command.equal_error(results.methods, 0.15)) >= {"dense sdpa", "fake", "ours"}
    assert {figure.bar for figure in command.figures(results)} == {">= 1"}
    results.write(tmp_path)
    assert "| fake | noise 0.1 | 0.500 |" in (tmp_path / "rivals.md").read_text()


def test_time_at_error_is_on_the_front():
    points = [(0.01, 8.0), (0.1, 2.0), (0.05, 9.0), (0.3, 3.0)]  # the last two are not worth having
    assert methods.time_at_error(points, 0.005) is None
    assert methods.time_at_error(points, 0.01) == pytest.approx(8.0)
    assert methods.time_at_error(points, math.sqrt(0.01 * 0.1)) == pytest.approx(4.0)
    assert methods.time_at_error(points, 0.5) == pytest.approx(2.0)
    assert methods.time_at_error([], 0.5) is None


def test_activations_survive_their_file(inputs, tmp_path):
    activations.save(inputs, tmp_path / "x.pt")
    back = activations.read(tmp_path / "x.pt", "cpu")
    assert back.name == inputs.name
    for name in "qkv":
        assert torch.equal(getattr(back, name), getattr(inputs, name))
        assert getattr(back, name).transpose(1, 2).is_contiguous()


def test_capture_takes_the_layers_asked_for(tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a small model. " * 20, encoding="utf-8")
    x = activations.capture(None, text, 64, (1, 4), "cpu")
    assert x.q.shape == (1, 12, 64, 64) and x.k.shape == x.v.shape == (1, 4, 64, 64)
    assert x.q.dtype == torch.bfloat16 and "layers 1, 4" in x.name


def test_listening_leaves_a_module_as_it_was():
    function = sources.first_line
    with methods.overheard(sources, "first_line") as results:
        sources.first_line(ValueError("no"))
    assert results == ["ValueError: no"] and sources.first_line is function


def test_a_source_says_where_it_is_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sys, "path", list(sources.sys.path))
    folder = tmp_path / "pbs"
    folder.mkdir()
    (folder / "ORIGIN").write_text("somewhere\n1234\n", encoding="utf-8")
    assert sources.origins(tmp_path) == {"pbs": "somewhere 1234"}
    assert sources.origins(None) == {}
    with pytest.raises(sources.Absent, match="cannot be imported"):
        sources.load("pbs", tmp_path)
    with pytest.raises(sources.Absent, match="no sla in"):
        sources.load("sla", tmp_path)


def test_a_contender_that_fails_alone_is_told_apart(monkeypatch):
    class Done:
        returncode, stdout, stderr = 1, "", "first\nwhy it failed\n"

    class Well:
        returncode, stdout, stderr = 0, "", ""

    monkeypatch.setattr(command.subprocess, "run", lambda line, **_: Done if line[-1] == "bad" else Well)
    failed = command.try_alone([("kernels", "good"), ("methods", "bad")], [], 1, 2)
    assert failed == {("methods", "bad"): "why it failed"}
