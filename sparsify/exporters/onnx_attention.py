"""The attention of an ONNX file: standard operators of opset 20 to 24, one function for every kind of site.

    function_text(Kind(causal=True, sparse=True), 23)  ->  text of the function PlannedAttention_sparse_causal

It computes what `sparsify::planned_attention` computes, in float32 whatever the dtype of q:

    inputs      q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], then `Kind.inputs`, shaped as in `sparsify.ops`;
                causal_offset is an int64 scalar
    attributes  `Kind.attributes`; edges, tolerances ...: the plan's buckets, as the op has them
    out         [B, H, L, Dv] in the dtype of q

    If few queries, or few keys in a dense bucket: all scores at once
    else:   blocks        of q, k, v and masks; which pairs are allowed, cut by a mask, free of any
            If tolerance of the bucket of S is 0: keep what is allowed
            else: summaries   m farthest keys, mean and variance of the others, by key block
                  Loop (batch, KV head, query block)          peaks for all heads of the KV head
                  rule        from peaks to kept blocks, evened out
            Loop (batch, KV head, query block, head)          softmax over the blocks that this head keeps

Key blocks are gathered from their KV head: grouped heads are never repeated. The softmax of selection has a column
more than it has keys, the *ghost*: a sink logit where there are sinks, else so low that only a row without visible keys
gives it weight, and it takes all of a row that only fills up a query block. Attention has it, with a value of zero,
where there are sinks; else rows that see nothing are cleared behind it.

Source: kernels/oracle.py and kernels/rule.py say what is computed; the tests hold the functions to them.
"""

from dataclasses import dataclass, fields

from sparsify.exporters.onnx_text import FLOAT, INT64, Attribute, Text, Value
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE
from sparsify.ops.planned import FEW_QUERIES

DOMAIN = "sparsify"
OPSETS = range(20, 25)
FEW_KEYS, FEW_FOR_OPERATOR = 384, 640
"""Up to so many keys a dense bucket makes all scores at once, or calls ONNX's own operator, where there is one and it
has a word for the masks: blocks cost more nodes than they save products. Measured in onnxruntime, processor time of one
thread."""
OPERATOR_SINCE = 23
"""Opset of ONNX's operator Attention."""

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


def function_text(kind: Kind, opset: int) -> str:
    """The function, as `onnx.parser.parse_function` reads it."""
    text = Text()
    call = Call(text, kind)
    few, at_once = FEW_KEYS, call.at_once
    if opset >= OPERATOR_SINCE and kind.is_for_operator:
        few, at_once = FEW_FOR_OPERATOR, call.by_operator
    out = text.branch(call.is_small(few), at_once, lambda: _by_blocks(call))
    out = text.CastLike(out, text.input("q"))
    return text.function(DOMAIN, kind.name, opset, ("q", "k", "v", *kind.inputs), kind.attributes, out)


def selection_text(kind: Kind, opset: int) -> str:
    """Selection alone, for tests: bool [B, H, query blocks, key blocks], what a call of many queries keeps."""
    text = Text()
    blocks = Blocks(Call(text, kind))
    kept = text.Reshape(blocks.kept(), blocks.kept_shape)  # [B, Hkv, query blocks, group, key blocks]
    kept = text.Transpose(kept, perm=[0, 1, 3, 2, 4]).reshape(0, -1, blocks.q_blocks, blocks.k_blocks)
    return text.function(DOMAIN, f"Selection_{kind.name}", opset, ("q", "k", "v", *kind.inputs), kind.attributes, kept)


def _by_blocks(call: "Call") -> Value:
    blocks = Blocks(call)
    return blocks.attend(blocks.kept())


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


