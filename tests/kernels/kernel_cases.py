"""What the kernel tests share: inputs as models pass them, and random kept lists."""

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.kernels import blocks, oracle, rule
from sparsify.kernels.masks import Masks
from tests.numerics import assert_as_good_as_torch, attention_units
from tests.ops.cases import draw_extras

on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
                               reason="needs a Hopper GPU")

RULE = {"sinks": 1, "local": 1}


@dataclass(frozen=True)
class Case:
    """Shapes of one attention call; `padding` draws a key mask with holes and a masked-out first block.

    `extras` are what else the scores meet, see `draw_extras`.
    """

    B: int
    H: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int
    causal_offset: int | None
    padding: bool = False
    extras: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        mask = f"{self.causal_offset:+d}" if self.causal_offset is not None else "full"
        extras = "".join(f"-{extra}" for extra in self.extras)
        return f"{self.L}x{self.S}-h{self.H}/{self.Hkv}-d{self.D}/{self.Dv}-{mask}{'-padded' * self.padding}{extras}"

    @property
    def blocks(self) -> int:
        return blocks.count_blocks(self.S, blocks.KEY_BLOCK)


def qkv(rng: torch.Generator, case: Case, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views, as models pass them: [B, L, H, D] memory seen as [B, H, L, D], one head behind the other's end."""
    def draw(heads: int, length: int, dim: int) -> Tensor:
        memory = torch.randn(case.B, length, heads + 1, dim, generator=rng, device=rng.device)
        return (memory * spread).to(dtype)[:, :, 1:].transpose(1, 2)
    return (draw(case.H, case.L, case.D), draw(case.Hkv, case.S, case.D), draw(case.Hkv, case.S, case.Dv))


def key_mask(rng: torch.Generator, case: Case) -> Tensor | None:
    if not case.padding:
        return None
    shown = torch.rand(case.B, case.S, generator=rng, device=rng.device) > 0.3
    shown[-1, : min(70, case.S - 1)] = False
    return shown


def draw_masks(rng: torch.Generator, case: Case) -> Masks:
    return Masks(case.causal_offset, key_mask=key_mask(rng, case),
                 **draw_extras(rng, (case.B, case.H, case.L, case.S), case.extras))


def named(masks: Masks) -> dict[str, Any]:
    """As the oracle takes them."""
    return {field.name: getattr(masks, field.name) for field in fields(Masks)}


def random_lists(rng: torch.Generator, case: Case, masks: Masks, density: float) -> blocks.KeptLists:
    """Lists that obey the contract, of about this density."""
    allowed = blocks.allowed_blocks(masks, case.L, case.S, rng.device)
    peaks = torch.rand(case.B, case.H, *allowed.shape[1:], generator=rng, device=rng.device)
    kept = rule.keep(peaks, q_len=case.L, kv_len=case.S, tolerance=1 - density, max_density=1.0, sinks=1, local=1,
                     masks=masks)
    return rule.pack(kept, peaks, allowed)


def assert_attention_is_right(attend, rng: torch.Generator, case: Case, dtype: torch.dtype, density: float,
                              scale: float = 0.3, masks: Masks | None = None) -> None:
    """Run `attend` on random inputs, masks and lists; compare out and lse with float64 over the same lists."""
    q, k, v = qkv(rng, case, dtype)
    masks = draw_masks(rng, case) if masks is None else masks
    lists = random_lists(rng, case, masks, density)
    call = {"scale": scale, **named(masks)}
    out, lse = attend(q, k, v, *lists, scale=scale, masks=masks)
    kept = rule.unpack(lists, case.blocks)
    exact, exact_lse = oracle.attention(q.double(), k.double(), v.double(), **call, kept=kept)
    plain, _ = oracle.attention(q, k, v, **call, kept=kept)
    _, plain_lse = oracle.attention(q.float(), k.float(), v.float(), **call, kept=kept)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert_as_good_as_torch(out, plain.to(dtype), exact, attention_units(q, k, scale) + bias_units(masks))
    # exp2 and log2 of the GPU are good to two units each, on numbers of the size of the scores.
    largest = float(exact_lse.masked_fill(~exact_lse.isfinite(), 0.0).abs().max())  # all rows may be blind
    units = 8 + bias_units(masks) + attention_units(q, k, scale) / max(largest, 1e-6)
    assert_as_good_as_torch(lse, plain_lse, exact_lse, units)
    blind = (exact == 0).all(-1)
    assert (out[blind] == 0).all()
    if masks.sink_logits is None:
        assert (lse[blind] == -torch.inf).all()


def assert_lists_obey(lists: blocks.KeptLists, exact: Tensor, band: Tensor | float, case: Case, masks: Masks,
                      tolerance: Tensor | float, max_density: float, protected: Tensor | None = None) -> None:
    """Lists are what the rule makes of peaks within `band` of the exact ones, under the budget `RULE`.

    `tolerance` may be one per head, [H, 1, 1]; `protected` is bool [B or 1, keys].
    """
    device = exact.device
    allowed = blocks.allowed_blocks(masks, case.L, case.S, device)
    boundary = blocks.boundary_blocks(case.L, case.S, case.causal_offset, device)
    forced = blocks.forced_blocks(allowed, boundary, **RULE)[:, None]
    if protected is not None:
        forced = forced | blocks.protected_blocks(protected)[:, None, None]
    allowed = allowed[:, None].expand_as(exact)
    kept = rule.unpack(lists, case.blocks)
    # The layout: exactly what `pack` makes of the same set, which the even fill has already evened out.
    repacked = rule.pack(kept, exact, allowed[:, 0])
    assert torch.equal(lists.kept, repacked.kept) and torch.equal(lists.counts, repacked.counts)

    surely = allowed & (forced | (exact >= tolerance + band))
    maybe = allowed & (forced | (exact >= tolerance - band))
    total = allowed.sum(-1, keepdim=True)
    may_be_full = maybe.sum(-1, keepdim=True) > max_density * total
    must_be_full = surely.sum(-1, keepdim=True) > max_density * total
    assert not (surely & ~kept).any(), "a block above the tolerance was dropped"
    assert not (must_be_full & allowed & ~kept).any(), "a row above max_density was not kept whole"
    extra = kept & ~maybe
    assert not (extra & ~allowed).any(), "a block was kept that no row may see"
    number = extra.sum(-1, keepdim=True)
    full = (kept == allowed).all(-1, keepdim=True) & may_be_full
    assert ((number <= 1) | full).all(), "more was kept than the rule and the even fill explain"
    best_left = torch.where(allowed & ~kept, exact, -1.0).amax(-1, keepdim=True)
    assert ((exact >= best_left - 2 * band) | ~extra).all(), "the even fill is not the best block left"


def assert_hidden_keys_do_not_matter(attend, rng: torch.Generator, case: Case, dtype: torch.dtype) -> None:
    """Keys and values behind the mask are garbage in practice; the output does not move."""
    q, k, v = qkv(rng, case, dtype)
    mask = key_mask(rng, case)
    assert mask is not None
    masks = Masks(case.causal_offset, key_mask=mask)
    lists = random_lists(rng, case, masks, 0.5)
    call = {"scale": 0.3, "masks": masks}
    before = attend(q, k, v, *lists, **call)
    hidden = ~mask[:, None, :, None]
    after = attend(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), *lists, **call)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def bias_units(masks: Masks) -> float:
    """Rounding units that a bias adds: scores have its size."""
    return 0.0 if masks.bias is None else float(masks.bias[masks.bias.isfinite()].abs().max())
