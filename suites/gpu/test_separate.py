"""One adapter beside the frozen base, y = W x + s B A x in two extra products a layer."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("separate", "prefill", "decode")
def test_separate(scenario: Scenario) -> None:
    """The unmerged model computes the definition, at the cost of the adapter's path."""
    scenario.check()
    scenario.measure()
