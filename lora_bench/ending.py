"""The end of a measured run: its verdicts beside a baseline, the reports beside its records, what GitHub is told."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_bench.gate import baseline
from lora_bench.gate.baseline import IMPROVED, INCONCLUSIVE, NOT_COMPARABLE, REGRESSION, Line
from lora_bench.gate.figures import Run, of_results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.bench.session import Session
    from lora_bench.bench.workload import Row

LEVELS = {REGRESSION: "error", NOT_COMPARABLE: "warning", INCONCLUSIVE: "warning", IMPROVED: "notice"}
"""How GitHub annotates a verdict; what passed is not annotated, and any other verdict is a failure."""
LOOSE = "--lora-on-inconclusive=warn lets this run pass although {} of its {} verdicts are no pass"


class Screen:
    """The stored-baseline screen of one run: what there is to compare with, and the verdicts on the run."""

    def __init__(self, place: Path) -> None:
        self.place, self.shelf = place, baseline.shelf(place)
        self.lines: list[Line] = []
        self.changed: list[str] = []
        """What else is not as it was when the baseline was measured."""
        self._history: list[Run] | None = None

    def judge(self, run: Session | None) -> list[Line]:
        """Every verdict on the run, kept in `lines`; a run that measured nothing lacks every row."""
        new = Run("", {}, (), {}) if run is None else _as_run(run, run.planned)
        self.lines = baseline.screen(new, self.shelf)
        if new.rows and self.shelf.runs:
            self.changed = baseline.also_changed(new, baseline.choose(new, self.shelf.runs)[-1])
        return self.lines

    def verdict_on(self, row: Row, run: Session) -> str:
        """The worst verdict on one row, as soon as it is measured."""
        if self._history is None:
            runs = self.shelf.runs
            self._history = baseline.choose(_as_run(run, run.planned), runs) if runs else []
        return baseline.verdict_on(row, _as_run(run, [row]), self._history)


def _as_run(run: Session, rows: Sequence[Row]) -> Run:
    made = of_results(run.records.run_id, run.fingerprint, rows, run.results)
    return made._replace(planned=tuple(run.planned))


def cut_off(run: Session) -> bool:
    """Whether something is left that a run would measure if it was gone on with."""
    return bool(run.lost) or not all(map(run.settled, run.planned))


def properties(run: Session, row: Row, screen: Screen | None) -> list[tuple[str, object]]:
    """What JUnit says of a row: verdict, median seconds with interval, ratio to base, peak bytes, error of bound."""
    from lora_bench.report.lists import peak_bytes

    result = run.results[row]
    if not result.measured:
        return [("lora_verdict", result.kind)]
    latency, ratio = result.latency, result.ratio
    told: dict[str, Any] = {
        "verdict": "measured" if screen is None else screen.verdict_on(row, run),
        "median_seconds": latency.median,
        "interval_seconds": f"[{latency.low:.6g}, {latency.high:.6g}]",
        "ratio": ratio and ratio.median,
        "peak_bytes": peak_bytes(result),
        "error_of_bound": result.proof and result.proof.error_ratio,
    }
    return [(f"lora_{name}", value) for name, value in told.items() if value is not None]


def write_reports(path: Path) -> list[str]:
    """Write the page and the lists beside the records; a line on each, as one that fails costs nothing but itself."""
    written, failed = [], []
    try:
        from lora_bench.report.lists import texts
        from lora_bench.report.run import load

        loaded = load(path)
        makers: dict[str, Callable[[], str]] = {"html": lambda: _page(loaded), **texts(loaded)}
    except Exception as error:  # noqa: BLE001  # whatever a report dies of, what was measured stands
        return [f"no reports: {type(error).__name__}: {error}"]
    for end, make in makers.items():
        target = path.with_suffix(f".{end}")
        try:
            target.write_text(make(), encoding="utf-8")
            written.append(end)
        except Exception as error:  # noqa: BLE001  # likewise
            with suppress(OSError):
                target.unlink()  # half of it tells less than none
            failed.append(f"no {target.name}: {type(error).__name__}: {error}")
    ends = f"{{{','.join(written)}}}" if len(written) > 1 else "".join(written)
    beside = [f"reports: {path.with_suffix('')}.{ends}"] if written else []
    return beside + failed


def _page(loaded: Any) -> str:
    from lora_bench.report.page import page

    return page([loaded])


def _findings(run: Session | None, lines: Sequence[Line]) -> list[Line]:
    """What failed, and every verdict, worst first."""
    results = [] if run is None else [run.results[row] for row in run.planned if row in run.results]
    failed = [Line(str(result.row), result.kind, result.failure) for result in results if result.failure]
    return failed + sorted(lines, key=lambda line: baseline.WORST_FIRST.index(line.verdict))


def tell_github(run: Session | None, lines: Sequence[Line], loose: str) -> list[str]:
    """Write the step's summary; the annotations, to be printed, and why there is no summary if there is none."""
    from lora_bench.report import github

    found = _findings(run, lines)
    known = LEVELS | {baseline.PASS: ""}
    noted = [(known.get(line.verdict, "error"), f"{line.verdict}: {line.name}", line.text) for line in found]
    noted += [("warning", "lora-bench", loose)] if loose else []
    rows = [(line.verdict, line.name, line.text) for line in found]
    markdown = f"{github.table(rows, ('verdict', 'row', 'why'))}\n" if rows else ""
    markdown += f"**{loose}**\n\n" if loose else ""
    path = run.records.path if run is not None and run.results else None
    return [*github.annotated(each for each in noted if each[0]), *summarise(path, markdown)]


def summarise(records: Path | None, markdown: str = "") -> list[str]:
    """Append to the step's summary what the records tell, after this; why not, where that cannot be."""
    from lora_bench.report import github

    failed = []
    if records is not None:
        try:
            from lora_bench.report.markdown import markdown as as_markdown
            from lora_bench.report.run import load

            markdown += as_markdown([load(records)])
        except Exception as error:  # noqa: BLE001  # as above
            failed.append(f"no tables in the step's summary: {type(error).__name__}: {error}")
    if why := github.summarise(markdown):
        failed.append(f"no summary of the step: {why}")
    return failed
