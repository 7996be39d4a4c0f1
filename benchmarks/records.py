"""Files of results: written whole or not at all, so that a run that is killed keeps what it has measured."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sparsify.measurement import checkout_commit, device_name

RESULTS = Path(__file__).with_name("results")


def environment(device: str) -> dict[str, str]:
    """Where the numbers were measured."""
    name = device_name(torch.device(device))
    facts = {"device": name if device == "cuda" else f"{name}, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "python": platform.python_version(), "commit": checkout_commit() or "unknown"}
    if device == "cuda":
        import triton

        facts |= {"triton": triton.__version__, "cudnn": str(torch.backends.cudnn.version())}
    return facts


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, data: Any) -> None:
    """Replace a file of JSON in one step."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none, or one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def may_join(before: Any, facts: dict[str, str]) -> bool:
    """Whether results that a file holds belong beside those measured now: same machine, same code."""
    known = facts["commit"] != "unknown" and not facts["commit"].endswith("-dirty")
    return known and isinstance(before, dict) and before.get("environment") == facts


def markdown(head: list[str], rows: list[list[str]], facts: dict[str, str]) -> str:
    """A table under a line that says where it was measured."""
    lines = [", ".join(f"{key} {value}" for key, value in facts.items()), "", "| " + " | ".join(head) + " |",
             "|---" * len(head) + "|", *("| " + " | ".join(cells) + " |" for cells in rows)]
    return "\n".join(lines) + "\n"
