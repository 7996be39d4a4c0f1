"""`.onnx` for ONNX Runtime: one file for all lengths, standard operators, the plan in the nodes of its attention.

    onnxruntime.InferenceSession("model.onnx").run(None, {"input_ids": ids})       no sparsify, no torch

Inputs and outputs are named by their place in the call: `input_ids`, `past_key_values.0.key`, `logits`. The metadata
hold what the file says of itself, and the plan's fingerprint and bucket table by themselves for other readers.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
import torch.utils._pytree as pytree
from google.protobuf.message import DecodeError
from torch import Tensor
from torch.export import ExportedProgram

from sparsify.errors import ExportError, OptionError
from sparsify.exporters.capture import Captured
from sparsify.exporters.contents import NAME, Contents
from sparsify.exporters.formats import Runner
from sparsify.exporters.onnx_attention import DOMAIN, OPSETS
from sparsify.exporters.onnx_translate import translate
from sparsify.plan import Plan

OPTIONS = frozenset({"opset", "form"})
FORMS = ("function", "inline")
CHECKSUM, WEIGHTS = "sparsify.sha256", "sparsify.sha256_of_weights"
"""Metadata: checksum of the file, with UNKNOWN in its own place, and of the weights where they are a file."""
UNKNOWN = "checksum of this file".ljust(64, "-")
LARGE = 1 << 30
"""Bytes of weights from which they get a file of their own, `model.onnx_data`; a protobuf holds 2 GiB."""


def write(captured: Captured, path: Path, opset: int = 23, form: str = "function") -> list[str]:
    """Write the model and, where weights are large, their file beside it.

    form: "function" keeps attention as functions of the file, one for every kind of site; "inline" for runtimes that
    know no functions. Raises OptionError, ExportError.
    """
    if opset not in OPSETS or isinstance(opset, bool):
        raise OptionError(f"opset is {opset!r}. Give a number from {OPSETS[0]} to {OPSETS[-1]}.")
    if form not in FORMS:
        raise OptionError(f"form is {form!r}. Give one of: {', '.join(FORMS)}.")
    model = translate(captured.program, opset, form)
    save(model, captured, path, Contents.of(captured, "ort"))
    kinds = sorted({name for domain, name, _ in model.functions if domain == DOMAIN})
    return [f"ONNX opset {opset}" + (f", functions {', '.join(kinds)}" if kinds else "")]


def save(model: ir.Model, captured: Captured, path: Path, contents: Contents) -> None:
    """Name inputs and outputs, add the metadata, write."""
    _name_values(model, captured.program)
    model.producer_name, model.producer_version = "sparsify", contents.sparsify
    model.metadata_props.update({NAME: contents.to_json(), "sparsify.plan": contents.plan.hash,
                                 "sparsify.buckets": json.dumps(bucket_table(contents.plan))})
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size >= LARGE:
        # Loaded once, so that the model refers to the weights as the file will hold them, and says their checksum.
        weights = path.with_name(f"{path.name}_data")
        ir.save(model, path, external_data=weights.name)
        model = ir.load(path)
        model.metadata_props[WEIGHTS] = _checksum(weights)
    model.metadata_props[CHECKSUM] = UNKNOWN
    data = ir.serde.serialize_model(model).SerializeToString()
    path.write_bytes(data.replace(UNKNOWN.encode(), hashlib.sha256(data).hexdigest().encode()))


def bucket_table(plan: Plan) -> list[dict[str, Any]]:
    """The plan's buckets and budgets as plain data."""
    return [{"lo": bucket.lo, "hi": bucket.hi, **bucket.budget.to_dict(),
             "sites": {str(site): budget.to_dict() for site, budget in bucket.sites.items()}}
            for bucket in plan.buckets]


def load(path: Path) -> Runner:
    """The file as a call, in ONNX Runtime on the CPU. Raises ExportError."""
    describe(path)
    _check_whole(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it says of a broken file comes back as an error
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, by kind of fault
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {str(path)!r}: {_first_line(error)} "
                          "Export the model again; float32 runs everywhere.") from error
    return _runner(session)


def _runner(session: onnxruntime.InferenceSession) -> Callable[..., list[Tensor]]:
    names = [x.name for x in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        feeds = {name: x.detach().contiguous().numpy() for name, x in zip(names, given, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run


def describe(path: Path) -> Contents:
    """What the file says of itself. Raises ExportError for a file that is damaged or not ours."""
    return Contents.from_json(_metadata(path)[1][NAME], f"file {str(path)!r}")


def _metadata(path: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"file {str(path)!r} cannot be read as ONNX ({_first_line(error)}). It is damaged, or no "
                          "ONNX file: export the model again.") from error
    held = {prop.key: prop.value for prop in model.metadata_props}
    if NAME not in held:
        raise ExportError(f"file {str(path)!r} was not written by sparsify, or it is damaged: its metadata have no "
                          f"{NAME}. Give a file that sparsify.export wrote.")
    return model, held


def _check_whole(path: Path) -> None:
    """Compare the file, and the weights beside it, with their checksums."""
    model, held = _metadata(path)
    found = held.get(CHECKSUM, "")
    data = path.read_bytes().replace(found.encode(), UNKNOWN.encode()) if found else b""
    if hashlib.sha256(data).hexdigest() != found:
        raise ExportError(f"file {str(path)!r} is damaged: its checksum is wrong. Export the model again, or copy the "
                          "file again.")
    places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
              if entry.key == "location"}
    for name in places:
        weights = path.with_name(name)
        if not weights.is_file():
            raise ExportError(f"file {str(path)!r} has its weights in {name!r}, which is not beside it. Keep the two "
                              "together, or export the model again.")
        if _checksum(weights) != held.get(WEIGHTS):
            raise ExportError(f"file {str(weights)!r}, the weights of {path.name!r}, is damaged: its checksum is "
                              "wrong. Export the model again, or copy the two again.")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_values(model: ir.Model, program: ExportedProgram) -> None:
    """Name inputs and outputs by their place in the call."""
    signature = program.module_call_graph[0].signature
    if signature is None:
        return
    names = dict(zip(program.graph_signature.user_inputs, _paths(signature.in_spec), strict=True))
    parameters = signature.forward_arg_names or []
    for value in model.graph.inputs:
        place = names.get(value.name)
        if place is not None:
            kind, *rest = place  # 0 for positional inputs, 1 for those by name
            first = parameters[int(rest[0])] if kind == "0" and int(rest[0]) < len(parameters) else rest[0]
            value.name = ".".join([first, *rest[1:]])
    outputs = _paths(signature.out_spec)
    for place, value in zip(outputs, model.graph.outputs, strict=False):
        value.name = ".".join(place) if place and not place[0].isdigit() else ".".join(["output", *place])


def _paths(spec: pytree.TreeSpec) -> list[list[str]]:
    """Where each leaf is, as keys and indices."""
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return [[str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
            for path, _ in leaves]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
