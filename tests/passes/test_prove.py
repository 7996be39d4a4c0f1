"""A proof is an equivalence: what the op is told to hide is what the mask hid, at sizes the proof never saw.

`Proven` compiles an attention, proves its mask, and in every call compares what the mask did to the scores, computed by
the nodes of the user's own graph, with what the arguments and the carried terms do. The op itself is not called.
"""

import itertools
import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from graphs import compiled, qkv
from torch import nn
from torch.utils._sympy.functions import FloorDiv, PythonMod

from sparsify.passes.buffers import Band, Ramp, Same, buffers_of, read_values
from sparsify.passes.emit import documents, key_mask, size_node
from sparsify.passes.find import find_attention
from sparsify.passes.normalise import normalise
from sparsify.passes.prove import HIDDEN, prove_masks
from sparsify.passes.site import BATCH, HEAD, KEY, QUERY, TRUE, ProvenSite

LOW = torch.finfo(torch.float32).min


class Proven:
    """`function`, compiled; the proofs (or refusals) of its last graph, the arguments they gave in the last call.

    wrong   by place of the site: what a comparison found
    """

    def __init__(self, function, **settings):
        self.graphs, self.sites, self.told, self.wrong = 0, [], [], {}
        self.call = compiled(function, self._backend, **settings)

    @property
    def mask(self):
        """The proof of the only site."""
        (site,) = self.sites
        assert isinstance(site, ProvenSite), site.why
        assert not self.wrong, self.wrong
        return site.mask

    def _backend(self, gm, inputs):
        graph = normalise(gm, inputs)
        self.sites = prove_masks(graph, find_attention(graph), buffers_of(graph, inputs))
        self.graphs += 1
        arguments = [_emit_arguments(x) if isinstance(x, ProvenSite) else None for x in self.sites]
        graph.recompile()
        sites = list(zip(self.sites, arguments, strict=True))

        def run(*args):
            interpreter = torch.fx.Interpreter(graph, garbage_collect_values=False)
            output = interpreter.run(*args)
            sizes = {}
            for node, arg in zip(graph.graph.find_nodes(op="placeholder"), args, strict=True):
                held = node.meta["val"]
                pairs = zip(held.shape, arg.shape, strict=True) if isinstance(held, torch.Tensor) else [(held, arg)]
                sizes.update({a.node.expr: b for a, b in pairs if isinstance(a, torch.SymInt)})
            self.told.clear()
            for place, pair in enumerate(sites):
                try:
                    self.told.append(_compare(interpreter.env, sizes, *pair) if pair[1] is not None else None)
                except AssertionError as wrong:
                    self.wrong.setdefault(place, wrong)
            return output

        return run


def _emit_arguments(proven):
    """Nodes for the arguments that the op is to get."""
    site, mask = proven.site, proven.mask
    at = site.output.node
    bounds = [None if x is None else size_node(x, at) for x in (mask.causal_offset, mask.window)]
    keys = None if mask.visible_keys == TRUE else key_mask(mask.visible_keys, mask.leaves, site.batch, site.kv_len, at)
    ids = (None, None) if mask.documents is None else documents(mask.documents, mask.leaves, site.batch,
                                                                (site.q_len, site.kv_len), at)
    return (*bounds, keys, *ids)


def _compare(values, sizes, proven, arguments):
    """Compare the scores that the mask leaves with those that its proof leaves; the values of the arguments."""
    site = proven.site
    batch, heads, q_len, kv_len = (_evaluate(x.node.expr, sizes) if isinstance(x, torch.SymInt) else x
                                   for x in (site.batch, site.heads, site.q_len, site.kv_len))
    indices = torch.meshgrid(*map(torch.arange, (batch, heads, q_len, kv_len)), indexing="ij")
    names = {**sizes, **dict(zip((BATCH, HEAD, QUERY, KEY), indices, strict=True))}
    offset, window, keys, query_ids, key_ids = told = [values[x] if isinstance(x, torch.fx.Node) else x
                                                       for x in arguments]
    b, _, q, k = indices
    visible = torch.ones(indices[0].shape, dtype=torch.bool)
    if offset is not None:
        visible &= k <= q + offset
    if window is not None:
        assert offset is not None
        visible &= k > q + offset - window
    if keys is not None:
        assert keys.dtype == torch.bool
        assert keys.shape in ((1, kv_len), (batch, kv_len))
        visible &= keys[b % len(keys), k]
    if query_ids is not None:
        assert query_ids.shape[1:] == (q_len,)
        assert key_ids.shape[1:] == (kv_len,)
        visible &= query_ids[b % len(query_ids), q] == key_ids[b % len(key_ids), k]
    top_left = torch.zeros(visible.shape).masked_fill(k > q, -torch.inf) if site.is_causal else 0
    meant = _effect(site.masks, values, names, visible.shape) + top_left
    ours = _effect(proven.mask.carried, values, names, visible.shape).masked_fill(~visible, -torch.inf)
    assert torch.equal(meant <= HIDDEN, ours <= HIDDEN)
    for term in site.masks:
        assert term.kind != "gate" or bool((_met(term, values, names, visible.shape) == 1)[meant > HIDDEN].all())
    torch.testing.assert_close(meant.masked_fill(meant <= HIDDEN, 0), ours.masked_fill(ours <= HIDDEN, 0))
    return told


