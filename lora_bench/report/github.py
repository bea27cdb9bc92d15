"""What GitHub's runner shows of a run: annotations, and Markdown in the summary of the step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LIMIT = 1 << 20
"""Bytes that the summary of one step may have; with more, GitHub shows none of it."""
CUT = "\n\n*The rest is left out: a step's summary may have no more than 1 MiB. It is in the run's own files.*\n"
LEVELS = ("error", "warning", "notice")
MOST = 10
"""GitHub shows so many annotations of a level for one step."""


def active() -> bool:
    """Whether this is a step of a workflow."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotation(level: str, title: str, message: str, **place: str | int) -> str:
    """A workflow command that annotates the run; `place` may have `file`, `line` and the like.

    Raises ValueError for a level that is none of error, warning and notice.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    given = {**place, "title": title}
    properties = ",".join(f"{name}={_property(str(value))}" for name, value in given.items())
    return f"::{level} {properties}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def annotated(found: Iterable[tuple[str, str, str]]) -> list[str]:
    """Annotations of (level, title, message): no more of a level than GitHub shows, the last for those left out."""
    made: list[str] = []
    told = list(found)
    for level in LEVELS:
        own = [each for each in told if each[0] == level]
        shown = own if len(own) <= MOST else own[: MOST - 1]
        made += [annotation(*each) for each in shown]
        if len(shown) < len(own):
            made.append(annotation(level, "lora-bench", f"and {len(own) - len(shown)} more: see the summary"))
    return made


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table in Markdown; whatever a cell holds stays within it."""
    from lora_bench.report.markdown import escaped

    lines = [header, ["---"] * len(header), *([escaped(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def summarise(markdown: str) -> str:
    """Append to the step's summary, cut at a line's end where it would be too long; why not, where it cannot be."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return "GITHUB_STEP_SUMMARY names no file"
    try:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        with Path(path).open("ab") as file:
            file.write(fitted(markdown + "\n", LIMIT - size))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def fitted(text: str, room: int) -> bytes:
    """The text in UTF-8, or as many of its whole lines as there is room for, and that the rest is left out."""
    whole = text.encode()
    if len(whole) <= room:
        return whole
    if (left := room - len(CUT.encode())) < 0:
        return b""
    return whole[: whole.rfind(b"\n", 0, left) + 1] + CUT.encode()
