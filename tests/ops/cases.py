"""Random attention inputs of the op tests."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import oracle
from sparsify.kernels.masks import Masks
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


# The same, and what else the scores may meet; a number is a window.
EXTRAS = [
    (300, 300, 0, None, (100,)),
    (300, 500, 200, "left", (65, "sinks")),  # ends within a block on either side
    (300, 300, 60, None, (121, "cap")),  # symmetric: 60 keys to either side
    (200, 260, -60, None, (1,)),  # one key a row, or none
    (300, 500, None, "holes", ("documents",)),
    (300, 300, 0, None, ("documents", "cap", "sinks")),
    (129, 321, 63, "right", ("bias",)),
    (200, 200, None, None, ("alibi",)),
    (200, 333, None, "holes", ("bool",)),
    (129, 70, None, None, ("rows",)),
    (257, 448, 191, "all", ("cap", "sinks")),
    (1, 65, 64, None, (30, "documents", "bias", "cap", "sinks")),
    (300, 200, -100, "left", (150, "documents", "bool", "cap", "sinks")),
]


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    masks: Masks

    @classmethod
    def random(cls, rng: torch.Generator, device: torch.device, q_len: int, kv_len: int, causal_offset: int | None,
               padding: str | None, extras: tuple[int | str, ...] = (), head_dims: tuple[int, int] = (64, 64),
               strided: bool = True) -> "Case":
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
        masks = Masks(causal_offset, key_mask=key_mask, **draw_extras(rng, (2, 4, q_len, kv_len), extras))
        # Peaked like trained attention: with unit queries every block would carry the same share.
        return cls(normal(q_len, 4, head_dims[0]) * 3, normal(kv_len, 2, head_dims[0]), normal(kv_len, 2, head_dims[1]),
                   masks)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @property
    def sizes(self) -> dict[str, int]:
        return {"q_len": self.q.shape[2], "kv_len": self.k.shape[2]}

    @property
    def named(self) -> dict[str, Any]:
        """From `scale` on, as the oracle takes them."""
        return {"scale": self.scale, **{field.name: getattr(self.masks, field.name) for field in fields(Masks)}}

    @property
    def arguments(self) -> tuple:
        """The same, as the ops take them by position."""
        return tuple(self.named.values())

    @property
    def units(self) -> float:
        """Rounding units of this attention."""
        bias = self.masks.bias
        largest = 0.0 if bias is None else float(bias[bias.isfinite()].abs().max())
        return attention_units(self.q, self.k, self.scale) + largest

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def double(self) -> "Case":
        """The same rounded inputs, for the truth."""
        return self.to(torch.float64)

    def but(self, **changed: Any) -> "Case":
        """The same inputs under other masks."""
        return replace(self, masks=replace(self.masks, **changed))


def draw_extras(rng: torch.Generator, sizes: tuple[int, int, int, int],
                extras: tuple[int | str, ...]) -> dict[str, Any]:
    """Fields of `Masks` for a call of these sizes: batch, query heads, q_len, kv_len."""
    batch, heads, q_len, kv_len = sizes
    device = rng.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    drawn: dict[str, Any] = {}
    for extra in extras:
        if isinstance(extra, int):
            drawn["window"] = extra
        elif extra == "documents":  # packed one behind the other; their ids ascend by steps of their own
            drawn["query_documents"] = (uniform(batch, q_len) > 0.98).cumsum(1) * 7
            drawn["key_documents"] = (uniform(1, kv_len) > 0.98).cumsum(1).int() * 7
        elif extra == "bias":  # some keys are hidden
            bias = uniform(batch, heads, q_len, kv_len) * 6 - 3
            drawn["attn_mask"] = bias.masked_fill(uniform(batch, 1, q_len, kv_len) > 0.8, -torch.inf)
        elif extra == "alibi":  # one row for all, expanded, in a dtype of its own
            slopes = 0.5 ** torch.arange(1, heads + 1, device=device)[:, None, None]
            row = (slopes * torch.arange(-kv_len, 0, device=device)).bfloat16()
            drawn["attn_mask"] = row.expand(1, heads, q_len, kv_len)
        elif extra == "bool":  # keys last in memory, and blocks of keys that rows do not see at all
            shown = (uniform(batch, 1, kv_len, q_len) > 0.4).mT
            shown[:, :, : q_len // 2, 64:128] = False
            drawn["attn_mask"] = shown
        elif extra == "rows":  # some see nothing
            drawn["attn_mask"] = uniform(batch, 1, q_len, 1) > 0.3
        elif extra == "cap":
            drawn["softcap"] = 4.0
        else:
            drawn["sink_logits"] = uniform(heads) * 6
    return drawn


def plain_attention(case: Case, kept: Tensor | None = None) -> Tensor:
    """What plain torch makes of it in the dtype of the case: the yardstick of the error."""
    return oracle.attention(*case.qkv, **case.named, kept=kept)[0].to(case.q.dtype)