def _effect(terms, values, names, shape):
    """What the terms make of scores of zero."""
    scores = torch.zeros(shape, dtype=torch.float64)
    for term in terms:
        met = _met(term, values, names, shape)
        if term.kind == "add":
            scores = scores + met.double() * term.factor
        elif term.kind != "gate":
            fill = float(values[term.fill] if isinstance(term.fill, torch.fx.Node) else term.fill) * term.factor
            scores = torch.where(met.bool() == (term.kind == "keep"), scores, fill)
    return scores


def _met(term, values, names, shape):
    """The element of the term's tensor that each score meets."""
    tensor = values[term.tensor]
    index = tuple(torch.as_tensor(_evaluate(sympy.sympify(x), names)).expand(shape) for x in term.index)
    return tensor[index] if index else tensor


def _evaluate(expr, names):
    if expr.is_Integer:
        return int(expr)
    if expr in names:
        return names[expr]
    args = [_evaluate(x, names) for x in expr.args]
    if isinstance(expr, sympy.Add):
        return sum(args)
    if isinstance(expr, sympy.Mul):
        return args[0] * _evaluate(sympy.Mul(*expr.args[1:]), names)
    return {FloorDiv: lambda x, n: x // n, PythonMod: lambda x, n: x % n}[type(expr)](*args)


def additive(keep, low=LOW):
    return torch.where(keep, 0.0, low)


def positions(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])


def causal(q, k, pad):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def causal_bottom_right(q, k, pad):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


def causal_from_triu(q, k, pad):
    return ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


def causal_additive(q, k, pad):
    return torch.full((q.shape[2], k.shape[2]), LOW).triu(1)


def causal_infinite(q, k, pad):
    return torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal(q, k, pad), -torch.inf)


def causal_in_place(q, k, pad):
    mask = torch.full((q.shape[2], k.shape[2]), -1e4)
    return mask.triu_(1)


def causal_in_half(q, k, pad):
    return additive(causal(q, k, pad), -1e9).half().float()


def causal_logarithm(q, k, pad):
    return torch.ones(q.shape[2], k.shape[2]).tril().log()


def causal_in_floating_point(q, k, pad):
    q, k = positions(q, k)
    return additive(q.float() - k.float() >= 0)


def causal_by_batch(q, k, pad):
    keep = torch.ones(q.shape[2], k.shape[2]).tril()[None, None].repeat(q.shape[0], 1, 1, 1)
    return keep.view(q.shape[0], 1, q.shape[2], k.shape[2]) > 0.5


def causal_by_heads(q, k, pad):
    batch, heads, q_len, kv_len = pad.shape[0], *q.shape[1:3], pad.shape[1]
    keep = causal(q, k, pad)[None].expand(batch * heads, -1, -1).reshape(batch, heads, q_len, k.shape[2])
    return additive(keep & pad.repeat_interleave(heads, 0).reshape(batch, heads, 1, kv_len))


def two_causal_masks(q, k, pad):
    return additive(causal(q, k, pad)) + additive(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(2))


def causal_twice_by_sizes(q, k, pad):
    return causal(q, k, pad) & causal_bottom_right(q, k, pad)


def padding(q, k, pad):
    return pad[:, None, None]


def padding_from_integers(q, k, pad):
    return (pad.long()[:, None, None] == 1).expand(-1, 1, q.shape[2], -1)


def padding_additive(q, k, pad):
    return (1.0 - pad[:, None, None].float()) * LOW


