"""Capture a model for a file: torch.export, then the pass on its graph, and back to an ExportedProgram.

    model, inputs  ->  torch.export: pre-dispatch ATen  ->  passes.run_exported  ->  Captured

The program keeps what torch.export made of the model: names and order of inputs, parameters, buffers and their in-place
writes, constants, symbols and their ranges. Its attention sites are calls of our ops; one whose key length may lie in
several buckets is a `planned_attention` with the plan as a table. The pass makes no guard: a comparison of a length
would narrow the range of the program without a word, so capture compares ranges before and after and refuses a
difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputSpec

from sparsify.backend import default_plan, site_shapes
from sparsify.errors import ExportError, ModelError, OptionError, ShapeError
from sparsify.passes import run_exported
from sparsify.passes.graph import expression
from sparsify.passes.site import SiteRecord
from sparsify.plan import Bucket, Plan, resolve_plan

PLANNED = torch.ops.sparsify.planned_attention.default


@dataclass(frozen=True)
class Captured:
    """An exported model whose attention follows a plan.

    program     the sparse graph, ready to be saved, compiled or translated
    dense       what torch.export made of the model, untouched
    records     what became of every attention site
    plan        the plan, equal neighbouring buckets joined
    args, kwargs  example inputs, as the program takes them
    key_length  the key length of the sites with a table, in the program's symbols; None: no site has one
    query_length  the query length of those sites, where key_length is not None
    buckets     the buckets that calls of the program can reach: those of the plan, cut at the range of the key length
    """

    program: ExportedProgram
    dense: ExportedProgram
    records: tuple[SiteRecord, ...]
    plan: Plan
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key_length: sympy.Expr | None
    query_length: sympy.Expr | None
    buckets: tuple[Bucket, ...]

    def inputs_at(self, length: int | None = None,
                  batch: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs with this key length and number of rows, repeated or cut along every dim that depends on
        them; None: as in the example. Raises OptionError if the program has no such call."""
        return _resized(self, length, batch)


def capture(model: nn.Module, inputs: Any, plan: Any = None, dynamic_shapes: Any = None) -> Captured:
    """Export `model` with its attention under `plan`.

    inputs          a tensor, a tuple of positional inputs, or a dict of inputs by name
    plan            as in `sparsify.compile`; None: the plan that the model was compiled with, else the default
    dynamic_shapes  as in torch.export. None: the first two dims of tensors of whole numbers and bools (token ids,
                    masks) and the first of all others are free, as far as the model allows

    Raises ModelError, OptionError, PlanError, ShapeError, ExportError. The model is not changed.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}. Give an nn.Module.")
    args, kwargs = _split(inputs)
    if not isinstance(dynamic_shapes, ShapesCollection):  # which knows tensors by identity
        # torch.export guards on the base of a view, and the guard cannot be met (torch 2.11 to 2.13).
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.clone() if x._is_view() else x, (args, kwargs))
    compiled = getattr(getattr(model, "_compiled_call_impl", None), "sparsify", None)
    if plan is None and compiled is not None:
        plan = compiled.plan
    with torch.no_grad(), _uncompiled(model):
        dense = _export(model, args, kwargs, _free_dims(args, kwargs) if dynamic_shapes is None else dynamic_shapes)
        inputs_of_graph = [node.meta["val"] for node in dense.graph.find_nodes(op="placeholder")]
        chosen = default_plan(inputs_of_graph) if plan is None else resolve_plan(plan, "cpu")
        before = _ranges(inputs_of_graph)
        graph, records = run_exported(dense.graph_module, inputs_of_graph, chosen, _constants(dense))
        if _ranges(inputs_of_graph) != before:
            raise ExportError("the pass narrowed the lengths that the exported model takes, from "
                              f"{_say(before)} to {_say(_ranges(inputs_of_graph))}. Please report this; "
                              "plan=sparsify.Plan.dense() exports the model without it.")
    chosen.refuse_other_graph(site_shapes([records]))
    program = _program(dense, graph)
    length, queries = _lengths(program.graph)
    return Captured(program, dense, tuple(records), chosen.merged(), args, kwargs, length, queries,
                    _reachable(chosen.merged(), program, length))


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        kwargs = dict(inputs)
    elif isinstance(inputs, tuple | list):
        args = tuple(inputs)
    else:
        raise OptionError(f"inputs is a {type(inputs).__name__}. Give a tensor, a tuple of inputs, or a dict of inputs "
                          "by name.")
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors:
        raise OptionError("inputs holds no tensor. Give what the model is called with: model(*inputs).")
    for x in tensors:
        if 0 in x.shape:
            raise ShapeError(f"inputs holds a tensor of shape {list(x.shape)}: an empty sequence. Give at least one "
                             "token.")
    return args, kwargs


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """torch.export calls the model, and must meet its own code: not what `sparsify.compile` set on it."""
    held = [(module, module._compiled_call_impl) for module in model.modules()
            if module._compiled_call_impl is not None]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in held:
            module._compiled_call_impl = call


def _free_dims(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ShapesCollection:
    """Batch and length of what looks like tokens, batch of all else; torch fixes what the model cannot leave free."""
    shapes = ShapesCollection()
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim():
            free = 1 if x.is_floating_point() or x.is_complex() else min(x.dim(), 2)
            shapes[x] = dict.fromkeys(range(free), Dim.AUTO)
    return shapes


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """torch.export, by tracing Python; by Dynamo where that fails."""
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # whatever a model's own code raises while it is traced
        first = error
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=True)
    except Exception:  # the first one names the user's line more often
        reason = " ".join(line.strip() for line in str(first).strip().splitlines()[:3])
        raise ExportError(f"torch.export cannot export the model: {type(first).__name__}: {reason} Change the model "
                          "or dynamic_shapes; torch.export.draft_export lists all that is in the way.") from first


def _constants(program: ExportedProgram) -> list[Tensor | None]:
    """By input of the graph: the buffer or constant that is stored in the program; None for weights and the rest."""
    kept = {**program.state_dict, **program.constants}
    found: list[Tensor | None] = []
    for spec in program.graph_signature.input_specs:
        value = kept.get(spec.target) if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) else None
        found.append(value if isinstance(value, Tensor) else None)
    return found


def _ranges(values: Sequence[Any]) -> dict[str, Any]:
    """What a ShapeEnv knows of the sizes of a graph's inputs: expression by expression, with the range of each."""
    env = _shape_env(values)
    if env is None:
        return {}
    sizes: list[Any] = [size for x in values if isinstance(x, Tensor) for size in x.shape]
    sizes += [x for x in values if isinstance(x, torch.SymInt)]
    symbols = {symbol for size in sizes for symbol in expression(size).free_symbols}
    found = {str(symbol): str(env.var_to_range[symbol]) for symbol in symbols if symbol in env.var_to_range}
    return {**found, "sizes": [str(expression(size)) for size in sizes if isinstance(size, torch.SymInt)],
            "guards": len(env.guards)}


