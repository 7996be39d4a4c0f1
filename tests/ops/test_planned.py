"""`planned_attention`: the table in the op does what the ops do that a guard would have picked."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode

from sparsify import ops
from sparsify.errors import OptionError, ShapeError
from sparsify.ops import crossover, exact
from sparsify.ops.planned import FEW_QUERIES
from tests.ops.cases import EXTRAS, MASKS, Case

EDGES = [128, 300]
TABLE = {"tolerances": [0.0, 0.1, 0.3], "max_densities": [0.9, 0.9, 0.8], "sinks": [1, 0, 1], "local": [1, 1, 0],
         "singles": [6, 6, 2], "peaks": [0.0, 0.0, 2.0]}


@pytest.fixture(autouse=True)
def selection_always_pays(monkeypatch):
    """What it is compared with runs sparse on a GPU too, however small the call."""
    monkeypatch.setattr(crossover, "LAUNCH_SECONDS", 0.0)


def planned(case: Case, edges=EDGES, shifts=None, protected=None, **changed):
    return ops.planned_attention(*case.qkv, *case.arguments, edges, *{**TABLE, **changed}.values(), 0, ops.VERSION,
                                 shifts, protected)


@pytest.mark.parametrize("shape", [*MASKS, *EXTRAS], ids=str)
def test_the_bucket_of_the_key_length_decides(shape, rng, device, poisoned_memory):
    case = Case.random(rng, device, *shape)
    for bucket, edges in enumerate(([case.k.shape[2] + 1, 900], [case.k.shape[2], 900], [0, case.k.shape[2]])):
        out = planned(case, edges)
        if bucket == 0 or case.q.shape[2] <= FEW_QUERIES:
            name = exact.usual_kernel(*case.qkv, case.masks)
            wanted = exact.run(name, *case.qkv, case.scale, case.masks)
        else:
            budget = [column[bucket] for column in TABLE.values()]
            wanted = ops.adaptive_attention(*case.qkv, *case.arguments, *budget[:-1], 0, ops.VERSION)
        assert torch.equal(out, wanted)
        assert out.stride() == wanted.stride()


@pytest.mark.parametrize("queries", [FEW_QUERIES, FEW_QUERIES + 1])
def test_few_queries_are_exact(queries, rng, device):
    case = Case.random(rng, device, queries, 900, 900 - queries, None)
    out, budget = planned(case, tolerances=[0.0, 0.1, 0.9]), (0.9, 0.8, 1, 0, 2, 0, ops.VERSION)
    wanted = {True: exact.run(exact.usual_kernel(*case.qkv, case.masks), *case.qkv, case.scale, case.masks),
              False: ops.adaptive_attention(*case.qkv, *case.arguments, *budget)}
    assert torch.equal(out, wanted[queries <= FEW_QUERIES])
    assert not torch.equal(out, wanted[queries > FEW_QUERIES])


def test_shifts_and_protected_keys_are_those_of_the_bucket(rng, device):
    case = Case.random(rng, device, 900, 900, 0, None)
    shifts = [1.0] * 4 + [0.9] * 4 + [0.5, 0.0, 0.3, 0.1]
    protected = torch.rand(1, 900, generator=rng, device=device) > 0.998
    out = planned(case, shifts=shifts, protected=protected)
    arguments = (*case.qkv, *case.arguments, 0.3, 0.8, 1, 0, 2, 0, ops.VERSION, 0.0)
    assert torch.equal(out, ops.adaptive_attention(*arguments, shifts[8:], protected))
    assert not torch.equal(out, ops.adaptive_attention(*arguments))  # the twin: they do matter


def layouts(case: Case) -> dict[str, Case]:
    """The same sizes in other strides: as projections leave them, transposed, cut out of more, broadcast."""
    def each(change) -> Case:
        return Case(*(change(x) for x in case.qkv), case.masks)

    return {
        "projections": case,
        "contiguous": each(torch.Tensor.contiguous),
        "transposed": each(lambda x: x.mT.contiguous().mT),
        "sliced": each(lambda x: torch.cat([x, x], 2)[:, :, ::2]),
        "wide rows": each(lambda x: torch.cat([x, x], 3)[..., : x.shape[3]]),
        "one batch for all": each(lambda x: x[:1].expand(2, -1, -1, -1)),
    }


def tells_the_truth(op, *arguments) -> bool:
    """Whether the fake of an op has the strides of what it returns. torch 2.11's opcheck does not look at them."""
    with FakeTensorMode() as mode:
        fake = op(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    real = op(*arguments)
    return fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()


@pytest.mark.parametrize("kv_len", [100, 200])
def test_fakes_tell_the_strides_that_kernels_make(kv_len, rng):
    drawn = Case.random(rng, torch.device("cpu"), 130, kv_len, 3, "left", head_dims=(64, 32))
    for name, case in layouts(drawn).items():
        arguments = (*case.qkv, *case.arguments, EDGES, *TABLE.values(), 0, ops.VERSION)
        result = torch.library.opcheck(torch.ops.sparsify.planned_attention.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, name
        assert tells_the_truth(torch.ops.sparsify.planned_attention.default, *arguments), name


def test_a_lying_fake_is_caught(rng):
    """The twin: the fake that torch's own examples write, empty_like, lies for projections."""
    case = Case.random(rng, torch.device("cpu"), 130, 200, 0, None)
    with torch.library._scoped_library("sparsify_test", "FRAGMENT") as library:
        library.define("liar(Tensor q) -> Tensor")
        library.impl("liar", lambda q: q.contiguous(), "CPU")
        torch.library.register_fake("sparsify_test::liar", torch.empty_like, lib=library)
        assert not tells_the_truth(torch.ops.sparsify_test.liar.default, case.q)
        assert tells_the_truth(torch.ops.sparsify_test.liar.default, case.q.contiguous())


def test_counting_sees_the_bucket(rng, device):
    case = Case.random(rng, device, 900, 900, 0, None)
    with ops.counting() as counters:
        planned(case, edges=[1000, 2000])
        assert counters.density(0) == 1
        planned(case)
        assert counters.density(0) < 1


@pytest.mark.parametrize(("changed", "error", "words"), [
    ({"tolerances": [0.1, 0.2]}, OptionError, "tolerances has 2 entries"),
    ({"edges": [300, 128]}, OptionError, "ascending"),
    ({"tolerances": [0.0, 0.0, 2.0]}, OptionError, "tolerance is 2.0"),
    ({"shifts": [1.0] * 4}, OptionError, "shifts has 4 factors"),
    ({"protected": torch.ones(1, 7, dtype=torch.bool)}, ShapeError, "protected"),
])
def test_mistakes_are_named(changed, error, words, rng):
    case = Case.random(rng, torch.device("cpu"), 130, 300, 0, None)
    planned(case)  # the twin
    with pytest.raises(error, match=words):
        planned(case, **changed)
