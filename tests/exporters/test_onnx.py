"""`sparsify.export` to ONNX: equal to the compiled model, whole or not there at all, and free of torch when it runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparsify
from sparsify import cli
from sparsify.errors import ExportError, ModelError, OptionError
from sparsify.exporters import formats
from sparsify.exporters.capture import capture
from sparsify.exporters.contents import NAME
from sparsify.exporters.decoder import with_past
from sparsify.plan import Plan
from tests.exporters.models import ALWAYS, BATCH, EDGE, SECOND_EDGE, TWO_EDGES, Attend, bert, decoder, tokens, vit
from tests.small_model import PLAN, save_small_model, small_model

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from sparsify.exporters import onnx as form  # noqa: E402
from sparsify.exporters.onnx_attention import OPSETS  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return path, sparsify.export(Attend(), torch.randn(BATCH, 700, 32), path, plan=TWO_EDGES,
                                 dynamic_shapes=[{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}])


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_equal_up_to_ties(ours, theirs, dense) -> None:
    """To rounding; where blocks are dropped, a tie that fell the other way is far below the plan's own error."""
    gap = ours - theirs
    assert float(gap.abs().max()) <= 1e-4 * float(theirs.abs().max()) or rms(gap) <= 0.25 * rms(theirs - dense)


@pytest.mark.parametrize("make", [decoder, bert, pytest.param(vit, marks=pytest.mark.slow)])
def test_equals_the_compiled_model_on_both_sides_of_every_edge(make, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    captured = capture(model, inputs, TWO_EDGES if make is not vit else ALWAYS)
    form.write(captured, tmp_path / "model.onnx")
    run = form.load(tmp_path / "model.onnx")
    sparsify.compile(model, captured.plan, backend="eager")
    lengths = [None] if make is vit else [EDGE - 1, EDGE, SECOND_EDGE - 1, SECOND_EDGE, 700]
    with torch.no_grad():
        for length in lengths:
            for batch in (1, 2):
                args, kwargs = captured.inputs_at(length, batch)
                (theirs, *_), (dense, *_) = (call(*args, **kwargs).values() for call in
                                             (model, captured.dense.module()))
                ours = run(*args, **kwargs)[0]
                assert_equal_up_to_ties(ours, theirs, dense)
    assert rms(ours - dense) > 1e-3  # the twin: something was dropped


def test_every_bucket_is_checked_and_reported(exported):
    path, report = exported
    assert [(row.bucket, row.length) for row in report.checks] == [
        (f"[1, {EDGE})", 64), (f"[{EDGE}, {SECOND_EDGE})", EDGE), (f"[{SECOND_EDGE}, inf)", SECOND_EDGE)]
    assert all(row.difference < 1e-4 for row in report.checks)
    assert report.checks[0].plan_error < 1e-4 < report.checks[-1].plan_error
    assert sorted(x.name for x in path.parent.iterdir()) == ["model.onnx", "model.onnx.md"]
    assert "PlannedAttention_sparse_causal_anchored" in report.to_markdown()


def test_the_plan_is_in_the_file(exported):
    path, report = exported
    assert formats.format_of(path).describe(path) == report.contents
    held = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert held["sparsify.plan"] == TWO_EDGES.hash
    table = json.loads(held["sparsify.buckets"])
    assert [(row["lo"], row["hi"], row["tolerance"]) for row in table] == [
        (1, EDGE, None), (EDGE, SECOND_EDGE, 0.05), (SECOND_EDGE, None, 0.4)]
    node = next(node for node in onnx.load(path).graph.node if node.domain == "sparsify")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["edges"] == [EDGE, SECOND_EDGE]
    assert attributes["tolerances"] == pytest.approx([0.0, 0.05, 0.4])


def test_the_inlined_form_has_no_functions_and_computes_the_same(exported, tmp_path):
    captured = capture(Attend(), torch.randn(BATCH, 700, 32), TWO_EDGES,
                       [{0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}])
    for name in form.FORMS:
        form.write(captured, tmp_path / f"{name}.onnx", form=name)
    assert not onnx.load(tmp_path / "inline.onnx").functions
    assert onnx.load(tmp_path / "function.onnx").functions
    for length in (50, 300, 500):
        x = torch.randn(BATCH, length, 32)
        ours, theirs = (form.load(tmp_path / f"{name}.onnx")(x)[0] for name in form.FORMS)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("opset", [OPSETS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in OPSETS[1:])])
