"""The op `sparsify::check_mask`: what a proof says of a mask, compared with the mask itself, at run time.

A graph compiled with options={"verify_masks": True} has one in front of every attention that had a mask. It keeps the
code that builds the mask alive, makes bool tensors of [q_len, kv_len] (for every batch row and head where the mask
differs by them) and waits for the device: for finding a wrong proof, not for production.
"""

import torch
from torch import Tensor

from sparsify.errors import MaskError, ShapeError
from sparsify.kernels.masks import Masks

HIDDEN = -9e3
"""An added value from here down hides. Proofs ask for -1e4, which bfloat16 rounds to -9984."""


@torch.library.custom_op("sparsify::check_mask", mutates_args=())
def check_mask(q: Tensor, mask: Tensor, kv_len: int, causal_offset: int | None, window: int | None,
               key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
               attn_mask: Tensor | None, site: int, line: str) -> Tensor:
    """A copy of q, if mask and proof show each query the same keys; attention reads the copy, so the check stays.

    mask is all that the graph masks the scores with, in one tensor like attn_mask: [B or 1, H or 1, q_len or 1,
    kv_len or 1], bool (True is visible) or floating (added). The arguments from causal_offset to attn_mask are the
    proof, as attention gets them (see `sparsify.ops`). site and line name the attention site in the error. Raises
    MaskError, and ShapeError where mask does not fit.
    """
    proof = Masks(causal_offset, window, key_mask, query_documents, key_documents,
                  None if attn_mask is None else _visible(attn_mask))
    shown = proof.visible(q.shape[2], kv_len, q.device)
    if shown is None:
        shown = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    visible, scores = _visible(mask), (*q.shape[:3], kv_len)
    try:
        wrong = (visible ^ shown).expand(scores)
    except RuntimeError as error:
        raise ShapeError(f"mask has shape {list(mask.shape)}. It must broadcast to [batch, heads, q_len, kv_len], "
                         f"here {list(scores)}.") from error
    if wrong.any():
        batch, head, query, key = place = tuple(wrong.nonzero()[0].tolist())
        shows, hides = ("mask", "proof") if visible.expand(scores)[place] else ("proof", "mask")
        raise MaskError(
            f"site {site} at {line}: the {shows} shows key {key} to query {query} (batch row {batch}, head {head}) and "
            f"the {hides} hides it; {int(wrong.sum())} of {wrong.numel()} pairs differ. The proof of this mask does "
            "not hold for these inputs: please report it, and run the model without sparsify until then.")
    return q.clone()


@check_mask.register_fake
def _(q, mask, kv_len, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, site, line):
    return torch.empty_like(q)


def _visible(mask: Tensor) -> Tensor:
    return mask > HIDDEN if mask.is_floating_point() else mask
