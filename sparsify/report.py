"""What a benchmark found: rows of before and after per length, as JSON, Markdown and text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sparsify.plan import Plan

SCHEMA = 1

COLUMNS = ("length", "bucket", "budget", "dense ms", "sparse ms", "speed-up", "attention", "density", "dense loss",
           "sparse loss", "KL", "top-1")

LEGEND = (
    "Dense: torch.compile. Sparse: sparsify.compile with the plan; same weights, same text. Times: medians of "
    "interleaved runs. Attention: its share of the dense time. Density: kept share of the score area, all attention "
    "sites, dense ones included. Loss and KL(dense || sparse): nats per token, held-out text. Top-1: positions where "
    "both predict the same token."
)


@dataclass(frozen=True)
class Row:
    """One length.

    dense_ms, sparse_ms      median time of one forward pass, milliseconds
    attention_share          share of the dense side's time that its SDPA calls take; None where it calls none
    density                  kept share of the allowed key blocks, mean over all attention sites
    dense_loss, sparse_loss  nats per token
    kl                       KL(dense || sparse), mean over positions, nats
    top1_agreement           share of positions where both sides predict the same token
    """

    length: int
    bucket: str
    budget: str
    dense_ms: float
    sparse_ms: float
    attention_share: float | None
    density: float
    dense_loss: float
    sparse_loss: float
    kl: float
    top1_agreement: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of the schema; None for what is not finite, which JSON has no word for."""
        data = {
            "length": self.length, "bucket": self.bucket, "budget": self.budget,
            "dense_ms": self.dense_ms, "sparse_ms": self.sparse_ms, "speedup": self.speedup,
            "attention_share": self.attention_share, "density": self.density,
            "dense_loss": self.dense_loss, "sparse_loss": self.sparse_loss,
            "kl": self.kl, "top1_agreement": self.top1_agreement,
        }
        return {name: None if isinstance(x, float) and not isfinite(x) else x for name, x in data.items()}

    def cells(self) -> list[str]:
        """One text per column of COLUMNS."""
        share = "-" if self.attention_share is None else f"{self.attention_share:.0%}"
        return [str(self.length), self.bucket, self.budget, f"{self.dense_ms:.1f}", f"{self.sparse_ms:.1f}",
                f"{self.speedup:.2f}x", share, f"{self.density:.3f}", f"{self.dense_loss:.4f}",
                f"{self.sparse_loss:.4f}", f"{self.kl:.5f}", f"{self.top1_agreement:.2%}"]


@dataclass(frozen=True)
class Report:
    """Rows by length, and what they were measured on."""

    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    plan: Plan
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as report.json holds it."""
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "model": dict(self.model),
            "plan": self.plan.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_markdown(self) -> str:
        """The table, the plan and the environment, as report.md holds them."""
        parts = [
            f"# {self.model['name']}: before and after",
            _markdown_table([list(COLUMNS), *(row.cells() for row in self.rows)]),
            LEGEND,
            f"## Plan\n```\n{self.plan}\n```",
            "## Measured on\n" + _markdown_table([["", ""], *([k, str(v)] for k, v in self.environment.items())]),
            "## Model\n" + _markdown_table([["", ""], *([k, str(v)] for k, v in self.model.items())]),
        ]
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write report.json and report.md into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")

    def __str__(self) -> str:
        lines = [list(COLUMNS), *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _markdown_table(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
