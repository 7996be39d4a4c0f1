"""What Triton's interpreter needs before it runs a kernel; importing this is enough."""

import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        """numpy 2.4 refuses int() of a one-element array; Triton 3.6.0 calls it on every loop bound."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index

