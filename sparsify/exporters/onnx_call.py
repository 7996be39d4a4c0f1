"""A call of an ONNX file's attention: what its site has, its inputs in float32, and all its scores at once.

    Kind   which masks and arguments a site has: every combination is a function of its own
    Call   the inputs of a call as values of that function

The softmax of scores has a column more than there are keys where a row may see none, the *ghost*: a sink logit where
there are sinks, else so low that only a row without visible keys gives it weight. Its value is zero.
"""

from dataclasses import dataclass, fields

from sparsify.exporters.onnx_text import FLOAT, INT64, Attribute, Text, Value
from sparsify.ops.planned import FEW_QUERIES

DOMAIN = "sparsify"
OPSETS = range(20, 25)

HIDDEN, GHOST = -(2.0**100), -(2.0**98)
"""Finite, in place of -inf: softmax over nothing but -inf is NaN. A hidden key is below the ghost. A power of two, so
that places of keys may be multiplied by it without rounding."""
TAKES_ALL = -GHOST
NOWHERE = 2.0**25
"""The place of a key that no row sees: behind every row, and exact in float32 as all places before 2**24."""

PLAN = {"edges": "ints", "tolerances": "floats", "max_densities": "floats", "sinks": "ints", "local": "ints",
        "singles": "ints"}
"""Attributes that hold the buckets, as the op's arguments of the same names."""


