"""The attention ops: `sparsify::block_sparse_attention`, `::adaptive_attention` and `::exact_attention`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.errors import ShapeError
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, allowed_blocks, capacity, count_blocks
from sparsify.kernels.masks import Masks
from sparsify.ops import counters, crossover, exact, probing
from sparsify.ops.checks import check_inputs, check_protected, check_shifts, check_tolerance
from sparsify.ops.lists import attend_lists, has_kernels
from sparsify.ops.select import keep_lists


@torch.library.custom_op("sparsify::block_sparse_attention", mutates_args=())
def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, scale: float,
                           causal_offset: int | None, window: int | None, key_mask: Tensor | None,
                           query_documents: Tensor | None, key_documents: Tensor | None, attn_mask: Tensor | None,
                           softcap: float, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of the kept blocks.

    Shapes and masks as in `sparsify.ops`; kept and counts as `select_blocks` returns them. Returns out
    [B, H, q_len, Dv] in the dtype of q, laid out in memory as [B, q_len, H, Dv], and lse float32 [B, H, q_len], the
    natural log of every row's sum (-inf for a row that sees no key). Raises ShapeError, DeviceError.
    Source: online softmax over blocks as in FlashAttention (arXiv 2205.14135).
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    rows, room = count_blocks(q.shape[2], QUERY_BLOCK), capacity(count_blocks(k.shape[2], KEY_BLOCK))
    lists = (q.shape[0], q.shape[1], rows)
    if tuple(counts.shape) != lists or tuple(kept.shape) != (*lists, room):
        raise ShapeError(f"kept has shape {list(kept.shape)} and counts {list(counts.shape)}. For these q and k they "
                         f"must be {[*lists, room]} and {list(lists)}: make them with select_blocks.")
    out, lse = attend_lists(q, k, v, kept, counts, scale, masks)
    return out, lse.float()


@block_sparse_attention.register_fake
def _(q, k, v, kept, counts, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap,
      sink_logits):
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsify::adaptive_attention", mutates_args=())
def adaptive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None, window: int | None,
                       key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                       attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, tolerance: float,
                       max_density: float, sinks: int, local: int, singles: int, site: int, version: int,
                       peaks: float = 0.0, shifts: Sequence[float] | None = None,
                       protected: Tensor | None = None) -> Tensor:
    """Attention that drops the key blocks to which no query of a query block gives `tolerance` of its attention.

    A call for which selection would not pay runs exact: few heads, short sequences (`crossover.selection_pays`).
    While somebody probes (`sparsify.ops.probing`), the probe's budget holds in place of the arguments.

    Shapes and masks as in `sparsify.ops`; budget, shifts and protected as in `select_blocks`. `site` names the
    attention site to `sparsify.ops.counting`; `version` is `sparsify.ops.VERSION` of the graph that calls; `peaks` (see
    `sparsify.Budget`; 0.0: not known) tells what density to reckon with. Returns out [B, H, q_len, Dv] in the dtype of
    q, laid out in memory as [B, q_len, H, Dv]. Raises ShapeError, DeviceError, OptionError.
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    check_tolerance(tolerance)
    check_shifts(shifts, q)
    check_protected(protected, k)
    probe = probing.active()
    if probe is None:
        drops = has_kernels(q, v) and crossover.selection_pays(q, k, v, scale, masks, tolerance, singles, peaks, shifts)
    else:
        if probe.watch is not None:
            probe.watch(site, q, k, v, scale, masks)
        budget = probe.budget_of(site, k.shape[2])
        max_density, sinks, local, singles = budget.max_density, budget.sinks, budget.local, budget.singles
        drops = budget.tolerance is not None and has_kernels(q, v)
        tolerance, shifts = budget.tolerance or 0.0, budget.shifts
    if not drops:
        if counters.is_counting():
            counters.record_all(site)
        return _exact(q, k, v, scale, masks)
    return attend_kept(site, q, k, v, scale, masks, tolerance, max_density, sinks, local, singles, shifts, protected)


@adaptive_attention.register_fake
def _(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      tolerance, max_density, sinks, local, singles, site, version, peaks=0.0, shifts=None, protected=None):
    return empty_out(q, v)


@torch.library.custom_op("sparsify::exact_attention", mutates_args=())
def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None, window: int | None,
                    key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                    attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, version: int) -> Tensor:
    """Dense attention on the fastest kernel for this call (`crossover.exact_kernel`); exact, for the dense buckets.

    Shapes and masks as in `sparsify.ops`; `version` as in `adaptive_attention`. Returns out [B, H, q_len, Dv] in the
    dtype of q, laid out in memory as [B, q_len, H, Dv]. Raises ShapeError, DeviceError, OptionError.
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    return _exact(q, k, v, scale, masks)


@exact_attention.register_fake
def _(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      version):
    return empty_out(q, v)


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """Nothing is dropped; laid out as the fakes promise."""
    name, usual = crossover.exact_kernel(q, k, v, scale, masks), exact.usual_kernel(q, k, v, masks)
    try:
        return exact.run(name, q, k, v, scale, masks)
    except RuntimeError:  # it ran when its class was measured; the usual kernel may have no such limit
        if name == usual:
            raise
    return exact.run(usual, q, k, v, scale, masks)


def attend_kept(site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, tolerance: float,
                max_density: float, sinks: int, local: int, singles: int, shifts: Sequence[float] | None,
                protected: Tensor | None) -> Tensor:
    """Selection, then attention over its lists, counted for `site`: what sparse calls of every op are."""
    kept, counts = keep_lists(q, k, scale, masks, tolerance, max_density, sinks, local, singles, shifts, protected)
    if counters.is_counting():
        counters.record(site, counts, allowed_blocks(masks, q.shape[2], k.shape[2], q.device))
    return attend_lists(q, k, v, kept, counts, scale, masks)[0]


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """What the fakes of the attention ops return: true shape, dtype and strides."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
