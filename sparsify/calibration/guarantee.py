"""Calibrated confidence: how far each head's tolerance must be lowered so that few query blocks miss a peak.

    miss        a query block drops a key block whose true peak is at least the tolerance
    need        of a key block: the log by which the tolerance must fall until selection keeps it. Of a query block: the
                largest need among its key blocks with true peaks at or above the tolerance; lowered that far it misses
                nothing. Forced blocks need nothing, a query block that keeps more than `max_density` keeps all, and the
                block that evens out a list comes with the one before it
    shift       a head's factor on the tolerance, exp(-need) at a quantile of its query blocks' needs
    document    what may be exchanged for another of its kind: rows and query blocks of one document are alike

What is kept of a document is a sketch per site and head (`sketch`): histograms of needs, a few hundred numbers however
long the document is.

The fit. A target of 0.95 allows a share a = 0.05 of misses. Every head gets the least shift at which its share of
misses is at most a level; the share is drawn toward that of all heads by as much as its own is uncertain (`_shares`).
The level is the largest at which documents that had no part in the shifts (five folds) miss at most a *by an upper
confidence bound of their mean*, Student's t over documents. So few documents, or documents that differ, cost density
and not the promise. The bound assumes that document means are about normal. A bound without that assumption over n
documents cannot promise less than 1 / (n + 1): conformal risk control (arXiv 2208.02814), of which this is the same
rule, a threshold picked by the risk of exchangeable units, with another bound, would need 99 documents for 0.99.

Each bucket is fitted by itself: needs do not transfer between lengths. Kinds of text that calibration has not seen have
no promise, but an estimate: `Promise.elsewhere`, the worst kind when it is left out.

Source: split conformal quantiles per group, documents as groups (arXiv 1809.07441), partial pooling by the method of
moments (James and Stein 1961; Efron and Morris 1975).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.bounds import Bounds, Promise
from sparsify.calibration.gate import upper_bound
from sparsify.errors import OptionError
from sparsify.kernels.blocks import allowed_blocks, boundary_blocks, forced_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.true_peaks import true_peaks
from sparsify.ops.select import estimate_peaks
from sparsify.plan import Budget

TARGETS = (0.90, 0.95, 0.99)
LEAST_DOCUMENTS = 5
FOLDS = 5
STEP, STEPS = 1 / 32, 192
"""Needs are sorted into steps of 3 %, up to e^-6 = 1/403 of the tolerance; a head that needs more keeps everything."""
LEVELS = (*(i / 40 for i in range(40, -1, -1)), -1)
"""Shares of the allowed misses that are tried as the level of every head; at -1 all heads keep everything."""
NEEDS, BLOCKS, MASS = range(3)
"""What a sketch counts, by need: query blocks; allowed key blocks; the true mass of these, in query blocks."""


@dataclass
class Document:
    """One document: its kind, and per site a sketch [3, H, STEPS + 2], float32 on the CPU, see `sketch`."""

    kind: str = ""
    sketches: dict[int, Tensor] = field(default_factory=dict)


class Collector:
    """Sketches of the documents that a model runs on; `watch` is called by every attention site.

    budget_of  the budget of a site, by its index; dense sites are passed over
    """

    def __init__(self, budget_of: Callable[[int], Budget]) -> None:
        self.budget_of = budget_of
        self.documents: list[Document] = []
        self._open: Document | None = None

    @contextmanager
    def document(self, kind: str = "") -> Iterator[None]:
        """What runs inside belongs to one document; it counts when it ends without an error."""
        self._open = Document(kind)
        try:
            yield
            self.documents.append(self._open)
        finally:
            self._open = None

    def watch(self, site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> None:
        """Note one call of a site, shapes as in `sparsify.ops`; the batch belongs to the open document."""
        budget = self.budget_of(site)
        if self._open is None or budget.is_dense:
            return
        new, known = sketch(q, k, scale, masks, budget).cpu(), self._open.sketches.get(site)
        if known is not None and known.shape != new.shape:
            known, new = None, new[:, :0]  # two graphs call different sites by one number: no promise for either
        self._open.sketches[site] = new if known is None else known + new


def sketch(q: Tensor, k: Tensor, scale: float, masks: Masks, budget: Budget) -> Tensor:
    """Histograms of needs under a budget: [3, H, STEPS + 2], float32; `NEEDS`, `BLOCKS` and `MASS` of every head.

    Entry 0: no need to lower the tolerance; entry j: a need above STEP * (j - 1) and up to STEP * j; the last: more.
    """
    assert budget.tolerance is not None
    q_len, kv_len = q.shape[2], k.shape[2]
    peaks, mass = true_peaks(q, k, scale=scale, masks=masks)
    estimate = estimate_peaks(q, k, scale, masks, budget.singles).to(peaks.dtype)
    allowed = allowed_blocks(masks, q_len, kv_len, q.device)
    boundary = boundary_blocks(q_len, kv_len, masks.causal_offset, q.device)
    forced = forced_blocks(allowed, boundary, budget.sinks, budget.local)[:, None]
    allowed = allowed[:, None].expand_as(peaks)
    needs = (budget.tolerance / estimate).log().masked_fill(forced, -torch.inf).masked_fill(~allowed, torch.inf)
    number = allowed.sum(-1, keepdim=True)
    most = (budget.max_density * number).long()  # kept blocks beyond it are all blocks
    ordered = needs.sort(dim=-1, stable=True)
    whole = ordered.values.gather(-1, most.clamp(max=needs.shape[-1] - 1)).masked_fill(most >= number, torch.inf)
    paired = ordered.values.clone()
    paired[..., 1::2] = ordered.values[..., : paired.shape[-1] - 1: 2]  # lists are even: in pairs
    needs = torch.minimum(torch.empty_like(needs).scatter_(-1, ordered.indices, paired), whole)
    of_rows = needs.masked_fill(~allowed | (peaks < budget.tolerance), -torch.inf).amax(-1)

    counted = number[..., 0] > 0  # rows that see nothing, as padding does, are no query blocks
    # float64: on a GPU the order of a sum is not the same in every run, its float32 should be
    result = torch.zeros(3, q.shape[1], STEPS + 2, dtype=torch.float64, device=q.device)
    for what, x, weight in ((NEEDS, of_rows, counted), (BLOCKS, needs, allowed), (MASS, needs, mass * allowed)):
        steps = (x / STEP).ceil().nan_to_num(0.0).clamp(0, STEPS + 1).long()
        steps, weight = (y.transpose(0, 1).flatten(1) for y in (steps, weight.expand_as(steps).double()))
        result[what].scatter_add_(1, steps, weight)
    return result.float()


def fit(documents: Sequence[Document], targets: Sequence[float] = TARGETS) -> Bounds:
    """The bounds of a bucket from the sketches of its documents, all under the same budgets.

    Raises OptionError for fewer than LEAST_DOCUMENTS documents.
    """
    if len(documents) < LEAST_DOCUMENTS:
        raise OptionError(f"documents has {len(documents)} documents. A guarantee needs at least {LEAST_DOCUMENTS}: "
                          "give more, and several of each kind.")
    sizes: dict[int, set[int]] = {}
    for document in documents:
        for site, found in document.sketches.items():
            sizes.setdefault(site, set()).add(found.shape[1])
    heads = {site: max(found) for site, found in sorted(sizes.items()) if len(found) == 1 and max(found)}
    sites = list(heads)
    if not sites:
        raise OptionError("documents has no sparse site: there is nothing to promise. Leave the bounds out.")
    counts = torch.stack([torch.cat([document.sketches.get(site, torch.zeros(3, heads[site], STEPS + 2))
                                     for site in sites], 1) for document in documents]).double()
    kinds = [document.kind for document in documents]
    data = _Counts(counts)
    promises = {target: _promise(data, kinds, target, heads) for target in targets}
    return Bounds(len(documents), int(counts[:, NEEDS].sum()), tuple(sorted(set(kinds) - {""})), promises)


class _Counts:
    """What n documents count, by the step to which a head's tolerance falls: [n, heads, STEPS + 2].

    At step j the first j + 1 entries of a sketch are kept; at the last everything is.
    """

    def __init__(self, counts: Tensor) -> None:
        kept = counts.cumsum(-1)
        total = kept[..., -1:]
        self.misses = (total - kept)[:, NEEDS]
        self.blocks, self.mass = kept[:, BLOCKS], kept[:, MASS]
        self.query_blocks, self.all_blocks, self.all_mass = total[:, NEEDS, :, 0], total[:, BLOCKS], total[:, MASS]

    def rates(self, steps: Tensor, rows: Sequence[int]) -> Tensor:
        """Share of query blocks that miss a peak in each of these documents, over all heads."""
        return self._at(self.misses, steps, rows) / self.query_blocks[rows].sum(-1).clamp(min=1)

    def coverages(self, steps: Tensor, rows: Sequence[int]) -> Tensor:
        """Share of the true mass that these documents keep."""
        return self._at(self.mass, steps, rows) / self.all_mass[rows].sum((-1, -2)).clamp(min=1e-12)

    def densities(self, steps: Tensor, rows: Sequence[int]) -> Tensor:
        """Share of the allowed key blocks that these documents keep."""
        return self._at(self.blocks, steps, rows) / self.all_blocks[rows].sum((-1, -2)).clamp(min=1)

    def _at(self, of_steps: Tensor, steps: Tensor, rows: Sequence[int]) -> Tensor:
        return of_steps[rows].gather(-1, steps[None, :, None].expand(len(rows), -1, 1)).sum((-1, -2))


def _promise(data: _Counts, kinds: Sequence[str], target: float, heads: Mapping[int, int]) -> Promise:
    """The largest level that keeps the promise on documents that had no part in the shifts."""
    everything = range(len(kinds))
    most = 1 - target
    order = sorted(everything, key=lambda i: kinds[i])  # every fold has its share of each kind
    folds = [order[fold::FOLDS] for fold in range(FOLDS)]
    shares = [_shares(data, [i for i in everything if i not in fold]) for fold in folds]
    for level in LEVELS:
        steps = [_steps(share, level * most) for share in shares]
        rates = torch.cat([data.rates(step, fold) for step, fold in zip(steps, folds, strict=True)])
        misses = upper_bound(rates.tolist())
        if misses <= most:
            break
    coverages = torch.cat([data.coverages(step, fold) for step, fold in zip(steps, folds, strict=True)])
    final = _steps(_shares(data, everything), level * most)
    shifts = [0.0 if step > STEPS else math.exp(-STEP * step) for step in final.tolist()]
    of_sites = {}
    for site, count in heads.items():
        of_sites[site], shifts = tuple(round(shift, 6) for shift in shifts[:count]), shifts[count:]
    elsewhere = _elsewhere(data, kinds, level * most)
    coverage = 1 - upper_bound((1 - coverages).tolist())
    density = float(data.densities(final, everything).mean())
    return Promise(round(misses, 6), None if elsewhere is None else round(elsewhere, 6), round(coverage, 6),
                   round(density, 6), of_sites)


def _elsewhere(data: _Counts, kinds: Sequence[str], level: float) -> float | None:
    """The bound on the worst kind of text, each left out in turn; None where there are not two."""
    bounds = []
    for kind in sorted(set(kinds)):
        inside = [i for i, x in enumerate(kinds) if x == kind]
        outside = [i for i, x in enumerate(kinds) if x != kind]
        if len(inside) > 1 and len(outside) > 1:
            bounds.append(upper_bound(data.rates(_steps(_shares(data, outside), level), inside).tolist()))
    return max(bounds) if len(bounds) > 1 else None


def _shares(data: _Counts, rows: Sequence[int]) -> Tensor:
    """Share of query blocks that miss a peak at every step, by head and shrunk: [heads, STEPS + 2].

    A head's own share counts by t / (t + v): t is the variance between heads, v that of the head's share between
    documents, and at least what independent query blocks with the share of all heads would have.
    """
    misses, query_blocks = data.misses[rows], data.query_blocks[rows][..., None]
    total = query_blocks.sum(0).clamp(min=1)
    share = misses.sum(0) / total
    pooled = share.mean(0)
    between_documents = (misses - share * query_blocks).square().sum(0) / total.square() * len(rows) / (len(rows) - 1)
    within = torch.maximum(between_documents, pooled * (1 - pooled) / total)
    between = (share.var(0) - within.mean(0)).clamp(min=0) if len(share) > 1 else torch.ones_like(pooled)
    return pooled + between / (between + within).clamp(min=1e-30) * (share - pooled)


def _steps(shares: Tensor, level: float) -> Tensor:
    """The first step of each head from which on its share stays at or below the level; the last keeps everything."""
    above = shares.flip(-1).cummax(-1).values.flip(-1) > level
    return above.sum(-1).clamp(max=shares.shape[-1] - 1)
