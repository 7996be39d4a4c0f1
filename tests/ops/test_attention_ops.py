"""The ops against float64 on the same rounded inputs, on whatever device there is."""

import itertools

import pytest
import torch

from sparsify import ops
from sparsify.errors import OptionError, ShapeError
from sparsify.kernels import blocks, composite, estimate, gather, native, oracle, rule
from sparsify.kernels.blocks import KEY_BLOCK, KeptLists, allowed_blocks, count_blocks
from sparsify.kernels.masks import Masks
from sparsify.ops import crossover
from tests.numerics import assert_as_good_as_torch
from tests.ops.cases import EXTRAS, MASKS, Case, plain_attention

BUDGET = {"max_density": 0.9, "sinks": 1, "local": 1, "singles": 6}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU_PATHS = [
    pytest.param(native, marks=pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")),
    pytest.param(gather, id="gather"),
]


@pytest.fixture(autouse=True)
def selection_always_pays(monkeypatch):
    """Small calls run sparse on a GPU too."""
    monkeypatch.setattr(crossover, "LAUNCH_SECONDS", 0.0)


@pytest.fixture(params=[*MASKS, *EXTRAS], ids=str)
def case(request, rng, device) -> Case:
    """Odd sizes, grouped heads, strided views as models pass them, one mask of each kind."""
    return Case.random(rng, device, *request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_attention_is_as_good_as_torch(case, dtype, poisoned_memory):
    case = case.to(dtype)
    out = ops.exact_attention(*case.qkv, *case.arguments, ops.VERSION)
    exact, _ = oracle.attention(*case.double().qkv, **case.named)
    assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_exact_attention_needs_no_compiler(dtype, rng, device, monkeypatch, poisoned_memory):
    """SDPA with a mask tensor, and the composite where SDPA has no word for it."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(composite, "WORKSPACE", 100_000)  # some rows at a time
    for shape in [*MASKS, *EXTRAS]:
        case = Case.random(rng, device, *shape).to(dtype)
        exact, _ = oracle.attention(*case.double().qkv, **case.named)
        out = ops.exact_attention(*case.qkv, *case.arguments, ops.VERSION)
        assert_as_good_as_torch(out, plain_attention(case), exact, case.units)
        out = composite.attention(*case.qkv, scale=case.scale, masks=case.masks)
        assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_zero_drops_nothing(case, dtype, poisoned_memory):
    case = case.to(dtype)
    out = ops.adaptive_attention(*case.qkv, *case.arguments, 0.0, *BUDGET.values(), 0,
                                 ops.VERSION)
    exact, _ = oracle.attention(*case.double().qkv, **case.named)
    assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_kept_blocks_are_attended(case, dtype, poisoned_memory):
    case = case.to(dtype)
    lists = KeptLists(*ops.select_blocks(*case.qkv[:2], *case.arguments, 0.1,
                                         *BUDGET.values()))
    out, lse = ops.block_sparse_attention(*case.qkv, *lists, *case.arguments)
    kept = rule.unpack(lists, count_blocks(case.k.shape[2], KEY_BLOCK))
    exact, exact_lse = oracle.attention(*case.double().qkv, **case.named, kept=kept)
    assert_as_good_as_torch(out, plain_attention(case, kept), exact, case.units)
    sees = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), sees)
    torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=1e-5,
                               atol=2e-3 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize(("extras", "changed"), [
    ((), {"causal_offset": 1}),
    ((100,), {"window": 99}),
    (("documents",), {"query_documents": None, "key_documents": None}),
    (("bias",), {"attn_mask": None}),
    (("bool",), {"attn_mask": None}),
    (("cap",), {"softcap": 0.0}),
    (("cap",), {"softcap": 4.1}),
    (("sinks",), {"sink_logits": None}),
    (("sinks",), {"sink_logits": torch.zeros(4)}),
], ids=str)
@pytest.mark.parametrize("op", ["exact", "adaptive"])
def test_a_wrong_mask_is_noticed(extras, changed, op, rng, device):
    """The twin of the tests above: they can fail."""
    case = Case.random(rng, device, 200, 200, 0, None, extras)
    changed = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changed.items()}
    budget = () if op == "exact" else (0.0, *BUDGET.values(), 0)
    out = getattr(ops, f"{op}_attention")(*case.qkv, *case.but(**changed).arguments, *budget, ops.VERSION)
    exact, _ = oracle.attention(*case.double().qkv, **case.named)
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5])
def test_selection_follows_the_rule(case, tolerance):
    lists = KeptLists(*ops.select_blocks(*case.qkv[:2], *case.arguments, tolerance,
                                         *BUDGET.values()))
    q, k, _ = case.double().qkv
    peaks = oracle.peaks(oracle.estimated_shares(q, k, singles=6, **case.named))
    sizes = {**case.sizes, "masks": case.masks}
    budget = {name: BUDGET[name] for name in ("sinks", "local")}
    kept = rule.unpack(lists, peaks.shape[3])
    allowed = allowed_blocks(case.masks, **case.sizes, device=q.device)[:, None]
    # float32 against float64: a peak may fall on the other side only within rounding of the tolerance.
    band = 1e-4
    surely = rule.keep(peaks, **sizes, **budget, tolerance=tolerance + band, max_density=1.0)
    perhaps = rule.keep(peaks, **sizes, **budget, tolerance=tolerance - band, max_density=1.0)
    assert not (surely & ~kept).any(), "a block above the tolerance was dropped"
    extra = (kept & ~perhaps).sum(-1)  # evening out adds one block, max_density all of them
    nearly_all = perhaps.sum(-1) > BUDGET["max_density"] * allowed.sum(-1)
    assert ((extra <= 1) | nearly_all).all(), "a block below the tolerance was kept"
    assert not (kept & ~allowed).any()
    assert (lists.counts % 2 == 0).all() and (lists.counts >= 2).all()


def test_shifts_lower_the_tolerance_head_by_head(case):
    """Each head keeps what it would keep if its own tolerance were all heads'."""
    shifts = [1.0, 0.5, 0.2, 0.0]
    call = (*case.qkv[:2], *case.arguments, 0.3, *BUDGET.values())
    kept, counts = ops.select_blocks(*call, shifts)
    for head, shift in enumerate(shifts):
        alone = ops.select_blocks(*case.qkv[:2], *case.arguments, 0.3 * shift, *BUDGET.values())
        assert torch.equal(kept[:, head], alone[0][:, head]) and torch.equal(counts[:, head], alone[1][:, head])
    lists = KeptLists(kept, counts)
    out = ops.adaptive_attention(*case.qkv, *case.arguments, 0.3, *BUDGET.values(), 0, ops.VERSION, shifts=shifts)
    assert torch.equal(out, ops.block_sparse_attention(*case.qkv, *lists, *case.arguments)[0])


def test_protected_keys_keep_their_blocks(case, rng):
    """Wherever they are allowed, in every head; other blocks stay as they were but for the even fill."""
    kv_len = case.k.shape[2]
    protected = torch.zeros(2, kv_len, dtype=torch.bool, device=case.k.device)
    protected[0, kv_len // 2] = protected[1, kv_len // 3] = True
    call, key_blocks = (*case.qkv[:2], *case.arguments, 0.6, 1.0, 0, 0, 6), count_blocks(kv_len, KEY_BLOCK)
    without, kept = (rule.unpack(KeptLists(*ops.select_blocks(*call, None, flags)), key_blocks)
                     for flags in (torch.zeros_like(protected), protected))
    allowed = allowed_blocks(case.masks, **case.sizes, device=case.k.device)
    forced = (allowed & blocks.protected_blocks(protected)[:, None])[:, None]
    assert (kept | ~forced).all() and not (kept & ~allowed[:, None]).any()
    assert ((kept ^ without) & ~forced).sum(-1).le(1).all()
    plain = rule.unpack(KeptLists(*ops.select_blocks(*call)), key_blocks)
    assert torch.equal(plain, without)  # the twin: nothing protected changes nothing
    out = ops.adaptive_attention(*case.qkv, *case.arguments, *call[-5:], 0, ops.VERSION, protected=protected)
    lists = ops.select_blocks(*call, None, protected)
    assert torch.equal(out, ops.block_sparse_attention(*case.qkv, *lists, *case.arguments)[0])


def test_a_protected_key_makes_a_block_matter(rng, device):
    """Block 2 weighs nothing; one protected key keeps it for batch row 1 alone, and it is dropped without."""
    case = Case.random(rng, device, 300, 704, None, None)
    case.k[:, :, 128:192] *= 0.01
    protected = torch.zeros(2, 704, dtype=torch.bool, device=device)
    protected[1, 150] = True
    budget = (0.02, 1.0, 0, 0, 6)  # all ten others are kept: an even number, which needs no filling up
    kept = rule.unpack(KeptLists(*ops.select_blocks(*case.qkv[:2], *case.arguments, *budget, None, protected)), 11)
    assert kept[1, :, :, 2].all() and not kept[0, :, :, 2].any()


def test_a_bias_makes_a_block_matter(rng, device):
    """Block 2 weighs nothing by its keys; one key of it with a large bias is kept, and dropped without."""
    case = Case.random(rng, device, 300, 704, None, None)
    case.k[:, :, 128:192] *= 0.01
    bias = torch.zeros(2, 4, 300, 704, device=device)
    bias[:, 1, 140, 150] = 12.0
    budget = (0.02, 1.0, 0, 0, 6)  # all ten others are kept: an even number, which needs no filling up
    for mask in (bias, None):
        lists = KeptLists(*ops.select_blocks(*case.qkv[:2], *case.but(attn_mask=mask).arguments, *budget))
        kept = rule.unpack(lists, 11)[:, :, :, 2]
        assert kept[:, 1, 1].all() == (mask is not None)
        assert not kept[:, 0, 1].all()


def test_a_sink_takes_its_share(rng, device):
    """Under a sink that takes nearly everything no block reaches the tolerance."""
    case = Case.random(rng, device, 300, 640, None, None).but(sink_logits=torch.full((4,), 30.0, device=device))
    budget = (0.3, 1.0, 0, 0, 6)
    _, counts = ops.select_blocks(*case.qkv[:2], *case.arguments, *budget)
    assert (counts == 2).all()  # nothing but the padding of empty lists
    _, counts = ops.select_blocks(*case.qkv[:2], *case.but(sink_logits=None).arguments, *budget)
    assert (counts > 2).any()


@pytest.mark.parametrize("extras", [(200,), ("documents",)], ids=str)
def test_blocks_out_of_sight_are_never_kept(extras, rng, device):
    case = Case.random(rng, device, 1000, 1000, 0, None, extras)
    seen = oracle.visible(1000, 1000, **{name: value for name, value in case.named.items() if name not in
                                         ("scale", "softcap", "sink_logits", "attn_mask")}, device=device)
    seen = torch.nn.functional.pad(seen, (0, 24, 0, 24)).unflatten(3, (16, 64)).unflatten(2, (8, 128)).any(3).any(-1)
    lists = KeptLists(*ops.select_blocks(*case.qkv[:2], *case.arguments, 0.0, *BUDGET.values()))
    kept = rule.unpack(lists, 16)
    assert not (seen & ~kept).any(), "a block in sight was dropped at tolerance 0"
    unseen = (kept & ~seen).sum()
    assert unseen == 0 if extras == (200,) else unseen < (~seen).sum() * kept.shape[1] / 2  # documents: by their ranges


@pytest.mark.parametrize("path", CPU_PATHS)
def test_cpu_paths_agree_with_the_definition(path, rng, poisoned_memory):
    on_cpu = torch.Generator().manual_seed(rng.initial_seed())
    for shape in [*MASKS, *EXTRAS]:
        case = Case.random(on_cpu, torch.device("cpu"), *shape)
        call = {"scale": case.scale, "masks": case.masks}
        peaks = (native if path is native else estimate).estimated_peaks(*case.qkv[:2], **call, singles=6)
        shares = oracle.estimated_shares(*case.double().qkv[:2], **case.named, singles=6)
        torch.testing.assert_close(peaks.double(), oracle.peaks(shares), rtol=0, atol=2e-5)
        lists = rule.choose_blocks(peaks, **case.sizes, tolerance=0.1, max_density=0.9, sinks=1, local=1,
                                   masks=case.masks)
        out, lse = path.block_sparse_attention(*case.qkv, *lists, **call)
        kept = rule.unpack(lists, count_blocks(case.k.shape[2], KEY_BLOCK))
        exact, exact_lse = oracle.attention(*case.double().qkv, **case.named, kept=kept)
        assert_as_good_as_torch(out, plain_attention(case, kept), exact, case.units)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dims", [(16, 16), (17, 19), (80, 80), (128, 64), (256, 256)], ids=str)
def test_head_dims(head_dims, rng, device):
    case = Case.random(rng, device, 130, 200, 70, None, (90, "cap", "sinks"), head_dims)
    out = ops.adaptive_attention(*case.qkv, *case.arguments, 0.0, *BUDGET.values(), 0, ops.VERSION)
    exact, _ = oracle.attention(*case.double().qkv, **case.named)
    assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


@pytest.mark.parametrize("extras", [(), ("cap",), ("sinks",), ("documents", "cap", "sinks")], ids=str)
def test_heads_of_any_width(extras, rng, device):
    """Wider than our kernels on a GPU: exact, by whoever can."""
    case = Case.random(rng, device, 130, 140, 10, "holes", extras, (320, 272))
    exact, _ = oracle.attention(*case.double().qkv, **case.named)
    for out in (ops.exact_attention(*case.qkv, *case.arguments, ops.VERSION),
                ops.adaptive_attention(*case.qkv, *case.arguments, 0.0, *BUDGET.values(), 0, ops.VERSION)):
        assert_as_good_as_torch(out, plain_attention(case), exact, case.units)


def test_nan_is_not_swallowed(rng, device):
    case = Case.random(rng, device, 200, 200, 0, None)
    case.q[:, :, 150] = torch.nan
    out = ops.adaptive_attention(*case.qkv, *case.arguments, 0.05, *BUDGET.values(), 0, ops.VERSION)
    assert out[:, :, 150].isnan().all()
    assert not out[:, :, :150].isnan().any() and not out[:, :, 151:].isnan().any()


def test_library_registration(rng, device):
    """Fakes tell the truth about shapes, dtypes and strides; schemas hold (torch.library.opcheck)."""
    shapes = [*MASKS[:3], EXTRAS[7], EXTRAS[-1]]
    for shape, strided in itertools.product(shapes, (True, False)):
        case = Case.random(rng, device, *shape, strided=strided)
        tail = case.arguments
        budget = (0.05, *BUDGET.values())
        torch.library.opcheck(ops.exact_attention, (*case.qkv, *tail, ops.VERSION))
        torch.library.opcheck(ops.adaptive_attention, (*case.qkv, *tail, *budget, 0, ops.VERSION))
        torch.library.opcheck(ops.select_blocks, (*case.qkv[:2], *tail, *budget))
        own = ([1.0, 0.5, 0.5, 0.0], torch.ones(1, case.k.shape[2], dtype=torch.bool, device=device))
        torch.library.opcheck(ops.adaptive_attention, (*case.qkv, *tail, *budget, 0, ops.VERSION, 0.0, *own))
        torch.library.opcheck(ops.select_blocks, (*case.qkv[:2], *tail, *budget, *own))
        lists = ops.select_blocks(*case.qkv[:2], *tail, *budget)
        torch.library.opcheck(ops.block_sparse_attention, (*case.qkv, *lists, *tail))


def test_counters_count_only_when_asked(rng, device):
    case = Case.random(rng, device, 1000, 1000, 0, None)
    call = (*case.qkv, *case.arguments, 0.3, *BUDGET.values(), 7, ops.VERSION)
    ops.adaptive_attention(*call)
    with ops.counting() as counters:
        assert counters.density(7) is None
        ops.adaptive_attention(*call)
    density = counters.density(7)
    ops.adaptive_attention(*call[:-2], 8, ops.VERSION)
    assert counters.sites() == [7]

    lists = ops.select_blocks(*case.qkv[:2], *case.arguments, 0.3, *BUDGET.values())
    kept = rule.unpack(KeptLists(*lists), count_blocks(1000, KEY_BLOCK))
    allowed = allowed_blocks(case.masks, 1000, 1000, device).sum() * case.q.shape[0] * case.q.shape[1]
    assert density == pytest.approx((kept.sum() / allowed).item())
    assert 0 < density < 1


def test_small_calls_on_a_gpu_run_exact(rng, device, monkeypatch):
    monkeypatch.setattr(crossover, "LAUNCH_SECONDS", 1e-3)
    case = Case.random(rng, device, 1000, 1000, 0, None)
    with ops.counting() as counters:
        ops.adaptive_attention(*case.qkv, *case.arguments, 0.3, *BUDGET.values(), 0, ops.VERSION)
    assert (counters.density(0) == 1.0) == (device.type == "cuda")


@pytest.mark.parametrize(("heads", "length", "milliseconds"), [(32, 32768, 19.5), (32, 4096, 0.305), (6, 16384, 0.458)])
def test_dense_time_is_estimated_from_shapes(heads, length, milliseconds):
    q = torch.empty(1, heads, length, 128 if heads == 32 else 64, dtype=torch.bfloat16, device="meta")
    causal = crossover.dense_seconds(q, q, q, Masks(0))
    assert 1e3 * causal == pytest.approx(milliseconds, rel=0.05)
    assert crossover.dense_seconds(q, q, q, Masks()) == 2 * causal
    assert crossover.dense_seconds(q, q, q, Masks(0, window=length // 8)) == causal / 4


NO_MASKS = {"window": None, "key_mask": None, "query_documents": None, "key_documents": None, "attn_mask": None,
            "softcap": 0.0, "sink_logits": None}


def _arguments(**changed):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    arguments = {"q": q, "k": k, "v": v, "scale": 1.0, "causal_offset": 1, **NO_MASKS, "tolerance": 0.1,
                 **BUDGET, "site": 0, "version": ops.VERSION}
    return {**arguments, **changed}


@pytest.mark.parametrize(("changed", "error", "words"), [
    ({"q": torch.randn(2, 5, 8)}, ShapeError, "q has shape"),
    ({"q": torch.randn(2, 3, 5, 8)}, ShapeError, "multiple of KV heads"),
    ({"q": torch.randn(2, 4, 0, 8)}, ShapeError, "length 0"),
    ({"k": torch.randn(2, 2, 6, 8, dtype=torch.float64)}, ShapeError, "Cast q, k and v"),
    ({"k": torch.randn(1, 2, 6, 8)}, ShapeError, "batch 1"),
    ({"k": torch.randn(2, 2, 6, 9)}, ShapeError, "head dim 9"),
    ({"v": torch.randn(2, 2, 7, 8)}, ShapeError, "v has shape"),
    ({"key_mask": torch.ones(2, 6)}, ShapeError, "key_mask is torch.float32"),
    ({"key_mask": torch.ones(3, 6, dtype=torch.bool)}, ShapeError, r"\[3, 6\]. It must be bool \[2 or 1, 6\]"),
    ({"window": 3, "causal_offset": None}, OptionError, "window is 3 but causal_offset is None"),
    ({"query_documents": torch.zeros(2, 5, dtype=torch.int64)}, ShapeError, "key_documents is None"),
    ({"query_documents": torch.zeros(2, 5), "key_documents": torch.zeros(2, 6).int()}, ShapeError, "int32 or int64"),
    ({"attn_mask": torch.ones(5, 6)}, ShapeError, "any size 1"),
    ({"attn_mask": torch.ones(2, 2, 5, 6)}, ShapeError, "any size 1"),
    ({"attn_mask": torch.ones(1, 1, 5, 6, dtype=torch.int32)}, ShapeError, "bool .* or floating"),
    ({"softcap": -1.0}, OptionError, "softcap is -1.0"),
    ({"softcap": float("nan")}, OptionError, "softcap is nan"),
    ({"sink_logits": torch.zeros(2)}, ShapeError, r"floating \[4\]"),
    ({"tolerance": 1.5}, OptionError, "tolerance is 1.5"),
    ({"tolerance": float("nan")}, OptionError, "tolerance is nan"),
    ({"shifts": [1.0, 0.5]}, OptionError, "shifts has 2 factors and q has 4 heads"),
    ({"shifts": [1.0, 0.5, 1.5, 0.0]}, OptionError, "shifts holds 1.5"),
    ({"protected": torch.ones(2, 6)}, ShapeError, "protected is torch.float32"),
    ({"protected": torch.ones(2, 5, dtype=torch.bool)}, ShapeError, r"It must be bool \[2 or 1, 6\]"),
])
def test_mistakes_are_named(changed, error, words):
    with pytest.raises(error, match=words):
        ops.adaptive_attention(**_arguments(**changed))
    ops.adaptive_attention(**_arguments())  # the twin: nothing is wrong


def test_lists_of_another_shape_are_refused():
    a = _arguments()
    q, k, v = a["q"], a["k"], a["v"]
    kept, counts = ops.select_blocks(q, k, 1.0, 1, *NO_MASKS.values(), 0.1, *BUDGET.values())
    with pytest.raises(ShapeError, match="make them with select_blocks"):
        ops.block_sparse_attention(q, k, v, kept[..., :-1], counts, 1.0, 1, *NO_MASKS.values())
