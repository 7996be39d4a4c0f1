"""The largest tolerance that held-out documents let pass, and with it all smaller ones that were tried.

A ladder around the chosen tolerance, lower ones where nothing passes; then, where runs are cheap, up while all pass,
and by bisection between what passes and what does not. Errors grow with the tolerance, so it is the one that a fixed
sequence of tests from the safe end up would end at: trying several spends no confidence.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

from sparsify.calibration.gate import Judgement

LADDERS = ((2 ** -0.25, 1.0, 2 ** 0.25), (2 ** -0.5,), (2 ** -1.0, 2 ** -1.5, 2 ** -2.0))
"""What is judged, as factors on the chosen tolerance; each only if nothing passes in the one before."""
RAISE = 2 ** 0.25
"""What is judged next where all pass, as a factor on the largest."""


class Judged(NamedTuple):
    """What held-out documents say of one budget, and what it keeps of every site."""

    verdict: Judgement
    densities: dict[int, float]


JudgeAll = Callable[[Sequence[float]], dict[float, Judged]]


def climb(chosen: float, judge_all: JudgeAll, ladders: Sequence[Sequence[float]], raises: int,
          bisections: int) -> dict[float, Judged]:
    """What was judged, by tolerance.

    judge_all   verdicts on tolerances, by what it has rounded them to
    raises      how often the largest is raised, as long as all pass
    bisections  how often what lies between the largest that passes and the next above it is halved
    """
    judged: dict[float, Judged] = {}
    for ladder in ladders:
        judged |= judge_all([chosen * factor for factor in ladder])
        if largest_passing(judged) is not None:
            break
    for _ in range(raises):
        if largest_passing(judged) == max(judged):
            judged |= judge_all([max(judged) * RAISE])
    for _ in range(bisections):
        best = largest_passing(judged)
        above = [tolerance for tolerance in judged if best is not None and tolerance > best]
        if best is not None and above:
            judged |= judge_all([sqrt(best * min(above))])
    return judged


def largest_passing(judged: Mapping[float, Judged]) -> float | None:
    """The largest tolerance that passes with all below it; None: the smallest does not."""
    return max(itertools.takewhile(lambda tolerance: judged[tolerance].verdict.passed, sorted(judged)), default=None)
