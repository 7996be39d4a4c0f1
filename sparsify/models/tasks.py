"""Long-range retrieval tasks: text-like items planted in real text, and questions about them at the very end.

    rows = retrieval_rows(tiny_lm, "kv", length=2048, count=4)
    share, queries = exact_match(lambda ids: model(ids).logits, rows)

A row is built from *plants* (definitions) and *queries* (questions whose answer tokens are scored), put at random
places of a filler of real text. Every token carries the weight it has in training: 1 for real text, less for the frame
of an item, 0 for unpredictable content, ANSWER for answers. The recipe beside the shipped model trains on the same
items.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

ANSWER, FRAME, COPIED, UNPREDICTABLE = 4.0, 0.5, 1.0, 0.0
"""Training weights of the tokens of an item."""

KINDS = ("kv", "kv_many", "mv", "chain", "copy", "count", "max", "last")
"""kv: 8 key-value pairs, 4 asked; kv_many: one pair per 128 tokens; mv: 3 values of a key; chain: a value through 2
assignments; copy: 24 random words; count, max, last: number of marks, highest price, last price."""

ENCODE_PIECE = 20_000  # characters: the tokenizer works on pieces in parallel


@dataclass(frozen=True)
class Segment:
    """Some tokens of an item and their training weights."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Item:
    """The plants of an item, in order, and its query."""

    plants: list[Segment]
    query: Segment


@dataclass(frozen=True)
class Rows:
    """Rows of a task.

    ids      int64 [rows, length]
    answers  for every row and query, the positions of the tokens to be predicted
    depths   for every row and query, where what it asks for was planted, 0 first and 1 last; means of several
    """

    ids: Tensor
    answers: list[list[list[int]]]
    depths: list[list[float]]


def retrieval_rows(folder: str | Path, kind: str, length: int, count: int, seed: int = 0) -> Rows:
    """Rows of one kind, written into the held-out text of a model folder; equal arguments give equal rows."""
    tasks, tokens = Tasks(Path(folder) / "tokenizer.json"), heldout_tokens(folder)
    rng = np.random.default_rng([seed, length])
    rows = [tasks.eval_row(rng, length, kind, tokens[start:start + length])
            for start in rng.integers(0, len(tokens) - length, count)]
    ids, answers, depths = zip(*rows, strict=True)
    return Rows(torch.from_numpy(np.stack(ids).astype(np.int64)), list(answers), list(depths))


def exact_match(logits_of: Callable[[Tensor], Tensor], rows: Rows) -> tuple[float, int]:
    """Share of queries with every answer token right (greedy, teacher-forced within an answer), and their number.

    logits_of: ids [1, length] -> logits [1, length, vocabulary].
    """
    right: list[bool] = []
    for row, answers in zip(rows.ids, rows.answers, strict=True):
        best = logits_of(row[None])[0].argmax(-1).cpu()
        right += [bool((best[torch.tensor(at) - 1] == row[at]).all()) for at in answers]
    return sum(right) / max(1, len(right)), len(right)


