"""Random attention inputs of the op tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.kernels import oracle
from tests.numerics import attention_units

# (q_len, kv_len, causal_offset, padding): odd on purpose.
MASKS = [
    (300, 300, 0, None),  # causal
    (300, 500, 200, "left"),  # bottom-right, left padding
    (300, 500, None, "holes"),  # full, any key set
    (129, 321, 63, "right"),  # neither top-left nor bottom-right
    (200, 200, None, None),  # full
    (1, 65, 64, None),  # one query
    (65, 1, 0, None),  # one key
    (300, 200, -100, None),  # rows that see nothing
    (257, 448, 191, "all"),  # a batch row of padding only
]


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    causal_offset: int | None
    key_mask: Tensor | None

    @classmethod
    def random(cls, rng: torch.Generator, device: torch.device, q_len: int, kv_len: int, causal_offset: int | None,
               padding: str | None, head_dims: tuple[int, int] = (64, 64), strided: bool = True) -> "Case":
        """Batch 2, 4 query heads on 2 KV heads; strided: [batch, length, heads, dim] in memory."""
        def normal(length: int, heads: int, dim: int) -> Tensor:
            x = torch.randn(2, length, heads, dim, generator=rng, device=device).transpose(1, 2)
            return x if strided else x.contiguous()

        key_mask = None
        if padding is not None:
            key_mask = torch.ones(2, kv_len, dtype=torch.bool, device=device)
            if padding == "left":
                key_mask[0, : kv_len // 3] = False
            elif padding == "right":
                key_mask[1, -(kv_len // 3):] = False
            elif padding == "all":
                key_mask[0] = False
            else:
                key_mask &= torch.rand(2, kv_len, generator=rng, device=device) > 0.3
        # Peaked like trained attention: with unit queries every block would carry the same share.
        return cls(normal(q_len, 4, head_dims[0]) * 3, normal(kv_len, 2, head_dims[0]), normal(kv_len, 2, head_dims[1]),
                   causal_offset, key_mask)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @property
    def masks(self) -> dict:
        return {"scale": self.scale, "causal_offset": self.causal_offset, "key_mask": self.key_mask}

    @property
    def arguments(self) -> tuple:
        """From `scale` on, as the ops take them by position."""
        return self.scale, self.causal_offset, None, self.key_mask, None, None, None, 0.0, None

    @property
    def units(self) -> float:
        """Rounding units of this attention."""
        return attention_units(self.q, self.k, self.scale)

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def double(self) -> "Case":
        """The same rounded inputs, for the truth."""
        return self.to(torch.float64)


def plain_attention(case: Case, kept: Tensor | None = None) -> Tensor:
    """What plain torch makes of it in the dtype of the case: the yardstick of the error."""
    return oracle.attention(*case.qkv, **case.masks, kept=kept)[0]
