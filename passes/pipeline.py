"""The passes, in order."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparsify.passes.choose import choose_budgets, strict_symbols
from sparsify.passes.find import find_attention
from sparsify.passes.normalise import normalise
from sparsify.passes.prove import prove_masks
from sparsify.passes.rewrite import rewrite
from sparsify.passes.site import SiteRecord
from sparsify.plan import Plan


def run(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """Rewrite the attention of a Dynamo graph under `plan`: the new graph, and what became of each site."""
    normal = normalise(gm, example_inputs)
    found = find_attention(normal)
    proven = prove_masks(normal, found)
    chosen = choose_budgets(proven, plan, strict_symbols(normal, example_inputs))
    records = rewrite(normal, chosen)
    return normal, records
