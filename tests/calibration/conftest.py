"""Calibration of small models: graphs run as they are, without Inductor, and times come from constants."""

import pytest
import torch
from torch._inductor import compile_fx
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify.models.loading import TINY_LM
from sparsify.models.tasks import heldout_tokens

LENGTHS = [512, 1024]


def soft_model(layers: int = 2):
    """A random Llama like tests/small_model.py, whose attention is soft enough that dropping blocks costs little."""
    config = LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                         initializer_range=0.1, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of earlier models count toward the recompile limit of the code that they share."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def without_inductor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **options: gm)
        yield


@pytest.fixture(scope="session")
def documents():
    """Twelve documents of 1100 to 1210 tokens of real text."""
    tokens = torch.from_numpy(heldout_tokens(TINY_LM)[:20_000].astype("int64"))
    return [tokens[i * 1500:i * 1500 + 1100 + 10 * i] for i in range(12)]


@pytest.fixture(scope="module")
def calibrated(without_inductor, documents, tmp_path_factory):
    """A calibrated small model: the plan, its file, and the lines of progress."""
    out = tmp_path_factory.mktemp("calibrated") / "plan.json"
    lines: list[str] = []
    plan = sparsify.calibrate(soft_model(), documents, lengths=LENGTHS, out=out, progress=lines.append)
    return plan, out, lines
