"""The attention of a file for TensorRT, one bucket a file: no loops, no branches, no sizes that depend on values.

TensorRT parses loops and branches and cannot build them around a selection (measured with TensorRT-RTX 1.7.1). So a
dense bucket makes all scores at once, which TensorRT fuses by itself, and a sparse one selects for all query blocks
together and gathers for each head the `room` key blocks of the largest peaks, those that are not kept hidden:

    peaks    as in onnx_selection.py, all query blocks in one product
    ids      [B, Hkv, query blocks, group, room]: forced blocks first, then by peak
    out      softmax over room * KEY_BLOCK keys a query block

A query block that keeps more than `room` blocks loses those of the least peaks; the report says what room there is.
Known to this body: causality, a key mask, shifts, protected keys. Sites with more are dense in all files.
"""

from sparsify.exporters.onnx_call import DOMAIN, HIDDEN, NOWHERE, PLAN, Call, Kind
from sparsify.exporters.onnx_selection import Selection, Summaries
from sparsify.exporters.onnx_text import FLOAT, Text, Value
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK

EDGE_BLOCKS = 3
"""Key blocks that the causal edge may cut for a query block: 128 rows at any offset."""


def is_known(kind: Kind) -> bool:
    """Whether a sparse bucket of this kind can be written."""
    return not (kind.window or kind.documents or kind.mask or kind.bias or kind.softcap or kind.sinks)


def function_text(kind: Kind, opset: int, room: int) -> str:
    """The function for one bucket; a kind that is not sparse makes all scores at once."""
    text = Text()
    call = Call(text, kind, bucket=0)
    out = _Batched(call, room).out() if kind.sparse else call.at_once()
    out = text.CastLike(out, text.input("q"))
    return text.function(DOMAIN, kind.name, opset, ("q", "k", "v", *kind.inputs), kind.attributes, out)


