"""One attention function that takes a policy: signals, kept blocks, and the product's own op over them.

    attention = PolicyAttention()
    with attention.under(policies, watch=...):     one policy per layer, None: dense; or one for all
        model(ids)
    attention.tally.density()

The signals are computed in chunks of query blocks (`shares.py`), float32 softmax, products in the precision that torch
is set to; the attention itself is `ops.block_sparse_attention` over the lists of the policy, in bfloat16 on CUDA. Dense
passes run the same op over all blocks, so that its rounding is on both sides of every comparison.

Variants, beyond what the product does:
    zero-order   a dropped block adds its estimated mass times the mean of its values
    feedback     the exact peaks that attention found for one query block correct the estimates of the next
    shared       every second layer keeps what the layer before it kept, head by best matching head
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.thesis import shares
from benchmarks.thesis.policies import Policy, Signals, choose
from sparsify import ops
from sparsify.kernels import rule
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, KeptLists, allowed_blocks, count_blocks
from sparsify.kernels.masks import Masks

VARIANTS = ("zero-order", "feedback", "shared")
KEYS = "keys"  # the estimator of policies by single keys: true weights, no blocks
MOST_CORRECTION = 8.0  # feedback trusts an error of no more than this factor, and half of it in log: the kept blocks
TRUST = 0.5  # it hears of were overestimated more often than the rest
LEAST_WEIGHT, BISECTIONS = 1e-20, 26  # 46 nats / 2**26: float32 tells no nearer weights apart
Watch = Callable[[int, Tensor, Tensor, Tensor, float], None]
Policies = Policy | None | Sequence[Policy | None]


class Tally:
    """Kept and allowed blocks (or keys) of one pass, layer by layer, per document (batch row)."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []  # one entry a layer: [B, rows of blocks, or of keys]
        self.allowed: list[Tensor] = []  # the same without B

    def add(self, kept: Tensor, allowed: Tensor, heads: int) -> None:
        """kept [B, rows], summed over heads; allowed [rows], per head."""
        self.kept.append(kept)
        self.allowed.append(allowed * heads)

    def density(self, last_quarter: bool = False) -> Tensor:
        """Kept share of what is allowed in all layers, per document: [B]; of all rows, or of the last quarter."""
        kept, allowed = torch.stack(self.kept).sum(0).cpu().double(), torch.stack(self.allowed).sum(0).cpu().double()
        rows = slice(len(allowed) - max(1, len(allowed) // 4) if last_quarter else 0, None)
        return (kept[:, rows].sum(-1) / allowed[rows].sum()).float()


class PolicyAttention:
    """Attention for any model that calls it layer by layer, in order; see the head of this file."""

    def __init__(self) -> None:
        self.policies: Policies = None
        self.watch: Watch | None = None
        self.on_kept: Callable[[int, Tensor], None] | None = None
        self.protected: Tensor | None = None
        self.heads_of: dict[int, Tensor] = {}  # variant "shared": layer to the matching heads of the layer before
        self.tally = Tally()
        self._layer = 0
        self._before: Tensor | None = None

    @contextmanager
    def under(self, policies: Policies, watch: Watch | None = None, protected: Tensor | None = None,
              on_kept: Callable[[int, Tensor], None] | None = None) -> Iterator[Tally]:
        """For one forward pass. `watch` sees (layer, q, k, v, scale) of every layer, `on_kept` (layer, kept blocks);
        `protected` is bool [B, key blocks]."""
        self.policies, self.watch, self.protected, self.on_kept = policies, watch, protected, on_kept
        self.tally, self._layer, self._before = Tally(), 0, None
        try:
            yield self.tally
        finally:
            self.policies = self.watch = self.protected = self.on_kept = self._before = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, H, L, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], causal; returns [B, H, L, Dv]."""
        layer, self._layer = self._layer, self._layer + 1
        policies = self.policies
        policy = policies[layer] if isinstance(policies, Sequence) else policies
        if self.watch is not None:
            self.watch(layer, q, k, v, scale)
        batch, heads, length, _ = q.shape
        if policy is not None and policy.estimator == KEYS:
            out, kept_keys = attend_keys(policy, q, k, v, scale)
            self.tally.add(kept_keys, torch.arange(1, length + 1, device=q.device), heads)
            return out
        allowed = allowed_blocks(Masks(0), length, length, q.device)
        if policy is None:
            kept = allowed[:, None].expand(batch, heads, -1, -1)
        else:
            kept = self._keep(policy, layer, q, k, scale)
        self._before = kept
        self.tally.add(kept.sum((1, 3)), allowed[0].sum(-1), heads)
        if self.on_kept is not None:
            self.on_kept(layer, kept)
        out, lse = attend(q, k, v, kept, scale)
        if policy is not None and policy.variant == "zero-order":
            out = _with_dropped(policy.estimator, q, k, v, kept, scale, out, lse)
        return out

    def _keep(self, policy: Policy, layer: int, q: Tensor, k: Tensor, scale: float) -> Tensor:
        if policy.variant == "shared" and layer in self.heads_of and self._before is not None:
            return self._before[:, self.heads_of[layer]]
        signals = shares.signals_of(policy.estimator, q, k, scale)
        if policy.variant == "feedback":
            signals = _fed_back(signals, shares.signals_of("oracle", q, k, scale), policy, q.shape[2])
        return choose(policy, signals, q.shape[2], self.protected)


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention over exactly the kept blocks (bool [B, H, query blocks, key blocks]): out and lse."""
    dtype = torch.bfloat16 if q.is_cuda else q.dtype
    lists = kept_lists(kept)
    out, lse = ops.block_sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), *lists, scale, 0, None, None, None,
                                          None, None, 0.0, None)
    return out.to(q.dtype), lse


