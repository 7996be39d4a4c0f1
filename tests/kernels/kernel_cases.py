"""What the kernel tests share: inputs as models pass them, and random kept lists."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.kernels import blocks, oracle, rule
from tests.numerics import assert_as_good_as_torch, attention_units


@dataclass(frozen=True)
class Case:
    """Shapes of one attention call; `padding` draws a key mask with holes and a masked-out first block."""

    B: int
    H: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int
    causal_offset: int | None
    padding: bool = False

    def __str__(self) -> str:
        mask = f"{self.causal_offset:+d}" if self.causal_offset is not None else "full"
        return f"{self.L}x{self.S}-h{self.H}/{self.Hkv}-d{self.D}/{self.Dv}-{mask}{'-padded' * self.padding}"

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


def random_lists(rng: torch.Generator, case: Case, mask: Tensor | None, density: float) -> blocks.KeptLists:
    """Lists that obey the contract, of about this density."""
    sizes = (case.L, case.S, case.causal_offset, mask, rng.device)
    allowed = blocks.allowed_blocks(*sizes)
    peaks = torch.rand(case.B, case.H, *allowed.shape[1:], generator=rng, device=rng.device)
    kept = rule.keep(peaks, q_len=case.L, kv_len=case.S, tolerance=1 - density, max_density=1.0, sinks=1, local=1,
                       causal_offset=case.causal_offset, key_mask=mask)
    return rule.pack(kept, peaks, allowed)


def assert_attention_is_right(attend, rng: torch.Generator, case: Case, dtype: torch.dtype, density: float,
                              scale: float = 0.3) -> None:
    """Run `attend` on random inputs and lists; compare out and lse with float64 over the same lists."""
    q, k, v = qkv(rng, case, dtype)
    mask = key_mask(rng, case)
    lists = random_lists(rng, case, mask, density)
    call = {"scale": scale, "causal_offset": case.causal_offset, "key_mask": mask}
    out, lse = attend(q, k, v, *lists, **call)
    kept = rule.unpack(lists, case.blocks)
    exact, exact_lse = oracle.attention(q.double(), k.double(), v.double(), **call, kept=kept)
    plain, _ = oracle.attention(q, k, v, **call, kept=kept)
    _, plain_lse = oracle.attention(q.float(), k.float(), v.float(), **call, kept=kept)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert_as_good_as_torch(out, plain, exact, attention_units(q, k, scale))
    # exp2 and log2 of the GPU are good to two units each, on numbers of the size of the scores.
    assert_as_good_as_torch(lse, plain_lse, exact_lse, units=8)
    blind = exact_lse == -torch.inf
    assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
