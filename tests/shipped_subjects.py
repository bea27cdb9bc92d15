"""The shipped subjects and where they are tried."""

from __future__ import annotations

import pytest

from lora_bench.models.bases import missing as missing_base
from lora_bench.subject import Subject
from lora_bench.subjects import find, missing

PLACES = [
    ("reference", "linear"),
    ("reference", "nf4"),
    ("peft", "linear"),
    ("peft", "linear4bit"),
    ("loralib", "linear"),
]
COMPLETE = [place for place in PLACES if place[0] != "loralib"]
BOTH_DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])
MEASURED = ("reference", "peft", "loralib")
"""Those that the GPU suites are about; what else ships is judged by the checks alone."""
EVERY_PLACE = pytest.mark.parametrize(("name", "kind"), PLACES)
EVERY_COMPLETE_PLACE = pytest.mark.parametrize(("name", "kind"), COMPLETE)


def subject_here(name: str, kind: str = "linear") -> Subject:
    if reason := missing(name) or missing_base(kind):
        pytest.skip(reason)
    return find(name)