class _Batched(Selection):
    def __init__(self, call: Call, room: int) -> None:
        super().__init__(call)
        self.room = self.text.Min(self.text.ints(room), self.k_blocks)
        q = self.q_of_heads.reshape(call.batch, call.kv_heads, call.group, self.q_blocks, QUERY_BLOCK, call.dim)
        self.q = self.text.Transpose(q, perm=[0, 1, 3, 2, 4, 5]).reshape(-1, QUERY_BLOCK, call.dim)

    def out(self) -> Value:
        """float [B, H, L, Dv]."""
        text, call = self.text, self.call
        bucket = call.bucket
        peaks = self._all_peaks(text.attribute("singles", PLAN["singles"]).take(bucket))
        kept = self.evened(self.keep(peaks, bucket, call.tolerance), peaks, last=0)  # TensorRT knows no other
        # A forced block goes before all others, a block that is not kept behind them.
        sinks, local = (text.attribute(name, PLAN[name]).take(bucket) for name in ("sinks", "local"))
        rank = text.Where(kept, text.Where(self.forced(sinks, local), text.real(2), peaks), text.real(-1))
        best, ids = text.TopK(rank, self.room, axis=-1, largest=1, sorted=1, outputs=2)
        places = ids + self._first_blocks().unsqueeze(2, 3)  # [B, Hkv, query blocks, group, room]
        keys = self.k.take(places).reshape(-1, self.room * text.ints(KEY_BLOCK), call.dim)
        values = self.v.take(places).reshape(-1, self.room * text.ints(KEY_BLOCK), call.value_dim)
        scores = text.MatMul(self.q, text.Transpose(keys, perm=[0, 2, 1]))
        by_block = (-1, 1, self.room, KEY_BLOCK)
        unkept = call.hiding(call.steep(best)).reshape(-1, 1, self.room, 1)
        if call.offset is not None:
            ends = self.row_ends.reshape(call.batch, call.kv_heads, self.q_blocks, 1, QUERY_BLOCK, 1)
            ends = ends.expand(call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK, 1)
            keys_at = self.key_places.take(places).reshape(*by_block)
            bias = call.causal_bias(ends.reshape(-1, QUERY_BLOCK, 1, 1), keys_at)
        else:
            bias = self.key_bias.take(places).reshape(*by_block)
        bias = (bias + unkept).reshape(self.q.size(0), -1, self.room * text.ints(KEY_BLOCK))
        scores = scores + bias
        mixed = text.MatMul(text.Softmax(scores, axis=-1), values)
        sees = text.ReduceMax(scores, text.ints(-1), keepdims=1) > text.real(HIDDEN / 2)
        out = (mixed * sees.to(FLOAT)).reshape(call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK,
                                               call.value_dim)
        return self.joined(text.Transpose(out, perm=[0, 1, 3, 2, 4, 5]))

    def _first_blocks(self) -> Value:
        """Where the key blocks of each KV head begin: int64 [B, Hkv, 1]."""
        text, call = self.text, self.call
        pairs = (call.batch * call.kv_heads).scalar()
        return (text.range(pairs) * self.k_count).reshape(call.batch, call.kv_heads, 1)

    def _all_peaks(self, singles: Value) -> Value:
        """float [B, Hkv, query blocks, group, key blocks]; of cut blocks, which are forced, 1."""
        text, call = self.text, self.call
        summaries = Summaries(self, singles)
        rows = call.group * text.ints(QUERY_BLOCK)
        q = self.q.reshape(call.batch * call.kv_heads, -1, call.dim)  # [pairs, query blocks * rows, D]
        single, rest = summaries.all_scores(q)
        by_vector = (call.batch, call.kv_heads, self.q_blocks, rows, -1, self.k_blocks)
        unseen = text.Where(self.whole, text.real(0), text.real(HIDDEN))
        masses = text.Concat(single.reshape(*by_vector), rest.reshape(*by_vector), axis=4)
        masses = masses + unseen.reshape(0, 1, self.q_blocks, 1, 1, self.k_blocks)
        flat = (call.batch, call.kv_heads, self.q_blocks, rows, -1)
        columns = [masses.reshape(*flat)]
        if call.offset is not None:
            columns.append(self._edge_scores(q).reshape(*flat))
        columns.append(self.ghosts.reshape(*flat))
        shares = text.Softmax(text.Concat(*columns, axis=-1), axis=-1)
        vectors = (singles + text.integer(1)).unsqueeze(0)
        shares = shares.slice(text.ints(0), vectors * self.k_blocks, axis=-1).reshape(
            call.batch, call.kv_heads, self.q_blocks, rows, vectors, self.k_blocks)
        of_blocks = text.ReduceSum(shares, text.ints(4), keepdims=0).reshape(
            call.batch, call.kv_heads, self.q_blocks, call.group, QUERY_BLOCK, self.k_blocks)
        peaks = text.ReduceMax(of_blocks, text.ints(4), keepdims=0)
        return peaks if self.cut is None else text.Where(self.cut.unsqueeze(1, 3), text.real(1), peaks)

    def _edge_scores(self, q: Value) -> Value:
        """Scores of the blocks that the causal edge cuts: [pairs * query blocks, rows, EDGE_BLOCKS * KEY_BLOCK]."""
        text, call = self.text, self.call
        rows = call.group * text.ints(QUERY_BLOCK)
        first = text.Max(self.edge_of_rows + text.integer(1), text.integer(0)) // text.integer(KEY_BLOCK)
        blocks = first + text.range(text.integer(EDGE_BLOCKS))  # [query blocks, EDGE_BLOCKS]; some may not exist
        real = text.Min(blocks, self.k_count - text.integer(1))
        places = real.unsqueeze(0, 1) + self._first_blocks().unsqueeze(3)  # [B, Hkv, query blocks, EDGE_BLOCKS]
        keys = self.k.take(places).reshape(-1, EDGE_BLOCKS * KEY_BLOCK, call.dim)
        scores = text.MatMul(q.reshape(-1, rows, call.dim), text.Transpose(keys, perm=[0, 2, 1]))
        # A block that does not exist lies behind every row.
        behind = call.steep((blocks - real) * text.integer(int(NOWHERE))).reshape(1, 1, -1, EDGE_BLOCKS, 1)
        hidden = text.Max(self.key_places.take(places), behind)
        hidden = hidden.reshape(-1, 1, 1, EDGE_BLOCKS * KEY_BLOCK)
        bias = call.causal_bias(self.row_ends.reshape(-1, 1, QUERY_BLOCK, 1), hidden)
        scores = scores.reshape(-1, call.group, QUERY_BLOCK, EDGE_BLOCKS * KEY_BLOCK) + bias
        return scores.reshape(-1, rows, EDGE_BLOCKS * KEY_BLOCK)
