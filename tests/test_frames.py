"""A code object of its own for each module."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from sparsify.frames import own_forward


class Scale(nn.Module):
    def __init__(self, factor: int, own: bool) -> None:
        super().__init__()
        self.factor = factor
        if own:
            own_forward(self)

    def forward(self, x, *, shift=1):
        return x * self.factor + shift


def compile_many(own: bool) -> None:
    torch._dynamo.reset()
    x = torch.ones(3)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for factor in range(torch._dynamo.config.recompile_limit + 2):
            model = Scale(factor, own)
            model.compile(backend="eager")
            assert torch.equal(model(x), x * factor + 1)


def test_many_modules_of_one_class_are_compiled():
    compile_many(own=True)


def test_without_it_they_are_not():
    with pytest.raises(FailOnRecompileLimitHit):
        compile_many(own=False)