@dataclass(frozen=True)
class Kind:
    """What a site has. Every combination is a function of its own, without the parts that it does not need.

    sparse   some bucket drops blocks
    anchored causality begins at the first key: causal_offset is 0, and no input
    mask     attn_mask is bool
    bias     attn_mask is floating
    """

    sparse: bool = False
    causal: bool = False
    anchored: bool = False
    window: bool = False
    key_mask: bool = False
    documents: bool = False
    mask: bool = False
    bias: bool = False
    softcap: bool = False
    sinks: bool = False
    shifts: bool = False
    protected: bool = False

    @property
    def name(self) -> str:
        """Of the function in DOMAIN."""
        return "_".join(["PlannedAttention", *(field.name for field in fields(self) if getattr(self, field.name))])

    @property
    def hides(self) -> bool:
        """Whether a row may see no key for another reason than causality."""
        return self.window or self.key_mask or self.documents or self.mask or self.bias

    @property
    def is_for_operator(self) -> bool:
        """Whether ONNX's operator Attention says the masks."""
        return self.anchored == self.causal and not (self.hides or self.softcap or self.sinks)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Behind q, k and v."""
        present = {"causal_offset": self.causal and not self.anchored, "key_mask": self.key_mask,
                   "query_documents": self.documents, "key_documents": self.documents,
                   "attn_mask": self.mask or self.bias, "sink_logits": self.sinks, "protected": self.protected}
        return tuple(name for name, there in present.items() if there)

    @property
    def attributes(self) -> tuple[str, ...]:
        present = {"scale": True, "window": self.window, "softcap": self.softcap, "shifts": self.shifts}
        return (*(name for name, there in present.items() if there), *(PLAN if self.sparse else ()))


class Call:
    """The inputs of a call in float32, their sizes, and its scores where all are wanted at once.

    bucket   the number of the only bucket that calls are in; None: their key length says which
    """

    def __init__(self, text: Text, kind: Kind, bucket: int | None = None) -> None:
        self.text, self.kind = text, kind
        q, k, v = (text.input(name) for name in "qkv")
        self.batch, self.heads, self.rows, self.dim = (q.size(axis) for axis in range(4))
        self.kv_heads, self.keys, self.value_dim = k.size(1), k.size(2), v.size(3)
        self.group = self.heads // self.kv_heads
        self.q_len, self.kv_len = self.rows.scalar(), self.keys.scalar()
        self.unscaled, self.k, self.v = q.to(FLOAT), k.to(FLOAT), v.to(FLOAT)
        self.q = self.unscaled * text.attribute("scale", "float")
        self.offset = None
        if kind.causal:
            self.offset = text.integer(0) if kind.anchored else text.input("causal_offset").scalar()
        self.key_mask = text.input("key_mask") if kind.key_mask else None
        self.query_documents, self.key_documents = (
            text.input(name).to(INT64) if kind.documents else None for name in ("query_documents", "key_documents"))
        self.bucket, self.tolerance = self._bucket(bucket)
        self.added = self._added()
        self.sink = text.input("sink_logits").to(FLOAT) if kind.sinks else None

    def is_small(self, keys: int) -> Value:
        """Whether there are few queries, or a dense bucket of up to so many keys."""
        is_few = self.kv_len <= self.text.integer(keys)
        if self.kind.sparse:
            is_few = is_few & (self.tolerance <= self.text.real(0))
        return is_few | (self.q_len <= self.text.integer(FEW_QUERIES))

    def _bucket(self, known: int | None) -> tuple[Value, Value]:
        """The bucket of the key length, and its tolerance."""
        text = self.text
        if not self.kind.sparse:
            return text.integer(0), text.real(0)
        edges, tolerances = text.attribute("edges", "ints"), text.attribute("tolerances", "floats")
        bucket = text.ReduceSum((self.kv_len >= edges).to(INT64), text.ints(0), keepdims=0)
        bucket = bucket if known is None else text.integer(known)
        return bucket, tolerances.take(bucket)

    def _added(self) -> Value | None:
        """What attn_mask adds to the scores, finite."""
        if self.kind.mask:
            return self.text.Where(self.text.input("attn_mask"), self.text.real(0), self.text.real(HIDDEN))
        if self.kind.bias:
            return self.text.Max(self.text.input("attn_mask").to(FLOAT), self.text.real(HIDDEN))
        return None

    def capped(self, scores: Value) -> Value:
        """Scores under the soft cap."""
        if not self.kind.softcap:
            return scores
        cap = self.text.attribute("softcap", "float")
        return self.text.Tanh(self.text.Div(scores, cap)) * cap

    def steep(self, numbers: Value) -> Value:
        """Whole numbers times -HIDDEN, exactly: a difference of two is 0, or at least as large as HIDDEN."""
        return numbers.to(FLOAT) * self.text.real(-HIDDEN)

    def hiding(self, room: Value) -> Value:
        """HIDDEN or lower where `room`, a difference of steep numbers, is negative, else 0: cheaper than a choice."""
        return self.text.Min(room, self.text.real(0))

    def causal_bias(self, ends: Value, keys: Value) -> Value:
        """0 where a key is visible to a row under causality and window, from steep places; `ends`: each row's last."""
        room = ends - keys
        bias = self.hiding(room)
        if self.kind.window:
            farthest = self.steep(self.text.attribute("window", "int") - self.text.integer(1))
            bias = bias + self.hiding(farthest - room)
        return bias

    def document_bias(self, rows: Value, keys: Value) -> Value:
        return self.text.Where(self.text.Equal(rows, keys), self.text.real(0), self.text.real(HIDDEN))

    def by_operator(self) -> Value:
        """ONNX's own Attention."""
        return self.text.Attention(self.unscaled, self.k, self.v, is_causal=int(self.kind.causal),
                                   scale=Attribute("scale", "float"))

    def at_once(self) -> Value:
        """All scores of a KV head in one product: for few queries."""
        text = self.text
        products = text.MatMul(self.q.reshape(self.batch, self.kv_heads, -1, self.dim),
                               text.Transpose(self.k, perm=[0, 1, 3, 2]))
        scores = self.capped(products.reshape(self.batch, self.heads, self.rows, self.keys))
        if self.offset is not None:
            ends = self.steep(text.range(self.q_len) + self.offset).unsqueeze(1)
            scores = scores + self.causal_bias(ends, self.steep(text.range(self.kv_len)))
        if self.key_mask is not None:
            scores = scores + text.Where(self.key_mask, text.real(0), text.real(HIDDEN)).unsqueeze(1, 2)
        if self.query_documents is not None and self.key_documents is not None:
            scores = scores + self.document_bias(self.query_documents.unsqueeze(1, 3),
                                                 self.key_documents.unsqueeze(1, 2))
        if self.added is not None:
            scores = scores + self.added
        if self.kind.hides or self.kind.sinks:
            ghost = text.real(GHOST) if self.sink is None else self.sink.unsqueeze(1, 2)
            scores = text.Concat(scores, ghost.expand(self.batch, self.heads, self.rows, 1), axis=-1)
            weights = text.Softmax(scores, axis=-1).slice(text.ints(0), text.ints(-1), axis=-1)
        else:
            weights = text.Softmax(scores, axis=-1)
        mixed = text.MatMul(weights.reshape(self.batch, self.kv_heads, -1, self.keys), self.v)
        return self.cleared(mixed.reshape(self.batch, self.heads, self.rows, self.value_dim))

    def cleared(self, out: Value) -> Value:
        """Zeros for rows before the first key, where causality alone may leave a row without any."""
        if self.offset is None or self.kind.anchored or self.kind.hides or self.kind.sinks:
            return out
        return out * (self.text.range(self.q_len) + self.offset >= self.text.integer(0)).to(FLOAT).unsqueeze(1)


