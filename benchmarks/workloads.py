"""Workloads of the attention ops: data, not code. `benchmarks/run.py` times them.

Each is one attention layer: random q, k, v, random kept lists of a given density (sinks, diagonal and local blocks
always kept). "selection" in a contender's name means that choosing the blocks is timed; it then runs on the same q and
k, and attention runs on the given lists, so that the density is the one named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from sparsify import ops
from sparsify.kernels import rule
from sparsify.kernels.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    KeptLists,
    allowed_blocks,
    boundary_blocks,
    count_blocks,
    forced_blocks,
)
from sparsify.kernels.masks import Masks
from sparsify.plan import Budget

Call = Callable[[], Tensor]
Density = float | str

MIXED = "mixed"
"""A density of its own for every head, from `SPARSEST` to 1: each head this many times the one before, shuffled."""
SPARSEST = 0.01


@dataclass(frozen=True)
class Workload:
    """One layer at several lengths and densities.

    lengths        of keys
    fewer_queries  keys over queries: the last queries of a longer sequence, causal to the bottom right
    padding        a key mask: row b of a batch of B hides the first b / (2 B) of its keys
    singles        m, for which selection is timed; the first stands without a suffix in the results
    sharpness      factor on q: the larger, the fewer keys a row attends to
    """

    name: str
    device: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    densities: tuple[Density, ...]
    batch: int = 1
    causal: bool = True
    fewer_queries: int = 1
    padding: bool = False
    singles: tuple[int, ...] = (6, 2)
    sharpness: float = 1.0


BF16 = torch.bfloat16
SPREAD = (1.0, 0.5, 0.25, 0.125, 0.1, MIXED)
WORKLOADS = {
    w.name: w
    for w in (
        Workload("cpu_layer", "cpu", 8, 8, 64, torch.float32, (2048, 4096, 8192, 16384), (1.0, 0.25, 0.1)),
        Workload("cuda_layer", "cuda", 32, 8, 128, BF16,
                 (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144),
                 (1.0, 0.5, 0.25, 0.125, 0.1, 0.03, MIXED)),
        Workload("cuda_full", "cuda", 32, 8, 128, BF16, (2048, 8192, 32768, 131072), SPREAD, causal=False),
        Workload("cuda_layer_d64", "cuda", 32, 8, 64, BF16, (4096, 8192, 32768, 131072), SPREAD),
        Workload("cuda_layer_d256", "cuda", 16, 8, 256, BF16, (4096, 8192, 32768), SPREAD),
        Workload("cuda_batch4", "cuda", 32, 8, 128, BF16, (1024, 4096, 8192, 32768), SPREAD, batch=4),
        Workload("cuda_chunk", "cuda", 32, 8, 128, BF16, (8192, 32768, 131072), SPREAD, fewer_queries=8),
        Workload("cuda_padding", "cuda", 32, 8, 128, BF16, (4096, 16384), SPREAD, batch=4, padding=True),
    )
}
TOLERANCE = 0.02
BUDGET = Budget(TOLERANCE)
PAIR_ROWS = 8192  # rows whose visible keys are counted at once: 0.3 GB at 256K keys


@dataclass(frozen=True)
class Layer:
    """One length of a workload: the inputs, and the contenders as calls that return the output."""

    workload: Workload
    length: int

    @property
    def q_len(self) -> int:
        return max(1, self.length // self.workload.fewer_queries)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        w = self.workload
        generator = torch.Generator(w.device).manual_seed(self.length)

        def normal(length: int, heads: int, factor: float = 1.0) -> Tensor:
            x = torch.randn(w.batch, length, heads, w.head_dim, generator=generator, device=w.device)
            return (x * factor).to(w.dtype).transpose(1, 2)  # as models pass it

        return (normal(self.q_len, w.heads, w.sharpness), normal(self.length, w.kv_heads),
                normal(self.length, w.kv_heads))

    @property
    def scale(self) -> float:
        return self.workload.head_dim ** -0.5

    @cached_property
    def masks(self) -> Masks:
        w, key_mask = self.workload, None
        if w.padding:
            hidden = torch.arange(w.batch, device=w.device) * self.length // (2 * w.batch)
            key_mask = torch.arange(self.length, device=w.device) >= hidden[:, None]
        return Masks(self.length - self.q_len if w.causal else None, key_mask=key_mask)

    @property
    def arguments(self) -> tuple:
        """From `scale` on, as the ops take them by position."""
        return self.scale, self.masks.causal_offset, None, self.masks.key_mask, None, None, None, 0.0, None

    @cached_property
    def visible_pairs(self) -> Tensor:
        """Visible (query, key) pairs of every block: float64 [batch or 1, query blocks, key blocks]."""
        device, masks = torch.device(self.workload.device), self.masks
        starts = torch.arange(count_blocks(self.length, KEY_BLOCK), device=device) * KEY_BLOCK
        ends = (starts + KEY_BLOCK).clamp(max=self.length)
        parts = []
        for first in range(0, self.q_len, PAIR_ROWS):
            row = torch.arange(first, min(first + PAIR_ROWS, self.q_len), device=device)
            until = torch.full_like(row, self.length) if masks.causal_offset is None else row + masks.causal_offset + 1
            low, high = (torch.minimum(edge, until[:, None]) for edge in (starts, ends))
            if masks.key_mask is None:
                seen = (high - low)[None]
            else:
                shown_before = torch.nn.functional.pad(masks.key_mask.long().cumsum(1), (1, 0))
                seen = shown_before[:, high] - shown_before[:, low]
            seen = torch.nn.functional.pad(seen.double(), (0, 0, 0, -len(row) % QUERY_BLOCK))
            parts.append(seen.unflatten(1, (-1, QUERY_BLOCK)).sum(2))
        return torch.cat(parts, 1)

    @cached_property
    def flop(self) -> float:
        """Of both products, over all visible pairs."""
        w = self.workload
        pairs = float(self.visible_pairs.sum()) * (w.batch if len(self.visible_pairs) == 1 else 1)
        return 4.0 * pairs * w.heads * w.head_dim

    @property
    def bytes(self) -> int:
        """Of q, k, v and the output, once each."""
        w = self.workload
        rows = 2 * w.heads * self.q_len + 2 * w.kv_heads * self.length
        return w.batch * rows * w.head_dim * w.dtype.itemsize

    def head_densities(self, density: Density) -> list[float]:
        """One for every head."""
        heads = self.workload.heads
        if not isinstance(density, str):
            return [density] * heads
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(3)).tolist()
        return [SPARSEST ** (1 - place / max(1, heads - 1)) for place in order]

    def lists(self, density: Density) -> KeptLists:
        """Random kept lists in which about this share of the allowed blocks is kept."""
        w, device, masks = self.workload, torch.device(self.workload.device), self.masks
        allowed = allowed_blocks(masks, self.q_len, self.length, device)
        boundary = boundary_blocks(self.q_len, self.length, masks.causal_offset, device)
        forced = forced_blocks(allowed, boundary, BUDGET.sinks, BUDGET.local)
        free = (allowed.sum(-1) - forced.sum(-1)).clamp(min=1)
        generator = torch.Generator(device).manual_seed(1)
        lists = []
        for head in range(w.batch * w.heads):  # one by one: the scores of all heads at 128K keys would take 20 GB
            wanted = self.head_densities(density)[head % w.heads]
            row = slice(head // w.heads % len(allowed), head // w.heads % len(allowed) + 1)
            share = ((wanted * allowed[row].sum(-1) - forced[row].sum(-1)).clamp(min=0) / free[row])[:, None, :, None]
            luck = torch.rand(1, 1, *allowed.shape[1:], generator=generator, device=device)
            lists.append(rule.pack(allowed[row, None] & (forced[row, None] | (luck < share)), luck, allowed[row]))
        return KeptLists(*(torch.cat(parts).view(w.batch, w.heads, *parts[0].shape[2:])
                           for parts in zip(*lists, strict=True)))

    def kept_share(self, lists: KeptLists | None) -> float:
        """Share of the visible pairs that the lists keep: the work that is left."""
        if lists is None:
            return 1.0
        area, kept = self.visible_pairs, torch.zeros((), dtype=torch.float64, device=self.workload.device)
        for batch in range(self.workload.batch):
            for head in range(self.workload.heads):
                kept += (_unpacked(lists, batch, head, area.shape[2]) * area[batch % len(area)]).sum()
        return float(kept) * 4.0 * self.workload.head_dim / self.flop

    def exact(self) -> Call:
        """The op of dense buckets."""
        return partial(ops.exact_attention, *self.qkv, *self.arguments, ops.VERSION)

    def adaptive(self, budget: Budget = BUDGET) -> Call:
        """The op of sparse buckets, which may run exact."""
        return partial(ops.adaptive_attention, *self.qkv, *self.arguments, budget.tolerance, budget.max_density,
                       budget.sinks, budget.local, budget.singles, 0, ops.VERSION)

    def sparse(self, lists: KeptLists) -> Call:
        """Attention over given lists."""
        return lambda: ops.block_sparse_attention(*self.qkv, *lists, *self.arguments)[0]

    def selection(self, singles: int = BUDGET.singles, budget: Budget = BUDGET) -> Call:
        """Selection alone; returns the counts."""
        return lambda: self.select(singles, budget).counts

    def select(self, singles: int = BUDGET.singles, budget: Budget = BUDGET) -> KeptLists:
        """Selected lists."""
        q, k, _ = self.qkv
        return KeptLists(*ops.select_blocks(q, k, *self.arguments, budget.tolerance, budget.max_density, budget.sinks,
                                            budget.local, singles))

    def density(self, lists: KeptLists) -> float:
        """Share of the allowed blocks that are kept."""
        allowed = allowed_blocks(self.masks, self.q_len, self.length, lists.counts.device)
        total = float(allowed.sum()) * lists.counts.shape[0] * lists.counts.shape[1] / len(allowed)
        return min(1.0, float(lists.counts.sum()) / total)

    def relative_error(self, out: Tensor, lists: KeptLists | None = None, rows: int = 32) -> float:
        """|out - exact| / |exact| over random rows that see a key, exact in float64 over the same kept blocks."""
        q, k, v = self.qkv
        row = torch.randperm(self.q_len, generator=torch.Generator().manual_seed(2))[:rows].to(q.device)
        group, masks = q.shape[1] // k.shape[1], self.masks
        key, hidden = torch.arange(self.length, device=q.device), None
        if masks.causal_offset is not None:
            hidden = key > row[:, None] + masks.causal_offset
        sums = torch.zeros(2, dtype=torch.float64, device=q.device)
        for batch in range(q.shape[0]):
            unseen = torch.zeros(len(row), self.length, dtype=torch.bool, device=q.device) if hidden is None else hidden
            if masks.key_mask is not None:
                unseen = unseen | ~masks.key_mask[batch]
            for head in range(q.shape[1]):
                keys, values = (x[batch, head // group].double() for x in (k, v))
                dropped = unseen
                if lists is not None:
                    kept = _unpacked(lists, batch, head, count_blocks(self.length, KEY_BLOCK))[row // QUERY_BLOCK]
                    dropped = unseen | ~kept.repeat_interleave(KEY_BLOCK, 1)[:, : self.length]
                scores = (q[batch, head, row].double() @ keys.T * self.scale).masked_fill(dropped, -torch.inf)
                sees = ~dropped.all(1, keepdim=True)
                exact = torch.where(sees, scores, 0.0).softmax(-1) @ values
                difference = out[batch, head, row].double() - exact
                sums += torch.stack([torch.where(sees, x, 0.0).square().sum() for x in (difference, exact)])
        error, norm = sums.tolist()
        return (error / norm) ** 0.5


def _unpacked(lists: KeptLists, batch: int, head: int, key_blocks: int) -> Tensor:
    """The lists of one head as bool [query blocks, key blocks]."""
    one = KeptLists(*(x[batch: batch + 1, head: head + 1] for x in lists))
    return rule.unpack(one, key_blocks)[0, 0]
