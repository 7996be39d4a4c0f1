"""Lists of key blocks, taken by a loop a few at a time: those that are about as long in one step, so threads share it.

A step of one list is too small for two threads, and lists of one step must be padded to the longest. So lists are
sorted by length, the longest first, and as many are taken at once as make a step's work worth sharing and keep its
scores in the cache.
"""

from collections.abc import Callable

from sparsify.exporters.onnx_blocks import Blocks
from sparsify.exporters.onnx_text import INT64, Value

SHARED = 1 << 21
"""Scores of a step, where its lists are of average length: 8 MB."""
MOST = 1 << 23
"""Scores of the largest step, if it has more than one list."""


class Steps:
    """A list for every row of two masks [rows, key blocks]: the blocks of `first`, then those of `then`, ascending.

    firsts, counts   int64 [rows]: blocks of `first`, and of both

    blocks      whose key blocks these are; rows lie by KV head, `per_head` each
    scores      int64 [1]: scores of a row against one block
    one_a_step  for what can only be had for one row at a time
    """

    def __init__(self, blocks: Blocks, first: Value, then: Value | None, per_head: Value, scores: Value,
                 one_a_step: bool) -> None:
        text = self.text = blocks.text
        masks = first if then is None else text.Concat(first, then, axis=1)
        row, column = text.Split(text.NonZero(masks), axis=0, num_outputs=2, outputs=2)
        listed = (row // per_head * blocks.k_count + column % blocks.k_count).reshape(-1)
        self._listed, self._last = text.Concat(listed, text.ints(0), axis=0), listed.size(0)
        self.firsts, self.counts = (text.ReduceSum(mask.to(INT64), text.ints(1), keepdims=0)
                                    for mask in (first, masks))
        self.starts = text.CumSum(self.counts, text.integer(0), exclusive=1)
        self._rows = masks.size(0)
        _, self._order = text.TopK(self.counts, self._rows, axis=0, largest=1, sorted=1, outputs=2)
        self._alike = text.ints(1) if one_a_step else self._how_many(scores)

    def _how_many(self, scores: Value) -> Value:
        """Rows of a step, int64 [1]."""
        text, one = self.text, self.text.ints(1)
        total = text.ReduceSum(self.counts, text.ints(0)) * scores
        longest = text.ReduceMax(self.counts, text.ints(0)) * scores
        worth = self._rows * text.ints(SHARED) // text.Max(total, one)
        fit = text.ints(MOST) // text.Max(longest, one)
        return text.Max(text.Min(worth, fit, self._rows), one)

    def each(self, step: Callable[[Value], Value]) -> Value:
        """What `step` makes of rows int64 [G], a tensor [G, ...], for all rows."""
        text, one = self.text, self.text.ints(1)
        count = (self._rows + self._alike - one) // self._alike
        numbers, last = text.range(self._alike.scalar()), self._rows - one

        def taken(at: Value) -> Value:
            return step(self._order.take(text.Min(at * self._alike + numbers, last)))  # the last row fills up

        found = text.loop(count.scalar(), taken)  # [steps, G, ...]
        found = text.Reshape(found, text.Concat(text.ints(-1), text.Shape(found, start=2), axis=0))
        place = text.ScatterElements(self._order, self._order, text.range(self._rows.scalar()), axis=0)
        return found.take(place)

    def part(self, starts: Value, counts: Value, length: Value) -> tuple[Value, Value]:
        """`length` [1] entries of lists from `starts` [G] on: places of blocks among those of all KV heads, int64
        [G, length], and whether they are among the first `counts` [G], bool; those that are not are any."""
        text, slot = self.text, self.text.range(length.scalar())
        places = self._listed.take(text.Min(starts.unsqueeze(1) + slot, self._last))
        return places, slot < counts.unsqueeze(1)
