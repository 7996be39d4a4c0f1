import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed, printed when the test fails."""
    number = int.from_bytes(os.urandom(4), "little")
    print(f"seed {number}")
    torch.manual_seed(number)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
