"""Checks that the ops make of what they are handed; each raises an error that names argument, value and way out."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.errors import DeviceError, OptionError, ShapeError
from sparsify.kernels.masks import Masks


def check_inputs(q: Tensor, k: Tensor, v: Tensor | None, masks: Masks) -> Masks:
    """q, k, v and masks fit together (shapes as in `sparsify.ops`). Raises ShapeError, DeviceError, OptionError.

    Returns the masks, an expanded attn_mask as the smaller tensor that it repeats.
    """
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ShapeError(f"{name} has shape {list(x.shape)}. It must be [batch, heads, length, head dim].")
        if x.dtype != q.dtype or not x.dtype.is_floating_point:
            raise ShapeError(f"{name} is {x.dtype} and q is {q.dtype}. Cast q, k and v to one floating dtype.")
        if x.device != q.device:
            raise DeviceError(f"{name} is on {x.device} and q is on {q.device}. Move all inputs to one device.")
        if x.shape[0] != q.shape[0]:
            raise ShapeError(f"{name} has batch {x.shape[0]} and q has {q.shape[0]}. They must be equal.")
        if x.shape[2] == 0:
            raise ShapeError(f"{name} has length 0 (shape {list(x.shape)}). Attention needs at least one token.")
    if k.shape[3] != q.shape[3]:
        raise ShapeError(f"k has head dim {k.shape[3]} and q has {q.shape[3]}. They must be equal.")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"q has {q.shape[1]} heads and k has {k.shape[1]}. "
                         "Query heads must be a multiple of KV heads.")
    if v is not None and v.shape[1:3] != k.shape[1:3]:
        raise ShapeError(f"v has shape {list(v.shape)} and k has {list(k.shape)}. Heads and length must be equal.")
    _check_masks(masks, q, k)
    mask = masks.attn_mask
    if mask is None or all(mask.stride()):
        return masks
    return replace(masks, attn_mask=mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())])


def _check_masks(masks: Masks, q: Tensor, k: Tensor) -> None:
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    for name in ("key_mask", "query_documents", "key_documents", "attn_mask", "sink_logits"):
        tensor = getattr(masks, name)
        if tensor is not None and tensor.device != q.device:
            raise DeviceError(f"{name} is on {tensor.device} and q is on {q.device}. Move all inputs to one device.")
    if masks.window is not None and masks.causal_offset is None:
        raise OptionError(f"window is {masks.window} but causal_offset is None. A window needs the offset that it ends "
                          "at: |i - j| <= w is causal_offset=w, window=2 * w + 1.")
    if not 0 <= masks.softcap < math.inf:
        raise OptionError(f"softcap is {masks.softcap}. It must be a finite number above 0, or 0.0 for none.")
    if masks.key_mask is not None:
        _check_rows("key_mask", masks.key_mask, batch, kv_len, "bool", masks.key_mask.dtype == torch.bool)
    documents = {"query_documents": (masks.query_documents, q_len), "key_documents": (masks.key_documents, kv_len)}
    if (masks.query_documents is None) != (masks.key_documents is None):
        missing = next(name for name, (ids, _) in documents.items() if ids is None)
        raise ShapeError(f"{missing} is None. Give query_documents and key_documents, or neither.")
    for name, (ids, length) in documents.items():
        if ids is not None:
            _check_rows(name, ids, batch, length, "int32 or int64", ids.dtype in (torch.int32, torch.int64))
    mask, most = masks.attn_mask, (batch, heads, q_len, kv_len)
    if mask is not None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, most, strict=True))
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ShapeError(f"attn_mask is {mask.dtype} {list(mask.shape)}. It must be bool (True: visible) or "
                             f"floating (added to the scores), {list(most)} with any size 1.")
    sinks = masks.sink_logits
    if sinks is not None and not (sinks.is_floating_point() and sinks.shape == (heads,)):
        raise ShapeError(f"sink_logits is {sinks.dtype} {list(sinks.shape)}. It must be floating [{heads}]: one logit "
                         "per query head.")


def _check_rows(name: str, tensor: Tensor, batch: int, length: int, dtype: str, is_dtype: bool) -> None:
    if not is_dtype or tensor.dim() != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != length:
        raise ShapeError(f"{name} is {tensor.dtype} {list(tensor.shape)}. It must be {dtype} [{batch} or 1, {length}].")


def check_tolerance(tolerance: float) -> None:
    """Raises OptionError for a tolerance that is no share of attention."""
    if not 0 <= tolerance <= 1:
        raise OptionError(f"tolerance is {tolerance}. It is a share of attention: give a number from 0 to 1.")


def check_shifts(shifts: Sequence[float] | None, q: Tensor) -> None:
    """Raises OptionError for shifts that are not one factor per query head."""
    if shifts is None:
        return
    if len(shifts) != q.shape[1]:
        raise OptionError(f"shifts has {len(shifts)} factors and q has {q.shape[1]} heads. Give one per query head.")
    wrong = next((x for x in shifts if not 0 <= x <= 1), None)
    if wrong is not None:
        raise OptionError(f"shifts holds {wrong}. They are factors on the tolerance: give numbers from 0 to 1.")


def check_protected(protected: Tensor | None, k: Tensor) -> None:
    """Raises ShapeError, DeviceError for protected keys that are not those of k."""
    if protected is None:
        return
    if protected.device != k.device:
        raise DeviceError(f"protected is on {protected.device} and k is on {k.device}. Move all inputs to one device.")
    _check_rows("protected", protected, k.shape[0], k.shape[2], "bool", protected.dtype == torch.bool)
