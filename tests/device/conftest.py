"""What needs a real GPU: these tests are skipped, and say so, where there is none."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device under test, by torch's name."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
