"""What the passes hand to each other: sites, proven masks, choices, and the record that `sparsify.explain` prints."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from sparsify.passes.axes import Dims, Group, Size, extent
from sparsify.passes.graph import Origin
from sparsify.plan import Bucket, Budget

BATCH, HEAD, QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
"""The indices of a score, as mask proofs name them."""
TRUE = sympy.true

NEEDS_GRADIENTS = "gradients are needed and the ops have no backward; call the model under torch.no_grad()"
"""Why a site under enabled grad mode is refused."""

KEPT = "protected keys are kept"
"""What a record says of a site that keeps them."""

Form = Literal["sdpa", "softmax chain", "exp chain", "flex_attention", "other"]
Outcome = Literal["sparse", "exact", "kept dense", "refused"]


@dataclass(frozen=True)
class Operand:
    """A tensor of a site and what its dims mean (passes/axes.py)."""

    node: fx.Node
    dims: Dims = field(compare=False)


@dataclass(frozen=True)
class Scale:
    """A factor on the scores: a number, the node of a symbolic one, or a tensor; a divisor if `divides`."""

    value: "float | fx.Node | Operand"
    divides: bool = False


@dataclass(frozen=True)
class MaskTerm:
    """One step that the graph applies to the scores after their scale and soft cap.

    add     `tensor` is added to the scores: 0 where visible and very negative where hidden, or a bias
    keep    scores stay where `tensor` is true and become `fill` elsewhere
    hide    scores become `fill` where `tensor` is true
    gate    scores are multiplied by `tensor`, which must be 1 wherever the other terms leave them visible
    index   the element of `tensor` that the score at (BATCH, HEAD, QUERY, KEY) meets: one expression per dim
    factor  by what the scores were multiplied afterwards: the term counts `factor` times
    scalers tensors by which they were multiplied afterwards too
    """

    kind: Literal["add", "keep", "hide", "gate"]
    tensor: fx.Node
    index: tuple[sympy.Expr, ...]
    fill: float | fx.Node = float("-inf")
    factor: float = 1.0
    dims: Dims = field(default=(), compare=False)
    scalers: tuple[Scale, ...] = ()


def is_soft(term: MaskTerm, terms: tuple[MaskTerm, ...]) -> bool:
    """Whether what a term hides is added, not hidden: it is scaled by a tensor later, or another term hides deeper, so
    that a row may be left with nothing else to see."""
    if term.kind not in ("keep", "hide"):
        return False
    depths = [x.fill * x.factor for x in terms if x.kind in ("keep", "hide") and isinstance(x.fill, int | float)]
    deepest = min(depths, default=float("-inf"))
    return bool(term.scalers) or (isinstance(term.fill, int | float) and term.fill * term.factor > deepest)


@dataclass(frozen=True)
class Gain:
    """What the attention weights are multiplied by after the softmax.

    kind     "times", "over", or "zero": zero where the operand is true
    on       what is multiplied instead, exactly: the output, where the keys do not matter, or the values
    """

    kind: Literal["times", "over", "zero"]
    value: "float | fx.Node | Operand"
    on: Literal["output", "values"] = "output"


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph: output = softmax(cap(scales * query @ key^T) + masks) @ value.

    The op's layout has four groups of axes: query [batch, heads, q_len, D], key [batch, kv_heads, kv_len, D], value
    [batch, kv_heads, kv_len, Dv]; grouped KV heads are not repeated. `layout` names the axes of the groups, operands
    are still in the layout of the user. `output` is the node that a rewrite replaces. `dtype` is the one attention runs
    in (under autocast the operands may be wider). `is_causal` aligns top-left and holds beside `masks`. A score s
    becomes softcap * tanh(s); `sink_logits` is one more logit per head, a number or a tensor, that carries no value.
    """

    form: Form
    origin: Origin
    query: Operand
    key: Operand
    value: Operand
    output: Operand
    layout: "Layout"
    dtype: torch.dtype
    scales: tuple[Scale, ...]
    masks: tuple[MaskTerm, ...] = ()
    is_causal: bool = False
    softcap: float | None = None
    sink_logits: "float | Operand | None" = None
    gains: tuple[Gain, ...] = ()

    @property
    def batch(self) -> Size:
        return extent(self.layout.batch)

    @property
    def heads(self) -> Size:
        return extent((*self.layout.kv_heads, *self.layout.groups))

    @property
    def kv_heads(self) -> Size:
        return extent(self.layout.kv_heads)

    @property
    def q_len(self) -> Size:
        return extent(self.layout.queries)

    @property
    def kv_len(self) -> Size:
        return extent(self.layout.keys)


