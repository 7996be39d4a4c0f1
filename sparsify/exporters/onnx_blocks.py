"""A call of an ONNX file's attention in blocks: which pairs of blocks are allowed, and what masks hide of them.

`Blocks` lays q, k, v and the masks out as tables of blocks, so that a step of a loop takes what it needs of each by
number. Key blocks are taken from their KV head: grouped heads are never repeated.
"""

from sparsify.exporters.onnx_call import GHOST, HIDDEN, NOWHERE, TAKES_ALL, Call
from sparsify.exporters.onnx_text import FLOAT, Value
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK


class Blocks:
    """A call in blocks. Tables and lists of query blocks of heads have the order of blocks: (batch, KV head, query
    block, head of the group). `q_of_heads` lies as q does; lists take from it by number (`by_list`).

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

        self.q_of_heads = self.padded_rows(call.q, axis=2).reshape(-1, QUERY_BLOCK, call.dim)
        self.k = self.padded_keys(call.k, axis=2).reshape(-1, KEY_BLOCK, call.dim)
        self.v = self.padded_keys(call.v, axis=2).reshape(-1, KEY_BLOCK, call.value_dim)
        self._find_pairs()
        self._lay_tables()

    def padded_rows(self, x: Value, axis: int, fill: Value | None = None) -> Value:
        return self.padded(x, self.rows - self.call.rows, axis, fill)

    def padded_keys(self, x: Value, axis: int, fill: Value | None = None) -> Value:
        return self.padded(x, self.keys - self.call.keys, axis, fill)

    def padded(self, x: Value, count: Value, axis: int, fill: Value | None = None) -> Value:
        pads = self.text.shape(0, count)
        return self.text.Pad(x, pads, self.text.real(0) if fill is None else fill, self.text.ints(axis))

    def _find_pairs(self) -> None:
        """Pairs of blocks, bool [1 or B, query blocks, key blocks]: kernels/blocks.py says what they are.

        `free`: no row of the query block has any key of the key block hidden; attention masks nothing there.
        """
        text, call = self.text, self.call
        if call.key_mask is not None:
            shown = self.padded_keys(call.key_mask.to(FLOAT), axis=1)
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
                filled = self.padded_rows(ids, axis=1, fill=nothing)
            else:
                if self.call.key_mask is not None:
                    filled = text.Where(self.call.key_mask, ids, nothing)
                filled = self.padded_keys(filled, axis=1, fill=nothing)
            return filled.reshape(0, -1, block)

        return (text.ReduceMin(of_blocks(2**63 - 1), text.ints(-1), keepdims=0),
                text.ReduceMax(of_blocks(-2**63), text.ints(-1), keepdims=0))

    def _lay_tables(self) -> None:
        """What masks say: tables by key block of a KV head, as keys lie, and by query block of a head or KV head.

        Tables of keys have a block more than there are, which is hidden.
        """
        text, call = self.text, self.call
        by_key = text.shape(call.batch, call.kv_heads, self.k_blocks, KEY_BLOCK)

        def of_keys(table: Value, fill: Value) -> Value:
            """[1 or B, key blocks, KEY_BLOCK] as the keys lie, and a block of `fill`."""
            return self.padded(text.Expand(table.unsqueeze(1), by_key).reshape(-1, KEY_BLOCK), text.ints(1), 0, fill)

        self.key_bias = of_keys((text.real(1) - self.shown) * text.real(HIDDEN), text.real(HIDDEN))
        if call.offset is not None:
            places = text.range(self.keys.scalar()).to(FLOAT).reshape(1, -1, KEY_BLOCK)
            places = text.Where(self.shown > text.real(0), places, text.real(NOWHERE))
            self.key_places = of_keys(call.steep(places), call.steep(text.real(NOWHERE)))
            self.row_ends = self._by_row(call.steep(text.range(self.rows.scalar()) + call.offset).unsqueeze(0))
        if call.query_documents is not None and call.key_documents is not None:
            self.row_documents = self._by_row(self.padded_rows(call.query_documents, 1, text.integer(0)))
            self.key_documents = of_keys(
                self.padded_keys(call.key_documents, 1, text.integer(0)).reshape(0, -1, KEY_BLOCK), text.integer(0))
        is_row = (text.range(self.rows.scalar()) < call.q_len).reshape(1, 1, -1, 1, QUERY_BLOCK, 1)
        ghost = text.real(GHOST) if call.sink is None else call.sink.reshape(1, call.kv_heads, 1, call.group, 1, 1)
        ghost = text.Where(is_row, ghost, text.real(TAKES_ALL))
        self.ghosts = ghost.expand(call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK, 1).reshape(
            -1, QUERY_BLOCK, 1)

    def _by_row(self, table: Value) -> Value:
        """[1 or B, padded rows] by query block of a KV head: [blocks, 1, QUERY_BLOCK, 1]."""
        table = table.reshape(0, 1, -1, QUERY_BLOCK)
        table = table.expand(self.call.batch, self.call.kv_heads, self.q_blocks, QUERY_BLOCK)
        return table.reshape(-1, 1, QUERY_BLOCK, 1)

    def scores(self, rows: Value, places: Value, bias: Value | None, heads: Value) -> Value:
        """Scores of rows [G, heads * QUERY_BLOCK, D] against the key blocks at `places` [G, n], which may be none.

        Under the soft cap, and with a bias as `bias` makes it: float [G, heads * QUERY_BLOCK, n * KEY_BLOCK].
        """
        text, call = self.text, self.call
        keys = self.k.take(places).reshape(0, -1, call.dim)
        scores = call.capped(text.MatMul(rows, text.Transpose(keys, perm=[0, 2, 1])))
        if bias is None:
            return scores
        by_head = scores.reshape(0, heads, QUERY_BLOCK, -1) + bias
        return by_head.reshape(0, heads * text.ints(QUERY_BLOCK), -1)

    def bias(self, places: Value, at: Value, first_heads: Value, heads: Value) -> Value:
        """What the masks add to the scores of query blocks `at` of KV heads against the key blocks at `places`.

        places             int64 [G, n]: key blocks of KV heads; their number is no block, and hidden
        at                 int64 [G]
        first_heads, heads int64 [G] and [1]: which heads of the group it is for, where there is attn_mask, and how many

        float [G, 1 or heads, 1 or QUERY_BLOCK, n * KEY_BLOCK]. G is 1 where there is attn_mask.
        """
        call = self.call

        def of_keys(table: Value) -> Value:
            return table.take(places).reshape(0, 1, 1, -1)

        if call.offset is not None:
            bias = call.causal_bias(self.row_ends.take(at), of_keys(self.key_places))
        else:
            bias = of_keys(self.key_bias)
        if call.query_documents is not None:
            bias = bias + call.document_bias(self.row_documents.take(at), of_keys(self.key_documents))
        if call.added is not None:
            bias = bias + self.added(places, at, first_heads, heads).reshape(0, 0, 0, -1)
        return bias

    def added(self, places: Value, at: Value, first_heads: Value, heads: Value) -> Value:
        """attn_mask of one query block on key blocks: float [1, 1 or heads, 1 or QUERY_BLOCK, n, KEY_BLOCK]."""
        text, call = self.text, self.call
        assert call.added is not None
        pair, one = at // self.q_count, text.ints(1)
        mask = call.added.take(text.Min(pair // self.kv_heads, call.added.size(0) - one))
        many_heads, many_rows = (text.Min(mask.size(axis) - one, one) for axis in (1, 2))
        first = (pair % self.kv_heads * self.group + first_heads) * many_heads
        mask = mask.slice(first, first + heads, axis=1)
        first = at % self.q_count * text.integer(QUERY_BLOCK) * many_rows
        mask = mask.slice(first, first + text.ints(QUERY_BLOCK), axis=2)
        mask = self.padded(mask, (text.ints(QUERY_BLOCK) - mask.size(2)) * many_rows, axis=2)
        mask = text.Expand(mask, text.Concat(text.Shape(mask, end=-1), call.keys, axis=0))
        mask = self.padded_keys(mask, axis=3).reshape(0, 0, 0, -1, KEY_BLOCK)
        return mask.take((places % self.k_count).reshape(-1), axis=3)

    def by_list(self, heads: Value) -> Value:
        """Which of `q_of_heads` a list of `heads` [1] heads has: int64 [lists, heads], lists in the order of blocks."""
        text, call = self.text, self.call
        pieces = text.range((call.batch * call.heads * self.q_blocks).scalar())
        pieces = pieces.reshape(call.batch, call.kv_heads, call.group, self.q_blocks)
        return text.Transpose(pieces, perm=[0, 1, 3, 2]).reshape(-1, heads)

    def by_row(self, pieces: Value, place: Value) -> Value:
        """float [B, H, L, Dv] of what query blocks of heads have, in any order: [all, QUERY_BLOCK, Dv].

        place: where that of each query block is, int64 with all of them, in the order of blocks
        """
        text, call = self.text, self.call
        place = place.reshape(call.batch, call.kv_heads, self.q_blocks, call.group)
        return self.joined(pieces.take(text.Transpose(place, perm=[0, 1, 3, 2]).reshape(-1)))

    def joined(self, out: Value) -> Value:
        """The same of what they have head by head."""
        call = self.call
        out = out.reshape(call.batch, call.heads, self.rows, call.value_dim)
        return call.cleared(out.slice(self.text.ints(0), call.rows, axis=2))
