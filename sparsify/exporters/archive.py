"""The archive behind every `.pt2` file: a zip with one folder in it, and what `sparsify.export` adds.

Read with zipfile before torch sees it: a damaged file must not reach the unpickler, nor a library be mapped from one.
"""

import zipfile
import zlib
from pathlib import Path

from sparsify.errors import ExportError
from sparsify.exporters.contents import NAME, Contents


def read_contents(path: Path) -> Contents:
    """What a `.pt2` file says of itself. Raises ExportError."""
    where = f"file {str(path)!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{NAME}")]
            if len(names) != 1:
                raise ExportError(f"{where} has no {NAME} in it: torch wrote it, not sparsify.export. Load it with "
                                  "torch, or export the model with sparsify.")
            text = archive.read(names[0])
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"{where} is damaged or no .pt2 file ({error}). Export the model again, or copy the file "
                          "again.") from error
    return Contents.from_json(text, where)


def check_whole(path: Path) -> None:
    """Compare every member with its checksum. Raises ExportError."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ExportError(f"file {str(path)!r} is damaged ({error}). Export the model again, or copy the file "
                          "again.") from error
    if broken is not None:
        raise ExportError(f"file {str(path)!r} is damaged: {broken} does not have its checksum. Export the model "
                          "again, or copy the file again.")