@dataclass(frozen=True)
class Layout:
    """The axes of a site by what they are. Query heads are `kv_heads` times `groups`."""

    batch: Group
    kv_heads: Group
    groups: Group
    queries: Group
    keys: Group
    dim: Group
    value_dim: Group

    @property
    def heads(self) -> Group:
        return (*self.kv_heads, *self.groups)


@dataclass(frozen=True)
class Refused:
    """A site left exactly as it was.

    why   one sentence: "softmax runs over dim 1, the keys are dim 3"
    node  the FX node that stopped the walk
    """

    form: Form
    origin: Origin
    why: str
    node: str


@dataclass(frozen=True)
class MaskProof:
    """What the masks of a site were proven to be, exactly; all parts hold together.

    causal_offset  key j is visible to query i only if j <= i + causal_offset; None: no causality
    window         and only if j > i + causal_offset - window; None: no window
    visible_keys   which keys are visible, over BATCH, KEY and the tensors in `leaves`; true: all
    documents      ids over BATCH, QUERY and over BATCH, KEY: visible only if they are equal
    carried        terms that the op applies as a tensor: biases, and masks that are nothing of the above
    leaves         the nodes behind the function symbols of the expressions
    """

    causal_offset: sympy.Expr | None = None
    window: sympy.Expr | None = None
    visible_keys: sympy.Basic = TRUE
    documents: tuple[sympy.Expr, sympy.Expr] | None = None
    carried: tuple[MaskTerm, ...] = ()
    leaves: Mapping[str, fx.Node] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = []
        if self.causal_offset is not None:
            parts.append("causal" if self.causal_offset == 0 else f"causal, offset {self.causal_offset}")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.documents is not None:
            parts.append(f"documents {self._say(self.documents[0])} = {self._say(self.documents[1])}")
        if self.visible_keys != TRUE:
            parts.append(f"keys where {self._say(self.visible_keys)}")
        parts += [f"{'bias' if term.kind == 'add' else 'mask'} {term.tensor.name}" for term in self.carried]
        return "; ".join(parts) or "none"

    def _say(self, expr: sympy.Basic) -> str:
        """An expression with the user's names: `attention_mask[b, k]` for `Ne(arg7_1(b, k), 0)`."""
        text = str(expr)
        for name, node in self.leaves.items():
            words = re.findall(r"\w+", node.meta.get("source", name))
            text = re.sub(rf"\b{name}\(([^()]*)\)", rf"{words[-1]}[\1]", text)
        return re.sub(r"Ne\((\w+\[[^]]*\]), 0\)", r"\1", text)


@dataclass(frozen=True)
class ProvenSite:
    """A site whose masks are known."""

    site: AttentionSite
    mask: MaskProof


@dataclass(frozen=True)
class ChosenSite:
    """A proven site with the budget that holds in this graph, its bucket, and how the decision was made.

    table       buckets one after the other, where the call decides: `bucket` spans them, `budget` is one that drops
                something. None: `budget` holds for every call
    least_keys  no call of this graph has fewer
    protected   bool [B or 1, kv_len]: keys whose blocks are kept; None: none
    protection  what became of the wish to protect keys, in words; empty: nobody asked
    """

    site: AttentionSite
    mask: MaskProof
    bucket: Bucket
    budget: Budget
    how: str
    protected: fx.Node | None = None
    protection: str = ""
    table: tuple[Bucket, ...] | None = None
    least_keys: int = 1


@dataclass(frozen=True)
class SiteRecord:
    """What became of one site, in words.

    index    its number in its graph, and the `site` argument of its op
    op       what computes it now; empty if refused
    depends  the inputs that its masks and biases are made of
    heads    query heads, and so on; 0 where the graph does not say a number, or the site is refused
    protection  whether protected keys are kept, and why not; empty: nobody asked, or nothing is dropped
    """

    index: int
    outcome: Outcome
    form: Form
    line: str
    module: str
    why: str
    node: str
    mask: str = ""
    bucket: str = ""
    budget: str = ""
    op: str = ""
    depends: tuple[str, ...] = ()
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    protection: str = ""

    @property
    def lacks_protection(self) -> bool:
        """Whether this site was asked to keep protected keys and cannot."""
        return bool(self.protection) and self.protection != KEPT

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))
