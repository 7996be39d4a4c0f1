"""What the scores of an attention meet between the product q k^T and the softmax; flat arguments in the ops' schemas.

    scores = scale * q k^T
    scores = softcap * tanh(scores / softcap)         where softcap is above 0
    scores = scores + attn_mask                       where attn_mask is floating
    scores = -inf                                     where a mask hides the key
    weights = exp(scores) / (sum of exp(scores) + exp(sink_logits))

All masks hold together, and a row that sees no key gives zeros.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """Masks, bias, soft cap and sink logits of one call; H is the number of query heads.

    causal_offset    key j is visible to query i only if j <= i + causal_offset
    window           and only if j > i + causal_offset - window; never without causal_offset
    key_mask         bool [B or 1, S], True where the key may be attended
    query_documents  int32 or int64 [B or 1, L]: visible only if the ids are equal
    key_documents    int32 or int64 [B or 1, S]; both or neither
    attn_mask        [B or 1, H or 1, L or 1, S or 1], any strides; bool: True is visible; floating: added, -inf hides
    softcap          0.0: none
    sink_logits      floating [H]: a logit per head that takes part in the softmax and carries no value
    """

    causal_offset: int | None = None
    window: int | None = None
    key_mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    attn_mask: Tensor | None = None
    softcap: float = 0.0
    sink_logits: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but causality and a key mask, which every kernel knows."""
        return (self.window is None and self.query_documents is None and self.attn_mask is None
                and self.reshapes_nothing)

    @property
    def reshapes_nothing(self) -> bool:
        """Whether the softmax is the usual one over the scores: no soft cap, no sink logits."""
        return not self.softcap and self.sink_logits is None

    @property
    def bias(self) -> Tensor | None:
        """attn_mask, if it is added."""
        return self.attn_mask if self.attn_mask is not None and self.attn_mask.is_floating_point() else None

    def of_rows(self, first: int, count: int) -> "Masks":
        """The same masks, seen from the `count` rows that start at `first`."""
        rows = slice(first, first + count)
        offset = None if self.causal_offset is None else self.causal_offset + first
        documents = None if self.query_documents is None else self.query_documents[:, rows]
        mask = self.attn_mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        return replace(self, causal_offset=offset, query_documents=documents, attn_mask=mask)

    def of_keys(self, count: int) -> "Masks":
        """The same masks over the first `count` keys."""
        keys = slice(0, count)
        shown, documents = (None if x is None else x[:, keys] for x in (self.key_mask, self.key_documents))
        mask = self.attn_mask
        if mask is not None and mask.shape[3] > 1:
            mask = mask[..., keys]
        return replace(self, key_mask=shown, key_documents=documents, attn_mask=mask)

    def of_batch(self, batch: int) -> "Masks":
        """The same masks for one batch row alone."""
        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[batch % len(x)][None]

        return replace(self, key_mask=one(self.key_mask), query_documents=one(self.query_documents),
                       key_documents=one(self.key_documents), attn_mask=one(self.attn_mask))

    def visible(self, q_len: int, kv_len: int, device: torch.device) -> Tensor | None:
        """Which query may see which key: bool, broadcastable to [B, H, q_len, kv_len]; None: all see all.

        A bias hides where it is -inf; that is left to whoever adds it.
        """
        parts: list[Tensor] = []
        if self.causal_offset is not None and (self.window is not None or self.causal_offset < kv_len - 1):
            ends = torch.arange(q_len, device=device)[:, None] + self.causal_offset
            keys = torch.arange(kv_len, device=device)
            seen = keys <= ends
            parts.append((seen if self.window is None else seen & (keys > ends - self.window))[None, None])
        if self.key_mask is not None:
            parts.append(self.key_mask[:, None, None])
        if self.query_documents is not None and self.key_documents is not None:
            parts.append((self.query_documents[..., None] == self.key_documents[:, None])[:, None])
        if self.attn_mask is not None and self.bias is None:
            parts.append(self.attn_mask)
        return functools.reduce(torch.logical_and, parts) if parts else None

    def scores(self, products: Tensor, scale: float) -> Tensor:
        """From q k^T [B, H, q_len, kv_len] to what the softmax is taken of; -inf where a key is hidden."""
        scores = self.cap(products * scale)
        if self.bias is not None:
            scores = scores + self.bias
        seen = self.visible(products.shape[2], products.shape[3], products.device)
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled scores under the soft cap."""
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores
