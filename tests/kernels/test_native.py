"""The compiled CPU path, in every width that it can be compiled for, against float64."""

import platform

import pytest
import torch

from sparsify.kernels import native, oracle, rule
from sparsify.kernels.blocks import KEY_BLOCK, KeptLists, allowed_blocks, count_blocks
from sparsify.kernels.masks import Masks
from tests.numerics import assert_as_good_as_torch
from tests.ops.cases import EXTRAS, MASKS, Case, plain_attention

CPU = torch.device("cpu")
WIDTHS = [(), ("-DNO_MATRIX_REGISTERS",), ("-march=haswell",), ("-march=x86-64",)]
pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")


@pytest.fixture
def rng() -> torch.Generator:
    """On the CPU, also where there is a GPU."""
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=WIDTHS, ids=lambda flags: flags[0] if flags else "native")
def width(request, monkeypatch):
    """The library as it is built elsewhere."""
    if request.param and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of another architecture")
    if "haswell" in str(request.param) and " avx2 " not in native._processor():
        pytest.skip("this processor has no AVX2")
    library = native.build(*request.param) if request.param else native._library()
    monkeypatch.setattr(native, "_library", lambda: library)


def attend(case: Case, kept: torch.Tensor, peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lists = rule.pack(kept, peaks, allowed_blocks(case.masks, **case.sizes, device=CPU))
    return native.block_sparse_attention(*case.qkv, *lists, scale=case.scale, masks=case.masks)


def check(case: Case, singles: int = 6) -> None:
    """Peaks against their definition, attention over what is kept and over everything against float64."""
    peaks = native.estimated_peaks(*case.qkv[:2], scale=case.scale, masks=case.masks, singles=singles)
    true = oracle.peaks(oracle.estimated_shares(*case.double().qkv[:2], **case.named, singles=singles))
    # A share is exp(score - lse): what rounding moves scores by, and 3e-6 of its exponentials.
    torch.testing.assert_close(peaks.double(), true, rtol=0, atol=2e-5 + 2e-7 * case.units)
    allowed = allowed_blocks(case.masks, **case.sizes, device=CPU)[:, None].expand(peaks.shape)
    for tolerance in (0.0, 0.1):
        out, lse = attend(case, allowed & (peaks >= tolerance), peaks)
        # Evening out may keep one block more: ask the lists, not the mask.
        lists = rule.pack(allowed & (peaks >= tolerance), peaks, allowed[:, 0])
        kept = rule.unpack(lists, peaks.shape[3])
        exact, exact_lse = oracle.attention(*case.double().qkv, **case.named, kept=kept)
        assert_as_good_as_torch(out, plain_attention(case, kept), exact, case.units)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5 + 2e-7 * case.units)


@pytest.mark.parametrize("shape", [*MASKS, *EXTRAS], ids=str)
def test_every_mask_in_every_width(shape, width, rng, poisoned_memory):
    check(Case.random(rng, CPU, *shape))


@pytest.mark.parametrize("head_dims", [(16, 16), (17, 19), (33, 31), (80, 96), (128, 64), (192, 128), (256, 256)],
                         ids=str)
def test_head_dims(head_dims, width, rng, poisoned_memory):
    check(Case.random(rng, CPU, 130, 200, 70, None, (), head_dims))
    check(Case.random(rng, CPU, 130, 200, 70, "left", (90, "cap", "sinks"), head_dims))


@pytest.mark.parametrize("singles", [1, 2, 5, 63])
def test_singles(singles, width, rng, poisoned_memory):
    check(Case.random(rng, CPU, 300, 2200, 1900, "holes"), singles)


@pytest.mark.parametrize("slope", [-120.0, -7.0, 7.0, 120.0])
def test_scores_may_rise_and_fall_by_any_amount(slope, width, rng, poisoned_memory):
    """References are raised late, or never: half of the rows climb by `slope` a block, the others descend."""
    case = Case.random(rng, CPU, 200, 1500, None, None)
    case.q[..., 0], case.k[..., 0] = 8.0, torch.arange(1500) // KEY_BLOCK * slope
    case.q[:, :, ::2, 0] = -8.0
    check(case)
    check(case.but(sink_logits=torch.tensor([0.0, 1000.0, -1000.0, 30.0])))


