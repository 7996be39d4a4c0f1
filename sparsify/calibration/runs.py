"""One model, compiled once with every site adaptive, run under one budget after another.

Budgets reach the ops at run time (`sparsify.ops.probing`), so a trial compiles nothing. The dense run of a window
serves all budgets that it is compared with. Every result goes through the journal; what is known there is not run
again, and if all is, the model is not even compiled.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify import ops, timings
from sparsify.backend import compiled_call, rewrite_graph, site_shapes
from sparsify.calibration.gains import SiteCall, observe
from sparsify.calibration.gate import Evidence
from sparsify.calibration.journal import Journal
from sparsify.calibration.metrics import Metric, error_of, name_of, tensor_of
from sparsify.calibration.samples import Window
from sparsify.errors import ModelError, SampleError
from sparsify.frames import Uncompiled
from sparsify.kernels.masks import Masks
from sparsify.ops.counters import Totals
from sparsify.ops.probing import Watch
from sparsify.passes.site import SiteRecord
from sparsify.plan import Bucket, Budget, Plan, SiteShape

ADAPTIVE = Plan((Bucket(1, None, Budget(0.0)),), name="calibration")
"""Every site adaptive, at every length: what is compiled. Its tolerance is never used."""

DENSE = Budget.dense()


@dataclass(frozen=True)
class Trial:
    """Budgets to run under: buckets that touch no others; a key length outside of them is dense."""

    buckets: tuple[Bucket, ...]

    def budget_of(self, site: int, kv_len: int) -> Budget:
        return next((bucket.budget_of(site) for bucket in self.buckets if kv_len in bucket), DENSE)


@dataclass(frozen=True)
class Result:
    """One window under one trial.

    error      by the metric
    losses     next-token loss, dense and sparse; None where outputs are no logits of tokens
    densities  kept share of the allowed key blocks, by site
    """

    error: float
    losses: tuple[float, float] | None
    densities: Mapping[int, float]

    def evidence(self, kind: str) -> Evidence:
        return Evidence(kind, self.error, self.losses)


@dataclass(frozen=True)
class Facts:
    """Of a model.

    metric  which of `metrics.NAMES` is measured
    graph   the sites of its graphs
    causal  whether no adaptive site sees a later key: only then is the loss of next tokens a loss
    """

    metric: str
    graph: tuple[SiteShape, ...]
    causal: bool


class Subject(Uncompiled):
    """Any inputs to whatever a model returns that stays as it is."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.run(*arguments, **keywords)


