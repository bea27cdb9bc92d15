"""This run beside earlier ones: memory peaks, which repeat to the byte, and the ratios to base.

Times themselves are not compared: the machine's mood is in them. A ratio of two set-ups that took turns is not moved
by it. A stored baseline only screens: what it finds is measured again on one machine, by `lora-bench ab`.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.ratio import Interval
from lora_bench.bench.workload import BASE, Row
from lora_bench.gate.figures import Figures, Run, load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.gate.calibration import Calibration

MEMORY_TOLERANCE = 0.005
RATIO_TOLERANCE = 0.03
RESTLESS_TOLERANCE = 2 * RATIO_TOLERANCE
"""No scatter of promoted runs allows more: it feeds on the drift that it let through."""
MAD_SD = 1.4826
"""The standard deviation of a normal distribution, by its median absolute deviation."""
MEMORY = ("allocated_peak_bytes", "saved_tensor_bytes", "parameter_bytes")
KEPT = 10
"""So many promoted runs tell what is usual; the one that began the history is kept beside them."""

PASS, IMPROVED = "pass", "improved"
REGRESSION, INCONCLUSIVE, NOT_COMPARABLE = "REGRESSION", "INCONCLUSIVE", "NOT COMPARABLE"
WORST_FIRST = (REGRESSION, NOT_COMPARABLE, INCONCLUSIVE, IMPROVED, PASS)
EXIT_REGRESSION, EXIT_INCONCLUSIVE = 1, 6


class Line(NamedTuple):
    """One verdict: on a row, or on what there is to compare with; and what was compared."""

    name: str
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:14} {self.name}: {self.text}"


class Shelf(NamedTuple):
    """What there is to compare with, and a line for each thing that should have been and is not."""

    runs: list[Run]
    trouble: list[Line]


def shelf(place: Path) -> Shelf:
    """The run in a file, or the promoted ones in a folder; what cannot be used is named by a line."""
    if not place.exists():
        return Shelf([], [Line(str(place), NOT_COMPARABLE, "there is no such file or folder")])
    paths = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
    if not paths:
        return Shelf([], [Line(str(place), NOT_COMPARABLE, "the folder holds no promoted run: see lora-bench promote")])
    found = Shelf([], [])
    calibrated = _calibration(place if place.is_dir() else place.parent, found.trouble)
    for path in paths:
        try:
            run = load(path) if calibrated is None else _with_noise(load(path), calibrated)
        except (ValueError, TypeError) as error:  # of a run, or of noise that is none
            found.trouble.append(Line(path.name, NOT_COMPARABLE, str(error)))
            continue
        if place.is_dir() and run.promotion is None:
            found.trouble.append(Line(path.name, NOT_COMPARABLE, "it was never promoted: see lora-bench promote"))
        else:
            found.runs.append(run)
    return found


def _calibration(folder: Path, trouble: list[Line]) -> Calibration | None:
    """The calibration beside the baseline, if there is one."""
    from lora_bench.gate import calibration  # with numpy, which no run without a baseline should pay for

    path = folder / calibration.NAME
    try:
        return calibration.read(path) if path.exists() else None
    except ValueError as error:
        trouble.append(Line(path.name, NOT_COMPARABLE, str(error)))
        return None


def _with_noise(run: Run, calibrated: Calibration) -> Run:
    from lora_bench.gate.power import noise_floor

    known = {row: calibrated.noise(row, run.hard) for row in run.rows}
    floors = {row: noise_floor(noise.location) for row, noise in known.items() if noise is not None}
    return run._replace(rows={row: own._replace(noise=floors.get(row, 0.0)) for row, own in run.rows.items()})


def differences(new: Run, old: Run) -> list[str]:
    """The fields in which two machines differ, with both values."""
    now, then = new.hard, old.hard
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name} was {then.get(name)}, is {now.get(name)}" for name in changed]


def also_changed(new: Run, old: Run) -> list[str]:
    """What else is not as it was, of what may differ between runs that are compared: versions, threads, the system."""
    now, then = (_flat(run.fingerprint.get("soft", {})) for run in (new, old))
    return [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, those within a field beside the others."""
    inner = [each.items() if isinstance(each, dict) else [(name, each)] for name, each in fields.items()]
    return dict(item for items in inner for item in items)


