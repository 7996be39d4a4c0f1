"""Policies as data: which estimate of the attention, and which rule turns it into kept blocks.

    Policy("split-6", "absolute", 0.03)          the product: peaks under one tolerance, by the product's own rule
    Policy("oracle", "share", 0.25, by="mean")   a perfect fixed share: every query block keeps a quarter of its blocks

Every rule keeps the blocks whose *critical amount* the policy's amount reaches, so one look at a model's critical
amounts says which amount gives which density (`Criticals`). `absolute` is `kernels/rule.py`; the others are the
baselines that the product does not ship:

    share    every query block keeps this share of the blocks it may see
    tokens   every query block keeps this many blocks
    window   every query block keeps this many of its latest blocks
    top-p    the fewest blocks whose shares, averaged over the rows, sum to the amount

`share` and `tokens` rank blocks `by` the peak or by the mean over the rows. All keep the first block, the diagonal and
one block before it, and count them.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels import rule
from sparsify.kernels.blocks import allowed_blocks, boundary_blocks, forced_blocks
from sparsify.kernels.masks import Masks

RULES = ("absolute", "share", "tokens", "window", "top-p")
SAMPLE = 1 << 16  # critical amounts kept of one layer and pass: a quantile of thousands of layers needs no more


class Signals(NamedTuple):
    """What a rule sees, [B, H, query blocks, key blocks]: largest and mean share over the rows of a query block."""

    peaks: Tensor
    means: Tensor


@dataclass(frozen=True)
class Policy:
    """A way to choose key blocks.

    estimator    a name of `shares.ESTIMATORS`, "oracle" for the true attention
    rule         one of RULES
    amount       what the rule needs: a tolerance, a share, blocks, a coverage
    by           "peak" or "mean": what share and tokens rank blocks by
    max_density, sinks, local  as in `sparsify.Budget`
    protect      key blocks that hold a protected token are kept by every query block
    variant      "" or one of `attention.VARIANTS`
    """

    estimator: str
    rule: str
    amount: float = 0.0
    by: str = "peak"
    max_density: float = 1.0
    sinks: int = 1
    local: int = 1
    protect: bool = False
    variant: str = ""

    @property
    def kind(self) -> "Policy":
        """The same policy at no amount: what curves are drawn of."""
        return replace(self, amount=0.0)

    def at(self, amount: float) -> "Policy":
        return replace(self, amount=amount)

    def __str__(self) -> str:
        ranked = f" by {self.by}" if self.rule in ("share", "tokens") else ""
        name = "sink + window" if self.rule == "window" else f"{self.estimator}, {self.rule}{ranked}"
        return name + (", protected" if self.protect else "") + (f", {self.variant}" if self.variant else "")


def choose(policy: Policy, signals: Signals, length: int, protected: Tensor | None = None) -> Tensor:
    """Kept blocks under causality: bool, shaped as the signals. `protected`: bool [B, key blocks]."""
    masks = Masks(0)
    allowed, forced = _geometry(policy, length, signals.peaks.device)
    if policy.rule == "absolute":
        kept = rule.keep(signals.peaks, q_len=length, kv_len=length, tolerance=policy.amount,
                         max_density=policy.max_density, sinks=policy.sinks, local=policy.local, masks=masks)
    else:
        kept = allowed & (forced | (critical_amounts(policy, signals, length) <= policy.amount))
    if policy.protect:
        assert protected is not None
        kept = kept | (allowed & protected[:, None, None])
    return kept


def critical_amounts(policy: Policy, signals: Signals, length: int) -> Tensor:
    """The smallest amount at which a block is kept, negated for `absolute`, where it is the largest."""
    if policy.rule == "absolute":
        return -signals.peaks
    allowed, forced = _geometry(policy, length, signals.peaks.device)
    count = allowed.sum(-1, keepdim=True)
    blocks = torch.arange(allowed.shape[-1], device=allowed.device)
    ranked_by = signals.peaks if policy.by == "peak" and policy.rule != "top-p" else signals.means
    worth = (blocks / (len(blocks) + 1)).expand_as(ranked_by) if policy.rule == "window" else ranked_by
    worth = torch.where(forced, worth + 2, torch.where(allowed, worth, -1.0))
    order = worth.argsort(dim=-1, descending=True, stable=True)
    if policy.rule == "top-p":
        mass = torch.where(allowed, signals.means, 0.0).gather(-1, order)
        return torch.empty_like(mass).scatter_(-1, order, mass.cumsum(-1) - mass)
    rank = torch.empty_like(order).scatter_(-1, order, blocks.expand_as(order))
    if policy.rule == "share":
        return (rank + 0.5) / count
    return (rank + 1).float()


class Criticals:
    """Critical amounts of one kind of policy, gathered from dense passes: from a density to an amount."""

    def __init__(self, kind: Policy) -> None:
        self.kind = kind
        self._free: list[Tensor] = []
        self._forced = self._allowed = 0.0

    def add(self, signals: Signals, length: int) -> None:
        """Take in one layer of one pass."""
        allowed, forced = _geometry(self.kind, length, signals.peaks.device)
        free = (allowed & ~forced).expand_as(signals.peaks)
        values = critical_amounts(self.kind, signals, length)[free]
        self._free.append(values[:: len(values) // SAMPLE + 1].sort().values.cpu())
        self._forced += float(forced.sum())
        self._allowed += float(allowed.sum())

    def floor(self) -> float:
        """The density of the blocks that are always kept."""
        return self._forced / self._allowed

    def amount(self, density: float) -> float:
        """The amount that keeps this share of the allowed blocks."""
        values = torch.cat(self._free).sort().values
        share = (density - self.floor()) / max(1e-9, 1 - self.floor())
        if not len(values):
            return 0.0
        amount = float(values[min(len(values) - 1, max(0, round(share * len(values)) - 1))])
        return max(0.0, -amount) if self.kind.rule == "absolute" else amount


def _geometry(policy: Policy, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allowed and forced blocks, bool [1, 1, query blocks, key blocks]."""
    allowed = allowed_blocks(Masks(0), length, length, device)
    boundary = boundary_blocks(length, length, 0, device)
    return allowed[:, None], forced_blocks(allowed, boundary, policy.sinks, policy.local)[:, None]