class Blocks:
    """A call in blocks. Query blocks of heads lie in the order (batch, KV head, query block, head of the group).

    Tables of masks hold the key blocks of one batch row behind those of another. A mask of one row serves all.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.text, self.kind = call, call.text, call.kind
        text = self.text
        q_block, k_block = text.integer(QUERY_BLOCK), text.integer(KEY_BLOCK)
        self.q_count = (call.q_len + text.integer(QUERY_BLOCK - 1)) // q_block
        self.k_count = (call.kv_len + text.integer(KEY_BLOCK - 1)) // k_block
        self.q_blocks, self.k_blocks = self.q_count.unsqueeze(0), self.k_count.unsqueeze(0)
        self.rows, self.keys = self.q_blocks * text.ints(QUERY_BLOCK), self.k_blocks * text.ints(KEY_BLOCK)
        self.kept_shape = text.shape(call.batch, call.kv_heads, self.q_blocks, call.group, self.k_blocks)
        self.group, self.kv_heads = call.group.scalar(), call.kv_heads.scalar()

        q = self._padded_rows(call.q, axis=2).reshape(call.batch, call.kv_heads, call.group, self.q_blocks,
                                                      QUERY_BLOCK, call.dim)
        self.q = text.Transpose(q, perm=[0, 1, 3, 2, 4, 5]).reshape(-1, QUERY_BLOCK, call.dim)
        self.k = self._padded_keys(call.k, axis=2).reshape(-1, KEY_BLOCK, call.dim)
        self.v = self._padded_keys(call.v, axis=2).reshape(-1, KEY_BLOCK, call.value_dim)
        self._find_pairs()
        self._lay_tables()

    def _padded_rows(self, x: Value, axis: int, fill: Value | None = None) -> Value:
        return self._padded(x, self.rows - self.call.rows, axis, fill)

    def _padded_keys(self, x: Value, axis: int, fill: Value | None = None) -> Value:
        return self._padded(x, self.keys - self.call.keys, axis, fill)

    def _padded(self, x: Value, count: Value, axis: int, fill: Value | None) -> Value:
        pads = self.text.shape(0, count)
        return self.text.Pad(x, pads, self.text.real(0) if fill is None else fill, self.text.ints(axis))

    def _find_pairs(self) -> None:
        """Pairs of blocks, bool [1 or B, query blocks, key blocks]: kernels/blocks.py says what they are.

        `free`: no row of the query block has any key of the key block hidden; attention masks nothing there.
        """
        text, call = self.text, self.call
        if call.key_mask is not None:
            shown = self._padded_keys(call.key_mask.to(FLOAT), axis=1)
        else:
            shown = (text.range(self.keys.scalar()) < call.kv_len).to(FLOAT).unsqueeze(0)
        self.shown = shown.reshape(0, -1, KEY_BLOCK)
        self.shown_count = text.ReduceSum(self.shown, text.ints(-1), keepdims=0)  # [1 or B, key blocks]
        pairs = text.shape(1, self.q_blocks, self.k_blocks)
        allowed = (self.shown_count > text.real(0)).unsqueeze(1)
        cut: Value | None = None
        key = text.range(self.k_count) * text.integer(KEY_BLOCK)
        row = text.range(self.q_count) * text.integer(QUERY_BLOCK)
        if call.offset is not None:
            last_row = text.Min(row + text.integer(QUERY_BLOCK), call.q_len) - text.integer(1)
            allowed = allowed & (key <= (last_row + call.offset).unsqueeze(1))
            self.edge_of_rows = (row + call.offset).unsqueeze(1)  # the last key of a query block's first row
            self.last_keys = key + text.integer(KEY_BLOCK - 1)
            cut = (self.last_keys > self.edge_of_rows).unsqueeze(0)
            if self.kind.window:
                window = text.attribute("window", "int")
                last_key = text.Min(key + text.integer(KEY_BLOCK), call.kv_len) - text.integer(1)
                allowed = allowed & (last_key > self.edge_of_rows - window)
                cut = cut | (key <= self.edge_of_rows + text.integer(QUERY_BLOCK - 1) - window)
        if call.query_documents is not None and call.key_documents is not None:
            row_low, row_high = self._range_of_documents(call.query_documents, QUERY_BLOCK)
            key_low, key_high = self._range_of_documents(call.key_documents, KEY_BLOCK)
            row_low, row_high, key_low, key_high = (
                row_low.unsqueeze(2), row_high.unsqueeze(2), key_low.unsqueeze(1), key_high.unsqueeze(1))
            allowed = allowed & (row_low <= key_high) & (key_low <= row_high)
            is_one = text.Equal(row_low, row_high) & text.Equal(key_low, key_high) & text.Equal(row_low, key_low)
            cut = ~is_one if cut is None else cut | ~is_one
        self.allowed = text.Expand(allowed, pairs)
        self.cut = cut
        self.whole = self.allowed if cut is None else self.allowed & ~cut
        full = KEY_BLOCK if call.added is None else -1  # attn_mask may hide any key: no block is free
        self.free = self.whole & text.Equal(self.shown_count, text.real(full)).unsqueeze(1)

    def _range_of_documents(self, ids: Value, block: int) -> tuple[Value, Value]:
        """Lowest and highest id of each block's visible tokens [1 or B, blocks]; of none: an empty range."""
        text = self.text

        def of_blocks(fill: int) -> Value:
            filled, nothing = ids, text.integer(fill)
            if block == QUERY_BLOCK:
                filled = self._padded_rows(ids, axis=1, fill=nothing)
            else:
                if self.call.key_mask is not None:
                    filled = text.Where(self.call.key_mask, ids, nothing)
                filled = self._padded_keys(filled, axis=1, fill=nothing)
            return filled.reshape(0, -1, block)

        return (text.ReduceMin(of_blocks(2**63 - 1), text.ints(-1), keepdims=0),
                text.ReduceMax(of_blocks(-2**63), text.ints(-1), keepdims=0))

    def _lay_tables(self) -> None:
        """What masks say: tables by key block of a KV head, as keys lie, and by query block of a head or KV head."""
        text, call = self.text, self.call
        by_key = text.shape(call.batch, call.kv_heads, self.k_blocks, KEY_BLOCK)

        def of_keys(table: Value) -> Value:
            """[1 or B, key blocks, KEY_BLOCK] as the keys lie."""
            return text.Expand(table.unsqueeze(1), by_key).reshape(-1, KEY_BLOCK)

        self.key_bias = of_keys((text.real(1) - self.shown) * text.real(HIDDEN))
        if call.offset is not None:
            places = text.range(self.keys.scalar()).to(FLOAT).reshape(1, -1, KEY_BLOCK)
            places = text.Where(self.shown > text.real(0), places, text.real(NOWHERE))
            self.key_places = of_keys(call.steep(places))
            self.row_ends = self._by_row(call.steep(text.range(self.rows.scalar()) + call.offset).unsqueeze(0))
        if call.query_documents is not None and call.key_documents is not None:
            self.row_documents = self._by_row(self._padded_rows(call.query_documents, 1, text.integer(0)))
            self.key_documents = of_keys(
                self._padded_keys(call.key_documents, 1, text.integer(0)).reshape(0, -1, KEY_BLOCK))
        is_row = (text.range(self.rows.scalar()) < call.q_len).reshape(1, 1, -1, 1, QUERY_BLOCK, 1)
        ghost = text.real(GHOST) if call.sink is None else call.sink.reshape(1, call.kv_heads, 1, call.group, 1, 1)
        ghost = text.Where(is_row, ghost, text.real(TAKES_ALL))
        self.ghosts = ghost.expand(call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK, 1).reshape(
            -1, QUERY_BLOCK, 1)

    def _by_row(self, table: Value) -> Value:
        """[1 or B, padded rows] by query block of a KV head: [blocks, QUERY_BLOCK, 1]."""
        table = table.reshape(0, 1, -1, QUERY_BLOCK)
        return table.expand(self.call.batch, self.call.kv_heads, self.q_blocks, QUERY_BLOCK).reshape(-1, QUERY_BLOCK, 1)

    # --- which blocks are kept ------------------------------------------------------------------------------------

    def kept(self) -> Value:
        """bool [query blocks of heads, key blocks]."""
        text = self.text
        allowed = self.allowed.unsqueeze(1, 3)
        if not self.kind.sparse:
            return self._flat(text.Expand(allowed, self.kept_shape))
        return text.branch(self.call.tolerance <= text.real(0),
                           lambda: self._flat(text.Expand(allowed, self.kept_shape)),
                           lambda: self._flat(self._select(self.call.bucket, self.call.tolerance)))

    def _flat(self, kept: Value) -> Value:
        return kept.reshape(-1, self.k_blocks)

    def _select(self, bucket: Value, tolerance: Value) -> Value:
        """bool [B, Hkv, query blocks, group, key blocks]: kept, as kernels/rule.py evens out what its rule says."""
        singles = self.text.attribute("singles", PLAN["singles"]).take(bucket)
        peaks = self.text.Reshape(self._peaks(singles), self.kept_shape)
        return self._evened(self._keep(peaks, bucket, tolerance), peaks)

    def _keep(self, peaks: Value, bucket: Value, tolerance: Value) -> Value:
        """The rule itself."""
        text, call = self.text, self.call

        def of_bucket(name: str) -> Value:
            return text.attribute(name, PLAN[name]).take(bucket)

        if self.kind.shifts:
            shifts = text.attribute("shifts", "floats").reshape(-1, call.heads).take(bucket)
            tolerance = tolerance * shifts.reshape(1, call.kv_heads, 1, call.group, 1)
        allowed = self.allowed.unsqueeze(1, 3)
        kept = allowed & (self._forced(of_bucket("sinks"), of_bucket("local")) | (peaks >= tolerance))

        def many(x: Value) -> Value:
            return text.ReduceSum(x.to(FLOAT), text.ints(-1), keepdims=1)

        return kept | (allowed & (many(kept) > of_bucket("max_densities") * many(allowed)))

    def _forced(self, sinks: Value, local: Value) -> Value:
        """Kept wherever they are allowed: bool [1 or B, 1, query blocks, 1, key blocks]."""
        text, call = self.text, self.call
        forced = text.CumSum(self.allowed.to(INT64), text.integer(-1)) <= sinks
        if call.offset is not None:
            near = self.last_keys + local * text.integer(KEY_BLOCK) > self.edge_of_rows
            has_boundary = self.keys - text.ints(1) > self.edge_of_rows
            forced = forced | (near & has_boundary)
        forced = forced.unsqueeze(1, 3)
        if not self.kind.protected:
            return forced
        protected = self._padded_keys(text.input("protected").to(FLOAT), axis=1).reshape(0, -1, KEY_BLOCK)
        return forced | (text.ReduceMax(protected, text.ints(-1), keepdims=0) > text.real(0)).unsqueeze(1, 2, 3)

    def _evened(self, kept: Value, peaks: Value, last: int = 1) -> Value:
        """With the best block that is left where the number of kept blocks is odd, as kernels/rule.py::pack.

        last: 1 for the last of equal peaks, as there; 0 for the first.
        """
        text = self.text
        allowed, count = self.allowed.unsqueeze(1, 3), text.ReduceSum(kept.to(INT64), text.ints(-1), keepdims=1)
        is_odd = text.Equal(count % text.integer(TILE), text.integer(1))
        spare = text.Where(allowed & ~kept, peaks, text.real(-1))
        best = text.ArgMax(spare, axis=-1, keepdims=1, select_last_index=last)
        has_spare = text.ReduceMax(spare, text.ints(-1), keepdims=1) >= text.real(0)
        return kept | (text.Equal(text.range(self.k_count), best) & is_odd & has_spare)

    def _peaks(self, singles: Value) -> Value:
        """Peaks, float [batch * KV heads * query blocks, group, key blocks]; kernels/estimate.py."""
        text, call = self.text, self.call
        summaries = Summaries(self, singles)
        all_rows = call.group * text.ints(QUERY_BLOCK)
        q = self.q.reshape(-1, all_rows, call.dim)
        ghosts = self.ghosts.reshape(-1, all_rows, 1)
        pairs = text.shape(call.batch, call.kv_heads, self.q_blocks, self.k_blocks)

        def lists(mask: Value) -> Lists:
            return Lists(self, text.Expand(mask.unsqueeze(1), pairs), self.q_count)

        whole = lists(self.whole)
        cut = None if self.cut is None else lists(self.allowed & self.cut)
        vectors = singles + text.integer(1)
        by_vector = text.shape(0, vectors.unsqueeze(0), -1)
        by_head = text.shape(call.group, QUERY_BLOCK, -1)
        none = text.real(0).expand(call.group, self.k_blocks)

        def step(at: Value) -> Value:
            rows, blocks = q.take(at), whole.at(at)
            columns = [*summaries.scores(rows, blocks, at), ghosts.take(at)]
            if cut is not None:
                cut_blocks = cut.at(at)
                edge = text.Gemm(rows, self.k.take(cut_blocks).reshape(-1, call.dim), transB=1)
                edge = text.Reshape(call.capped(edge), by_head) + self._bias(cut_blocks, at, None)
                columns.insert(2, edge.reshape(all_rows, -1))
            shares = text.Softmax(text.Concat(*columns, axis=1), axis=1)
            width = blocks.size(0)
            summed = width * vectors
            of_whole = text.Reshape(shares.slice(text.ints(0), summed, axis=1), by_vector)
            found = self._highest(text.ReduceSum(of_whole, text.ints(1), keepdims=0), width)
            if cut is not None:
                of_cut = shares.slice(summed, text.ints(-1), axis=1).reshape(0, -1, KEY_BLOCK)
                found_cut = self._highest(text.ReduceSum(of_cut, text.ints(2), keepdims=0), cut_blocks.size(0))
                found, blocks = text.Concat(found, found_cut, axis=1), text.Concat(blocks, cut_blocks, axis=0)
            place = text.Expand((blocks % self.k_count).unsqueeze(0), text.Shape(found))
            return text.ScatterElements(none, place, found, axis=1)

        return text.loop(q.size(0).scalar(), step)

    def _highest(self, shares: Value, blocks: Value) -> Value:
        """Largest share of any row: [group, blocks] of [group * rows, blocks]."""
        by_head = self.text.Reshape(shares, self.text.shape(self.call.group, QUERY_BLOCK, blocks), allowzero=1)
        return self.text.ReduceMax(by_head, self.text.ints(1), keepdims=0)

    # --- attention over kept blocks -------------------------------------------------------------------------------

    def attend(self, kept: Value) -> Value:
        """float [B, H, L, Dv]."""
        text, call = self.text, self.call
        kept = text.Reshape(kept, self.kept_shape)
        free_pairs = self.free.unsqueeze(1, 3)
        per_pair = self.q_count * self.group
        free, cut = (Lists(self, kept & pairs, per_pair) for pairs in (free_pairs, ~free_pairs))
        nothing = text.real(0).expand(1, call.value_dim)

        def step(at: Value) -> Value:
            rows, free_blocks, cut_blocks = self.q.take(at), free.at(at), cut.at(at)
            free_scores = text.Gemm(rows, self.k.take(free_blocks).reshape(-1, call.dim), transB=1)
            cut_keys, bias = self.k.take(cut_blocks).reshape(-1, call.dim), self._bias(cut_blocks, at // self.group, at)
            if self.kind.softcap:
                cut_scores = call.capped(text.Gemm(rows, cut_keys, transB=1)) + bias
            else:
                cut_scores = text.Gemm(rows, cut_keys, bias, transB=1)
            scores = [call.capped(free_scores), cut_scores]
            values = self.v.take(text.Concat(free_blocks, cut_blocks, axis=0)).reshape(-1, call.value_dim)
            if self.kind.sinks:
                scores.append(self.ghosts.take(at))
                values = text.Concat(values, nothing, axis=0)
            joined = text.Concat(*scores, axis=1)
            mixed = text.MatMul(text.Softmax(joined, axis=1), values)
            if self.kind.sinks or not self.kind.hides:
                return mixed
            sees = text.ReduceMax(joined, text.ints(1), keepdims=1) > text.real(GHOST)
            return mixed * sees.to(FLOAT)

        return self.by_row(text.loop(self.q.size(0).scalar(), step))

    def by_row(self, out: Value) -> Value:
        """[B, H, L, Dv] of what query blocks of heads have."""
        text, call = self.text, self.call
        out = out.reshape(call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK, call.value_dim)
        out = text.Transpose(out, perm=[0, 1, 3, 2, 4, 5]).reshape(call.batch, call.heads, self.rows, call.value_dim)
        return call.cleared(out.slice(text.ints(0), call.rows, axis=2))

    def _bias(self, blocks: Value, at: Value, head_at: Value | None) -> Value:
        """What the masks add to the scores of query block `at` of a KV head against the key blocks at `blocks`.

        float [1 or QUERY_BLOCK, keys] for one head, `head_at`, or for all of the group; with attn_mask
        [1 or group, 1 or QUERY_BLOCK, keys] for all.
        """
        call = self.call

        def of_keys(table: Value) -> Value:
            return table.take(blocks).reshape(1, -1)

        if call.offset is not None:
            bias = call.causal_bias(self.row_ends.take(at), of_keys(self.key_places))
        else:
            bias = of_keys(self.key_bias)
        if call.query_documents is not None:
            bias = bias + call.document_bias(self.row_documents.take(at), of_keys(self.key_documents))
        if call.added is not None:
            bias = bias + self.added(blocks, at, head_at).reshape(*((0, 0, -1) if head_at is None else (0, -1)))
        return bias

    def added(self, blocks: Value, at: Value, head_at: Value | None) -> Value:
        """attn_mask of a query block on key blocks: [1 or group, 1 or QUERY_BLOCK, blocks, KEY_BLOCK]; for one head
        without the first axis."""
        text, call = self.text, self.call
        assert call.added is not None
        pair = at // self.q_count
        batch, kv_head = pair // self.kv_heads, pair % self.kv_heads
        mask = call.added.take(text.Min(batch, (call.added.size(0) - text.ints(1)).scalar()))
        many_heads, many_rows = (text.Min(mask.size(axis) - text.ints(1), text.ints(1)) for axis in (0, 1))
        if head_at is None:
            first = (kv_head * self.group).unsqueeze(0) * many_heads
            mask = mask.slice(first, first + call.group, axis=0)
        else:
            head = (kv_head * self.group + head_at % self.group) * many_heads.scalar()
            mask = mask.take(head)
        rows = -2 if head_at is None else 0
        first = (at % self.q_count * text.integer(QUERY_BLOCK)).unsqueeze(0) * many_rows
        mask = mask.slice(first, first + text.ints(QUERY_BLOCK), axis=rows)
        missing = (text.ints(QUERY_BLOCK) - mask.size(1 if head_at is None else 0)) * many_rows
        mask = self._padded(mask, missing, axis=rows, fill=None)
        mask = text.Expand(mask, text.Concat(text.Shape(mask, end=-1), call.keys, axis=0))
        mask = self._padded_keys(mask, axis=-1)
        mask = mask.reshape(*((0, 0, -1, KEY_BLOCK) if head_at is None else (0, -1, KEY_BLOCK)))
        return mask.take(blocks % self.k_count, axis=2 if head_at is None else 1)


class Lists:
    """The key blocks that are true in each row of a mask [B, Hkv, ..., key blocks], one list behind the other."""

    def __init__(self, blocks: Blocks, mask: Value, rows_per_pair: Value) -> None:
        text = self.text = blocks.text
        rows = mask.reshape(-1, blocks.k_blocks)
        row, column = text.Split(text.NonZero(rows), axis=0, num_outputs=2, outputs=2)
        self.blocks = (row // rows_per_pair * blocks.k_count + column).reshape(-1)
        counts = text.ReduceSum(rows.to(INT64), text.ints(1), keepdims=1)
        self.ends = text.CumSum(counts, text.integer(0))
        self.starts = self.ends - counts

    def at(self, row: Value) -> Value:
        """int64 [count]: the places of the key blocks of a row among those of all KV heads, ascending."""
        return self.blocks.slice(self.starts.take(row), self.ends.take(row))


class Summaries:
    """Split summaries of all key blocks: a table row is a block of a KV head. See kernels/oracle.py."""

    def __init__(self, blocks: Blocks, singles: Value) -> None:
        self.blocks, self.text, self.call, self.singles = blocks, blocks.text, blocks.call, singles
        text, call = self.text, self.call
        m = singles.unsqueeze(0)
        per_batch = text.shape(call.batch, call.kv_heads, blocks.k_blocks, KEY_BLOCK)
        shown = text.Expand(blocks.shown.unsqueeze(1), per_batch).reshape(-1, KEY_BLOCK)
        many = text.ReduceSum(shown, text.ints(1), keepdims=1)
        shown3 = shown.unsqueeze(2)
        keys = blocks.k * shown3 if call.key_mask is not None else blocks.k  # padded keys are zero already
        mean = text.Div(text.ReduceSum(keys, text.ints(1), keepdims=1), text.Max(many, text.real(1)).unsqueeze(2))
        off_mean = keys - mean
        distance = text.ReduceSum(off_mean * off_mean, text.ints(2), keepdims=0)
        distance = text.Where(shown > text.real(0), distance, text.real(-1))
        _, farthest = text.TopK(distance, m, axis=-1, largest=1, sorted=1, outputs=2)
        count = text.range(blocks.k.size(0).scalar()) * text.integer(KEY_BLOCK)
        single_rows = farthest + count.unsqueeze(1)
        single_keys = keys.reshape(-1, call.dim).take(single_rows)  # [blocks, m, D]
        self.single_keys = text.Transpose(single_keys, perm=[1, 0, 2])
        is_rest = text.ScatterElements(shown, farthest, text.Expand(text.real(0), text.Shape(farthest)), axis=1)
        rest = text.ReduceSum(is_rest, text.ints(1), keepdims=1)
        some = text.Max(rest, text.real(1)).unsqueeze(2)
        is_rest3 = is_rest.unsqueeze(2)
        rest_mean = text.Div(text.ReduceSum(keys * is_rest3, text.ints(1), keepdims=1), some)
        off_rest = (keys - rest_mean) * is_rest3
        half_variance = text.Div(text.ReduceSum(off_rest * off_rest, text.ints(1), keepdims=1),
                                 some * text.real(2))
        self.mean, self.half_variance = (x.reshape(-1, call.dim) for x in (rest_mean, half_variance))
        # A block with fewer keys than singles: the missing singles and the rest weigh nothing.
        order = text.range(singles).unsqueeze(1).to(FLOAT)
        self.single_bias = call.hiding(call.steep(many.reshape(1, -1) - text.real(1) - order))  # [m, blocks]
        log_rest = text.Log(text.Max(rest, text.real(1)))
        self.root_log = text.Sqrt(log_rest).reshape(-1)
        self.rest_bias = (log_rest + call.hiding(call.steep(rest - text.real(1)))).reshape(-1)

    def all_scores(self, rows: Value) -> tuple[Value, Value]:
        """The same for all rows of a KV head [B * Hkv, rows, D] and all its blocks: [.., rows, m * blocks] and
        [.., rows, blocks]. Without a soft cap or attn_mask."""
        text, call, m = self.text, self.call, self.singles.unsqueeze(0)
        pairs, blocks = call.batch * call.kv_heads, self.blocks.k_blocks

        def by_pair(table: Value, width: Value) -> Value:
            """[m, all blocks, width] as [B * Hkv, m * blocks, width]."""
            table = text.Reshape(table, text.shape(-1, pairs, blocks, width))
            return text.Transpose(table, perm=[1, 0, 2, 3]).reshape(pairs, -1, width)

        def product(x: Value, vectors: Value) -> Value:
            return text.MatMul(x, text.Transpose(vectors, perm=[0, 2, 1]))

        def row_of(table: Value) -> Value:
            return table.reshape(pairs, 1, -1)

        bias = text.Transpose(by_pair(self.single_bias.reshape(m, -1, 1), text.ints(1)), perm=[0, 2, 1])
        single = product(rows, by_pair(self.single_keys, call.dim)) + bias
        half = product(rows * rows, by_pair(self.half_variance, call.dim))
        excess = text.Relu(text.Sqrt(half) - row_of(self.root_log))
        rest = product(rows, by_pair(self.mean, call.dim)) + (half - excess * excess) + row_of(self.rest_bias)
        return single, rest

    def scores(self, rows: Value, blocks: Value, at: Value) -> tuple[Value, Value]:
        """Log masses of the singles [rows, m * blocks], single by single, and of the rest [rows, blocks]."""
        text, call = self.text, self.call
        vectors = self.single_keys.take(blocks, axis=1).reshape(-1, call.dim)
        single_bias = self.single_bias.take(blocks, axis=1).reshape(1, -1)
        # The rest: variance / 2 is `half`; beyond variance = 2 log n it is sqrt(2 log n variance) - log n, which is
        # half - (sqrt(half) - sqrt(log n))^2.
        half = text.Gemm(rows * rows, self.half_variance.take(blocks), transB=1)
        excess = text.Relu(text.Sqrt(half) - self.root_log.take(blocks))
        frozen = half - excess * excess
        mean, rest_bias = self.mean.take(blocks), self.rest_bias.take(blocks).unsqueeze(0)
        if self.blocks.kind.softcap:
            single = call.capped(text.Gemm(rows, vectors, transB=1)) + single_bias
            rest = call.capped(text.Gemm(rows, mean, transB=1) + frozen) + rest_bias
        else:
            single = text.Gemm(rows, vectors, single_bias, transB=1)
            rest = text.Gemm(rows, mean, rest_bias, transB=1) + frozen
        if call.added is None:
            return single, rest
        bias = self._block_bias(blocks, at)
        by_single = single.reshape(0, self.singles.unsqueeze(0), -1) + bias.unsqueeze(1)
        return by_single.reshape(rows.size(0), -1), rest + bias

    def _block_bias(self, blocks: Value, at: Value) -> Value:
        """What attn_mask adds to the log mass of blocks [rows, blocks]: kernels/blocks.py::block_bias."""
        text, call = self.text, self.call
        hiding = self.blocks.key_bias.take(blocks)
        mean = text.ReduceLogSumExp(self.blocks.added(blocks, at, None) + hiding, text.ints(-1), keepdims=0)
        count = text.ReduceSum(text.Equal(hiding, text.real(0)).to(FLOAT), text.ints(-1), keepdims=0)
        bias = mean - text.Log(text.Max(count, text.real(1)))
        shape = text.Concat(call.group, text.ints(QUERY_BLOCK), blocks.size(0), axis=0)
        return text.Expand(bias, shape).reshape(call.group * text.ints(QUERY_BLOCK), -1)
