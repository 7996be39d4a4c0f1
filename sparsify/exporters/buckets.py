"""A program for each bucket, where one op cannot hold the table: on CUDA, for packages.

Given   a captured program and one of its buckets.
Leaves  a program of the same signature in which attention is what AOTInductor can pack into a file: in a dense bucket
        scaled_dot_product_attention, in a sparse one `packed_attention`, whose Triton kernels it compiles, or on
        Hopper `packed_attention_on_hopper`, whose Gluon kernels the caller links in.
Never   compares a length: which program a call gets is decided where the package is loaded.

Sites with other masks than causality and a mask of keys keep calling our ops, which needs sparsify at run time:
`needs_sparsify` names them.
"""

import copy
from bisect import bisect_right
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from sparsify.exporters.capture import PLANNED, Captured, with_graph
from sparsify.kernels.blocks import KEY_BLOCK
from sparsify.ops.lists import WIDEST_ON_CUDA
from sparsify.passes.graph import aten, emit, same, shape
from sparsify.plan import Bucket

EXACT = torch.ops.sparsify.exact_attention.default
NAMES = [argument.name for argument in PLANNED._schema.arguments]
BARRED = ("window", "query_documents", "key_documents", "attn_mask", "sink_logits", "shifts", "protected")


def program_for(captured: Captured, bucket: Bucket | None, kernels: list[Any]) -> ExportedProgram:
    """The program for calls in this bucket; None: it has only one.

    Adds to `kernels` those of hopper_packed.py that its sites call.
    """
    from sparsify.kernels import packed  # noqa: F401  # Triton: the op is defined when a package for CUDA is written

    graph = copy.deepcopy(captured.program.graph_module)
    for target in (PLANNED, EXACT):
        for node in graph.graph.find_nodes(op="call_function", target=target):
            given = dict(zip(NAMES, node.args, strict=False))
            if _why_not(given):
                continue
            if target is EXACT:  # the same arguments as far as to `sink_logits`
                given |= {"tolerances": [0.0], "edges": []}
            with graph.graph.inserting_before(node):
                new = _write(graph.graph, given, bucket, kernels)
            new.meta = dict(node.meta)  # shape and strides are the same
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return with_graph(captured.program, graph)


def needs_sparsify(captured: Captured) -> list[str]:
    """Why sites of a package for CUDA call our ops, one line for each."""
    found = []
    for target in (PLANNED, EXACT):
        for node in captured.program.graph.find_nodes(op="call_function", target=target):
            why = _why_not(dict(zip(NAMES, node.args, strict=False)))
            if why:
                found.append(f"{node.name} needs sparsify at run time: it has {why}, which no packed kernel covers")
    return found


def _why_not(given: dict[str, Any]) -> str:
    """What keeps a site from being packed; empty: nothing."""
    names = [name for name in BARRED if given.get(name) is not None]
    names += ["softcap"] if given["softcap"] else []
    widest, dtype = max(shape(given[x])[3] for x in "qv"), given["q"].meta["val"].dtype
    if widest > (WIDEST_ON_CUDA if dtype != torch.float32 else 128):
        names.append(f"heads of {widest} in {dtype}")
    if not isinstance(given["scale"], float) or given["scale"] <= 0:
        names.append("a scale that is no positive number")
    return ", ".join(names)


def _write(graph: fx.Graph, given: dict[str, Any], bucket: Bucket | None, kernels: list[Any]) -> fx.Node:
    place = bisect_right(given["edges"], bucket.lo) if bucket is not None else 0
    if not given["tolerances"][place]:
        return _dense(graph, given)
    columns = [given[name][place] for name in ("tolerances", "max_densities", "sinks", "local", "singles")]
    arguments = (given["q"], given["k"], given["v"], given["key_mask"], given["scale"], given["causal_offset"],
                 *columns)
    found = _kernels_of(given, columns[-1], bucket)
    if found is None:
        return graph.call_function(torch.ops.sparsify.packed_attention.default, arguments)
    from sparsify.kernels import hopper_packed

    if found not in kernels:
        kernels.append(found)
    return graph.call_function(torch.ops.sparsify.packed_attention_on_hopper.default,
                               (*arguments, hopper_packed.first_kernel(kernels, found)))


def _kernels_of(given: dict[str, Any], singles: int, bucket: Bucket | None) -> Any:
    """The kernels for Hopper of this site; None if it is left to plain Triton."""
    from sparsify.kernels.launch import is_hopper  # Triton, as above

    q, v = (given[name].meta["val"] for name in "qv")
    if bucket is None or bucket.lo < KEY_BLOCK or not is_hopper(q.device):
        return None
    from sparsify.kernels import hopper_packed  # Gluon: not for Triton's interpreter

    return hopper_packed.kernels_for(q, v, given["key_mask"] is not None, singles)


def _dense(graph: fx.Graph, given: dict[str, Any]) -> fx.Node:
    """SDPA, laid out as our ops lay their output out."""
    q, k, offset, key_mask = given["q"], given["k"], given["causal_offset"], given["key_mask"]
    top_left = isinstance(offset, int) and offset == 0 and same(shape(q)[2], shape(k)[2])
    visible: fx.Node | None = None
    if offset is not None and (key_mask is not None or not top_left):
        device = q.meta["val"].device
        rows, keys = (emit(graph, aten.arange.default, emit(graph, aten.sym_size.int, x, 2), device=device)
                      for x in (q, k))
        last = emit(graph, aten.add.Tensor, emit(graph, aten.unsqueeze.default, rows, 1), offset)
        visible = emit(graph, aten.le.Tensor, keys, last)
    if key_mask is not None:
        shown = emit(graph, aten.unsqueeze.default, emit(graph, aten.unsqueeze.default, key_mask, 1), 1)
        visible = shown if visible is None else emit(graph, aten.logical_and.default, visible, shown)
    grouped = not same(shape(q)[1], shape(k)[1])
    out = emit(graph, aten.scaled_dot_product_attention.default, q, k, given["v"], visible, 0.0,
               top_left and visible is None, scale=given["scale"], enable_gqa=grouped)
    if visible is not None:  # kernels of SDPA disagree about rows that see nothing
        blind = emit(graph, aten.logical_not.default, emit(graph, aten.any.dim, visible, -1, True))
        out = emit(graph, aten.masked_fill.Scalar, out, blind, 0.0)
    rows_first = emit(graph, aten.contiguous.default, emit(graph, aten.transpose.int, out, 1, 2))
    return emit(graph, aten.transpose.int, rows_first, 1, 2)
