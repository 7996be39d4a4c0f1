"""What an exported file says of itself: JSON inside it, read without loading a model.

A `.pt2` file holds it as an extra file, an ONNX file in its metadata. `sparsify explain FILE` prints it, and
`sparsify bench --exported FILE` makes inputs by it.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from sparsify import __version__
from sparsify.errors import ExportError, OptionError, PlanError
from sparsify.exporters.capture import Captured, solve_size
from sparsify.ops.planned import FEW_QUERIES
from sparsify.ops.version import VERSION
from sparsify.passes.graph import expression
from sparsify.passes.site import SiteRecord
from sparsify.plan import Plan
from sparsify.tracing import describe

NAME = "sparsify.json"
"""Name of the extra file, and of the key in ONNX metadata."""
SCHEMA = 3


@dataclass(frozen=True)
class Input:
    """One tensor that the program is called with.

    sizes   one per dim: a number, or an expression in the program's symbols
    high    whole numbers of the example were below this; None: not whole numbers
    keyword whether it is given by name
    """

    name: str
    dtype: str
    sizes: tuple[int | str, ...]
    high: int | None
    keyword: bool

    def random(self, values: Mapping[str, int], rng: torch.Generator) -> Tensor:
        """A tensor like the example's, of these sizes: noise, whole numbers in its range, True."""
        shape = [size if isinstance(size, int) else int(parse_size(size).subs(dict(values))) for size in self.sizes]
        dtype = getattr(torch, self.dtype)
        if dtype == torch.bool:
            return torch.ones(shape, dtype=dtype)
        if self.high is not None:
            return torch.randint(min(1, self.high - 1), self.high, shape, generator=rng, dtype=dtype)
        return torch.randn(shape, generator=rng).to(dtype)


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    target      "export", "aot_inductor", "ort" or "tensorrt"
    sparsify, torch, ops   versions that wrote it; `ops` is that of the ops' schemas
    plan        the plan, and with it its fingerprint and bucket table
    sites       what became of every attention site
    inputs      what it is called with
    ranges      the least and greatest value of every symbol in the sizes; None: no end
    key_length  the key length that chooses the bucket, in those symbols; None: no site has a table
    query_length  the query length of sites with a table
    buckets     the ranges of key lengths, as far as they can be reached
    processor   instructions that machine code for a CPU may use; empty: the file holds none
    capability  compute capability of the GPU that machine code is for; None: the file holds none
    """

    target: str
    plan: Plan
    sites: tuple[SiteRecord, ...]
    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    key_length: str | None
    query_length: str | None
    buckets: tuple[tuple[int, int | None], ...]
    processor: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    sparsify: str = __version__
    torch: str = torch.__version__
    ops: int = VERSION

    @classmethod
    def of(cls, captured: Captured, target: str) -> "Contents":
        """What a file of this program says."""
        ranges = {}
        for symbol, bounds in captured.program.range_constraints.items():
            upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**48 else None
            ranges[str(symbol)] = (int(bounds.lower), upper)
        keys, queries = (None if x is None else str(x) for x in (captured.key_length, captured.query_length))
        return cls(target, captured.plan, captured.records, _inputs(captured), ranges, keys, queries,
                   tuple((bucket.lo, bucket.hi) for bucket in captured.buckets))

    def to_json(self) -> str:
        """As a file holds it."""
        data = {"schema": SCHEMA, **asdict(self), "plan": self.plan.to_dict(), "plan_hash": self.plan.hash}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Contents":
        """Read what `to_json` wrote; `where` names the file in errors. Raises ExportError."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ExportError(f"{where}: its {NAME} is no JSON ({error}). Export the model again.") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ExportError(f"{where} has schema {schema!r} and this version of sparsify reads {SCHEMA}. "
                              "Export the model again, or use the sparsify that wrote it.")
        if data.get("ops") != VERSION:
            raise ExportError(f"{where} calls version {data.get('ops')!r} of the ops (sparsify {data.get('sparsify')}) "
                              f"and here is version {VERSION}. Export the model again.")
        try:
            return cls(data["target"], Plan.from_dict(data["plan"]),
                       tuple(SiteRecord(**{**site, "depends": tuple(site["depends"])}) for site in data["sites"]),
                       tuple(Input(**{**x, "sizes": tuple(x["sizes"])}) for x in data["inputs"]),
                       {name: (low, high) for name, (low, high) in data["ranges"].items()}, data["key_length"],
                       data["query_length"], tuple((lo, hi) for lo, hi in data["buckets"]), tuple(data["processor"]),
                       _pair(data["capability"]), data["sparsify"], data["torch"], data["ops"])
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise ExportError(f"{where}: its {NAME} cannot be read ({type(error).__name__}: {error}). Export the model "
                              "again.") from error

    def random_inputs(self, length: int | None, batch: int, seed: int = 0) -> tuple[tuple[Tensor, ...],
                                                                                  dict[str, Tensor]]:
        """Random inputs of a key length. Raises OptionError if the file takes no such length."""
        values = self._values(length, batch)
        rng = torch.Generator().manual_seed(seed)
        made = [(x, x.random(values, rng)) for x in self.inputs]
        return (tuple(tensor for x, tensor in made if not x.keyword),
                {x.name: tensor for x, tensor in made if x.keyword})

    def program_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Which program a call runs, in a file with one for each bucket.

        That of its bucket; with few queries (`planned.FEW_QUERIES`) the first that drops nothing, if there is one.
        Raises OptionError for a key length that the file does not take.
        """
        if self.key_length is None or self.query_length is None:  # both or neither
            return 0
        given = [x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, Tensor)]
        values: dict[str, int] = {}
        for known, tensor in zip(self.inputs, given, strict=True):
            for expr, size in zip(known.sizes, tensor.shape, strict=True):
                if not isinstance(expr, int) and parse_size(expr).is_Symbol:
                    values[expr] = size
        length, queries = (int(parse_size(x).subs(values)) for x in (self.key_length, self.query_length))
        for place, (lo, hi) in enumerate(self.buckets):
            if lo <= length and (hi is None or length < hi):
                return place if queries > FEW_QUERIES or self._exact_program is None else self._exact_program
        raise OptionError(f"the call has a key length of {length} and the file takes them from {self.buckets[0][0]} to "
                          f"{'any' if self.buckets[-1][1] is None else self.buckets[-1][1] - 1}.")

    @functools.cached_property
    def _exact_program(self) -> int | None:
        dense = (place for place, (lo, _) in enumerate(self.buckets) if self.plan.bucket_of(lo).is_dense)
        return next(dense, None)

    def _values(self, length: int | None, batch: int) -> dict[str, int]:
        rows = {str(symbol) for x in self.inputs for symbol in parse_size(x.sizes[0] if x.sizes else 1).free_symbols}
        values = {name: batch if name in rows else 0 for name in self.ranges}
        if self.key_length is None:
            if length is not None:
                raise OptionError(f"length is {length} and no attention in the file has a table of buckets. Leave "
                                  "lengths out.")
            return values
        if length is None:
            length = self.buckets[-1][0]
        low, high = self.buckets[0][0], self.buckets[-1][1]
        if length < low or (high is not None and length >= high):
            raise OptionError(f"length is {length} and the file takes key lengths from {low} to "
                              f"{'any' if high is None else high - 1}.")
        expr = parse_size(self.key_length).subs(dict.fromkeys(rows, batch))
        size = solve_size(expr.subs(dict.fromkeys(expr.free_symbols, sympy.Symbol("s0"))), length)
        if size is None:
            raise OptionError(f"length is {length} and the key length of the file is {self.key_length}. Give a length "
                              "that it can have.")
        return {name: batch if name in rows else size for name in self.ranges}

    def __str__(self) -> str:
        reach = ", ".join(f"[{lo}, {'inf' if hi is None else hi})" for lo, hi in self.buckets) or "one"
        lines = [f"{KINDS.get(self.target, self.target)}, written by sparsify {self.sparsify} with torch {self.torch}",
                 str(self.plan), f"buckets that calls can reach: {reach}"]
        lines += [f"input {x.name}: {x.dtype} [{', '.join(map(str, x.sizes))}]" for x in self.inputs]
        lines += [f"{name} from {low} to {'any' if high is None else high}" for name, (low, high) in
                  self.ranges.items()]
        return "\n".join([*lines, *(f"{site.index}  {describe(site)}" for site in self.sites)])


def _pair(given: Sequence[int] | None) -> tuple[int, int] | None:
    return None if given is None else (given[0], given[1])


SIZE = re.compile(r"(?:[su]\d+|\d+|[-+*/() ])+")


@functools.cache  # a package for CUDA asks at every call
def parse_size(size: int | str) -> sympy.Expr:
    """A size of a file as an expression. Raises ExportError for what is none: sympy would run it as code."""
    if not SIZE.fullmatch(str(size)):
        raise ExportError(f"the file has the size {size!r}, which is no size. It is damaged: export the model again.")
    return sympy.sympify(str(size))


KINDS = {"export": "ExportedProgram", "aot_inductor": "AOTInductor package", "ort": "ONNX for ONNX Runtime",
         "tensorrt": "ONNX for TensorRT", "torch_tensorrt": "program with TensorRT engines"}


def _inputs(captured: Captured) -> tuple[Input, ...]:
    placeholders = {node.name: node for node in captured.program.graph.find_nodes(op="placeholder")}
    leaves: Sequence[Any] = pytree.tree_leaves((captured.args, dict(captured.kwargs)))
    positional = len(pytree.tree_leaves(captured.args))
    found = []
    for place, (name, x) in enumerate(zip(captured.program.graph_signature.user_inputs, leaves, strict=True)):
        if not isinstance(x, Tensor):
            continue
        sizes = tuple(size if isinstance(size, int) else str(expression(size))
                      for size in placeholders[str(name)].meta["val"].shape)
        whole = x.dtype != torch.bool and not x.is_floating_point() and not x.is_complex()
        found.append(Input(str(name), str(x.dtype).removeprefix("torch."), sizes,
                           int(x.max()) + 1 if whole else None, place >= positional))
    return tuple(found)
