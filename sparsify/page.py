"""The page of `Explanation.to_html`: what became of each attention site, as one table with its style inside."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLUMNS = {
    "site": "graph, and place in it", "where": "source line, module", "form": "how it was written",
    "outcome": "what it became", "op": "what runs now", "mask": "as proven",
    "depends": "inputs that masks and biases are made of", "bucket": "key lengths that this graph serves",
    "budget": "of this site in this bucket", "density": "kept share of the score area, this call",
    "protection": "whether protected keys are kept, where some are",
    "why": "how the bucket was known, or why it was left",
}

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse }
th, td { padding: .35em .8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: #f4f4f4 }
td:nth-child(2), td:nth-child(6) { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
tr.sparse td:nth-child(4) { color: #05641c; font-weight: 600 }
tr.refused { background: #fdf3e7 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 }
  th { background: #2a2a2a }
  th, td { border-color: #3a3a3a }
  tr.sparse td:nth-child(4) { color: #7bd88f }
  tr.refused { background: #33291c }
}
"""


def render(head: str, sites: Sequence[Mapping[str, Any]]) -> str:
    """The page for sites as `ExplainedSite.to_dict` gives them."""
    heading = "".join(f'<th title="{escape(meaning)}">{escape(name)}</th>' for name, meaning in COLUMNS.items())
    rows = "\n".join(_row(site) for site in sites)
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Attention sites</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Attention sites</h1>\n<p>{escape(head)}</p>\n"
            f"<table>\n<thead><tr>{heading}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</body>\n</html>\n")


def _row(site: Mapping[str, Any]) -> str:
    where = escape(site["line"]) + (f"<br>{escape(site['module'])}" if site["module"] else "")
    cells = [f"{site['graph']}.{site['index']}", where]
    for name in list(COLUMNS)[2:]:
        cell = site.get(name)
        if name == "density" and cell is not None:
            cell = f"{cell:.3f}"
        cells.append(escape(", ".join(cell) if isinstance(cell, list | tuple) else "" if cell is None else str(cell)))
    return (f'<tr class="{escape(site["outcome"].replace(" ", "-"))}">'
            + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
