"""A probe's budget holds in place of the graph's, at run time, in its thread, and for as long as it is open."""

import threading

import pytest
import torch

from sparsify import ops
from sparsify.kernels.masks import Masks
from sparsify.ops import crossover
from sparsify.ops.counters import Totals
from sparsify.plan import Budget

LENGTH = 700
BUDGET = Budget(0.3, sinks=2, local=0, singles=3)


@pytest.fixture
def call(rng, device):
    q, k, v = (torch.randn(1, heads, LENGTH, 16, generator=rng, device=device) for heads in (4, 2, 2))

    def attend(budget: Budget, site: int = 5):
        numbers = budget.tolerance or 0.0, budget.max_density, budget.sinks, budget.local, budget.singles
        return ops.adaptive_attention(q, k, v, 0.25, 0, None, None, None, None, None, 0.0, None, *numbers, site,
                                      ops.VERSION)

    return attend


def test_the_budget_of_a_probe_holds_in_place_of_the_graphs(call):
    with ops.counting() as plain:
        direct = call(BUDGET)
    with ops.counting() as probed, ops.probing(lambda site, kv_len: BUDGET):
        assert torch.equal(call(Budget(0.9)), direct)
    assert probed.density(5) == plain.density(5) < 1


def test_the_budget_may_depend_on_site_and_key_length(call):
    asked = []

    def budget_of(site, kv_len):
        asked.append((site, kv_len))
        return BUDGET if site == 5 else Budget.dense()

    with ops.probing(budget_of), ops.counting() as counters:
        call(Budget(0.5), site=5)
        call(Budget(0.5), site=6)
    assert asked == [(5, LENGTH), (6, LENGTH)]
    assert counters.density(5) < counters.density(6) == 1.0


def test_a_dense_budget_runs_exact_and_selection_that_does_not_pay_runs_nevertheless(call, monkeypatch):
    monkeypatch.setattr(crossover, "selection_pays", lambda *arguments: False)
    with ops.counting() as counters:
        exact = call(BUDGET)
        assert counters.density(5) == 1.0
        with ops.probing(lambda site, kv_len: BUDGET):
            assert not torch.equal(call(BUDGET), exact)
        assert counters.density(5) < 1.0
        with ops.probing(lambda site, kv_len: Budget.dense()):
            assert torch.equal(call(BUDGET), exact)
    assert counters.density(5) == 1.0


def test_a_watch_sees_the_tensors_of_every_call_dense_ones_too(call):
    seen = []
    with ops.probing(lambda site, kv_len: Budget.dense(), lambda *arguments: seen.append(arguments)):
        call(BUDGET)
    [(site, q, k, v, scale, masks)] = seen
    assert (site, scale, masks) == (5, 0.25, Masks(causal_offset=0))
    assert (q.shape, k.shape, v.shape) == ((1, 4, LENGTH, 16), (1, 2, LENGTH, 16), (1, 2, LENGTH, 16))


def test_a_probe_ends_with_its_context_and_leaves_other_threads_alone(call):
    direct, found = call(BUDGET), []
    with pytest.raises(KeyError), ops.probing(lambda site, kv_len: Budget.dense()):
        thread = threading.Thread(target=lambda: found.append(call(BUDGET)))
        thread.start()
        thread.join()
        raise KeyError
    assert torch.equal(found[0], direct)
    assert torch.equal(call(BUDGET), direct)


def test_another_budget_compiles_nothing_anew():
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm)
        return gm

    def attend(x):
        return ops.adaptive_attention(x, x, x, 0.25, 0, None, None, None, None, None, 0.0, None, 0.5, 0.9, 1, 1, 6, 0,
                                      ops.VERSION)

    x, outputs = torch.randn(1, 2, LENGTH, 16), []
    call = torch.compile(attend, backend=backend, fullgraph=True)
    for budget in (Budget.dense(), Budget(0.3), Budget(0.15)):
        with ops.probing(lambda site, kv_len, budget=budget: budget):
            outputs.append(call(x))
    assert len(compiled) == 1
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_totals_add_the_calls_of_a_site(call):
    with ops.counting() as last, ops.counting(Totals()) as totals:
        for budget in (Budget(0.1), Budget(0.3)):
            with ops.probing(lambda site, kv_len, budget=budget: budget):
                call(BUDGET)
                kept, allowed = last.blocks(5)
    assert totals.blocks(5)[1] == 2 * allowed
    assert totals.blocks(5)[0] > 2 * kept
