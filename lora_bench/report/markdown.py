"""Runs in Markdown, for a pull request, a step's summary or a file beside the records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_bench.bench.workload import PHASES
from lora_bench.report import findings
from lora_bench.report.advice import advice, choices
from lora_bench.report.cells import WORDS, cells, columns, interval, notes, phase_results, phase_title, spread
from lora_bench.report.ranking import RULE, correctness, rankings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_bench.report.run import Run

LEFT, RIGHT = "---", "---:"
SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&$]|(?<=\w):(?=//)|(?<=www)\.)", re.IGNORECASE)
AT = "@&#8203;"
"""A space of no width after it, and neither a name nor an address is linked or notified."""


def markdown(runs: Sequence[Run]) -> str:
    """A chapter for each run: tables, recommendation, ranking, failures, what could not be read, the machine."""
    return "\n".join(line for run in runs for line in _chapter(run)).rstrip() + "\n"


def escaped(text: object) -> str:
    """A text that Markdown shows as it is, on one line; no HTML, link, name or formula gets through."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split())).replace("@", AT)


def _chapter(run: Run) -> Iterator[str]:
    yield from (f"# {escaped(run.name)}", "")
    if run.results:
        yield from _measured(run)
    for record in run.comparisons:
        yield from _comparison(record)
    if run.conformance:
        yield from _conformance(run.conformance.get("subjects", {}))
    if run.fingerprint:
        facts = {"command": run.origin.get("command", "the records do not say")} | run.fingerprint.get("hard", {})
        yield from _list("Machine", (f"{name}: {value}" for name, value in facts.items()))


def _measured(run: Run) -> Iterator[str]:
    results = list(run.results.values())
    failed = findings.failures(run)
    when = f", {run.origin['time']}" if "time" in run.origin else ""
    yield from (f"{escaped(run.device_name)} ({escaped(run.device)}){escaped(when)}", "")
    yield from (f"{len(results) - len(failed)} of {len(results)} rows were measured.", "")
    yield from _list("Recommendation", [*choices(results), *advice(results)])
    for phase in PHASES:
        if of := phase_results(run, phase):
            rows = [cells(each, run) for each in of]
            shown = columns(rows)
            yield from (f"## {escaped(phase_title(of, run.device))}", "")
            aligned = [LEFT if name in WORDS else RIGHT for name in shown]
            yield from _table(shown, aligned, ([row[name].text for name in shown] for row in rows))
    yield from (escaped("; ".join(notes(run))) + ".", "")
    if ranked := rankings(results):
        yield from ("## Subjects ranked", "", escaped(RULE), "")
        lines = [
            [
                ranking.title,
                place.subject,
                str(place),
                spread(place.latency) if place.latency else "",
                interval(place.against) if place.against else "",
                correctness(place.result),
            ]
            for ranking in ranked
            for place in ranking.places
        ]
        names = ["workload", "subject", "place", "ms", "x fastest", "error"]
        yield from _table(names, [LEFT, LEFT, LEFT, RIGHT, RIGHT, LEFT], lines)
    if failed:
        yield from ("## What was not measured", "")
        yield from _table(
            ["what", "row", "reason"], [LEFT] * 3, ([each.kind, each.row, each.reason] for each in failed)
        )
    if unread := findings.unread(run):
        yield from ("## What could not be read", "")
        rows_of = ([each.probe, str(each.rows), each.reason] for each in unread)
        yield from _table(["probe", "rows", "reason"], [LEFT, RIGHT, LEFT], rows_of)


def _comparison(record: dict[str, Any]) -> Iterator[str]:
    from lora_bench.report.compare import compared

    found = compared(record, "")
    yield from (f"## {escaped(found['title'])}: {escaped(found['verdict'])}", "", f"{escaped(found['because'])}.", "")
    names = ["attempt", "pairs", "head over base", "at its worst", "base against itself"]
    rows = [
        [str(number), str(each["pairs"]), each["change"], each["tail"], each["control"]]
        for number, each in enumerate(found["attempts"], start=1)
    ]
    yield from _table(names, [RIGHT] * len(names), rows)


def _conformance(subjects: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield from ("## Conformance", "")
    names = ["subject", *(status.replace("_", " ") for status in findings.VERDICTS)]
    tallies = ([subject, *map(str, findings.tally(own).values())] for subject, own in subjects.items())
    yield from _table(names, [LEFT] + [RIGHT] * len(findings.VERDICTS), tallies)
    told = [
        [each["subject"], each["status"], each["because"], ", ".join(each["checks"]), each["replay"]]
        for each in findings.reasons(subjects)
        if each["status"] != "not_offered"
    ]
    if told:
        yield from _table(["subject", "verdict", "because", "checks", "replay"], [LEFT] * 5, told)


def _table(names: Sequence[str], aligned: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(escaped, names)) + " |"
    yield "|" + "|".join(aligned) + "|"
    yield from ("| " + " | ".join(map(escaped, row)) + " |" for row in rows)
    yield ""


def _list(title: str, lines: Iterable[str]) -> Iterator[str]:
    if found := list(lines):
        yield from (f"## {title}", "", *(f"- {escaped(line)}" for line in found), "")