@functools.cache  # seconds, and every length and kind asks for it
def heldout_tokens(folder: str | Path) -> np.ndarray:
    """heldout.txt of a model folder as one array of token ids."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = (Path(folder) / "heldout.txt").read_text(encoding="utf-8")
    pieces = [text[at:at + ENCODE_PIECE] for at in range(0, len(text), ENCODE_PIECE)]
    return np.concatenate([np.array(piece.ids, np.uint16) for piece in tokenizer.encode_batch(pieces)])


class Tasks:
    """Makes items for one tokenizer. The order in which a maker draws random numbers is part of its result."""

    def __init__(self, tokenizer_path: str | Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._words = np.array(sorted(i for token, i in self._tokenizer.get_vocab().items() if _is_word(token)))
        self._digits = np.array([self._tokenizer.token_to_id(str(digit)) for digit in range(10)])
        self._space = self._tokenizer.encode(" 1").ids[:-1]
        self._encoded: dict[str, list[int]] = {}

    def key_value(self, rng: np.random.Generator) -> Item:
        """A key of two words and its value, in one of three phrasings."""
        key, value = _unpredictable(self._key(rng)), self._value(rng)
        note = [("\n# NOTE: the code of", key, " is", _unpredictable(value), ".\n"),
                ("\n# NOTE: the code of", key, " is", _unpredictable(value), ".\n"),
                ("\nset", key, " =", _unpredictable(value), ";\n")]
        query = [("\n# QUERY: the code of", key, " is", _answer(value), ".\n"),
                 ("\nQuestion: code of", key, "?\nAnswer:", _answer(value), "\n"),
                 ("\nget", key, " =", _answer(value), ";\n")]
        style = rng.integers(0, 3)
        return Item([self._segment(*note[style])], self._segment(*query[style]))

    def several_values(self, rng: np.random.Generator, values: int | None = None) -> Item:
        """A key with several values, each planted by itself."""
        key = _unpredictable(self._key(rng))
        words = self._draw_words(rng, values or int(rng.integers(2, 5)))
        query: list[str | Segment] = ["\n# QUERY: all tags of", key, " are", _answer([words[0]])]
        for word in words[1:]:
            query += [",", _answer([word])]
        plants = [self._segment("\n# NOTE: one tag of", key, " is", _unpredictable([word]), ".\n") for word in words]
        return Item(plants, self._segment(*query, ".\n"))

    def chain(self, rng: np.random.Generator, hops: int | None = None) -> Item:
        """A value handed from name to name."""
        hops = int(rng.integers(1, 4)) if hops is None else hops
        keys = [_unpredictable(self._key(rng)) for _ in range(hops + 1)]
        value = self._number(rng, 4)
        plants = [self._segment("\nlet", keys[0], " =", _unpredictable(value), ";\n")]
        plants += [self._segment("\nlet", keys[i + 1], " =", keys[i], ";\n") for i in range(hops)]
        return Item(plants, self._segment("\n# QUERY: value of", keys[-1], " is", _answer(value), ".\n"))

    def copy(self, rng: np.random.Generator, words: int | None = None, text: np.ndarray | None = None) -> Item:
        """A run of random words, or sometimes of `text`, to be written again."""
        key = _unpredictable(self._key(rng))
        words = words or int(2 ** rng.uniform(4, 7.5))
        if text is not None and rng.random() < 0.4:
            start = rng.integers(0, max(1, len(text) - words))
            span = [int(token) for token in text[start:start + words]]
            given = wanted = Segment(span, [COPIED] * len(span))
        else:
            span = self._draw_words(rng, words)
            given, wanted = _unpredictable(span), _answer(span)
        return Item([self._segment("\n<copy", key, ">\n", given, "\n</copy>\n")],
                    self._segment("\n<paste", key, ">\n", wanted, "\n</paste>\n"))

    def count(self, rng: np.random.Generator) -> Item:
        """How many marks a key has."""
        key = _unpredictable(self._key(rng))
        marks = int(rng.integers(1, 10))
        return Item([self._segment("\n# MARK", key, ".\n") for _ in range(marks)],
                    self._segment("\n# QUERY: number of marks", key, " is", _answer(self._spell(marks)), ".\n"))

    def price(self, rng: np.random.Generator, highest: bool) -> Item:
        """The highest, or the last, of several prices of a key."""
        key = _unpredictable(self._key(rng))
        prices = rng.integers(100, 1000, int(rng.integers(2, 8)))
        plants = [self._segment("\n# PRICE of", _unpredictable(self._draw_words(rng, 1)), " in", key, " is",
                                _unpredictable(self._spell(price)), ".\n") for price in prices]
        which, value = ("highest", prices.max()) if highest else ("last", prices[-1])
        return Item(plants, self._segment(f"\n# QUERY: the {which} price in", key, " is",
                                          _answer(self._spell(value)), ".\n"))

    def eval_row(self, rng: np.random.Generator, length: int, kind: str,
                 filler: np.ndarray) -> tuple[np.ndarray, list[list[int]], list[float]]:
        """Plants anywhere and queries at the very end: ids [length]; of every query the answer positions, the depth."""
        make: dict[str, Callable[[], Item]] = {
            "kv": lambda: self.key_value(rng), "kv_many": lambda: self.key_value(rng),
            "mv": lambda: self.several_values(rng, 3), "chain": lambda: self.chain(rng, 2),
            "copy": lambda: self.copy(rng, 24), "count": lambda: self.count(rng),
            "max": lambda: self.price(rng, highest=True), "last": lambda: self.price(rng, highest=False),
        }
        asked = 2 if kind in ("copy", "count", "max", "last") else 4
        placed: list[tuple[float, Segment]] = []
        queries: list[Segment] = []
        depths: list[float] = []
        used = 0
        for i in range({"kv": 8, "kv_many": max(6, length // 128)}.get(kind, 4)):
            item = make[kind]()
            size = sum(len(plant.ids) for plant in item.plants) + (len(item.query.ids) if i < asked else 0)
            if used + size > length - 16 and i >= 1:
                if i < asked:
                    break
                continue
            used += size
            places = np.sort(rng.random(len(item.plants)) * 0.98)
            placed += zip(places, item.plants, strict=True)
            if i < asked:
                queries.append(item.query)
                depths.append(float(places.mean()))
        placed += [(2.0 + j, queries[j]) for j in rng.permutation(len(queries))]
        ids, weights, starts = self.assemble(length, placed, filler)
        starts = starts[len(starts) - len(queries):]
        answers = [[int(at) for at in np.nonzero(weights[start:end] >= ANSWER)[0] + start]
                   for start, end in zip(starts, [*starts[1:], length], strict=True)]
        return ids, answers, depths

    def assemble(self, length: int, placed: Sequence[tuple[float, Segment]],
                 filler: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Segments at their places (shares of the filler, 1 and above: behind it), real text between them.

        Returns ids uint16 [length], weights float16 [length], and where each segment starts, in order. Raises
        ValueError if the segments do not fit, or the filler does not fill.
        """
        placed = sorted(placed, key=lambda place: place[0])
        room = length - sum(len(segment.ids) for _, segment in placed)
        if not 0 <= room <= len(filler):
            raise ValueError(f"{room} tokens of filler are needed and {len(filler)} given.")
        ids, weights = np.empty(length, np.uint16), np.ones(length, np.float16)
        starts: list[int] = []
        at = filled = 0
        for place, segment in placed:
            gap = max(0, int(min(place, 1.0) * room) - filled)
            ids[at:at + gap] = filler[filled:filled + gap]
            at, filled = at + gap, filled + gap
            starts.append(at)
            end = at + len(segment.ids)
            ids[at:end], weights[at:end] = segment.ids, segment.weights
            at = end
        ids[at:] = filler[filled:filled + length - at]
        return ids, weights, starts

    def _segment(self, *parts: str | Segment) -> Segment:
        ids: list[int] = []
        weights: list[float] = []
        for part in parts:
            if isinstance(part, str):
                part = Segment(self._encode(part), [FRAME] * len(self._encode(part)))
            ids += part.ids
            weights += part.weights
        return Segment(ids, weights)

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer.encode(text).ids
        return self._encoded[text]

    def _draw_words(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(word) for word in self._words[rng.integers(0, len(self._words), count)]]

    def _key(self, rng: np.random.Generator) -> list[int]:
        return self._draw_words(rng, 2)

    def _number(self, rng: np.random.Generator, digits: int) -> list[int]:
        return self._space + [int(digit) for digit in self._digits[rng.integers(0, 10, digits)]]

    def _spell(self, number: int) -> list[int]:
        return self._space + [int(self._digits[int(digit)]) for digit in str(number)]

    def _value(self, rng: np.random.Generator) -> list[int]:
        if rng.random() < 0.5:
            return self._number(rng, int(rng.integers(3, 6)))
        return self._draw_words(rng, int(rng.integers(1, 4)))


def _answer(ids: list[int]) -> Segment:
    return Segment(ids, [ANSWER] * len(ids))


def _unpredictable(ids: list[int]) -> Segment:
    return Segment(ids, [UNPREDICTABLE] * len(ids))


def _is_word(token: str) -> bool:
    word = token.removeprefix("Ġ")
    return token.startswith("Ġ") and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower()
