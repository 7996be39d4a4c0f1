"""What every test may use. Tests marked `gpu` are skipped where there is no CUDA device."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
os.environ["SPARSIFY_TUNE"] = "0"  # what this machine measured must not decide what is tested; test_tuning.py opts in
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which Dynamo does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def rng(device: torch.device) -> torch.Generator:
    """A generator with a fresh seed, printed when the test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def poisoned_memory():
    """NaN in every `torch.empty`: an element that nobody writes shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
