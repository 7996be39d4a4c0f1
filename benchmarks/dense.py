"""The dense kernels that every speed is measured against, each as a call on the inputs of a layer.

`dense_calls` are those of the workloads, FlexAttention among them: it is compiled anew for every length. `bare_calls`
are the kernels of SDPA alone, called without the choice that `scaled_dot_product_attention` makes on the host.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.workloads import Call, Layer

aten = torch.ops.aten
LONGEST = {"flex": 32768, "efficient": 32768}
"""Keys up to which a rival is timed: beyond, these are far behind, and slow to compile or large."""
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def dense_calls(layer: Layer, skip: Collection[str] = ()) -> dict[str, Call]:
    """Every dense kernel that may run here; one that does not raises RuntimeError when it is called."""
    if layer.workload.device == "cpu":
        return {"sdpa": partial(scaled_dot_product_attention, *layer.qkv, **_arguments(layer, _mask(layer)))}
    names = [name for name in ("cudnn", "flash", "flex", "efficient")
             if name not in skip and layer.length <= LONGEST.get(name, layer.length)]
    mask = _mask(layer)
    return {name: _flex(layer) if name == "flex" else _flash(layer, mask) if name == "flash" else
            _backend(layer, name, mask) for name in names}


def bare_calls(layer: Layer) -> dict[str, Call]:
    """SDPA as torch chooses, and its kernels one by one; square causal or full layers without padding."""
    q, k, v = layer.qkv
    causal, scale = layer.workload.causal, layer.scale
    if layer.masks.key_mask is not None or (causal and layer.q_len != layer.length):
        raise ValueError(f"{layer.workload.name} needs a mask tensor, which these kernels are not given")
    sdpa = partial(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, causal, scale=scale, enable_gqa=True)
    if not q.is_cuda:
        return {"sdpa": sdpa}
    keys, values = _repeated(layer)
    return {
        "sdpa": sdpa,
        "cudnn": lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, causal, False,
                                                                  scale=scale)[0],
        "flash": lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0],
        "efficient": lambda: aten._scaled_dot_product_efficient_attention(q, keys, values, None, False, 0.0, causal,
                                                                          scale=scale)[0],
    }


def _mask(layer: Layer) -> Tensor | None:
    """What `is_causal` cannot say: padding, and causality to the bottom right."""
    if layer.masks.key_mask is None and (not layer.workload.causal or layer.q_len == layer.length):
        return None
    return layer.masks.visible(layer.q_len, layer.length, torch.device(layer.workload.device))


def _arguments(layer: Layer, mask: Tensor | None) -> dict:
    grouped = layer.workload.heads != layer.workload.kv_heads
    causal = layer.workload.causal and mask is None
    return {"attn_mask": mask, "is_causal": causal, "scale": layer.scale, "enable_gqa": grouped}


def _backend(layer: Layer, name: str, mask: Tensor | None) -> Call:
    q, k, v = layer.qkv
    arguments = _arguments(layer, mask)
    if name == "efficient":
        k, v = _repeated(layer)
        arguments["enable_gqa"] = False

    def run() -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(q, k, v, **arguments)

    return run


def _flash(layer: Layer, mask: Tensor | None) -> Call:
    """Without a mask tensor, which it does not take; its own causality is to the bottom right, unlike `is_causal`."""
    if mask is None or layer.masks.key_mask is not None:
        return _backend(layer, "flash", mask)
    q, k, v = layer.qkv
    return lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=layer.scale)[0]


def _flex(layer: Layer) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = layer.qkv
    shown, is_causal = layer.masks.key_mask, layer.workload.causal
    reach = layer.length if layer.masks.causal_offset is None else layer.masks.causal_offset

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees = key <= query + reach
        return sees if shown is None else sees & shown[batch, key]

    torch._dynamo.reset()  # each length compiles one function anew, and Dynamo runs it eager after the eighth
    mask = None
    if is_causal or shown is not None:
        mask = create_block_mask(visible, None if shown is None else q.shape[0], None, q.shape[2], k.shape[2],
                                 device=q.device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, scale=layer.scale, enable_gqa=True)


def _repeated(layer: Layer) -> tuple[Tensor, Tensor]:
    """Keys and values for the efficient kernel, which has no grouped heads."""
    group = layer.workload.heads // layer.workload.kv_heads
    _, k, v = layer.qkv
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
