"""The graph pass: finds attention in an FX graph and rewrites it into the ops of `sparsify.ops`.

Graph in, graph out; launches nothing. `run` is the whole pass, `find_attention` looks without touching.
"""

if __name__ != "sparsify.passes":
    raise ImportError(
        f"this room was imported as {__name__!r}; import it as 'sparsify.passes' so that its modules exist once."
    )

from sparsify.passes.find import find_attention
from sparsify.passes.normalise import normalise
from sparsify.passes.pipeline import run
from sparsify.passes.site import AttentionSite, MaskProof, Refused, SiteRecord

__all__ = ["AttentionSite", "MaskProof", "Refused", "SiteRecord", "find_attention", "normalise", "run"]
