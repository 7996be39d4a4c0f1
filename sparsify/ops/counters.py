"""Counters of kept and allowed blocks, on request.

    with counting() as counters:
        model(ids)
    counters.density(site)      # of the last call of that site, or None

While nobody counts, an op pays one look at a list. While somebody does, it adds two small tensors to the record: on
CUDA nothing waits for the device until `density` is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Counters:
    """Kept and allowed key blocks of the last call of every attention site."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, site: int, kept: Tensor, allowed: Tensor) -> None:
        """Keep the totals of one call, as 0-d tensors on their device."""
        self._last[site] = kept, allowed

    def blocks(self, site: int) -> tuple[int, int] | None:
        """Kept and allowed blocks of the last call, or None if the site did not run sparse."""
        if site not in self._last:
            return None
        kept, allowed = self._last[site]
        return int(kept), int(allowed)

    def density(self, site: int) -> float | None:
        """Kept share of the allowed blocks in the last call, or None if the site did not run sparse."""
        blocks = self.blocks(site)
        return None if blocks is None else blocks[0] / max(1, blocks[1])

    def sites(self) -> list[int]:
        """Sites that ran sparse."""
        return sorted(self._last)


class Totals(Counters):
    """The same over all calls of a site: one that runs twice in a model, or site 0 of several graphs."""

    def record(self, site: int, kept: Tensor, allowed: Tensor) -> None:
        if site in self._last:
            kept_before, allowed_before = self._last[site]
            kept, allowed = kept.to(kept_before.device) + kept_before, allowed.to(kept_before.device) + allowed_before
        self._last[site] = kept, allowed


_ACTIVE: list[Counters] = []


@contextmanager
def counting(counters: Counters | None = None) -> Iterator[Counters]:
    """Count what the ops keep while the context is open, in `counters` or new ones."""
    counters = Counters() if counters is None else counters
    _ACTIVE.append(counters)
    try:
        yield counters
    finally:
        _ACTIVE.remove(counters)


def is_counting() -> bool:
    """Whether anybody asks for counts."""
    return bool(_ACTIVE)


def record_all(site: int) -> None:
    """Report one call that dropped nothing."""
    everything = torch.ones((), dtype=torch.int64)  # no count of blocks, but a share of one
    for counters in _ACTIVE:
        counters.record(site, everything, everything)


def record(site: int, counts: Tensor, allowed: Tensor) -> None:
    """Report one call: `counts` of its kept lists, `allowed` bool [B or 1, query blocks, key blocks]."""
    batch, heads = counts.shape[:2]
    allowed_blocks = allowed.sum((-1, -2)).expand(batch).sum() * heads
    # The padding id of an evened-out list is no block; a list longer than what is allowed holds one.
    kept = torch.minimum(counts, allowed.sum(-1)[:, None]).sum()
    for counters in _ACTIVE:
        counters.record(site, kept, allowed_blocks)
