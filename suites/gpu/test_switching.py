"""Serving another adapter: loaded beside the base, merged in the last one's place, or a pool of them made ready."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("merged", "switch")
def test_merged(scenario: Scenario) -> None:
    """After a switch the merged model computes the definition with the other adapter."""
    scenario.check()
    scenario.measure()


@pytest.mark.lora_setup("separate", "switch")
def test_separate(scenario: Scenario) -> None:
    """After a switch the layers compute the definition with the other adapter."""
    scenario.check()
    scenario.measure()


@pytest.mark.lora_setup("batched", "switch")
def test_batched(scenario: Scenario) -> None:
    """After a switch every row of a mixed batch is computed with the new pool's adapter."""
    scenario.check()
    scenario.measure()
