"""Where the host's time goes in one call of an op: `python -m benchmarks.profile_call [--length 16384]`.

Functions on the way are wrapped, and a stack of clocks gives each the time that it spends outside of the others: no
sampling, and none of cProfile's cost on every small call. "op" is what is left: the dispatcher, the op's own Python,
and every torch call that is not named. What wrapping costs is measured and taken off. Beside it the number of launches
and allocations, by torch's profiler. Needs CUDA: on a CPU the host is the device, and there are no launches.
"""

import argparse
import importlib
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import records
from benchmarks.clock import Call
from benchmarks.dense import bare_calls
from benchmarks.graphs import WORKLOAD
from benchmarks.records import RESULTS, environment
from benchmarks.workloads import Layer
from sparsify import ops
from sparsify.plan import DEFAULT_TOLERANCE, Budget

REST = "op: dispatcher and what is not named"
PARTS = {
    "checks of arguments": ("sparsify.ops.attend:check_inputs", "sparsify.ops.attend:check_tolerance"),
    "look-up of times": ("sparsify.ops.crossover:selection_pays", "sparsify.ops.crossover:exact_kernel"),
    "selection's own Python": ("sparsify.kernels.select:select_blocks",
                               "sparsify.kernels.hopper_select:estimated_peaks",
                               "sparsify.kernels.hopper_native:select_blocks"),
    "attention's own Python": ("sparsify.kernels.hopper:block_sparse_attention",
                               "sparsify.kernels.attend:block_sparse_attention",
                               "sparsify.kernels.hopper_native:attend"),
    "lists of all blocks": ("sparsify.kernels.every:every_block",),
    "why_not": ("sparsify.kernels.hopper_coverage:why_not", "sparsify.kernels.hopper_select:why_not"),
    "allocations": ("torch:empty", "torch:zeros", "torch:full"),
    "descriptors": ("sparsify.kernels.hopper:describe", "sparsify.kernels.hopper_select:_describe"),
    "device queries": ("torch.cuda:get_device_properties", "torch.cuda:get_device_capability"),
    "launches": ("sparsify.kernels.launch:Launched._launch", "sparsify.kernels.hopper_native:_run"),
}
"""Functions by what they are for, as module:name; what does not exist here is left out."""
CALLS = 200
WARM_UP = 20


@dataclass
class Account:
    """Seconds and calls by part, of everything that ran while `accounting` was on."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stack: list[str] = field(default_factory=list)
    last: float = 0.0

    def enter(self, part: str) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.stack.append(part)
        self.calls[part] += 1
        self.last = time.perf_counter()

    def leave(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack.pop()] += now - self.last
        self.last = time.perf_counter()


def account_for(call: Call, parts: Mapping[str, Sequence[str]] = PARTS, calls: int = CALLS,
                wait: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """Microseconds and entries a call, by part, the largest first; `wait` runs after each call, outside of its time."""
    for _ in range(WARM_UP):
        call()
    wait()
    plain = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        call()
        plain += time.perf_counter() - start
        wait()
    account = Account()
    with accounting(account, parts):
        for _ in range(calls):
            account.enter(REST)
            call()
            account.leave()
            wait()
    # What a wrapper costs lands in the part around the wrapped one, which is the op for most.
    excess = max(0.0, sum(account.seconds.values()) - plain)
    account.seconds[REST] = max(0.0, account.seconds[REST] - excess)
    rows: list[dict[str, Any]] = [{"part": part, "us": 1e6 * seconds / calls, "entries": account.calls[part] / calls}
                                  for part, seconds in account.seconds.items()]
    return [*sorted(rows, key=lambda row: -row["us"]), {"part": "all, not wrapped", "us": 1e6 * plain / calls,
                                                        "entries": 1.0}]


@contextmanager
def accounting(account: Account, parts: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Wrap the functions of `parts` while the context is open."""
    with ExitStack() as patches:
        for part, places in parts.items():
            for place in places:
                owner, name = _find(place)
                if owner is not None:
                    patches.enter_context(mock.patch.object(owner, name, _wrapped(owner, name, part, account)))
        yield


def _find(place: str) -> tuple[Any, str]:
    """Who holds the function, and under what name; None where nobody does."""
    module, path = place.split(":")
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        return None, ""
    *outer, name = path.split(".")
    for step in outer:
        owner = getattr(owner, step, None)
    return (owner, name) if hasattr(owner, name) else (None, "")


def _wrapped(owner: Any, name: str, part: str, account: Account) -> Any:
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if not account.stack:
            return function(*args, **kwargs)
        account.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            account.leave()

    held = vars(owner).get(name) if isinstance(owner, type) else None
    return staticmethod(timed) if isinstance(held, staticmethod | classmethod) else timed


def count_device_work(call: Call, calls: int = 20) -> dict[str, float]:
    """CUDA runtime and driver entries a call, by name: launches, copies, allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    counts = {event.key: event.count / calls for event in profiler.key_averages()
              if re.match("cu(da)?[A-Z]", event.key)}  # and not kernels of cuDNN
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def table(results: dict[str, dict[str, Any]], facts: dict[str, str]) -> str:
    """The accounts as Markdown."""
    rows = [[name, row["part"], f"{row['us']:.1f}", f"{row['entries']:.1f}"]
            for name, result in results.items() for row in result["account"]]
    counts = [[name, entry, f"{count:.1f}"] for name, result in results.items()
              for entry, count in result.get("device", {}).items()]
    return (records.markdown(["call", "part", "us", "entries"], rows, facts) + "\n"
            + records.markdown(["call", "CUDA entry", "a call"], counts, {"torch.profiler": "counts"}))


def main() -> None:
    """Profile on CUDA, explain elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="long enough that the op selects")
    parser.add_argument("--short", type=int, default=1024, help="short enough that it does not")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(__doc__)
        return
    results: dict[str, dict[str, Any]] = {}
    facts, budget = environment("cuda"), Budget(DEFAULT_TOLERANCE)
    long, short = (Layer(replace(WORKLOAD, lengths=()), length) for length in (arguments.length, arguments.short))
    calls = {f"adaptive, {arguments.length}": long.adaptive(budget), f"adaptive, {arguments.short}":
             short.adaptive(budget), f"exact, {arguments.short}": short.exact(),
             f"SDPA, {arguments.short}": bare_calls(short)["sdpa"]}
    with torch.inference_mode():
        for name, call in calls.items():
            with ops.counting() as counters:
                call()
            density = counters.density(0)
            ran = "" if not name.startswith("adaptive") else f", density {1.0 if density is None else density:.2f}"
            results[name + ran] = {
                "account": account_for(call, calls=arguments.calls, wait=torch.cuda.synchronize),
                "device": count_device_work(call)}
            records.write_json(arguments.out / "profile_call.json", {"environment": facts, "results": results})
            records.write_text(arguments.out / "profile_call.md", table(results, facts))
            print(f"done: {name}{ran}", file=sys.stderr, flush=True)
    print(table(results, facts))


if __name__ == "__main__":
    main()
