"""`lora-bench report`: what was measured and judged, for the terminal, as Markdown, as JSON or as one HTML page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.commands.arguments import FINE, output_option

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lora_bench.commands.arguments import Verbs
    from lora_bench.report.run import Run

FORMATS = ("terminal", "markdown", "json", "html")
VERDICTS = "conformance.json"


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "report",
        help="show what was measured: in the terminal, as Markdown, as JSON or as an HTML page",
        description="Show what was measured and judged. The HTML page is one file that needs nothing else.",
    )
    verb.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a file of records (.jsonl), the verdicts of conform (.json), a folder of such files, or a run's id",
    )
    verb.add_argument("--format", choices=FORMATS, default="terminal", help="(terminal)")
    verb.add_argument("-o", dest="file", metavar="FILE", help="to write it to, in the place of the terminal")
    output_option(verb)
    verb.set_defaults(run=report)


def report(options: argparse.Namespace) -> int:
    """Print the report, or write it to a file."""
    text = rendered(loaded(options.runs, Path(options.lora_output)), options.format)
    if options.file is None:
        print(text, end="")
        return FINE
    try:
        Path(options.file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"-o: wanted a file that can be written, got {options.file}: {error.strerror}") from None
    print(f"report: {options.file}")
    return FINE


def loaded(named: Sequence[str], folder: Path) -> list[Run]:
    """The runs of all files that are named or in a named folder; of the latter those without a result are told.

    Raises ValueError where a file cannot be reported, or none holds a result.
    """
    from lora_bench.report.run import NoResult, load

    runs: dict[Path, Run] = {}
    for name in named:
        for file in found(name, folder):
            try:
                runs[file] = load(file)
            except NoResult as error:
                if not Path(name).is_dir():
                    raise
                print(f"skipped: {error}", file=sys.stderr)
    if not runs:
        raise ValueError(f"{', '.join(named)}: no file holds a result to report")
    return list(runs.values())


def found(run: str, folder: Path) -> list[Path]:
    """The files that a RUN stands for; ValueError where there are none."""
    path = Path(run)
    if path.is_dir():
        files = [*sorted(path.glob("*.jsonl")), *path.glob(VERDICTS)]
        if not files:
            raise ValueError(f"{run} holds neither records (.jsonl) nor {VERDICTS}")
        return files
    if path.suffix in (".jsonl", ".json"):
        return [path]
    if not (kept := folder / f"{run}.jsonl").is_file():
        raise ValueError(f"there is no run {run}: wanted a .jsonl or .json file, a folder, or an id in {folder}")
    return [kept]


def rendered(runs: Sequence[Run], form: str) -> str:
    """The report in one of `FORMATS`."""
    match form:
        case "terminal":
            from lora_bench.report.terminal import terminal

            return terminal(runs)
        case "markdown":
            from lora_bench.report.markdown import markdown

            return markdown(runs)
        case "json":
            import json

            from lora_bench.report.document import document

            return json.dumps(document(runs), indent=1, allow_nan=False) + "\n"
        case _:
            from lora_bench.report.page import page

            return page(runs)
