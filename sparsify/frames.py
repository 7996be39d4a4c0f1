"""A model that is compiled without being changed, in a frame of its own.

Dynamo keeps graphs, and counts recompilations, by code object. Modules of one class share theirs: the graphs of one
model would be tried for the next, and after a few models in one process nothing would be compiled any more.
"""

import inspect
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def own_forward(module: nn.Module) -> None:
    """Give `module` a `forward` that does the same from a code object of its own."""
    shared = type(module).forward
    own = FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__,
                       shared.__closure__)
    own.__kwdefaults__ = shared.__kwdefaults__
    module.forward = MethodType(own, module)


class Uncompiled(nn.Module):
    """Holds a model that stays as it is: compiling a subclass compiles no more. Its modules are found below `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        without_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if without_cache else {}
        own_forward(self)

    def run(self, *arguments: Any, **keywords: Any) -> Any:
        """What the model returns; not through its __call__: it may be compiled itself."""
        return self.model.forward(*arguments, **{**self._options, **keywords})
