"""ONNX files at 256 to 16K tokens, batch 1 and 2, beside the compiled model on the same plan: minutes."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import sparsify
from sparsify.exporters.capture import capture
from sparsify.measurement import Side
from sparsify.models.loading import load_model
from sparsify.plan import Bucket, Budget, Plan
from tests.exporters.test_onnx import assert_equal_up_to_ties

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from sparsify.exporters import onnx as form  # noqa: E402

pytestmark = pytest.mark.slow
EDGES = (1024, 4096)
PLAN = Plan((Bucket(1, EDGES[0], Budget.dense()), Bucket(*EDGES, Budget(0.05)), Bucket(EDGES[1], None, Budget(0.03))),
            name="long")
CALLS = [(256, 2), (EDGES[0] - 1, 2), (EDGES[0], 2), (EDGES[1] - 1, 1), (EDGES[1], 1), (EDGES[1], 2), (16384, 1)]


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compare(model: nn.Module, inputs, calls, tmp_path, plan: Plan = PLAN) -> None:
    """Sparse files drop something at the last call, and always give what the compiled model gives."""
    captured = capture(model, inputs, plan)
    assert all(record.outcome == "sparse" for record in captured.records)
    form.write(captured, tmp_path / "model.onnx")
    run = form.load(tmp_path / "model.onnx")
    dense = captured.dense.module()
    sparsify.compile(model, plan, backend="eager")
    for length, batch in calls:
        args, kwargs = captured.inputs_at(length, batch)
        theirs, exact = (next(x for x in torch.utils._pytree.tree_leaves(call(*args, **kwargs)))
                         for call in (model, dense))
        ours = run(*args, **kwargs)[0]
        assert_equal_up_to_ties(ours, theirs, exact)
    assert (ours - exact).abs().max() > 1e-3


def test_tiny_lm(tmp_path):
    compare(Side(load_model().model), torch.randint(5, 4000, (2, 64)), CALLS, tmp_path)


def test_an_encoder_with_padding(tmp_path):
    config = BertConfig(vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128, max_position_embeddings=16384, initializer_range=0.2)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 48:] = 0
    inputs = {"input_ids": torch.randint(1, 500, (2, 64)), "attention_mask": mask}
    compare(BertModel(config, add_pooling_layer=False).eval(), inputs, CALLS, tmp_path)


@pytest.mark.parametrize("image", [256, 1024, 2048])  # 257, 4097, 16385 tokens
def test_a_vision_transformer(image, tmp_path):
    config = ViTConfig(image_size=image, patch_size=16, num_channels=1, hidden_size=128, num_hidden_layers=2,
                       num_attention_heads=2, intermediate_size=128, initializer_range=0.2)
    model = ViTModel(config, add_pooling_layer=False).eval()
    always = Plan((Bucket(1, None, Budget(0.4 if image == 256 else 0.05, local=0)),), name="always")
    compare(model, {"pixel_values": torch.randn(2, 1, image, image)}, [(None, 1), (None, 2)], tmp_path, always)
