"""Estimates of every row's share of attention per key block: the product's, and what it is compared with.

    oracle       the true shares
    split-m      split summaries, the product's (`kernels/oracle.py`): m keys single, mean and variance of the rest
    sub-w        means of w keys, on the diagonal too: one kind of estimate for all blocks of a row
    kmeans-8     8 cluster means, with the variance inside clusters averaged over the head: the fitted constant
    kmeans-7v    7 cluster means, and one variance per block

A row's estimate is a log mass per key block; blocks that the causal edge cuts are exact for all but sub-w.
Source: ARCHITECTURE.md for split summaries; farthest-first seeds (Gonzalez 1985) and Lloyd's iterations for k-means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.thesis.policies import Signals
from sparsify.kernels import oracle
from sparsify.kernels.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    SplitSummaries,
    allowed_blocks,
    count_blocks,
)
from sparsify.kernels.masks import Masks

WORKSPACE = {"cpu": 1 << 22, "cuda": 1 << 28}  # scores at a time
LLOYD_STEPS = 4


class Estimator(NamedTuple):
    """`prepare` reads the keys [B, Hkv, L, D] once; `log_mass` gives [B, H, rows, blocks] for rows of q, scaled."""

    prepare: Callable[[Tensor], Any]
    log_mass: Callable[[Tensor, Any, int, int], Tensor]  # q * scale, prepared, first row, key blocks
    exact_edge: bool
    vectors: int  # per key block: what an estimate costs


class Clusters(NamedTuple):
    """Means of runs or clusters of keys: centers [B, Hkv, n, blocks, D], log counts [B, Hkv, n, blocks]."""

    centers: Tensor
    log_count: Tensor
    variance: Tensor | None  # per channel, [B, Hkv, blocks or 1, D]


def estimator(name: str) -> Estimator:
    """The estimator of this name."""
    kind, _, size = name.partition("-")
    if kind == "split":
        m = int(size)
        return Estimator(lambda k: oracle.summarise_keys(k, m), _split_mass, True, m + 2)
    if kind == "sub":
        width = int(size)
        return Estimator(lambda k: _runs(k, width), _run_mass, False, KEY_BLOCK // width)
    if name == "kmeans-8":
        return Estimator(lambda k: _clusters(k, 8, whole_head=True), _cluster_mass, True, 8)
    if name == "kmeans-7v":
        return Estimator(lambda k: _clusters(k, 7, whole_head=False), _cluster_mass, True, 8)
    raise ValueError(f"estimator {name!r} is not known. Give oracle, split-M, sub-W, kmeans-8 or kmeans-7v.")


def row_chunks(q: Tensor) -> list[tuple[int, int]]:
    """First and last row of chunks of whole query blocks; a chunk's scores against the keys it sees fit WORKSPACE."""
    batch, heads, length, _ = q.shape
    chunks, first = [], 0
    while first < length:
        rows = QUERY_BLOCK
        while first + rows < length and (batch * heads * 2 * rows * min(length, first + 2 * rows)
                                         <= WORKSPACE[q.device.type]):
            rows *= 2
        last = min(length, first + rows)
        chunks.append((first, last))
        first = last
    return chunks


def log_masses(name: str, q: Tensor, k: Tensor, scale: float, prepared: Any, first: int, last: int) -> Tensor:
    """Log mass of every key block for rows first to last, -inf where not allowed: [B, H, rows, key blocks they see]."""
    rows, keys = q[:, :, first:last], k[:, :, :last]
    if name == "oracle":
        return oracle.exact_block_mass(rows, keys, scale, Masks(first))
    used, blocks = estimator(name), count_blocks(last, KEY_BLOCK)
    mass = used.log_mass(rows * scale, prepared, first, blocks)
    if used.exact_edge:
        mass = _with_exact_edge(mass, rows, keys[:, :, first:], scale, first)
    allowed = _by_row(allowed_blocks(Masks(first), last - first, last, q.device)[0], last - first)
    return mass.masked_fill(~allowed, -torch.inf)


