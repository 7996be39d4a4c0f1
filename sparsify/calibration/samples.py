"""Samples to documents, documents to windows of each length, windows to two shares: to choose on, and to judge on.

A sample is read once and may come from a generator. Kept are, per kind and length, the documents with the smallest hash
of their content, and of each a span of the longest length: memory does not grow with the samples, the order of those
that are read (MOST_SAMPLES) does not matter, and the same samples give the same windows. A document is wholly in one
share, whatever the length.
"""

import ctypes
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SampleError

log = logging.getLogger("sparsify")

MOST_SAMPLES = 4096
"""Read at most: samples may come from a generator without end."""
LEAST_JUDGES, LEAST_CHOOSERS = 2, 2
"""Documents that a length needs in each share; a bound over two documents is eight times as wide as over ten."""


@dataclass(frozen=True)
class Sample:
    """A sample with a label.

    inputs  what a sample may be: token ids [tokens] or [1, tokens], a string, a tensor, a tuple or a dict of inputs
    kind    of document: "prose", "code" ...; every kind must pass the gate by its mean, and counts in both shares
    source  the text that it is a page of. Pages of few texts are alike: the plan says of how many
    """

    inputs: Any
    kind: str = ""
    source: str = ""


@dataclass(frozen=True)
class Document:
    """A sample as the model takes it: token ids that windows are cut from, or whole inputs."""

    name: str
    kind: str
    source: str
    tokens: Tensor | None = None
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> str:
        """The shapes of whole inputs: alike for all that meet the same key lengths."""
        return repr(_outline([list(self.arguments), dict(self.keywords)]))


@dataclass(frozen=True)
class Window:
    """What the model runs on. `ids` [length] are its tokens, on the CPU; None for whole inputs."""

    name: str
    kind: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    ids: Tensor | None = None


@dataclass(frozen=True)
class Shares:
    """The windows of one length: those that choose, and those held out to judge. One a document."""

    choosers: tuple[Window, ...]
    judges: tuple[Window, ...]


def read_documents(samples: Iterable[Any], encode: Callable[[str], Tensor] | None, lengths: Sequence[int],
                   most: Mapping[int, int]) -> list[Document]:
    """Read samples; keep at most `most[length]` documents of each kind that are long enough for a length.

    lengths  of windows, ascending. Whole inputs count for every length
    encode   makes token ids of a string; None: strings are refused
    Raises SampleError for what is no sample, for token ids beside whole inputs, and if nothing is left.
    """
    pool: dict[str, Document] = {}
    ranks: dict[tuple[str, int], list[str]] = {}
    are_texts, longest = None, 0
    for number, sample in enumerate(samples):
        if number >= MOST_SAMPLES:
            log.warning("sparsify: only the first %d samples are read. Shuffle them if kinds come one behind the "
                        "other.", MOST_SAMPLES)
            break
        document = _document(sample, number, encode, lengths[-1])
        if are_texts not in (None, document.tokens is not None):
            raise SampleError(f"samples[{number}] is {'whole inputs' if document.tokens is None else 'token ids'} and "
                              "the samples before are not. Give one or the other.")
        are_texts = document.tokens is not None
        longest = max(longest, 0 if document.tokens is None else len(document.tokens))
        if document.name in pool:
            continue
        pool[document.name] = document
        for length in lengths if document.tokens is None else [x for x in lengths if x <= len(document.tokens)]:
            kept = ranks.setdefault((document.kind, length), [])
            kept.append(document.name)
            kept.sort()
            del kept[most[length]:]
        wanted = {name for names in ranks.values() for name in names}
        pool = {name: known for name, known in pool.items() if name in wanted}
    if are_texts is None:
        raise SampleError("samples is empty. Give documents: token ids, strings, or inputs of the model.")
    if not pool:
        raise SampleError(f"samples has no document as long as {lengths[0]} tokens, the shortest of the lengths; the "
                          f"longest has {longest}. Give longer documents, or shorter lengths.")
    return sorted(pool.values(), key=lambda x: x.name)


def documents_needed(holdout: float) -> int:
    """The fewest documents of which both shares get enough."""
    count = LEAST_JUDGES + LEAST_CHOOSERS
    while sum(_is_held_out(i, holdout) for i in range(count)) not in range(LEAST_JUDGES, count - LEAST_CHOOSERS + 1):
        count += 1
    return count


