"""`calibrate`: find, for every bucket of key lengths, the budget that saves the most time and passes its gate.

For each length, ascending, on windows of that length:
1. choose     the tolerance: a walk on a grid with the first document, then the grid around it with the others; between
              two points log error is linear in log tolerance. Aimed at is the mean whose bound would just pass
2. vary       singles, local blocks, sinks, dense sites: taken only if documents that did not propose it confirm, with
              confidence, less error at equal time
3. judge      on held-out documents: the largest tolerance that passes, as do all below it that were tried; ladder.py
4. gain       dense where less than 3 % of attention's time is saved here
5. promise    when all buckets stand: what each may promise of missed peaks, see promises.py

A bucket reaches from half its length to its length; what lies between buckets and below them is dense, and beyond the
longest the last budget holds: nothing is more sparse than documents of its own length allow.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.calibration.buckets import MOST_BUCKETS, assemble, bucket_of
from sparsify.calibration.gains import LEAST_GAIN, gain
from sparsify.calibration.gate import CONFIDENCE, Judgement, judge, t_quantile, upper_bound
from sparsify.calibration.journal import Journal, digest
from sparsify.calibration.ladder import LADDERS, Judged, climb, largest_passing
from sparsify.calibration.metrics import NAMES, Metric
from sparsify.calibration.progress import Progress, teller
from sparsify.calibration.promises import with_bounds
from sparsify.calibration.request import check_arguments, encoder, fingerprint, lengths_of, settings
from sparsify.calibration.runs import Result, Runs, Trial
from sparsify.calibration.samples import (
    LEAST_CHOOSERS,
    LEAST_JUDGES,
    Document,
    Shares,
    Window,
    documents_needed,
    held_out,
    read_documents,
    windows_of,
)
from sparsify.errors import OptionError, SampleError
from sparsify.measurement import measuring
from sparsify.plan import DEFAULT_TOLERANCE, Bucket, Budget, Gate, Plan, graph_hash

GRID = tuple(float(f"{0.0025 * 2 ** (i / 2):.3g}") for i in range(15))
"""Tolerances, two a doubling: 0.0025 to 0.32."""
STEEPNESS = 1.5  # of log error over log tolerance, where no two points tell; the shipped model has 2.4 (0.03 to 0.04)
SCATTER = 0.5  # standard deviation over mean between documents, where there are too few to tell
VARIANT_SINGLES = (2, 12)
FEW_DOCUMENTS = 10
NOTHING_DROPPED = 0.9  # density from which on no machine gains
LEAST_IMPROVEMENT = 0.95  # of the error at equal time, for a variant to be worth a budget of its own
CLEARLY_WORSE = 1.1  # error at equal time of a variant that is not tried at longer lengths
LEAST_ERROR = 0.05  # of max_error: below, the errors of two budgets are both next to nothing
MOST_SHIFT = log(2.0)  # by which a variant may move the tolerance beyond what the plain budget showed
TINY = 1e-9  # an error below is none: logarithms are taken of it

# Documents of each share at most: as many as these tokens hold, between the bounds. One length takes about 65 runs on a
# CPU, of 10 s at 4K tokens for SmolLM2 on two cores.
TOKENS = {"cpu": {"choosers": 20_480, "judges": 32_768}, "cuda": {"choosers": 2**20, "judges": 2**20}}
DOCUMENTS = {"cpu": {"choosers": (4, 6), "judges": (4, 8)}, "cuda": {"choosers": (16, 32), "judges": (16, 40)}}
# Raises and bisections of the ladder: each is two runs of every held-out document, minutes on a CPU.
REFINEMENTS = {"cpu": (0, 0), "cuda": (2, 2)}


def calibrate(model: nn.Module, samples: Iterable[Any], *, max_error: float = 0.005, metric: Metric = "kl",
              lengths: Sequence[int] | None = None, holdout: float = 0.3, tokenizer: Any = None,
              progress: bool | Callable[[str], None] = True, out: str | Path | None = None) -> Plan:
    """Fit a plan to a model and to samples of what it will run on.

    model      any nn.Module that compiles, in eval mode, on the device and in the dtype that it will run in; it is
               compiled on the side and not changed
    samples    an iterable, read once and no further than 4096, of documents: token ids int64 [tokens] or [1, tokens]
               or strings, from which windows of each length are cut; or whole inputs of the model: a tensor, a tuple
               of arguments, a dict of keywords. `Sample(inputs, kind)` labels one. Each is one draw of what the model
               will meet: not pages of one book, if it will meet other books
    max_error  what the upper confidence bound of the mean error must not exceed, in units of the metric
    metric     "kl": KL(dense || sparse) in nats a token; the next-token loss must not rise by more than 0.3 % (upper
               bound 0.5 %) either. "loss": rise of that loss, nats a token. A callable (dense output, sparse output)
               -> float. Where the model returns no logits for tokens, "kl" stands for the relative output error
               |sparse - dense| / |dense|, and the plan says so
    lengths    key lengths, the upper ends of buckets; None: LENGTHS of the device, as far as model and documents reach,
               or the key lengths that whole inputs make
    holdout    share of the documents that judge and choose nothing
    tokenizer  for strings; None: the one that belongs to a Hugging Face model
    progress   True: lines on stderr; or called with a line now and then
    out        where the plan is saved. Beside it, as .journal.jsonl, lies every result: killed and called again with
               the same arguments, it goes on where it was and ends with the same plan

    Raises SampleError, ModelError, DeviceError, OptionError.
    """
    device, dtype = check_arguments(model, max_error, metric, lengths, holdout)
    if out is not None and Path(out).is_dir():
        raise OptionError(f"out is {str(out)!r}, a folder. Give the path of a plan file.")
    journal_path = None if out is None else Path(out).with_suffix(".journal.jsonl")
    journal = Journal(journal_path, settings(model, metric, device, dtype))
    wanted = lengths_of(lengths, model, device)
    most = {length: sum(_most(device, share, length) for share in ("choosers", "judges")) * 4 for length in wanted}
    documents = read_documents(samples, encoder(model, tokenizer), wanted, most)
    with measuring(model):
        runs = Runs(model, metric, journal, device, (Budget.singles, *VARIANT_SINGLES))
        search = _Search(runs, documents, max_error, holdout, progress, device)
        plan = search.run(wanted, exact=lengths is not None)
    plan = replace(plan, fingerprint={"graph": graph_hash(plan.graph), **fingerprint(device, dtype)})
    if out is not None:
        plan.save(out)
    return plan


@dataclass(frozen=True)
class _Length:
    """One length to calibrate: its windows, and the range of key lengths that its budget will hold for."""

    length: int
    shares: Shares
    lo: int


@dataclass(frozen=True)
class _Choice:
    """A budget to judge, before its tolerance is final."""

    budget: Budget
    sites: Mapping[int, Budget]
    tried: Mapping[str, float]


class _Search:
    """The search of one calibration.

    `decided` grows with the lengths: sites of one model may meet several. `lost`: variants not to be tried again.
    """

    def __init__(self, runs: Runs, documents: Sequence[Document], max_error: float, holdout: float,
                 progress: bool | Callable[[str], None], device: torch.device) -> None:
        self.runs, self.documents, self.max_error, self.device = runs, documents, max_error, device
        self.holdout = holdout
        self.held = held_out(documents, holdout)
        self.say = teller(progress)
        self.decided: list[Bucket] = []
        self.lost: set[str] = set()

    def run(self, wanted: Sequence[int], exact: bool) -> Plan:
        """The plan, its fingerprint aside."""
        are_texts = self.documents[0].tokens is not None
        lengths = self._of_texts(wanted, exact) if are_texts else self._of_inputs(wanted if exact else None)
        first = lengths[0].shares.choosers[0]
        self.facts = self.runs.about(first)
        self.check_loss = self.facts.metric == "kl" and self.facts.causal
        judging = 5 + 2 * max(REFINEMENTS[self.device.type])
        planned = [7 * len(x.shares.choosers) + judging * len(x.shares.judges) for x in lengths]
        self.tell = Progress(self.say, [x.length for x in lengths], planned, self.runs.seconds)
        for place, length in enumerate(lengths):
            self.tell.enter(place)
            self.decided.append(bucket_of(self._calibrate(length), length.lo - 1))
            self.say(f"[{place + 1}/{len(lengths)}] {length.length} keys: {self.decided[-1].budget}; "
                     f"{self.decided[-1].gates[0]}")
        plan = Plan(assemble(self.decided), name="calibrated", calibration=self._summary(lengths),
                    graph=self.facts.graph)
        windows = {x.length: (*x.shares.choosers, *x.shares.judges) for x in lengths}
        return with_bounds(plan, windows, self.runs, self.say)

    def _of_texts(self, wanted: Sequence[int], exact: bool) -> list[_Length]:
        """Lengths that enough documents reach; all of them, if they were asked for."""
        found, last = [], 0
        for length in wanted:
            shares = self._capped(windows_of(self.documents, self.held, length), length)
            if len(shares.judges) < LEAST_JUDGES or len(shares.choosers) < LEAST_CHOOSERS:
                if exact:
                    self._refuse(length, shares)
                continue
            self.say(f"compiling the model, and timing its layers at {length} tokens")
            keys = max(call.kv_len for call in self._calls(shares.choosers[0]))
            found.append(_Length(keys, shares, max(last + 1, keys // 2 + 1)))
            last = keys
        if not found:
            self._refuse(wanted[0], windows_of(self.documents, self.held, wanted[0]))
        return found

    def _of_inputs(self, wanted: Sequence[int] | None) -> list[_Length]:
        """The key lengths that whole inputs make, a bucket a doubling from the longest down; or those asked for."""
        self.say("compiling the model, and timing its layers")
        shares = windows_of(self.documents, self.held, 0)
        meets = {window.name: {call.kv_len for call in self._calls(window)}
                 for window in (*shares.choosers, *shares.judges)}
        lengths = sorted({length for met in meets.values() for length in met})
        tops: list[int] = list(wanted or ())
        while wanted is None and lengths and len(tops) < MOST_BUCKETS - 1:
            tops.insert(0, lengths[-1])
            lengths = [length for length in lengths if length <= tops[0] // 2]
        found, last = [], 0
        for top in tops:
            lo = max(last + 1, top // 2 + 1)
            chosen = Shares(*(tuple(w for w in share if any(lo <= x <= top for x in meets[w.name]))
                              for share in (shares.choosers, shares.judges)))
            if len(chosen.judges) < LEAST_JUDGES or len(chosen.choosers) < LEAST_CHOOSERS:
                self._refuse(top, chosen)
            found.append(_Length(top, self._capped(chosen, top), lo))
            last = top
        return found

    def _calls(self, window: Window) -> list[Any]:
        calls = self.runs.calls(window)
        if not calls:
            self.runs.about(window)  # says why
        return calls

    def _refuse(self, length: int, shares: Shares) -> None:
        raise SampleError(f"samples has {len(shares.choosers) + len(shares.judges)} documents of {length} keys, "
                          f"{len(shares.judges)} of them held out. At holdout {self.holdout:g} it takes "
                          f"{documents_needed(self.holdout)} different ones, to choose on some and judge on others. "
                          "Give more or longer documents, or shorter lengths.")

    def _capped(self, shares: Shares, length: int) -> Shares:
        """As many as a length can afford; one of every kind at least, which come first."""
        def cut(windows: tuple[Window, ...], share: str) -> tuple[Window, ...]:
            return windows[:max(_most(self.device, share, length), len({window.kind for window in windows}))]

        return Shares(cut(shares.choosers, "choosers"), cut(shares.judges, "judges"))

    def _trial(self, length: _Length, budget: Budget, sites: Mapping[int, Budget] | None = None) -> Trial:
        return Trial((*self.decided, Bucket(length.lo, length.length + 1, budget, sites or {})))

    def _calibrate(self, length: _Length) -> Gate:
        """What is found at one length."""
        choosers = length.shares.choosers
        points = self._walk(length, choosers)
        target = self.max_error / (1 + t_quantile(len(length.shares.judges) - 1) * _scatter(points, self.max_error)
                                   / sqrt(len(length.shares.judges)))
        tolerance, steepness = _solve(points, target)
        nearest = min(points, key=lambda known: abs(log(known / tolerance)))
        most = min((known for known in points if known >= tolerance), default=max(points))
        densities, calls = _mean_densities(points[most]), self._calls_of(length)
        if _mean_density(densities) >= NOTHING_DROPPED:  # no time on judging: no machine gains here
            evidence = judge([x.evidence(w.kind) for w, x in zip(choosers, points[most], strict=True)],
                             self.max_error, self.check_loss)
            return self._gate(length, Budget(most), {}, evidence, densities, False, {},
                              "next to nothing can be dropped: not judged on held-out documents")
        if gain(calls, densities, _budgets(calls, Budget(most), {})) < LEAST_GAIN:  # other machines may: one rung
            plain = _Choice(Budget(_rounded(tolerance)), {}, {})
            return self._judge(length, plain, LADDERS[1:], (0, 0))
        return self._judge(length, self._vary(length, points, nearest, tolerance, steepness), LADDERS,
                           REFINEMENTS[self.device.type])

    def _walk(self, length: _Length, choosers: Sequence[Window]) -> dict[float, list[Result]]:
        """Results of every chooser at the grid points around the tolerance where the mean error meets max_error."""
        def run(window: Window, places: Iterable[int]) -> list[Result]:
            return self.runs.results(window, [self._trial(length, Budget(GRID[i])) for i in places])

        self.tell.step("looking for the tolerance")
        start = next((b.gates[0].budget.tolerance for b in reversed(self.decided) if b.gates[0].passed), None)
        place = min(range(1, len(GRID) - 1), key=lambda i: abs(log(GRID[i] / (start or DEFAULT_TOLERANCE))))
        errors: dict[int, float] = {}
        wanted = [place - 1, place, place + 1]
        while wanted:  # until one point is below max_error and the next above, or the grid ends
            errors |= {i: x.error for i, x in zip(wanted, run(choosers[0], wanted), strict=True)}
            self.tell.step("looking for the tolerance", 1 + len(wanted))
            low, high = min(errors), max(errors)
            wanted = ([i for i in (high + 1, high + 2) if i < len(GRID)] if errors[high] <= self.max_error else
                      [i for i in (low - 2, low - 1) if i >= 0] if errors[low] > self.max_error else [])
        place = max((i for i, error in errors.items() if error <= self.max_error), default=0)
        places = [place, place + 1] if place + 1 < len(GRID) else [place - 1, place]
        while True:
            found: dict[int, list[Result]] = {i: [] for i in places}
            for number, window in enumerate(choosers, start=1):
                for i, result in zip(places, run(window, places), strict=True):
                    found[i].append(result)
                self.tell.step(f"choosing, document {number} of {len(choosers)}", 1 + len(places))
            means = {i: _mean_error(results) for i, results in found.items()}
            if means[places[-1]] < self.max_error and places[-1] + 1 < len(GRID):
                places = [*places, places[-1] + 1]
            elif means[places[0]] > self.max_error and places[0] > 0:
                places = [places[0] - 1, *places]
            else:
                return {GRID[i]: results for i, results in found.items()}

    def _vary(self, length: _Length, points: Mapping[float, list[Result]], at: float, tolerance: float,
              steepness: float) -> _Choice:
        """The variant with the least error at equal time, if documents that proposed none confirm it."""
        plain = _Choice(Budget(_rounded(tolerance)), {}, {})
        choosers = length.shares.choosers
        proposers, confirmers = range(len(choosers) // 2), range(len(choosers) // 2, len(choosers))
        others = sorted((known for known in points if known != at), key=lambda known: abs(log(known / at)))
        if len(choosers) < 2 * LEAST_CHOOSERS or not others:
            return plain
        windows = [choosers[i] for i in confirmers]
        calls = self._calls_of(length)

        def errors(results: Sequence[Result]) -> list[float]:
            return [log(max(x.error, TINY)) for x in results]

        def seconds(results: Sequence[Result], budget: Budget, sites: Mapping[int, Budget]) -> float:
            return 1 - gain(calls, _mean_densities(results), _budgets(calls, budget, sites))

        base, other = ([points[known][i] for i in confirmers] for known in (at, others[0]))
        base_time, other_time = seconds(base, Budget(at), {}), seconds(other, Budget(others[0]), {})
        rise = statistics.fmean(errors(other)) - statistics.fmean(errors(base))
        slope = rise / (other_time - base_time) if other_time != base_time else 0.0
        if not slope < 0 or _mean_error(base) < LEAST_ERROR * self.max_error:
            return plain  # more time does not mean less error here, or there is none: nothing to compare at
        proposed = self._proposals(calls, _mean_densities([points[at][i] for i in proposers]), at)
        if not proposed:
            return plain
        trials = [self._trial(length, *x) for x in proposed.values()]
        results = [self.runs.results(window, trials) for window in windows]
        self.tell.step("trying variants", len(windows) * (1 + len(proposed)))
        tried, best, choice = {}, 0.0, plain
        for place, (name, (budget, sites)) in enumerate(proposed.items()):
            mine = [per_window[place] for per_window in results]
            time = seconds(mine, budget, sites)
            ratios = [ours - (plain_error + slope * (time - base_time))
                      for ours, plain_error in zip(errors(mine), errors(base), strict=True)]
            mean = statistics.fmean(ratios)
            tried[name] = float(f"{exp(mean):.3g}")
            if mean > log(CLEARLY_WORSE):
                self.lost.add(name)  # longer lengths are dear, and what loses here has not been seen to win there
            is_near = abs(time - base_time) <= 2 * abs(other_time - base_time)  # else its time is extrapolated to
            if is_near and mean < min(best, log(LEAST_IMPROVEMENT)) and upper_bound(ratios) < 0:
                shift = (statistics.fmean(errors(base)) - statistics.fmean(errors(mine))) / steepness
                shift = max(-MOST_SHIFT, min(MOST_SHIFT, shift))
                best = mean
                choice = _Choice(replace(budget, tolerance=_rounded(min(GRID[-1], tolerance * exp(shift)))), sites, {})
        return replace(choice, tried=tried)

    def _proposals(self, calls: Sequence[Any], densities: Mapping[int, float],
                   tolerance: float) -> dict[str, tuple[Budget, Mapping[int, Budget]]]:
        """Variants by name. A site that gains nothing here may as well be dense, and spend no error."""
        budget, dense = Budget(tolerance), Budget.dense()
        found: dict[str, tuple[Budget, Mapping[int, Budget]]] = {
            f"singles {m}": (replace(budget, singles=m), {}) for m in VARIANT_SINGLES}
        found["local 2"] = replace(budget, local=2), {}
        found["sinks 2"] = replace(budget, sinks=2), {}
        sites = sorted({call.site for call in calls})
        found["first site dense"] = budget, {sites[0]: dense}
        idle = [site for site in sites
                if gain([call for call in calls if call.site == site], densities, {site: budget}) < LEAST_GAIN]
        if 0 < len(idle) < len(sites) and idle != [sites[0]]:
            found["sites without gain dense"] = budget, dict.fromkeys(idle, dense)
        return {name: x for name, x in found.items() if name not in self.lost and (len(sites) > 1 or not x[1])}

    def _judge(self, length: _Length, choice: _Choice, ladders: Sequence[Sequence[float]],
               refinements: tuple[int, int]) -> Gate:
        """Held-out documents decide."""
        judged = climb(choice.budget.tolerance or 0.0, partial(self._judge_all, length, choice), ladders, *refinements)
        best = largest_passing(judged)
        tolerance = min(judged) if best is None else best
        budget = replace(choice.budget, tolerance=tolerance)
        verdict, densities = judged[tolerance]
        passed, note = verdict.passed, ""
        if passed:
            passed, capped, note = self._holds_below(length, budget, choice.sites)
            if capped != budget:  # more exact: it passes all the more
                budget = capped
                ((verdict, densities),) = self._judge_all(length, choice, [capped.tolerance or 0.0]).values()
                passed = verdict.passed  # of a metric that does not fall with the tolerance it may not
        return self._gate(length, budget, choice.sites, verdict, densities, passed, choice.tried, note)

    def _judge_all(self, length: _Length, choice: _Choice, tolerances: Sequence[float]) -> dict[float, Judged]:
        """Verdicts of the held-out documents; above the grid nothing is judged."""
        judges, rungs = length.shares.judges, sorted({_rounded(min(x, GRID[-1])) for x in tolerances})
        trials = [self._trial(length, replace(choice.budget, tolerance=x), choice.sites) for x in rungs]
        by_window = []
        for number, window in enumerate(judges, start=1):
            by_window.append(self.runs.results(window, trials))
            self.tell.step(f"judging, held-out document {number} of {len(judges)}", 1 + len(rungs))
        judged = {}
        for tolerance, results in zip(rungs, zip(*by_window, strict=True), strict=True):
            evidence = [x.evidence(window.kind) for window, x in zip(judges, results, strict=True)]
            judged[tolerance] = Judged(judge(evidence, self.max_error, self.check_loss), _mean_densities(results))
        return judged

    def _holds_below(self, length: _Length, budget: Budget, sites: Mapping[int, Budget]) -> tuple[bool, Budget, str]:
        """Whether a budget that passed at the long end of its bucket holds at the short end; if not, a smaller one.

        It does where the length before passed at no smaller tolerance, for the bucket begins there. Else held-out
        windows of the short end decide, and where they say no, the tolerance of the length before holds, if it passed.
        """
        before = self.decided[-1].gates[0] if self.decided else None
        least = 0.0
        if before is not None and before.passed and before.length == length.lo - 1:
            least = before.budget.tolerance or 0.0
        if least >= (budget.tolerance or 0.0):
            return True, budget, ""
        judges = self._judges_of_the_short_end(length)
        if judges:
            trial = self._trial(length, budget, sites)
            evidence = [self.runs.results(x, [trial])[0].evidence(x.kind) for x in judges]
            self.tell.step("judging the short end of the bucket", 2 * len(evidence))
            verdict = judge(evidence, self.max_error, self.check_loss)
            if verdict.passed:
                return True, budget, f"held at {length.lo} keys too"
            if not least:
                return False, budget, f"at {length.lo} keys: {'; '.join(verdict.failures)}"
        return True, replace(budget, tolerance=least or budget.tolerance), "as exact as the length before" * bool(least)

    def _judges_of_the_short_end(self, length: _Length) -> tuple[Window, ...]:
        """Held-out windows with the fewest keys of a bucket; none of whole inputs, which nothing cuts."""
        ids = length.shares.judges[0].ids
        if ids is None:
            return ()
        tokens = -(-length.lo * len(ids) // length.length)
        judges = windows_of(self.documents, self.held, tokens).judges[:len(length.shares.judges)]
        meets = self.runs.key_lengths(judges[0])
        return judges if any(length.lo <= keys <= length.length for keys in meets) else ()

    def _gate(self, length: _Length, budget: Budget, sites: Mapping[int, Budget], verdict: Judgement,
              densities: Mapping[int, float], passed: bool, tried: Mapping[str, float], note: str) -> Gate:
        calls = self._calls_of(length)
        saved = gain(calls, densities, _budgets(calls, budget, sites))
        notes = [*verdict.failures, note]
        if verdict.documents < FEW_DOCUMENTS:
            notes.append(f"{verdict.documents} documents make a wide bound")
        unjudged = sorted({x.kind for x in self.documents} - set(verdict.kinds))
        if unjudged:
            notes.append(f"no document of {', '.join(map(repr, unjudged))} judged: too few or too short")
        if tried:
            notes.append("error at equal time: " + ", ".join(f"{name} {ratio:g}x" for name, ratio in tried.items()))
        inside = {call.site for call in calls}
        why = "; ".join(filter(None, notes))
        densities = {site: float(f"{x:.6g}") for site, x in sorted(densities.items()) if site in inside}
        return Gate(
            length=length.length, budget=budget, passed=passed, documents=verdict.documents, mean=verdict.mean,
            upper=verdict.upper if verdict.upper < inf else 1e300, density=_mean_density(densities), gain=saved,
            timed=all(call.times or call.small for call in calls), why=why, sites=dict(sites), rise=verdict.rise,
            rise_upper=verdict.rise_upper, kinds={k: x for k, x in verdict.kinds.items() if k}, densities=densities)

    def _calls_of(self, length: _Length) -> list[Any]:
        """The calls whose key length is in this bucket."""
        return [x for x in self.runs.calls(length.shares.choosers[0]) if length.lo <= x.kv_len <= length.length]

    def _summary(self, lengths: Sequence[_Length]) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        for document in self.documents:
            kinds[document.kind] = kinds.get(document.kind, 0) + 1
        return {
            "metric": NAMES[self.facts.metric], "max_error": self.max_error, "confidence": CONFIDENCE,
            "bound": "one-sided, Student's t over documents, each bucket by itself", "holdout": self.holdout,
            "documents": kinds, "texts": len({x.source for x in self.documents}),
            "judges": {str(x.length): len(x.shares.judges) for x in lengths},
            "samples": digest(sorted(x.name for x in self.documents))[:12],
        }


def _most(device: torch.device, share: str, length: int) -> int:
    """Documents that a share of a length runs on, at most."""
    least, most = DOCUMENTS[device.type][share]
    return max(least, min(most, TOKENS[device.type][share] // length))


def _mean_error(results: Sequence[Result]) -> float:
    return statistics.fmean(x.error for x in results)


def _mean_densities(results: Sequence[Result]) -> dict[int, float]:
    """Mean by site over windows."""
    sites = sorted({site for x in results for site in x.densities})
    return {site: statistics.fmean(x.densities[site] for x in results if site in x.densities) for site in sites}


def _mean_density(densities: Mapping[int, float]) -> float:
    return statistics.fmean(densities.values()) if densities else 1.0


def _scatter(points: Mapping[float, list[Result]], max_error: float) -> float:
    """Standard deviation over mean between documents, at the tolerance whose error is nearest to max_error."""
    results = min(points.values(), key=lambda known: abs(log(max(_mean_error(known), TINY) / max_error)))
    mean = _mean_error(results)
    if len(results) < 3 or mean <= TINY:
        return SCATTER
    return min(2.0, max(0.1, statistics.stdev(x.error for x in results) / mean))


def _solve(points: Mapping[float, list[Result]], target: float) -> tuple[float, float]:
    """Where the mean error meets the target, by the two points around it, and how steep it is there (log over log)."""
    known = sorted((tolerance, max(_mean_error(results), TINY)) for tolerance, results in points.items())
    upper = next((i for i, (_, error) in enumerate(known) if error > target), len(known))
    pair = known[max(0, min(upper, len(known) - 1) - 1):][:2]
    steepness = STEEPNESS
    if len(pair) == 2 and pair[1][1] > pair[0][1] > TINY:
        steepness = min(4.0, max(0.5, log(pair[1][1] / pair[0][1]) / log(pair[1][0] / pair[0][0])))
    if upper == len(known):
        return known[-1][0], steepness  # the largest of the grid: nothing is extrapolated up
    if upper == 0:
        return known[0][0] * (target / known[0][1]) ** (1 / steepness), steepness
    (low, least), (high, most) = known[upper - 1:upper + 1]
    return low * (high / low) ** (log(target / least) / log(most / least)), steepness


def _rounded(tolerance: float) -> float:
    return min(1.0, float(f"{tolerance:.3g}"))


def _budgets(calls: Sequence[Any], budget: Budget, sites: Mapping[int, Budget]) -> dict[int, Budget]:
    return {call.site: sites.get(call.site, budget) for call in calls}
