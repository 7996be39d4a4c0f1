"""Which key blocks are kept: split summaries of the keys, peaks by them, and the rule from peaks to blocks.

    Loop over (batch, KV head, query block), some at a time      peaks for all heads of the KV head
    rule                                                         from peaks to kept blocks, evened out, all at once

The softmax of shares has a ghost, which also takes all of a row that only fills up a query block.

Source: kernels/oracle.py and kernels/rule.py say what is computed; the tests hold the functions to them.
"""

from sparsify.exporters.onnx_blocks import Blocks
from sparsify.exporters.onnx_call import HIDDEN, PLAN
from sparsify.exporters.onnx_steps import Steps
from sparsify.exporters.onnx_text import FLOAT, INT64, Value
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, TILE


class Selection(Blocks):
    """A call in blocks, and which of them it keeps."""

    def kept(self) -> Value:
        """bool [B, Hkv, query blocks, group, key blocks]: kept, as kernels/rule.py evens out what its rule says."""
        singles = self.text.attribute("singles", PLAN["singles"]).take(self.call.bucket)
        peaks = self.text.Reshape(self._peaks(singles), self.kept_shape)
        return self.evened(self.keep(peaks, self.call.bucket, self.call.tolerance), peaks)

    def _peaks(self, singles: Value) -> Value:
        """Peaks, float [batch * KV heads * query blocks, group, key blocks]; kernels/estimate.py."""
        text, call = self.text, self.call
        estimate = Estimate(Summaries(self, singles))
        all_rows, vectors = call.group * text.ints(QUERY_BLOCK), (singles + text.integer(1)).unsqueeze(0)
        last_block = self.k.size(0) - text.ints(1)
        ghosts = self.ghosts.reshape(-1, all_rows, 1)
        pairs = text.shape(call.batch, call.kv_heads, self.q_blocks, self.k_blocks)

        def by_row(mask: Value) -> Value:
            return text.Expand(mask.unsqueeze(1), pairs).reshape(-1, self.k_blocks)

        edge = None if self.cut is None else by_row(self.allowed & self.cut)
        steps = Steps(self, by_row(self.whole), edge, self.q_count, all_rows * vectors, call.added is not None)
        cuts = steps.counts - steps.firsts
        many_whole, many_cut = steps.most(steps.firsts), steps.most(cuts)
        widths = [many_whole.unsqueeze(1) * vectors, text.ints(1).expand(steps.steps, 1)]
        if edge is not None:
            widths.insert(1, many_cut.unsqueeze(1) * text.ints(KEY_BLOCK))
        widths_of_steps, pieces = text.Concat(*widths, axis=1), self.by_list(call.group).take(steps.rows)

        def step(at: Value) -> Value:
            rows, starts, wholes = steps.rows.take(at), steps.starts.take(at), steps.firsts.take(at)
            some = self.q_of_heads.take(pieces.take(at)).reshape(0, all_rows, call.dim)
            blocks = steps.part(starts, wholes, many_whole.take(at))
            columns = [*estimate.scores(some, blocks, rows), ghosts.take(rows)]
            if edge is not None:
                cut_blocks = steps.part(starts + wholes, cuts.take(at), many_cut.take(at))
                bias = self.bias(cut_blocks, rows, text.ints(0), call.group)
                columns.insert(2, self.scores(some, text.Min(cut_blocks, last_block), bias, call.group))
            shares = text.Softmax(text.Concat(*columns, axis=2), axis=2)
            of_whole, *of_cut, _ = text.Split(shares, widths_of_steps.take(at), axis=2, outputs=len(widths))
            found = [text.ReduceSum(of_whole.reshape(0, 0, vectors, -1), text.ints(2), keepdims=0)]
            if edge is not None:
                found.append(text.ReduceSum(of_cut[0].reshape(0, 0, -1, KEY_BLOCK), text.ints(3), keepdims=0))
                blocks = text.Concat(blocks, cut_blocks, axis=1)
            of_rows = text.Concat(*found, axis=2) if edge is not None else found[0]
            most = text.ReduceMax(of_rows.reshape(0, call.group, QUERY_BLOCK, -1), text.ints(2), keepdims=0)
            # What is no block has a share of 0.
            place = text.Expand((blocks % self.k_count).unsqueeze(1), text.Shape(most))
            none = text.real(0).expand(steps.alike, call.group, self.k_blocks)
            return text.ScatterElements(none, place, most, axis=2, reduction="max")

        found, place = steps.each(step)
        return found.take(place)

    def keep(self, peaks: Value, bucket: Value, tolerance: Value) -> Value:
        """The rule itself."""
        text, call = self.text, self.call

        def of_bucket(name: str) -> Value:
            return text.attribute(name, PLAN[name]).take(bucket)

        if self.kind.shifts:
            shifts = text.attribute("shifts", "floats").reshape(-1, call.heads).take(bucket)
            tolerance = tolerance * shifts.reshape(1, call.kv_heads, 1, call.group, 1)
        allowed = self.allowed.unsqueeze(1, 3)
        kept = allowed & (self.forced(of_bucket("sinks"), of_bucket("local")) | (peaks >= tolerance))

        def many(x: Value) -> Value:
            return text.ReduceSum(x.to(FLOAT), text.ints(-1), keepdims=1)

        return kept | (allowed & (many(kept) > of_bucket("max_densities") * many(allowed)))

    def forced(self, sinks: Value, local: Value) -> Value:
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
        protected = self.padded_keys(text.input("protected").to(FLOAT), axis=1).reshape(0, -1, KEY_BLOCK)
        return forced | (text.ReduceMax(protected, text.ints(-1), keepdims=0) > text.real(0)).unsqueeze(1, 2, 3)

    def evened(self, kept: Value, peaks: Value, last: int = 1) -> Value:
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


