"""The journal of a calibration: every result on disk as soon as it is there, one JSON object a line.

A result is found again by a key of all that it depends on (model, settings, window, budget), so a run that was killed
does again only what it had not finished, and ends with the same plan, bit for bit: JSON keeps floats exactly. A torn
line, as a kill may leave one, is skipped; results of other settings lie beside those of these.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.errors import OptionError


class Journal:
    """Results by key. Without a path they last as long as the object."""

    def __init__(self, path: Path | None, settings: Any) -> None:
        self.path = path
        self._settings = digest(settings)
        self._known: dict[str, Any] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise OptionError(f"out is next to {str(path)!r}, which cannot be written ({error.strerror}). Give a file "
                              "in a folder that can be.") from error
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, *key: Any) -> Any:
        """What is known under this key, or None."""
        return self._known.get(self._name(key))

    def add(self, value: Any, *key: Any) -> Any:
        """Keep a result: plain JSON data; returned as it would be read back."""
        name = self._name(key)
        line = json.dumps({"key": name, "value": value})
        if self.path is not None:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, f"\n{line}\n".encode())  # the newline first: a torn line does not swallow this one
            finally:
                os.close(file)
        self._known[name] = json.loads(line)["value"]
        return self._known[name]

    def get(self, make: Callable[[], Any], *key: Any) -> Any:
        """What is known under this key, else what `make` makes."""
        known = self.find(*key)
        return self.add(make(), *key) if known is None else known

    def _name(self, key: tuple[Any, ...]) -> str:
        return digest([self._settings, *key])


def digest(data: Any) -> str:
    """Hex digits of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
