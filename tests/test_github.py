"""Annotations and the summary of a step: escaped, no more than is shown, and cut where it would be too long."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_bench.report.github import CUT, LIMIT, active, annotated, annotation, fitted, summarise, table


def test_a_message_keeps_its_lines_and_a_property_its_colons_and_commas() -> None:
    made = annotation("error", "a,b: 5%\n", "100 % of a,b:\r\nlast", file="x,y.py", line=3)

    assert made == "::error file=x%2Cy.py,line=3,title=a%2Cb%3A 5%25%0A::100 %25 of a,b:%0D%0Alast"


def test_what_is_escaped_already_is_escaped_again() -> None:
    assert annotation("notice", "t", "%0A::error::x") == "::notice title=t::%250A::error::x"


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be one of error, warning, notice, got 'fatal'"):
        annotation("fatal", "a", "b")


def test_no_more_of_a_level_than_github_shows_and_the_worst_first() -> None:
    made = annotated([("notice", "n", "n")] + [("error", "e", str(number)) for number in range(12)])

    assert len(made) == 11
    assert made[:2] == ["::error title=e::0", "::error title=e::1"]
    assert made[9] == "::error title=lora-bench::and 3 more: see the summary"
    assert made[10] == "::notice title=n::n"
    assert len(annotated([("error", "e", "e")] * 10)) == 10


def test_a_cell_stays_within_its_table() -> None:
    assert table([("a|b", "c\nd", "<script>*x*")], ("1", "2", "3")) == (
        "| 1 | 2 | 3 |\n| --- | --- | --- |\n| a\\|b | c d | \\<script\\>\\*x\\* |\n"
    )


@pytest.mark.parametrize(("room", "lines"), [(300, 3), (299, 1), (200 + len(CUT), 3)])
def test_a_summary_is_cut_at_the_end_of_a_line(room: int, lines: int) -> None:
    text = ("é" * 49 + "x\n") * 3  # 100 bytes a line
    made = fitted(text, max(room, 200))

    assert len(made) <= max(room, 200)
    assert made.decode().count("x\n") == lines
    assert made.decode().endswith(CUT) == (lines < 3)


def test_without_room_for_the_sentence_there_is_nothing() -> None:
    assert fitted("x" * 100, 10) == b""


def test_a_summary_is_appended_to_what_the_step_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.md"
    path.write_bytes(b"x" * (LIMIT - 1000) + b"\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))

    assert summarise("short") == ""
    assert path.read_text().endswith("x\nshort\n")
    assert summarise("a line\n" * 1000) == ""
    assert path.read_text().endswith("a line\n" + CUT)
    assert LIMIT - 10 < path.stat().st_size <= LIMIT


def test_why_there_is_no_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert summarise("x") == "GITHUB_STEP_SUMMARY names no file"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    assert summarise("x") == f"{tmp_path}: Is a directory"


@pytest.mark.parametrize(("value", "told"), [("true", True), ("", False), (None, False)])
def test_only_a_step_of_a_workflow_is_told(value: str | None, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    if value is not None:
        monkeypatch.setenv("GITHUB_ACTIONS", value)

    assert active() is told
