"""`.pt2` as an ExportedProgram: the graph itself, with our ops in it. Loading it needs sparsify.

    torch.export.load("model.pt2").module()        after `import sparsify.ops`
"""

from pathlib import Path

import torch

from sparsify.errors import ExportError
from sparsify.exporters.archive import check_whole, read_contents
from sparsify.exporters.capture import Captured
from sparsify.exporters.contents import NAME, Contents
from sparsify.exporters.formats import Runner, runner_of

OPTIONS: frozenset[str] = frozenset()

describe = read_contents


def write(captured: Captured, path: Path) -> list[str]:
    """Save the program, with what it says of itself as an extra file."""
    torch.export.save(captured.program, path, extra_files={NAME: Contents.of(captured, "export").to_json()})
    return ["loading needs sparsify: the graph calls its ops. target=\"aot_inductor\" runs without"]


def load(path: Path) -> Runner:
    """The program as a call. Raises ExportError."""
    read_contents(path)
    check_whole(path)
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # what torch raises for a file of another version is of many kinds
        raise ExportError(f"file {str(path)!r} is whole, but this torch ({torch.__version__}) cannot load it: {error}. "
                          "Export the model again.") from error

    return runner_of(module)
