"""One adapter merged into the weights: W + s B A, and nothing left of the adapter."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("merged", "prefill", "decode")
def test_merged(scenario: Scenario) -> None:
    """The merged model computes the definition, at the base's own cost."""
    scenario.check()
    scenario.measure()
