"""A run beside several earlier ones: what is usual, and that a drift is told however small its steps."""

from __future__ import annotations

from typing import Any

import pytest

from lora_bench.gate.baseline import KEPT, Line, compare, worst
from tests.made_figures import MIB, OLD, ROW, changed, ratio, run


def beside(now: dict[str, Any], *medians: float) -> Line:
    """The line on the ratio, beside runs with these ratios."""
    return compare(run(now), [run(ratio(median, median - 0.2, median + 0.2)) for median in medians])[-1]


STEADY = (1.5, 1.5, 1.51, 1.49, 1.5)
RESTLESS = (1.5, 1.4, 1.6, 1.45, 1.55)
"""Median 1.5, MAD 0.05: three standard deviations are 0.22, of which 0.09 are allowed."""


@pytest.mark.parametrize(
    ("medians", "now", "verdict"),
    [
        (STEADY, ratio(1.54, 1.53, 1.55), "pass"),
        (STEADY, ratio(1.55, 1.54, 1.56), "REGRESSION"),
        (STEADY, ratio(1.55, 1.49, 1.6), "INCONCLUSIVE"),
        (STEADY, ratio(1.45, 1.44, 1.46), "improved"),
        (STEADY, ratio(1.45, 1.44, 1.51), "pass"),
        (RESTLESS, ratio(1.58, 1.57, 1.59), "pass"),
        (RESTLESS, ratio(1.6, 1.59, 1.61), "REGRESSION"),
        ((1.5, 1.5), ratio(1.55, 1.54, 1.56), "REGRESSION"),
    ],
)
def test_several_runs_tell_what_is_usual(medians: tuple[float, ...], now: dict[str, Any], verdict: str) -> None:
    line = beside(now, *medians)

    assert line.verdict == verdict
    assert f"x base 1.500 ({len(medians)} runs) -> " in line.text


def test_one_odd_run_does_not_move_what_is_usual() -> None:
    assert beside(ratio(1.6, 1.59, 1.61), *STEADY, 9.0).verdict == "REGRESSION"


def test_memory_is_compared_with_the_last_run_and_with_the_one_that_began_the_history() -> None:
    larger = changed("memory.parameter_bytes", 110 * MIB)

    assert worst(compare(run(larger), [run(larger), run(OLD)])) == "REGRESSION"
    assert worst(compare(run(larger), [run(larger), run(OLD), run(larger)])) == "pass"
    assert worst(compare(run(OLD), [run(larger), run(OLD)])) == "pass"
    (line,) = [line for line in compare(run(larger), [run(OLD), run(larger)]) if line.verdict == "REGRESSION"]
    assert line.text.endswith("(+10.00%, limit 0.5%), since old")


def drifted(step: float, what: str) -> int:
    """How many runs pass, each a step above the one before and then held against by the next."""
    history = [run(OLD)]
    for number in range(1, 41):
        times = (1 + step) ** number
        if what == "memory":
            now = changed("memory.parameter_bytes", round(100 * MIB * times))
        else:
            now = ratio(*(1.5 * times * off for off in (1.0, 0.999, 1.001)))
        if worst(compare(run(now), [history[0], *history[1:][-KEPT:]])) != "pass":
            break
        history.append(run(now))
    return len(history) - 1


def test_small_steps_lead_no_further_than_a_large_one() -> None:
    assert drifted(0.0049, "memory") == 1
    assert drifted(0.012, "ratio") <= 4


def test_runs_just_under_the_limit_do_not_raise_it() -> None:
    rising = [1.5 * 1.1**number for number in range(10)]

    assert beside(ratio(3.0, 2.99, 3.01), *rising).text.endswith("(+30.1%, limit 6.0%)")


def test_what_was_calibrated_may_be_more_than_the_scatter() -> None:
    noisy = [run(ratio(median, median - 0.2, median + 0.2)) for median in RESTLESS]
    last = noisy[-1]._replace(rows={ROW: noisy[-1].rows[ROW]._replace(noise=0.1)})

    assert compare(run(ratio(1.64, 1.63, 1.65)), [*noisy[:-1], last])[-1].verdict == "pass"


def test_a_bad_run_in_a_history_is_not_passed_over() -> None:
    lines = compare(run(OLD), [run(changed("ratio_to_base", None)), run(OLD)])
    assert lines[-1] == Line(str(ROW), "NOT COMPARABLE", "no ratio to base in the baseline")