def attend_keys(policy: Policy, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over single keys: a share of those every row sees, its heaviest, or those above a tolerance.

    The heaviest key and the row's own are always kept. Returns out [B, H, L, Dv] and every row's count of kept keys,
    summed over heads: [B, L].
    """
    outs, counts = [], []
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    for (first, last), weights, seen in key_weights(q, k, scale):
        if policy.rule == "share":
            wanted = (policy.amount * seen.sum(-1)).round().clamp(min=1).long()  # [rows]
            least = _weight_of_rank(weights, wanted[:, None])
        else:
            least = weights.amax(-1, keepdim=True).clamp(max=policy.amount)
        own = torch.arange(last, device=q.device) == torch.arange(first, last, device=q.device)[:, None]
        kept = seen & ((weights >= least) | own)
        counts.append(kept.sum((1, 3)))
        thinned = weights * kept
        outs.append(thinned / thinned.sum(-1, keepdim=True) @ v[:, :, :last])
    return torch.cat(outs, 2), torch.cat(counts, 1)


def _weight_of_rank(weights: Tensor, rank: Tensor) -> Tensor:
    """The weight that `rank` keys of a row reach, [..., rows, 1], by bisecting its logarithm: sorting takes longer."""
    low = torch.full_like(weights[..., :1], math.log(LEAST_WEIGHT))
    high = torch.zeros_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = (weights >= middle.exp()).sum(-1, keepdim=True) >= rank
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.exp()


def key_weights(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """True weights in chunks of rows: (first, last), [B, H, rows, last], and which keys a row sees, [rows, last]."""
    group = q.shape[1] // k.shape[1]
    for first, last in shares.row_chunks(q):
        scores = q[:, :, first:last] @ k[:, :, :last].repeat_interleave(group, 1).transpose(-1, -2) * scale
        seen = torch.arange(last, device=q.device) <= torch.arange(first, last, device=q.device)[:, None]
        yield (first, last), scores.masked_fill_(~seen, -torch.inf).softmax(-1), seen


def kept_lists(kept: Tensor) -> KeptLists:
    """Lists of exactly these blocks: an odd count is filled by the padding id, not evened out by one more block."""
    flat = kept.flatten(0, 1)
    lists = rule.pack(flat[:, None], flat[:, None].float(), flat)  # nothing else is allowed: no spare block
    return KeptLists(lists.kept.view(*kept.shape[:3], -1), lists.counts.view(kept.shape[:3]))


def _with_dropped(name: str, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, out: Tensor,
                  lse: Tensor) -> Tensor:
    """The output with dropped blocks at their estimated mass and the mean of their values."""
    prepared = shares.prepare(name, k)
    length = v.shape[2]
    blocks = count_blocks(length, KEY_BLOCK)
    padded = torch.nn.functional.pad(v, (0, 0, 0, blocks * KEY_BLOCK - length))
    mean = padded.unflatten(2, (blocks, KEY_BLOCK)).sum(3)
    starts = torch.arange(blocks, device=v.device) * KEY_BLOCK
    mean = (mean / (length - starts).clamp(max=KEY_BLOCK)[:, None]).repeat_interleave(q.shape[1] // v.shape[1], 1)
    parts = []
    for first, last in shares.row_chunks(q):
        mass = shares.log_masses(name, q, k, scale, prepared, first, last)
        here = kept[:, :, first // QUERY_BLOCK: count_blocks(last, QUERY_BLOCK), : mass.shape[-1]]
        here = here.repeat_interleave(QUERY_BLOCK, 2)[:, :, : last - first]
        weight = torch.exp(mass - lse[:, :, first:last, None]).masked_fill(here, 0.0)
        dropped = weight @ mean[:, :, : mass.shape[-1]]
        parts.append((out[:, :, first:last] + dropped) / (1 + weight.sum(-1, keepdim=True)))
    return torch.cat(parts, 2)


def _fed_back(estimated: Signals, exact: Signals, policy: Policy, length: int) -> Signals:
    """Estimates times what the block's estimate was wrong by for the query block before, where that one kept it.

    What attention can report is its tile's largest weight; the whole block's exact peak, used here, bounds its worth.
    """
    kept = choose(policy, estimated, length)
    ratio = (exact.peaks / estimated.peaks.clamp(min=1e-12)).clamp(1 / MOST_CORRECTION, MOST_CORRECTION)
    ratio = torch.where(kept, ratio, 1.0) ** TRUST
    ratio = torch.cat([torch.ones_like(ratio[:, :, :1]), ratio[:, :, :-1]], 2)
    return Signals(estimated.peaks * ratio, estimated.means)