def test_every_opset_is_written(opset, tmp_path):
    captured = capture(*decoder(), TWO_EDGES)
    form.write(captured, tmp_path / "model.onnx", opset=opset)
    assert {x.version for x in onnx.load(tmp_path / "model.onnx").opset_import if not x.domain} == {opset}
    args, kwargs = captured.inputs_at(500)
    with torch.no_grad():
        theirs, dense = (program.module()(*args, **kwargs)["logits"] for program in (captured.program, captured.dense))
    assert_equal_up_to_ties(form.load(tmp_path / "model.onnx")(*args, **kwargs)[0], theirs, dense)


ALONE = """
import sys
for name in ("torch", "sparsify", "onnx", "transformers"):
    sys.modules[name] = None  # an import of it fails
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
numpy.save(sys.argv[3], session.run(None, dict(numpy.load(sys.argv[2])))[0])
"""


@pytest.mark.parametrize("make", [decoder, pytest.param(bert, marks=pytest.mark.slow)])
def test_a_process_with_onnxruntime_and_numpy_alone_computes_the_same(make, tmp_path):
    model, inputs = make(700)
    path = tmp_path / "model.onnx"
    form.write(capture(model, inputs, TWO_EDGES), path)
    np.savez(tmp_path / "inputs.npz", **{name: x.numpy() for name, x in inputs.items()})
    files = [str(path), str(tmp_path / "inputs.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *files], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.from_numpy(np.load(files[2])), form.load(path)(**inputs)[0])


def test_a_decoder_generates_with_its_past(tmp_path):
    torch.manual_seed(0)
    model = small_model()
    module, inputs, shapes = with_past(model)
    path = tmp_path / "model.onnx"
    form.write(capture(module, inputs, TWO_EDGES, shapes), path)
    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "position_ids", *(
        f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value"))]
    outputs = [x.name for x in session.get_outputs()]
    assert outputs == ["logits", *(f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value"))]

    seen = new = tokens(EDGE - 3).numpy()
    mask = np.ones_like(seen)
    mask[0, :30] = 0  # padding on the left
    past = {name: np.zeros((BATCH, 1, 0, 16), np.float32) for name in names[3:]}
    for _ in range(6):  # across the edge, below few queries
        places = (mask.cumsum(1) - 1).clip(0)
        feeds = {"input_ids": new, "attention_mask": mask, "position_ids": places[:, -new.shape[1]:], **past}
        logits, *present = session.run(None, feeds)
        past = dict(zip(names[3:], present, strict=True))
        with torch.no_grad():
            exact = model(torch.from_numpy(seen), torch.from_numpy(mask), position_ids=torch.from_numpy(places)).logits
        np.testing.assert_allclose(logits[:, -1], exact[:, -1].numpy(), rtol=1e-3, atol=2e-4)
        new = logits[:, -1:].argmax(-1)
        seen, mask = np.concatenate([seen, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    assert present[0].shape == (BATCH, 1, EDGE + 2, 16)


def test_a_model_without_a_cache_has_no_past():
    with pytest.raises(ModelError, match="without a configuration"):
        with_past(Attend())
    with pytest.raises(ModelError, match="keeps no cache"):
        with_past(bert()[0])


def test_large_weights_are_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "LARGE", 1000)
    captured, path = capture(Attend(), torch.randn(BATCH, 64, 32), TWO_EDGES), tmp_path / "model.onnx"
    form.write(captured, path)
    weights = tmp_path / "model.onnx_data"
    assert weights.stat().st_size >= 4 * 3 * 32 * 32
    x = torch.randn(BATCH, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(form.load(path)(x)[0], captured.program.module()(x))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ExportError, match="checksum"):
        form.load(path)
    weights.unlink()
    with pytest.raises(ExportError, match="not beside it"):
        form.load(path)


def damaged(path: Path, tmp_path: Path, how: str) -> Path:
    """A copy of a file that something happened to."""
    data, copy = path.read_bytes(), tmp_path / "copy.onnx"
    if how == "truncated":
        copy.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        copy.write_bytes(b"")
    elif how == "noise":
        copy.write_bytes(b"x" * 1000)
    elif how == "a flipped bit":
        place = len(data) // 2
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
    else:
        model = onnx.load(path)
        held = next(prop for prop in model.metadata_props if prop.key == NAME)
        if how == "not ours":
            model.metadata_props.remove(held)
        else:
            change = {"newer": {"schema": 99}, "other ops": {"ops": 0}, "other target": {"target": "vulkan"}}[how]
            held.value = json.dumps(json.loads(held.value) | change)
        copy.write_bytes(model.SerializeToString())
    return copy


@pytest.mark.parametrize(("how", "words"), [
    ("truncated", "damaged"), ("empty", "damaged"), ("noise", "damaged"), ("a flipped bit", "damaged"),
    ("not ours", "not written by sparsify"), ("newer", "schema 99"), ("other ops", "version 0 of the ops"),
    ("other target", "vulkan"),
])
def test_a_file_that_is_not_what_it_should_be_is_refused(how, words, exported, tmp_path):
    path = damaged(exported[0], tmp_path, how)
    with pytest.raises(ExportError, match=words):
        formats.format_of(path).load(path)


@pytest.mark.parametrize(("options", "words"), [
    ({"opset": 19}, "opset is 19.*20 to 24"), ({"opset": 25}, "opset is 25"), ({"opset": "23"}, "opset is '23'"),
    ({"form": "script"}, "form is 'script'.*function, inline"), ({"target": "vulkan"}, "target is 'vulkan'"),
    ({"level": 3}, "level is 3"),
])
def test_an_option_that_does_not_exist_leaves_nothing(options, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", plan=Plan.dense(), **options)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    for name in ("sparsify.exporters.onnx", "sparsify.exporters.onnx_translate"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(OptionError, match=r"needs onnx_ir.*sparsify-attention\[onnx\]"):
        sparsify.export(Attend(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", plan=Plan.dense())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_line_writes_explains_and_times_a_decoder_with_its_past(tmp_path):
    save_small_model(tmp_path / "model")
    PLAN.save(tmp_path / "plan.json")
    runner, app = CliRunner(), cli.app
    file = str(tmp_path / "model.onnx")
    written = runner.invoke(app, ["export", str(tmp_path / "model"), "-o", file, "--plan", str(tmp_path / "plan.json"),
                                  "--with-past", "--opset", "22", "--form", "inline", "--json"])
    assert written.exit_code == 0, written.output
    assert [row["length"] for row in json.loads(written.stdout)["checks"]] == [64, EDGE]
    explained = runner.invoke(app, ["explain", file])
    assert "ONNX for ONNX Runtime" in explained.stdout and PLAN.hash in explained.stdout
    timed = runner.invoke(app, ["bench", "--exported", file, "--lengths", "64,512", "--json"])
    assert [row["length"] for row in json.loads(timed.stdout)] == [64, 512], timed.output


class Sorts(torch.nn.Module):
    """A model with an operator that ONNX has no word for."""

    def forward(self, x):
        return torch.linalg.eigvals(x.transpose(-1, -2) @ x).real


def test_what_onnx_cannot_say_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(ExportError, match="linalg_eig"):
        sparsify.export(Sorts(), torch.randn(BATCH, 64, 32), tmp_path / "model.onnx", plan=Plan.dense())
    assert not list(tmp_path.iterdir())
