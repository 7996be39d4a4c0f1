"""References in plain torch, in the dtype they are given: float64 inputs give the truth that tests measure against.

Slow and memory-hungry on purpose: every step is written as its definition reads. Shapes as in `sparsify.ops`:
q [B, H, q_len, D], k [B, Hkv, kv_len, D], v [B, Hkv, kv_len, Dv]; `**masks` are the fields of `Masks` by name.

Source: split summaries and the rule on row peaks are this project's own (ARCHITECTURE.md, "selection"); the second
cumulant with freezing is the random-energy estimate of a mean of exponentials (Derrida 1981).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.blocks import (
    KEY_BLOCK,
    QUERY_BLOCK,
    KeptLists,
    SplitSummaries,
    allowed_blocks,
    block_bias,
    count_blocks,
    cut_blocks,
    protected_blocks,
)
from sparsify.kernels.masks import Masks
from sparsify.kernels.rule import choose_blocks


def visible(q_len: int, kv_len: int, causal_offset: int | None, key_mask: Tensor | None, device: torch.device,
            **masks: Any) -> Tensor:
    """Which query may see which key: bool [B or 1, H or 1, q_len, kv_len]; a bias is left aside."""
    seen = Masks(causal_offset, key_mask=key_mask, **masks).visible(q_len, kv_len, device)
    all_of_it = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device)
    return all_of_it if seen is None else all_of_it & seen


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, kept: Tensor | None = None,
              **masks: Any) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of the kept blocks; `masks` are fields of `Masks`.

    `kept` is bool [B, H, query blocks, key blocks], None for all. Returns out [B, H, q_len, Dv] and the natural log of
    every row's sum [B, H, q_len], sink included. A row that sees no key gives zeros and, without a sink, -inf.
    """
    group = q.shape[1] // k.shape[1]
    scores = Masks(**masks).scores(q @ k.repeat_interleave(group, 1).transpose(-1, -2), scale)
    if kept is not None:
        rows = kept.repeat_interleave(QUERY_BLOCK, 2)[:, :, : q.shape[2]]
        scores = scores.masked_fill(~rows.repeat_interleave(KEY_BLOCK, 3)[..., : k.shape[2]], -torch.inf)
    lse = _with_sinks(scores.logsumexp(-1), masks.get("sink_logits"))
    weights = torch.exp(scores - lse[..., None]).masked_fill(scores == -torch.inf, 0.0).to(v.dtype)
    return weights @ v.repeat_interleave(group, 1), lse


