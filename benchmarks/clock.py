"""Time contenders against each other: `interleave`. Two ways to time a call.

    queued   launches are queued ahead and the second-level cache is cold: what the device takes, as inside a model
    looped   call after call, then one wait: what a call takes with its host time, as in plain PyTorch

On a CPU both are the same. Rounds run everybody in turn, every second one in reverse order, so that a drifting clock
hits all alike; times are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from sparsify.ops.stopwatch import QUEUE_CYCLES

CACHE_WORDS = 64 << 20  # 256 MB: more than any second-level cache
MOST_REPEATS = 20  # of a call in one round
LOOP_REPEATS = 200
FAR = 1.5  # a rival that takes this many times as long as the fastest is timed in the first round alone

Call = Callable[[], Any]
Timer = Callable[[Call, str, int], float]


def interleave(contenders: Mapping[str, Call], device: str, rounds: int, budget_ms: float, *,
               rivals: Collection[str] = (), timer: "Timer | None" = None) -> dict[str, float]:
    """Median milliseconds of every contender; each has run before.

    Of the `rivals` only the fastest matters: one far behind it drops out after the first round.
    """
    timer = timer or time_queued
    most = LOOP_REPEATS if timer is time_looped else MOST_REPEATS
    first = {name: timer(call, device, 1) for name, call in contenders.items()}
    repeats = {name: max(1, min(most, int(budget_ms / ms))) for name, ms in first.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    running = list(contenders)
    for turn in range(rounds):
        for name in running if turn % 2 == 0 else list(reversed(running)):
            times[name].append(timer(contenders[name], device, repeats[name]))
        if turn == 0:
            fastest = min((times[name][0] for name in rivals if name in times), default=0.0)
            running = [name for name in running if name not in rivals or times[name][0] <= FAR * fastest]
    return {name: statistics.median(x) for name, x in times.items()}


def time_queued(call: Call, device: str, repeats: int) -> float:
    """Milliseconds a call, median over repeats; on CUDA with a cold second-level cache, launches queued ahead."""
    if device == "cpu":
        return statistics.median(_time_on_host(call) for _ in range(repeats))
    flush = torch.empty(CACHE_WORDS, dtype=torch.int32, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in events:
        flush.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events)


def time_looped(call: Call, device: str, repeats: int) -> float:
    """Milliseconds a call, mean over repeats in a row; on CUDA the device is waited for once, at the end."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def _time_on_host(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
