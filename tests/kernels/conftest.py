"""Kernel tests: on the GPU where there is one, else in Triton's interpreter (small shapes, fp16 and fp32).

The interpreter is chosen when Triton is imported, so this file is the first to import it.
"""

import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/kernels/conftest.py could choose its interpreter; "
                                "run `pytest tests/kernels` by itself, or set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        """numpy 2.4 refuses int() of a one-element array; Triton 3.6.0 calls it on every loop bound."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: the interpreter is too slow, or lacks bf16"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def rng(device):
    """A generator with a fresh seed, printed when the test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def poisoned_memory():
    """NaN in every `torch.empty`: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