def choose(new: Run, runs: Sequence[Run]) -> list[Run]:
    """The history to compare with: of the machine, and then of the scenarios, that differ least.

    It is told from the oldest on: the run that began it, by a promotion that said so, and the last ten.
    """
    histories: dict[str, list[Run]] = {}
    for run in in_order(runs):
        histories.setdefault(run.key, []).append(run)

    def nearness(history: list[Run]) -> tuple[int, int, str]:
        last = history[-1]
        apart = len(set(new.planned) ^ set(last.planned))
        return -len(differences(new, last)), -apart, (last.promotion or {}).get("time", "")

    first, *others = _begun(max(histories.values(), key=nearness))
    return [first, *others[-KEPT:]]


def in_order(runs: Sequence[Run]) -> list[Run]:
    """The runs by the time of their promotion."""
    return sorted(runs, key=lambda run: ((run.promotion or {}).get("time", ""), run.name))


def worth_keeping(runs: Sequence[Run]) -> list[Run]:
    """Of the promoted runs of one machine and choice of scenarios: the last ten, and the one that began the history."""
    ordered = in_order(runs)
    return [*_begun(ordered)[:1], *ordered[-KEPT:]]


def _begun(ordered: list[Run]) -> list[Run]:
    """The runs from the last one on that began a history."""
    begins = [number for number, run in enumerate(ordered) if (run.promotion or {}).get("begins")]
    return ordered[begins[-1] if begins else 0 :]


def screen(new: Run, place: Shelf) -> list[Line]:
    """Every verdict on a run: what the shelf lacks, then every row of the run and of its baseline."""
    return place.trouble + (compare(new, choose(new, place.runs)) if place.runs else [])


def verdict_on(row: Row, new: Run, history: Sequence[Run]) -> str:
    """The worst verdict on one row of a run; the history may be empty."""
    if not history or differences(new, history[-1]) or row not in history[-1].rows:
        return NOT_COMPARABLE
    return worst(compare_row(row, new.rows[row], [run for run in history if row in run.rows]))


def compare(new: Run, history: Sequence[Run]) -> list[Line]:
    """Every row of either side with its verdict; what is missing or cannot be compared is named, never passed over."""
    old = history[-1]
    if new.rows and (different := differences(new, old)):
        return [Line(f"no baseline of this machine, the nearest is {old.name}", NOT_COMPARABLE, "; ".join(different))]
    lines = [Line(str(row), NOT_COMPARABLE, "missing from this run") for row in old.rows if row not in new.rows]
    lines += [Line(str(row), NOT_COMPARABLE, "not in the baseline") for row in new.rows if row not in old.rows]
    for row in new.rows:
        if row in old.rows:
            lines += compare_row(row, new.rows[row], [run for run in history if row in run.rows])
    return lines


def compare_row(row: Row, now: Figures, history: Sequence[Run]) -> list[Line]:
    """The verdicts on one row: its memory beside that of the last run, its ratio beside those of the last ten.

    Both are held against the run that began the history too: small steps lead as far as a large one.
    """
    known, began = [run.rows[row] for run in history], history[0].name
    lines = []
    for name in MEMORY if now.memory or not now.trouble else ():  # a row that failed has none, and says why below
        lately, since = (_compare_memory(row, name, now.memory, of.memory) for of in (known[-1], known[0]))
        lines += [_worse(lately, since, began)] if lately and since else [line for line in (lately, since) if line]
    if not lines and not now.trouble:
        lines.append(Line(str(row), NOT_COMPARABLE, "no memory was measured, now or before"))
    unusable = [("this run", now.trouble), *(("the baseline", then.trouble) for then in known)]
    if whose := next(((who, why) for who, why in unusable if why), None):
        lines.append(Line(str(row), NOT_COMPARABLE, "{}: {}".format(*whose)))
    elif row.subject != BASE and any(then.interleaved != now.interleaved for then in known):
        ways = {True: "base and row took turns", False: "the base ran before and after the row"}
        why = f"{ways[now.interleaved]}, and in the baseline {ways[not now.interleaved]}"
        lines.append(Line(str(row), NOT_COMPARABLE, why))
    elif row.subject != BASE:
        lines.append(_compare_ratio(row, now.ratio, [then.ratio for then in known], known[-1].noise, began))
    return lines


def _worse(lately: Line, since: Line, began: str) -> Line:
    """What was found beside the last runs; what was beside the one that began the history, where that is worse."""
    if WORST_FIRST.index(since.verdict) < min(map(WORST_FIRST.index, (lately.verdict, IMPROVED))):
        return since._replace(text=f"{since.text}, since {began}")
    return lately


