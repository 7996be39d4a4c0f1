"""q, k and v of real layers, as attention is given them: captured once, kept in a file.

Layers are stacked as heads: every method works head by head, and a small model's layer does not fill a GPU.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.rivals.methods import Activations
from sparsify.measurement import encode
from sparsify.models.loading import load_model, read_text


class Recorder:
    """An attention function for transformers: exact, and remembers what the wanted layers were given."""

    def __init__(self, layers: tuple[int, ...] | None) -> None:
        self.layers = layers
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float,
                 **options: object) -> tuple[Tensor, None]:
        if self.layers is None or module.layer_idx in self.layers:
            self.seen[module.layer_idx] = (q.bfloat16(), k.bfloat16(), v.bfloat16())
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None


@torch.no_grad()
def capture(model: str | None, text: Path, length: int, layers: tuple[int, ...] | None, device: str) -> Activations:
    """Activations of `layers` (None: all) of a model over the first `length` tokens of a text, in bfloat16."""
    from transformers import AttentionInterface

    recorder = Recorder(layers)
    AttentionInterface.register("sparsify_recorder", recorder)
    loaded = load_model(model, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    network: Any = loaded.model
    network.set_attn_implementation("sparsify_recorder")
    ids = encode(read_text(text), loaded.tokenizer)[:length]
    network.base_model(ids[None].to(device), use_cache=False)
    order = sorted(recorder.seen)
    q, k, v = (torch.cat([recorder.seen[layer][part] for layer in order], 1) for part in range(3))
    title = loaded.name.split("-Instruct")[0]
    return Activations(f"{title}, {length} tokens, layers {', '.join(map(str, order))} stacked as heads", q, k, v)


def save(x: Activations, file: Path) -> None:
    """Write activations; heads innermost but one, as models lay them out."""
    tensors = {name: getattr(x, name)[0].transpose(0, 1).contiguous().cpu() for name in "qkv"}
    torch.save({"name": x.name, **tensors}, file)


def read(file: Path, device: str) -> Activations:
    """Activations of a file, on a device."""
    stored = torch.load(file, weights_only=True)
    return Activations(stored["name"], *(stored[name].to(device).transpose(0, 1)[None] for name in "qkv"))
