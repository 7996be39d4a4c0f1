"""Small models of every kind that exporters must serve, and their inputs."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sparsify.plan import Bucket, Budget, Plan
from tests.small_model import EDGE, PLAN, small_model

BATCH = 2
SECOND_EDGE = 384
TWO_EDGES = Plan((Bucket(1, EDGE, Budget.dense()), Bucket(EDGE, SECOND_EDGE, Budget(0.05)),
                  Bucket(SECOND_EDGE, None, Budget(0.4, local=0))), name="two edges")
ALWAYS = Plan((Bucket(1, None, Budget(0.4, local=0)),), name="always")

__all__ = ["ALWAYS", "BATCH", "EDGE", "PLAN", "SECOND_EDGE", "TWO_EDGES", "Attend", "bert", "decoder", "vit"]


class Attend(nn.Module):
    """One causal attention of four heads between projections, with nothing of a library in it; flat: much may drop."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def decoder(length: int = 64) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer Llama without cache: token ids in, logits out."""
    model = small_model()
    model.config.use_cache = False
    return model, {"input_ids": tokens(length)}


def bert(length: int = 64) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer encoder with a padding mask; the second row ends early."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=1024, initializer_range=0.2)
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length * 3 // 4:] = 0
    return BertModel(config, add_pooling_layer=False).eval(), {"input_ids": tokens(length) % 500,
                                                               "attention_mask": mask}


def vit(image: int = 272) -> tuple[nn.Module, dict[str, Tensor]]:
    """A two-layer vision transformer: 290 tokens, whatever the batch."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=image, patch_size=16, num_channels=1, hidden_size=64, num_hidden_layers=2,
                       num_attention_heads=2, intermediate_size=64, initializer_range=0.2)
    return ViTModel(config, add_pooling_layer=False).eval(), {"pixel_values": torch.randn(BATCH, 1, image, image)}


def tokens(length: int) -> Tensor:
    return torch.randint(1, 4000, (BATCH, length))
