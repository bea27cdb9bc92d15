"""The zoo: implementations with one planted bug each, by the check that must find it.

A check that nothing trips proves nothing, and a bug that nothing finds could ship.
"""

from __future__ import annotations

from lora_bench.conformance.zoo import attention, dora, folders, forward, merging, model, several, state, training
from lora_bench.conformance.zoo.planting import Specimen

__all__ = ["SPECIMENS", "Specimen"]

SPECIMENS: tuple[Specimen, ...] = tuple(
    specimen
    for family in (forward, training, merging, dora, state, several, attention, model, folders)
    for specimen in family.SPECIMENS
)
