"""The op `sparsify::protect_keys`: marks in a graph which keys no attention may lose.

    ids = torch.ops.sparsify.protect_keys(ids, mask)    # mask bool [B or 1, keys]

A marker: it gives back its first argument. The pass (passes/protect.py) takes it out of the graph and hands the mask to
every sparse attention site with as many keys. Nothing else reads it; where no pass runs it costs a copy.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparsify::protect_keys", mutates_args=())
def protect_keys(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of x: whatever the model begins with. `mask` bool [B or 1, keys] is True where a key is protected."""
    return x.clone()


@protect_keys.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


protect_keys.register_autograd(_backward)
