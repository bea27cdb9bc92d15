"""The result of a run as a table for the terminal."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lora_bench.bench.workload import BASE, PHASES, POPULARITIES
from lora_bench.report.advice import advice
from lora_bench.report.cells import COLUMNS, DETAILS, WORDS, cells, columns, interval, notes, phase_results, phase_title
from lora_bench.report.ranking import rankings
from lora_bench.report.run import device_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_bench.report.cells import Cell
    from lora_bench.report.ranking import Place, Ranking
    from lora_bench.report.run import Measured

WIDTH = 100
LONG = 16
"""A subject's name that is longer is cut to its last part, and told in full beneath."""


def render(run: Measured) -> str:
    """One table a phase: set-up x subject with latency, ratio to base, tokens per second and peak memory.

    A second one has the parts of a switch, and what a GPU told beside the hot samples, of the rows that have them.
    Beneath stand what the columns mean, what the figures say, and the subjects ranked where there are two or more.
    """
    output = StringIO()
    console = Console(file=output, width=WIDTH, no_color=True, highlight=False, markup=False, emoji=False)
    names = shortened({row.subject for row in run.results if row.subject != BASE})
    for phase in PHASES:
        if results := phase_results(run, phase):
            rows = [cells(result, run) for result in results]
            shown = columns(rows)
            main = [name for name in COLUMNS if name not in DETAILS and (name != "J/token" or name in shown)]
            console.print(_table(phase_title(results, run.device), main, rows, names))
            console.print()
            if details := [name for name in shown if name in DETAILS]:
                own = [row for row in rows if any(row[name].text for name in details)]
                title = f"{phase} in detail, medians in ms"
                console.print(_table(title, [*WORDS, "r", "n", "ms", *details], own, names))
                console.print()
    console.print(f"device={run.device} ({device_name(run)}); " + "; ".join([*notes(run), *_popularities(run)]) + ".")
    for title, lines in _said(run, names):
        console.print(f"\n{title}")
        for line in lines:
            console.print(f"- {line}")
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _popularities(run: Measured) -> list[str]:
    """What the initials behind n mean, where there are any."""
    used = [name for name in POPULARITIES[1:] if any(row.workload.popularity == name for row in run.results)]
    return [", ".join(f"{name[0]}: {name}" for name in used) + " popularity"] if used else []


def _said(run: Measured, names: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The lists beneath the tables, those that are not empty."""
    if full := [f"{short}: {name}" for name, short in names.items() if short != name]:
        yield "Subjects:", full
    if said := advice(run.results.values()):
        yield "By the medians:", said
    if ranked := [_line(each, names) for each in rankings(run.results.values())]:
        yield "Subjects ranked, times the fastest (=: a tie, the interval of the ratio holds 1):", ranked


def shortened(subjects: set[str]) -> dict[str, str]:
    """Each name with a short one for narrow columns, its last part, where it is long and no other has that part."""
    last = {name: name.rpartition("/")[2] for name in sorted(subjects)}
    return {name: short if len(name) > LONG and _single(short, last) else name for name, short in last.items()}


def _single(short: str, last: dict[str, str]) -> bool:
    return list(last.values()).count(short) == 1 and short not in last.keys() - {name for name in last if "/" in name}


def _table(title: str, shown: list[str], rows: list[dict[str, Cell]], names: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None)
    table.pad_edge = False
    for name in shown:
        if name == "subject":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=True)
    for row in rows:
        texts = {name: row[name].text for name in shown}
        shorter = {"subject": names.get(texts["subject"], texts["subject"]), "n": _initial(texts["n"])}
        table.add_row(*(texts | shorter).values())
    # Narrow gaps before a name is folded.
    table.collapse_padding = Console(width=10 * WIDTH).measure(table).maximum > WIDTH
    return table


def _initial(adapters: str) -> str:
    """The number with the initial of how a batch asks: "32 zipf" is "32z"."""
    number, _, popularity = adapters.partition(" ")
    return number + popularity[:1]


def _line(ranking: Ranking, names: dict[str, str]) -> str:
    """The places of one workload on a line: "decode, merged r4: 1 = one, 1 = two 1.003 [0.998, 1.008]"."""
    return f"{ranking.title}: " + ", ".join(_place(each, names) for each in ranking.places)


def _place(place: Place, names: dict[str, str]) -> str:
    name = names[place.subject]
    if place.place is None:
        return f"{name} {place}"
    against = place.against and (place.against.median, place.against.low, place.against.high) != (1, 1, 1)
    return f"{place} {name}" + (f" {interval(place.against)}" if place.against and against else "")