def held_out(documents: Sequence[Document], holdout: float) -> frozenset[str]:
    """Names of the documents to judge on: of every kind and of all lengths their share."""
    held = set()
    for kind in {x.kind for x in documents}:
        alike = [x for x in documents if x.kind == kind]
        alike.sort(key=lambda x: (-(0 if x.tokens is None else len(x.tokens)), x.name))
        held |= {x.name for i, x in enumerate(alike) if _is_held_out(i, holdout)}
    return frozenset(held)


def windows_of(documents: Sequence[Document], held: frozenset[str], length: int) -> Shares:
    """One window of every document that is long enough, the kinds in turn; whole inputs as they are."""
    places: dict[str, int] = {}
    ordered = []
    for document in documents:
        if document.tokens is None or len(document.tokens) >= length:
            places[document.kind] = places.get(document.kind, -1) + 1
            ordered.append((places[document.kind], document.kind, document))
    ordered.sort(key=lambda x: x[:2])
    windows = [(document.name in held, _window(document, length)) for _, _, document in ordered]
    return Shares(tuple(window for judges, window in windows if not judges),
                  tuple(window for judges, window in windows if judges))


def _is_held_out(place: int, holdout: float) -> bool:
    """Whether the document at this place judges: evenly spread, the second of three first."""
    return int((place + 1) * holdout + 0.5) > int(place * holdout + 0.5)


def _document(sample: Any, number: int, encode: Callable[[str], Tensor] | None, longest: int) -> Document:
    sample = sample if isinstance(sample, Sample) else Sample(sample)
    inputs, kind = sample.inputs, sample.kind
    if isinstance(inputs, str):
        if encode is None:
            raise SampleError(f"samples[{number}] is a string and there is no tokenizer. Give tokenizer=, or token "
                              "ids.")
        inputs = encode(inputs)
    tokens = _tokens(inputs)
    if tokens is not None:
        name = _hash([tokens])
        start = int(name[:8], 16) % (len(tokens) - longest + 1) if len(tokens) > longest else 0
        return Document(name, kind, sample.source or name, tokens[start:start + longest].detach().cpu().clone())
    if isinstance(inputs, Mapping):
        name = _hash(dict(inputs))
        return Document(name, kind, sample.source or name, None, (), dict(inputs))
    arguments = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not any(isinstance(x, Tensor) for x in _leaves(list(arguments))):
        raise SampleError(f"samples[{number}] is a {type(inputs).__name__} without a tensor. Give token ids, a string, "
                          "a tensor, a tuple or a dict of inputs, or a Sample of one.")
    name = _hash(list(arguments))
    return Document(name, kind, sample.source or name, None, arguments)


def _tokens(inputs: Any) -> Tensor | None:
    """The token ids of a text, if that is what a sample is: whole numbers, alone or under the name input_ids."""
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        mask = inputs.get("attention_mask")
        if set(inputs) - {"input_ids", "attention_mask"} or (isinstance(mask, Tensor) and not bool(mask.all())):
            return None
        inputs = inputs["input_ids"]
    if not isinstance(inputs, Tensor) or inputs.dtype not in (torch.int64, torch.int32):
        return None
    if inputs.dim() == 2 and len(inputs) == 1:
        inputs = inputs[0]
    return inputs.long() if inputs.dim() == 1 else None


def _window(document: Document, length: int) -> Window:
    if document.tokens is None:
        return Window(document.name, document.kind, document.arguments, document.keywords)
    spare = len(document.tokens) - length
    start = int(document.name[8:16], 16) % (spare + 1)
    ids = document.tokens[start:start + length]
    return Window(f"{document.name}:{start}:{length}", document.kind, (ids[None],), {}, ids)


def _hash(data: Any) -> str:
    """Hex digits of tensors and plain values in lists and dicts."""
    state = hashlib.sha256(repr(_outline(data)).encode())
    for leaf in _leaves(data):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous()
            state.update(ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.numel() else b"")
        else:
            state.update(repr(leaf).encode())
    return state.hexdigest()[:32]


def _leaves(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        return [leaf for name in sorted(data) for leaf in _leaves(data[name])]
    if isinstance(data, list | tuple):
        return [leaf for x in data for leaf in _leaves(x)]
    return [data]


def _outline(data: Any) -> Any:
    """The same with shapes and dtypes in place of tensors."""
    if isinstance(data, Mapping):
        return {name: _outline(data[name]) for name in sorted(data)}
    if isinstance(data, list | tuple):
        return [_outline(x) for x in data]
    return (str(data.dtype), list(data.shape)) if isinstance(data, Tensor) else type(data).__name__
