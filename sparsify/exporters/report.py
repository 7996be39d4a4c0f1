"""What became of an export: one value, and one markdown file beside the exported one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsify.exporters.check import Check
from sparsify.exporters.contents import KINDS, Contents
from sparsify.tracing import describe


@dataclass(frozen=True)
class ExportReport:
    """What `sparsify.export` wrote.

    path      the file; `report_path` beside it is this report in markdown
    files     all files that belong to it, with their sizes in bytes
    contents  what the file says of itself: plan, sites, inputs, ranges
    checks    the file, loaded again, beside the graphs it was made of: one length per bucket at least
    notes     what was not kept, in words
    """

    path: Path
    files: dict[str, int]
    contents: Contents
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def report_path(self) -> Path:
        return report_path(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"path": str(self.path), "files": self.files, "target": self.contents.target,
                "plan": self.contents.plan.hash, "sites": [site.to_dict() for site in self.contents.sites],
                "checks": [asdict(row) for row in self.checks], "notes": list(self.notes)}

    def to_markdown(self) -> str:
        """The file beside the exported one."""
        kept = sum(site.outcome == "sparse" for site in self.contents.sites)
        lines = [f"# {self.path.name}", "",
                 f"{KINDS[self.contents.target]}, plan {self.contents.plan.name} ({self.contents.plan.hash}), "
                 f"sparsify {self.contents.sparsify}, torch {self.contents.torch}; {kept} of "
                 f"{len(self.contents.sites)} attention sites are sparse.", "",
                 *(f"- {name}: {size:,} bytes" for name, size in self.files.items()),
                 *(f"- {note}" for note in self.notes), "",
                 "| key length | batch | bucket | budget | difference to the graph | to dense | dense ms | sparse ms |",
                 "|---|---|---|---|---|---|---|---|"]
        lines += [f"| {'as given' if row.length is None else row.length} | {row.batch} | {row.bucket} | {row.budget} | "
                  f"{row.difference:.2g} | {row.plan_error:.2g} | {row.dense_ms:.1f} | {row.sparse_ms:.1f} |"
                  for row in self.checks]
        lines += ["", "Differences are the largest of an output: to the graph it is rounding, to dense the plan's own "
                  "error. Times are medians of calls in turns, dense the same model exported without a plan.", "",
                  "## Attention sites", "",
                  *(f"- {site.index}: {describe(site).replace(chr(10), ' ')}" for site in self.contents.sites)]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.to_markdown().rstrip()


def report_path(path: Path) -> Path:
    """Where the report of a file lies."""
    return path.with_name(path.name + ".md")
