"""Partition a program by Torch-TensorRT without TensorRT: `python partition.py WHEEL_FOLDER PROGRAM`.

The folder is an unpacked wheel of torch-tensorrt. Its import wants TensorRT's library, a GPU and a CUDA build of torch;
a module that answers anything stands in for them, which is enough for its converters to register and its partitioner to
run, and not for an engine. Prints, for each submodule, its name and the ops that it calls.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

import sparsify.ops  # noqa: F401


class Meta(type):
    """Of a class that is everything: its attributes, its results, its flags."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __iter__(cls):
        return iter(())

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __int__(cls):
        return 0

    def __rlshift__(cls, other):
        return 1


class Anything(metaclass=Meta):
    def __call__(self, *args, **kwargs):
        return self


class Stand(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Meta(name, (Anything,), {}))
        return getattr(self, name)


def stand_in(folder: str) -> None:
    library, plugin = Stand("tensorrt"), Stand("tensorrt.plugin")
    for module in (library, plugin):
        module.__path__, module.__file__ = [], __file__
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    library.__version__ = "11.0.0"
    library.tensorrt = library.tensorrt_rtx = library
    sys.modules["dllist"] = types.SimpleNamespace(dllist=list)  # lists loaded libraries
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0, total_memory=1 << 36)
    torch.cuda.current_device = lambda: 0
    torch._C._CudaDeviceProperties = getattr(torch._C, "_CudaDeviceProperties", object)
    assert not Path(folder, "torch_tensorrt", "lib").exists(), "remove lib from the wheel: it links TensorRT"
    sys.path.insert(0, folder)


def main() -> None:
    stand_in(sys.argv[1])
    from torch_tensorrt.dynamo.partitioning import fast_partition

    program = torch.export.load(sys.argv[2])
    parts, _ = fast_partition(program.module(), min_block_size=1)
    for name, part in parts.named_children():
        if isinstance(part, torch.fx.GraphModule):
            print(name, *(node.target for node in part.graph.nodes if node.op == "call_function"))


if __name__ == "__main__":
    main()
