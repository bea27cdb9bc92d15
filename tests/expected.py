"""What a test expects: a value within its bound, or a message to the letter."""

import re

from torch import Tensor

from lora_bench.bounds import worst


def within(found: Tensor, wanted: Tensor, allowed: Tensor | float) -> bool:
    """Whether |found - wanted| is at most `allowed` everywhere."""
    return worst(found, wanted, allowed).ratio <= 1


def exactly(message: str) -> str:
    """The pattern for `pytest.raises` that this message matches and no other."""
    return rf"^{re.escape(message)}\Z"
