"""The benchmark measures what it says, and leaves the model as it was."""

import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsify
from benchmarks import figures
from benchmarks.figures import Figure, record
from benchmarks.line import figures_of
from sparsify import measurement
from sparsify.errors import ModelError, OptionError, PlanError, TextError
from sparsify.measurement import Side, compile_sides, measuring
from sparsify.models.loading import HELDOUT_TEXT, TINY_LM, load_model, load_tokenizer, read_text
from sparsify.models.tasks import KINDS, exact_match, heldout_tokens, retrieval_rows
from sparsify.ops import crossover
from sparsify.plan import Plan
from tests.small_model import EDGE, PLAN, save_small_model, small_model

LENGTHS = [EDGE - 57, 2 * EDGE + 1]


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(heldout_tokens(TINY_LM)[:20_000].astype("int64"))


@pytest.fixture(scope="module")
def measured(tokens):
    """A small model, what it was before, and the report of its benchmark."""
    model = small_model().train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "MEASURED_SECONDS", 0.02)
        patch.setattr(measurement, "QUALITY_TOKENS", 2000)
        report = sparsify.benchmark(model, tokens, LENGTHS, plan=PLAN, name="small", progress=lines.append)
    return model, before, report, lines


def test_a_dense_bucket_changes_nothing(measured):
    row = measured[2].rows[0]
    assert (row.length, row.bucket, row.budget, row.density) == (LENGTHS[0], f"[1, {EDGE})", "dense", 1.0)
    assert row.kl < 1e-6
    assert row.top1_agreement == 1.0
    assert row.sparse_loss == pytest.approx(row.dense_loss, abs=1e-5)


def test_a_sparse_bucket_drops_blocks_and_says_how_many(measured):
    row = measured[2].rows[1]
    assert (row.length, row.bucket, row.budget) == (LENGTHS[1], f"[{EDGE}, inf)", "tolerance 0.05")
    assert 0.5 < row.density < 1  # the first of the two sites is dense
    assert row.kl > 0


def test_what_is_not_finite_is_null_in_json(measured):
    row = replace(measured[2].rows[1], kl=math.nan, dense_loss=math.inf).to_dict()
    assert (row["kl"], row["dense_loss"]) == (None, None) and row["density"] < 1
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_mean_of_nan_is_no_zero():
    quality = measurement.Quality(positions=2, kl=math.nan)
    assert math.isnan(quality.mean_kl)
    assert measurement.Quality(positions=2, kl=-1e-9).mean_kl == 0.0


def test_times_and_shares_are_of_one_run(measured):
    for row in measured[2].rows:
        assert row.speedup == row.dense_ms / row.sparse_ms > 0
        assert 0 < row.attention_share < 1


def test_the_model_is_left_as_it_was(measured):
    model, before, _, _ = measured
    assert model._compiled_call_impl is None
    assert model.training
    assert not model.model.layers[0].training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_tells_where_it_is(measured):
    lines = measured[3]
    assert any(line.startswith(f"[2/2] {LENGTHS[1]} tokens: timing") for line in lines)


def test_the_report_has_its_schema(measured, tmp_path):
    report = measured[2]
    report.save(tmp_path / "new" / "folder")
    data = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert list(data) == ["schema", "environment", "model", "plan", "rows"]
    assert data["schema"] == 1
    assert [list(row) for row in data["rows"]] == 2 * [[
        "length", "bucket", "budget", "dense_ms", "sparse_ms", "speedup", "attention_share", "density", "dense_loss",
        "sparse_loss", "kl", "top1_agreement"]]
    assert Plan.from_dict(data["plan"]) == PLAN
    assert data["model"]["name"] == "small"
    assert data["model"]["parameters"] == sum(p.numel() for p in small_model().parameters())
    assert data["environment"]["torch"] == torch.__version__
    markdown = (tmp_path / "new" / "folder" / "report.md").read_text()
    assert str(PLAN) in markdown
    assert markdown.count(f"| {LENGTHS[1]} |") == str(report).count(f" {LENGTHS[1]} ") == 1


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_quality_is_what_float64_says(rows_at_once, rng, device, monkeypatch):
    dense, sparse = (3 * torch.randn(50, 31, generator=rng, device=device) for _ in range(2))
    ids = torch.randint(31, (50,), generator=rng, device=device)
    monkeypatch.setattr(measurement, "CHUNK_ELEMENTS", 31 * rows_at_once)
    quality = measurement.Quality()
    quality.add(dense, sparse, ids)
    log_p, log_q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    assert (quality.positions, quality.targets) == (50, 49)
    assert quality.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    for loss, log_probability in ((quality.dense_loss, log_p), (quality.sparse_loss, log_q)):
        exact = nn.functional.nll_loss(log_probability[:-1], ids[1:], reduction="sum")
        assert loss == pytest.approx(float(exact), rel=1e-5)
    assert quality.agreements == int((dense.argmax(-1) == sparse.argmax(-1)).sum())


