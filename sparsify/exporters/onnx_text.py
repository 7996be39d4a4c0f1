"""Write ONNX functions as ONNX text, from expressions.

    text = Text()
    x = text.input("x")
    total = text.ReduceSum(x * x, text.ints(1), keepdims=0)      x0 = Mul(x, x) ...
    text.function("sparsify", "Square", 23, ["x"], [], total)    what `onnx.parser.parse_function` reads

A `Value` is the name of a tensor; operators on values write nodes. Any ONNX operator is a method of `Text`. Constants
are written once, at the top of the function, where every subgraph sees them. The text is kept, not a graph: it can be
read, compared and checked by onnx itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT, INT64, BOOL = 1, 7, 9  # TensorProto.DataType


@dataclass(frozen=True)
class Value:
    """A tensor of the graph that is being written."""

    text: "Text"
    name: str

    def __add__(self, other: "Value") -> "Value":
        return self.text.Add(self, other)

    def __sub__(self, other: "Value") -> "Value":
        return self.text.Sub(self, other)

    def __mul__(self, other: "Value") -> "Value":
        return self.text.Mul(self, other)

    def __floordiv__(self, other: "Value") -> "Value":
        """Whole numbers, truncated."""
        return self.text.Div(self, other)

    def __mod__(self, other: "Value") -> "Value":
        return self.text.Mod(self, other)

    def __and__(self, other: "Value") -> "Value":
        return self.text.And(self, other)

    def __or__(self, other: "Value") -> "Value":
        return self.text.Or(self, other)

    def __invert__(self) -> "Value":
        return self.text.Not(self)

    def __lt__(self, other: "Value") -> "Value":
        return self.text.Less(self, other)

    def __le__(self, other: "Value") -> "Value":
        return self.text.LessOrEqual(self, other)

    def __gt__(self, other: "Value") -> "Value":
        return self.text.Greater(self, other)

    def __ge__(self, other: "Value") -> "Value":
        return self.text.GreaterOrEqual(self, other)

    def to(self, kind: int) -> "Value":
        """Cast to FLOAT, INT64 or BOOL."""
        return self.text.Cast(self, to=kind)

    def size(self, axis: int) -> "Value":
        """Size of an axis, int64 [1]."""
        return self.text.Shape(self, start=axis, end=axis + 1)

    def scalar(self) -> "Value":
        """[1] as a scalar."""
        return self.text.Squeeze(self)

    def unsqueeze(self, *axes: int) -> "Value":
        return self.text.Unsqueeze(self, self.text.ints(*axes))

    def reshape(self, *sizes: "Value | int") -> "Value":
        """Sizes are int64 [1] values, or numbers: -1 is what is left, 0 the size that it has."""
        return self.text.Reshape(self, self.text.shape(*sizes))

    def expand(self, *sizes: "Value | int") -> "Value":
        return self.text.Expand(self, self.text.shape(*sizes))

    def take(self, index: "Value", axis: int = 0) -> "Value":
        return self.text.Gather(self, index, axis=axis)

    def slice(self, start: "Value", end: "Value", axis: int = 0) -> "Value":
        return self.text.Slice(self, start, end, self.text.ints(axis))


@dataclass(frozen=True)
class Attribute:
    """An attribute of the function, as that of a node: kind int, ints, float or floats."""

    name: str
    kind: str


@dataclass(frozen=True)
class _Line:
    text: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]


class Text:
    """Nodes of a function, written one after the other."""

    def __init__(self) -> None:
        self._constants: dict[str, Value] = {}
        self._lines: list[_Line] = []
        self._count = 0

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        if not operator[0].isupper():
            raise AttributeError(operator)
        return lambda *inputs, outputs=1, **attributes: self._node(operator, inputs, outputs, attributes)

    def input(self, name: str) -> Value:
        return Value(self, name)

    def ints(self, *numbers: int) -> Value:
        """int64 [n]."""
        return self._constant(f"value_ints=[{', '.join(map(str, numbers))}]")

    def integer(self, number: int) -> Value:
        return self._constant(f"value_int={number}")

    def real(self, number: float) -> Value:
        return self._constant(f"value_float={float(number)!r}")

    def true(self) -> Value:
        return self._constant("value=bool {1}")

    def attribute(self, name: str, kind: str) -> Value:
        """An attribute of the function: kind int, ints, float or floats."""
        return self._constant(f"value_{kind}: {kind} = @{name}")

    def shape(self, *sizes: Value | int) -> Value:
        """int64 [n] of sizes."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*(size for size in sizes if isinstance(size, int)))
        return self.Concat(*(self.ints(size) if isinstance(size, int) else size for size in sizes), axis=0)

    def range(self, end: Value) -> Value:
        """0, 1, ... end - 1."""
        return self.Range(self.integer(0), end, self.integer(1))

    def branch(self, condition: Value, yes: Callable[[], Value], no: Callable[[], Value]) -> Value:
        """If: one tensor, from either branch."""
        result, yes_name, no_name = (self._name() for _ in range(3))
        self._always(f"{result} = If({condition.name}) <then_branch = {yes_name} () => ({yes_name}_out) {{",
                     condition.name)
        self._body(yes, f"{yes_name}_out")
        self._always(f"}}, else_branch = {no_name} () => ({no_name}_out) {{")
        self._body(no, f"{no_name}_out")
        self._always("}>")
        return Value(self, result)

    def loop(self, count: Value, step: Callable[[Value], Value]) -> Value:
        """Loop: the tensors that `step` makes of 0, 1, ... count - 1, stacked along a new first axis.

        Nodes of `step` that depend on no number of a step are written before the loop.
        """
        first, before = len(self._lines), self._count
        result, at = self._name(), self._name()
        # onnxruntime wants trip count and condition.
        self._always(f"{result} = Loop({count.name}, {self.true().name}) <body = {result}_body "
                     f"(int64 {at}, bool {at}_go) => ({at}_on, {at}_out) {{", count.name, self.true().name)
        self._always(f"{at}_on = Identity({at}_go)")
        self._body(lambda: step(Value(self, at)), f"{at}_out")
        self._always("}>")
        self._hoist(first, {f"t{number + 1}" for number in range(before, self._count)})
        return Value(self, result)

    def _hoist(self, first: int, changing: set[str]) -> None:
        """Move what is the same in every step of the loop that begins at line `first` before it: a node costs time in
        every step, and runtimes leave it there. `changing`: all names of the loop."""
        still, moved = [], []
        for line in self._lines[first:]:
            if line.outputs and not changing.intersection(line.inputs):
                changing.difference_update(line.outputs)
                moved.append(line)
            else:
                still.append(line)
        self._lines[first:] = moved + still

    def function(self, domain: str, name: str, opset: int, inputs: Sequence[str], attributes: Sequence[str],
                 output: Value) -> str:
        """The whole function; call it last."""
        header = f'<domain: "{domain}", opset_import: ["": {opset}]>\n'
        signature = f"{name} <{', '.join(attributes)}> ({', '.join(inputs)}) => (out)\n"
        return header + signature + "\n".join(["{", *self._body_of([f"out = Identity({output.name})"], output), "}"])

    def _body_of(self, last: Sequence[str], output: Value) -> list[str]:
        """The lines that the output needs, constants first."""
        needed, lines = {output.name}, []
        for line in reversed(self._lines):
            if not line.outputs or needed.intersection(line.outputs):
                needed.update(line.inputs)
                lines.append(line.text)
        constants = [f"{value.name} = {call}" for call, value in self._constants.items() if value.name in needed]
        return [f"  {line}" for line in (*constants, *reversed(lines), *last)]

    def _body(self, write: Callable[[], Value], name: str) -> None:
        result = write()
        self._always(f"{name} = Identity({result.name})", result.name)

    def _always(self, line: str, *inputs: str) -> None:
        """A line of a subgraph: it stays."""
        self._lines.append(_Line(line, (), inputs))

    def _node(self, operator: str, inputs: Sequence[Value], outputs: int, attributes: dict[str, Any]) -> Any:
        names = [self._name() for _ in range(outputs)]
        settings = ", ".join(f"{key}: {x.kind} = @{x.name}" if isinstance(x, Attribute) else f"{key}={_literal(x)}"
                             for key, x in attributes.items())
        call = f"{operator}<{settings}>" if settings else operator
        given = tuple(value.name for value in inputs)
        self._lines.append(_Line(f"{', '.join(names)} = {call}({', '.join(given)})", tuple(names), given))
        values = [Value(self, name) for name in names]
        return values[0] if outputs == 1 else values

    def _constant(self, attribute: str) -> Value:
        call = f"Constant<{attribute}>()"
        if call not in self._constants:
            self._constants[call] = Value(self, f"c{len(self._constants)}")
        return self._constants[call]

    def _name(self) -> str:
        self._count += 1
        return f"t{self._count}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return f"{value!r}" if isinstance(value, float) else str(value)
