"""Whole methods on real activations: selection and attention, every method swept over its own knob.

Truth is dense attention in float64 over random rows of the same bfloat16 q, k and v; an error is |out - dense| /
|dense|. Density is the kept share of causal blocks, in blocks of the method's own. KV heads are repeated, before the
clock starts, for methods that know no grouped heads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import exp, log
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsify import ops
from sparsify.plan import Budget

BUDGET = Budget(0.03)  # all but the tolerance


@dataclass(frozen=True)
class Activations:
    """q [1, heads, length, head dim], k and v [1, KV heads, length, head dim] of real layers."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @property
    def arguments(self) -> tuple:
        """From `scale` on, as the ops take them by position."""
        return self.scale, 0, None, None, None, None, None, 0.0, None

    @cached_property
    def rows_first(self) -> tuple[Tensor, ...]:
        return tuple(x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))

    @cached_property
    def repeated(self) -> tuple[Tensor, ...]:
        group = self.q.shape[1] // self.k.shape[1]
        return (self.q.contiguous(), self.k.repeat_interleave(group, 1).contiguous(),
                self.v.repeat_interleave(group, 1).contiguous())

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """Random rows, and what dense attention gives them: int64 [rows], float64 [heads, rows, head dim]."""
        rows = torch.randperm(self.length, generator=torch.Generator().manual_seed(2))[:256].to(self.q.device)
        hidden = torch.arange(self.length, device=rows.device) > rows[:, None]
        group = self.q.shape[1] // self.k.shape[1]
        exact = []
        for head in range(self.q.shape[1]):
            keys, values = self.k[0, head // group].double(), self.v[0, head // group].double()
            scores = self.q[0, head, rows].double() @ keys.T * self.scale
            exact.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        return rows, torch.stack(exact)

    def relative_error(self, out: Tensor) -> float:
        rows, exact = self.truth
        return float((out[0, :, rows].double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Method:
    """A contender: one call at a setting of its knob, the density of that call, and the settings tried."""

    run: Callable[[Activations, Any, float], Tensor]
    density: Callable[[Activations, Any, float], float]
    source: str | None
    knob: str
    settings: tuple[float, ...]
    note: str = ""


def ours(x: Activations, _: Any, tolerance: float, singles: int = BUDGET.singles) -> Tensor:
    return ops.block_sparse_attention(x.q, x.k, x.v, *_select(x, tolerance, singles), *x.arguments)[0]


def our_density(x: Activations, _: Any, tolerance: float, singles: int = BUDGET.singles) -> float:
    counts = _select(x, tolerance, singles)[1]
    rows = counts.shape[2]
    return float(counts.sum()) / (rows * (rows + 1) * x.q.shape[1])  # row i has 2 (i + 1) blocks of 64 keys


def _select(x: Activations, tolerance: float, singles: int) -> tuple[Tensor, Tensor]:
    return ops.select_blocks(x.q, x.k, *x.arguments, tolerance, BUDGET.max_density, BUDGET.sinks, BUDGET.local, singles)


def flashprefill(x: Activations, module: Any, alpha: float) -> Tensor:
    q, k, v = x.rows_first
    out = torch.empty_like(q)
    module.flash_prefill(q, k, v, out, block_size=128, attention_sink=2, window_size=4, alpha=alpha,
                         last_n_block_full=2, min_budget=0)
    return out.transpose(1, 2)


def flashprefill_density(x: Activations, module: Any, alpha: float) -> float:
    with overheard(module, "deal_output_score") as results:
        flashprefill(x, module, alpha)
        return float(results[-1][1].sum()) / (causal_blocks(x, 128) * x.q.shape[1])


def flexprefill(x: Activations, module: Any, gamma: float) -> Tensor:
    return module.flex_prefill_attention(*x.rows_first, gamma, tau=0.1, min_budget=512).transpose(1, 2)


def flexprefill_density(x: Activations, module: Any, gamma: float) -> float:
    _, share = module.flex_prefill_attention(*x.rows_first, gamma, tau=0.1, min_budget=512,
                                             return_computational_ratio=True)
    return share * (-(-x.length // 128)) ** 2 / causal_blocks(x, 128)  # it counts the future in


def minference(x: Activations, module: Any, share: float) -> Tensor:
    return module.block_sparse_attention(*x.repeated, _top(x, share))


def minference_density(x: Activations, _: Any, share: float) -> float:
    blocks = -(-x.length // 64)
    return sum(min(row + 1, _top(x, share)) for row in range(blocks)) / causal_blocks(x, 64)


def _top(x: Activations, share: float) -> int:
    return max(1, round(share * x.length / 64))


def pbs(x: Activations, module: Any, threshold: float) -> Tensor:
    return module.permuted_block_sparse_attn_fwd(*x.repeated, block_size=128, segment_size=256, threshold=threshold,
                                                 causal=True)


def pbs_density(x: Activations, module: Any, threshold: float) -> float:
    with overheard(module, "permuted_block_selection") as results:
        pbs(x, module, threshold)
        _, chosen, segment = results[-1]
        kept = (chosen | segment) & torch.ones_like(segment).tril()
        return float(kept.sum()) / (causal_blocks(x, 128) * x.q.shape[1])


def causal_blocks(x: Activations, block: int) -> int:
    rows = -(-x.length // block)
    return rows * (rows + 1) // 2


@contextmanager
def overheard(module: Any, name: str) -> Iterator[list[Any]]:
    """What a function of a module returns while it is called by others; the module is left as it was."""
    function, results = getattr(module, name), []

    def listening(*arguments: Any, **options: Any) -> Any:
        results.append(function(*arguments, **options))
        return results[-1]

    setattr(module, name, listening)
    try:
        yield results
    finally:
        setattr(module, name, function)


TOLERANCES = (0.3, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005)
REPEATED = "KV heads repeated beforehand"
METHODS = {
    "ours": Method(ours, our_density, None, "tolerance", TOLERANCES, "m = 6"),
    "ours m=2": Method(partial(ours, singles=2), partial(our_density, singles=2), None, "tolerance", TOLERANCES),
    "FlashPrefill": Method(flashprefill, flashprefill_density, "flashprefill", "alpha",
                           (0.5, 0.3, 0.18, 0.12, 0.08, 0.03, 0.01),
                           "sinks 2, window 4, last 2 rows full, as published; 0.08 to 0.18 is what it runs with"),
    "FlexPrefill": Method(flexprefill, flexprefill_density, "flexprefill", "gamma",
                          (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99), "tau 0.1, min_budget 512, as published"),
    "MInference": Method(minference, minference_density, "minference", "share of blocks",
                         (0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8),
                         f"block-sparse pattern for all heads; {REPEATED}"),
    "PBS": Method(pbs, pbs_density, "pbs", "threshold", (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
                  f"blocks of 128, segments of 256, as published; {REPEATED}"),
}


def dense(x: Activations) -> dict[str, Callable[[], Tensor]]:
    """Dense kernels to hold everybody against."""
    call = partial(scaled_dot_product_attention, x.q, x.k, x.v, is_causal=True, scale=x.scale, enable_gqa=True)
    if not x.q.is_cuda:
        return {"dense sdpa": call}

    def with_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return {"dense cuDNN": partial(with_backend, SDPBackend.CUDNN_ATTENTION),
            "dense flash": partial(with_backend, SDPBackend.FLASH_ATTENTION)}


def time_at_error(points: Iterable[tuple[float, float]], error: float) -> float | None:
    """Least time for at most this error, from (error, time) of several settings; None where none is that exact.

    Between two settings that are worth having, log time is linear in log error; beyond the last, the last.
    """
    front: list[tuple[float, float]] = []  # less time for more error
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    if not front or error < front[0][0]:
        return None
    for (error0, time0), (error1, time1) in pairwise(front):
        if error <= error1:
            share = log(error / error0) / log(error1 / error0)
            return exp((1 - share) * log(time0) + share * log(time1))
    return front[-1][1]
