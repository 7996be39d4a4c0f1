"""Kernels alone, on identical lists: random kept blocks of 128 queries x 128 keys, the same number in every row.

    causal  a row keeps its first block, its diagonal block and random ones between: min(row + 1, K) of them
    full    a row keeps K random blocks: for kernels that know no causality and want equally many in every row

128 x 128 is what every kernel can express; one that works on smaller blocks is given the same pairs in blocks of its
own (`KERNELS` says which). What is prepared before the clock starts: the lists in the kernel's own format, and KV heads
repeated for kernels that know no grouped heads; both are in the rival's favour.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsify import ops
from sparsify.kernels import rule
from sparsify.kernels.blocks import KEY_BLOCK, allowed_blocks
from sparsify.kernels.masks import Masks

Call = Callable[[], Tensor]
BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Heads of the layer that is timed."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


@dataclass(frozen=True)
class Case:
    """One length, density and mask; batch 1, kv_len = q_len, a multiple of 128."""

    length: int
    density: float
    causal: bool
    shape: Shape

    @property
    def blocks(self) -> int:
        return self.length // BLOCK

    @property
    def scale(self) -> float:
        return self.shape.head_dim ** -0.5

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """[1, heads, length, head dim], in memory [1, length, heads, head dim], as models pass it."""
        s = self.shape
        generator = torch.Generator(s.device).manual_seed(self.length)

        def normal(heads: int) -> Tensor:
            x = torch.randn(1, self.length, heads, s.head_dim, generator=generator, device=s.device)
            return x.to(s.dtype).transpose(1, 2)

        return normal(s.heads), normal(s.kv_heads), normal(s.kv_heads)

    @cached_property
    def rows_first(self) -> tuple[Tensor, ...]:
        """q, k, v as [1, length, heads, head dim], contiguous."""
        return tuple(x.transpose(1, 2) for x in self.qkv)

    @cached_property
    def repeated(self) -> tuple[Tensor, ...]:
        """q, k, v with as many KV heads as query heads, contiguous [1, heads, length, head dim]."""
        q, k, v = self.qkv
        group = q.shape[1] // k.shape[1]
        return q.contiguous(), k.repeat_interleave(group, 1).contiguous(), v.repeat_interleave(group, 1).contiguous()

    @cached_property
    def count(self) -> int:
        """K: blocks of a row, where there are that many."""
        n = self.blocks
        if not self.causal:
            return max(1, round(self.density * n))
        return next(most for most in range(1, n + 1) if _kept_of(most, n) >= self.density * n * (n + 1) / 2 - 1e-6)

    @cached_property
    def kept(self) -> Tensor:
        """Kept blocks: bool [heads, query blocks, key blocks]."""
        n, device = self.blocks, self.shape.device
        generator = torch.Generator(device).manual_seed(1)
        luck = torch.rand(self.shape.heads, n, n, generator=generator, device=device)
        if self.causal:
            luck[:, :, 0] = 2
            luck.diagonal(dim1=1, dim2=2).fill_(3)
        allowed = self.allowed(n)
        chosen = luck.masked_fill(~allowed, -1).topk(self.count, -1).indices
        return torch.zeros_like(luck, dtype=torch.bool).scatter(-1, chosen, True) & allowed

    def allowed(self, n: int) -> Tensor:
        """Blocks that causality leaves: bool [n, n]."""
        square = torch.ones(n, n, dtype=torch.bool, device=self.shape.device)
        return square.tril() if self.causal else square

    @property
    def kept_pairs(self) -> int:
        """Visible (query, key) pairs of the kept blocks of one head."""
        n = self.blocks
        if not self.causal:
            return n * self.count * BLOCK * BLOCK
        return (_kept_of(self.count, n) - n) * BLOCK * BLOCK + n * BLOCK * (BLOCK + 1) // 2

    @property
    def kept_share(self) -> float:
        """Of all visible pairs."""
        return self.kept_pairs / (self.length * (self.length + 1) / 2 if self.causal else self.length**2)

    @property
    def flops(self) -> float:
        return 4 * self.shape.head_dim * self.kept_pairs * self.shape.heads

    def relative_error(self, out: Tensor, rows: int = 32) -> float:
        """|out - exact| / |exact| over random rows, exact in float64 over the same pairs."""
        q, k, v = self.qkv
        row = torch.randperm(self.length, generator=torch.Generator().manual_seed(2))[:rows].to(q.device)
        group = q.shape[1] // k.shape[1]
        error = norm = 0.0
        for head in range(q.shape[1]):
            keys, values = k[0, head // group].double(), v[0, head // group].double()
            hidden = ~self.kept[head, row // BLOCK].repeat_interleave(BLOCK, 1)
            if self.causal:
                hidden |= torch.arange(self.length, device=q.device) > row[:, None]
            scores = (q[0, head, row].double() @ keys.T * self.scale).masked_fill(hidden, -torch.inf)
            exact = scores.softmax(-1) @ values
            error += float((out[0, head, row].double() - exact).square().sum())
            norm += float(exact.square().sum())
        return (error / norm) ** 0.5


def _kept_of(most: int, n: int) -> int:
    """Blocks of n causal rows that keep at most `most` each."""
    return most * (most + 1) // 2 + (n - most) * most


def split(kept: Tensor, rows: int, keys: int) -> Tensor:
    """The same pairs in blocks of 128 / rows queries x 128 / keys keys."""
    return kept.repeat_interleave(rows, -2).repeat_interleave(keys, -1)


def indices(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending ids of kept blocks, int32 [1, heads, rows, blocks], zeros behind them, and counts int32."""
    blocks = kept.shape[-1]
    ids = torch.arange(blocks, dtype=torch.int32, device=kept.device)
    ids = torch.where(kept, ids, blocks).sort(-1).values
    return torch.where(ids < blocks, ids, 0)[None].contiguous(), kept.sum(-1, dtype=torch.int32)[None].contiguous()


