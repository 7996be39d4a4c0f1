"""Time calls against each other: rounds in which each runs once, in turn, and medians over the rounds.

A drifting clock hits everybody alike. The first run of a call, which may compile a kernel, is not timed; a call that
raises is left out. The clock is an argument, so that tests bring their own.
"""

import logging
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch

from sparsify.timings import Time

log = logging.getLogger("sparsify")

ROUNDS = 5
SLOW = 1.5  # a rival that takes this many times as long as the fastest is timed once
QUEUE_CYCLES = 1_500_000  # about a millisecond: by then the host has launched the call, as it has inside a model

Call = Callable[[], Any]


class Clock(Protocol):
    """How long a call takes, and how long this has taken."""

    def now(self) -> float:
        """Seconds since whenever."""

    def time(self, call: Call) -> Time:
        """Run a call."""


class HostClock:
    """For calls that are over when they return."""

    def now(self) -> float:
        return time.perf_counter()

    def time(self, call: Call) -> Time:
        start = time.perf_counter()
        call()
        return Time(time.perf_counter() - start, 0.0)


class CudaClock:
    """Events on the current stream of a device, with launches queued ahead; waits for the end of each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    def time(self, call: Call) -> Time:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        before = time.perf_counter()
        call()
        host = time.perf_counter() - before
        end.record()
        end.synchronize()
        return Time(1e-3 * start.elapsed_time(end), host)


def clock_of(device: torch.device) -> Clock:
    """The clock for calls on this device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def time_in_turns(calls: Mapping[str, Call], clock: Clock, seconds: float, rivals: Collection[str] = (),
                  rounds: int = ROUNDS) -> dict[str, Time]:
    """Median times by name, of at most `rounds` rounds and about `seconds`; at least one round.

    Of the `rivals` only the fastest matters: one far behind after the first round drops out of the others.
    """
    ready = {name: call for name, call in calls.items() if _runs(name, call)}
    samples: dict[str, list[Time]] = {name: [] for name in ready}
    start = clock.now()
    for turn in range(rounds):
        for name, call in list(ready.items())[::-1 if turn % 2 else 1]:
            samples[name].append(clock.time(call))
        if clock.now() - start > seconds:
            break
        if turn == 0:
            fastest = min((samples[name][0].device for name in ready if name in rivals), default=0.0)
            for name in [name for name in ready if name in rivals and samples[name][0].device > SLOW * fastest]:
                del ready[name]
    return {name: Time(statistics.median(x.device for x in taken), statistics.median(x.host for x in taken))
            for name, taken in samples.items()}


def _runs(name: str, call: Call) -> bool:
    """Run a call for the first time."""
    try:
        call()
    except RuntimeError as error:  # out of memory, or a kernel that its own checks did not keep from this call
        log.debug("%s is not timed: %s", name, error)
        return False
    return True