def _say(ranges: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in ranges.items())


def _shape_env(values: Sequence[Any]) -> Any:
    for x in values:
        for size in x.shape if isinstance(x, Tensor) else (x,):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _program(exported: ExportedProgram, graph: fx.GraphModule) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs."""
    for old, new in zip(*(g.find_nodes(op="placeholder") for g in (exported.graph, graph.graph)), strict=True):
        new.name = new.target = old.name
    graph.recompile()
    program = with_graph(exported, graph)
    _plain_output(program)
    return program


def with_graph(exported: ExportedProgram, graph: fx.GraphModule) -> ExportedProgram:
    """The program with another graph, whose inputs have the same names."""
    outputs = pytree.tree_leaves(graph.graph.output_node().args)
    specs = exported.graph_signature.output_specs
    renamed = [OutputSpec(spec.kind, type(spec.arg)(name=node.name) if isinstance(node, fx.Node) else spec.arg,
                          spec.target) for spec, node in zip(specs, outputs, strict=True)]
    graph.graph.output_node().args = (tuple(outputs),)
    return exported._update(graph, ExportGraphSignature(exported.graph_signature.input_specs, renamed))


def _plain_output(program: ExportedProgram) -> None:
    """Outputs of a library's own class become plain dicts, so that a file can be read where that library is not."""
    signature = program.module_call_graph[0].signature
    if signature is None:
        return
    spec = signature.out_spec
    leaves = [torch.empty(0) for _ in range(spec.num_leaves)]
    signature.out_spec = pytree.tree_structure(_plain(pytree.tree_unflatten(leaves, spec)))


