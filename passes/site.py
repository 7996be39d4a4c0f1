"""What the passes hand to each other: sites, proven masks, choices, and the record that `sparsify.explain` prints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
from torch import fx

from sparsify.plan import Bucket, Budget

BATCH, HEAD, QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
"""The indices of a score, as mask proofs name them."""
TRUE = sympy.true

NEEDS_GRADIENTS = "gradients are needed and the ops have no backward; call the model under torch.no_grad()"
"""Why a site under enabled grad mode is refused."""

Form = Literal["sdpa", "softmax chain", "other"]
Outcome = Literal["sparse", "exact", "kept dense", "refused"]


@dataclass(frozen=True)
class Origin:
    """Where the user wrote something.

    line    "model.py:214", the innermost frame outside torch
    module  "model.layers.0.self_attn", empty outside any module
    """

    line: str
    module: str


@dataclass(frozen=True)
class MaskTerm:
    """One step by which the graph hides scores.

    add   `tensor` is added to the scores: 0 where visible, very negative where hidden
    keep  scores stay where `tensor` is true and become `fill` elsewhere
    hide  scores become `fill` where `tensor` is true
    """

    kind: Literal["add", "keep", "hide"]
    tensor: fx.Node
    fill: float | fx.Node = float("-inf")


@dataclass(frozen=True)
class Scale:
    """A factor on the scores: a number, or the node of a symbolic one; a divisor if `divides`."""

    value: float | fx.Node
    divides: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph: output = softmax(scales * query @ key^T, masks applied) @ value.

    query [B, H, L, D]; key [B, Hkv, S, D], or [B, Hkv, D, S] if `key_transposed`; value [B, Hkv, S, Dv]; grouped KV
    heads are not repeated. `output` is the node that a rewrite replaces; its dtype is the one attention runs in (under
    autocast the operands may be wider). `is_causal` aligns top-left and holds beside `masks`.
    """

    form: Form
    origin: Origin
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_transposed: bool
    scales: tuple[Scale, ...]
    masks: tuple[MaskTerm, ...]
    is_causal: bool
    output: fx.Node


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
    """What the masks of a site were proven to be, exactly.

    causal_offset  key j is visible to query i when j <= i + causal_offset; None: no causality
    visible_keys   which keys are visible, over BATCH, KEY and the tensors in `leaves`; true: all
    leaves         the nodes behind the function symbols of `visible_keys`
    """

    causal_offset: sympy.Expr | None = None
    visible_keys: sympy.Basic = TRUE
    leaves: Mapping[str, fx.Node] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = []
        if self.causal_offset is not None:
            parts.append("causal" if self.causal_offset == 0 else f"causal, offset {self.causal_offset}")
        if self.visible_keys != TRUE:
            parts.append(f"keys where {self.visible_keys}")
        return "; ".join(parts) or "none"


@dataclass(frozen=True)
class ProvenSite:
    """A site whose masks are known."""

    site: AttentionSite
    mask: MaskProof


@dataclass(frozen=True)
class ChosenSite:
    """A proven site with the budget that holds in this graph, its bucket, and how the decision was made."""

    site: AttentionSite
    mask: MaskProof
    bucket: Bucket
    budget: Budget
    how: str


@dataclass(frozen=True)
class SiteRecord:
    """What became of one site, in words. `index` is its place in its graph, and the `site` argument of its op."""

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))
