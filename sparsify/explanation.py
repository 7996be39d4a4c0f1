"""Explain what the pass does to a model: one record per attention site, from one call of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from sparsify import ops
from sparsify.backend import Backend, compiled_call, rewrite_graph
from sparsify.page import render
from sparsify.passes.site import SiteRecord
from sparsify.tracing import describe


@dataclass(frozen=True)
class ExplainedSite:
    """A site record, the graph it is in (0: the first that ran), and the density of this call where it ran sparse."""

    graph: int
    record: SiteRecord
    density: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"graph": self.graph, **self.record.to_dict(), "density": self.density}

    def __str__(self) -> str:
        return describe(self.record, self.density)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it, or take `sites`, `to_dict()` or `to_html()`."""

    plan: str
    sites: tuple[ExplainedSite, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"plan": self.plan, "sites": [site.to_dict() for site in self.sites]}

    def to_html(self) -> str:
        """A page of its own: one table, nothing loaded from elsewhere."""
        return render(self._head, [site.to_dict() for site in self.sites])

    @property
    def _head(self) -> str:
        graphs = len({site.graph for site in self.sites})
        return f"{len(self.sites)} attention sites in {graphs} graphs; {self.plan}"

    def __str__(self) -> str:
        return "\n".join([self._head, *(f"{site.graph}.{site.record.index}  {site}" for site in self.sites)])


def explain(model: Any, *inputs: Any, **kwargs: Any) -> Explanation:
    """Trace `model(*inputs, **kwargs)` anew, run it once, and say what became of each attention site.

    Uses the plan that the model was compiled with, else the default plan. Neither the model nor what was compiled of it
    changes. Grad mode counts: under enabled grad mode a site that needs gradients is left as it was.
    """
    compiled = getattr(model, "_compiled_call_impl", None) if isinstance(model, nn.Module) else model
    backend: Backend | None = getattr(compiled, "sparsify", None)
    plan = backend.plan if backend is not None else None
    function = model if isinstance(model, nn.Module) else getattr(model, "_torchdynamo_orig_callable", model)
    ran: dict[Callable[..., Any], list[tuple[SiteRecord, float | None]]] = {}

    def observe(gm: fx.GraphModule, example_inputs: Sequence[Any], protects: bool = False) -> Callable[..., Any]:
        rewritten, records = rewrite_graph(gm, example_inputs, plan, protects=protects)

        def run(*args: Any) -> Any:
            with ops.counting() as counters:
                result = rewritten(*args)
            ran[run] = [(record, counters.density(record.index)) for record in records]
            return result

        return run

    def call(self: Any, *inputs: Any, **kwargs: Any) -> Any:  # `self`: module paths read as in the user's own compile
        return self.forward(*inputs, **kwargs) if isinstance(self, nn.Module) else self(*inputs, **kwargs)

    call.__code__ = call.__code__.replace()  # a code object of its own: no graph of an earlier call is reused
    protect = None if backend is None else backend.protect
    forward = function.forward if isinstance(function, nn.Module) else function
    compiled_call(call, observe, plan, protect=protect, forward=forward)(function, *inputs, **kwargs)
    sites = tuple(ExplainedSite(graph, record, density)
                  for graph, pairs in enumerate(ran.values()) for record, density in pairs)
    return Explanation(str(plan).splitlines()[0] if plan is not None else "the default plan", sites)
