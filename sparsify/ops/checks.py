"""Checks that the ops make of what they are handed; each raises an error that names argument, value and way out."""

import torch
from torch import Tensor

from sparsify.errors import DeviceError, OptionError, ShapeError


def check_inputs(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None) -> None:
    """q, k, v and key_mask fit together (shapes as in `sparsify.ops`). Raises ShapeError or DeviceError."""
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
    if key_mask is not None:
        batch, kv_len = q.shape[0], k.shape[2]
        if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[1] != kv_len:
            raise ShapeError(f"key_mask is {key_mask.dtype} {list(key_mask.shape)}. It must be bool "
                             f"[{batch} or 1, {kv_len}], True where a key may be attended.")
        if key_mask.shape[0] not in (1, batch):
            raise ShapeError(f"key_mask has batch {key_mask.shape[0]}. It must be {batch} or 1.")


def check_tolerance(tolerance: float) -> None:
    """Raises OptionError for a tolerance that is no share of attention."""
    if not 0 <= tolerance <= 1:
        raise OptionError(f"tolerance is {tolerance}. It is a share of attention: give a number from 0 to 1.")
