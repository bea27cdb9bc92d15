"""What a measured run leaves behind: the page and the lists, JUnit's properties, what GitHub shows."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from lora_bench import ending
from lora_bench.bench import session as sessions
from lora_bench.bench.workload import Row
from lora_bench.report import lists
from tests.faulty_runs import Bench, times
from tests.pytest_runs import Run

ROW = "separate[reference-decode-micro-fp32-r4-b2-s8]"


@dataclass
class Left:
    """A run, its folder and what is in it by the end of the name; the summary of the step."""

    run: Run
    folder: Path
    summary: str
    junit: dict[str, dict[str, str]]

    def text(self, end: str) -> str:
        (path,) = (self.folder / "out").glob(f"*.{end}")
        return path.read_text(encoding="utf-8")


def leave(folder: Path, *options: str) -> Left:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_ACTIONS", "true")
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
        bench = Bench(folder / "out", patch)
        bench.options += [f"--junitxml={folder / 'junit.xml'}", *options]
        run = bench.run()
    cases = ET.parse(folder / "junit.xml").iter("testcase")  # noqa: S314  # pytest wrote it just now
    told = {
        str(case.get("name")): {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}
        for case in cases
    }
    return Left(run, folder, (folder / "summary.md").read_text(), told)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return leave(tmp_path_factory.mktemp("left"), "--lora-baseline=absent")


def test_the_page_and_the_lists_lie_beside_the_records_and_are_told_of(left: Left) -> None:
    (records,) = (left.folder / "out").glob("*.jsonl")
    names = {path.name.removeprefix(records.stem) for path in (left.folder / "out").iterdir()}

    assert names == {".jsonl", ".html", ".smaller.json", ".bigger.json", ".bencher.json", ".otava.csv"}
    assert (
        f"reports: {records.with_suffix('')}.{{html,smaller.json,bigger.json,bencher.json,otava.csv}}" in left.run.text
    )
    assert left.text("html").startswith("<!DOCTYPE html>")
    assert [each["name"] for each in json.loads(left.text("smaller.json"))][1] == f"{ROW} seconds"
    assert json.loads(left.text("bencher.json"))[ROW]["throughput"]["value"] == 2.0
    assert re.match(r"time,commit,.*\n20\d\d-", left.text("otava.csv"))


def test_junit_tells_what_was_measured(left: Left) -> None:
    assert left.junit["test_separate[reference-decode-micro-fp32-r4-b2-s8]"] == {
        "lora_verdict": "NOT COMPARABLE",
        "lora_median_seconds": "1.0",
        "lora_interval_seconds": "[1, 1]",
        "lora_ratio": "2.0",
        "lora_error_of_bound": "0.5",
    }


def test_github_shows_the_verdicts_first_and_annotates_them(left: Left) -> None:
    assert left.summary.startswith("| verdict | row | why |\n| --- | --- | --- |\n| NOT COMPARABLE | absent |")
    assert "\n## decode: micro fp32" in left.summary
    assert "\n::warning title=NOT COMPARABLE%3A absent::there is no such file or folder\n" in left.run.text


def test_nothing_of_github_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    bench = Bench(tmp_path / "out", monkeypatch)
    bench.options.append("--lora-baseline=absent")

    assert "::" not in bench.run().text.partition("lora-bench =")[2]
    assert not (tmp_path / "summary.md").exists()


@pytest.mark.parametrize("messages", [2, 3])
def test_a_run_that_was_cut_off_says_how_to_go_on(
    messages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(messages))  # a fingerprint and two timings; memory comes then

    def interrupted(_: object, rows: list[Row], *__: object, **___: object) -> Iterator[Any]:
        for message in times(rows):
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield message

    bench = Bench(tmp_path / "out", monkeypatch)
    monkeypatch.setattr(sessions, "stream", interrupted)
    cut_off = bench.run()
    (path,) = (tmp_path / "out").glob("*.jsonl")

    assert cut_off.code == pytest.ExitCode.INTERRUPTED
    assert f"\nnot all was measured: --lora-resume {path.stem} goes on with it\n" in cut_off.text
    monkeypatch.setattr(sessions, "stream", bench.stream)
    bench.options.append(f"--lora-resume={path.stem}")
    assert "not all was measured" not in bench.run().text


def test_half_a_report_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        write(path, text[:9], **how)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench = Bench(tmp_path / "out", monkeypatch)
    monkeypatch.setattr(Path, "write_text", full)
    found = bench.run()

    assert re.search(r"^no \S+\.html: OSError: \[Errno 28\] No space left on device$", found.text, re.MULTILINE)
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".jsonl"]


def test_a_report_that_fails_costs_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(ending, "_page", fails)
    monkeypatch.setattr(lists, "otava", fails)
    monkeypatch.setattr("lora_bench.report.markdown.markdown", fails)
    found = leave(tmp_path)

    assert found.run.code == 0
    assert re.search(r"^reports: \S+\.\{smaller.json,bigger.json,bencher.json\}$", found.run.text, re.MULTILINE)
    for name in (r"\S+\.html", r"\S+\.otava\.csv", "tables in the step's summary"):
        assert re.search(rf"^no {name}: RuntimeError: no ink$", found.run.text, re.MULTILINE)
    assert found.junit["test_separate[reference-decode-micro-fp32-r4-b2-s8]"]["lora_verdict"] == "measured"
