"""Records of earlier schemas, made into those of today."""

from __future__ import annotations

from typing import Any

TODAY = 2
"""The schema that is written now. The first told of no targets, popularity, order within a round or interruptions."""
_FIRST = ("latency", "memory", "failure")
"""The quantities of schema 1."""
_UNSAID = {"popularity": "distinct", "targets": "all"}
"""What a workload of schema 1 could not be otherwise."""
_NOT_NOTED = "records of schema 1 did not note it"


def upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """The record in today's schema; one of today is returned as it is.

    Of an old one it is not known which samples were interrupted: all of them count, and its window says so. Raises
    ValueError for a schema, or a quantity of an old one, that there never was; KeyError where it lacks something.
    """
    if record["schema"] == TODAY:
        return record
    if record["schema"] != 1 or record["quantity"] not in _FIRST:
        raise ValueError(f"is of schema {record['schema']}, wanted {TODAY}")
    made = record | {"schema": TODAY, "workload": _UNSAID | record["workload"]}
    return made | _timed(record) if record["quantity"] == "latency" else made


def _timed(record: dict[str, Any]) -> dict[str, Any]:
    """What a latency record has beside its samples, for want of notes."""
    unknown = dict.fromkeys(("clock", "throttle counters", "order", "interruptions"), _NOT_NOTED)
    throttled = f"unavailable ({_NOT_NOTED})"
    return {
        "order": [],
        "interrupted": [False] * len(record["samples_seconds"]),
        "base_order": [],
        "base_interrupted": [False] * len(record["base_samples_seconds"]),
        "window": {"clocks": [], "throttle_delta": {}, "throttled": throttled, "unavailable": unknown},
    }
