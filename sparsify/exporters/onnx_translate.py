"""From an exported program to an ONNX model: torch's own exporter, with our attention as functions of the file.

    program (calls of sparsify::planned_attention, ::exact_attention, SDPA)
        -> torch.onnx.export, which writes a node of our domain for each of them
        -> the node takes the name of its `Kind`, and the model the function of that kind
        -> inlined, where form is "inline"

The node has a schema while torch exports and no function: torch writes an older opset first, and its version converter
would inline every function on the way up.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.inliner
import onnx.parser
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch.export import ExportedProgram

from sparsify.errors import ExportError
from sparsify.exporters.onnx_attention import DOMAIN, PLAN, Kind, function_text

PLACEHOLDER = "PlannedAttention"
INPUTS = ("causal_offset", "key_mask", "query_documents", "key_documents", "attn_mask", "sink_logits", "protected")
"""Inputs of the placeholder behind q, k and v; absent ones are left out."""

ATTRIBUTES = {"scale": "FLOAT", "window": "INT", "softcap": "FLOAT", "shifts": "FLOATS",
              **{name: kind.upper() for name, kind in PLAN.items()}}


def translate(program: ExportedProgram, opset: int, form: str) -> ir.Model:
    """The model of opset `opset`; form: "function" or "inline". Raises ExportError, naming what ONNX cannot say."""
    model = write_placeholders(program, opset)
    define_functions(model, lambda kind: function_text(kind, opset))
    return inlined(model) if form == "inline" else model


def write_placeholders(program: ExportedProgram, opset: int) -> ir.Model:
    """The model with a placeholder for every attention that is an op of ours, or SDPA. Raises ExportError."""
    _register_schema()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), _quiet(), torch.no_grad():
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False,
                                         custom_translation_table=_translations())
    except Exception as error:  # whatever torch's exporter raises for a graph that it cannot translate
        reason = next((line for line in reversed(str(error.__cause__ or error).strip().splitlines()) if line.strip()),
                      type(error).__name__)
        reason = reason.removesuffix("See the stack trace for more information.").strip()
        raise ExportError(f"the model cannot be written as ONNX of opset {opset}: {reason} Give another opset, or "
                          "change the model.") from error
    assert exported is not None  # only None where torch wrote the file itself
    model = exported.model
    _widen_rotations(model)
    return model


def placeholders(model: ir.Model) -> list[ir.Node]:
    """The attention of a model, in graph order."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN and node.op_type == PLACEHOLDER]


def define_functions(model: ir.Model, text_of: Callable[[Kind], str]) -> None:
    """Turn placeholders into calls of functions, and define these."""
    kinds = {_name_kind(node) for node in placeholders(model)}
    for kind in sorted(kinds, key=lambda kind: kind.name):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text_of(kind)))
        model.functions[function.identifier()] = function
    if kinds:
        model.opset_imports[DOMAIN] = 1


