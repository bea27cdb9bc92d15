"""The HTML page without a browser: complete, self-contained, escaped, and true to the records."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora_bench.bench.counts import reconciled
from lora_bench.bench.result import Result
from lora_bench.bench.workload import Row
from lora_bench.report import charts, findings
from lora_bench.report.cells import DETAILS, cells
from lora_bench.report.page import page
from lora_bench.report.run import Run, load
from tests.fresh_interpreter import loaded_by
from tests.made_records import HOSTILE, comparison, run

VERDICTS = Path(__file__).parents[1] / "reports" / "conformance" / "conformance.json"
VOID = {"meta", "link", "input", "br"}


class Reader(HTMLParser):
    """What a page is made of: tags with their attributes, the rows of its tables, and elements that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.crossed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data.strip()


@cache
def made(folder: Path) -> tuple[list[Run], str, Reader]:
    runs = [load(run(folder)), load(comparison(folder, 0.04, attempts=2)), load(VERDICTS)]
    text, reader = page(runs), Reader()
    reader.feed(text)
    return runs, text, reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


def test_elements_are_closed_and_anchors_are_single(folder: Path) -> None:
    _, text, reader = made(folder)
    anchors = [found["id"] for _, found in reader.tags if "id" in found]
    aimed = re.findall(r'(?:href="#|aria-labelledby="|data-for=")([^"]+)"', text)

    assert text.startswith("<!DOCTYPE html>\n<html lang")
    assert reader.crossed == reader.open == []
    assert len(anchors) == len(set(anchors))
    assert {anchor for each in aimed for anchor in each.split()} <= set(anchors)


def test_the_page_asks_nobody_for_anything(folder: Path) -> None:
    _, text, reader = made(folder)
    asked = [found[name] for _, found in reader.tags for name in ("src", "href", "action", "data") if name in found]

    assert [each for each in asked if each and not each.startswith(("#", "data:,"))] == []
    assert re.findall(r"url\(|@import|fetch\(|https?://", text) == []


def test_what_a_record_says_is_never_markup(folder: Path) -> None:
    _, text, reader = made(folder)

    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert HOSTILE not in text
    assert text.count(html.escape(HOSTILE)) > 20
    assert [name for _, found in reader.tags for name in found if name.startswith("on")] == []


def test_every_row_is_there_with_what_the_table_says_of_it(folder: Path) -> None:
    runs, _, reader = made(folder)
    shown = [tuple(row) for row in reader.rows]

    for result in runs[0].results.values():
        wanted = [cell.text for name, cell in cells(result, runs[0]).items() if name not in DETAILS]
        assert tuple(wanted) in shown, result.row
    for failed in findings.failures(runs[0]):
        assert (failed.kind, failed.row, failed.reason) in shown
    for probe in findings.unread(runs[0]):
        assert (probe.probe, str(probe.rows), probe.reason) in shown


def test_columns_of_launches_and_of_a_switch_s_parts_are_there_where_a_row_has_them(tmp_path: Path) -> None:
    of, reader = load(run(tmp_path, subjects=("reference",), every=1000)), Reader()
    for result in [result for row, result in of.results.items() if row.workload.phase == "decode"]:
        result.launches = {"graph_seconds": [3e-3, 5e-3, 4e-3], "cold_seconds": "unavailable (no room)"}
        if result.row.workload.setup == "merged":
            row = Row("reference", replace(result.row.workload, phase="switch"))
            parts = {name: [1e-3 * place] * 12 for place, name in enumerate(("evict", "load", "merge"), start=1)}
            of.results[row] = Result(row, result.samples, result.base, parts=parts)
    reader.feed(page([of]))

    heads = [row for row in reader.rows if row[:2] == ["set-up", "subject"]]
    assert [[name for name in head if name in DETAILS] for head in heads] == [[], ["graph"], ["evict", "load", "merge"]]
    shown = {tuple(row) for row in reader.rows}
    for result in of.results.values():
        columns = heads[("prefill", "decode", "switch").index(result.row.workload.phase)]
        found = cells(result, of)
        assert tuple(found[name].text for name in columns) in shown


