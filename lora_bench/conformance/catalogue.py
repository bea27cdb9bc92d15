"""Every check, in the order in which they are judged and reported."""

from __future__ import annotations

from difflib import get_close_matches

from lora_bench.conformance import batch, forward, four_bit, init, merge, state, training
from lora_bench.conformance.check import Check

CHECKS: tuple[Check, ...] = tuple(
    value
    for theme in (forward, init, training, merge, batch, four_bit, state)
    for value in vars(theme).values()
    if isinstance(value, Check)
)
_BY_ID = {check.id: check for check in CHECKS}


def find_check(text: str) -> Check:
    """The check of that id; ValueError with the nearest ones where there is none."""
    if text not in _BY_ID:
        nearest = get_close_matches(text, _BY_ID, n=3, cutoff=0.0)
        raise ValueError(f"no check is called {text!r}; the nearest are {', '.join(nearest)}")
    return _BY_ID[text]
