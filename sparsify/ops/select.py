"""The op `sparsify::select_blocks`: which key blocks every query block keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import estimate, native, rule
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, capacity, count_blocks, protected_blocks
from sparsify.kernels.masks import Masks
from sparsify.ops.checks import check_inputs, check_protected, check_shifts, check_tolerance


@torch.library.custom_op("sparsify::select_blocks", mutates_args=())
def select_blocks(q: Tensor, k: Tensor, scale: float, causal_offset: int | None, window: int | None,
                  key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                  attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, tolerance: float,
                  max_density: float, sinks: int, local: int, singles: int, shifts: Sequence[float] | None = None,
                  protected: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep every key block to which some query of the query block is estimated to give `tolerance` of its attention.

    Shapes and masks as in `sparsify.ops`. tolerance and max_density are shares, 0 to 1; sinks and local are key blocks
    that are always kept; singles is m, the keys that a split summary keeps single (see `sparsify.Budget`). shifts holds
    a factor per query head on the tolerance, 0 (all is kept) to 1. protected is bool [B or 1, kv_len]: a key block with
    a protected key is kept by all query blocks that may see it.
    Returns kept int32 [B, H, query blocks, capacity] and counts int32 [B, H, query blocks], see `KeptLists`.
    Raises ShapeError, DeviceError, OptionError. Source: kernels/oracle.py defines the peaks, kernels/rule.py the rule;
    on Hopper calls of 16 bits under causality and a key mask estimate in eight bits (kernels/hopper_select.py).
    """
    masks = check_inputs(q, k, None, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                           softcap, sink_logits))
    check_tolerance(tolerance)
    check_shifts(shifts, q)
    check_protected(protected, k)
    return keep_lists(q, k, scale, masks, tolerance, max_density, sinks, local, singles, shifts, protected)


@select_blocks.register_fake
def _(q, k, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      tolerance, max_density, sinks, local, singles, shifts=None, protected=None):
    batch, heads, q_len, _ = q.shape
    rows = count_blocks(q_len, QUERY_BLOCK)
    room = capacity(count_blocks(k.shape[2], KEY_BLOCK))
    return q.new_empty(batch, heads, rows, room, dtype=torch.int32), q.new_empty(batch, heads, rows, dtype=torch.int32)


def keep_lists(q: Tensor, k: Tensor, scale: float, masks: Masks, tolerance: float, max_density: float, sinks: int,
               local: int, singles: int, shifts: Sequence[float] | None = None,
               protected: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Select on the device of q, for the ops that need lists; the arguments are those of `select_blocks`."""
    budget: dict[str, Any] = {"tolerance": tolerance, "max_density": max_density, "sinks": sinks, "local": local,
                              "shifts": shifts,
                              "protected": None if protected is None else protected_blocks(protected)}
    if q.is_cuda:
        from sparsify.kernels import select  # Triton: imported when a CUDA op runs, not before

        return select.select_blocks(q, k, scale=scale, singles=singles, masks=masks, **budget)
    peaks = estimate_peaks(q, k, scale, masks, singles)
    return rule.choose_blocks(peaks, q_len=q.shape[2], kv_len=k.shape[2], masks=masks, **budget)


def estimate_peaks(q: Tensor, k: Tensor, scale: float, masks: Masks, singles: int) -> Tensor:
    """The peaks that selection goes by on the device of q: [B, H, query blocks, key blocks], float32 or better."""
    estimator: Any = estimate if native.why_not(q) else native
    if q.is_cuda:
        from sparsify.kernels import select

        estimator = select
        if select.runs_on_hopper(q, k, masks, singles):
            from sparsify.kernels import hopper_select

            estimator = hopper_select
    return estimator.estimated_peaks(q, k, scale=scale, masks=masks, singles=singles)
