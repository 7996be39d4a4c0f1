"""A frame of its own for each module that is compiled.

Dynamo keeps graphs, and counts recompilations, by code object. Modules of one class share theirs: the graphs of one
model would be tried for the next, and after a few models in one process nothing would be compiled any more.
"""

from types import FunctionType, MethodType

from torch import nn


def own_forward(module: nn.Module) -> None:
    """Give `module` a `forward` that does the same from a code object of its own."""
    shared = type(module).forward
    own = FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__,
                       shared.__closure__)
    own.__kwdefaults__ = shared.__kwdefaults__
    module.forward = MethodType(own, module)
