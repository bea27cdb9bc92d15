"""Every check, in the order in which they are judged and reported."""

from __future__ import annotations

import copyreg
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lora_bench.conformance import (
    adapters,
    attention,
    batch,
    dora,
    forward,
    four_bit,
    init,
    lifecycle,
    lora_bias,
    merge,
    misuse,
    model,
    state,
    training,
)
from lora_bench.conformance.check import Check

if TYPE_CHECKING:
    from lora_bench.subject import Subject

THEMES = (
    forward,
    init,
    training,
    merge,
    lora_bias,
    dora,
    state,
    adapters,
    batch,
    four_bit,
    attention,
    lifecycle,
    model,
    misuse,
)
CHECKS: tuple[Check, ...] = tuple(
    value.of(kind)
    for theme in THEMES
    for value in vars(theme).values()
    if isinstance(value, Check)
    for kind in value.bases
)
_BY_ID = {check.id: check for check in CHECKS}


def checks_for(subject: Subject) -> tuple[Check, ...]:
    """The checks about the kinds of base layer that the subject takes.

    Raises ValueError for a known failure of the subject under an id that is no check's.
    """
    for known in subject.known:
        find_check(known)
    return tuple(check for check in CHECKS if check.kind in subject.layers)


def find_check(text: str) -> Check:
    """The check of that id; ValueError with the nearest ones where there is none."""
    if text not in _BY_ID:
        nearest = get_close_matches(text, _BY_ID, n=3, cutoff=0.0)
        raise ValueError(f"no check is called {text!r}; the nearest are {', '.join(nearest)}")
    return _BY_ID[text]


copyreg.pickle(Check, lambda check: (find_check, (check.id,)))  # a check travels to other processes by its id
