"""The graph pass: finds attention in an FX graph and rewrites it into the ops of `sparsify.ops`.

Graph in, graph out; launches nothing. `run` is the whole pass, in front of any backend of torch.compile:

    def backend(gm, example_inputs):
        graph, records = run(gm, example_inputs, Plan.default("cuda"))
        return another_backend(graph, example_inputs)

    torch.compile(model, backend=backend)

Its parts stand alone, on what torch.export gives as well:

    normal = normalise(gm, example_inputs)
    find_attention(normal)                    looks without touching
    rewrite(normal, plan)                     rewrites in place
"""

if __name__ != "sparsify.passes":
    raise ImportError(
        f"this room was imported as {__name__!r}; import it as 'sparsify.passes' so that its modules exist once."
    )

from sparsify.passes.find import find_attention
from sparsify.passes.normalise import normalise
from sparsify.passes.pipeline import refuse_all, rewrite, run, run_exported
from sparsify.passes.site import AttentionSite, MaskProof, Refused, SiteRecord

__all__ = ["AttentionSite", "MaskProof", "Refused", "SiteRecord", "find_attention", "normalise", "refuse_all",
           "rewrite", "run", "run_exported"]
