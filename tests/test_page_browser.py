"""The HTML page in a browser, opened from a disk: it sorts, filters and fits, and shows what the records say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.report.cells import DETAILS, Cell, cells, phase_results
from lora_bench.report.page import page
from lora_bench.report.run import Run, load
from tests.made_records import HOSTILE, comparison, run

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VERDICTS = Path(__file__).parents[1] / "reports" / "conformance" / "conformance.json"
WIDE, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [load(run(folder)), load(comparison(folder, 0.04)), load(VERDICTS)]


@pytest.fixture(scope="module")
def opened(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what its console and its scripts complain of: one browser for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the path")
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page(runs), encoding="utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page()
        said: list[str] = []
        asked: list[str] = []
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto(file.as_uri())
        said += [f"{address} was asked for" for address in asked if not address.startswith(("file:", "data:"))]
        yield shown, said
        browser.close()


@pytest.fixture
def shown(opened: tuple[Page, list[str]]) -> Page:
    """The page as it is when it has just been opened."""
    opened[0].set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
    opened[0].reload()
    return opened[0]


def table(shown: Page, phase: str) -> list[list[str]]:
    """The rows of a phase's table that are to be seen, a text for each cell."""
    rows = f"[aria-labelledby=run0-{phase}] tbody tr"
    read = "rows => rows.filter(row => row.offsetParent).map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    return shown.eval_on_selector_all(rows, read)


def told(of: Run, phase: str) -> list[dict[str, Cell]]:
    return [cells(result, of) for result in phase_results(of, phase)]


def texts(rows: list[dict[str, Cell]]) -> list[list[str]]:
    return [[cell.text for name, cell in row.items() if name not in DETAILS] for row in rows]  # the run has none


def column(shown: Page, phase: str, name: str) -> Any:
    return shown.locator(f"[aria-labelledby=run0-{phase}] thead th", has_text=name).first


def test_it_opens_without_a_word_and_asks_for_nothing(opened: tuple[Page, list[str]]) -> None:
    assert opened[1] == []
    assert HOSTILE in opened[0].inner_text("#run0")


def test_the_cells_are_those_of_the_records(shown: Page, runs: list[Run]) -> None:
    for phase in ("prefill", "decode"):
        assert table(shown, phase) == texts(told(runs[0], phase))


def test_a_column_sorts_up_and_down_and_back(shown: Page, runs: list[Run]) -> None:
    rows = told(runs[0], "decode")
    figures = [row for row in rows if row["ms"].value is not None]
    without = [row for row in rows if row["ms"].value is None]
    up = sorted(figures, key=lambda row: row["ms"].value or 0.0)
    head = column(shown, "decode", "ms")

    assert head.get_attribute("aria-sort") == "none"
    for state, wanted in (("ascending", up), ("descending", up[::-1])):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == state
        assert table(shown, "decode") == texts(wanted + without)
    head.get_by_role("button").click()
    assert table(shown, "decode") == texts(rows)


def test_the_keyboard_sorts_too_and_words_sort_as_words(shown: Page) -> None:
    head = column(shown, "prefill", "subject")
    head.get_by_role("button").focus()
    shown.keyboard.press("Enter")
    names = [row[1] for row in table(shown, "prefill")]

    assert head.get_attribute("aria-sort") == "ascending"
    assert [name for name, before in zip(names[1:], names, strict=False) if name != before] == ["peft", "reference", ""]


def test_filters_leave_what_was_asked_for(shown: Page, runs: list[Run]) -> None:
    form = shown.locator("form[data-for=run0-deployment]")
    form.get_by_label("set-up").select_option("batched")
    form.get_by_label("subject").select_option(HOSTILE)
    form.get_by_label("Find").fill("ALERT 2")
    rows = [*told(runs[0], "prefill"), *told(runs[0], "decode")]
    kept = [row for row in rows if (row["set-up"].text, row["subject"].text) == ("batched", HOSTILE)]
    kept = [row for row in kept if "2" in " ".join(cell.text for cell in row.values())]

    assert table(shown, "prefill") + table(shown, "decode") == texts(kept)
    assert form.locator("output").inner_text() == f"{len(kept)} of {len(rows)} rows"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_itself_never_scrolls_sideways(shown: Page, size: tuple[int, int], scheme: Any) -> None:
    shown.set_viewport_size({"width": size[0], "height": size[1]})
    shown.emulate_media(color_scheme=scheme)
    shown.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true })")
    ground = shown.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    assert shown.evaluate("document.documentElement.scrollWidth") == size[0]
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_on_a_phone_the_row_s_head_says_what_its_hidden_columns_do(shown: Page) -> None:
    shown.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    heads = "[aria-labelledby=run0-decode] tbody th"
    said = shown.eval_on_selector_all(heads, "all => all.map(each => getComputedStyle(each, '::after').content)")

    assert '"peft r4"' in said
    assert not column(shown, "decode", "subject").is_visible()
    assert column(shown, "decode", "x base").is_visible()
