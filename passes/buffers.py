"""Read the values of buffers that never change, such as `tril` of the longest sequence, and have Dynamo watch them.

Given   the inputs of a graph as Dynamo hands them to a backend: real tensors, with their sources.
Leaves  `Buffer`s: tensors that a module holds or that are global. What was read of one (`Reading`) is a guard of the
        compiled code (`watch`): a call whose buffer reads otherwise compiles anew.
Never   trusts a value unwatched. The guard finds the buffer by its source, and knows it by identity and version, so
        it costs a dictionary lookup; another buffer, or the same one written to, is read again. Layers that each
        hold an equal buffer so share one graph.

    tril [1, 1, n, n]   ->   Band(rows=2, columns=3, low=None, high=0, inside=True, outside=False)

Writes that torch does not count (through `.data`, or a NumPy array that shares the memory) go unseen, as they do by
autograd.
"""

import functools
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import guards
from torch._dynamo.source import ChainedSource, GlobalSource
from torch._guards import Guard, Source, TracingContext
from torch._subclasses import FakeTensor

from sparsify.passes.graph import mutations

ELEMENTS_AT_ONCE = 2**22
"""How much of a buffer is read at a time: a causal mask of 16K tokens is 256 MiB, its diagonals eight times that."""


@dataclass(frozen=True)
class Same:
    """The same value everywhere."""

    value: bool | int | float


@dataclass(frozen=True)
class Ramp:
    """start + step * i along `dim`, whole numbers."""

    dim: int
    start: int
    step: int


@dataclass(frozen=True)
class Band:
    """`inside` where low <= column - row <= high, else `outside`; a bound of None is the tensor's edge."""

    rows: int
    columns: int
    low: int | None
    high: int | None
    inside: bool | int | float
    outside: bool | int | float


Reading = Same | Ramp | Band


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor that outlives the call, and where Dynamo finds it; None: it is a constant of an exported graph."""

    tensor: Tensor
    source: Source | None

    @functools.cached_property
    def reading(self) -> Reading | None:
        return read_values(self.tensor)


def buffers_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, Buffer]:
    """The placeholders of `gm` that hold buffers. Empty where no guard can watch them."""
    context = TracingContext.try_get()
    # torch 2.11 has no way to leave guards out, and no such attribute.
    if context is None or getattr(context.guards_context, "skip_install", False):
        return {}
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    written = {_storage(inputs[node]) for node in mutations(gm.graph) if isinstance(inputs.get(node), Tensor)}
    found = {}
    for node, x in inputs.items():
        symbolic = context.tensor_to_context.get(x) if isinstance(x, Tensor) else None
        source = getattr(symbolic, "tensor_source", None)
        if (source is not None and _outlives_calls(source) and _is_readable(x) and _storage(x) not in written
                and not _is_counter(x)):
            found[node] = Buffer(x, source)
    return found


def constants_of(gm: fx.GraphModule, values: Sequence[Tensor | None]) -> dict[fx.Node, Buffer]:
    """The same for a graph of torch.export, whose buffers go into the file: nobody need watch them.

    values: by placeholder, the tensor that it stands for, or None.
    """
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True))
    written = {node for node in mutations(gm.graph) if node in inputs}
    return {node: Buffer(x, None) for node, x in inputs.items()
            if x is not None and node not in written and _is_readable(x) and not _is_counter(x)}


def watch(readings: Mapping[Buffer, Reading]) -> None:
    """Guard the code that is being compiled on what was read."""
    for buffer, reading in readings.items():
        if buffer.source is None:
            continue
        guards.install_guard(Guard(buffer.source, functools.partial(_install, _Watch(buffer.tensor, reading))))


class _Watch:
    """Whether a tensor still reads as it did: True at a glance for tensors that did and were not written to since."""

    def __init__(self, tensor: Tensor, reading: Reading) -> None:
        self.reading = reading
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._remember(tensor)

    def __call__(self, tensor: Tensor) -> bool:
        known = self.known.get(id(tensor))
        if known is not None and known[0]() is tensor and tensor._version == known[1]:
            return True
        if not _is_readable(tensor) or read_values(tensor) != self.reading:
            return False
        self._remember(tensor)
        return True

    def _remember(self, tensor: Tensor) -> None:
        self.known = {i: known for i, known in self.known.items() if known[0]() is not None}
        self.known[id(tensor)] = (weakref.ref(tensor), tensor._version)


_count = itertools.count()


def _install(unchanged: _Watch, builder: Any, guard: Guard) -> None:
    """Called by Dynamo when it builds the guards.

    The guard hangs on the root: Dynamo skips guards below a module whose attributes are the same objects as before, and
    in-place writes change no attribute.
    """
    name = f"___sparsify_unchanged_{next(_count)}"
    code = f"{name}({builder.arg_ref(guard)})"
    builder.add_python_lambda_leaf_guard_to_root([code], [f"{code}  # sparsify read the values of this buffer"],
                                                 {**guards._get_closure_vars(), name: unchanged})


def _outlives_calls(source: Source) -> bool:
    """Whether a source is a module's attribute or a global; arguments of the call change every time."""
    base = source
    while isinstance(base, ChainedSource):
        if base.guard_source.is_unspecialized_nn_module():
            return True
        base = base.base
    return isinstance(base, GlobalSource)


