"""Workloads of the attention ops: data, not code. `benchmarks/run.py` times them.

Each is one attention layer: random q, k, v, random kept lists of a given density (sinks, diagonal and local blocks
always kept), causal. "selection" in a contender's name means that choosing the blocks is timed too; it then runs on the
same q and k, and attention runs on the given lists, so that the density is the one named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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


@dataclass(frozen=True)
class Workload:
    """One layer at several lengths and densities; batch 1, causal, kv_len = q_len."""

    name: str
    device: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    densities: tuple[float, ...]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("cpu_layer", "cpu", 8, 8, 64, torch.float32, (2048, 4096, 8192, 16384), (1.0, 0.25, 0.1)),
        Workload("cuda_layer", "cuda", 32, 8, 128, torch.bfloat16, (4096, 8192, 16384, 32768, 65536, 131072),
                 (1.0, 0.5, 0.25, 0.125, 0.1)),
        Workload("cuda_layer_d64", "cuda", 32, 8, 64, torch.bfloat16, (8192, 32768), (1.0, 0.25, 0.1)),
    )
}
TOLERANCE = 0.02
BUDGET = Budget(TOLERANCE)


@dataclass(frozen=True)
class Layer:
    """One length of a workload: the inputs, and the contenders as calls that return the output."""

    workload: Workload
    length: int

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        w = self.workload
        generator = torch.Generator(w.device).manual_seed(self.length)

        def normal(heads: int) -> Tensor:
            x = torch.randn(1, self.length, heads, w.head_dim, generator=generator, device=w.device)
            return x.to(w.dtype).transpose(1, 2)  # as models pass it

        return normal(w.heads), normal(w.kv_heads), normal(w.kv_heads)

    @property
    def scale(self) -> float:
        return self.workload.head_dim ** -0.5

    @property
    def arguments(self) -> tuple:
        """From `scale` on, as the ops take them by position."""
        return self.scale, 0, None, None, None, None, None, 0.0, None

    @cached_property
    def visible_pairs(self) -> Tensor:
        """Visible (query, key) pairs of every block: float64 [query blocks, key blocks]."""
        row = torch.arange(self.length, dtype=torch.float64)[:, None]
        first = torch.arange(count_blocks(self.length, KEY_BLOCK)) * KEY_BLOCK
        seen = (row + 1 - first).clamp(0, KEY_BLOCK)
        pad = count_blocks(self.length, QUERY_BLOCK) * QUERY_BLOCK - self.length
        return torch.nn.functional.pad(seen, (0, 0, 0, pad)).unflatten(0, (-1, QUERY_BLOCK)).sum(1)

    def lists(self, density: float) -> KeptLists:
        """Random kept lists in which about this share of the allowed blocks is kept."""
        w, device = self.workload, torch.device(self.workload.device)
        allowed = allowed_blocks(Masks(0), self.length, self.length, device)
        boundary = boundary_blocks(self.length, self.length, 0, device)
        forced = forced_blocks(allowed, boundary, BUDGET.sinks, BUDGET.local)
        free = (allowed.sum(-1) - forced.sum(-1)).clamp(min=1)
        share = ((density * allowed.sum(-1) - forced.sum(-1)).clamp(min=0) / free)[:, None, :, None]
        generator = torch.Generator(device).manual_seed(1)
        lists = []
        for _ in range(w.heads):  # head by head: the scores of all heads at 128K keys would take 20 GB
            luck = torch.rand(1, 1, *allowed.shape[1:], generator=generator, device=device)
            lists.append(rule.pack(allowed[:, None] & (forced[:, None] | (luck < share)), luck, allowed))
        return KeptLists(torch.cat([x.kept for x in lists], 1), torch.cat([x.counts for x in lists], 1))

    def kept_share(self, lists: KeptLists | None) -> float:
        """Share of the visible pairs that the lists keep: the work that is left."""
        if lists is None:
            return 1.0
        area, kept = self.visible_pairs, 0.0
        for head in range(lists.counts.shape[1]):
            one = KeptLists(lists.kept[:, head:head + 1].cpu(), lists.counts[:, head:head + 1].cpu())
            kept += float((rule.unpack(one, area.shape[1])[0, 0] * area).sum())
        return kept / (float(area.sum()) * lists.counts.shape[1])

    def dense(self) -> dict[str, Call]:
        """Every dense kernel that runs here."""
        q, k, v = self.qkv
        call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        if self.workload.device == "cpu":
            return {"sdpa": call}

        def with_backend(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return call()

        contenders: dict[str, Call] = {
            "cudnn": partial(with_backend, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(with_backend, SDPBackend.FLASH_ATTENTION),
        }
        if self.length > 32768:  # flex and efficient are far behind by then, and slow to compile or large
            return contenders
        contenders["flex"] = _flex(q, k, v, self.scale)
        # The efficient kernel has no grouped heads: it reads repeated ones.
        group = self.workload.heads // self.workload.kv_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

        def efficient() -> Tensor:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=self.scale)

        contenders["efficient"] = efficient
        return contenders

    def exact(self) -> Call:
        """The op of dense buckets."""
        return partial(ops.exact_attention, *self.qkv, *self.arguments, ops.VERSION)

    def sparse(self, lists: KeptLists) -> Call:
        """Attention over given lists."""
        return lambda: ops.block_sparse_attention(*self.qkv, *lists, *self.arguments)[0]

    def selection(self, singles: int = BUDGET.singles) -> Call:
        """Selection alone."""
        q, k, _ = self.qkv
        return lambda: ops.select_blocks(q, k, *self.arguments, TOLERANCE, BUDGET.max_density, BUDGET.sinks,
                                         BUDGET.local, singles)[1]

    def relative_error(self, out: Tensor, lists: KeptLists | None, rows: int = 32) -> float:
        """|out - exact| / |exact| over random rows, exact in float64 over the same kept blocks."""
        q, k, v = self.qkv
        row = torch.randperm(self.length, generator=torch.Generator().manual_seed(2))[:rows].to(q.device)
        group = q.shape[1] // k.shape[1]
        error = norm = 0.0
        for head in range(q.shape[1]):
            keys, values = k[0, head // group].double(), v[0, head // group].double()
            scores = q[0, head, row].double() @ keys.T * self.scale
            hidden = torch.arange(self.length, device=q.device) > row[:, None]
            if lists is not None:
                one = KeptLists(lists.kept[:, head:head + 1], lists.counts[:, head:head + 1])
                kept = rule.unpack(one, count_blocks(self.length, KEY_BLOCK))[0, 0]
                hidden |= ~kept[row // QUERY_BLOCK].repeat_interleave(KEY_BLOCK, 1)[:, : self.length]
            exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
            error += float((out[0, head, row].double() - exact).square().sum())
            norm += float(exact.square().sum())
        return (error / norm) ** 0.5


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
