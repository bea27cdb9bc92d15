"""The shipped subjects, or those of --lora-subject, judged as a stranger would: through public names alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.conformance import parametrise

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrise(metafunc, "reference", "peft", "loralib")


def test_conforms(check: Callable[[], None]) -> None:
    check()
