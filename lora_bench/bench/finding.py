"""`Finding`: one line of what the doctor tells."""

from __future__ import annotations

from typing import Literal, NamedTuple

Answer = Literal["yes", "partly", "no"]


class Finding(NamedTuple):
    """Whether a quantity is there, how or why not, and what would help."""

    section: str
    quantity: str
    answer: Answer
    why: str
    help: str = ""
