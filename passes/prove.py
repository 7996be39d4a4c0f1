"""Prove what the masks of a site hide.

Given   sites from find.py, in the graph they were found in.
Leaves  the graph untouched; each site with its MaskProof, or Refused where its mask hides something else.
Never   guesses: a proof is an equivalence, read from the nodes that build the mask (reader.py).

The condition under which the score of query q and key k stays visible is split at its conjunctions, and each part is

    true for every q and k there are      dropped: a window longer than any sequence, a document that is the only one
    anything in b and k alone             which keys are visible: padding, key length, key start
    k <= q + offset                       causal, the offset made of sizes

or the site is refused.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsify.passes.emit import is_key_condition
from sparsify.passes.graph import expression, shape
from sparsify.passes.reader import TensorReader, Value, Where, WrittenInPlace, as_condition
from sparsify.passes.site import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    AttentionSite,
    MaskProof,
    MaskTerm,
    ProvenSite,
    Refused,
)

HIDDEN = -1e4
"""A score this low, or lowered by this much, has no weight left: exp(-1e4) is 0 in float32."""


def prove_masks(gm: fx.GraphModule, sites: Sequence[AttentionSite | Refused]) -> list[ProvenSite | Refused]:
    """Prove the masks of every site; sites that share their masks share the proof."""
    reader = TensorReader(gm)
    known: dict[Any, MaskProof | str] = {}
    proven: list[ProvenSite | Refused] = []
    for site in sites:
        if isinstance(site, Refused):
            proven.append(site)
            continue
        batch, _, q_len, _ = map(expression, shape(site.query))
        kv_len = expression(shape(site.key)[3 if site.key_transposed else 2])
        key = (site.masks, site.is_causal, batch, q_len, kv_len)
        if key not in known:
            known[key] = _prove(reader, site, q_len, kv_len)
        proof = known[key]
        proven.append(ProvenSite(site, proof) if isinstance(proof, MaskProof)
                      else Refused(site.form, site.origin, proof, site.output.name))
    return proven


class _Unproven(Exception):
    """The mask is not one that the ops take; the text says why."""


def _prove(reader: TensorReader, site: AttentionSite, q_len: sympy.Expr, kv_len: sympy.Expr) -> MaskProof | str:
    """The proof, or why there is none."""
    try:
        visible = [_visible(reader, term, q_len) for term in site.masks]
        if site.is_causal:
            visible.append(KEY <= QUERY)
        condition = sympy.to_nnf(sympy.And(*visible), simplify=False)
        return _classify(condition, reader, _shape_env(site), q_len, kv_len)
    except (_Unproven, WrittenInPlace) as why:
        return str(why)


def _visible(reader: TensorReader, term: MaskTerm, q_len: sympy.Expr) -> sympy.Basic:
    """When a score stays visible under this term, as a condition over b, h, q and k."""
    query = sympy.Integer(0) if q_len == 1 else QUERY
    index = (BATCH, HEAD, query, KEY)
    x = reader.operand(term.tensor, index)
    if term.kind == "add":
        return _adds_nothing(x)
    fill = reader.operand(term.fill, index)
    if isinstance(fill, Where) or not (fill.is_number and fill <= HIDDEN):
        raise _Unproven(f"hidden scores become {fill}, which is not low enough to hide them")
    condition = as_condition(x)
    return condition if term.kind == "keep" else sympy.Not(condition)


def _adds_nothing(x: Value) -> sympy.Basic:
    """Where an additive mask is 0; elsewhere it must hide."""
    if isinstance(x, Where):
        yes, no = _adds_nothing(x.yes), _adds_nothing(x.no)
        return sympy.Or(sympy.And(x.condition, yes), sympy.And(sympy.Not(x.condition), no))
    if x.is_number and float(x) == 0:  # to sympy, 0.0 is not 0
        return sympy.true
    if x.is_number and x <= HIDDEN:
        return sympy.false
    raise _Unproven(f"the scores get a bias ({x} is added), not only a mask")


def _classify(condition: sympy.Basic, reader: TensorReader, shape_env: ShapeEnv | None, q_len: sympy.Expr,
              kv_len: sympy.Expr) -> MaskProof:
    offset: sympy.Expr | None = None
    keys: list[sympy.Basic] = []
    for part in condition.args if isinstance(condition, sympy.And) else [condition]:
        if part == sympy.true or _always(part, shape_env, q_len, kv_len):
            continue
        if is_key_condition(part, reader.leaves):
            keys.append(part)
            continue
        new = _causal_offset(part)
        if new is None:
            raise _Unproven(f"the mask is not causal, padding or a key length: keys are visible where {part}")
        if offset is not None and offset != new:
            raise _Unproven(f"the mask is causal twice, with offsets {offset} and {new}")
        offset = new
    visible_keys = sympy.And(*keys)
    names = {f.func.__name__ for f in visible_keys.atoms(AppliedUndef)}
    names |= {symbol.name for symbol in visible_keys.free_symbols}
    return MaskProof(offset, visible_keys, {name: node for name, node in reader.leaves.items() if name in names})


def _as_linear(part: sympy.Basic) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None:
    """(a, b, c) where an inequality over whole numbers means a * k + b * q + c <= 0."""
    if not isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt) or part.atoms(AppliedUndef):
        return None
    difference = sympy.expand(part.lhs - part.rhs)
    if isinstance(part, sympy.Ge | sympy.Gt):
        difference = -difference
    if not difference.is_integer:
        return None
    if isinstance(part, sympy.Lt | sympy.Gt):
        difference = difference + 1
    difference = sympy.expand(difference)
    a, b = difference.coeff(KEY), difference.coeff(QUERY)
    c = sympy.expand(difference - a * KEY - b * QUERY)
    if not (a.is_Integer and b.is_Integer) or c.free_symbols & {BATCH, HEAD, QUERY, KEY}:
        return None
    return a, b, c


def _always(part: sympy.Basic, shape_env: ShapeEnv | None, q_len: sympy.Expr, kv_len: sympy.Expr) -> bool:
    """Whether an inequality holds for every query and key, at every size that the graph may be called with."""
    linear = _as_linear(part)
    if linear is None:
        return False
    a, b, c = linear
    worst = sympy.expand(c + (a * (kv_len - 1) if a > 0 else 0) + (b * (q_len - 1) if b > 0 else 0))
    if worst.is_number:
        return bool(worst <= 0)
    return shape_env is not None and bool(shape_env.bound_sympy(worst).upper <= 0)


def _causal_offset(part: sympy.Basic) -> sympy.Expr | None:
    """The offset of `k <= q + offset`."""
    linear = _as_linear(part)
    if linear is None or linear[:2] != (1, -1):
        return None
    return -linear[2]


def _shape_env(site: AttentionSite) -> ShapeEnv | None:
    sizes = [*shape(site.query), *shape(site.key)]
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
