"""`sparsify.export` to an ExportedProgram: what is in the file, what is checked, and what never happens."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import sparsify
from sparsify.errors import ExportError, OptionError, PlanError, SparsifyError
from sparsify.exporters import formats, pt2
from sparsify.exporters.contents import NAME
from tests.exporters.models import ALWAYS, EDGE, SECOND_EDGE, TWO_EDGES, Attend, bert, decoder, vit

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [{0: Dim.AUTO, 1: Dim("length", max=2048)}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, sparsify.ExportReport]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    report = sparsify.export(Attend(), torch.randn(2, 700, 32), path, plan=TWO_EDGES, dynamic_shapes=SHAPES)
    return path, report


def test_the_report_has_a_row_for_every_bucket(exported):
    path, report = exported
    assert [(row.bucket, row.length) for row in report.checks] == [
        (f"[1, {EDGE})", 64), (f"[{EDGE}, {SECOND_EDGE})", EDGE), (f"[{SECOND_EDGE}, 2049)", SECOND_EDGE)]
    assert all(row.difference == 0 for row in report.checks)  # the same graph in the same runtime
    assert report.checks[0].plan_error < 1e-4 < report.checks[-1].plan_error
    assert all(row.dense_ms > 0 and row.sparse_ms > 0 for row in report.checks)
    assert report.files == {"model.pt2": path.stat().st_size}
    assert sorted(x.name for x in path.parent.iterdir()) == ["model.pt2", "model.pt2.md"]
    text = report.report_path.read_text()
    assert text == report.to_markdown()
    assert TWO_EDGES.hash in text and "planned_attention" in text and "s" in report.to_dict()["notes"][0]
    json.dumps(report.to_dict())


@pytest.mark.parametrize("make", [pytest.param(decoder, marks=pytest.mark.slow),
                                  pytest.param(bert, marks=pytest.mark.slow), vit])
def test_a_fresh_process_computes_the_same(make, tmp_path):
    model, inputs = make(*([700] if make is not vit else []))
    path = tmp_path / "model.pt2"
    sparsify.export(model, inputs, path, plan=ALWAYS if make is vit else TWO_EDGES)
    expected = pt2.load(path)(**inputs)[0]
    torch.save(inputs, tmp_path / "inputs")
    code = ("import sys, torch, sparsify.ops; torch.set_grad_enabled(False)\n"
            "model = torch.export.load(sys.argv[1]).module()\n"
            "out = model(**torch.load(sys.argv[2]))\n"
            "assert type(out) is dict and 'transformers' not in sys.modules\n"
            "torch.save(next(iter(out.values())), sys.argv[3])")
    arguments = [str(path), str(tmp_path / "inputs"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT)
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_the_plan_travels_in_the_file(exported):
    contents = formats.format_of(exported[0]).describe(exported[0])
    assert contents.plan == TWO_EDGES and contents.plan.hash == TWO_EDGES.hash
    assert contents == dataclasses.replace(exported[1].contents)
    assert contents.buckets == ((1, EDGE), (EDGE, SECOND_EDGE), (SECOND_EDGE, 2049))
    assert "tolerance 0.05" in str(contents)
    args, kwargs = contents.random_inputs(300, 1)
    assert [x.shape for x in args] == [(1, 300, 32)] and not kwargs
    assert pt2.load(exported[0])(*args)[0].shape == (1, 300, 32)
    with pytest.raises(OptionError, match="from 1 to 2048"):
        contents.random_inputs(2049, 1)


def test_asked_lengths_are_checked_and_the_rest_filled_in(tmp_path):
    report = sparsify.export(Attend(), torch.randn(2, 64, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                             dynamic_shapes=SHAPES, lengths=[300, 310])
    assert [row.length for row in report.checks] == [64, 300, 310, SECOND_EDGE]


def damaged(path: Path, tmp_path: Path, how: str) -> Path:
    """A copy of a file that something happened to."""
    data, copy = path.read_bytes(), tmp_path / "copy.pt2"
    if how == "truncated":
        copy.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        copy.write_bytes(b"")
    elif how == "no zip":
        copy.write_bytes(b"x" * 1000)
    elif how == "a flipped bit":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda x: x.file_size)
        place = largest.header_offset + 400
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
    else:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as changed:
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith(NAME):
                    facts = json.loads(content)
                    if how == "not ours":
                        continue
                    facts |= {"newer": {"schema": 99}, "other ops": {"ops": 0}, "code": {"key_length": "__import__"},
                              "no plan": {"plan": {}}, "other target": {"target": "vulkan"}}[how]
                    content = json.dumps(facts)
                changed.writestr(name, content)
    return copy


@pytest.mark.parametrize(("how", "words"), [
    ("truncated", "damaged"), ("empty", "damaged"), ("no zip", "damaged"), ("a flipped bit", "checksum"),
    ("newer", "schema 99"), ("other ops", "version 0 of the ops"), ("not ours", "torch wrote it"),
    ("no plan", "cannot be read"), ("code", "no size"), ("other target", "vulkan"),
])
def test_a_file_that_is_not_what_it_should_be_is_refused(how, words, exported, tmp_path):
    path = damaged(exported[0], tmp_path, how)
    with pytest.raises(ExportError, match=words):
        form = formats.format_of(path)
        form.describe(path).random_inputs(300, 1)
        form.load(path)


def test_a_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "missing.pt2", tmp_path, tmp_path / "model.txt"):
        with pytest.raises(ExportError, match=path.name):
            formats.format_of(path)


@pytest.mark.parametrize(("changed", "error", "words"), [
    ({"path": "model.bin"}, OptionError, "suffix"),
    ({"target": "tensorrt"}, OptionError, "target is 'tensorrt'"),
    ({"path": "missing/model.pt2"}, OptionError, "folder does not exist"),
    ({"opset": 23}, OptionError, "opset is 23"),
    ({"atol": -1.0}, OptionError, "atol is -1"),
    ({"lengths": [4096]}, OptionError, "from 1 to 2048"),
    ({"plan": "missing.json"}, PlanError, "missing.json"),
    ({"plan": 7}, PlanError, "plan is a int"),
])
def test_mistakes_leave_nothing_behind(changed, error, words, tmp_path):
    arguments = {"path": "model.pt2", "plan": TWO_EDGES, "dynamic_shapes": SHAPES, **changed}
    with pytest.raises(error, match=words):
        sparsify.export(Attend(), torch.randn(2, 64, 32), **{**arguments, "path": tmp_path / arguments["path"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["while it is written", "a wrong file", "a crash in the check"])
def test_a_file_that_fails_its_check_is_not_handed_over(when, monkeypatch, tmp_path):
    """And an older file of that name stays."""
    path = tmp_path / "model.pt2"
    path.write_text("older")
    honest = pt2.load

    def wrong(place):
        run = honest(place)
        return lambda *args, **kwargs: [x + 1e-2 for x in run(*args, **kwargs)]

    def crash(*args, **kwargs):
        raise SparsifyError("crash")

    if when == "while it is written":
        monkeypatch.setattr(torch.export, "save", crash)
    else:
        monkeypatch.setattr(pt2, "load", wrong if when == "a wrong file" else crash)
    with pytest.raises(SparsifyError, match="differs from the model|crash"):
        sparsify.export(Attend(), torch.randn(2, 64, 32), path, plan=TWO_EDGES, dynamic_shapes=SHAPES)
    assert [x.name for x in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "older"
    monkeypatch.undo()
    sparsify.export(Attend(), torch.randn(2, 64, 32), path, plan=TWO_EDGES, dynamic_shapes=SHAPES)  # the twin
    assert path.stat().st_size > 1000


def test_a_range_that_the_model_narrows_is_told(tmp_path):
    """The fault of the facts file: a comparison in the model's own code narrows the file's range without a word."""
    class Narrow(Attend):
        def forward(self, x):
            return super().forward(x) if x.shape[1] < 512 else x

    report = sparsify.export(Narrow(), torch.randn(2, 300, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                             dynamic_shapes=[{1: Dim.AUTO}])
    assert any("is at most 511" in note for note in report.notes)
    with pytest.raises(OptionError, match="to 511"):
        sparsify.export(Narrow(), torch.randn(2, 300, 32), tmp_path / "other.pt2", plan=TWO_EDGES,
                        dynamic_shapes=[{1: Dim.AUTO}], lengths=[300, 1024])
    report = sparsify.export(Attend(), torch.randn(2, 300, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                             dynamic_shapes=[{1: Dim.AUTO}], lengths=[300, 1024])  # the twin
    assert not any("at most" in note for note in report.notes)


def test_a_site_that_cannot_be_kept_is_listed(tmp_path):
    class Weights(Attend):
        def forward(self, x):
            scores = (x @ x.mT).softmax(-1)
            return super().forward(scores @ x), scores

    report = sparsify.export(Weights(), torch.randn(2, 300, 32), tmp_path / "model.pt2", plan=TWO_EDGES,
                             dynamic_shapes=SHAPES)
    assert [site.outcome for site in report.contents.sites] == ["refused", "sparse"]
    assert any("is dense: " in note for note in report.notes)