def padding_reversed(q, k, pad):
    return (1.0 - pad.long().flip(-1)[:, None, None]) * -1e4


def padding_inverted(q, k, pad):
    return (~pad).float()[:, None, None] * LOW


def padding_in_place(q, k, pad):
    hidden = torch.zeros_like(pad, dtype=torch.float32).masked_fill_(~pad, -torch.inf)
    return torch.logical_not(hidden.bool())[:, None, None]


def causal_and_padding(q, k, pad):
    return additive(causal(q, k, pad) & pad[:, None, None])


def causal_then_padding(q, k, pad):
    return additive(causal(q, k, pad)).masked_fill(~pad[:, None, None], -torch.inf)


def causal_plus_padding(q, k, pad):
    return additive(causal(q, k, pad)) + (1.0 - pad[:, None, None].float()) * LOW


def causal_times_padding(q, k, pad):
    return additive(causal(q, k, pad) * pad[:, None, None])


def indexed_padding(q, k, pad):
    rows = torch.arange(pad.shape[0])[:, None, None, None]
    return causal(q, k, pad) & pad[rows, torch.arange(k.shape[2])]


def gathered_padding(q, k, pad):
    places = torch.arange(k.shape[2])[None].expand(pad.shape[0], -1)
    return causal(q, k, pad) & pad.gather(1, places)[:, None, None]


def key_length(q, k, pad):
    return (torch.arange(k.shape[2]) < q.shape[2])[None, None, None]


def key_start(q, k, pad):
    return (torch.arange(k.shape[2]) >= max(k.shape[2] - 4, 0))[None, None, None]


def padded_to_length(q, k, pad):
    return F.pad(pad[:, 2:], (1, 1))[:, None, None]


def shifted_padding(q, k, pad):
    return torch.cat([pad[:, 1:], pad[:, :1]], 1)[:, None, None]


def one_document(q, k, pad):
    position = torch.arange(k.shape[2])[None]
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, : q.shape[2], None] == document[:, None, None]
    return causal(q, k, pad) & same


def window_that_hides_nothing(q, k, pad):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return causal(q, k, pad) & (distance < q.shape[2])


def window(q, k, pad):
    q, k = positions(q, k)
    return (k <= q) & (q - k < 3)


def window_from_two_triangles(q, k, pad):
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return additive(ones.tril(2) ^ ones.tril(-3))


def window_at_the_end(q, k, pad):
    shift = k.shape[2] - q.shape[2]
    q, k = positions(q, k)
    return (k <= q + shift) & (k > q + shift - 4)


def window_both_ways(q, k, pad):
    q, k = positions(q, k)
    return (q - k).abs() <= 2


def window_of_far_keys(q, k, pad):
    q, k = positions(q, k)
    return ~((k - q).abs() > 3)


def window_by_clamping(q, k, pad):
    q, k = positions(q, k)
    return (k <= q) & (k >= (q - 3).clamp(min=0))


def anti_causal(q, k, pad):
    q, k = positions(q, k)
    return k >= q


def diagonal(q, k, pad):
    q, k = positions(q, k)
    return k == q


