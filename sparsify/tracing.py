"""What the pass did, told to torch's own tools.

    TORCH_LOGS="sparsify"    a line for each bucket that is compiled; "+sparsify": a record for each attention site too
    TORCH_TRACE=folder       the graph before and after, and the records as JSON; `tlparse` shows what is in the folder
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence

from torch import fx
from torch._logging import trace_structured

from sparsify.passes.site import SiteRecord

log = logging.getLogger("sparsify")


def log_records(records: Sequence[SiteRecord]) -> None:
    """One line for the bucket that a graph serves, at INFO; its records at DEBUG."""
    taken = [record for record in records if record.outcome != "refused"]
    buckets = ", ".join(dict.fromkeys(record.bucket for record in taken)) or "none"
    budgets = Counter(record.budget for record in taken)
    what = ", ".join(f"{budget} at {count} sites" for budget, count in budgets.items()) or "no attention rewritten"
    log.info("sparsify: compiled bucket %s: %s; %d sites refused", buckets, what, len(records) - len(taken))
    for record in records:
        log.debug("site %d: %s", record.index, describe(record))


def describe(record: SiteRecord, density: float | None = None) -> str:
    """A record in words, on a few lines."""
    place = f"{record.module or '(no module)'} at {record.line}"
    if record.outcome == "refused":
        return f"{place}\n    {record.form}, left as it was: {record.why}"
    depends = f" (made of {', '.join(record.depends)})" if record.depends else ""
    share = "" if density is None else f", density {density:.3f}"
    share += f"; {record.protection}" if record.protection else ""
    return (f"{place}\n    {record.form}, mask: {record.mask}{depends}\n"
            f"    {record.outcome}, {record.op}{share}; bucket {record.bucket}, budget {record.budget} ({record.why})")


def trace_graph(name: str, gm: fx.GraphModule) -> None:
    """Leave a graph in the structured trace; costs nothing where nobody traces."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True))


def trace_records(records: Sequence[SiteRecord]) -> None:
    """Leave what became of each site in the structured trace."""
    trace_structured("artifact", metadata_fn=lambda: {"name": "sparsify_sites", "encoding": "json"},
                     payload_fn=lambda: json.dumps([record.to_dict() for record in records], indent=2))
