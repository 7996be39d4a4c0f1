"""Text files to samples, for the command line."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.calibration.samples import Sample, documents_needed
from sparsify.errors import TextError
from sparsify.measurement import encode
from sparsify.models.loading import read_text

log = logging.getLogger("sparsify")

SEPARATOR = "<|endoftext|>"
FEW_TEXTS = 20
"""Fewer texts than these are cut into pages."""
LEAST_PAGES = 14
"""A page is as long as the longest length of which there are as many, where no lengths are asked for."""


def read_samples(files: Sequence[str], tokenizer: Any, lengths: Sequence[int], holdout: float,
                 asked: bool) -> Iterator[Sample]:
    """One sample for every text of the files, or for every page where texts are few.

    files    paths of UTF-8 text, or KIND=PATH; texts in one file are separated by <|endoftext|>
    lengths  of windows, each at least 1: what pages must hold
    holdout  share of the documents that judge: both shares need some pages
    asked    whether these lengths were asked for: then every page must hold the longest
    Raises TextError.
    """
    texts: list[tuple[str, str, Tensor]] = []
    for file in files:
        kind, _, path = file.partition("=") if "=" in file and not Path(file).exists() else ("", "", file)
        for number, text in enumerate(part for part in read_text(path).split(SEPARATOR) if part.strip()):
            texts.append((kind, f"{path}:{number}", encode(text, tokenizer)))
    if not texts:
        raise TextError(f"text {', '.join(map(repr, files))} is empty. Give files with text.")
    if len(texts) >= FEW_TEXTS:
        return (Sample(ids, kind, source) for kind, source, ids in texts)

    def count(page: int) -> int:
        return sum(len(ids) // page for _, _, ids in texts)

    page = max(lengths) if asked else max((length for length in lengths if count(length) >= LEAST_PAGES),
                                          default=min(lengths))
    needed = documents_needed(holdout)
    if count(page) < needed:
        fitting = max((length for length in lengths if count(length) >= needed), default=None)
        raise TextError(f"text {', '.join(map(repr, files))} has {sum(len(ids) for _, _, ids in texts)} tokens: "
                        f"{count(page)} pages of {page}, and calibration takes {needed}, {needed * page} tokens. Give "
                        f"more text, or {'shorter lengths' if fitting is None else f'lengths up to {fitting}'}.")
    log.info("sparsify: %d texts are few: cut into %d pages of %d tokens. Pages of one text are alike: the plan will "
             "fit texts like these", len(texts), count(page), page)
    return (Sample(ids[start:start + page], kind, source) for kind, source, ids in texts
            for start in range(0, len(ids) - page + 1, page))
