"""The kinds of files, and which module writes and reads each.

A module of a format has

    OPTIONS                              names of the options that `write` takes beside captured and path
    write(captured, path, **options)     write the file (and what belongs beside it, in the same folder); lines for
                                         the report of what was not kept
    load(path)                           a `Runner`. Raises ExportError for a file that is none
    describe(path)                       its `Contents`, without loading the model. Raises ExportError
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from sparsify.errors import ExportError, OptionError
from sparsify.exporters.capture import Captured
from sparsify.exporters.contents import Contents

Runner = Callable[..., list[Tensor]]
"""Called as the model is; the tensors of its output, one behind the other."""


def runner_of(module: Callable[..., Any]) -> Runner:
    """A loaded program as a `Runner`."""
    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        with torch.no_grad():
            return [x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]

    return run


class Format(Protocol):
    """What a module of a format offers."""

    OPTIONS: frozenset[str]

    def write(self, captured: Captured, path: Path, **options: Any) -> list[str]: ...
    def load(self, path: Path) -> Runner: ...
    def describe(self, path: Path) -> Contents: ...


MODULES: dict[str, dict[str, str]] = {
    ".pt2": {"export": "sparsify.exporters.pt2", "aot_inductor": "sparsify.exporters.aot_inductor"},
    ".onnx": {"ort": "sparsify.exporters.onnx", "tensorrt": "sparsify.exporters.tensorrt"},
    ".ep": {"torch_tensorrt": "sparsify.exporters.tensorrt_segments"},
}
"""By suffix and target; the first target of a suffix is its default."""


def find_format(path: Path, target: str | None) -> tuple[str, Any]:
    """The target and the module for a file that is to be written. Raises OptionError, also for a missing extra."""
    targets = MODULES.get(path.suffix)
    if targets is None:
        raise OptionError(f"path is {str(path)!r}. Its suffix says what is written; give one of: "
                          f"{', '.join(MODULES)}.")
    target = next(iter(targets)) if target is None else target
    if target not in targets:
        raise OptionError(f"target is {target!r} and path ends in {path.suffix}. Give one of: {', '.join(targets)}.")
    return target, _module(targets[target])


def format_of(path: Path) -> Any:
    """The module that reads a file. Raises ExportError if the file is none that `export` wrote, OptionError where the
    extra that reads it is missing."""
    targets = MODULES.get(path.suffix)
    if targets is None or not path.is_file():
        what = "does not exist" if targets is not None else f"is no exported file: these end in {', '.join(MODULES)}"
        raise ExportError(f"{str(path)!r} {what}. Give a file that sparsify.export wrote.")
    contents = _module(next(iter(targets.values()))).describe(path)
    if contents.target not in targets:
        raise ExportError(f"{str(path)!r} was written for {contents.target!r}, which this version does not know. "
                          "Export the model again.")
    return _module(targets[contents.target])


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "sparsify":
            raise
        raise OptionError(f"this kind of file needs {error.name}, which is not installed. Install the extra: "
                          "pip install 'sparsify-attention[onnx]'.") from error