@pytest.mark.parametrize(("tokens", "length"), [(100, 100), (101, 100), (5000, 512), (40_000, 512), (40_000, 16_384)])
def test_windows_lie_inside_the_text(tokens, length):
    windows = measurement._windows(torch.arange(tokens), length)
    assert all(window.shape == (1, length) for window in windows)
    assert len(windows) == max(1, min(tokens, measurement.QUALITY_TOKENS) // length)
    assert len({int(window[0, 0]) for window in windows}) == len(windows)
    assert all(torch.equal(window[0], torch.arange(length) + window[0, 0]) for window in windows)


def test_hand_written_attention_has_no_share(tokens):
    with torch.no_grad():
        assert measurement._attention_share(Side(small_model("eager")), tokens[None, :64]) is None
        assert measurement._attention_share(Side(small_model("sdpa")), tokens[None, :64]) > 0


def test_a_side_reaches_the_model_itself_when_it_is_compiled(tokens):
    def refuse(graph, inputs):
        raise AssertionError("the model's own compilation ran")

    model = small_model()
    model.compile(backend=refuse)
    with torch.no_grad():
        assert Side(model)(tokens[None, :9]).shape == (1, 9, 4096)


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ({"lengths": [64, 30_000]}, OptionError, "lengths holds 30000 and the model has 2048 positions"),
    ({"lengths": [0, 64]}, OptionError, r"lengths is \[0, 64\]"),
    ({"lengths": []}, OptionError, r"lengths is \[\]"),
    ({"repeats": 0}, OptionError, "repeats is 0"),
    ({"plan": "no-such-plan.json"}, PlanError, "no-such-plan.json"),
    ({"text": torch.zeros(63, dtype=torch.long)}, TextError, "text has 63 tokens and the longest length is 64"),
    ({"text": torch.zeros(1, 63, dtype=torch.long)}, TextError, "text has 63 tokens and the longest length is 64"),
    ({"text": torch.zeros(2, 99, dtype=torch.long)}, TextError, r"text is a tensor of shape \[2, 99\]. Give the token"),
    ({"text": torch.tensor(3)}, TextError, r"text is a tensor of shape \[\]"),
    ({"text": ""}, ModelError, "model names no tokenizer"),
    ({"model": nn.Identity()}, ModelError, "no floating-point parameter"),
    ({"model": nn.Linear(3, 3, device="meta")}, ModelError, "meta device"),
])
def test_bad_input_is_refused_before_anything_runs(arguments, error, words, tokens):
    given = {"model": small_model(), "text": tokens, "lengths": [64], **arguments}
    with pytest.raises(error, match=words):
        sparsify.benchmark(**given)


def test_text_shorter_than_the_longest_length_names_both(tmp_path):
    folder = save_small_model(tmp_path)
    loaded = load_model(folder)
    with pytest.raises(TextError, match=r"text has \d tokens and the longest length is 64"):
        sparsify.benchmark(loaded.model, "so short", [64])  # the tokenizer is the model's own
    with pytest.raises(TextError, match="text has 0 tokens"):
        sparsify.benchmark(loaded.model, "", [64], tokenizer=loaded.tokenizer)


