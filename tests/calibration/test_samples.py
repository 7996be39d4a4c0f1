"""Samples: streamed, the same whatever their order, a document in one share alone."""

import random

import pytest
import torch

from sparsify.calibration import Sample
from sparsify.calibration import samples as samples_module
from sparsify.calibration.samples import documents_needed, held_out, read_documents, windows_of
from sparsify.calibration.texts import read_samples
from sparsify.errors import SampleError, TextError
from sparsify.models.loading import TINY_LM, load_tokenizer

LENGTHS = [8, 16, 32]


def text(number: int, length: int) -> torch.Tensor:
    return torch.randint(1000, (length,), generator=torch.Generator().manual_seed(number))


def read(samples, most=100):
    return read_documents(samples, None, LENGTHS, dict.fromkeys(LENGTHS, most))


def test_order_and_repetition_change_nothing():
    texts = [text(i, 8 + i) for i in range(40)]
    shuffled = [*texts, *texts[:7]]
    random.shuffle(shuffled)
    known = read(texts, most=5)
    assert [x.name for x in read(shuffled, most=5)] == [x.name for x in known]
    assert held_out(read(shuffled, most=5), 0.3) == held_out(known, 0.3)


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    sizes = []
    rank = sorted

    def watch(values, **options):
        sizes.append(len(list(values)))
        return rank(values, **options)

    monkeypatch.setattr(samples_module, "sorted", watch, raising=False)
    documents = read((text(i, 100) for i in range(500)), most=4)
    assert len(documents) == 4
    assert all(len(x.tokens) == LENGTHS[-1] for x in documents)  # a span of the longest length, no more
    assert all(x.tokens.untyped_storage().nbytes() == 8 * LENGTHS[-1] for x in documents)


def test_an_endless_stream_ends(monkeypatch, caplog):
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 50)

    def endless():
        number = 0
        while True:
            yield text(number, 40)
            number += 1

    assert len(read(endless())) == 50
    assert "only the first 50 samples are read" in caplog.text


def test_short_documents_serve_short_lengths_only():
    documents = read([*(text(i, 10) for i in range(10)), *(text(100 + i, 40) for i in range(6)), text(200, 7)])
    held = held_out(documents, 0.5)
    counts = [len(shares.choosers) + len(shares.judges) for shares in (windows_of(documents, held, x) for x in LENGTHS)]
    assert counts == [16, 6, 6]


@pytest.mark.parametrize("holdout", [0.1, 0.3, 0.5, 0.8])
def test_a_document_is_in_one_share_and_both_have_their_part_of_every_kind(holdout):
    documents = read([Sample(text(i, 33 + i % 7), "code" if i % 3 else "prose") for i in range(60)])
    held = held_out(documents, holdout)
    for length in LENGTHS:
        shares = windows_of(documents, held, length)
        names = [{window.name.split(":")[0] for window in share} for share in (shares.choosers, shares.judges)]
        assert not names[0] & names[1]
        assert names[1] == held
        for kind, count in (("code", 40), ("prose", 20)):
            assert abs(sum(w.kind == kind for w in shares.judges) - holdout * count) <= 1
        assert {window.kind for window in shares.judges[:2]} == {"code", "prose"}  # a cap cuts off no kind


def test_windows_are_spans_of_their_documents():
    texts = [text(i, 50) for i in range(6)]
    spans = {tuple(x[i:i + 16].tolist()) for x in texts for i in range(35)}
    shares = windows_of(read(texts), frozenset(), 16)
    assert len(shares.choosers) == 6
    for window in shares.choosers:
        assert tuple(window.ids.tolist()) in spans
        assert torch.equal(window.arguments[0], window.ids[None])


@pytest.mark.parametrize(("holdout", "count"), [(0.5, 4), (0.3, 5), (0.1, 15), (0.9, 16)])
def test_it_says_how_many_documents_it_needs(holdout, count):
    assert documents_needed(holdout) == count
    enough, few = (held_out(read([text(i, 9) for i in range(n)]), holdout) for n in (count, count - 1))
    assert len(enough) >= 2 and count - len(enough) >= 2
    assert len(few) < 2 or count - 1 - len(few) < 2


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: ids[None], lambda ids: ids.int(),
                                  lambda ids: {"input_ids": ids[None]},
                                  lambda ids: {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}])
def test_token_ids_come_in_many_shapes(wrap):
    [document] = read([wrap(text(1, 20))])
    assert torch.equal(document.tokens, text(1, 20))


