"""Hypothesis profiles: "ci" by default; HYPOTHESIS_PROFILE or --hypothesis-profile names another."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """As in a worker: what is there already is no garbage, and to look through it at each collection takes long."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def seeded() -> None:
    """torch's own generator, at its start."""
    import torch

    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--hypothesis-profile") or os.environ.get("HYPOTHESIS_PROFILE") or "ci"
    settings.load_profile(chosen)
    # A pytest that is run inside a test is no worker of the one outside, and may measure.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    os.environ.pop("GITHUB_ACTIONS", None)  # nor has it a step of a workflow to write to
