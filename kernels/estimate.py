"""Split summaries on a CPU in plain torch, and the peaks they predict.

    q          [B, H, q_len, D]     fp64, fp32, bf16 or fp16; any strides
    k          [B, Hkv, kv_len, D]  same dtype; any strides
    masks      see kernels/masks.py
    peaks      [B, H, query blocks, key blocks]: largest estimated share of a row, 0 where not allowed
    cost       m + 2 products of D per row and key block (m + 2 of every 64 that dense QK^T takes), m + 1 exponentials

One query block of many heads at a time, against no more key blocks than it may see: the work is causal, the workspace
is `WORKSPACE` scores. Half precisions are computed in float32. Source: as kernels/oracle.py, which is the definition.
"""

import torch
from torch import Tensor

from sparsify.kernels import oracle
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, count_blocks
from sparsify.kernels.masks import Masks

WORKSPACE = 1 << 20  # scores per step: 4 MB


def estimated_peaks(q: Tensor, k: Tensor, *, scale: float, masks: Masks, singles: int) -> Tensor:
    """Peaks of all blocks, as the head of this file says."""
    if not masks.is_plain:
        return _peaks_by_definition(q, k, scale, masks, singles)
    causal_offset, key_mask = masks.causal_offset, masks.key_mask
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_blocks, k_blocks = count_blocks(q_len, QUERY_BLOCK), count_blocks(kv_len, KEY_BLOCK)
    peaks = torch.zeros(batch, heads, q_blocks, k_blocks, dtype=dtype)
    grouped = q.unflatten(1, (kv_heads, -1))  # [B, Hkv, heads per KV head, q_len, D]
    step = max(1, WORKSPACE // (grouped.shape[2] * QUERY_BLOCK * (singles + 1) * k_blocks))
    for b in range(batch):
        shown = None if key_mask is None else key_mask[b % len(key_mask)][None]
        for first in range(0, kv_heads, step):
            part = slice(first, first + step)
            estimator = _Estimator(k[b, part], shown, singles, causal_offset, dtype)
            group = slice(first * grouped.shape[2], (first + step) * grouped.shape[2])
            for i in range(q_blocks):
                rows = grouped[b, part, :, i * QUERY_BLOCK: (i + 1) * QUERY_BLOCK]
                found = estimator.peaks(rows.to(dtype) * scale, i * QUERY_BLOCK)
                peaks[b, group, i, : found.shape[-1]] = found
    return peaks


def _peaks_by_definition(q: Tensor, k: Tensor, scale: float, masks: Masks, singles: int) -> Tensor:
    """One query block after the other, by the oracle: as slow as dense scores. The compiled path is the fast one."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    summaries = oracle.summarise_keys(k, singles, masks.key_mask)
    return torch.cat([
        oracle.peaks(oracle.estimate_shares(rows, k, summaries, scale, masks.of_rows(i * QUERY_BLOCK, rows.shape[2])))
        for i, rows in enumerate(q.split(QUERY_BLOCK, 2))], 2)


class _Estimator:
    """Split summaries of some KV heads, laid out for the products with many query blocks."""

    def __init__(self, k: Tensor, shown: Tensor | None, singles: int, causal_offset: int | None,
                 dtype: torch.dtype) -> None:
        self.kv_len, self.offset, self.shown = k.shape[1], causal_offset, shown
        self.blocks = count_blocks(self.kv_len, KEY_BLOCK)
        self.keys = k
        summaries = oracle.summarise_keys(k[None].to(dtype), singles, shown)
        self.vectors = torch.cat([summaries.singles[0], summaries.mean[0][:, None]], 1)  # [Hkv, m + 1, blocks, D]
        self.variance = summaries.variance[0]
        self.log_count = summaries.rest_count[0].to(dtype).log()  # -inf where there is no rest
        real = torch.arange(singles)[:, None] < summaries.single_count
        self.absent = None if bool(real.all()) else ~real  # [m, blocks]
        self.dtype = dtype

    def peaks(self, q: Tensor, first_row: int) -> Tensor:
        """Peaks of one query block, for the key blocks up to the last it may see; q [Hkv, group, rows, D] is scaled."""
        kv_heads, group, rows, dim = q.shape
        whole, upto = self._range(first_row, rows)
        q = q.reshape(kv_heads, group * rows, dim)
        mass, top = self._summarised(q, whole)
        if upto > whole:
            exact = self._exact(q, group, first_row, whole, upto)  # [Hkv, group * rows, blocks], log mass
            highest = torch.maximum(top, exact.amax(-1, keepdim=True))
            lowest = torch.finfo(self.dtype).min
            mass = mass * torch.exp(top.clamp(min=lowest) - highest.clamp(min=lowest))
            mass = torch.cat([mass, torch.exp(exact - highest.clamp(min=lowest))], -1)
        total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(self.dtype).tiny)
        return (mass / total).view(kv_heads * group, rows, upto).amax(1)

    def _range(self, first_row: int, rows: int) -> tuple[int, int]:
        """Key blocks that every row sees whole, and key blocks that some row sees."""
        if self.offset is None:
            return self.blocks, self.blocks
        whole = (first_row + self.offset + 1) // KEY_BLOCK
        upto = (first_row + rows - 1 + self.offset) // KEY_BLOCK + 1
        return min(max(whole, 0), self.blocks), min(max(upto, 0), self.blocks)

    def _summarised(self, q: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """exp(log mass - top) of the first `whole` blocks, and top, each row's largest score; a masked block: 0."""
        if whole == 0:
            return q.new_empty(*q.shape[:2], 0), q.new_full((*q.shape[:2], 1), -torch.inf)
        scores = torch.matmul(q[:, None], self.vectors[:, :, :whole].transpose(-1, -2))  # [Hkv, m + 1, rows, blocks]
        spread = torch.bmm(q.square(), self.variance[:, :whole].transpose(-1, -2))
        log_count = self.log_count[:whole]
        scores[:, -1].add_(log_count).add_(oracle.frozen_log_mean_exp(spread, log_count.clamp(min=0)))
        if self.absent is not None:
            scores[:, :-1].masked_fill_(self.absent[:, None, :whole], -torch.inf)
        top = scores.amax((1, 3))[..., None]
        scores.sub_(top.clamp(min=torch.finfo(self.dtype).min)[:, None]).exp_()
        return scores.sum(1), top

    def _exact(self, q: Tensor, group: int, first_row: int, whole: int, upto: int) -> Tensor:
        """Log mass of the blocks from `whole` to `upto`, over the keys that each row sees: [Hkv, rows, blocks]."""
        first, last = whole * KEY_BLOCK, min(upto * KEY_BLOCK, self.kv_len)
        scores = torch.bmm(q, self.keys[:, first:last].to(self.dtype).transpose(-1, -2))
        rows = q.shape[1] // group
        key = torch.arange(first, last)
        hidden = key > torch.arange(first_row, first_row + rows)[:, None] + (self.offset or 0)  # a boundary: causal
        if self.shown is not None:
            hidden = hidden | ~self.shown[:, first:last]
        scores = scores.masked_fill_(hidden.repeat(group, 1), -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, upto * KEY_BLOCK - last), value=-torch.inf)
        return scores.unflatten(-1, (-1, KEY_BLOCK)).logsumexp(-1)