def summarise_keys(k: Tensor, singles: int, key_mask: Tensor | None = None) -> SplitSummaries:
    """Split summaries of every key block, see `SplitSummaries`; distances in float32 or better."""
    batch, heads, kv_len, dim = k.shape
    blocks = count_blocks(kv_len, KEY_BLOCK)
    pad = blocks * KEY_BLOCK - kv_len
    shown = torch.ones(1, kv_len, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    shown = torch.nn.functional.pad(shown, (0, pad)).view(-1, 1, blocks, KEY_BLOCK)
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    keys = torch.nn.functional.pad(wide, (0, 0, 0, pad)).view(batch, heads, blocks, KEY_BLOCK, dim)
    keys = keys.masked_fill(~shown[..., None], 0.0)
    count = shown.sum(-1)  # [Bm, 1, blocks]

    mean = keys.sum(3) / count.clamp(min=1)[..., None]
    distance = (keys - mean[:, :, :, None]).square().sum(-1).masked_fill(~shown, -1.0)
    farthest = distance.topk(singles, -1).indices
    single_keys = keys.gather(3, farthest[..., None].expand(*farthest.shape, dim))
    single = torch.zeros_like(distance, dtype=torch.bool).scatter(3, farthest, True) & shown
    rest = (shown & ~single)[..., None]
    rest_count = (count - singles).clamp(min=0)
    many = rest_count.clamp(min=1)[..., None]
    rest_mean = (keys * rest).sum(3) / many
    variance = ((keys - rest_mean[:, :, :, None]).square() * rest).sum(3) / many
    return SplitSummaries(
        singles=single_keys.permute(0, 1, 3, 2, 4).to(k.dtype),
        mean=rest_mean.to(k.dtype),
        variance=variance.to(k.dtype),
        single_count=count.clamp(max=singles)[:, 0].int(),
        rest_count=rest_count[:, 0].int(),
    )


def frozen_log_mean_exp(variance: Tensor, log_count: Tensor) -> Tensor:
    """log of the mean of exp over n Gaussian scores of this variance around their mean.

    The second cumulant while it can be true, variance / 2; beyond variance = 2 log n one of the n scores dominates.
    """
    return torch.where(variance < 2 * log_count, variance / 2,
                       (2 * log_count * variance).clamp(min=0).sqrt() - log_count)


def block_scores(q: Tensor, summaries: SplitSummaries, scale: float, softcap: float = 0.0) -> Tensor:
    """Estimated log mass of every key block for every row, masks and bias aside: [B, H, q_len, key blocks].

    The soft cap is put on a single's score, and on the log mean exp of the rest.
    """
    cap = Masks(softcap=softcap).cap
    group = q.shape[1] // summaries.mean.shape[1]
    q = q * scale
    singles, mean, variance = (x.repeat_interleave(group, 1).to(q.dtype)
                               for x in (summaries.singles, summaries.mean, summaries.variance))
    m = singles.shape[2]
    single = torch.einsum("bhqd,bhmnd->bhqnm", q, singles)
    real = torch.arange(m, device=q.device) < summaries.single_count[..., None]  # [Bm, blocks, m]
    single = cap(single).masked_fill(~real[:, None, None], -torch.inf).logsumexp(-1)
    log_count = summaries.rest_count.to(q.dtype).log()[:, None, None]  # -inf where there is no rest
    spread = q.square() @ variance.transpose(-1, -2)
    rest = cap(q @ mean.transpose(-1, -2) + frozen_log_mean_exp(spread, log_count.clamp(min=0)))
    return torch.logaddexp(single, rest + log_count)


def estimated_shares(q: Tensor, k: Tensor, *, singles: int, scale: float, **masks: Any) -> Tensor:
    """Every row's estimated share of attention per key block, cut blocks exact: [B, H, q_len, key blocks]."""
    return estimate_shares(q, k, summarise_keys(k, singles, masks.get("key_mask")), scale, Masks(**masks))


def estimate_shares(q: Tensor, k: Tensor, summaries: SplitSummaries, scale: float, masks: Masks) -> Tensor:
    """`estimated_shares` from summaries of k."""
    q_len, kv_len = q.shape[2], k.shape[2]
    mass = block_scores(q, summaries, scale, masks.softcap)
    bias = block_bias(masks, kv_len, q.dtype)
    if bias is not None:
        mass = mass + bias
    cut, allowed = (blocks(masks, q_len, kv_len, q.device).repeat_interleave(QUERY_BLOCK, 1)[:, None, :q_len]
                    for blocks in (cut_blocks, allowed_blocks))
    mass = torch.where(cut, exact_block_mass(q, k, scale, masks), mass).masked_fill(~allowed, -torch.inf)
    return shares_of(mass, masks)


def true_shares(q: Tensor, k: Tensor, *, scale: float, **masks: Any) -> Tensor:
    """Every row's true share of attention per key block: [B, H, q_len, key blocks]."""
    return shares_of(exact_block_mass(q, k, scale, Masks(**masks)), Masks(**masks))


def peaks(shares: Tensor) -> Tensor:
    """Largest share that any row of a query block gives a key block: [B, H, query blocks, key blocks]."""
    q_len = shares.shape[2]
    pad = count_blocks(q_len, QUERY_BLOCK) * QUERY_BLOCK - q_len
    padded = torch.nn.functional.pad(shares, (0, 0, 0, pad))
    return padded.unflatten(2, (-1, QUERY_BLOCK)).amax(3)


def select_blocks(q: Tensor, k: Tensor, *, scale: float, tolerance: float, max_density: float, sinks: int, local: int,
                  singles: int, shifts: Sequence[float] | None = None, protected: Tensor | None = None,
                  **masks: Any) -> KeptLists:
    """Selection by its definition: estimated shares, peaks, the rule, lists. `protected` is bool [B or 1, kv_len]."""
    shares = estimated_shares(q, k, singles=singles, scale=scale, **masks)
    return choose_blocks(peaks(shares), q_len=q.shape[2], kv_len=k.shape[2], tolerance=tolerance,
                         max_density=max_density, sinks=sinks, local=local, masks=Masks(**masks), shifts=shifts,
                         protected=None if protected is None else protected_blocks(protected))


def exact_block_mass(q: Tensor, k: Tensor, scale: float, masks: Masks) -> Tensor:
    """Log mass of every key block for every row, masks included: [B, H, q_len, key blocks]."""
    group = q.shape[1] // k.shape[1]
    scores = masks.scores(q @ k.repeat_interleave(group, 1).transpose(-1, -2), scale)
    pad = count_blocks(k.shape[2], KEY_BLOCK) * KEY_BLOCK - k.shape[2]
    scores = torch.nn.functional.pad(scores, (0, pad), value=-math.inf)
    return scores.unflatten(-1, (-1, KEY_BLOCK)).logsumexp(-1)


def shares_of(mass: Tensor, masks: Masks) -> Tensor:
    """From log masses to shares of a row; zeros for a row that sees nothing."""
    total = _with_sinks(mass.logsumexp(-1), masks.sink_logits)[..., None]
    return torch.exp(mass - total).nan_to_num(0.0)  # a row that sees nothing: -inf - -inf


def _with_sinks(lse: Tensor, sink_logits: Tensor | None) -> Tensor:
    return lse if sink_logits is None else torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
