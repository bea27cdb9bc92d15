"""Several adapters in one batch, each sequence through its own."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("batched", "prefill", "decode")
def test_batched(scenario: Scenario) -> None:
    """Every row of a mixed batch computes the definition with its own adapter."""
    scenario.check()
    scenario.measure()
