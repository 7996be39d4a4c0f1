"""The command line: results on stdout, the rest on stderr, one line and exit code 2 for a caller's mistake."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from torch._inductor import compile_fx
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from sparsify import measurement
from sparsify.cli import app
from sparsify.exporters import timing
from sparsify.exporters.check import check
from sparsify.models.loading import HELDOUT_TEXT, TINY_LM
from sparsify.plan import Plan
from sparsify.report import Report
from tests.small_model import EDGE, PLAN, save_small_model


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, a plan and a text."""
    folder = tmp_path_factory.mktemp("cli")
    save_small_model(folder / "model")
    PLAN.save(folder / "plan.json")
    (folder / "text.txt").write_text(HELDOUT_TEXT.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def common(files):
    return ("--model", files / "model", "--plan", files / "plan.json", "--text", files / "text.txt", "--device", "cpu")


@pytest.fixture(scope="module")
def benched(files, common):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "MEASURED_SECONDS", 0.02)
        patch.setattr(measurement, "QUALITY_TOKENS", 2000)
        return run("bench", *common, "--lengths", f"128,{2 * EDGE}", "--out", files / "out", "--json")


def test_bench_prints_and_writes_the_report(benched, files):
    assert benched.exit_code == 0, benched.output
    printed = json.loads(benched.stdout)
    assert printed == json.loads((files / "out" / "report.json").read_text())
    assert [row["length"] for row in printed["rows"]] == [128, 2 * EDGE]
    assert printed["model"]["name"] == "model"
    assert (files / "out" / "report.md").read_text().startswith("# model: before and after")


def test_bench_tells_on_stderr_what_it_does(benched):
    for line in ("[1/2] 128 tokens: timing", "sparsify: compiled bucket", "report.json"):
        assert line in benched.stderr


