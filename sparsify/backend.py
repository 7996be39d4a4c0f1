"""Compile a model with the pass: `sparsify.compile`, and the backend that Dynamo calls with each graph.

    model(...) -> Dynamo's graph -> passes.run: attention becomes ops under the plan -> Inductor, or any other backend

`torch.compile(model, backend="sparsify", options={"plan": ...})` reaches the same pass through `backend`. What
`compile` adds is in `compiled_call`: settings that hold while Dynamo traces, so that a plan costs one graph a bucket.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sparsify import passes
from sparsify.bounds import Bounds
from sparsify.errors import DeviceError, ModelError, OptionError, PlanError, ShapeError, SparsifyError
from sparsify.passes.site import NEEDS_GRADIENTS, SiteRecord
from sparsify.plan import Plan, SiteShape, resolve_plan
from sparsify.tracing import log, log_records, trace_graph, trace_records

DEVICES = ("cpu", "cuda")
"""Device types that have kernels."""

GRAPHS_PER_BUCKET = 16
"""Graphs a bucket may need: grad mode on and off, train and eval, batch 1 and length 1 where a model branches."""

PlanLike = Plan | Mapping[str, Any] | str | Path | None
Compiler = Callable[..., Any]
Protect = Callable[[torch.Tensor], torch.Tensor]


def compile(model: Any, plan: PlanLike = None, *, guarantee: float | None = None, protect: Protect | None = None,
            dynamic: bool | None = None, fullgraph: bool = False, mode: str | None = None,
            options: Mapping[str, Any] | None = None, backend: str | Compiler = "inductor") -> Any:
    """Compile `model` so that its attention follows `plan`.

    A module is compiled in place, as `nn.Module.compile` does it, and returned: `generate` and every other method that
    calls it runs compiled, its type and its `state_dict` stay. A plain callable comes back wrapped, as from
    `torch.compile`. Copies and pickles of a compiled module are not compiled.

    plan      a Plan, a dict, the path of a plan file, or None for the default plan of the device
    guarantee share of query blocks that must keep every key block with a peak, as 0.95: the plan's bounds turn it into
              tolerances per head (`Plan.guaranteed`)
    protect   called with the first tensor of each call, as a rule the token ids [batch, tokens]: gives a bool mask
              [batch or 1, keys] of keys that no attention may lose. A call may bring its own:
              `model(ids, protect=mask)`
    dynamic   None means True: a plan serves many lengths. False: one graph per length
    fullgraph, mode, options, backend   as in `torch.compile`; `backend` compiles the rewritten graph. `options` may
              hold one of ours: "verify_masks": True compares every mask with its proof in every call. That builds the
              masks, [q_len, kv_len] each, and waits for the device: it is for finding a wrong proof

    Protected keys keep their key block, whole, for every head and every query that may see it, at every sparse site
    that has as many keys as the mask; `explain` names sites that do not, and a warning says so once. What the queries
    of protected tokens see is chosen as for all others.

    Raises PlanError, OptionError, ModelError, DeviceError, each before the model is touched. The compiled model raises
    ShapeError for an empty sequence or a mask of protected keys that is none, MaskError where `verify_masks` finds a
    wrong proof, and PlanError where the plan was calibrated on another graph.
    """
    options, verify_masks = _take_verify_masks(options)
    if protect is not None and not callable(protect):
        raise OptionError(f"protect is a {type(protect).__name__}. Give a function from token ids to a bool mask; a "
                          "mask itself goes into the call: model(ids, protect=mask).")
    compiler = Backend(_load_plan(plan, guarantee), *_check_inner(backend, mode, options), verify_masks, protect)
    dynamic = True if dynamic is None else dynamic
    if isinstance(model, nn.Module):
        _check_model(model)
        # What nn.Module.compile does, with a call of our own.
        model._compiled_call_impl = compiled_call(model._call_impl, compiler, compiler.plan, dynamic, fullgraph,
                                                  protect, model.forward)
        return model
    if not callable(model):
        raise ModelError(f"model is a {type(model).__name__}. Give an nn.Module, or a callable.")
    return compiled_call(model, compiler, compiler.plan, dynamic, fullgraph, protect)


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
            options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """What `torch.compile(model, backend="sparsify")` calls.

    `options` may hold "plan", "guarantee" and "verify_masks" (see `compile`) beside Inductor's own.
    """
    options, verify_masks = _take_verify_masks(options)
    plan = _load_plan(options.pop("plan", None), options.pop("guarantee", None))
    return Backend(plan, *_check_inner("inductor", mode, options), verify_masks)(gm, example_inputs)


@dataclass(frozen=True, eq=False)
class Backend:
    """A Dynamo backend: the pass under a plan, then another compiler. `plan` None: the default plan of the device.

    `protect` is what `compiled_call` asks for masks; a call of the backend with `protects` is for calls with one.
    """

    plan: Plan | None
    compiler: Compiler
    arguments: Mapping[str, Any] = field(default_factory=dict)
    verify_masks: bool = False
    protect: Protect | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any],
                 protects: bool = False) -> Callable[..., Any]:
        trace_graph("sparsify_before", gm)
        rewritten, records = rewrite_graph(gm, example_inputs, self.plan, self.verify_masks, protects)
        trace_graph("sparsify_after", rewritten)
        trace_records(records)
        compiled = self.compiler(rewritten, example_inputs, **self.arguments)
        _warn_of_gradients(records)
        _warn_of_protection(records)
        _warn_of_bounds(self.plan, example_inputs)
        log_records(records)
        return compiled


def rewrite_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan | None,
                  verify_masks: bool = False, protects: bool = False) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """Run the pass; if it fails, warn once and hand back the graph as it was, its sites refused.

    Raises PlanError for another's plan.
    """
    try:
        rewritten, records = passes.run(gm, example_inputs, plan or default_plan(example_inputs), verify_masks,
                                        protects)
    except RestartAnalysis:
        raise  # Dynamo's way to trace again, knowing more
    except Exception as error:
        why = f"the pass failed with {type(error).__name__}: {error}"
        _warn_once(f"sparsify left a graph as it was: {why}. "
                   "The model runs as torch.compile alone would run it. Please report this.")
        log.debug("the pass failed", exc_info=True)
        return gm, passes.refuse_all(gm, example_inputs, why.splitlines()[0])
    if plan is not None:
        plan.refuse_other_graph(site_shapes([records]))
    return rewritten, records


def site_shapes(graphs: Sequence[Sequence[SiteRecord]]) -> tuple[SiteShape, ...]:
    """What plans remember of the sites of a model's graphs."""
    return tuple(SiteShape(graph, x.index, x.module, x.heads, x.kv_heads, x.head_dim, x.value_dim,
                           x.mask.startswith("causal")) for graph, records in enumerate(graphs) for x in records)


