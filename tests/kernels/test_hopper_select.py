"""Selection in eight bits: peaks and lists as the float64 rule makes them of the same rounded summaries."""

import pytest
import torch
from kernel_cases import RULE, Case, assert_lists_obey, draw_masks, qkv
from torch import Tensor

from sparsify.kernels import blocks, hopper_select, oracle, rule
from sparsify.kernels.masks import Masks
from sparsify.kernels.select import select_blocks

CASES = [
    Case(1, 8, 2, 4096, 4096, 128, 128, 0),
    Case(2, 4, 1, 513, 9000, 64, 64, 9000 - 513),
    Case(1, 4, 4, 777, 5555, 128, 128, None),
    Case(1, 3, 3, 640, 4096, 64, 64, None),
    Case(2, 6, 3, 1024, 500, 128, 128, -100),
    Case(1, 2, 1, 400, 3007, 128, 128, 2623),  # the first row of a query block sees no key of a block that is cut
    Case(1, 2, 1, 129, 65, 64, 64, 0),
    Case(1, 4, 1, 1000, 20000, 128, 128, 20001),  # nothing is causal about it
    Case(2, 4, 2, 700, 2900, 128, 128, 2200, padding=True),
    Case(3, 4, 4, 513, 1500, 64, 64, None, padding=True),
]
BAND = 0.15
"""3 % each for the exponentials of a block and of its row; bfloat16 sums; summaries that round the other way."""


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """x in e4m3 on a scale where `largest` is 448."""
    return e4m3(x * (448 / largest)) / (448 / largest)


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).float().to(torch.float8_e4m3fn).to(x.dtype)


def eight_bit_peaks(q: Tensor, k: Tensor, masks: Masks, singles: int, scale: float) -> Tensor:
    """What the kernel estimates, in float64; edge blocks count as 1."""
    group = q.shape[1] // k.shape[1]
    shown = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if masks.key_mask is None else masks.key_mask
    summaries = oracle.summarise_keys(k, singles, shown)
    picked = slice(None, None, blocks.count_blocks(k.shape[2], hopper_select.SAMPLES))
    sample, seen = k[:, :, picked], shown[:, None, picked, None]
    center = (sample * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    low, high = (sample.masked_fill(~seen, sign * torch.inf) for sign in (1, -1))
    low, high = low.amin(2, keepdim=True), high.amax(2, keepdim=True)
    reach = torch.maximum(high - center, center - low).amax(-1, keepdim=True) * hopper_select.HEADROOM
    spread_bound = ((high - low).square() / 4).amax(-1, keepdim=True) * hopper_select.HEADROOM
    mean = rounded(summaries.mean.double() - center, reach)
    single = rounded(summaries.singles.double() - center[:, :, None], reach[..., None])
    variance = rounded(summaries.variance.double(), spread_bound)
    power = torch.exp2(q.abs().amax(-1, keepdim=True).log2().floor())  # queries come in powers of two
    q8 = e4m3(q * 128 / power) * power / 128 * scale
    squares = e4m3((q * 8 / power).square()) * (power / 8 * scale).square()

    def of_heads(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1).mT

    log_count = summaries.rest_count.double().log()[:, None, None]  # -inf where there is no rest
    gain = oracle.frozen_log_mean_exp(squares @ of_heads(variance), log_count.clamp(min=0))
    mass = q8 @ of_heads(mean) + gain + log_count
    real = [(i < summaries.single_count)[:, None, None] for i in range(singles)]
    scores = [(q8 @ of_heads(x)).masked_fill(~real[i], -torch.inf) for i, x in enumerate(single.unbind(2))]
    half = (singles + 1) // 2
    for i in range(half):  # the larger of two stands for both
        mass = torch.logaddexp(mass, torch.stack(scores[i::half]).amax(0))
    length, keys = q.shape[2], k.shape[2]
    last = torch.arange(mass.shape[3], device=q.device) == keys // blocks.KEY_BLOCK  # ragged, if there is one
    offset = None if masks.causal_offset is None else masks.causal_offset - 1  # the last block the first row sees, too
    edge = blocks.boundary_blocks(length, keys, offset, q.device) | last
    causal = blocks.allowed_blocks(Masks(masks.causal_offset), length, keys, q.device)[0]
    allowed = blocks.allowed_blocks(masks, length, keys, q.device)
    edge_rows, allowed_rows = (x.repeat_interleave(blocks.QUERY_BLOCK, -2)[..., :length, :] for x in (edge, allowed))
    exact = oracle.exact_block_mass(q8, rounded(k - center, reach), 1.0, masks)
    mass = torch.where(edge_rows, exact, mass).masked_fill(~allowed_rows[:, None], -torch.inf)
    peaks = oracle.peaks(oracle.shares_of(mass, masks))
    return torch.where(edge & causal, 1.0, peaks)


def check(rng, case, dtype, *, tolerance=0.02, singles=6, told=None):
    """`told` is the causal offset that the kernel is told instead of the truth."""
    q, k, _ = qkv(rng, case, dtype, spread=1.5)
    k = k + 3 * torch.randn(case.D, generator=rng, device=rng.device).to(dtype)  # keys of a model are off center
    masks = draw_masks(rng, case)
    call = {"scale": case.D**-0.5, "singles": singles}
    given = masks if told is None else Masks(told)
    assert hopper_select.why_not(q, k, given, singles) is None
    peaks = hopper_select.estimated_peaks(q, k, masks=given, **call)
    exact = eight_bit_peaks(q.double(), k.double(), masks, **call)
    band = BAND * exact + 1e-3
    worst = ((peaks - exact).abs() / band).nan_to_num(nan=torch.inf).max()
    assert worst <= 1, f"peaks are {float(worst):.3g} bands off"
    lists = select_blocks(q, k, masks=given, tolerance=tolerance, max_density=0.8, **RULE, **call)
    assert_lists_obey(lists, exact, band, case, masks, tolerance, 0.8)
    again = select_blocks(q, k, masks=given, tolerance=tolerance, max_density=0.8, **RULE, **call)
    assert torch.equal(lists.kept, again.kept) and torch.equal(lists.counts, again.counts)


@pytest.fixture(autouse=True)
def _needs_hopper():
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_selection_follows_the_rule_on_rounded_summaries(case, dtype, rng, poisoned_memory):
    check(rng, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("singles", [0, 1, 2])
def test_every_number_of_singles(singles, rng, poisoned_memory):
    check(rng, CASES[0], torch.bfloat16, singles=singles)


@pytest.mark.gpu
def test_a_wrong_offset_is_noticed(rng):
    with pytest.raises(AssertionError):
        check(rng, CASES[1], torch.bfloat16, told=CASES[1].causal_offset - 64)


@pytest.mark.gpu
def test_scores_far_above_the_edge_are_kept(rng):
    """The reference of the exponentials is the edge: a block that outweighs it by any factor is kept."""
    case = CASES[0]
    q, k, _ = qkv(rng, case, torch.bfloat16)
    direction = torch.randn(case.D, generator=rng, device=rng.device).bfloat16()
    q, k = q + 4 * direction, k.clone()
    k[:, :, 640:1280:64] += 40 * direction  # log2 of their share of a row: hundreds above all others
    masks = draw_masks(rng, case)
    lists = select_blocks(q, k, masks=masks, scale=1.0, singles=6, tolerance=0.01, max_density=1.0, sinks=0, local=0)
    kept = rule.unpack(lists, case.blocks)
    assert kept[:, :, 12:, 10:20].all()
