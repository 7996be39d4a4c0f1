"""What torch.nn fuses at inference is opened, and computes the same."""

import pytest
import torch
from graphs import capture

from sparsify.passes import fused
from sparsify.passes.fused import encoder_layer, multi_head_attention

aten = torch.ops.aten

BATCH, LENGTH, DIM, HEADS = 2, 7, 16, 2

MASKS = {
    "none": (None, None),
    "attention": (torch.ones(LENGTH, LENGTH).triu(1).bool(), 0),
    "padding": (torch.arange(LENGTH) >= torch.tensor([[4], [7]]), 1),
    "padding as float": (torch.zeros(BATCH, LENGTH).masked_fill_(torch.arange(LENGTH) >= 4, float("-inf")), 1),
    "small numbers hide too": (torch.full((LENGTH, LENGTH), -5.0).triu(1), 0),
    "whole": (torch.ones(BATCH, HEADS, LENGTH, LENGTH).triu(2).bool(), 2),
    "whole, no type": (torch.ones(BATCH, HEADS, LENGTH, LENGTH).triu(1).bool(), None),
}


def projections():
    return torch.randn(3 * DIM, DIM) / 4, torch.randn(3 * DIM), torch.randn(DIM, DIM) / 4, torch.randn(DIM)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", ["none", "per head", "average"])
@pytest.mark.parametrize("same", [True, False])
def test_multi_head_attention_is_what_aten_computes(mask, weights, same):
    x = torch.randn(BATCH, LENGTH, DIM)
    query, key, value = (x, x, x) if same else (x, torch.randn_like(x), torch.randn_like(x))
    given = (query, key, value, DIM, HEADS, *projections(), MASKS[mask][0], weights != "none", weights == "average",
             MASKS[mask][1])
    output, probabilities = multi_head_attention(*given)
    expected, expected_probabilities = torch._native_multi_head_attention(*given)
    torch.testing.assert_close(output, expected)
    if weights != "none":
        torch.testing.assert_close(probabilities, expected_probabilities)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("use_gelu", [True, False])
def test_an_encoder_layer_is_what_aten_computes(mask, norm_first, use_gelu):
    norms = [torch.randn(DIM) for _ in range(4)]
    feed_forward = torch.randn(24, DIM) / 4, torch.randn(24), torch.randn(DIM, 24) / 4, torch.randn(DIM)
    given = (torch.randn(BATCH, LENGTH, DIM), DIM, HEADS, *projections(), use_gelu, norm_first, 1e-3, *norms,
             *feed_forward, *MASKS[mask])
    torch.testing.assert_close(encoder_layer(*given), torch._transformer_encoder_layer_fwd(*given))


@pytest.mark.skipif(not hasattr(fused, "_encoder_layer_shape"), reason="torch itself tells Dynamo the shape of the op")
@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[..., ::2]])
def test_the_shape_of_an_encoder_layer_is_what_aten_returns(turn):
    src = turn(torch.randn(BATCH, LENGTH, DIM * 2))
    dim = src.shape[2]
    weights = (torch.randn(3 * dim, dim), torch.randn(3 * dim), torch.randn(dim, dim), torch.randn(dim), True, False,
               1e-3, *(torch.randn(dim) for _ in range(4)), torch.randn(24, dim), torch.randn(24),
               torch.randn(dim, 24), torch.randn(dim))
    real = torch._transformer_encoder_layer_fwd(src, dim, HEADS, *weights)
    fake = fused._encoder_layer_shape(src)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def layer(**options):
    return torch.nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True, **options).eval()


def attentions(function, *inputs):
    targets = [node.target for node in capture(function, *inputs).graph.nodes]
    assert not {aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default} & set(targets)
    return targets.count(aten.scaled_dot_product_attention.default)


def test_a_stack_of_encoder_layers_is_opened():
    stack = torch.nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    padding = torch.arange(LENGTH) >= torch.tensor([[4], [7]])
    assert attentions(lambda x: stack(x, src_key_padding_mask=padding), torch.randn(BATCH, LENGTH, DIM)) == 2


def test_multi_head_attention_called_directly_is_opened():
    attention = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    assert attentions(lambda x: attention(x, x, x, need_weights=False)[0], torch.randn(BATCH, LENGTH, DIM)) == 1
    # Called as an op, as a graph from torch.export does.
    op, weights = aten._native_multi_head_attention.default, projections()
    assert attentions(lambda x: op(x, x, x, DIM, HEADS, *weights, None, False)[0], torch.randn(2, LENGTH, DIM)) == 1


def test_a_transformer_with_a_causal_mask_is_one_graph():
    model = torch.nn.Transformer(DIM, HEADS, 1, 1, 24, batch_first=True).eval()

    def function(x):
        return model(x, x, tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1]))

    assert attentions(function, torch.randn(BATCH, LENGTH, DIM)) == 3
