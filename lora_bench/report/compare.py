"""An A/B comparison as its record's pairs tell it: the verdict, and a dot for each pair of processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lora_bench.bench.checked import of_type, row_of
from lora_bench.gate.pair import LOCATION
from lora_bench.gate.verdict import told
from lora_bench.report import charts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.gate.verdict import Attempt, Comparison

MOST_MARGIN = 10.0


def compared(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a page shows of a comparison; `key` is its chart's own.

    Raises ValueError for a record that is none.
    """
    from lora_bench.gate.ab import comparison_of  # it also starts processes, which no other report asks for

    try:
        _check_limits(record["limits"])
        comparison, title = comparison_of(record), str(row_of(record))
        shown, because = verdict(record, comparison)
        names = {side: str(record[side].get("name") or record[side].get("subject", "")) for side in ("base", "head")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a record of a comparison lacks or has too much: {error}") from None
    margins = comparison.limits.location
    return {
        "title": title,
        "verdict": shown,
        "because": because,
        "names": names,
        "margins": margins,
        "attempts": [
            _attempt(each, f"{key}-{number}", title, (margins.fail, margins.accept))
            for number, each in enumerate(comparison.attempts)
            if each.pairs
        ],
    }


def _check_limits(limits: Mapping[str, Mapping[str, Any]]) -> None:
    for name in ("location", "tail"):
        for margin, value in limits[name].items():
            if not 0 <= of_type(value, float, f"limits.{name}.{margin}") <= MOST_MARGIN:
                raise ValueError(f"limits.{name}.{margin} must be from 0 to {MOST_MARGIN:g}, got {value}")


def verdict(record: Mapping[str, Any], comparison: Comparison) -> tuple[str, str]:
    """What the pairs show and why, and what the record says where that is something else.

    Of a comparison that a side's failure ended the record alone tells.
    """
    kept, why = str(record["verdict"]), str(record["because"])
    if record.get("broken"):
        return kept, why
    shown, because = comparison.verdict, comparison.because
    return (shown, because) if kept == shown else (shown, f"{because}; but the record says {kept}: {why}")


def _attempt(attempt: Attempt, key: str, title: str, limits: Sequence[float]) -> dict[str, Any]:
    sides = (("head", "head", attempt.location.change), ("base again", "control", attempt.control.change))
    rows = [
        charts.Strip(name, [math.expm1(pair.log_ratio(LOCATION, side)) for pair in attempt.pairs], change)
        for name, side, change in sides
    ]
    return {
        "verdict": attempt.verdict,
        "change": told(attempt.location.change),
        "tail": told(attempt.tail.change) if attempt.tail else "",
        "control": told(attempt.control.change),
        "rows": rows,
        "pairs": len(attempt.pairs),
        "aside": len(attempt.quarantined),
        "svg": charts.strips(rows, key=key, title=title, limits=limits),
    }