class Runs:
    """Runs of one model on one device."""

    def __init__(self, model: nn.Module, metric: Metric, journal: Journal, device: torch.device,
                 singles: Sequence[int]) -> None:
        self.metric, self.journal, self.device, self.singles = metric, journal, device, tuple(singles)
        self._subject = Subject(model)
        self._call: Callable[..., Any] | None = None
        self._graphs: list[list[SiteRecord]] = []
        self._durations: dict[int, list[float]] = {}

    def results(self, window: Window, trials: Sequence[Trial]) -> list[Result]:
        """A window under each trial; one dense run serves those that are not known yet."""
        keys = [("result", window.name, self._outline(window, trial)) for trial in trials]
        found = [self.journal.find(*key) for key in keys]
        if not all(found):
            dense = self._run(window, DENSE)
            for i, trial in enumerate(trials):
                if found[i] is None:
                    found[i] = self.journal.add(self._compare(window, dense, trial), *keys[i])
        return [Result(x["error"], tuple(x["losses"]) if x["losses"] else None,
                       {int(site): density for site, density in x["densities"].items()}) for x in found]

    def calls(self, window: Window) -> list[SiteCall]:
        """The calls of attention sites that a window makes, with the times of their shape classes."""
        def look() -> list[dict[str, Any]]:
            seen: list[SiteCall] = []

            def watch(site: int, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> None:
                seen.append(observe(site, q, k, v, scale, masks, self.singles))

            self._run(window, DENSE, watch)
            return [call.to_dict() for call in seen]

        return [SiteCall.from_dict(x) for x in
                self.journal.get(look, "calls", timings.mode(), self._shape(window))]

    def key_lengths(self, window: Window) -> set[int]:
        """Of the attention calls that a window makes. Attention over patches or a pooled text has fewer than tokens."""
        def look() -> list[int]:
            seen: set[int] = set()
            self._run(window, DENSE, lambda site, q, k, v, scale, masks: seen.add(k.shape[2]))
            return sorted(seen)

        return set(self.journal.get(look, "key lengths", self._shape(window)))

    def watched(self, window: Window, trial: Trial, watch: Watch) -> None:
        """Run a window once more, with somebody who sees the tensors of every call."""
        self._run(window, trial, watch)

    def about(self, window: Window) -> Facts:
        """What the first window tells of the model. Raises ModelError, with each reason, if no site is adaptive."""
        def look() -> dict[str, Any]:
            name = name_of(self.metric, self._run(window, DENSE), window.ids)
            self._refuse_without_sites()
            distinct = {repr(site_shapes([records])): records for records in self._graphs if records}
            taken = [x for records in distinct.values() for x in records if x.outcome != "refused"]
            graph = [replace(x, module=x.module.removeprefix("model.")) for x in site_shapes(list(distinct.values()))]
            return {"metric": name, "graph": [vars(x) for x in graph],
                    "causal": all(record.mask.startswith("causal") for record in taken)}

        form = "tokens" if window.ids is not None else [len(window.arguments), sorted(window.keywords)]
        facts = self.journal.get(look, "about", form)
        return Facts(facts["metric"], tuple(SiteShape(**x) for x in facts["graph"]), facts["causal"])

    def seconds(self, length: int) -> float | None:
        """What one run takes; from the nearest length that ran where this one did not, a little above its share."""
        if not self._durations:
            return None
        nearest = min(self._durations, key=lambda known: abs(known - length))
        return statistics.median(self._durations[nearest]) * ((length / nearest) ** 1.2 if nearest else 1.0)

    def _compare(self, window: Window, dense: Any, trial: Trial) -> dict[str, Any]:
        totals = Totals()
        with ops.counting(totals):
            sparse = self._run(window, trial)
        error, losses = error_of(self.about(window).metric, self.metric, dense, sparse, window.ids)
        return {"error": error, "losses": losses,
                "densities": {str(site): totals.density(site) for site in totals.sites()}}

    def _run(self, window: Window, budget: Budget | Trial,
             watch: Watch | None = None) -> Any:
        """The output of the model; NaN in a dense one is an error."""
        if self._call is None:
            self._call = compiled_call(self._subject._call_impl, self._compile, ADAPTIVE)
        budget_of = budget.budget_of if isinstance(budget, Trial) else lambda site, kv_len: budget
        arguments, keywords = _move([*window.arguments], self.device), _move(dict(window.keywords), self.device)
        start, compiled = time.perf_counter(), len(self._graphs)
        try:
            with ops.probing(budget_of, watch):
                output = self._call(*arguments, **keywords)
        except (TypeError, IndexError) as error:
            raise SampleError(f"the model does not take a sample of {len(arguments)} arguments and the keywords "
                              f"{sorted(keywords)}: {error}") from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if compiled == len(self._graphs) and watch is None:
            length = len(window.ids) if window.ids is not None else 0
            self._durations.setdefault(length, []).append(time.perf_counter() - start)
        if not isinstance(budget, Trial) and not callable(self.metric) and bool(tensor_of(output).isnan().any()):
            raise ModelError(f"model returns NaN for sample {window.name.split(':')[0]} without dropping anything. "
                             "Results so far are in the journal; give a model and dtype without NaN.")
        return output

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        rewritten, records = rewrite_graph(gm, example_inputs, ADAPTIVE)
        compiled: Any = compile_fx(rewritten, list(example_inputs))
        self._graphs.append(records)
        return compiled

    def _refuse_without_sites(self) -> None:
        records = [record for graph in self._graphs for record in graph]
        if any(record.op == "adaptive_attention" for record in records):
            return
        reasons = "; ".join(dict.fromkeys(f"{record.module or '(no module)'} at {record.line}: {record.why}"
                                          for record in records)) or "no attention was found in its graph"
        raise ModelError(f"model has no attention site that could drop anything, so there is nothing to calibrate: "
                         f"{reasons}. sparsify.explain says more.")

    def _outline(self, window: Window, trial: Trial) -> Any:
        """What a trial says for this window, as plain data: buckets that it does not meet change nothing."""
        lengths = self.key_lengths(window)
        return [[bucket.budget.to_dict(), {str(site): x.to_dict() for site, x in sorted(bucket.sites.items())},
                 sorted(length for length in lengths if length in bucket)]
                for bucket in trial.buckets if any(length in bucket for length in lengths)]

    def _shape(self, window: Window) -> str:
        return f"tokens {len(window.ids)}" if window.ids is not None else repr(
            [_shape_of(x) for x in (*window.arguments, *window.keywords.values())])


def _shape_of(x: Any) -> Any:
    return [_shape_of(y) for y in x] if isinstance(x, list | tuple) else list(x.shape) if isinstance(x, Tensor) else (
        type(x).__name__)


def _move(data: Any, device: torch.device) -> Any:
    if isinstance(data, Mapping):
        return {name: _move(x, device) for name, x in data.items()}
    if isinstance(data, list | tuple):
        return [_move(x, device) for x in data] if isinstance(data, list) else tuple(_move(x, device) for x in data)
    return data.to(device) if isinstance(data, Tensor) else data
