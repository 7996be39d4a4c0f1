"""Lists in pieces give what whole lists give; the pieces are a partition, and the card is shared evenly."""

import pytest
import torch
from kernel_cases import (
    Case,
    assert_attention_is_right,
    assert_hidden_keys_do_not_matter,
    draw_masks,
    on_hopper,
    qkv,
    random_lists,
)

from sparsify.kernels import attend, blocks, hopper, hopper_native, splits
from sparsify.kernels.hopper_coverage import why_not
from sparsify.kernels.masks import Masks
from sparsify.kernels.scores import LOG2_E

PROGRAMS = 128 if torch.cuda.is_available() else 32  # multiprocessors that the launchers are told of
SMALL = [
    Case(1, 2, 1, 200, 300, 40, 24, 100),  # odd dims, prefix, ragged last block
    Case(2, 2, 2, 130, 65, 16, 16, -70),  # rows that see nothing; fewer entries than units
    Case(1, 2, 1, 129, 400, 64, 64, None),
    Case(1, 1, 1, 1, 1, 32, 32, 0),
    Case(2, 2, 1, 70, 333, 32, 16, 263, padding=True),
    Case(1, 2, 1, 150, 300, 16, 16, 150, extras=(90,)),
    Case(1, 2, 1, 130, 190, 16, 16, -70, extras=("sinks",)),  # rows that see a sink and nothing else
    Case(2, 2, 1, 70, 333, 16, 16, 263, padding=True, extras=("bias", "cap")),
    Case(2, 2, 2, 130, 190, 16, 16, -70, extras=(100, "documents", "bool", "cap", "sinks")),
]
LARGE = [
    Case(1, 8, 2, 256, 5000, 128, 128, 5000 - 256),
    Case(2, 4, 1, 200, 3001, 64, 64, 2801),
    Case(1, 4, 4, 300, 1555, 256, 256, None),
    Case(1, 4, 2, 300, 900, 80, 96, 600, padding=True),
    Case(1, 4, 2, 500, 2000, 128, 128, 1500, extras=(700, "sinks")),
    Case(2, 4, 4, 257, 777, 128, 128, None, padding=True, extras=("bias", "documents", "cap")),
]
HOPPER = [
    Case(1, 8, 2, 256, 5000, 128, 128, 5000 - 256),
    Case(1, 8, 1, 1000, 1000, 128, 128, 0),  # lists of one pair up to eight
    Case(2, 4, 2, 200, 3001, 64, 64, 2801),  # odd prefix, ragged last block
    Case(1, 2, 2, 640, 704, 128, 128, 64),  # a padding id behind the diagonal
    Case(1, 2, 1, 300, 200, 64, 64, -150),  # rows that see nothing; fewer pairs than units
    Case(3, 4, 4, 129, 2049, 64, 64, None),
    Case(1, 1, 1, 1, 1, 128, 128, 0),
]
HOPPER_MASKED = [
    Case(2, 4, 2, 257, 1777, 128, 128, None, padding=True),
    Case(1, 4, 1, 500, 2000, 128, 128, 1500, extras=(300, "sinks")),
    Case(1, 2, 1, 300, 200, 128, 128, -150, extras=("sinks",)),  # rows that see a sink and nothing else
    Case(2, 4, 4, 257, 777, 64, 64, 520, padding=True, extras=(200, "documents", "cap", "sinks")),
    Case(2, 4, 2, 257, 778, 128, 128, None, padding=True, extras=("bias",)),  # a tile is one key block
    Case(2, 4, 1, 300, 200, 128, 128, -100, padding=True, extras=(150, "documents", "bool", "cap", "sinks")),
    Case(1, 4, 2, 300, 1000, 96, 96, 700),
    Case(1, 4, 1, 257, 1000, 192, 128, 743),
    Case(1, 8, 2, 300, 1200, 256, 256, 900),
    Case(1, 2, 1, 300, 200, 256, 256, -150, extras=("sinks",)),
    Case(1, 2, 2, 129, 300, 64, 200, None),
]
# One dtype each: every case is a compilation.
MIXED = [(case, (torch.bfloat16, torch.float16)[i % 2]) for i, case in enumerate(HOPPER_MASKED)]


@pytest.fixture
def by_python(monkeypatch):
    """Nothing is launched from C++, where cuts are not seen; test_hopper_native.py compares the two."""
    monkeypatch.setattr(hopper_native, "attend", lambda *args, **call: False)


