"""ONNX text from expressions: what a loop need not do in every step stands before it."""

import numpy as np
import pytest

from sparsify.exporters.onnx_text import FLOAT, Text

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
reference = pytest.importorskip("onnx.reference")


def run(written: str, name: str, x: np.ndarray) -> np.ndarray:
    """A function of one input in onnx's own evaluator."""
    helper = onnx.helper
    graph = helper.make_graph([helper.make_node(name, ["x"], ["out"], domain="test", scale=2.0)], "g",
                              [helper.make_tensor_value_info("x", FLOAT, [None])],
                              [helper.make_tensor_value_info("out", FLOAT, [None, None])])
    model = helper.make_model(graph, functions=[onnx.parser.parse_function(written)], ir_version=10,
                              opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("test", 1)])
    onnx.checker.check_model(model)
    return reference.ReferenceEvaluator(model).run(None, {"x": x})[0]


def test_a_loop_computes_once_what_is_the_same_in_every_step():
    text = Text()
    x = text.input("x")
    scale = text.attribute("scale", "float")
    loop = text.loop(x.size(0).scalar(), lambda at: text.Exp(text.Neg(x * scale)) + text.Sqrt(at.to(FLOAT)))
    written = text.function("test", "Rows", 23, ["x"], ["scale"], loop)
    before, body = written.split(" = Loop(")
    assert "Exp(" in before and "Neg(" in before and "Exp(" not in body and "Neg(" not in body
    assert "Sqrt(" in body and "Add(" in body and "Sqrt(" not in before  # the twin: what changes stays
    values = np.array([0.5, -1.0, 2.0], np.float32)
    np.testing.assert_allclose(run(written, "Rows", values), np.exp(-2 * values) + np.sqrt(np.arange(3))[:, None],
                               rtol=1e-6)


def test_what_hangs_on_an_inner_loop_stays_behind_it():
    text = Text()
    x = text.input("x")

    scaled = x * text.attribute("scale", "float")

    def step(at):
        inner = text.loop(text.integer(2), lambda other: scaled * (at + other).to(FLOAT))
        return text.ReduceSum(inner, text.ints(0), keepdims=0)

    written = text.function("test", "Rows", 23, ["x"], ["scale"], text.loop(x.size(0).scalar(), step))
    values = np.array([1.0, -1.0, 2.0], np.float32)
    np.testing.assert_allclose(run(written, "Rows", values), 2 * values * (2 * np.arange(3) + 1)[:, None])