def signals_of(name: str, q: Tensor, k: Tensor, scale: float) -> Signals:
    """Largest and mean estimated share of every pair of blocks, causal; q [B, H, L, D], k [B, Hkv, L, D], float32."""
    batch, heads, length, _ = q.shape
    shape = (batch, heads, count_blocks(length, QUERY_BLOCK), count_blocks(length, KEY_BLOCK))
    peaks, means = (torch.zeros(shape, device=q.device) for _ in range(2))
    prepared = prepare(name, k)
    for first, last in row_chunks(q):
        found = oracle.shares_of(log_masses(name, q, k, scale, prepared, first, last), Masks())
        at = slice(first // QUERY_BLOCK, count_blocks(last, QUERY_BLOCK))
        peaks[:, :, at, : found.shape[-1]] = oracle.peaks(found)
        means[:, :, at, : found.shape[-1]] = mean_of_rows(found)
    return Signals(peaks, means)


def prepare(name: str, k: Tensor) -> Any:
    """What the estimator reads from the keys."""
    return None if name == "oracle" else estimator(name).prepare(k)


def mean_of_rows(x: Tensor) -> Tensor:
    """Mean over the rows of every query block: [B, H, rows, n] to [B, H, query blocks, n]."""
    rows = x.shape[2]
    pad = -rows % QUERY_BLOCK
    sums = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, QUERY_BLOCK)).sum(3)
    starts = torch.arange(sums.shape[2], device=x.device) * QUERY_BLOCK
    return sums / (rows - starts).clamp(max=QUERY_BLOCK)[:, None]


def _with_exact_edge(mass: Tensor, q: Tensor, k: Tensor, scale: float, first: int) -> Tensor:
    """Log masses with the blocks on the diagonal exact; q and k are the rows and keys from `first` on.

    A query block and the keys of its own positions are one small causal attention; padded keys are seen by no row.
    """
    rows, blocks = mass.shape[2:]
    own = QUERY_BLOCK // KEY_BLOCK

    def fold(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % QUERY_BLOCK))
        return padded.unflatten(2, (-1, QUERY_BLOCK)).transpose(1, 2).flatten(0, 1)

    exact = oracle.exact_block_mass(fold(q), fold(k), scale, Masks(0)).unflatten(0, (len(q), -1)).transpose(1, 2)
    whole = torch.nn.functional.pad(mass, (0, -blocks % own, 0, -rows % QUERY_BLOCK)).unflatten(2, (-1, QUERY_BLOCK))
    places = torch.arange(whole.shape[2] * own, device=q.device).view(-1, 1, own) + first // KEY_BLOCK
    return whole.scatter(-1, places.expand_as(exact), exact).flatten(2, 3)[:, :, :rows, :blocks]


def _by_row(blocks: Tensor, rows: int) -> Tensor:
    return blocks.repeat_interleave(QUERY_BLOCK, 0)[:rows]


def _split_mass(q: Tensor, summaries: SplitSummaries, first: int, blocks: int) -> Tensor:
    seen = SplitSummaries(summaries.singles[:, :, :, :blocks], summaries.mean[:, :, :blocks],
                          summaries.variance[:, :, :blocks], summaries.single_count[:, :blocks],
                          summaries.rest_count[:, :blocks])
    return oracle.block_scores(q, seen, 1.0)