@pytest.fixture
def cuts(monkeypatch, by_python):
    """Any call of few query blocks is cut, into pieces of a tile or more; the list has an entry for each that was."""
    made = []
    monkeypatch.setattr(splits, "FEWEST_KEY_BLOCKS", 0)
    monkeypatch.setattr(splits, "SHORTEST", 1)
    for launcher in (attend, hopper):
        monkeypatch.setattr(launcher, "multiprocessors", lambda device: PROGRAMS)
        monkeypatch.setattr(launcher, "cut_lists", lambda *args, **call: made.append(splits.cut_lists(*args, **call))
                            or made[-1])
    return made


def read(unit):
    """Slot, row, first tile and tiles."""
    tiles = splits.TILES.value
    return (unit >> splits.SLOT_AT.value, unit >> splits.ROW_AT.value & splits.ROW.value,
            unit >> splits.FIRST_AT.value & tiles, unit & tiles)


@pytest.mark.parametrize("idle", [0, 40])
@pytest.mark.parametrize(("rows", "most", "tile", "wanted"), [
    (16, 512, 2, 132), (1, 40, 1, 40), (7, 2, 2, 100), (60, 300, 2, 128), (128, 40, 1, 384), (3, 100_000, 2, 132)])
def test_pieces_are_a_partition(rows, most, tile, wanted, idle, rng, device, poisoned_memory):
    counts = (torch.randint(1, most // tile + 1, (1, 1, rows), generator=rng, device=device) * tile).int()
    cut = splits.cut_lists(counts, tile, wanted, idle)
    lists, firsts = (counts.flatten() // tile).tolist(), cut.firsts.tolist()
    total = firsts[-1]
    units, behind = cut.units.tolist()[:total], cut.units.tolist()[total:]
    assert cut.counter.item() == 0 and total <= cut.slots and firsts[0] == 0
    by_slot = sorted(map(read, units))
    assert [slot for slot, *_ in by_slot] == list(range(total))
    covered = [0] * rows
    for slot, row, first, tiles in by_slot:
        assert firsts[row] <= slot < firsts[row + 1] and first == covered[row] and tiles > 0
        covered[row] += tiles
    assert covered == lists
    lengths = [read(unit)[3] for unit in units]
    longest = max(-(-sum(lists) // wanted), splits.SHORTEST // tile, 1)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] <= longest
    dummies = [read(unit) for unit in behind if unit >= 0]
    assert dummies == [(slot, 0, 0, 1) for slot in range(total, max(total, idle))]


def test_a_card_that_is_full_cuts_nothing():
    assert splits.units_for(16, 512, 132) == 132
    assert splits.units_for(66, 512, 132) == 132
    assert splits.units_for(67, 512, 132) == 0, "more than half of the card is busy"
    assert splits.units_for(16, splits.FEWEST_KEY_BLOCKS - 1, 132) == 0, "short lists"
    assert splits.units_for(splits.MOST_ROWS + 1, 512, 1000) == 0
    assert splits.units_for(splits.MOST_ROWS, 512, 1000) + splits.MOST_ROWS <= splits.MOST_UNITS


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_pieces_are_as_good_as_torch(case, dtype, cuts, rng, poisoned_memory):
    assert_attention_is_right(attend.block_sparse_attention, rng, case, dtype, density=0.7)
    assert len(cuts) == 1


def test_padding_keys_may_hold_anything(cuts, rng):
    assert_hidden_keys_do_not_matter(attend.block_sparse_attention, rng, SMALL[4], torch.float32)
    assert len(cuts) == 2


@pytest.mark.parametrize("changed", ["sinks", "lost", "foreign", "weights"])
def test_a_wrong_merge_is_noticed(changed, cuts, rng, monkeypatch):
    """The twin: a sink in every piece, a piece that is lost, one of another list, pieces of equal weight."""
    def wrong(partial, sums, cut, sink_logits, out, lse):
        if changed == "sinks":
            sums = torch.logaddexp2(sums, sink_logits.max() * LOG2_E)
        elif changed == "lost":
            cut.firsts[-1] -= 1
        elif changed == "foreign":
            cut.firsts[1:] -= 1
        else:
            sums = sums.clamp(0, 0)
        splits.merge_pieces(partial, sums, cut, sink_logits, out, lse)
    monkeypatch.setattr(attend, "merge_pieces", wrong)
    case = Case(1, 2, 1, 150, 256, 16, 16, 106, extras=("sinks",))  # no padding id: every piece weighs
    with pytest.raises(AssertionError, match="error"):
        assert_attention_is_right(attend.block_sparse_attention, rng, case, torch.float32, density=1.0)


def same_bits(attention, case, dtype, rng):
    q, k, v = qkv(rng, case, dtype)
    masks = draw_masks(rng, case)
    lists = random_lists(rng, case, masks, 0.6)
    first, again = (attention(q, k, v, *lists, scale=0.3, masks=masks) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_same_bits_twice(cuts, rng):
    assert same_bits(attend.block_sparse_attention, SMALL[6], torch.float16, rng)


def test_whole_lists_stay_whole(rng, monkeypatch):
    """The twin of all: without the fixture these shapes are too short, or fill the card."""
    monkeypatch.setattr(attend, "cut_lists", lambda *args: pytest.fail("cut"))
    assert_attention_is_right(attend.block_sparse_attention, rng, SMALL[0], torch.float32, density=0.7)
    monkeypatch.setattr(splits, "FEWEST_KEY_BLOCKS", 0)
    monkeypatch.setattr(attend, "multiprocessors", lambda device: 1)
    assert_attention_is_right(attend.block_sparse_attention, rng, SMALL[0], torch.float32, density=0.7)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_pieces_are_as_good_as_torch(case, dtype, density, cuts, rng, poisoned_memory):
    assert_attention_is_right(attend.block_sparse_attention, rng, case, dtype, density, scale=case.D**-0.5)
    assert len(cuts) == 1


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.bfloat16) for case in HOPPER), *MIXED], ids=str)
def test_hopper_pieces_are_as_good_as_torch(case, dtype, density, cuts, rng, poisoned_memory):
    assert why_not(*qkv(rng, case, dtype), draw_masks(rng, case)) is None
    assert_attention_is_right(hopper.block_sparse_attention, rng, case, dtype, density, scale=case.D**-0.5)
    assert len(cuts) == 1


def attend_all(q, k, v, kept, counts, *, scale, masks):
    """Exact attention where others take lists."""
    return hopper.attention(q, k, v, scale=scale, masks=masks)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float16) for case in HOPPER), *MIXED[:4]], ids=str)
