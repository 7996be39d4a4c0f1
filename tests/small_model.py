"""A model folder that compiles in seconds: a random two-layer Llama with the tokenizer of the shipped model."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.models.loading import TINY_LM
from sparsify.plan import Bucket, Budget, Plan

EDGE = 256
PLAN = Plan((Bucket(1, EDGE, Budget.dense()), Bucket(EDGE, None, Budget(0.05), {0: Budget.dense()})), name="small")
"""Dense below EDGE; above it the second of two sites is sparse."""


def small_model(attention: str = "sdpa") -> LlamaForCausalLM:
    """In eval mode, float32, on the CPU; always the same weights, sharp enough that most blocks are droppable."""
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                         initializer_range=0.5, attn_implementation=attention)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save_small_model(folder: Path) -> Path:
    """The same as a Hugging Face folder."""
    small_model().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, folder)
    return folder
