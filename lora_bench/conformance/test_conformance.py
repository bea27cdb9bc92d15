"""What `pytest --pyargs lora_bench.conformance` runs: all checks on the subjects of --lora-subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.conformance.collect import parametrise

if TYPE_CHECKING:
    import pytest

    from lora_bench.conformance.collect import Judged


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Pytest's hook."""
    parametrise(metafunc, "reference")


def test_conforms(check: Judged) -> None:
    """Each check is a test, named by the subject and the claim."""
    check()