def _plain(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _plain(value) for name, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(_plain(value) for value in x)
    return x


def _lengths(graph: fx.Graph) -> tuple[sympy.Expr, sympy.Expr] | tuple[None, None]:
    """The key length that decides over buckets and the query length: those of most of the sites with a table."""
    found = [tuple(expression(x.meta["val"].shape[2]) for x in (node.args[1], node.args[0]))
             for node in graph.find_nodes(op="call_function", target=PLANNED)]
    found = [lengths for lengths in found if lengths[0].free_symbols]
    return max(found, key=found.count, default=(None, None))


def _reachable(plan: Plan, program: ExportedProgram, length: sympy.Expr | None) -> tuple[Bucket, ...]:
    if length is None:
        return ()
    low, high = _bounds(program, length)
    return tuple(Bucket(max(b.lo, low), b.hi if high is None else min(b.hi or high + 1, high + 1), b.budget, b.sites)
                 for b in plan.buckets if (b.hi is None or b.hi > low) and (high is None or b.lo <= high))


def _bounds(program: ExportedProgram, length: sympy.Expr) -> tuple[int, int | None]:
    """Least and greatest key length of a call. A lower bound of 2 is torch's own, and it runs at 1 too."""
    from torch.utils._sympy.value_ranges import bound_sympy

    found = bound_sympy(length, program.range_constraints)
    low = int(found.lower) if found.lower.is_number and found.lower.is_finite else 1
    return (1 if low <= 2 else low), (int(found.upper) if _is_number(found.upper) else None)


def _is_number(bound: Any) -> bool:
    return bool(bound.is_Integer) and bound < 2**48  # beyond: torch's infinity for whole numbers


def _resized(captured: Captured, length: int | None, batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    values = _solve(captured, length, batch)
    names = iter(captured.program.graph_signature.user_inputs)
    nodes = {node.name: node for node in captured.program.graph.find_nodes(op="placeholder")}

    def resize(x: Any) -> Any:
        node = nodes.get(next(names))
        if not isinstance(x, Tensor) or node is None:
            return x
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                wanted = int(expression(size).subs(values))
                x = x.index_select(dim, torch.arange(wanted, device=x.device) % x.shape[dim])
        return x

    return pytree.tree_map(resize, (captured.args, dict(captured.kwargs)))


def _solve(captured: Captured, length: int | None, batch: int | None) -> dict[sympy.Symbol, int]:
    """Values of the program's symbols for a batch and a key length, the rest as in the example.

    Sizes that are equal in the example stay equal, even where the model would take others: ids and their mask.
    """
    rows: dict[sympy.Symbol, int] = {}
    others: dict[sympy.Symbol, int] = {}
    placeholders = {node.name: node for node in captured.program.graph.find_nodes(op="placeholder")}
    leaves = pytree.tree_leaves((captured.args, dict(captured.kwargs)))
    for name, x in zip(captured.program.graph_signature.user_inputs, leaves, strict=True):
        if isinstance(x, Tensor) and isinstance(name, str):
            for dim, size in enumerate(placeholders[name].meta["val"].shape):
                for symbol in expression(size).free_symbols:
                    _learn(rows if dim == 0 and symbol not in others else others, symbol, expression(size),
                           x.shape[dim])
    if batch is not None:
        rows = dict.fromkeys(rows, batch)
    if length is not None:
        expr = _checked_key_length(captured, length)
        # Of several lengths, as the past and the new tokens of a decoder, the longest changes.
        *kept, free = sorted((symbol for symbol in expr.free_symbols if symbol not in rows),
                             key=lambda symbol: (others[symbol], str(symbol)))
        size = solve_size(expr.subs({**rows, **{symbol: others[symbol] for symbol in kept}}), length)
        if size is None:
            raise OptionError(f"length is {length} and the key length of this model is {expr}. Give a length that it "
                              "can have.")
        example = others[free]
        others = {symbol: size if old == example else old for symbol, old in others.items()}
    return {**rows, **others}


def _learn(values: dict[sympy.Symbol, int], symbol: sympy.Symbol, expr: sympy.Expr, size: int) -> None:
    """Note what a symbol was in the example, where one dim tells."""
    known = solve_size(expr, size)
    if known is not None:
        values.setdefault(symbol, known)


def solve_size(expr: sympy.Expr, size: int) -> int | None:
    """The value of the only symbol of `expr` that makes it `size`; None: there is none, or not exactly one."""
    symbols = list(expr.free_symbols)
    try:
        solutions = sympy.solve(expr - size, symbols[0]) if len(symbols) == 1 else []
    except NotImplementedError:  # sympy knows no way for this kind of expression
        return None
    return int(solutions[0]) if len(solutions) == 1 and solutions[0].is_Integer else None


def _checked_key_length(captured: Captured, length: int) -> sympy.Expr:
    """The key length of the program, if it may be `length`."""
    if captured.key_length is None:
        raise OptionError(f"length is {length} and no attention of the exported model has a table of buckets. Leave "
                          "length out, or give dynamic_shapes that leave the key length free.")
    low, high = _bounds(captured.program, captured.key_length)
    if length < low or (high is not None and length > high):
        raise OptionError(f"length is {length} and the exported model takes key lengths from {low} to "
                          f"{'any' if high is None else high}. Give one in between, or other dynamic_shapes.")
    return captured.key_length
