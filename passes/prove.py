"""Prove what the masks of a site hide.

Given   sites from find.py, in the graph they were found in; the buffers whose values may be read (buffers.py).
Leaves  the graph untouched; each site with its MaskProof, or Refused where a step is no mask at all. What was read of
        buffers becomes guards.
Never   guesses: a proof is an equivalence, read from the nodes that build the mask (reader.py).

The condition under which the score of query q and key k stays visible is split at its conjunctions, and each part is

    true for every q and k there are         dropped: a window longer than any sequence, a document that is the only one
    k <= q + offset, k >= q + offset         causal, window; offsets are made of sizes
    anything in b and k alone                which keys are visible: padding, key length, key start
    f(b, q) == g(b, k)                       documents: packed sequences, chunks
    anything in b and q alone                documents: queries that see nothing have an id of their own
    none of these                            the whole mask is carried as a tensor

Arguments are given for the parts of a carried mask too: the tensor implies them, and blocks that they hide are never
read. A number added to scores that hides nothing is a bias, and carried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from torch import fx
from torch.utils._sympy.functions import Min

from sparsify.passes.buffers import Buffer, watch
from sparsify.passes.emit import is_condition_on, is_writable
from sparsify.passes.graph import expression
from sparsify.passes.reader import (
    Limits,
    TensorReader,
    Value,
    Where,
    WrittenInPlace,
    as_condition,
    as_number,
    branches,
    is_boolean,
)
from sparsify.passes.site import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    TRUE,
    AttentionSite,
    MaskProof,
    MaskTerm,
    ProvenSite,
    Refused,
)

HIDDEN = -1e4
"""A score this low, or lowered by this much, has no weight left: exp(-1e4) is 0 in float32."""
UNREACHABLE = -1e30
"""A score lowered by this much stays hidden whatever bias is added to it too."""


def prove_masks(gm: fx.GraphModule, sites: Sequence[AttentionSite | Refused],
                buffers: Mapping[fx.Node, Buffer] | None = None) -> list[ProvenSite | Refused]:
    """Prove the masks of every site; sites whose masks are computed alike share the proof."""
    reader = TensorReader(gm, buffers)
    known: dict[Any, _Proof | str] = {}
    proven: list[ProvenSite | Refused] = []
    for site in sites:
        if isinstance(site, Refused):
            proven.append(site)
            continue
        limits = {symbol: expression(size) for symbol, size in (
            (BATCH, site.batch), (HEAD, site.heads), (QUERY, site.q_len), (KEY, site.kv_len))}
        terms = tuple((term.kind, reader.first(term.tensor), term.index, reader.first(term.fill), term.factor)
                      for term in site.masks)
        key = (terms, site.is_causal, *limits.values())
        if key not in known:
            known[key] = _prove(reader, site, limits)
        proven.append(_of_site(known[key], site, reader))
    watch(reader.read_buffers)
    return proven


class _NoMask(Exception):
    """A step that the ops cannot take; the text says why."""


class _Proof:
    """A proof, and the places of the carried terms in `AttentionSite.masks`."""

    def __init__(self, mask: MaskProof, carried: list[int]) -> None:
        self.mask, self.carried = mask, carried


def _of_site(proof: _Proof | str, site: AttentionSite, reader: TensorReader) -> ProvenSite | Refused:
    """The proof with the terms of this site; its tensors must hold at the output what they held when they were used."""
    if isinstance(proof, _Proof):
        carried = tuple(site.masks[i] for i in proof.carried)
        stale = next((term.tensor for term in carried if reader.is_stale(term.tensor, site.output.node)), None)
        if stale is None:
            return ProvenSite(site, replace(proof.mask, carried=carried))
        proof = f"the mask {stale.name} is written to in place before the output is computed"
    return Refused(site.form, site.origin, proof, site.output.node.name)


def _prove(reader: TensorReader, site: AttentionSite, limits: Limits) -> _Proof | str:
    """The proof, or why there is none."""
    single = {symbol: sympy.Integer(0) for symbol, size in limits.items() if size == 1}
    reader.within({symbol: size for symbol, size in limits.items() if symbol not in single})
    found = _Arguments(reader, limits)
    terms = [replace(term, index=tuple(sympy.sympify(x).subs(single) for x in term.index)) for term in site.masks]
    try:
        carried = [i for i, term in enumerate(terms) if term.kind != "gate" and not _take_term(reader, term, found)]
        if site.is_causal:
            found.take_all([(KEY <= QUERY).subs(single)])
        for term in terms:
            if term.kind == "gate":
                _check_gate(reader, term, found)
    except _NoMask as why:
        return str(why)
    return _Proof(found.proof(), carried)


ABSORBING = -1e8
"""To this the scores add nothing in float32: a hidden score is this number, whatever it was."""


def _take_term(reader: TensorReader, term: MaskTerm, found: "_Arguments") -> bool:
    """Take what can be an argument; True if that is all the term does."""
    if term.scalers:  # of tensors nobody knows the sign, let alone the size
        fill = reader.constant(term.fill)
        if term.kind != "add" and not (isinstance(term.fill, int | float) and fill is not None and all(
                x.is_number and x * term.factor <= ABSORBING for x in branches(fill))):
            raise _NoMask("the scores are scaled by a tensor after they are masked")
        return False
    try:
        x = reader.at(term.tensor, term.index)
    except WrittenInPlace:
        if term.kind != "add":
            _check_fill(reader, term)
        return False
    if term.kind == "add":
        visible, exact = _adds_nothing(as_number(x), term.factor)
        return found.take_all(_conjuncts(visible)) and exact
    visible = as_condition(x) if term.kind == "keep" else sympy.Not(as_condition(x))
    if visible != sympy.true:
        _check_fill(reader, term)
    return found.take_all(_conjuncts(visible))


def _check_fill(reader: TensorReader, term: MaskTerm) -> None:
    """What hidden scores become must hide them."""
    fill = reader.constant(term.fill)
    if fill is None:
        raise _NoMask("hidden scores become a number that is not known")
    for x in branches(fill):
        if not (x.is_number and x * term.factor <= HIDDEN):
            raise _NoMask(f"hidden scores become {_short(x * term.factor)}, which is not low enough to hide them")


def _check_gate(reader: TensorReader, term: MaskTerm, found: "_Arguments") -> None:
    """A gate is 1 wherever the other terms leave a score visible, and finite elsewhere: then it changes nothing."""
    try:
        x = _ones_of(reader.at(term.tensor, term.index))
    except WrittenInPlace as why:
        raise _NoMask(str(why)) from None
    if x is None or not all(found.implies(part) for part in _conjuncts(x)):
        raise _NoMask("the scores are scaled by a tensor over queries and keys")


def _ones_of(x: Value) -> sympy.Basic | None:
    """Where a value is 1, if it is 0 elsewhere."""
    if isinstance(x, Where):
        yes, no = _ones_of(x.yes), _ones_of(x.no)
        if yes is None or no is None:
            return None
        return sympy.Or(sympy.And(x.condition, yes), sympy.And(sympy.Not(x.condition), no))
    if is_boolean(x):
        return x
    return sympy.true if x == 1 else sympy.false if x == 0 else None


def _short(x: sympy.Basic) -> str:
    return f"{float(x):g}" if x.is_number else str(x)


def _adds_nothing(x: Value, factor: float) -> tuple[sympy.Basic, bool]:
    """Where an additive mask may leave a score visible, and whether it adds exactly 0 there and hides elsewhere."""
    if isinstance(x, Where):
        (yes, yes_exact), (no, no_exact) = _adds_nothing(x.yes, factor), _adds_nothing(x.no, factor)
        visible = yes if yes == no else sympy.Or(sympy.And(x.condition, yes), sympy.And(sympy.Not(x.condition), no))
        return visible, yes_exact and no_exact
    if x == 0 or x is sympy.nan:
        return sympy.true, x == 0
    if x.is_number:
        hides = bool(x * factor <= HIDDEN)
        return sympy.false if hides else sympy.true, hides
    constant = x.as_coeff_Add()[0] * factor
    return sympy.false if constant <= UNREACHABLE else sympy.true, False


def _conjuncts(condition: sympy.Basic) -> list[sympy.Basic]:
    """The parts that all hold, those that are common to every choice of a disjunction too."""
    condition = sympy.to_nnf(condition, simplify=False)
    parts = []
    for part in condition.args if isinstance(condition, sympy.And) else [condition]:
        if isinstance(part, sympy.Or):
            choices = [set(choice.args) if isinstance(choice, sympy.And) else {choice} for choice in part.args]
            common = set.intersection(*choices)
            parts += sorted(common, key=sympy.default_sort_key)
            part = sympy.Or(*(sympy.And(*(choice - common)) for choice in choices))
        parts.append(part)
    return parts


class _Arguments:
    """What the masks of a site were proven to be, part by part."""

    def __init__(self, reader: TensorReader, limits: Limits) -> None:
        self.reader, self.leaves = reader, reader.leaves
        self.one_query, self.kv_len = limits[QUERY] == 1, limits[KEY]
        self.upper: list[sympy.Expr] = []  # k <= q + offset
        self.lower: list[sympy.Expr] = []  # k >= q + offset
        self.keys: list[sympy.Basic] = []
        self.queries: list[sympy.Basic] = []
        self.documents: tuple[sympy.Expr, sympy.Expr] | None = None
        self._seen: set[sympy.Basic] = set()

    def take_all(self, parts: Sequence[sympy.Basic]) -> bool:
        """Take every part that an argument can say, documents first; whether that is all."""
        taken = [self.take(part) for part in sorted(parts, key=lambda part: not isinstance(part, sympy.Eq))]
        self._seen.update(parts)
        return all(taken)

    def implies(self, part: sympy.Basic) -> bool:
        """Whether a part holds wherever the terms that were taken leave a score visible."""
        return part in self._seen or self._simplify(part) == sympy.true

    def take(self, part: sympy.Basic) -> bool:
        """Take a part of the condition; False if no argument can say it."""
        part = self._simplify(self._within_documents(part))
        if isinstance(part, sympy.And):
            return self.take_all(part.args)
        if part == sympy.true or self._take_bounds(part):
            return True
        if is_condition_on(part, KEY, self.leaves):
            self.keys.append(part)
            return True
        if is_condition_on(part, QUERY, self.leaves):
            self.queries.append(part)
            return True
        documents = self._read_documents(part)
        if documents is None or (self.documents is not None and documents != self.documents):
            return False
        self.documents = documents
        return True

    def proof(self) -> MaskProof:
        offset, window = self._smallest(self.upper), None
        if self.lower:
            offset = self.kv_len - 1 if offset is None else offset  # hides nothing
            lowest = self._smallest([-bound for bound in self.lower])
            window = offset + 1 + lowest
        documents = self.documents
        if self.queries:
            # A query that sees nothing differs from every key: of 2 id and 2 id + 1, one is no key's.
            blind = sympy.Piecewise((0, sympy.And(*self.queries)), (1, True), evaluate=False)
            query, key = documents or (sympy.Integer(0), sympy.Integer(0))
            documents = (2 * query + blind, 2 * key)
        visible_keys = sympy.And(*self.keys) if self.keys else TRUE
        used = {x.func.__name__ if isinstance(x, AppliedUndef) else x.name
                for expr in (visible_keys, *(documents or ())) for x in expr.atoms(AppliedUndef, sympy.Symbol)}
        leaves = {name: node for name, node in self.leaves.items() if name in used}
        return MaskProof(offset, window, visible_keys, documents, (), leaves)

    def _simplify(self, part: sympy.Basic) -> sympy.Basic:
        """A part without comparisons that always or never hold."""
        if isinstance(part, sympy.And):
            return sympy.And(*(self._simplify(x) for x in part.args))
        if isinstance(part, sympy.Or):
            return sympy.Or(*self._widest([self._simplify(x) for x in part.args]))
        linear = self._linear(part)
        if linear is None:
            return part
        a, b, c = linear
        difference = a * KEY + b * QUERY + c
        if self.reader.is_nonpositive(difference):
            return sympy.true
        return sympy.false if self.reader.is_nonpositive(1 - difference) else part

    def _widest(self, choices: list[sympy.Basic]) -> list[sympy.Basic]:
        """The choices of a disjunction without bounds that imply another."""
        bounds = {choice: linear for choice in choices if (linear := self._linear(choice)) is not None}

        def is_implied(choice: sympy.Basic) -> bool:
            a, b, c = bounds[choice]
            return any(other != choice and (a, b) == (x, y) and z != c and self.reader.is_nonpositive(z - c)
                       for other, (x, y, z) in bounds.items())

        return [choice for choice in choices if choice not in bounds or not is_implied(choice)]

    def _linear(self, part: Any) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None:
        """(a, b, c) where an inequality over whole numbers means a * k + b * q + c <= 0, with c made of sizes."""
        if not isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
            return None
        difference = sympy.expand(part.lhs - part.rhs)
        if isinstance(part, sympy.Ge | sympy.Gt):
            difference = -difference
        if not difference.is_integer:
            return None
        if isinstance(part, sympy.Lt | sympy.Gt):
            difference = difference + 1
        return self._coefficients(difference)

    def _coefficients(self, difference: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None:
        difference = sympy.expand(difference)
        a, b = difference.coeff(KEY), difference.coeff(QUERY)
        c = sympy.expand(difference - a * KEY - b * QUERY)
        if not (a.is_Integer and b.is_Integer and self._is_size(c)):
            return None
        return a, b, c

    def _is_size(self, x: sympy.Expr) -> bool:
        return not (x.atoms(AppliedUndef) or x.free_symbols & {BATCH, HEAD, QUERY, KEY}
                    or any(symbol.name in self.leaves for symbol in x.free_symbols))

    def _take_bounds(self, part: sympy.Basic) -> bool:
        """k <= q + offset, k >= q + offset, or k == q + offset. Of one query, k <= offset is causality too."""
        linear, both = self._linear(part), False
        if linear is None and isinstance(part, sympy.Eq) and (part.lhs - part.rhs).is_integer:
            linear, both = self._coefficients(part.lhs - part.rhs), True
        if linear is None:
            return False
        a, b, c = linear
        if abs(a) != 1 or not (a == -b or (b == 0 and self.one_query)):
            return False
        if both or a == 1:
            self.upper.append(-c * a)
        if both or a == -1:
            self.lower.append(-c if both and a == 1 else c)
        return True

    def _smallest(self, offsets: list[sympy.Expr]) -> sympy.Expr | None:
        """The smallest of the upper bounds, which all hold."""
        kept: list[sympy.Expr] = []
        for new in offsets:
            if not any(self.reader.is_nonpositive(old - new) for old in kept):
                kept = [*(old for old in kept if not self.reader.is_nonpositive(new - old)), new]
        return Min(*kept) if len(kept) > 1 else kept[0] if kept else None

    def _within_documents(self, part: Any) -> sympy.Basic:
        """A comparison of two positions of one document as one of their indices, where documents are runs of
        positions."""
        ids = self.documents[0] if self.documents is not None else None
        if not isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt) or not isinstance(ids, AppliedUndef):
            return part
        try:
            position = self.reader.positions_of(ids)
        except WrittenInPlace:
            return part
        if not isinstance(position, sympy.Expr) or self.documents != (ids, ids.subs(QUERY, KEY)):
            return part
        difference, distance = part.lhs - part.rhs, position - position.subs(QUERY, KEY)
        for sign in (1, -1):
            rest = sympy.expand(difference - sign * distance)
            if self._is_size(rest):
                return part.func(sign * (QUERY - KEY) + rest, 0)
        return part

    def _read_documents(self, part: sympy.Basic) -> tuple[sympy.Expr, sympy.Expr] | None:
        """(f, g) where an equality means f(b, q) == g(b, k)."""
        if not isinstance(part, sympy.Eq):
            return None
        query = key = sympy.Integer(0)
        for term in sympy.Add.make_args(part.lhs - part.rhs):
            if KEY in term.free_symbols:
                key -= term
            else:
                query += term
        if key.could_extract_minus_sign():
            query, key = -query, -key
        if not (query.is_integer and key.is_integer and is_writable(query, QUERY, self.leaves)
                and is_writable(key, KEY, self.leaves)):
            return None
        return query, key
