"""What fraction of the attention of real architectures does the pass find, and do they still compute the same?

`rewrite` has the form that the check of the attention zoo takes:

    python ZOO/coverage_check.py --rewriter benchmarks.coverage:rewrite --json coverage.json
    python -m benchmarks.coverage coverage.json

The second command writes the table per library to benchmarks/coverage.md and the totals to benchmarks/figures.json.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsify.backend import graph_room, rewrite_graph, tracing_config
from sparsify.plan import Plan

DENSE = Plan.dense()


def rewrite(model: Any, *example_inputs: torch.Tensor) -> tuple[Callable[..., Any], Callable[[], int]]:
    """`model` with its attention rewritten under the dense plan, run as a graph, and the count of rewritten calls.

    Counted is what runs: each run of a graph adds its sites that were not refused.
    """
    executed = 0

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        rewritten, records = rewrite_graph(gm, inputs, DENSE)
        taken = sum(record.outcome != "refused" for record in records)

        def run(*args: Any) -> Any:
            nonlocal executed
            result = rewritten(*args)
            executed += taken
            return result

        return run

    compiled = torch.compile(model, backend=backend, dynamic=False)

    def call(*args: Any) -> Any:
        with tracing_config(graph_room(DENSE), size_oblivious=False, data_dependent=True):
            return compiled(*args)

    return call, lambda: executed