def _runs(k: Tensor, width: int) -> Clusters:
    """Means of runs of `width` keys; the last may be short."""
    batch, heads, length, dim = k.shape
    blocks = count_blocks(length, KEY_BLOCK)
    keys = torch.nn.functional.pad(k, (0, 0, 0, blocks * KEY_BLOCK - length))
    sums = keys.view(batch, heads, blocks, KEY_BLOCK // width, width, dim).sum(4).transpose(2, 3)
    starts = torch.arange(0, blocks * KEY_BLOCK, width, device=k.device).view(blocks, -1).T
    count = (length - starts).clamp(0, width).to(k.dtype)
    return Clusters(sums / count.clamp(min=1)[..., None], count.log().expand(batch, heads, -1, -1), None)


def _run_mass(q: Tensor, runs: Clusters, first: int, blocks: int) -> Tensor:
    scores = _products(q, runs.centers[:, :, :, :blocks]) + _per_query_head(q, runs.log_count[..., :blocks])[..., None]
    width = KEY_BLOCK // scores.shape[2]
    run, block = (torch.arange(n, device=q.device) for n in (scores.shape[2], blocks))
    starts = (block * KEY_BLOCK)[None] + (run * width)[:, None]
    row = torch.arange(first, first + q.shape[2], device=q.device)
    return scores.masked_fill(starts[..., None] > row, -torch.inf).logsumexp(2).transpose(-1, -2)


def _clusters(k: Tensor, clusters: int, whole_head: bool) -> Clusters:
    """Cluster means of every block by farthest-first seeds and Lloyd's iterations, and the variance left inside."""
    batch, heads, length, dim = k.shape
    blocks = count_blocks(length, KEY_BLOCK)
    keys = torch.nn.functional.pad(k, (0, 0, 0, blocks * KEY_BLOCK - length))
    keys = keys.view(batch, heads, blocks, KEY_BLOCK, dim)
    real = (torch.arange(blocks * KEY_BLOCK, device=k.device) < length).view(blocks, KEY_BLOCK)
    weight = real.to(k.dtype)[None, None, :, :, None]
    mean = (keys * weight).sum(3, keepdim=True) / weight.sum(3, keepdim=True).clamp(min=1)
    nearest = (keys - mean).square().sum(-1).masked_fill(~real, -1.0)
    seeds = []
    for _ in range(clusters):
        farthest = nearest.argmax(-1)[..., None, None].expand(-1, -1, -1, 1, dim)
        seeds.append(keys.gather(3, farthest))
        distance = (keys - seeds[-1]).square().sum(-1).masked_fill(~real, -1.0)
        nearest = distance if len(seeds) == 1 else torch.minimum(nearest, distance)
    centers = torch.cat(seeds, 3)
    for _ in range(LLOYD_STEPS):
        member = torch.nn.functional.one_hot(torch.cdist(keys, centers).argmin(-1), clusters).to(k.dtype) * weight
        count = member.sum(3)
        centers = torch.where(count[..., None] > 0, member.transpose(-1, -2) @ keys / count[..., None].clamp(min=1),
                              centers)
    inside = ((keys - member @ centers).square() * weight).sum(3)  # [B, Hkv, blocks, D]
    if whole_head:
        variance = inside.sum(2, keepdim=True) / length
    else:
        variance = inside / weight.sum(3).clamp(min=1)
    return Clusters(centers.transpose(2, 3), count.log().transpose(2, 3), variance)


def _cluster_mass(q: Tensor, clusters: Clusters, first: int, blocks: int) -> Tensor:
    assert clusters.variance is not None
    centers, log_count = clusters.centers[:, :, :, :blocks], clusters.log_count[..., :blocks]
    scores = _products(q, centers)
    variance = _per_query_head(q, clusters.variance[:, :, :blocks])
    spread = variance @ q.square().transpose(-1, -2)  # [B, H, blocks or 1, rows]
    counts = _per_query_head(q, log_count)[..., None]
    scores = scores + counts + oracle.frozen_log_mean_exp(spread[:, :, None], counts.clamp(min=0))
    return scores.logsumexp(2).transpose(-1, -2)


def _products(q: Tensor, centers: Tensor) -> Tensor:
    """q [B, H, rows, D] with centers [B, Hkv, n, blocks, D]: [B, H, n, blocks, rows]."""
    batch, kv_heads, n, blocks, dim = centers.shape
    grouped = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, Hkv, group * rows, D]
    product = centers.flatten(2, 3) @ grouped.transpose(-1, -2)
    return product.view(batch, kv_heads, n, blocks, -1, q.shape[2]).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)


def _per_query_head(q: Tensor, x: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)
