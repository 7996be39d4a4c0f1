"""The attention ops: `sparsify::block_sparse_attention`, `::adaptive_attention` and `::exact_attention`."""

import torch
from torch import Tensor

from sparsify.errors import ShapeError
from sparsify.kernels import composite, gather, native
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, allowed_blocks, capacity, count_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.rule import every_block
from sparsify.ops import counters
from sparsify.ops.checks import check_inputs, check_tolerance
from sparsify.ops.select import keep_lists

LAUNCH_SECONDS = 1.3e-3
"""What selection, lists and attention cost the host, a call, inside a compiled model (beside an H100)."""
WIDEST_ON_CUDA = 256  # head dim of our kernels there
DENSE_RATE = {2: 4.5e14, 4: 5e13, 8: 2.5e13}
"""FLOP/s of dense attention on an H100 (head dim 64), by bytes an element; slower cards only gain more."""


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
    out, lse = _attend_lists(q, k, v, kept, counts, scale, masks)
    return out, lse.float()


@block_sparse_attention.register_fake
def _(q, k, v, kept, counts, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap,
      sink_logits):
    return _empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsify::adaptive_attention", mutates_args=())
def adaptive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None, window: int | None,
                       key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                       attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, tolerance: float,
                       max_density: float, sinks: int, local: int, singles: int, site: int, version: int) -> Tensor:
    """Attention that drops the key blocks to which no query of a query block gives `tolerance` of its attention.

    A call on CUDA that is too small for selection to pay runs exact: few heads, short sequences (`selection_pays`).

    Shapes and masks as in `sparsify.ops`, the budget as in `select_blocks`. `site` names the attention site to
    `sparsify.ops.counting`; `version` is `sparsify.ops.VERSION` of the graph that calls. Returns out
    [B, H, q_len, Dv] in the dtype of q, laid out in memory as [B, q_len, H, Dv]. Raises ShapeError, DeviceError.
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    check_tolerance(tolerance)
    if not has_kernels(q, v) or not selection_pays(q, k, v, masks):
        if counters.is_counting():
            counters.record_all(site)
        return _exact(q, k, v, scale, masks)
    kept, counts = keep_lists(q, k, scale, masks, tolerance, max_density, sinks, local, singles)
    if counters.is_counting():
        counters.record(site, counts, allowed_blocks(masks, q.shape[2], k.shape[2], q.device))
    return _attend_lists(q, k, v, kept, counts, scale, masks)[0]


@adaptive_attention.register_fake
def _(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      tolerance, max_density, sinks, local, singles, site, version):
    return _empty_out(q, v)


@torch.library.custom_op("sparsify::exact_attention", mutates_args=())
def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None, window: int | None,
                    key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                    attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, version: int) -> Tensor:
    """Dense attention on the fastest kernel for these masks; exact, for the dense buckets.

    Shapes and masks as in `sparsify.ops`; `version` as in `adaptive_attention`. Returns out [B, H, q_len, Dv] in the
    dtype of q, laid out in memory as [B, q_len, H, Dv]. Raises ShapeError, DeviceError, OptionError.
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    return _exact(q, k, v, scale, masks)


@exact_attention.register_fake
def _(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      version):
    return _empty_out(q, v)


def selection_pays(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> bool:
    """Whether dense attention takes long enough on CUDA to hide the launches of sparse attention; decided by shapes."""
    return not q.is_cuda or dense_seconds(q, k, v, masks) > LAUNCH_SECONDS


def dense_seconds(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> float:
    """Seconds that dense attention of these shapes takes at `DENSE_RATE`; causal: the lower half, or its window."""
    keys = k.shape[2] / (1 if masks.causal_offset is None else 2)
    if masks.window is not None:
        keys = min(keys, masks.window)
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * keys
    return 2 * pairs * (q.shape[3] + v.shape[3]) / DENSE_RATE[q.element_size()]


def has_kernels(q: Tensor, v: Tensor) -> bool:
    """Whether block-sparse attention of ours takes this dtype and head dim; on a CPU it takes all."""
    return not q.is_cuda or (q.element_size() < 8 and max(q.shape[3], v.shape[3]) <= WIDEST_ON_CUDA)


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """Nothing is dropped; laid out as the fakes promise."""
    if _is_for_sdpa(q, k, masks):
        return _lay_out(_sdpa(q, k, v, scale, masks))
    if _is_for_lists(q, v, masks):
        allowed = allowed_blocks(masks, q.shape[2], k.shape[2], q.device)
        return _attend_lists(q, k, v, *every_block(allowed, *q.shape[:2]), scale, masks)[0]
    if masks.reshapes_nothing:
        return _lay_out(_sdpa(q, k, v, scale, masks))
    return composite.attention(q, k, v, scale=scale, masks=masks)


def _is_for_sdpa(q: Tensor, k: Tensor, masks: Masks) -> bool:
    """Whether scaled_dot_product_attention says these masks without a tensor: nobody is faster."""
    sees_all = masks.causal_offset is None or masks.causal_offset >= k.shape[2] - 1
    return masks.is_plain and masks.key_mask is None and (sees_all or _is_top_left(q, k, masks))


def _is_top_left(q: Tensor, k: Tensor, masks: Masks) -> bool:
    """Whether `is_causal` of SDPA is all there is to say."""
    return masks.is_plain and masks.key_mask is None and masks.causal_offset == 0 and q.shape[2] == k.shape[2]


def _is_for_lists(q: Tensor, v: Tensor, masks: Masks) -> bool:
    """Whether block-sparse attention over all allowed blocks is the fastest exact way: it builds no mask tensor.

    On a CPU, wherever query blocks are full (measured at 256 to 4096 keys: 0.9 to 6 times as fast as SDPA with a mask
    tensor; a query block of 64 rows costs as much as one of 128). On CUDA, where it skips blocks or SDPA has no word.
    """
    if not q.is_cuda:
        return q.shape[2] >= QUERY_BLOCK and native.why_not(q) is None
    skips = masks.window is not None or masks.query_documents is not None
    return has_kernels(q, v) and (skips or not masks.reshapes_nothing)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """scaled_dot_product_attention, with a mask tensor where it cannot say the masks without."""
    causal, mask, sees = _is_top_left(q, k, masks), None, None
    if not causal:
        mask = sees = masks.visible(q.shape[2], k.shape[2], q.device)
        if masks.bias is not None:
            bias = masks.bias.to(q.dtype)
            mask = bias if sees is None else bias.masked_fill(~sees, -torch.inf)
            sees = mask > -torch.inf
        if mask is not None and mask.shape[3] != k.shape[2]:  # fused kernels want a mask's last dimension dense
            mask = mask.expand(-1, -1, -1, k.shape[2]).contiguous()
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and q.dtype == torch.float32:  # no fused kernel has grouped heads in float32
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1)
    if sees is not None:  # kernels disagree about rows that see nothing: NaN, zeros or the mean of v
        out = out.masked_fill(~sees.any(-1, keepdim=True), 0.0)
    return out


def _attend_lists(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, scale: float,
                  masks: Masks) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        cpu = gather if native.why_not(q) else native
        return cpu.block_sparse_attention(q, k, v, kept, counts, scale=scale, masks=masks)
    from sparsify.kernels import attend, hopper  # Triton: imported when a CUDA op runs, not before

    kernel = attend if hopper.why_not(q, k, v, masks) else hopper
    return kernel.block_sparse_attention(q, k, v, kept, counts, scale=scale, masks=masks)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)


def _lay_out(out: Tensor) -> Tensor:
    """`out` [B, H, q_len, Dv] as the fakes promise it: [B, q_len, H, Dv] in memory."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
