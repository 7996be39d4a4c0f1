"""`.ep`: a program that Torch-TensorRT compiled. What is not attention is engines; attention is our ops, run by torch.

    model.ep     an ExportedProgram with engines in it; loading it needs torch_tensorrt and sparsify

The ops are nothing that TensorRT has a converter for, so its partitioner leaves each of them as a segment of torch's.
Not run: no machine with a GPU and Torch-TensorRT was at hand. Tested is what comes before engines, the partition.
"""

from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from sparsify.errors import ExportError
from sparsify.exporters.archive import check_whole, read_contents
from sparsify.exporters.capture import Captured
from sparsify.exporters.contents import NAME, Contents
from sparsify.exporters.formats import Runner, runner_of

OPTIONS: frozenset[str] = frozenset()

describe = read_contents


def write(captured: Captured, path: Path) -> list[str]:
    """Compile and save. Raises ExportError where Torch-TensorRT or a GPU is missing, or compilation fails."""
    library = _library()
    tensors = [x for x in pytree.tree_leaves((captured.args, dict(captured.kwargs))) if isinstance(x, Tensor)]
    if not all(x.is_cuda for x in tensors):
        raise ExportError(f"path is {path.name!r} and the inputs are on {tensors[0].device}. Torch-TensorRT compiles "
                          "for a GPU: move model and inputs to it, or export .onnx with target=\"tensorrt\".")
    inputs = {"arg_inputs": list(captured.args), "kwarg_inputs": dict(captured.kwargs)}
    try:
        compiled = library.dynamo.compile(captured.program, **inputs)
        library.save(compiled, str(path), retrace=False,
                     extra_files={NAME: Contents.of(captured, "torch_tensorrt").to_json()}, **inputs)
    except Exception as error:  # of its builder, its partitioner or torch.export: of many kinds
        raise ExportError(f"torch_tensorrt {library.__version__} cannot compile the model: {error}. Export .onnx with "
                          "target=\"tensorrt\" instead.") from error
    return ["attention runs in torch between engines; loading needs torch_tensorrt and sparsify"]


def load(path: Path) -> Runner:
    """The program as a call. Raises ExportError."""
    read_contents(path)
    check_whole(path)
    library = _library()
    try:
        module = library.load(str(path)).module()
    except Exception as error:  # as `write`
        raise ExportError(f"torch_tensorrt {library.__version__} cannot load {str(path)!r}: {error}. Export the model "
                          "again.") from error

    return runner_of(module)


def _library() -> Any:
    try:
        import torch_tensorrt
    except Exception as error:  # without TensorRT's library it raises what its loader raised
        raise ExportError(f"a file .ep needs torch_tensorrt, and it cannot be imported here ({error}). Install "
                          "torch-tensorrt for this torch, with TensorRT; or export .onnx with target=\"tensorrt\", "
                          "which needs neither.") from error
    return torch_tensorrt
