"""Records read with care: what is used of them later is of the type, and finite, that it must be."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_bench.bench.workload import Row, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WORDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
OF_ANY: dict[str, type] = {"run_id": str, "time": str, "device": str, "command": str, "fingerprint": dict, "git": dict}
"""What a record of any quantity may have; it may be null."""
FIELDS: dict[str, dict[str, type]] = {
    "plan": {"rows": list},
    "latency": {
        **{f"{of}{name}": list for of in ("", "base_") for name in ("samples_seconds", "order", "interrupted")},
        "interleaved_with": list,
        "window": dict,
    },
    "launches": {"launches": dict},
    "memory": {"memory": dict},
    "energy": {"energy": dict},
    "failure": {"kind": str, "text": str},
    "ceilings": {"dtype": str, "ceilings": dict},
    "ab": {"limits": dict, "attempts": list, "base": dict, "head": dict, "verdict": str, "because": str},
    "promotion": {"time": str},
}
"""What a record of each quantity must have."""
FINITE = ("launches", "memory", "energy", "ceilings", "correctness", "limits")
"""The fields in which every number is finite."""


DEEPEST = 50
"""How deep the objects and lists of a record may lie in each other; those that are written lie in 7."""


def of_type(value: Any, kind: type, name: str) -> Any:
    """The value, if it is of the type; a whole number is a float too unless it is too large, and a bool is no number.

    Raises ValueError naming it and the value.
    """
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (isinstance(value, int) and abs(value) > sys.float_info.max):  # nothing could be reckoned with it
        raise ValueError(f"{name} must be {WORDS[kind]}, got {str(value)[:60]!r}")
    return value


def row_of(record: Mapping[str, Any]) -> Row:
    """The row that a record is of.

    Raises ValueError for a value of another type or out of range, KeyError or TypeError where one is not there.
    """
    workload = of_type(record["workload"], dict, "workload")
    for each in fields(Workload):
        if each.name in workload:
            of_type(workload[each.name], {"str": str, "int": int}[str(each.type)], f"workload.{each.name}")
    return Row(of_type(record["subject"], str, "subject"), Workload(**workload))


def fingerprint_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fingerprint of a record or of a row's JSON, what is hard and soft of it being objects."""
    found: Mapping[str, Any] = of_type(record["fingerprint"], dict, "fingerprint")
    for name in found.keys() & {"hard", "soft"}:
        of_type(found[name], dict, f"fingerprint.{name}")
    return found


def window_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What happened to the clocks, by a record or a row's JSON: how far counters moved, what was not read, and why."""
    found: Mapping[str, Any] = of_type(record["window"], dict, "window")
    for name, kind in {"throttle_delta": float, "unavailable": str}.items():
        for key, value in of_type(found.get(name, {}), dict, f"window.{name}").items():
            of_type(value, kind, f"window.{name}.{key}")
    of_type(found.get("seconds", 0.0), float, "window.seconds")
    return found


def check(record: Mapping[str, Any]) -> None:
    """Whether a record has what its quantity must have.

    Raises ValueError naming what is of another type or not finite, and KeyError what is not there.
    """
    quantity = of_type(record["quantity"], str, "quantity")
    _must_be_shallow(record)
    for name, kind in OF_ANY.items():
        if record.get(name) is not None:
            of_type(record[name], kind, name)
    if record.get("fingerprint"):
        fingerprint_of(record)
    if record.get("git"):
        of_type(record["git"]["sha"], str, "git.sha")
    for name, kind in FIELDS.get(quantity, {}).items():
        of_type(record[name], kind, name)
    for name in FINITE:
        _finite(record.get(name), name)
    if quantity in OWN:
        OWN[quantity](record)


def _must_be_shallow(record: Mapping[str, Any]) -> None:
    """Raise ValueError for what is nested deeper than any record: whoever goes through it may not come back."""
    inner: list[Any] = [record]
    for _ in range(DEEPEST):
        below = (each.values() if isinstance(each, dict) else each for each in inner)
        inner = [value for values in below for value in values if isinstance(value, dict | list)]
        if not inner:
            return
    raise ValueError(f"a {record['quantity']} record is nested deeper than {DEEPEST}")


def _finite(value: Any, name: str) -> None:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _finite(inner, f"{name}.{key}")
    elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN is not, either
        raise ValueError(f"{name} must be finite, got {str(value)[:60]}")


def _plan(record: Mapping[str, Any]) -> None:
    for row in record["rows"]:
        row_of(row)


def _latency(record: Mapping[str, Any]) -> None:
    window_of(record)
    if type(apart := record.get("interleaved", True)) is not bool:
        raise ValueError(f"interleaved must be true or false, got {apart!r}")
    for name, part in of_type(record.get("parts_seconds", {}), dict, "parts_seconds").items():
        for place, seconds in enumerate(of_type(part, list, f"parts_seconds.{name}")):
            if not 0 <= of_type(seconds, float, f"parts_seconds.{name}.{place}") < math.inf:
                raise ValueError(f"parts_seconds.{name}.{place} must be finite and not below 0 s, got {seconds}")
    for name, value in (record.get("correctness") or {}).items():
        of_type(value, float, f"correctness.{name}")


def _launches(record: Mapping[str, Any]) -> None:
    for name, value in record["launches"].items():
        if not isinstance(value, str):
            for each in value if isinstance(value, list) else [value]:
                of_type(each, float, f"launches.{name}")


def _ceilings(record: Mapping[str, Any]) -> None:
    for name, value in record["ceilings"].items():
        if of_type(value, float, f"ceilings.{name}") <= 0:
            raise ValueError(f"ceilings.{name} must be above 0, got {value}")


OWN: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "plan": _plan,
    "latency": _latency,
    "launches": _launches,
    "ceilings": _ceilings,
}
"""What is looked at of a quantity beside the types of its fields."""
