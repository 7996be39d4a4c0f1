"""Lists of key blocks, taken by a loop a few at a time: those that are about as long in one step, so threads share it.

A step of one list is too small for two threads, and lists of one step must be padded to the longest. So lists are
sorted by length, the longest first, and as many are taken at once as make a step's work worth sharing and keep its
scores in the cache. What a step must know of its lists is laid out before the loop: a node costs about a microsecond
each time, however little it computes.
"""

from collections.abc import Callable

from sparsify.exporters.onnx_blocks import Blocks
from sparsify.exporters.onnx_text import INT64, Value

SHARED = 1 << 19
"""Scores of a step, where its lists are of average length: 2 MB. Half and twice as many took as long."""
MOST = 1 << 23
"""Scores of the largest step, if it has more than one list."""


class Steps:
    """A list for every row of two masks [rows, key blocks]: the blocks of `first`, then those of `then`, ascending.

    blocks      whose key blocks these are; rows lie by KV head, `per_head` each
    scores      int64 [1]: scores of a row against one block
    one_a_step  for what can only be had for one row at a time

    rows             int64 [steps, G]: the rows of each step
    starts           int64 [steps, G, 1]: where their lists begin among all
    firsts, counts   int64 [steps, G, 1]: how many blocks of `first` they have, and of both
    """

    def __init__(self, blocks: Blocks, first: Value, then: Value | None, per_head: Value, scores: Value,
                 one_a_step: bool) -> None:
        text = self.text = blocks.text
        masks = first if then is None else text.Concat(first, then, axis=1)
        row, column = text.Split(text.NonZero(masks), axis=0, num_outputs=2, outputs=2)
        listed = (row // per_head * blocks.k_count + column % blocks.k_count).reshape(-1)
        firsts, counts = (text.ReduceSum(mask.to(INT64), text.ints(1), keepdims=0) for mask in (first, masks))
        longest = text.ReduceMax(counts, text.ints(0))
        one, self._nothing, self._count = text.ints(1), blocks.k.size(0), masks.size(0)
        # Every list may be read to the length of the longest, and one entry where all are empty.
        self._listed = blocks.padded(listed, text.Max(longest, one), axis=0, fill=text.integer(0))
        alike = one
        if not one_a_step:
            work, most = (text.Max(count * scores, one) for count in (text.ReduceSum(counts, text.ints(0)), longest))
            alike = text.Min(self._count * text.ints(SHARED) // work, text.ints(MOST) // most, self._count)
            alike = text.Max(alike, one)
        self.steps, self.alike = (self._count + alike - one) // alike, alike
        _, self._order = text.TopK(counts, self._count, axis=0, largest=1, sorted=1, outputs=2)
        number = text.Min(text.range((self.steps * alike).scalar()), self._count - one)  # the last row fills up
        self.rows = self._order.take(number).reshape(-1, alike)
        self.firsts, self.counts, self.starts = (
            x.take(self.rows).unsqueeze(2) for x in (firsts, counts, text.CumSum(counts, text.integer(0), exclusive=1)))

    def most(self, counts: Value) -> Value:
        """int64 [steps] of [steps, G, 1]: the most of each step, at least 1."""
        return self.text.Max(self.text.ReduceMax(counts, self.text.ints(1, 2), keepdims=0), self.text.ints(1))

    def each(self, step: Callable[[Value], Value]) -> tuple[Value, Value]:
        """What `step` makes of the number of a step, a tensor [G, ...], one behind the other, and where every row is
        in them: int64 [rows]."""
        text = self.text
        found = text.loop(self.steps.scalar(), step)  # [steps, G, ...]
        found = text.Reshape(found, text.Concat(text.ints(-1), text.Shape(found, start=2), axis=0))
        return found, text.ScatterElements(self._order, self._order, text.range(self._count.scalar()), axis=0)

    def part(self, starts: Value, counts: Value, length: Value) -> Value:
        """`length` entries of lists from `starts` [G, 1] on, int64 [G, length]: places of blocks among those of all KV
        heads, and behind the first `counts` [G, 1] of each the number of all, where there is no block."""
        slot = self.text.range(length)
        return self.text.Where(slot < counts, self._listed.take(starts + slot), self._nothing)
