"""Read a product of two tensors as a contraction, whatever its spelling.

    bmm(x, y)                    x [n, i, c]   y [n, c, j]   out [n, i, j]
    einsum("blhd,bshd->bhls")    x [b, l, h, d]  y [b, s, h, d]  out [b, h, l, s]
    sum(x * y, -1)               x [b, l, 1, d]  y [b, 1, s, d]  out [b, l, s]

Every dim has a label, None where it is broadcast (size 1); labels of both operands that the result lacks are summed
over.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from sparsify.passes.axes import Axis, Dims, Group, is_one, op_name, resolve
from sparsify.passes.graph import argument, arguments, is_tensor, shape

Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Product:
    """node = alpha * (left contracted with right) + beta * added."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    alpha: Any = 1
    added: fx.Node | None = None
    beta: Any = 1

    def operands_of(self, out: Dims) -> tuple[Dims, Dims]:
        """The dims of both operands where the result has these."""
        bound = {label: group for label, group in zip(self.out_labels, resolve(out), strict=True) if label}
        return self._dims(self.left, self.left_labels, bound), self._dims(self.right, self.right_labels, bound)

    def others_of(self, operand: fx.Node, dims: Dims) -> tuple[Dims, Dims, Group]:
        """Where one operand has these dims: the dims of the other, those of the result, the axes summed over."""
        on_left = operand is self.left
        mine, theirs = (self.left_labels, self.right_labels)[::1 if on_left else -1]
        bound = {label: group for label, group in zip(mine, resolve(dims), strict=True) if label}
        summed = tuple(axis for label in mine if label and label not in self.out_labels for axis in bound[label])
        other = self._dims(self.right if on_left else self.left, theirs, bound)
        return other, tuple(bound[label] if label else () for label in self.out_labels), summed

    def _dims(self, operand: fx.Node, labels: Labels, bound: dict[str, Group]) -> Dims:
        for label, size in zip(labels, shape(operand), strict=True):
            if label and label not in bound:
                bound[label] = (Axis(size),)
        return tuple(bound[label] if label else () for label in labels)


def read_product(node: fx.Node) -> Product | None:
    """The product that `node` is, or None."""
    reader = READERS.get(op_name(node))
    return reader(node) if reader is not None and is_tensor(node) else None


def _labelled(node: fx.Node, left: Any, right: Any, left_names: str, right_names: str, out_names: str,
              **rest: Any) -> Product | None:
    """A product whose dims have these letters; a dim of size 1 that meets a longer one is broadcast."""
    if not (is_tensor(left) and is_tensor(right)):
        return None
    sizes: list[dict[str, Any]] = [dict(zip(names, shape(x), strict=True))
                                   for names, x in ((left_names, left), (right_names, right))]

    def labels(names: str, own: Mapping[str, Any]) -> Labels:
        return tuple(None if is_one(own[name]) else name for name in names)

    if any(names.count(name) > 1 for names in (left_names, right_names, out_names) for name in names):
        return None
    lost = (set(left_names) ^ set(right_names)) - set(out_names)  # summed out of one operand alone
    if any(not is_one(own[name]) for own in sizes for name in own if name in lost):
        return None
    out = tuple(name if any(not is_one(own.get(name, 1)) for own in sizes) else None for name in out_names)
    return Product(node, left, right, labels(left_names, sizes[0]), labels(right_names, sizes[1]), out, **rest)


def _matmul(node: fx.Node) -> Product | None:
    left, right = arguments(node)["self"], arguments(node)["other"]
    ranks = len(shape(left)), len(shape(right))
    batch = string.ascii_lowercase[: max(ranks) - 2]
    own = [batch[len(batch) - rank + 2:] for rank in ranks]
    names = (own[0] + "IC" if ranks[0] > 1 else "C", own[1] + "CJ" if ranks[1] > 1 else "C")
    return _labelled(node, left, right, names[0], names[1], batch + "I" * (ranks[0] > 1) + "J" * (ranks[1] > 1))


def _mv(node: fx.Node) -> Product | None:
    a = arguments(node)
    return _labelled(node, a["self"], a["vec"], "IC", "C", "I")


def _mm(node: fx.Node) -> Product | None:
    a = arguments(node)
    return _labelled(node, a["self"], a["mat2"], "IC", "CJ", "IJ")


def _bmm(node: fx.Node) -> Product | None:
    a = arguments(node)
    return _labelled(node, a["self"], a["mat2"], "nIC", "nCJ", "nIJ")


def _addmm(node: fx.Node) -> Product | None:
    a = arguments(node)
    return _labelled(node, a["mat1"], a["mat2"], "IC", "CJ", "IJ", alpha=a["alpha"], added=a["self"], beta=a["beta"])


def _baddbmm(node: fx.Node) -> Product | None:
    a = arguments(node)
    return _labelled(node, a["batch1"], a["batch2"], "nIC", "nCJ", "nIJ", alpha=a["alpha"], added=a["self"],
                     beta=a["beta"])


def _linear(node: fx.Node) -> Product | None:
    a = arguments(node)
    if a.get("bias") is not None or len(shape(a["weight"])) != 2:
        return None
    batch = string.ascii_lowercase[: len(shape(a["input"])) - 1]
    return _labelled(node, a["input"], a["weight"], batch + "C", "JC", batch + "J")


def _einsum(node: fx.Node) -> Product | None:
    a = arguments(node)
    equation, operands = a["equation"].replace(" ", ""), a["tensors"]
    if len(operands) != 2:
        return None
    inputs, arrow, out = equation.partition("->")
    names = inputs.split(",")
    if len(names) != 2:
        return None
    if not arrow:
        letters = sorted(set(inputs) - set(",."))
        out = ("..." if "..." in inputs else "") + "".join(x for x in letters if inputs.count(x) == 1)
    wide = max(len(shape(x)) - len(name.replace("...", "")) for name, x in zip(names, operands, strict=True))
    spare = "".join(sorted(set("0123456789") - set(equation)))[:wide]

    def spell(name: str, count: int) -> str:
        return name.replace("...", spare[len(spare) - count:]) if "..." in name else name

    left, right = (spell(name, len(shape(x)) - len(name.replace("...", "")))
                   for name, x in zip(names, operands, strict=True))
    return _labelled(node, operands[0], operands[1], left, right, spell(out, wide))


def _multiply_and_sum(node: fx.Node) -> Product | None:
    """sum(x * y, dim): a product of two broadcast tensors."""
    a = arguments(node)
    factors = a["self"]
    dims: Sequence[int] = a.get("dim") or ()
    if op_name(factors) != "mul" or len(factors.users) != 1 or len(dims) != 1:
        return None
    names = string.ascii_letters[: len(shape(factors))]
    summed = names[dims[0] % len(names)]
    left, right = argument(factors), argument(factors, 1)
    if not (is_tensor(left) and is_tensor(right)):
        return None
    own = [names[len(names) - len(shape(x)):] for x in (left, right)]
    product = _labelled(node, left, right, own[0], own[1], names.replace(summed, ""))
    if product is None or product.left_labels.count(summed) + product.right_labels.count(summed) < 2:
        return None
    out = list(product.out_labels)
    if a["keepdim"]:
        out.insert(names.index(summed), None)
    return replace(product, out_labels=tuple(out))


READERS: Mapping[str, Callable[[fx.Node], Product | None]] = {
    "matmul": _matmul, "mm": _mm, "mv": _mv, "bmm": _bmm, "addmm": _addmm, "baddbmm": _baddbmm, "linear": _linear,
    "einsum": _einsum, "sum": _multiply_and_sum,
}