def _compare_memory(row: Row, name: str, memory: Mapping[str, Any], before: Mapping[str, Any]) -> Line | None:
    now, then = memory.get(name), before.get(name)
    if not any(isinstance(value, int) for value in (now, then)):
        return None
    if type(now) is not int or type(then) is not int or now <= 0 or then <= 0:
        return Line(str(row), NOT_COMPARABLE, f"{name} was {then}, is {now}")
    change = now / then - 1
    text = f"{name} {then:,} -> {now:,} ({change:+.2%}, limit {MEMORY_TOLERANCE:.1%})"
    if change > MEMORY_TOLERANCE:
        return Line(str(row), REGRESSION, text)
    return Line(str(row), IMPROVED, f"{text}: promote") if change < -MEMORY_TOLERANCE else Line(str(row), PASS, text)


def _compare_ratio(row: Row, now: Interval | None, then: Sequence[Interval | None], noise: float, began: str) -> Line:
    known = [ratio for ratio in then if ratio is not None]
    if now is None or len(known) < len(then):
        return Line(str(row), NOT_COMPARABLE, "no ratio to base in " + ("this run" if now is None else "the baseline"))
    for ratio in (now, *known):
        if not all(0 < end < math.inf for end in ratio[:3]):
            return Line(str(row), NOT_COMPARABLE, f"a ratio to base of {_told(ratio)}")
    last = known[-KEPT:]
    usual, limit = _usual(last, noise)
    before = _told(usual) if len(last) == 1 else f"{usual.median:.3f} ({len(last)} runs)"
    lately, since = _beside(row, now, usual, limit, before), _beside(row, now, known[0], limit, _told(known[0]))
    return _worse(lately, since, began)


def _beside(row: Row, now: Interval, then: Interval, limit: float, before: str) -> Line:
    change = now.median / then.median - 1
    text = f"x base {before} -> {_told(now)} ({change:+.1%}, limit {limit:.1%})"
    if change > limit:
        apart = now.low > then.high
        return Line(str(row), *((REGRESSION, text) if apart else (INCONCLUSIVE, f"{text}: measure again")))
    if change < -limit and now.high < then.low:
        return Line(str(row), IMPROVED, f"{text}: promote")
    return Line(str(row), PASS, text)


def _usual(ratios: Sequence[Interval], noise: float) -> tuple[Interval, float]:
    """The centre of a history with the ends that a new interval must be clear of, and by which share it may be off."""
    if len(ratios) == 1:
        return ratios[0], max(RATIO_TOLERANCE, noise)
    medians = [ratio.median for ratio in ratios]
    centre = statistics.median(medians)
    deviation = MAD_SD * statistics.median(abs(median - centre) for median in medians)
    scatter = min(max(RATIO_TOLERANCE, 3 * deviation / centre), RESTLESS_TOLERANCE)
    return Interval(centre, centre, centre), max(scatter, noise)


def _told(ratio: Interval) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def worst(lines: Sequence[Line]) -> str:
    """The verdict that decides; NOT COMPARABLE where there is none."""
    return min((line.verdict for line in lines), key=WORST_FIRST.index, default=NOT_COMPARABLE)


def closing(lines: Sequence[Line]) -> str:
    """How many comparisons had which verdict, and by which rule."""
    verdicts = [line.verdict for line in lines]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in reversed(WORST_FIRST) if each in verdicts)
    return (
        f"{counts or 'nothing was compared'}. Memory may rise by {MEMORY_TOLERANCE:.1%};\n"
        f"a ratio may by {RATIO_TOLERANCE:.0%}, or if more by 3 standard deviations of the promoted runs (MAD, up to\n"
        f"{RESTLESS_TOLERANCE:.0%}), or by what equals differ by where that was calibrated:\n"
        "it has regressed where the intervals are apart as well, and is inconclusive where they are not.\n"
        "Both are held against the run that began the history too, so that it does not drift.\n"
        "The resident set is not compared, since it does not repeat."
    )


def exit_code(lines: Sequence[Line], *, lenient: bool = False) -> int:
    """1 with a regression; 0 where something was compared and all of it passed; else 6.

    Where it is `lenient`, 6 becomes 0 if anything passed: never where nothing at all was compared.
    """
    verdicts = {line.verdict for line in lines}
    if REGRESSION in verdicts:
        return EXIT_REGRESSION
    passed = verdicts & {PASS, IMPROVED}
    return 0 if passed and (lenient or passed == verdicts) else EXIT_INCONCLUSIVE