def test_token_ids_may_be_a_batch_of_one(tokens, monkeypatch):
    seen = []

    def stop(dense, sparse, windows, *others):
        seen.extend(windows)
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "_measure", stop)
    for text in (tokens[:200], tokens[None, :200]):
        with pytest.raises(KeyboardInterrupt):
            sparsify.benchmark(small_model(), text, [128], plan=PLAN)
    first, second = seen
    assert first.shape == (1, 128) and torch.equal(first, second)


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_whole_are_named(shards, tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_size="100GB" if shards == 1 else "700KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= shards
    load = files[-1].read_bytes()
    for size in (0, len(load) // 2):  # a download that was broken off
        files[-1].write_bytes(load[:size])
        with pytest.raises(ModelError, match=re.escape(f"cannot be loaded: {files[-1]} is not whole")):
            load_model(tmp_path)


def test_what_is_no_model_is_a_model_error(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "no-such-model"}')
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    for name, words in (("weights.bin", "no .gguf file"), ("cut.gguf", "cut.gguf' cannot be loaded"),
                        ("empty", "no config.json and 0 GGUF"), ("missing", "does not exist"),
                        ("bad", "cannot be loaded")):
        with pytest.raises(ModelError, match=words):
            load_model(tmp_path / name)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model("sparsify/no-such-model")  # an id that is not in the cache
    with pytest.raises(TextError, match="not UTF-8"):
        (tmp_path / "text").write_bytes(b"\xff\xfe\xfa")
        read_text(tmp_path / "text")


def test_the_shipped_model_is_the_trained_one():
    model, tokenizer = load_model().model, load_tokenizer(TINY_LM)
    text = read_text(TINY_LM / "heldout.txt")
    ids = torch.tensor([tokenizer(text[:4000])["input_ids"][:1024]])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.8  # a random one: log(4096) = 8.3


@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_rows_ask_at_the_very_end(kind):
    rows = retrieval_rows(TINY_LM, kind, length=700, count=3, seed=1)
    assert rows.ids.shape == (3, 700)
    again = retrieval_rows(TINY_LM, kind, length=700, count=3, seed=1)
    assert torch.equal(rows.ids, again.ids)
    assert rows.answers == again.answers
    for answers in rows.answers:
        positions = [position for answer in answers for position in answer]
        assert positions == sorted(set(positions))
        assert 350 < positions[0] and positions[-1] < 700


def test_depths_say_where_the_answers_were_planted():
    rows = retrieval_rows(TINY_LM, "copy", length=2000, count=4)  # 24 random words: nowhere else by chance
    for ids, answers, depths in zip(rows.ids.tolist(), rows.answers, rows.depths, strict=True):
        for at, depth in zip(answers, depths, strict=True):
            words = ids[at[0]:at[-1] + 1]
            planted = next(i for i in range(len(ids)) if ids[i:i + len(words)] == words)
            assert planted < at[0] and planted / len(ids) == pytest.approx(depth, abs=0.15)


def test_exact_match_counts_queries_with_every_token_right():
    rows = retrieval_rows(TINY_LM, "kv", length=600, count=2)

    def oracle(ids):
        return nn.functional.one_hot(ids.roll(-1, 1), 4096).float()

    def almost(ids):  # wrong in the last answer token of the first query of every row
        logits = oracle(ids)
        row = next(i for i, known in enumerate(rows.ids) if torch.equal(known, ids[0]))
        logits[0, rows.answers[row][0][-1] - 1] = 0
        return logits

    assert exact_match(oracle, rows) == (1.0, 8)
    assert exact_match(almost, rows) == (0.75, 8)


def test_figures_replace_their_earlier_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FILE", tmp_path / "figures.json")

    def speedup(value, bar=">= 1.6", where="here"):
        return Figure("line", "speed-up", value, bar, "x", where, "command")

    record(speedup(1.0), speedup(2.0, where="there"))
    record(speedup(1.7))
    entries = json.loads((tmp_path / "figures.json").read_text())
    assert [(entry["where"], entry["value"], entry["met"]) for entry in entries] == [
        ("here", 1.7, True), ("there", 2.0, True)]
    assert "MISSED speed-up: 1 x (>= 1.6)" in capsys.readouterr().out
    assert speedup(1.0, ">= 0.97, <= 1.03").met
    assert not speedup(1.04, ">= 0.97, <= 1.03").met


def test_the_figures_of_the_line_come_from_its_report(measured):
    report = measured[2].to_dict()
    report["rows"][1] |= {"length": 16384, "speedup": 1.8, "kl": 0.01, "dense_loss": 2.0, "sparse_loss": 2.02}
    found = {figure.figure: (figure.value, figure.met) for figure in figures_of(report, 1.7, 100.0, "command")}
    assert found["speed-up at 16384"] == (1.8, True)
    assert found["KL at 16384"] == (0.01, True)
    assert found["loss rise at 16384"] == (pytest.approx(1.0), False)
    assert found["wall time of the default bench"] == (100.0, True)
    assert f"speed-up at {LENGTHS[0]}, dense bucket" in found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("length", [512, 4096, 8192])
@pytest.mark.parametrize("kind", ["kv", "copy"])
def test_retrieval_survives(kind, length):
    model = load_model().model
    dense, sparse = compile_sides(model, Plan.default("cpu"))
    rows = retrieval_rows(TINY_LM, kind, length, count=12)
    with measuring(model):
        (before, queries), (after, _) = exact_match(dense, rows), exact_match(sparse, rows)
    assert before > 0.9
    assert (before - after) * queries <= math.ceil(queries / 100)


@pytest.mark.gpu
def test_a_gpu_is_measured_too(tokens, device, monkeypatch):
    monkeypatch.setattr(measurement, "MEASURED_SECONDS", 0.02)
    monkeypatch.setattr(crossover, "selection_pays", lambda *call: True)  # at these lengths it does not
    model = small_model().to(device, torch.bfloat16)
    report = sparsify.benchmark(model, tokens, LENGTHS, plan=PLAN)
    assert report.environment["device_name"] == torch.cuda.get_device_name(device)
    for row in report.rows:
        assert 0 < row.attention_share < 1
        assert row.kl < 0.1
    assert report.rows[0].density == 1.0 > report.rows[1].density


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_smollm2_keeps_its_quality():
    place = os.environ.get("SPARSIFY_SMOLLM2")
    if place is None:
        pytest.skip("SPARSIFY_SMOLLM2 names no GGUF file or folder of SmolLM2-135M; README.md says how to get it")
    loaded = load_model(place)
    report = sparsify.benchmark(loaded.model, read_text(HELDOUT_TEXT), [1024, 8192], tokenizer=loaded.tokenizer)
    short, long = report.rows
    assert short.kl < 1e-6
    assert long.kl < 0.02
    assert long.density < 0.8
    assert long.speedup > 1
