"""Budgets of one's own at every site of a graph that is compiled already, for as long as a context is open.

    with probing(lambda site, kv_len: Budget(0.02)):
        model(ids)

`adaptive_attention` looks here in its body, which runs at every call whatever compiled the graph: another budget costs
no other graph. Whether selection pays is not asked meanwhile: what a budget costs in quality does not depend on the
machine. While nobody probes, an op pays one look at a context variable; other threads are left alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from sparsify.kernels.masks import Masks
from sparsify.plan import Budget

BudgetOf = Callable[[int, int], Budget]
"""Site and key length of a call to the budget that it shall run under."""

Watch = Callable[[int, Tensor, Tensor, Tensor, float, Masks], None]
"""Site, q, k, v, scale and masks of a call, as in `sparsify.ops`; called before it runs."""


@dataclass(frozen=True)
class Probe:
    """What the ops do in place of what their graph says."""

    budget_of: BudgetOf
    watch: Watch | None = None


_ACTIVE: ContextVar[Probe | None] = ContextVar("sparsify_probe", default=None)


@contextmanager
def probing(budget_of: BudgetOf, watch: Watch | None = None) -> Iterator[None]:
    """Run every `adaptive_attention` under `budget_of(site, key length)`; `watch` sees its tensors first.

    A dense budget runs exact, and so does a call for which there are no kernels of ours. Sites that the graph keeps
    dense stay so: compile under a plan that has no dense bucket.
    """
    token = _ACTIVE.set(Probe(budget_of, watch))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Probe | None:
    """The probe of this thread, if there is one."""
    return _ACTIVE.get()
