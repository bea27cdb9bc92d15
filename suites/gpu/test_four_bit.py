"""One adapter beside a base quantised to 4 bits (NF4 with double quantisation, as in QLoRA)."""

import pytest

from lora_bench.bench.scenario import Scenario


@pytest.mark.lora_setup("four_bit", "prefill", "decode")
def test_four_bit(scenario: Scenario) -> None:
    """The 4-bit model computes the definition with its own dequantised weights."""
    scenario.check()
    scenario.measure()