def chunks(q, k, pad):
    q, k = positions(q, k)
    return (q // 4 == k // 4) & (k <= q)


def chunks_in_floating_point(q, k, pad):
    q, k = positions(q, k)
    return additive((q / 4).floor() == (k / 4).long())


def chunks_from_blocks(q, k, pad):
    blocks = torch.eye(8, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return blocks[: q.shape[2], : k.shape[2]]


def packed_documents(q, k, pad):
    document = pad.long().cumsum(-1)
    return causal(q, k, pad) & (document[:, None, : q.shape[2], None] == document[:, None, None])


def packed_positions(q, k, pad):
    position = pad.long().cumsum(-1)
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return additive((document[:, None, : q.shape[2], None] == document[:, None, None]) & pad[:, None, None])


def packed_and_causal_by_position(q, k, pad):
    position = torch.arange(k.shape[2]) - (torch.arange(k.shape[2]) * ~pad).cummax(-1).values
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, : q.shape[2], None] == document[:, None, None]
    return same & (position[:, None, None] <= position[:, None, : q.shape[2], None])


def reshaped_padding(q, k, pad):
    return pad.view(q.shape[0], -1)[:, None, None] & causal(q, k, pad)


def equal_documents_by_difference(q, k, pad):
    document = pad.int().cumsum(-1)
    return (document[:, : q.shape[2], None] - document[:, None] == 0)[:, None]


def packed_chunks(q, k, pad):
    q, k = positions(q, k)
    return packed_documents(q[None, None], k[None, None, :, None], pad) & (q // 4 == k // 4)


def documents_of_padded_rows(q, k, pad):
    document = pad.long().cumsum(-1).masked_fill(~pad, 0)
    return (document[:, None, : q.shape[2], None] == document[:, None, None]) & pad[:, None, None]


def documents_of_two(q, k, pad):
    return pad[:, None, : q.shape[2], None] == pad[:, None, None]


def both_padded(q, k, pad):
    pad = pad.int().cumsum(-1) - 1  # no flags: any number may be there
    return (pad[:, None, : q.shape[2], None] * pad[:, None, None]).bool()


def query_padding(q, k, pad):
    return pad[:, None, : q.shape[2], None] & causal(q, k, pad)


def documents_and_query_padding(q, k, pad):
    return packed_documents(q, k, pad) & pad.flip(1)[:, None, : q.shape[2], None] & pad[:, None, None]


PROVEN = {
    causal: "causal",
    causal_bottom_right: "causal, offset",
    causal_from_triu: "causal",
    causal_additive: "causal",
    causal_infinite: "causal",
    causal_in_place: "causal",
    causal_in_half: "causal",
    causal_logarithm: "causal",
    causal_in_floating_point: "causal",
    causal_by_batch: "causal",
    causal_by_heads: "causal; keys where",
    two_causal_masks: "causal",
    padding: "keys where",
    padding_from_integers: "keys where",
    padding_additive: "keys where",
    padding_reversed: "keys where",
    padding_inverted: "keys where",
    padding_in_place: "keys where",
    causal_and_padding: "causal; keys where",
    causal_then_padding: "causal; keys where",
    causal_plus_padding: "causal; keys where",
    causal_times_padding: "causal; keys where",
    indexed_padding: "causal; keys where",
    gathered_padding: "causal; keys where",
    key_length: "keys where",
    key_start: "keys where",
    padded_to_length: "keys where",
    shifted_padding: "keys where",
    one_document: "causal",
    window_that_hides_nothing: "causal",
    window: "causal; window 3",
    window_from_two_triangles: "causal, offset 2; window 5",
    window_at_the_end: "causal, offset",
    window_both_ways: "causal, offset 2; window 5",
    window_of_far_keys: "causal, offset 3; window 7",
    window_by_clamping: "causal; window 4",
    anti_causal: "causal, offset",
    diagonal: "causal; window 1",
    chunks: "causal; documents",
    chunks_in_floating_point: "documents",
    chunks_from_blocks: "documents",
    packed_documents: "causal; documents",
    packed_positions: "documents",
    packed_and_causal_by_position: "causal; documents",
    reshaped_padding: "causal; keys where",
    equal_documents_by_difference: "documents",
    documents_of_padded_rows: "documents",
    documents_of_two: "documents",
    both_padded: "documents",
    query_padding: "causal; documents",
    documents_and_query_padding: "causal; documents",
}


def attend_with(mask):
    return lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, mask(q, k, pad))


def random_padding(batch, length):
    pad = torch.rand(batch, length) < 0.7
    pad[:, 0] = True
    return pad


SHAPES = [(9, 9, 2), (7, 12, 3), (5, 31, 2)]


def check(*masks):
    """Call attention under each of the masks; every call compares every mask with its proof."""
    def attend(q, k, v, pad):
        return [attend_with(mask)(q, k, v, pad) for mask in masks]

    function = Proven(attend)
    for q_len, kv_len, batch in SHAPES:
        function.call(*qkv(q_len, kv_len, batch), random_padding(batch, kv_len))
    assert function.graphs == 1  # telling the op fixed no size
    return function


@pytest.mark.parametrize("mask", PROVEN, ids=lambda mask: mask.__name__)
def test_proofs_hold_at_sizes_that_were_not_traced(mask, checked):
    proof = checked(mask)
    assert str(proof).startswith(PROVEN[mask])
    assert not proof.carried


def test_the_smaller_of_two_offsets_is_told():
    """A graph of its own: slices of the masks above may tell which length is the greater."""
    proof = check(causal_twice_by_sizes).mask
    assert str(proof).startswith("causal, offset Min(")
    assert not proof.carried


def bias(q, k, pad):
    return -0.5 * (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs().float()


def bias_and_causal(q, k, pad):
    return bias(q, k, pad).masked_fill(~causal(q, k, pad), -torch.inf)


def bias_plus_causal(q, k, pad):
    return bias(q, k, pad) + additive(causal(q, k, pad))


def bias_of_integers(q, k, pad):
    return (1.0 - pad.long().cumsum(-1)[:, None, None]) * -1e4


def not_low_enough(q, k, pad):
    return additive(causal(q, k, pad), -5.0)


def prefix(q, k, pad):
    return causal(q, k, pad) | (torch.arange(k.shape[2]) < 3)


def prefix_and_padding(q, k, pad):
    return prefix(q, k, pad) & pad[:, None, None]


def window_with_a_hole(q, k, pad):
    q, k = positions(q, k)
    return (k <= q) & ((q - k < 2) | (q - k > 4))


def every_other_causal(q, k, pad):
    return 2 * torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def ordered_documents(q, k, pad):
    document = pad.long().cumsum(-1)
    return document[:, None, : q.shape[2], None] >= document[:, None, None]


def documents_plus_one(q, k, pad):  # a document sees the one before: proven, and so the twin of the next
    document = pad.long().cumsum(-1)
    return document[:, None, : q.shape[2], None] == document[:, None, None] + 1


def two_kinds_of_documents(q, k, pad):
    return packed_documents(q, k, pad) & (pad.int()[:, None, : q.shape[2], None] == pad.int().flip(1)[:, None, None])


def documents_by_other_positions(q, k, pad):
    position = pad.long().cumsum(-1)
    document = (torch.diff(position.flip(-1), prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = document[:, None, : q.shape[2], None] == document[:, None, None]
    return same & (position[:, None, None] <= position[:, None, : q.shape[2], None])


def by_head(q, k, pad):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + torch.arange(q.shape[1])[:, None, None]


def of_scores(q, k, pad):
    return q @ k.mT > 0


def rounded_distances(q, k, pad):
    q, k = positions(q, k)
    return (q * 0.1 - k * 0.1 > -0.25) & (k <= q + 5)


def wrapped_integers(q, k, pad):
    return (pad.to(torch.uint8) - 1 > 100)[:, None, None]


def written_through_a_view(q, k, pad):
    mask = torch.zeros(q.shape[2], k.shape[2])
    mask[:, 0] = -torch.inf
    return mask


CARRIED = {
    bias: "bias",
    bias_and_causal: "causal; bias",
    bias_plus_causal: "causal; bias",
    bias_of_integers: "bias",
    not_low_enough: "bias",
    prefix: "mask",
    prefix_and_padding: "keys where",
    window_with_a_hole: "causal; mask",
    every_other_causal: "mask",
    ordered_documents: "mask",
    two_kinds_of_documents: "causal; documents",
    documents_by_other_positions: "documents",
    by_head: "mask",
    of_scores: "mask",
    rounded_distances: "causal, offset 5; mask",
    wrapped_integers: "keys where",
    written_through_a_view: "bias",
}


@pytest.mark.parametrize("mask", CARRIED, ids=lambda mask: mask.__name__)
def test_what_no_argument_says_is_carried(mask, checked):
    proof = checked(mask)
    assert str(proof).startswith(CARRIED[mask])
    assert len(proof.carried) == (mask is not wrapped_integers)


def off_by_one(q, k, pad):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + 1


def strictly_causal(q, k, pad):
    return torch.arange(k.shape[2]) < torch.arange(q.shape[2])[:, None]


def window_one_wider(q, k, pad):
    q, k = positions(q, k)
    return (k <= q) & (q - k <= 3)


NEAR_MISSES = {
    off_by_one: "causal, offset 1",
    strictly_causal: "causal, offset -1",
    window_one_wider: "causal; window 4",
    documents_plus_one: "documents",
}


@pytest.mark.parametrize("mask", NEAR_MISSES, ids=lambda mask: mask.__name__)
def test_near_misses_are_told_apart(mask, checked):
    assert str(checked(mask)).startswith(NEAR_MISSES[mask])


@pytest.fixture(scope="module")
def checked():
    """The proof of a mask, checked at every shape; all masks are sites of one graph, since tracing takes the time."""
    masks = [*PROVEN, *CARRIED, *NEAR_MISSES]
    with torch.no_grad():
        function = check(*masks)

    def proof_of(mask):
        place = masks.index(mask)
        proven, wrong = function.sites[place], function.wrong.get(place)
        assert isinstance(proven, ProvenSite), proven.why
        if wrong is not None:
            raise wrong
        return proven.mask

    return proof_of


ATOMS = (causal, causal_bottom_right, padding, window, window_both_ways, chunks, packed_documents, query_padding,
         prefix, diagonal, key_length, key_start, off_by_one)


def test_compositions_of_masks_are_proven_right():
    choose = random.Random(torch.initial_seed())
    masks = []
    for _ in range(12):
        atoms = choose.choices(ATOMS, k=choose.randint(2, 4))
        joins = choose.choices(("and", "and", "or", "and not"), k=3)
        print([atom.__name__ for atom in atoms], joins)

        def mask(q, k, pad, atoms=atoms, joins=joins):
            keep = atoms[0](q, k, pad)
            for join, atom in zip(joins, atoms[1:], strict=False):
                other = atom(q, k, pad)
                keep = keep | other if join == "or" else keep & (other if join == "and" else ~other)
            return keep if len(atoms) % 2 else additive(keep)

        masks.append(mask)
    function = check(*masks)
    assert all(isinstance(proven, ProvenSite) for proven in function.sites)
    assert not function.wrong


def attend_by_hand(scores, fill, keep):
    return lambda q, k, v: torch.softmax(scores(torch.where(keep(q, k, None), q @ k.mT, fill)), -1) @ v


def test_a_fill_that_does_not_hide_is_refused():
    function = Proven(attend_by_hand(lambda s: s, -5.0, causal))
    function.call(*qkv(9))
    assert "not low enough" in function.sites[0].why


def test_a_fill_that_is_not_a_number_is_refused():
    function = Proven(attend_by_hand(lambda s: s, torch.nan, causal))
    function.call(*qkv(9))
    assert "not known" in function.sites[0].why


def test_a_fill_counts_with_the_factors_after_it():
    function = Proven(attend_by_hand(lambda s: s * 0.5, -1e4, causal))
    function.call(*qkv(9))
    assert "-5000" in function.sites[0].why
    function = Proven(attend_by_hand(lambda s: s * 0.5, -1e9, causal))
    function.call(*qkv(9))
    assert str(function.mask) == "causal"


def gated(gate, hide):
    def attend(q, k, v):
        hidden = -1e4 * (1 - hide(q, k, None).float())
        return torch.softmax((q @ k.mT) * gate(q, k, None).float() + hidden, -1) @ v

    return attend


def test_scores_multiplied_by_their_own_mask():
    function = Proven(gated(causal, causal))
    function.call(*qkv(9))
    assert str(function.mask) == "causal"
    for gate in (strictly_causal, off_by_one, prefix, bias):
        function = Proven(gated(gate, causal))
        function.call(*qkv(9))
        assert "scaled by a tensor" in function.sites[0].why


def test_is_causal_is_top_left_when_lengths_differ():
    function = Proven(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    function.call(*qkv(5, 9))
    assert str(function.mask) == "causal"


def test_one_query_needs_no_mask_tensor_for_what_sizes_say():
    def decode(q, k, v):
        keys = torch.arange(k.shape[2])
        last = k.shape[2] - 1
        return F.scaled_dot_product_attention(q, k, v, ((keys <= last) & (keys > last - 4))[None, None, None])

    function = Proven(decode)
    for length in (9, 17):
        function.call(*qkv(1, length))
    assert (function.mask.causal_offset, function.mask.visible_keys) != (None, TRUE)
    assert function.told[0][1] is not None  # a window


def test_a_cache_position_that_is_a_tensor():
    def decode(q, k, v, position):
        queries = torch.arange(q.shape[2]) + position
        keep = torch.arange(k.shape[2]) <= queries[:, None]
        return F.scaled_dot_product_attention(q, k, v, keep)

    function = Proven(decode)
    function.call(*qkv(1, 16), torch.tensor(7))
    assert str(function.mask).startswith("keys where")
    function = Proven(decode)
    function.call(*qkv(3, 16), torch.tensor(7))
    assert len(function.mask.carried) == 1


def test_a_mask_written_to_after_its_use_is_not_read_late():
    def attend(q, k, v, pad):
        scores = q @ k.mT
        scores = scores.masked_fill(pad[:, None, None].logical_not(), -torch.inf)
        weights = scores.softmax(-1)
        pad.logical_not_()
        return weights @ v

    function = Proven(attend)
    pad = random_padding(2, 9)
    inputs = qkv(9)
    expected = attend(*inputs, pad.clone())
    torch.testing.assert_close(function.call(*inputs, pad.clone()), expected)
    assert [node.op for node in function.mask.leaves.values()] == ["call_function"]  # what was computed of it before


def test_an_input_that_is_the_result_of_a_write_is_named_by_the_write():
    def attend(q, k, v, pad):
        return F.scaled_dot_product_attention(q, k, v, pad.logical_not_()[:, None, None])

    function = Proven(attend)
    pad = ~random_padding(2, 9)
    function.call(*qkv(9), pad)
    assert [node.op for node in function.mask.leaves.values()] == ["call_function"]


def test_a_position_that_is_moved_on_after_its_use():
    def decode(q, k, v, position):
        keep = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + position
        position.add_(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, keep)

    function = Proven(decode)
    position = torch.tensor(5)
    for _ in range(3):
        function.call(*qkv(1, 9), position)
    assert str(function.mask).startswith("keys where")


def test_layers_that_build_equal_masks_are_proved_once(monkeypatch):
    from sparsify.passes import prove

    proofs = []
    monkeypatch.setattr(prove, "_prove", lambda *args, real=prove._prove: proofs.append(1) or real(*args))

    def layers(q, k, v, pad):
        for _ in range(4):
            q = F.scaled_dot_product_attention(q, k, v, causal_and_padding(q, k, pad) + bias(q, k, pad))
        return q

    function = Proven(layers)
    function.call(*qkv(9), random_padding(2, 9))
    assert len(proofs) == 1
    assert len(function.sites) == 4
    for proven in function.sites:
        assert proven.mask.carried == proven.site.masks


# Buffers


class Buffered(nn.Module):
    """Attention whose mask is sliced from a buffer."""

    def __init__(self, buffer, read):
        super().__init__()
        self.register_buffer("mask", buffer, persistent=False)
        self.read = read

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.read(self.mask, q.shape[2], k.shape[2]))


TRIL = torch.ones(40, 40).tril()
BUFFERS = {
    "tril": (TRIL[None, None], lambda m, q, k: m[:, :, :q, :k] != 0, "causal"),
    "bool": (TRIL.bool(), lambda m, q, k: m[:q, :k], "causal"),
    "uint8": (TRIL.byte()[None, None], lambda m, q, k: m[:, :, :q, :k].bool(), "causal"),
    "end of the queries": (TRIL.bool()[None, None], lambda m, q, k: m[:, :, k - q: k, :k], "causal, offset"),
    "infinite": (torch.full((40, 40), -torch.inf).triu(1), lambda m, q, k: m[:q, :k], "causal"),
    "hidden": (~TRIL.bool(), lambda m, q, k: additive(~m[:q, :k]), "causal"),
    "band": ((TRIL - TRIL.tril(-3)).bool(), lambda m, q, k: m[:q, :k], "causal; window 3"),
    "everything": (torch.ones(40, 40, dtype=torch.bool), lambda m, q, k: m[:q, :k], "none"),
    "positions": (torch.arange(40)[None], lambda m, q, k: m[0, :q, None] >= m[:, :k], "causal"),
    "transposed": (TRIL.mT.bool(), lambda m, q, k: m.mT[:q, :k], "causal"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_proven_by_reading_them(name):
    buffer, read, proof = BUFFERS[name]
    function = Proven(Buffered(buffer.clone(), read))
    for q_len, kv_len in [(9, 9), (7, 12), (5, 31)]:
        function.call(*qkv(q_len, kv_len))
    assert str(function.mask).startswith(proof)
    assert not function.mask.carried
    assert function.graphs == 1


@pytest.mark.parametrize("change", [
    lambda module: module.mask.fill_(True),
    lambda module: module.mask[3].fill_(True),
    lambda module: module.mask.copy_(module.mask.mT.clone()),
    lambda module: module.register_buffer("mask", torch.ones_like(module.mask)),
    lambda module: setattr(module, "mask", module.mask.flip(0)),
    lambda module: module.load_state_dict({**module.state_dict(), "mask": torch.ones_like(module.mask)}),
    lambda module: module.load_state_dict({**module.state_dict(), "mask": torch.ones_like(module.mask)}, assign=True),
    lambda module: module._apply(lambda x: x.flip(0)),
])
def test_a_buffer_that_changes_is_read_again(change):
    module = Buffered(TRIL.bool().clone(), lambda m, q, k: m[:q, :k])
    module.register_buffer("mask", module.mask)
    module.other = nn.Linear(2, 2)
    function = Proven(module)
    inputs = qkv(9)
    for _ in range(4):  # Dynamo skips the guards of a module that did not change
        function.call(*inputs)
    assert (str(function.mask), function.graphs) == ("causal", 1)
    change(module)
    for _ in range(3):
        torch.testing.assert_close(function.call(*inputs), module(*inputs))
    assert str(function.mask) != "causal"


def test_a_write_that_changes_nothing_read_compiles_nothing():
    module = Buffered(TRIL.bool().clone(), lambda m, q, k: m[:q, :k])
    function = Proven(module)
    function.call(*qkv(9))
    module.mask.copy_(TRIL.bool())
    function.call(*qkv(9))
    assert function.graphs == 1


def test_layers_with_equal_buffers_share_a_graph():
    layers = [Buffered(TRIL.bool().clone(), lambda m, q, k: m[:q, :k]) for _ in range(3)]
    read = layers[0].read
    for layer in layers:
        layer.read = read
    function = Proven(lambda layer, q, k, v: layer(q, k, v))
    for layer in layers:
        function.call(layer, *qkv(9))
    assert function.graphs == 1
    layers[1].mask.fill_(True)
    for layer in layers:
        inputs = qkv(9)
        torch.testing.assert_close(function.call(layer, *inputs), layer(*inputs))


def test_arguments_of_the_call_are_not_read():
    function = Proven(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask))
    function.call(*qkv(9), torch.ones(9, 9, dtype=torch.bool).tril())
    assert len(function.mask.carried) == 1


def test_a_buffer_that_the_graph_writes_to_is_not_read():
    def read(mask, q, k):
        mask.logical_not_()
        return mask[:q, :k]

    module = Buffered(~TRIL.bool(), read)
    function = Proven(module)
    function.call(*qkv(9))
    assert not isinstance(function.sites[0], ProvenSite) or function.mask.carried


def test_a_buffer_that_the_graph_writes_to_by_another_name_is_not_read():
    class Aliased(Buffered):
        def forward(self, q, k, v):
            self.alias[3].fill_(True)
            return super().forward(q, k, v)

    module = Aliased(TRIL.bool().clone(), lambda m, q, k: m[:q, :k])
    module.alias = module.mask[:]
    function = Proven(module)
    inputs = qkv(9)
    function.call(*inputs)
    assert not isinstance(function.sites[0], ProvenSite) or function.mask.carried


def test_a_counter_is_not_a_constant():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("position", torch.tensor(4))

        def forward(self, q, k, v):
            keep = torch.arange(k.shape[2]) <= self.position
            return F.scaled_dot_product_attention(q, k, v, keep[None, None, None])

    module = Cached()
    function = Proven(module)
    for _ in range(3):
        inputs = qkv(1, 9)
        torch.testing.assert_close(function.call(*inputs), module(*inputs))
        module.position += 1
    assert str(function.mask).startswith("keys where")
    assert function.graphs == 1


def test_values_are_read_as_what_they_are():
    ones = torch.ones(7, 9, dtype=torch.bool)
    for low, high in itertools.product((-6, -2, 0, 3, 8), repeat=2):
        band = ones.triu(low) & ones.tril(high)
        reading = read_values(band)
        assert low <= high or reading == Same(False)
        if isinstance(reading, Band):
            column = torch.arange(9) - torch.arange(7)[:, None]
            again = torch.ones_like(band) if reading.low is None else column >= reading.low
            again = again & (column <= reading.high) if reading.high is not None else again
            assert torch.equal(torch.where(again, reading.inside, reading.outside), band)
    assert read_values(torch.arange(3, 30, 4)) == Ramp(0, 3, 4)
    assert read_values(torch.full((1, 5, 5), -torch.inf)) == Same(-torch.inf)
    hole = ones.tril()
    hole[4, 2] = False
    for values in (hole, torch.rand(5, 5), torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), torch.rand(5),
                   torch.ones(3, 4, 5).tril(), torch.tensor([1, 2, 4]), torch.empty(0)):
        assert read_values(values) is None