def test_whole_inputs_stay_as_they_are():
    image, step = torch.randn(1, 3, 4, 4), torch.tensor(7)
    padded = {"input_ids": text(1, 20)[None], "attention_mask": torch.arange(20)[None] > 3}
    by_inputs = {len(x.arguments) + len(x.keywords): x for x in read([(image, step, "mode"), image, padded])} | {}
    assert all(x.tokens is None for x in by_inputs.values())
    assert by_inputs[3].arguments[2] == "mode"
    [other] = [x for x in read([(image, step + 1), (image, step)]) if int(x.arguments[1]) == 8]
    assert other.name != by_inputs[2].name


@pytest.mark.parametrize(("given", "words"), [
    ([], "samples is empty"),
    ([text(1, 5), text(2, 7)], "as long as 8 tokens, the shortest of the lengths; the longest has 7"),
    (["words"], r"samples\[0\] is a string and there is no tokenizer"),
    ([text(1, 9), 3], r"samples\[1\] is a int without a tensor"),
    ([text(1, 9), torch.randn(1, 3)], r"samples\[1\] is whole inputs"),
])
def test_what_is_no_sample_says_so(given, words):
    with pytest.raises(SampleError, match=words):
        read(given)


def test_files_become_texts_or_pages(tmp_path):
    tokenizer = load_tokenizer(TINY_LM)
    (tmp_path / "many").write_text("<|endoftext|>".join(f"text number {i} " * 30 for i in range(30)))
    (tmp_path / "one").write_text("words of one long text, " * 900)
    many = list(read_samples([f"code={tmp_path / 'many'}"], tokenizer, [16, 64], 0.3, asked=False))
    assert len(many) == 30
    assert {x.kind for x in many} == {"code"}
    assert len({x.source for x in many}) == 30
    pages = list(read_samples([str(tmp_path / "one")], tokenizer, [16, 64, 4096], 0.3, asked=False))
    assert {len(x.inputs) for x in pages} == {64}
    assert len(pages) >= 14
    assert len({x.source for x in pages}) == 1
    (tmp_path / "empty").write_text(" ")
    with pytest.raises(TextError, match="is empty"):
        read_samples([str(tmp_path / "empty")], tokenizer, [16], 0.3, asked=False)
    with pytest.raises(TextError, match="cannot be read"):
        read_samples([str(tmp_path / "missing")], tokenizer, [16], 0.3, asked=False)


@pytest.mark.parametrize(("tokens", "lengths", "asked", "page"), [
    (2048, [128, 256], True, 256),  # five documents are enough for the longest
    (2048, [128, 256], False, 128),  # as far as documents reach: rather more pages
    (2048, [256], True, 256),
    (2048, [128, 512], False, 128),  # calibration leaves 512 out
    (640, [128], False, 128),
])
def test_pages_hold_the_lengths_asked_for(tokens, lengths, asked, page, tmp_path):
    (tmp_path / "text").write_text(" ".join(map(str, range(tokens))))
    pages = list(read_samples([str(tmp_path / "text")], one_word_a_token, lengths, 0.3, asked))
    assert [len(x.inputs) for x in pages] == [page] * (tokens // page)


@pytest.mark.parametrize(("tokens", "lengths", "asked", "words"), [
    (60, [128], False, "has 60 tokens: 0 pages of 128, and calibration takes 5, 640 tokens. Give more text, or"),
    (60, [128], True, "has 60 tokens: 0 pages of 128"),
    (639, [128, 256], False, "has 639 tokens: 4 pages of 128"),
    (2048, [128, 512], True, "4 pages of 512, .* takes 5, 2560 tokens. Give more text, or lengths up to 128"),
])
def test_too_few_pages_say_how_many_tokens_it_takes(tokens, lengths, asked, words, tmp_path):
    (tmp_path / "text").write_text(" ".join(map(str, range(tokens))))
    with pytest.raises(TextError, match=words):
        read_samples([str(tmp_path / "text")], one_word_a_token, lengths, 0.3, asked)


def test_the_kind_of_a_file_ends_at_the_first_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    for name in ("a=b/c.txt", "plain.txt"):
        (tmp_path / name).write_text("words " * 100)
    found = {(x.kind, x.source) for x in read_samples(["k=a=b/c.txt", "a=b/c.txt", "code=plain.txt", "plain.txt"],
                                                      one_word_a_token, [16], 0.3, asked=True)}
    assert found == {("k", "a=b/c.txt:0"), ("", "a=b/c.txt:0"), ("code", "plain.txt:0"), ("", "plain.txt:0")}


def one_word_a_token(pieces, add_special_tokens):
    return {"input_ids": [[int(word) % 1000 if word.isdigit() else 1 for word in piece.split()] for piece in pieces]}
