"""The control of every comparison: the model without an adapter."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("base", "prefill", "decode", "train")
def test_base(scenario: Scenario) -> None:
    """The base model alone; its training step is full fine-tuning."""
    scenario.check()
    scenario.measure()
