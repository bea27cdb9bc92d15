"""What equals differ by on a runner: measured once, kept beside its baseline, and used by the gates there."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.gate.pair import LOCATION, TAIL
from lora_bench.gate.power import noise_floor, smallest_change
from lora_bench.gate.signed_rank import MOST
from lora_bench.gate.verdict import LOOKS, Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.bench.workload import Row
    from lora_bench.gate.pair import Pair

SCHEMA = 1
LEAST = LOOKS[0]
NAME = "calibration.json"


class Noise(NamedTuple):
    """The log-ratios of pairs of equals, by process pair, for one scenario."""

    location: list[float]
    tail: list[float]

    @property
    def limits(self) -> Limits:
        """The gate's own margins, moved up by what equals differ by where that is more than a change that fails."""
        tail = noise_floor(self.tail) if self.tail else 0.0
        return Limits().over(noise_floor(self.location), tail)

    @property
    def smallest_change(self) -> float:
        return smallest_change(self.location, self.limits.location)


def noise_of(pairs: Sequence[Pair]) -> Noise:
    """What pairs of equals tell."""
    tail = [pair.log_ratio(TAIL) for pair in pairs if pair.tells_tail]
    return Noise([pair.log_ratio(LOCATION) for pair in pairs], tail)


class Calibration(NamedTuple):
    """A runner's noise by row, and the hard fingerprint of the machine that it holds for."""

    hard: Mapping[str, Any]
    scenarios: Mapping[str, Noise]

    def noise(self, row: Row, hard: Mapping[str, Any]) -> Noise | None:
        """What equals differ by on the machine with that fingerprint; None where that is not known."""
        return self.scenarios.get(str(row)) if hard == self.hard else None

    def write(self, path: Path) -> None:
        """Put it in the file's place, at once or not at all."""
        told = {
            "schema": SCHEMA,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "hard": dict(self.hard),
            "scenarios": {name: noise._asdict() for name, noise in self.scenarios.items()},
        }
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(told, indent=1) + "\n")
        beside.replace(path)


def read(path: Path) -> Calibration:
    """The calibration in a file.

    Raises ValueError naming the file where there is none, or none of ours.
    """
    try:
        found = json.loads(path.read_text())
        _check(found["schema"])
        return Calibration(dict(found["hard"]), {name: _checked(**each) for name, each in found["scenarios"].items()})
    except FileNotFoundError:
        raise ValueError(f"there is no calibration {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no calibration: {type(error).__name__}: {error}") from None


def _check(schema: object) -> None:
    if schema != SCHEMA:
        raise ValueError(f"it is of schema {schema}, wanted {SCHEMA}")


def _checked(location: Sequence[float], tail: Sequence[float]) -> Noise:
    """The noise that was kept; ValueError where no pairs of equals can have shown it."""
    for name, values, least in (("location", location, LEAST), ("tail", tail, 0)):
        if not isinstance(values, list) or not least <= len(values) <= MOST:
            raise ValueError(f"{name} must be a list of {least} to {MOST} log-ratios, got {str(values)[:40]}")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not -1 < value < 1:
                raise ValueError(f"a log-ratio of equals is between -1 and 1, got {value!r} in {name}")
    return Noise(list(location), list(tail))
