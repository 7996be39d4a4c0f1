"""Open the attention that torch.nn fuses at inference into linear layers, attention and norms.

Given   the arguments of a fused op, as normalise.py replays them.
Leaves  the same result, to rounding, by ops that the finder reads. The kernels are ATen's own semantics
        (native/transformers): a mask hides where it is true or not zero, whatever its dtype; a query that sees no key
        is not a number there and is zeros here, as in scaled_dot_product_attention.
Never   opens nested tensors: attention over them has no rectangular form.

    _transformer_encoder_layer_fwd(x, ...)  ->  linear, scaled_dot_product_attention, linear, layer_norm, linear, ...
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import transformer

aten = torch.ops.aten


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor,
                         qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None,
                         need_weights: bool = True, average_attn_weights: bool = True, mask_type: int | None = None,
                         ) -> tuple[Tensor, Tensor | None]:
    """`aten._native_multi_head_attention`."""
    if query.is_nested:
        return torch._native_multi_head_attention(
            query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, need_weights,
            average_attn_weights, mask_type)
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
        projected = tuple(F.linear(x, weight, bias)
                          for x, weight, bias in zip((query, key, value), weights, biases, strict=True))
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in projected)
    hidden = None if mask is None else _hidden(mask, mask_type)
    probabilities: Tensor | None = None
    if need_weights:
        scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
        probabilities = (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))).softmax(-1)
        attended = probabilities @ v
        probabilities = probabilities.sum(1) / num_head if average_attn_weights else probabilities
    else:
        attended = F.scaled_dot_product_attention(q, k, v, None if hidden is None else hidden.logical_not())
    return F.linear(attended.transpose(1, 2).flatten(2), proj_weight, proj_bias), probabilities


def _hidden(mask: Tensor, mask_type: int | None) -> Tensor:
    """Where scores [B, H, L, S] are hidden. `mask_type` 0: mask [L, S], 1: [B, S], 2 and None: as the scores."""
    hidden = mask.to(torch.bool)
    if mask_type == 0:
        return hidden[None, None]
    return hidden[:, None, None] if mask_type == 1 else hidden


def encoder_layer(src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
                  proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
                  norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
                  ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
                  mask: Tensor | None = None, mask_type: int | None = None) -> Tensor:
    """`aten._transformer_encoder_layer_fwd`."""
    if src.is_nested:
        return torch._transformer_encoder_layer_fwd(
            src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
            norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2,
            mask, mask_type)

    def attend(x: Tensor) -> Tensor:
        return multi_head_attention(x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
                                    False, True, mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first_norm(src))
        return x + feed_forward(second_norm(x))
    x = first_norm(src + attend(src))
    return second_norm(x + feed_forward(x))


OPENED: dict[Any, Callable[..., Any]] = {
    torch._native_multi_head_attention: multi_head_attention,
    aten._native_multi_head_attention.default: multi_head_attention,
    torch._transformer_encoder_layer_fwd: encoder_layer,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}
"""The function that computes what a fused op computes."""


if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_transformer_encoder_layer_fwd", "Meta"):
    # torch 2.11: without its shape Dynamo cannot put the op into a graph, and every layer is a graph break.
    @torch.library.register_fake("aten::_transformer_encoder_layer_fwd")
    def _encoder_layer_shape(src: Tensor, *_: Any) -> Tensor:
        if src.is_nested:
            raise NotImplementedError("the shape of a nested tensor")
        return torch.empty_like(src, memory_format=torch.contiguous_format)


@torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask)
def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether nn.Transformer may drop a causal mask.

    torch compares the values of the mask, which no graph can hold: nn.Transformer would run eagerly as a whole. While
    Dynamo traces, only what the caller said counts; the mask itself stays in the graph.
    """
    return is_causal is True
