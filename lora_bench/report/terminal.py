"""Runs for the terminal: the table of each, and what its records tell beside it."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from lora_bench.report import findings
from lora_bench.report.advice import choices
from lora_bench.report.table import WIDTH, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_bench.report.run import Run


def terminal(runs: Sequence[Run]) -> str:
    """Each run under its name, in lines of up to 100 columns."""
    return "\n".join(line for run in runs for line in _told(run)).rstrip() + "\n"


def _told(run: Run) -> Iterator[str]:
    yield from (f"== {run.name}", "")
    if run.results:
        yield render(run)
        yield from _list("One adapter, by the medians:", choices(run.results.values()))
        yield from _list(
            "Not measured:", (f"{each.kind}: {each.row}: {each.reason}" for each in findings.failures(run))
        )
        unread = (f"{each.probe}, {each.rows} rows: {each.reason}" for each in findings.unread(run))
        yield from _list("Could not be read:", unread)
    for record in run.comparisons:
        from lora_bench.report.compare import compared

        found = compared(record, "")
        lines = (
            f"{each['change']} by {each['pairs']} pairs; base against itself {each['control']}"
            for each in found["attempts"]
        )
        yield from _list(f"{found['title']}: {found['verdict']}, {found['because']}", lines)
    subjects = run.conformance.get("subjects", {})
    for subject, own in subjects.items():
        counts = ", ".join(f"{number} {status}" for status, number in findings.tally(own).items() if number)
        yield f"{subject}: {counts}".replace("not_offered", "not offered")
    worse = [each for each in findings.reasons(subjects) if each["status"] in ("fails", "error")]
    yield from _list(
        "Not conforming:", (f"{each['subject']} {', '.join(each['checks'])}: {each['because']}" for each in worse)
    )
    yield ""


def _list(title: str, lines: Iterable[str]) -> Iterator[str]:
    if found := list(lines):
        yield from ("", fill(title, WIDTH))
        yield from (fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in found)
