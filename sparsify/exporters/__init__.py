"""Export a model with its attention under a plan: `export`, in the order in which it happens.

    capture.py       torch.export, then the pass: a program whose attention sites carry the plan
    formats.py       which module writes what: pt2.py, aot_inductor.py (on CUDA by way of buckets.py)
    check.py         the written file, loaded again, beside the graphs it was made of
    report.py        what is handed over: an ExportReport, and the same as markdown beside the file
    contents.py      what a file says of itself; archive.py: where a .pt2 holds it; timing.py: how
                     long its calls take
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.errors import OptionError
from sparsify.exporters.capture import Captured, capture
from sparsify.exporters.check import check, lengths_to_check
from sparsify.exporters.contents import Contents
from sparsify.exporters.formats import find_format
from sparsify.exporters.report import ExportReport, report_path

__all__ = ["Captured", "ExportReport", "capture", "export"]


def export(model: nn.Module, inputs: Any, path: str | Path, *, plan: Any = None, dynamic_shapes: Any = None,
           target: str | None = None, lengths: Sequence[int] | None = None, atol: float | None = None,
           progress: Callable[[str], None] | None = None, **options: Any) -> ExportReport:
    """Write `model` to a file that runs its attention under `plan`, check the file, and report.

    inputs   what the model is called with: a tensor, a tuple, or a dict of inputs by name
    path     its suffix says the format: ".pt2"
    plan     as in `sparsify.compile`; None: the plan that the model was compiled with, else the default of its device
    dynamic_shapes   as in torch.export; None: batch and length are free where the model allows
    target   for ".pt2": "export" (an ExportedProgram; the default) or "aot_inductor" (a compiled package)
    lengths  key lengths at which the file is checked; every bucket that they leave out is checked at one more
    atol     how far outputs may differ from those of the graph; None: rounding
    progress called with a line of text now and then
    options  of the format

    The file is written under another name, loaded, compared with the model and only then given its name, together with
    a report in markdown beside it. On any error nothing is left. Sites that cannot be kept sparse are exported dense
    and listed. Raises ExportError, OptionError, ModelError, PlanError, ShapeError.
    """
    path = Path(path)
    tell = progress or (lambda line: None)
    target, form = find_format(path, target)
    unknown = sorted(set(options) - form.OPTIONS)
    if unknown:
        known = ", ".join(sorted(form.OPTIONS)) or "none"
        raise OptionError(f"{unknown[0]} is {options[unknown[0]]!r} and files for {target!r} have no such option. "
                          f"Their options: {known}.")
    if atol is not None and not atol >= 0:
        raise OptionError(f"atol is {atol}. Give a number from 0, or leave it out.")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"path is {str(path)!r} and its folder does not exist. Make it, or give another.")
    tell("exporting the graph")
    captured = capture(model, inputs, plan, dynamic_shapes)
    lengths_to_check(captured, lengths)
    with _handed_over(path) as folder:
        tell("writing")
        notes = form.write(captured, folder / path.name, **options)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            dense = Path(beside) / path.name
            form.write(replace(captured, program=captured.dense), dense, **options)
            checks = check(captured, form.load(folder / path.name), form.load(dense), lengths, atol, tell)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        contents = form.describe(folder / path.name)
        report = ExportReport(path, files, contents, checks, (*_fixed(captured, contents), *notes))
        report_path(folder / path.name).write_text(report.to_markdown(), encoding="utf-8")
    return report


@contextmanager
def _handed_over(path: Path) -> Iterator[Path]:
    """A folder beside `path`; what is in it at the end gets its place, the file itself last. On an error it is gone."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise OptionError(f"path is {str(path)!r} and cannot be written ({error.strerror}). Give another.") from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.absolute().with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fixed(captured: Captured, contents: Contents) -> list[str]:
    """Sizes that the file takes as they are, ranges that end, and sites that are left dense."""
    notes = [f"input {x.name} is [{', '.join(map(str, x.sizes))}]: its numbers are fixed" for x in contents.inputs
             if any(isinstance(size, int) for size in x.sizes)]
    notes += [f"{name} is at most {high}" for name, (_, high) in contents.ranges.items() if high is not None]
    if contents.buckets and contents.buckets[-1][1] is not None:
        notes.append(f"key lengths end at {contents.buckets[-1][1] - 1}")
    notes += [f"site {site.index} ({site.module or site.line}) is dense: {site.why}" for site in captured.records
              if site.outcome == "refused"]
    return notes