def _widen_rotations(model: ir.Model) -> None:
    """Give RotaryEmbedding tables of the whole batch.

    torch's exporter (onnxscript 0.7) fuses rotations by one table for all rows into it, which is against the operator's
    definition: onnxruntime refuses a batch of 2.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) != 3:
            continue
        x, *tables = node.inputs
        assert x is not None
        if x.shape is None or all(table is not None and table.shape is not None and table.shape[0] == x.shape[0]
                                  for table in tables):
            continue
        rows = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
        ones = ir.node("Constant", [], attributes={"value_ints": [1, 1]})
        shape = ir.node("Concat", [rows.outputs[0], ones.outputs[0]], attributes={"axis": 0})
        wide = [ir.node("Expand", [table, shape.outputs[0]]) for table in tables]
        assert node.graph is not None
        node.graph.insert_before(node, [rows, ones, shape, *wide])
        for place, table in enumerate(wide, 1):
            node.replace_input_with(place, table.outputs[0])


def inlined(model: ir.Model) -> ir.Model:
    """The same without functions; weights are put aside meanwhile, for a protobuf holds 2 GB."""
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape),
                                              name=value.name)
    inlined = ir.serde.deserialize_model(onnx.inliner.inline_local_functions(ir.serde.serialize_model(model)))
    for name, value in inlined.graph.initializers.items():
        value.const_value = weights[name]
    return inlined


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what the exporter says about itself on the way."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _register_schema() -> None:
    if onnx.defs.has(PLACEHOLDER, DOMAIN):
        return
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    anything = sorted({*floats, "tensor(bool)", "tensor(int32)", "tensor(int64)"})
    onnx.defs.register_schema(onnx.defs.OpSchema(
        PLACEHOLDER, DOMAIN, 1,
        inputs=[*(parameter(name, "T") for name in "qkv"),
                *(parameter(name, f"Any{place}", param_option=optional) for place, name in enumerate(INPUTS))],
        outputs=[parameter("out", "T")],
        type_constraints=[("T", floats, ""), *((f"Any{place}", anything, "") for place in range(len(INPUTS)))],
        attributes=[attribute(name, getattr(onnx.defs.OpSchema.AttrType, kind), required=False)
                    for name, kind in ATTRIBUTES.items()]))


def _translations() -> dict[Any, Callable[..., Any]]:
    """What torch's exporter calls for our ops and for SDPA: annotated arguments are attributes, others are inputs."""
    domain, plain = Opset(DOMAIN, 1), Opset("", 18)  # torch writes opset 18, then converts

    def write(q: Any, k: Any, v: Any, inputs: Sequence[Any], **attributes: Any) -> Any:
        return domain.PlannedAttention(q, k, v, *inputs, **{name: x for name, x in attributes.items() if x is not None})

    def planned(q, k, v, scale: float, causal_offset=None, window: int | None = None, key_mask=None,
                query_documents=None, key_documents=None, attn_mask=None, softcap: float = 0.0, sink_logits=None,
                edges: Sequence[int] = (), tolerances: Sequence[float] = (), max_densities: Sequence[float] = (),
                sinks: Sequence[int] = (), local: Sequence[int] = (), singles: Sequence[int] = (),
                peaks: Sequence[float] = (), site: int = 0, version: int = 0, shifts: Sequence[float] | None = None,
                protected=None):
        columns = {"tolerances": tolerances, "max_densities": max_densities, "sinks": sinks, "local": local,
                   "singles": singles}
        table: dict[str, Any] = {"edges": list(edges), "shifts": None if shifts is None else list(shifts),
                                 **{name: list(column) for name, column in columns.items()}}
        if not edges:  # ONNX cannot tell an empty list from none: the same bucket twice, from a length of 1 on
            table = {name: [1] if name == "edges" else column and column * 2 for name, column in table.items()}
        inputs = (causal_offset, key_mask, query_documents, key_documents, attn_mask, sink_logits, protected)
        return write(q, k, v, inputs, scale=scale, window=window, softcap=softcap or None,
                     **(table if any(tolerances) else {}))

    def adaptive(q, k, v, scale: float, causal_offset=None, window: int | None = None, key_mask=None,
                 query_documents=None, key_documents=None, attn_mask=None, softcap: float = 0.0, sink_logits=None,
                 tolerance: float = 0.0, max_density: float = 1.0, sinks: int = 0, local: int = 0, singles: int = 1,
                 site: int = 0, version: int = 0, peaks: float = 0.0, shifts: Sequence[float] | None = None,
                 protected=None):
        return planned(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                       softcap, sink_logits, (), (tolerance,), (max_density,), (sinks,), (local,), (singles,),
                       shifts=shifts, protected=protected)

    def exact(q, k, v, scale: float, causal_offset=None, window: int | None = None, key_mask=None,
              query_documents=None, key_documents=None, attn_mask=None, softcap: float = 0.0, sink_logits=None,
              version: int = 0):
        return planned(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                       softcap, sink_logits)

    def sdpa(query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False,
             scale: float | None = None, enable_gqa: bool = False):
        rank = len(query.shape)
        if dropout_p or rank not in (3, 4):
            raise ValueError(f"scaled_dot_product_attention with dropout {dropout_p} on {rank} dimensions")
        if rank == 3:  # [heads, length, dim]
            query, key, value = (plain.Unsqueeze(x, plain.Constant(value_ints=[0])) for x in (query, key, value))
        missing = 0 if attn_mask is None else 4 - len(attn_mask.shape)
        if missing:
            attn_mask = plain.Unsqueeze(attn_mask, plain.Constant(value_ints=list(range(missing))))
        offset = plain.Constant(value_int=0) if is_causal else None
        scale = int(query.shape[-1]) ** -0.5 if scale is None else scale
        out = write(query, key, value, (offset, None, None, None, attn_mask, None, None), scale=scale)
        return plain.Squeeze(out, plain.Constant(value_ints=[0])) if rank == 3 else out

    ops = torch.ops.sparsify
    return {ops.planned_attention.default: planned, ops.adaptive_attention.default: adaptive,
            ops.exact_attention.default: exact, torch.ops.aten.scaled_dot_product_attention.default: sdpa}


def _name_kind(node: ir.Node) -> Kind:
    """Turn the placeholder into a call of the function of its kind; that kind."""
    kind = kind_of(node)
    given = dict(zip(INPUTS, node.inputs[3:], strict=False))
    inputs = [*node.inputs[:3], *(given[name] for name in kind.inputs)]
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    node.op_type = kind.name
    return kind


def kind_of(node: ir.Node) -> Kind:
    """The kind of a placeholder."""
    given = dict(zip(INPUTS, node.inputs[3:], strict=False))
    mask = given.get("attn_mask")
    is_bool = mask is not None and mask.dtype == ir.DataType.BOOL
    offset = given.get("causal_offset")
    held = None if offset is None else ir.convenience.get_const_tensor(offset)
    return Kind(sparse="tolerances" in node.attributes, causal=offset is not None,
                anchored=held is not None and int(held.numpy().item()) == 0,
                window="window" in node.attributes, key_mask=given.get("key_mask") is not None,
                documents=given.get("query_documents") is not None, mask=is_bool,
                bias=mask is not None and not is_bool, softcap="softcap" in node.attributes,
                sinks=given.get("sink_logits") is not None, shifts="shifts" in node.attributes,
                protected=given.get("protected") is not None)
