"""Exact attention: the kernels that can run a call, by name.

    sdpa        scaled_dot_product_attention, on the kernel that torch chooses; with a mask tensor where it must
    cudnn, flash, efficient    one kernel of SDPA's, called without torch's choice, where no mask tensor is needed
    lists       block-sparse attention of ours over all allowed blocks: it skips blocks and builds no mask tensor
    composite   plain torch, some rows at a time: what nothing else takes

All give the same to rounding; rows that see no key give zeros. FlexAttention is not among them: every shape and mask
would be compiled by Inductor inside an op, seconds each, and on an H100 it has 0.65 of cuDNN's rate (4K to 32K).
`usual_kernel` is what runs where nothing was measured.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from sparsify.kernels import composite, native
from sparsify.kernels.blocks import QUERY_BLOCK, allowed_blocks
from sparsify.kernels.masks import Masks
from sparsify.kernels.rule import every_block
from sparsify.ops.lists import attend_lists, has_kernels

aten = torch.ops.aten
LONG_ON_CPU = 1024  # queries and keys


def run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """Attention by the kernel of this name, one of `kernels_of` the call; laid out as the fakes promise."""
    if name == "lists":
        return _attend_all(q, k, v, scale, masks)
    if name == "composite":
        return composite.attention(q, k, v, scale=scale, masks=masks)
    if name == "sdpa":
        return _lay_out(_sdpa(q, k, v, scale, masks))
    return _lay_out(_FUSED[name][1](q, k, v, masks.causal_offset is not None and _is_top_left(q, k, masks), scale))


def usual_kernel(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> str:
    """The exact kernel by constants measured elsewhere."""
    if _beats_sdpa_on_cpu(q, k):
        return "lists"
    if _is_for_sdpa(q, k, masks):
        return "sdpa"
    if _is_for_lists(q, v, masks):
        return "lists"
    return "sdpa" if masks.reshapes_nothing else "composite"


def kernels_of(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> tuple[str, ...]:
    """The kernels worth timing for this call, the usual one first."""
    usual = usual_kernel(q, k, v, masks)
    names = [usual]
    if usual != "sdpa" and masks.reshapes_nothing:
        names.append("sdpa")
    if usual == "sdpa":
        names += [name for name in _FUSED if can_run(name, q, k, v, masks)]
    if usual != "lists" and can_run("lists", q, k, v, masks):
        names.append("lists")
    return tuple(names)


def can_run(name: str, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> bool:
    """Whether a kernel that was fastest for the class of this call takes the call itself; costs a microsecond."""
    if name in _FUSED:
        if not (q.is_cuda and _is_for_sdpa(q, k, masks)):
            return False
        causal = masks.causal_offset is not None and _is_top_left(q, k, masks)
        # torch's own rules: device, dtype, head dim, strides, and the switches of torch.backends.cuda
        return bool(_FUSED[name][0](SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])))
    if name == "lists":
        return has_kernels(q, v) if q.is_cuda else q.shape[2] >= QUERY_BLOCK and native.why_not(q) is None
    return name == "composite" or (name == "sdpa" and masks.reshapes_nothing)


def _attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> Tensor:
    """Block-sparse attention of ours over all allowed blocks."""
    if q.is_cuda:
        from sparsify.kernels import every, hopper, hopper_coverage  # Triton: imported when a CUDA op runs, not before

        if every.covers(masks):
            if hopper_coverage.why_not(q, k, v, masks) is None:
                return hopper.attention(q, k, v, scale=scale, masks=masks)[0]
            return attend_lists(q, k, v, *every.every_block(q, k.shape[2], masks), scale, masks)[0]
    lists = every_block(allowed_blocks(masks, q.shape[2], k.shape[2], q.device), *q.shape[:2])
    return attend_lists(q, k, v, *lists, scale, masks)[0]


def _is_for_sdpa(q: Tensor, k: Tensor, masks: Masks) -> bool:
    """Whether scaled_dot_product_attention says these masks without a tensor."""
    sees_all = masks.causal_offset is None or masks.causal_offset >= k.shape[2] - 1
    return masks.is_plain and masks.key_mask is None and (sees_all or _is_top_left(q, k, masks))


def _is_top_left(q: Tensor, k: Tensor, masks: Masks) -> bool:
    """Whether `is_causal` of SDPA is all there is to say."""
    return masks.is_plain and masks.key_mask is None and masks.causal_offset == 0 and q.shape[2] == k.shape[2]


def _beats_sdpa_on_cpu(q: Tensor, k: Tensor) -> bool:
    """Whether ours is faster even where SDPA needs no mask tensor: 1.1 to 1.7 times from 1K keys, on matrix registers.

    In float32: half precisions are computed in float32, and SDPA has products of bfloat16, twice as fast.
    """
    return (not q.is_cuda and q.dtype == torch.float32 and min(q.shape[2], k.shape[2]) >= LONG_ON_CPU
            and native.uses_matrix_registers())


def _is_for_lists(q: Tensor, v: Tensor, masks: Masks) -> bool:
    """Whether block-sparse attention over all allowed blocks is the fastest exact way: it builds no mask tensor.

    On a CPU, wherever query blocks are full (before its products were fast, at 256 to 4096 keys, already 0.9 to 6 times
    as fast as SDPA with a mask tensor). On CUDA, where it skips blocks or SDPA has no word.
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


# What scaled_dot_product_attention calls for each of its kernels, without the choice. `sdpa_kernel` would cost the host
# 10 microseconds a call, and switch the choice of every other thread meanwhile.


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, causal, False, scale=scale)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, causal, scale=scale)[0]


def _can_use_flash(call: SDPAParams) -> bool:
    """SDPA pads head dims to a multiple of 8 for this kernel; padding is left to it."""
    return call.query.shape[3] % 8 == 0 and can_use_flash_attention(call)


def _can_use_efficient(call: SDPAParams) -> bool:
    return call.query.shape[1] == call.key.shape[1] and can_use_efficient_attention(call)


_FUSED: dict[str, tuple[Callable[[SDPAParams], bool], Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]]] = {
    "cudnn": (can_use_cudnn_attention, _cudnn),
    "flash": (_can_use_flash, _flash),
    "efficient": (_can_use_efficient, _efficient),
}


def _lay_out(out: Tensor) -> Tensor:
    """`out` [B, H, q_len, Dv] as the fakes promise it: [B, q_len, H, Dv] in memory."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
