"""Where a calibration is and how long it will take, as lines of text."""

import sys
import time
from collections.abc import Callable, Sequence

SECONDS_BETWEEN = 10.0


class Progress:
    """Tells steps, each with the time that is left: runs to come, each as long as runs of that length took so far."""

    def __init__(self, tell: Callable[[str], None], lengths: Sequence[int], runs_of_length: Sequence[int],
                 seconds_of: Callable[[int], float | None]) -> None:
        self._tell = tell
        self._lengths, self._planned, self._seconds_of = list(lengths), list(runs_of_length), seconds_of
        self._place, self._done = 0, 0

    def enter(self, place: int) -> None:
        """The length at this place comes next."""
        self._place, self._done = place, 0

    def step(self, what: str, runs: int = 0) -> None:
        """`what` begins; `runs` more have ended."""
        self._done += runs
        left = [max(0, self._planned[self._place] - self._done), *self._planned[self._place + 1:]]
        times = [self._seconds_of(length) for length in self._lengths[self._place:]]
        seconds = sum(count * (each or 0.0) for count, each in zip(left, times, strict=True))
        rest = "" if not seconds else f", about {_say(seconds)} left"
        self._tell(f"[{self._place + 1}/{len(self._lengths)}] {self._lengths[self._place]} keys: {what}{rest}")


def teller(progress: bool | Callable[[str], None]) -> Callable[[str], None]:
    """What tells a line, from what a caller may give as `progress`."""
    return progress if callable(progress) else _to_stderr() if progress else lambda line: None


def _to_stderr() -> Callable[[str], None]:
    """Every line on a terminal, where it moves; elsewhere one every ten seconds."""
    told = 0.0

    def tell(line: str) -> None:
        nonlocal told
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - told > SECONDS_BETWEEN:
            told = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell


def _say(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