def test_large_values(width, rng, poisoned_memory):
    case = Case.random(rng, CPU, 300, 300, 0, None)
    case.v.mul_(1e4)
    case.k[:, :, 100] = 1e4
    check(case)


def test_denormals_are_zeros_inside_only(width, rng):
    case = Case.random(rng, CPU, 200, 200, 0, None)
    case.k[:, :, ::3] *= 1e-41
    check(case)
    assert torch.tensor(1e-41).mul(0.5).item() > 0


def test_nan_stays_in_its_row(width, rng):
    case = Case.random(rng, CPU, 300, 300, 0, None)
    case.q[:, :, 150] = torch.nan
    case.k[:, :, 280, 3] = torch.nan
    peaks = native.estimated_peaks(*case.qkv[:2], scale=case.scale, masks=case.masks, singles=6)
    allowed = allowed_blocks(case.masks, **case.sizes, device=CPU)[:, None].expand(peaks.shape)
    out, _ = attend(case, allowed, peaks)
    bad = torch.arange(300) >= 280
    bad[150] = True
    assert torch.equal(out.isnan().all(-1), bad.expand(2, 4, 300))
    assert torch.equal(out.isnan().any(-1), bad.expand(2, 4, 300))


def test_same_inputs_give_the_same_bits(width, rng):
    case = Case.random(rng, CPU, 1000, 1000, 0, None)
    lists = KeptLists(*rule.every_block(allowed_blocks(case.masks, **case.sizes, device=CPU), 2, 4))
    call = {"scale": case.scale, "masks": case.masks}
    first = native.block_sparse_attention(*case.qkv, *lists, **call)
    peaks = native.estimated_peaks(*case.qkv[:2], **call, singles=6)
    for _ in range(3):
        for a, b in zip(first, native.block_sparse_attention(*case.qkv, *lists, **call), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(peaks, native.estimated_peaks(*case.qkv[:2], **call, singles=6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions(dtype, width, rng, poisoned_memory):
    case = Case.random(rng, CPU, 300, 300, 0, None).to(dtype)
    lists = rule.every_block(allowed_blocks(case.masks, **case.sizes, device=CPU), 2, 4)
    out, _ = native.block_sparse_attention(*case.qkv, *lists, scale=case.scale, masks=case.masks)
    assert out.dtype == dtype
    assert_as_good_as_torch(out, plain_attention(case), oracle.attention(*case.double().qkv, **case.named)[0],
                            case.units)


def test_a_wrong_list_is_noticed(width, rng):
    """The twin: with one block fewer the judgement fails."""
    case = Case.random(rng, CPU, 300, 300, None, None)
    kept = torch.ones(2, 4, 3, count_blocks(300, KEY_BLOCK), dtype=torch.bool)
    kept[:, :, 1, 1] = False
    out, _ = attend(case, kept, torch.zeros(kept.shape))
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(out, plain_attention(case), oracle.attention(*case.double().qkv, **case.named)[0],
                                case.units)


def test_without_permission_for_matrix_registers(monkeypatch):
    """A process that may not use them gets the library without."""
    class Refused:
        def ready(self) -> int:
            return 0

    built: list[tuple[str, ...]] = []

    def build(*flags: str) -> object:
        built.append(flags)
        return Refused()

    monkeypatch.setattr(native, "build", build)
    native._library.__wrapped__()
    assert built == [(), ("-DNO_MATRIX_REGISTERS",)]


def test_masks_of_nothing(width):
    """One query, one key."""
    q = torch.randn(1, 1, 1, 8)
    lists = rule.every_block(allowed_blocks(Masks(), 1, 1, CPU), 1, 1)
    out, _ = native.block_sparse_attention(q, q, q, *lists, scale=1.0, masks=Masks())
    torch.testing.assert_close(out, q)