def test_bench_prints_what_it_cannot_write(common, tmp_path, monkeypatch):
    report = Report({}, {"name": "model"}, PLAN, ())
    monkeypatch.setattr(measurement, "benchmark", lambda *arguments, **options: report)
    (tmp_path / "report.json").mkdir()
    result = run("bench", *common, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == f"{report}\n"
    assert f"error: out is '{tmp_path}' and cannot be written (Is a directory)" in result.stderr


def test_explain_prints_every_site(common):
    result = run("explain", *common, "--length", 2 * EDGE)
    assert result.exit_code == 0, result.output
    assert "2 attention sites" in result.stdout
    assert "tolerance 0.05" in result.stdout


def test_explain_takes_no_more_tokens_than_the_model_has_positions(files):
    config = GPT2Config(vocab_size=4096, n_positions=1024, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(files / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, files / "short")
    common = ("explain", "--model", files / "short", "--device", "cpu")
    for fine in ([], ["--length", 1024]):
        result = run(*common, *fine)
        assert result.exit_code == 0, result.output
        assert "1 attention sites" in result.stdout
    refused = run(*common, "--length", 1025)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "length is 1025 and the model has 1024 positions. Give a length up to 1024" in refused.stderr


def test_explain_in_json(common):
    result = run("explain", *common, "--length", 2 * EDGE, "--json")
    sites = json.loads(result.stdout)["sites"]
    assert [site["budget"] for site in sites] == ["dense", "tolerance 0.05"]
    assert 0 < sites[1]["density"] <= 1


def test_explain_writes_a_page(common, files):
    result = run("explain", *common, "--length", 128, "--html", files / "sites.html")
    assert result.exit_code == 0, result.output
    assert (files / "sites.html").read_text(encoding="utf-8").count("<tr class=") == 2
    assert f"wrote {files / 'sites.html'}" in result.stderr


def test_plan_show(files):
    assert run("plan", "show", files / "plan.json").stdout == f"{PLAN}\n"
    assert run("plan", "show", "--device", "cuda").stdout == f"{Plan.default('cuda')}\n"
    assert run("plan", "show").stdout == f"{Plan.default('cpu')}\n"
    assert Plan.from_dict(json.loads(run("plan", "show", files / "plan.json", "--json").stdout)) == PLAN


@pytest.fixture(scope="module")
def calibrated(files):
    """The plan of a calibration on pages of one text; graphs run without Inductor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **options: gm)
        return run("calibrate", files / "model", "--text", f"book={files / 'text.txt'}", "--lengths", "512",
                   "--max-error", "9", "--device", "cpu", "--out", files / "calibrated.json", "--json")


def test_calibrate_prints_and_writes_the_plan(calibrated, files):
    assert calibrated.exit_code == 0, calibrated.output
    plan = Plan.load(files / "calibrated.json")
    assert Plan.from_dict(json.loads(calibrated.stdout)) == plan
    assert plan.calibration["documents"].keys() == {"book"}
    assert plan.calibration["texts"] == 1
    for line in ("1 texts are few: cut into", "[1/1] 512 keys: ", "calibrated.json"):
        assert line in calibrated.stderr
    assert (files / "calibrated.journal.jsonl").exists()


def test_plan_check_knows_model_and_machine(calibrated, files):
    fine = run("plan", "check", files / "calibrated.json", "--model", files / "model", "--device", "cpu")
    assert fine.stdout.splitlines() == ["the model has the graph of the plan", "this is where the plan was measured"]
    other = run("plan", "check", files / "calibrated.json", "--device", "cpu")  # and no model at all
    assert other.exit_code == 0
    wrong = run("plan", "check", files / "calibrated.json", "--model", TINY_LM, "--device", "cpu")
    assert wrong.exit_code == 2
    assert "was made for another graph: its site 0 is" in wrong.stderr
    elsewhere = run("plan", "check", files / "calibrated.json", "--device", "cpu", "--dtype", "bfloat16")
    assert "dtype: the plan says float32, here it is bfloat16" in elsewhere.stdout
    again = run("plan", "check", files / "calibrated.json", "--device", "cpu", "--out", files / "here.json")
    assert again.exit_code == 0, again.output
    assert again.stdout.endswith("no budget changed\n")
    assert Plan.load(files / "here.json").graph == Plan.load(files / "calibrated.json").graph
    assert run("plan", "check", files / "plan.json", "--device", "cpu").stdout == (
        "the plan does not say where it was measured\n")


def test_plan_check_looks_at_the_place_before_it_measures(calibrated, files):
    for out, words in ((files / "missing" / "here.json", f"'{files / 'missing'}' is no folder that can be written"),
                       (files / "text.txt" / "here.json", f"'{files / 'text.txt'}' is no folder"),
                       (files / "model", "a folder. Give the path of a plan file")):
        result = run("plan", "check", files / "calibrated.json", "--device", "cpu", "--out", out)
        assert (result.exit_code, result.stdout) == (2, "")
        [line] = result.stderr.splitlines()
        assert line.startswith(f"error: out is '{out}'") and words in line


def test_plan_diff(calibrated, files):
    same = run("plan", "diff", files / "plan.json", files / "plan.json")
    assert (same.exit_code, same.stdout) == (0, "no difference\n")
    other = run("plan", "diff", files / "plan.json", files / "calibrated.json")
    assert other.exit_code == 1
    assert f"[1, {EDGE}): " not in other.stdout  # dense in both
    assert f"[{EDGE}, inf): tolerance 0.05 -> dense" in other.stdout


@pytest.fixture(scope="module")
def exported(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[check.__module__], "SECONDS", 0.0)
        return run("export", files / "model", "-o", files / "model.pt2", "--plan", files / "plan.json", "--text",
                   files / "text.txt", "--device", "cpu", "--lengths", f"64,{2 * EDGE}", "--json")


def test_export_writes_a_file_and_its_report(exported, files):
    assert exported.exit_code == 0, exported.output
    report = json.loads(exported.stdout)
    assert [row["length"] for row in report["checks"]] == [64, 2 * EDGE]
    assert report["plan"] == PLAN.hash
    assert (files / "model.pt2.md").read_text().startswith("# model.pt2")
    assert "comparing at 64" in exported.stderr and "model.pt2.md" in exported.stderr


def test_explain_and_bench_take_the_file(exported, files, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    told = run("explain", files / "model.pt2")
    assert told.exit_code == 0, told.output
    assert f"plan small ({PLAN.hash})" in told.stdout and "planned_attention" in told.stdout
    assert json.loads(run("explain", files / "model.pt2", "--json").stdout)["plan_hash"] == PLAN.hash
    timed = run("bench", "--exported", files / "model.pt2", "--json")
    assert timed.exit_code == 0, timed.output
    assert [(row["length"], row["bucket"]) for row in json.loads(timed.stdout)] == [
        (64, f"[1, {EDGE})"), (EDGE, f"[{EDGE}, inf)")]
    shown = run("bench", "--exported", files / "model.pt2", "--lengths", "300", "--out", files / "timed")
    assert "| 300 | 1 | " in shown.stdout
    assert (files / "timed" / "report.md").read_text() == f"# model.pt2\n\n{shown.stdout}"
    assert [row["length"] for row in json.loads((files / "timed" / "report.json").read_text())] == [300]
    assert f"wrote {files / 'timed' / 'report.json'}" in shown.stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (["explain", "no-such-file.pt2"], "'no-such-file.pt2' does not exist"),
    (["explain", __file__], "is no exported file"),
    (["explain", "x.pt2", "--model", "y"], "model is 'y'. The file holds its model"),
    (["bench", "--exported", "x.pt2", "--plan", "y"], "plan is 'y'. The file holds its model"),
    (["explain", "x.pt2", "--length", "7"], "length is '7'. The file holds its model"),
    (["bench", "--exported", "x.pt2"], "'x.pt2' does not exist"),
    (["bench", "--exported", "x.pt2", "--out", __file__], f"'{__file__}' is no folder that can be written"),
    (["export", "-o", "model.bin"], "path is 'model.bin'"),
    (["export", "-o", "model.pt2", "--target", "ort"], "target is 'ort'"),
    (["export", "-o", "no-such-folder/model.pt2"], "its folder does not exist"),
    (["export", "-o", "model.pt2", "--opset", "23"], "opset is 23"),
])
def test_mistakes_about_exported_files(arguments, words):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = [line for line in result.stderr.splitlines() if not line.startswith(("reading", "sparsify: "))]
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(("arguments", "words"), [
    (["calibrate", "x", "more.txt"], "texts are 'more.txt'. Give them behind --text"),
    (["calibrate", "--lengths", "512", "--text", "no-such-text"], "text 'no-such-text' cannot be read"),
    (["calibrate", "--max-error", "0"], "max_error is 0"),
    (["calibrate", "--lengths", "0,128"], "lengths is [0, 128]"),
    (["calibrate", "--lengths", "-128"], "lengths is [-128]"),
    (["calibrate", "--lengths", "512,40000"], "lengths holds 40000 and the model has 32768 positions"),
    (["calibrate", "--holdout", "0"], "holdout is 0"),
    (["plan", "check", "no-such-plan"], "plan 'no-such-plan' cannot be read"),
    (["bench", "--lengths", "512,many"], "lengths is '512,many'"),
    (["bench", "--lengths", "0"], "lengths is [0]"),
    (["bench", "--lengths", "512,40000"], "lengths holds 40000 and the model has 32768 positions"),
    (["bench", "--model", "./no-such-model"], "model './no-such-model' does not exist"),
    (["bench", "--text", "no-such-text"], "text 'no-such-text' cannot be read"),
    (["bench", "--text", __file__, "--lengths", "32768"], "and the longest length is 32768"),
    (["bench", "--plan", "no-such-plan"], "plan 'no-such-plan' cannot be read"),
    (["bench", "--out", __file__], f"out is '{__file__}' and '{__file__}' is no folder that can be written"),
    (["bench", "--out", f"{__file__}/new/folder"], f"and '{__file__}' is no folder that can be written"),
    (["explain", "--guarantee", "0.95"], "guarantee is 0.95 and no plan is given"),
    (["explain", "--length", "0"], "length is 0"),
    (["explain", "--length", "64", "--html", "no-such-folder/x.html"], "html is 'no-such-folder/x.html'"),
    (["explain", "--text", __file__, "--length", "32768"], "length is 32768"),
    (["plan", "show", "no-such-plan"], "plan 'no-such-plan' cannot be read"),
    (["plan", "show", "x.json", "--device", "cuda"], "file is 'x.json' and device is 'cuda'. A plan file is the same"),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words):
    result = run(*arguments, *(["--device", "cpu"] if arguments[0] != "plan" else []))
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if not line.startswith(("reading the text", "sparsify: "))]
    assert line.startswith("error: ")
    assert words in line


def test_an_unknown_device_is_exit_code_2():
    assert run("bench", "--device", "tpu").exit_code == 2


def test_the_command_needs_no_network_and_starts_fast():
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    shown = subprocess.run([sys.executable, "-X", "importtime", "-m", "sparsify", "plan", "show"], env=environment,
                           capture_output=True, text=True, check=True)
    assert "plan default-cpu" in shown.stdout
    assert not {"torch", "transformers", "triton"} & {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