def test_memory_parts_and_the_rest_are_the_measured_peak(folder: Path) -> None:
    runs, _, reader = made(folder)
    memories = list(findings.memories(runs[0].results.values(), "cuda:0"))

    assert len(memories) == sum(result.measured for result in runs[0].results.values())
    for each in memories:
        assert each.worked_out + each.unexplained == each.measured == each.result.memory["allocated_peak_bytes"]
        assert each.worked_out == reconciled(each.result.row.workload, "cuda:0", each.result.memory)["budget"]["peak"]
        assert each.context == 2_500_000
    (head,) = (row for row in reader.rows if row[:2] == ["row", "phase"] and "measured" in row)
    rows = [row for row in reader.rows if len(row) == len(head) and row[1] in ("prefill", "decode")]
    assert len(rows) == len(memories)
    assert head[-1] == "context"


def test_a_bar_s_parts_stand_in_a_row_and_its_mark_where_it_was_measured() -> None:
    bar = charts.stack({"weights": 100, "adapters": 50, "unexplained": -20}, 200, 130)

    assert re.findall(r'class="p-(\w+)" x="([\d.]+)" y="2" width="([\d.]+)"', bar) == [
        ("weights", "0.00", "50.00"),
        ("adapters", "50.00", "25.00"),
        ("unexplained", "75.00", "0.00"),
    ]
    assert 'class="mark" x="64.60"' in bar


def test_tables_are_named_and_their_heads_have_a_scope(folder: Path) -> None:
    _, text, reader = made(folder)

    assert text.count("<table") == text.count("<caption")
    assert [found for tag, found in reader.tags if tag == "th" and "scope" not in found] == []
    assert all(f"<title id={found['aria-labelledby'].split()[0]!r}".replace("'", '"') in text
               for tag, found in reader.tags if tag == "svg" and found.get("role") == "img"
               if found["aria-labelledby"])  # fmt: skip


def test_a_comparison_has_its_verdict_and_a_dot_for_each_pair(folder: Path) -> None:
    _, text, _ = made(folder)

    assert '<span class="verdict fail">FAIL</span>' in text
    strips = re.findall(r'<svg class="chart"[^>]*aria-labelledby="run1-ab0-[01]-t.*?</svg>', text, re.DOTALL)
    assert [strip.count('class="dot s0"') for strip in strips] == [7, 7]
    assert [strip.count('class="dot s1"') for strip in strips] == [7, 7]


def test_a_run_without_joules_says_why(tmp_path: Path) -> None:
    path = run(tmp_path, subjects=("reference",))
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"quantity": "energy"' not in line]
    path.write_text("".join(lines))

    assert f"Joules are unavailable: {findings.NO_ENERGY}." in page([load(path)])


@pytest.mark.parametrize(
    ("value", "end"), [(0.9, 1), (1.0, 1), (1.01, 2), (4.2, 5), (63, 80), (99, 100), (0.0013, 0.002)]
)
def test_an_axis_ends_with_a_round_number_that_is_not_below(value: float, end: float) -> None:
    assert charts.nice(value) == pytest.approx(end)


def test_reading_and_rendering_ask_for_no_torch(tmp_path: Path) -> None:
    modules = "import pathlib, lora_bench.report.page, lora_bench.report.markdown, lora_bench.report.run"
    loaded = loaded_by(f"{modules}\nlora_bench.report.run.load(pathlib.Path({str(run(tmp_path))!r}))")

    assert "lora_bench.report.page" in loaded
    assert loaded.isdisjoint({"torch", "transformers"})


def hues(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", css))


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2's success criterion 1.4.3, from 1 to 21."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(scheme: str) -> None:
    css = (Path(findings.__file__).parent / "page.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)", 1)
    colours = hues(light) if scheme == "light" else hues(light) | hues(dark.split("* {", 1)[0])
    words = ("ink", "quiet", "link", "bad", "good", "unsure")

    for ground in ("ground", "band"):
        assert {name: contrast(colours[name], colours[ground]) for name in words if
                contrast(colours[name], colours[ground]) < 4.5} == {}  # fmt: skip
    signs = [name for name in colours if re.fullmatch(r"s\d", name)]
    assert len(signs) == charts.HUES
    assert {name for name in (*signs, "fill") if contrast(colours[name], colours["ground"]) < 3} == set()
