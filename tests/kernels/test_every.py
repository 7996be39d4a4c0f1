"""Lists of all allowed blocks: the same as the rule makes of the allowed set."""

import pytest
import torch

from sparsify.kernels import blocks, rule
from sparsify.kernels.every import covers, every_block
from sparsify.kernels.masks import Masks

CASES = [(200, 300, 100, None), (1, 1, 0, None), (130, 65, -70, None), (129, 200, None, None), (300, 300, 0, 1),
         (300, 1000, 700, 64), (257, 1000, 743, 65), (640, 640, 0, 129), (640, 500, 100, 63), (300, 200, -100, 20),
         (130, 70_000, 69_870, None), (500, 200, 0, 7), (200, 300, -500, None)]


def agree(device, L, S, offset, window, told=None):
    masks = Masks(offset, window)
    q = torch.empty(2, 3, L, 16, device=device)
    expected = rule.every_block(blocks.allowed_blocks(masks, L, S, device), 2, 3)
    ours = every_block(q, S, masks if told is None else told)
    return torch.equal(ours.kept, expected.kept) and torch.equal(ours.counts, expected.counts)


@pytest.mark.parametrize(("L", "S", "offset", "window"), CASES)
def test_lists_are_those_of_the_rule(L, S, offset, window, device, poisoned_memory):
    assert agree(device, L, S, offset, window)


def test_a_wrong_edge_is_noticed(device):
    assert not agree(device, 300, 1000, 700, 64, told=Masks(700, 129))
    assert not agree(device, 300, 1000, 704, None, told=Masks(705, None))


def test_what_hides_single_keys_is_not_covered():
    assert covers(Masks(0, 5)) and covers(Masks(softcap=2.0))
    assert not covers(Masks(key_mask=torch.ones(1, 4, dtype=torch.bool)))
    documents = torch.zeros(1, 4, dtype=torch.int32)
    assert not covers(Masks(query_documents=documents, key_documents=documents))
