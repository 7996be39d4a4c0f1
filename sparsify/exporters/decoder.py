"""A decoder with its key-value cache as inputs and outputs, by Optimum's names: what loops over an ONNX file call.

    module, inputs, shapes = with_past(model)
    sparsify.export(module, inputs, "model.onnx", dynamic_shapes=shapes)

    inputs   input_ids [B, L], attention_mask [B, past + L], position_ids [B, L],
             past_key_values.N.key, past_key_values.N.value [B, Hkv, past, D]
    outputs  logits [B, L, vocabulary], present.N.key, present.N.value [B, Hkv, past + L, D]

A first call has a past of length 0. The key length, past and new tokens together, chooses the bucket.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sparsify.errors import ModelError

Past = list[dict[str, Tensor]]
EXAMPLE = (2, 40, 56)  # batch, new tokens, tokens in the past: no two sizes alike, and none that torch holds for fixed


class DecoderWithPast(nn.Module):
    """A causal language model of transformers, called with tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
                past_key_values: Past) -> dict[str, Any]:
        from transformers import DynamicCache

        torch._check(attention_mask.shape[1] == past_key_values[0]["key"].shape[2] + input_ids.shape[1])
        cache = DynamicCache()
        for index, layer in enumerate(past_key_values):
            cache.update(layer["key"], layer["value"], index)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=cache, use_cache=True)
        return {"logits": out.logits,
                "present": [{"key": layer.keys, "value": layer.values} for layer in out.past_key_values.layers]}


def with_past(model: nn.Module) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model with its cache as inputs and outputs, example inputs, and the dims that are free.

    Every layer must have a cache of keys and values that grows with the tokens. Raises ModelError for a model that has
    none.
    """
    module = DecoderWithPast(model).eval()
    batch, new, past = EXAMPLE
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"model is a {type(model).__name__} without a configuration of transformers. Give a causal "
                         "language model of transformers, or export it without its past.")
    with torch.no_grad():
        ids = torch.ones(batch, past, dtype=torch.long, device=next(model.parameters()).device)
        out = model(input_ids=ids, use_cache=True)
    layers = getattr(getattr(out, "past_key_values", None), "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.shape[2] != past for layer in layers):
        raise ModelError(f"{type(model).__name__} keeps no cache of keys and values that grows with the tokens in "
                         "every layer. Export it without its past.")
    inputs = {"input_ids": ids[:, :new], "attention_mask": ids.new_ones(batch, past + new),
              "position_ids": torch.arange(past, past + new, device=ids.device).repeat(batch, 1),
              "past_key_values": [{"key": layer.keys, "value": layer.values} for layer in layers]}
    rows, tokens, held = Dim("batch"), Dim("tokens"), Dim("past")
    of_past = {0: rows, 2: held}
    shapes = {"input_ids": {0: rows, 1: tokens}, "attention_mask": {0: rows, 1: Dim.AUTO},
              "position_ids": {0: rows, 1: tokens},
              "past_key_values": [{"key": of_past, "value": of_past} for _ in layers]}
    return module, inputs, shapes
