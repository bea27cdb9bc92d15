"""Validation and benchmarks for LoRA (Low-Rank Adaptation): is an implementation right, and what does it cost?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_bench.case import Case as Case
    from lora_bench.conformance import Nonconformance as Nonconformance
    from lora_bench.conformance import conforms as conforms
    from lora_bench.reference import REFERENCE as REFERENCE
    from lora_bench.spec import Factors as Factors
    from lora_bench.spec import LoraSpec as LoraSpec
    from lora_bench.subject import Subject as Subject

__version__ = "0.1.0"

# Names are looked up on first use: pytest loads the plugin, and so this package, in every run of an environment
# that has it installed, and those runs must not pay for importing torch.
_HOMES = {
    "Case": "case",
    "Factors": "spec",
    "LoraSpec": "spec",
    "Nonconformance": "conformance",
    "REFERENCE": "reference",
    "Subject": "subject",
    "conforms": "conformance",
}
__all__ = ["REFERENCE", "Case", "Factors", "LoraSpec", "Nonconformance", "Subject", "conforms"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