class Estimate:
    """Log masses of key blocks by their summaries, as a step of a loop takes them.

    Tables have a row more than there are blocks, which is hidden. Without a soft cap, what a summary adds to its scores
    is a column of the tables, and a column of ones of the rows: one pass over the scores less.
    """

    def __init__(self, summaries: Summaries) -> None:
        self.blocks, self.text, self.call = summaries.blocks, summaries.text, summaries.call
        text, call = self.text, self.call
        self.singles, self.all_rows = summaries.singles, call.group * text.ints(QUERY_BLOCK)
        blocks, one, hidden = self.blocks, text.ints(1), text.real(HIDDEN)
        self.count = blocks.k.size(0) + one
        single, mean = (blocks.padded(x, one, axis) for x, axis in ((summaries.single_keys, 1), (summaries.mean, 0)))
        half = blocks.padded(summaries.half_variance, one, 0)
        single_bias = blocks.padded(summaries.single_bias, one, 1, hidden).unsqueeze(2)
        rest_bias = blocks.padded(summaries.rest_bias, one, 0, hidden).unsqueeze(1)
        self.root_log = blocks.padded(summaries.root_log, one, 0)
        self.single_bias, self.rest_bias = single_bias.reshape(-1), rest_bias.reshape(-1)
        if not self.blocks.kind.softcap:
            single, mean = text.Concat(single, single_bias, axis=2), text.Concat(mean, rest_bias, axis=1)
            half = blocks.padded(half, one, 1)
        self.single, self.mean, self.half = text.Reshape(single, text.shape(-1, mean.size(1))), mean, half

    def scores(self, rows: Value, blocks: Value, at: Value) -> tuple[Value, Value]:
        """Of the singles [G, rows, m * n], single by single, and of the rest [G, rows, n]; `rows` [G, rows, D] of query
        blocks `at` [G] of KV heads, `blocks` [G, n]."""
        text, call = self.text, self.call
        order = text.range(self.singles).reshape(1, -1, 1)
        singles = (order * self.count + blocks.unsqueeze(1)).reshape(0, -1)  # [G, m * n]

        def product(x: Value, vectors: Value) -> Value:
            return text.MatMul(x, text.Transpose(vectors, perm=[0, 2, 1]))

        if not self.blocks.kind.softcap:
            rows = self.blocks.padded(rows, text.ints(1), 2, text.real(1))
        # The rest: variance / 2 is `half`; beyond variance = 2 log n it is sqrt(2 log n variance) - log n, which is
        # half - (sqrt(half) - sqrt(log n))^2.
        half = product(rows * rows, self.half.take(blocks))
        excess = text.Relu(text.Sqrt(half) - self.root_log.take(blocks).unsqueeze(1))
        single = product(rows, self.single.take(singles))
        rest = product(rows, self.mean.take(blocks)) + (half - excess * excess)
        if self.blocks.kind.softcap:
            single = call.capped(single) + self.single_bias.take(singles).unsqueeze(1)
            rest = call.capped(rest) + self.rest_bias.take(blocks).unsqueeze(1)
        if call.added is None:
            return single, rest
        bias = self._block_bias(blocks, at)
        by_single = single.reshape(0, 0, self.singles.unsqueeze(0), -1) + bias.unsqueeze(2)
        return by_single.reshape(0, self.all_rows, -1), rest + bias

    def _block_bias(self, blocks: Value, at: Value) -> Value:
        """What attn_mask adds to the log mass of blocks [1, rows, n]: kernels/blocks.py::block_bias."""
        text, call = self.text, self.call
        hiding = self.blocks.key_bias.take(blocks)
        added = self.blocks.added(blocks, at, text.ints(0), call.group) + hiding.unsqueeze(1, 2)
        mean = text.ReduceLogSumExp(added, text.ints(-1), keepdims=0)
        count = text.ReduceSum(text.Equal(hiding, text.real(0)).to(FLOAT), text.ints(-1), keepdims=0)
        bias = mean - text.Log(text.Max(count, text.real(1))).unsqueeze(1, 2)
        return bias.expand(1, call.group, QUERY_BLOCK, blocks.size(1)).reshape(0, self.all_rows, -1)
