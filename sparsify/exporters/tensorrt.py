"""`.onnx` for TensorRT's parser and builder: one file for each bucket of the plan, and their profiles beside them.

    model.onnx                the first bucket that calls can reach
    model.bucket1.onnx ...    the others
    model.profiles.json       for every file: its key lengths, the shapes of its optimisation profile, a trtexec line

No loops, branches or functions are in the files; whoever runs the engines picks one by the key length. The bodies of
attention are those of tensorrt_attention.py: a sparse bucket has room for a fixed number of key blocks a query block.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch.utils._pytree as pytree
from torch import Tensor

from sparsify.errors import ExportError, OptionError
from sparsify.exporters import onnx as ort
from sparsify.exporters.capture import Captured
from sparsify.exporters.contents import Contents, parse_size
from sparsify.exporters.formats import Runner
from sparsify.exporters.onnx_attention import OPSETS, PLAN
from sparsify.exporters.onnx_translate import (
    define_functions,
    inlined,
    kind_of,
    placeholders,
    write_placeholders,
)
from sparsify.exporters.tensorrt_attention import function_text, is_known
from sparsify.kernels.blocks import KEY_BLOCK

OPTIONS = frozenset({"opset", "room"})
ROOM = 2.0
"""Key blocks that a query block has room for, over those that one keeps on average."""
USUAL_PEAKS = 90.0  # density x keys x tolerance where nobody measured it, as the ops reckon
LONGEST = 4  # of a bucket without end: the longest key length of its profile, in its first

describe = ort.describe


def write(captured: Captured, path: Path, opset: int = 20, room: int | None = None) -> list[str]:
    """Write the files.

    room: key blocks that a query block has room for in sparse buckets; None: `ROOM` times what the plan keeps on
    average, as far as that is known. Raises OptionError, ExportError.
    """
    if opset not in OPSETS or isinstance(opset, bool):
        raise OptionError(f"opset is {opset!r}. Give a number from {OPSETS[0]} to {OPSETS[-1]}.")
    if room is not None and (not isinstance(room, int) or isinstance(room, bool) or room < 1):
        raise OptionError(f"room is {room!r}. Give a number of key blocks from 1, or leave it out.")
    contents = Contents.of(captured, "tensorrt")
    rows, notes = [], [f"ONNX opset {opset}, for TensorRT; the profiles are in {profiles_path(path).name}"]
    for number, file in enumerate(bucket_files(path, max(1, len(captured.buckets)))):
        bucket = captured.plan.buckets.index(captured.plan.bucket_of(captured.buckets[number].lo)) if (
            captured.buckets) else None
        model, said = _model(captured, opset, bucket, room)
        ort.save(model, captured, file, contents)
        rows.append({"file": file.name, **_profile(captured, number, file)})
        notes += [f"{file.name}: {line}" for line in said]
        notes.append(rows[-1]["trtexec"])
    profiles_path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return notes


def bucket_files(path: Path, count: int) -> list[Path]:
    """The files of all buckets, the first at `path` itself."""
    return [path, *(path.with_name(f"{path.stem}.bucket{number}{path.suffix}") for number in range(1, count))]


def profiles_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.profiles.json")


def load(path: Path) -> Runner:
    """All files as one call, in ONNX Runtime on the CPU: what TensorRT is to compute. Raises ExportError."""
    contents = describe(path)
    files = bucket_files(path, max(1, len(contents.buckets)))
    for file in files[1:]:
        if not file.is_file():
            raise ExportError(f"file {str(path)!r} holds the first of {len(files)} buckets and {file.name!r} is not "
                              "beside it. Keep the files together, or export the model again.")
    runs = [ort.load(file) for file in files]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        return runs[_bucket_of_call(contents, (args, kwargs))](*args, **kwargs)

    return run


def _bucket_of_call(contents: Contents, inputs: Any) -> int:
    if contents.key_length is None:
        return 0
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    sizes = {size: held for x, given in zip(contents.inputs, tensors, strict=True)
             for size, held in zip(x.sizes, given.shape, strict=True) if isinstance(size, str)}
    length = int(parse_size(contents.key_length).subs(sizes))
    return next(number for number, (_, hi) in enumerate(contents.buckets) if hi is None or length < hi)


def _model(captured: Captured, opset: int, bucket: int | None,
           room: int | None) -> tuple[ir.Model, list[str]]:
    """The model of one bucket (None: no site has a table), and what is to be said of it."""
    model = write_placeholders(captured.program, opset)
    rooms, notes = [], []
    for number, node in enumerate(placeholders(model)):
        tolerance = _only_bucket(node, bucket)
        if tolerance and not is_known(kind_of(node)):
            notes.append(f"attention {number} is dense: its masks are not among those that TensorRT files select under")
            tolerance = 0.0
        if tolerance:
            rooms.append(room or math.ceil(ROOM * _peaks(captured, bucket) / (tolerance * KEY_BLOCK)))
        else:
            for name in (*PLAN, "shifts"):
                node.attributes.pop(name, None)
    if rooms:
        notes.append(f"room for {max(rooms)} key blocks of {KEY_BLOCK} a query block; one that would keep more loses "
                     "those of the least peaks: give more by room")
    define_functions(model, lambda kind: function_text(kind, opset, max(rooms, default=0)))
    model = inlined(model)
    onnxscript.optimizer.optimize_ir(model)  # the parser wants sizes as constants where they are
    return model, notes


def _only_bucket(node: ir.Node, bucket: int | None) -> float:
    """Leave one bucket in the table of a placeholder; its tolerance."""
    if "tolerances" not in node.attributes:
        return 0.0
    columns = {name: list(node.attributes[name].value) for name in (*PLAN, "shifts") if name in node.attributes}
    heads = len(columns.get("shifts", ())) // len(columns["tolerances"])
    place = 0 if bucket is None else min(bucket, len(columns["tolerances"]) - 1)
    for name, column in columns.items():
        if name == "edges":
            continue
        width = heads if name == "shifts" else 1
        values = column[place * width: (place + 1) * width]
        make = ir.AttrInt64s if isinstance(values[0], int) else ir.AttrFloat32s
        node.attributes[name] = make(name, values)
    return float(columns["tolerances"][place])


def _peaks(captured: Captured, bucket: int | None) -> float:
    """Density x keys x tolerance, as far as somebody measured it."""
    budgets = captured.plan.buckets[bucket or 0]
    known = [budget.peaks for budget in (budgets.budget, *budgets.sites.values()) if budget.peaks is not None]
    return max(known, default=USUAL_PEAKS)


def _profile(captured: Captured, number: int, file: Path) -> dict[str, Any]:
    """Key lengths, shapes and the command for the file of a bucket."""
    lengths: Sequence[int | None] = (None, None, None)
    bounds: dict[str, Any] = {"lo": None, "hi": None}
    if captured.buckets:
        bucket = captured.buckets[number]
        high = LONGEST * bucket.lo if bucket.hi is None else bucket.hi - 1
        lengths = (bucket.lo, high, high)
        bounds = {"lo": bucket.lo, "hi": bucket.hi}
    names = [x.name for x in Contents.of(captured, "tensorrt").inputs]
    shapes: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    for which, length in zip(("min", "opt", "max"), lengths, strict=True):
        tensors = [x for x in pytree.tree_leaves(_inputs_at(captured, length)) if isinstance(x, Tensor)]
        for name, x in zip(names, tensors, strict=True):
            shapes[name][which] = list(x.shape)
    options = []
    for which in ("min", "opt", "max"):
        sizes = (f"{name}:{'x'.join(map(str, held[which]))}" for name, held in shapes.items())
        options.append(f"--{which}Shapes={','.join(sizes)}")
    command = f"trtexec --onnx={file.name} --saveEngine={file.stem}.engine {' '.join(options)}"
    return {**bounds, "shapes": shapes, "trtexec": command}


def _inputs_at(captured: Captured, length: int | None) -> Any:
    """Inputs of this key length, or of the next that the program can have: 1 may be none of them."""
    for more in range(KEY_BLOCK):
        try:
            return captured.inputs_at(None if length is None else length + more)
        except OptionError:
            continue
    return captured.inputs_at(length)