def default_plan(values: Sequence[Any]) -> Plan:
    """The default plan of the device that these tensors are on."""
    return Plan.default(_device_type(values))


def _device_type(values: Sequence[Any]) -> str:
    return "cuda" if any(x.is_cuda for x in values if isinstance(x, torch.Tensor)) else "cpu"


def compiled_call(function: Callable[..., Any], compiler: Compiler, plan: Plan | None, dynamic: bool = True,
                  fullgraph: bool = False, protect: Protect | None = None,
                  forward: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`torch.compile(function, backend=compiler)`, traced so that a plan costs one graph per bucket.

    Size-oblivious tracing makes a batch of 1 no graph of its own, but Dynamo cannot trace every model so (torch 2.11 to
    2.13: slices whose end it cannot compare). It is tried for the whole graph, with data-dependent shapes in it; a
    model that resists is traced as torch.compile does it from then on.

    Calls with protected keys are compiled apart: their graphs begin with a marker that carries the mask, and
    `compiler` is told by `protects=True`. A call brings its own mask by the name `protect`, unless `forward`, what
    `function` calls in the end, has an argument of that name.
    """
    both = _compile_both(function, compiler, dynamic, fullgraph)
    protected = functools.cache(lambda: _compile_both(
        _marked(function), functools.partial(compiler, protects=True), dynamic, fullgraph))
    room = graph_room(plan)
    resists = False
    is_own = _has_argument(forward or function, "protect")

    @functools.wraps(both[1])
    def traced(*args: Any, **kwargs: Any) -> Any:
        nonlocal resists
        whole, call = both
        mask = None if is_own else kwargs.pop("protect", None)
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        _check_not_empty(inputs)
        if mask is None and protect is not None:
            mask = protect(_carrier(args, kwargs))
        if mask is not None:
            _check_protected(mask)
            inputs.append(mask)
            args, (whole, call) = (mask, *args), protected()
        # A length of 1 stays a graph of its own: models branch on it (`is_causal = q_len > 1` must be a bool).
        if not resists and not any(1 in x.shape[1:] for x in inputs):
            try:
                with tracing_config(room, size_oblivious=True, data_dependent=True):
                    return whole(*args, **kwargs)
            except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
                _raise_mistake(error)
                resists = True
                log.debug("traced with sizes of 1 apart: %s", error)
        with tracing_config(room, size_oblivious=False):
            try:
                return call(*args, **kwargs)
            except BackendCompilerFailed as error:
                _raise_mistake(error)
                raise

    # Under an outer torch.compile, Dynamo never enters: it inlines the function behind `_torchdynamo_inline`.
    traced.__dict__["sparsify"] = compiler  # what `explain` looks for
    return traced


def _compile_both(function: Callable[..., Any], compiler: Compiler, dynamic: bool,
                  fullgraph: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As one graph or not at all, and as torch.compile does it."""
    whole = torch.compile(function, backend=compiler, dynamic=dynamic, fullgraph=True)
    return whole, whole if fullgraph else torch.compile(function, backend=compiler, dynamic=dynamic)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a marker that carries the mask of protected keys, its first argument."""
    def marked(mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = _carrier_place(args, kwargs)
        if isinstance(place, int):
            args = (*args[:place], torch.ops.sparsify.protect_keys(args[place], mask), *args[place + 1:])
        else:
            kwargs = {**kwargs, place: torch.ops.sparsify.protect_keys(kwargs[place], mask)}
        return function(*args, **kwargs)

    marked.__code__ = marked.__code__.replace()  # Dynamo keeps graphs by code object: each model has its own
    return marked


def _has_argument(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in, without a signature
        return False


def _carrier_place(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str:
    """Where the first tensor of a call is: what a model begins with."""
    for place, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            return place
    if isinstance(kwargs.get("input_ids"), torch.Tensor):
        return "input_ids"
    for name, x in kwargs.items():
        if isinstance(x, torch.Tensor):
            return name
    raise OptionError("protect is given and the call has no tensor among its arguments. Give the token ids by "
                      "themselves, not inside another object.")


def _carrier(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    place = _carrier_place(args, kwargs)
    return args[place] if isinstance(place, int) else kwargs[place]


def _check_protected(mask: Any) -> None:
    if not isinstance(mask, torch.Tensor):
        raise ShapeError(f"protect is a {type(mask).__name__}. Give a bool tensor [batch or 1, keys].")
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ShapeError(f"protect is {mask.dtype} {list(mask.shape)}. Give a bool tensor [batch or 1, keys], True "
                         "where a key is protected.")


def _raise_mistake(error: Exception) -> None:
    """A caller's mistake that the backend found, without what Dynamo wraps around it."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, SparsifyError):
        raise inner from None


def graph_room(plan: Plan | None) -> dict[str, int]:
    """Recompile limits that leave room for every bucket: at the limit, Dynamo runs eager."""
    graphs = GRAPHS_PER_BUCKET * len((plan or Plan.default("cpu")).merged().buckets)
    return {"recompile_limit": graphs, "accumulated_recompile_limit": GRAPHS_PER_BUCKET * graphs}


@contextlib.contextmanager
def tracing_config(room: Mapping[str, int], size_oblivious: bool, data_dependent: bool = False) -> Iterator[None]:
    """Settings for one call. Without duck shaping, a batch of 2 and 2 heads do not become one symbol.

    data_dependent: shapes that depend on values (`nonzero`) stay in the graph, where else it would break.
    """
    dynamo: Any = torch._dynamo.config  # `patch` is made at run time
    shapes: Any = torch.fx.experimental._config
    settings: dict[str, Any] = {name: max(getattr(dynamo, name), needed) for name, needed in room.items()}
    if data_dependent:
        settings["capture_dynamic_output_shape_ops"] = True
    with dynamo.patch(settings), shapes.patch(use_duck_shape=False, backed_size_oblivious=size_oblivious):
        yield


def _check_not_empty(inputs: Sequence[torch.Tensor]) -> None:
    """The first tensor is the sequence; tracing an empty one fails far from its cause.

    Unless it is a cache that holds nothing yet: then the tensors that it will grow by have its shape, but for the zero.
    """
    if inputs and 0 in inputs[0].shape[1:] and not any(_grows_by(inputs[0], x) for x in inputs[1:]):
        raise ShapeError(f"the input has shape {list(inputs[0].shape)}: an empty sequence. Give at least one token.")


def _grows_by(empty: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a tensor has the shape of an empty one, and something in it."""
    return (empty.dim() == new.dim() and new.dtype != torch.bool
            and all(was in (0, now) and now for was, now in zip(empty.shape, new.shape, strict=True)))


def _load_plan(plan: PlanLike, guarantee: float | None = None) -> Plan | None:
    if plan is None:
        if guarantee is not None:
            raise PlanError(f"guarantee is {guarantee} and no plan is given: the default plan promises nothing. "
                            "Calibrate a plan for this model, and give it as plan.")
        return None
    resolved = resolve_plan(plan, "cpu")
    return resolved if guarantee is None else resolved.guaranteed(guarantee)


def _take_verify_masks(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """The options of the inner compiler, and the one that is ours."""
    rest = dict(options or {})
    verify_masks = rest.pop("verify_masks", False)
    if not isinstance(verify_masks, bool):
        raise OptionError(f"options['verify_masks'] is {verify_masks!r}. Give True or False.")
    return rest, verify_masks


def _check_inner(backend: str | Compiler, mode: str | None,
                 options: Mapping[str, Any] | None) -> tuple[Compiler, dict[str, Any]]:
    """The compiler of the rewritten graph, and the arguments that carry mode and options to it."""
    if callable(backend):
        compiler = backend
    elif backend in torch._dynamo.list_backends(exclude_tags=()) and backend != "sparsify":
        compiler = lookup_backend(backend)
    else:
        known = ", ".join(name for name in torch._dynamo.list_backends() if name != "sparsify")
        raise OptionError(f"backend is {backend!r}. It compiles the rewritten graph; give one of: {known}.")
    if mode is not None and options:
        raise OptionError(f"mode is {mode!r} and options are {sorted(options)}. Give one of the two.")
    if compiler is not lookup_backend("inductor"):
        return compiler, {name: x for name, x in (("mode", mode), ("options", options)) if x}
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx

    if mode is not None and mode not in list_mode_options():
        raise OptionError(f"mode is {mode!r}. Give one of: {', '.join(list_mode_options())}.")
    patches = {name.replace("-", "_"): x for name, x in (options or {}).items()}
    unknown = sorted(set(patches) - set(list_options()))
    if unknown:
        raise OptionError(f"options has the unknown key {unknown[0]!r}. torch._inductor.list_options() lists the keys; "
                          "a plan is given as plan=.")
    patches.update(list_mode_options(mode) if mode is not None else {})
    return compile_fx, {"config_patches": patches} if patches else {}


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError("model was wrapped by torch.compile already. Give the module inside: model._orig_mod.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ModelError(f"model has {name} on the meta device, without values. Load its weights first, "
                             "for example with model.to_empty(device='cpu') and load_state_dict.")
        if tensor.device.type not in DEVICES:
            raise DeviceError(f"model has {name} on {tensor.device}. There are kernels for: {', '.join(DEVICES)}. "
                              "Move the model with model.to('cpu').")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _warn_of_gradients(records: Sequence[SiteRecord]) -> None:
    """Where grad mode alone keeps attention as it was, nothing else would tell."""
    if any(record.why == NEEDS_GRADIENTS for record in records):
        _warn_once(f"sparsify left attention as it was: {NEEDS_GRADIENTS}. Training runs as under torch.compile.")


def _warn_of_bounds(plan: Plan | None, values: Sequence[Any]) -> None:
    """A guarantee whose bounds come from another kind of device."""
    if plan is None:
        return
    guaranteed = [bucket for bucket in plan.buckets if any(x.shifts is not None for x in bucket.sites.values())]
    fitted_on = {Bounds.from_dict(bucket.bounds).device_type for bucket in guaranteed if bucket.bounds} - {""}
    here = _device_type(values)
    if fitted_on - {here}:
        _warn_once(f"sparsify: plan {plan.name} was calibrated on {', '.join(sorted(fitted_on))} and runs on "
                   f"{here}, where peaks are estimated in another precision. What it guarantees was not measured here: "
                   "calibrate the plan on this device.")


def _warn_of_protection(records: Sequence[SiteRecord]) -> None:
    """Sites that may lose protected keys."""
    lacking = [record for record in records if record.lacks_protection]
    if lacking:
        _warn_once(f"sparsify does not protect keys at {len(lacking)} of {len(records)} attention sites: "
                   f"{lacking[0].protection} ({lacking[0].line}). sparsify.explain names them all.")
