"""Training A and B with the base frozen: forward, backward and an AdamW step."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("separate", "train")
def test_training(scenario: Scenario) -> None:
    """Only A and B train, with the definition's gradients, beside full fine-tuning."""
    scenario.check()
    scenario.measure()
