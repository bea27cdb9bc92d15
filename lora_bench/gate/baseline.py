"""This run beside an earlier one's JSON: memory peaks, which repeat to the byte, and the ratios to base.

Times themselves are not compared: the machine's mood is in them. A ratio of two set-ups that took turns is not moved
by it, and is called a regression only when both its interval and its size say so.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.workload import BASE, Row, Workload

if TYPE_CHECKING:
    from pathlib import Path

MEMORY_TOLERANCE = 0.005
RATIO_TOLERANCE = 0.03
MEMORY = ("allocated_peak_bytes", "saved_tensor_bytes", "parameter_bytes")
COMPARED = ("fingerprint", "memory", "ratio_to_base")

PASS, REGRESSION, NOT_COMPARABLE = "pass", "REGRESSION", "NOT COMPARABLE"
EXIT_REGRESSION, EXIT_INCONCLUSIVE = 1, 6


class Line(NamedTuple):
    """One row's verdict, and what was compared."""

    name: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:14} {self.name}: {self.text}"


def load(path: Path) -> dict[Row, dict[str, Any]]:
    """The rows of a --benchmark-json file of ours, with what is compared of their extra_info.

    Raises ValueError naming the file where it is no such file or holds no row.
    """
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
        infos = [benchmark["extra_info"] for benchmark in benchmarks]
        rows = {
            Row(info["subject"], Workload(**info["workload"])): {name: info[name] for name in COMPARED}
            for info in infos
            if "workload" in info
        }
    except FileNotFoundError:
        raise ValueError(f"--lora-baseline: there is no file {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of --benchmark-json: {type(error).__name__}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no result of the GPU suites")
    return rows


def compare(new: dict[Row, dict[str, Any]], old: dict[Row, dict[str, Any]]) -> list[Line]:
    """Every row of either run with its verdict; what is missing or cannot be compared is named, never passed over."""
    lines = [Line(str(row), NOT_COMPARABLE, "missing from this run") for row in old if row not in new]
    lines += [Line(str(row), NOT_COMPARABLE, "not in the baseline") for row in new if row not in old]
    return lines + [line for row in new if row in old for line in _compare_row(row, new[row], old[row])]


def _compare_row(row: Row, new: dict[str, Any], old: dict[str, Any]) -> list[Line]:
    now, then = new["fingerprint"].get("hard", {}), old["fingerprint"].get("hard", {})
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    different = [f"{name} was {then.get(name)}, is {now.get(name)}" for name in changed]
    if different:
        return [Line(str(row), NOT_COMPARABLE, "; ".join(different))]
    lines = [_compare_memory(row, name, new["memory"].get(name), old["memory"].get(name)) for name in MEMORY]
    if row.subject != BASE:
        lines.append(_compare_ratio(row, new["ratio_to_base"], old["ratio_to_base"]))
    return [line for line in lines if line is not None]


def _compare_memory(row: Row, name: str, now: Any, then: Any) -> Line | None:
    if not isinstance(now, int) and not isinstance(then, int):
        return None
    if not isinstance(now, int) or not isinstance(then, int):
        return Line(str(row), NOT_COMPARABLE, f"{name} was {then}, is {now}")
    change = now / then - 1 if then else float(now > 0)
    verdict = REGRESSION if change > MEMORY_TOLERANCE else PASS
    return Line(str(row), verdict, f"{name} {then:,} -> {now:,} ({change:+.2%}, limit {MEMORY_TOLERANCE:.1%})")


def _compare_ratio(row: Row, now: dict[str, float] | None, then: dict[str, float] | None) -> Line:
    if now is None or then is None:
        return Line(str(row), NOT_COMPARABLE, "no ratio to base in " + ("this run" if now is None else "the baseline"))
    if not all(0 < ratio[end] < math.inf for ratio in (then, now) for end in ("low", "median", "high")):
        return Line(str(row), NOT_COMPARABLE, f"x base was {then}, is {now}")
    change = now["median"] / then["median"] - 1
    apart = now["low"] > then["high"]
    text = " -> ".join(f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" for ratio in (then, now))
    verdict = REGRESSION if apart and change > RATIO_TOLERANCE else PASS
    return Line(str(row), verdict, f"x base {text} ({change:+.1%}, limit {RATIO_TOLERANCE:.0%})")


def closing(lines: list[Line]) -> str:
    """How many comparisons passed and did not, and by which rule."""
    verdicts = [line.verdict for line in lines]
    passed, regressed, other = (verdicts.count(verdict) for verdict in (PASS, REGRESSION, NOT_COMPARABLE))
    return (
        f"{passed} passed, {regressed} regressed, {other} not comparable. Memory may rise by {MEMORY_TOLERANCE:.1%};\n"
        f"a ratio has regressed when it is over {RATIO_TOLERANCE:.0%} up and the two intervals are apart;\n"
        "the resident set is not compared, since it does not repeat."
    )


def exit_code(lines: list[Line]) -> int:
    """1 with a regression, else 6 with anything that could not be compared or nothing compared, else 0."""
    verdicts = {line.verdict for line in lines}
    if REGRESSION in verdicts:
        return EXIT_REGRESSION
    return 0 if verdicts == {PASS} else EXIT_INCONCLUSIVE