def test_the_walk_over_all_blocks_is_cut_too(case, dtype, cuts, rng, poisoned_memory):
    assert_attention_is_right(attend_all, rng, case, dtype, 1.0, scale=case.D**-0.5)
    assert len(cuts) == 1


@pytest.mark.gpu
@on_hopper
def test_hopper_gives_the_same_bits_twice(cuts, rng):
    assert same_bits(hopper.block_sparse_attention, HOPPER[0], torch.bfloat16, rng)


@pytest.mark.gpu
@on_hopper
def test_hopper_cuts_by_the_card_alone(rng, by_python, monkeypatch):
    """Real numbers: a chunk of eight heads is cut, the same chunk of a model with 40 heads is not."""
    made = []
    monkeypatch.setattr(hopper, "cut_lists", lambda *args, **call: made.append(splits.cut_lists(*args, **call))
                        or made[-1])
    few = Case(1, 8, 2, 256, 8192, 128, 128, 8192 - 256)
    assert_attention_is_right(hopper.block_sparse_attention, rng, few, torch.bfloat16, 0.25, scale=0.09)
    assert len(made) == 1
    many = Case(1, 40, 8, 256, 8192, 128, 128, 8192 - 256)
    assert_attention_is_right(hopper.block_sparse_attention, rng, many, torch.bfloat16, 0.25, scale=0.09)
    assert len(made) == 1


@pytest.mark.gpu
@on_hopper
def test_pieces_live_in_a_cuda_graph(cuts, rng):
    """Captured once, replayed on other numbers and other lists."""
    case = HOPPER[0]
    masks = Masks(case.causal_offset)
    given = [*qkv(rng, case, torch.bfloat16), *random_lists(rng, case, masks, 0.3)]

    def call():
        return hopper.block_sparse_attention(*given, scale=0.09, masks=masks)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for static, fresh in zip(given, [*qkv(rng, case, torch.bfloat16), *random_lists(rng, case, masks, 0.8)],
                             strict=True):
        static.copy_(fresh)
    before = out.clone()
    graph.replay()
    expected = call()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and not torch.equal(out, before)


def test_a_unit_has_room_for_its_numbers():
    tiles, row = splits.TILES.value, splits.ROW.value
    assert blocks.count_blocks(1 << 27, blocks.KEY_BLOCK) <= tiles < 1 << splits.FIRST_AT.value
    assert tiles << splits.FIRST_AT.value < 1 << splits.ROW_AT.value
    assert splits.MOST_ROWS - 1 <= row and row << splits.ROW_AT.value < 1 << splits.SLOT_AT.value
    assert splits.MOST_UNITS << splits.SLOT_AT.value < 1 << 63
