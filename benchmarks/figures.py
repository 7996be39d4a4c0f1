"""figures.json: every figure that an issue asks for, the bar it must meet, and where it was measured."""

import json
import operator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import write_json
from sparsify.measurement import checkout_commit

FILE = Path(__file__).with_name("figures.json")

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """One measured number.

    issue    the issue that asks for it: "line"
    figure   what it is: "speed-up at 16384"
    bar      what it must reach: ">= 1.6", or both sides of a range: ">= 0.97, <= 1.03"
    where    device and threads
    command  what measures it again
    """

    issue: str
    figure: str
    value: float
    bar: str
    unit: str
    where: str
    command: str

    @property
    def met(self) -> bool:
        parts = [part.split() for part in self.bar.split(",")]
        return all(COMPARISONS[sign](self.value, float(bar)) for sign, bar in parts)


def record(*figures: Figure) -> None:
    """Write figures into FILE, each in place of its earlier measurement at the same place."""
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    if FILE.exists():
        entries = {_key(entry): entry for entry in json.loads(FILE.read_text(encoding="utf-8"))}
    commit = checkout_commit()
    for figure in figures:
        entry = {**asdict(figure), "met": figure.met, "commit": commit}
        entries[_key(entry)] = entry
        verdict = "met   " if figure.met else "MISSED"
        print(f"{verdict} {figure.figure}: {figure.value:.4g} {figure.unit} ({figure.bar})")
    ordered = [entries[key] for key in sorted(entries)]
    write_json(FILE, ordered)


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["issue"], entry["figure"], entry["where"]