def partial_and_full(case: Case) -> tuple[Tensor, Tensor]:
    """Kept blocks that causality cuts (the diagonal), and the others."""
    cut = torch.eye(case.blocks, dtype=torch.bool, device=case.kept.device) & case.causal
    return case.kept & cut, case.kept & ~cut


def ours(case: Case, _: Any) -> Call:
    q, k, v = case.qkv
    masks = Masks(0 if case.causal else None)
    kept = split(case.kept, 1, BLOCK // KEY_BLOCK)[None]
    lists = rule.pack(kept, torch.zeros_like(kept, dtype=torch.float32),
                      allowed_blocks(masks, case.length, case.length, q.device))
    arguments = case.scale, masks.causal_offset, None, None, None, None, None, 0.0, None
    return lambda: ops.block_sparse_attention(q, k, v, *lists, *arguments)[0]


def flex(case: Case, _: Any) -> Call:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    partial, full = (indices(kept) for kept in partial_and_full(case))
    mask = BlockMask.from_kv_blocks(partial[1], partial[0], full[1], full[0], BLOCK_SIZE=BLOCK,
                                    mask_mod=_flex_causal if case.causal else None)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = case.qkv
    return lambda: compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=True)


def _flex_causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def flashprefill(case: Case, module: Any) -> Call:
    q, k, v = case.rows_first
    out = torch.empty_like(q)
    ids, counts = indices(case.kept)
    index, valid = ids.permute(0, 2, 3, 1).long().contiguous(), counts.transpose(1, 2).contiguous()
    heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return -(-case.length // meta["Q_TILE_SIZE"]), heads, 1

    def call() -> Tensor:
        module._flash_forward[grid](q, k, v, out, index, valid, case.scale, *q.stride(), *k.stride(), *v.stride(),
                                    *out.stride(), *index.stride(), *valid.stride(), case.length, case.length, heads,
                                    kv_heads, BLOCK_SIZE=BLOCK, D_HEAD=dim)
        return out.transpose(1, 2)

    return call


def flexprefill(case: Case, module: Any) -> Call:
    q, k, v = case.rows_first
    out = torch.empty_like(q)
    n, heads, kv_heads, dim = case.blocks, q.shape[2], k.shape[2], q.shape[3]
    flat = case.kept.flatten(1).nonzero()[:, 1].view(1, heads, -1)  # ids in the grid of blocks, row by row
    bins = torch.nn.functional.pad(case.kept.sum(-1).cumsum(-1), (1, 0)).int()[None].contiguous()
    warps, stages = module.get_num_warps_stages(dim, BLOCK, module.GPU_NAME)

    def call() -> Tensor:
        module.block_wise_prefill_attention_kernel[(heads, n)](
            q, k, v, out, flat, bins, 1, heads, kv_heads, heads // kv_heads, case.length, case.length, dim, n, 0,
            case.scale * math.log2(math.e), False, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            *flat.stride(), *bins.stride(), BLOCK_SIZE_Q=BLOCK, BLOCK_SIZE_K=BLOCK,
            BLOCK_SIZE_D=1 << (dim - 1).bit_length(), num_warps=warps, num_stages=stages)
        return out.transpose(1, 2)

    return call


def pbs(case: Case, module: Any) -> Call:
    q, k, v = case.qkv
    out = torch.empty_like(q)
    heads, dim = q.shape[1], q.shape[3]
    kept = case.kept[None].contiguous()
    place = torch.arange(case.length, device=q.device).expand(1, heads, -1)  # nothing is permuted

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return -(-case.length // meta["BLOCK_M"]), heads, 1

    def call() -> Tensor:
        module._permuted_block_sparse_attn_fwd[grid](
            q, k, v, out, kept, place, place, place, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            *kept.stride(), *place.stride(), *place.stride(), *place.stride(), case.length, case.length, case.scale,
            H=heads, num_kv_groups=heads // k.shape[1], HEAD_DIM=dim, SEGMENT_SIZE=BLOCK, LOGICAL_BLOCK_SIZE=BLOCK,
            STAGE=3)
        return out

    return call


def minference(case: Case, module: Any) -> Call:
    q, k, v = case.repeated
    ids, _ = indices(split(case.kept, 2, 2))  # it walks min(row + 1, capacity) of them
    index = ids[..., : 2 * case.count].contiguous()
    lengths = torch.tensor([case.length], dtype=torch.int32, device=q.device)
    return lambda: module._triton_block_sparse_attention(q, k, v, lengths, index, case.scale, 64, 64)


def sla(case: Case, module: Any) -> Call:
    q, k, v = case.repeated
    kept = split(case.kept, 1, 2)
    lut = indices(kept)[0][..., : 2 * case.count].long().contiguous()
    table = kept[None].to(torch.int8).contiguous()
    return lambda: module._attention.apply(q, k, v, table, lut, 2 * case.count, BLOCK, 64)


def vsa(case: Case, module: Any) -> Call:
    q, k, v = case.repeated
    ids, counts = indices(split(case.kept, 2, 2))
    ids = ids[..., : 2 * case.count].contiguous()
    sizes = torch.full((case.length // 64,), 64, dtype=torch.int32, device=q.device)
    return lambda: module.triton_block_sparse_attn_forward(q, k, v, ids, counts, sizes)[0]


def fa4(case: Case, module: Any) -> Call:
    block_sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    (cut_ids, cut_counts), (ids, counts) = (indices(kept) for kept in partial_and_full(case))
    lists = block_sparsity.BlockSparseTensorsTorch(cut_counts, cut_ids, counts, ids, block_size=(BLOCK, BLOCK))
    q, k, v = case.rows_first
    mask = _fa4_causal() if case.causal else None
    return lambda: module._flash_attn_fwd(q, k, v, softmax_scale=case.scale, mask_mod=mask,
                                          block_sparse_tensors=lists)[0].transpose(1, 2)


def _fa4_causal() -> Any:
    cute: Any = importlib.import_module("cutlass.cute")

    @cute.jit
    def causal(batch, head, query, key, lengths, aux_tensors):
        return key <= query

    return causal


@dataclass(frozen=True)
class Kernel:
    """A contender: how it is called, the source it needs, the masks it knows, and what is particular about it."""

    prepare: Callable[[Case, Any], Call]
    source: str | None
    masks: tuple[str, ...]
    geometry: str


KERNELS = {
    "ours": Kernel(ours, None, ("causal", "full"), "128 x 64, packed lists, grouped heads"),
    "FlexAttention": Kernel(flex, None, ("causal", "full"), "BlockMask 128 x 128, grouped heads, default options"),
    "FlashPrefill": Kernel(flashprefill, "flashprefill", ("causal",), "128 x 128, autotuned tiles, grouped heads"),
    "FlexPrefill": Kernel(flexprefill, "flexprefill", ("causal",), "128 x 128, grouped heads; sorted ids, ready bins"),
    "PBS": Kernel(pbs, "pbs", ("causal",), "128 x 128 mask, segments of 128, nothing permuted, grouped heads"),
    "MInference": Kernel(minference, "minference", ("causal",), "64 x 64, KV heads repeated"),
    "SLA": Kernel(sla, "sla", ("full",), "128 x 64, equally many a row, KV heads repeated"),
    "VSA": Kernel(vsa, "vsa", ("full",), "64 x 64, Triton, KV heads repeated"),
    "FA4": Kernel(fa4, "fa4", ("causal", "full"), "128 x 128, diagonal by mask_mod, grouped heads"),
}