def _is_readable(x: Any) -> bool:
    """A plain tensor with values and a count of the writes to it; weights are no masks."""
    return (type(x) in (Tensor, nn.Parameter, nn.Buffer) and not isinstance(x, FakeTensor) and not x.requires_grad
            and not x.is_inference() and x.layout == torch.strided and x.device.type != "meta" and not x.is_complex())


def _is_counter(x: Tensor) -> bool:
    """Whether this may be a position or a length that moves with every call: a guard on it would compile every time."""
    return x.numel() == 1 and not x.is_floating_point()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def read_values(tensor: Tensor) -> Reading | None:
    """What a tensor holds, if it is one of the simple things above."""
    if tensor.numel() == 0 or tensor.is_quantized:
        return None
    long = [d for d, size in enumerate(tensor.shape) if size > 1]
    if len(long) > 2:
        return None
    with torch.no_grad():
        values = tensor.detach().reshape([tensor.shape[d] for d in long])
        corner = values.flatten()[0]
        if bool((values == corner).all()):
            return Same(corner.item())
        if bool(corner != corner):
            return None
        if len(long) == 1:
            return _ramp(values, long[0])
        return _band(values, corner, *long) if len(long) == 2 else None


def _ramp(values: Tensor, dim: int) -> Ramp | None:
    if values.dtype == torch.bool or values.is_floating_point():
        return None
    start, step = int(values[0]), int(values[1]) - int(values[0])
    ramp = torch.arange(len(values), device=values.device) * step + start
    return Ramp(dim, start, step) if bool((values == ramp).all()) else None


def _band(values: Tensor, corner: Tensor, rows: int, columns: int) -> Band | None:
    """The diagonals of one of two values, if they are neighbours."""
    other = next((part[part != corner][0] for _, part in _parts(values) if bool((part != corner).any())), None)
    assert other is not None, "the values are not all the same"
    for inside, outside in ((corner, other), (other, corner)):
        low, high = _diagonals(values, inside)
        band = ((part, torch.where((diagonal >= low) & (diagonal <= high), inside, outside))
                for diagonal, part in _parts(values))
        if low <= high and all(bool((part == expected).all()) for part, expected in band):
            height, width = values.shape
            return Band(rows, columns, None if low == 1 - height else low, None if high == width - 1 else high,
                        inside.item(), outside.item())
    return None


def _diagonals(values: Tensor, x: Tensor) -> tuple[int, int]:
    """The first and the last diagonal that holds `x`; none holds NaN."""
    low, high = values.shape[1], -values.shape[0]
    for diagonal, part in _parts(values):
        found = diagonal[part == x]
        if found.numel():
            low, high = min(low, int(found.min())), max(high, int(found.max()))
    return low, high


def _parts(values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a matrix, some at a time, with the diagonal of each element."""
    height, width = values.shape
    step = max(1, ELEMENTS_AT_ONCE // width)
    for start in range(0, height, step):
        part = values[start:start + step]
        row = torch.arange(start, start + len(part), device=values.device)[:, None]
        yield torch.arange(width, device=values.device) - row, part
