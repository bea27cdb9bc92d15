"""`lora-bench doctor`: what can be measured here, and what would help where something cannot."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.commands.arguments import FINE, output_option

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lora_bench.bench.finding import Finding
    from lora_bench.commands.arguments import Verbs

WIDTH = 100
SCHEMA = "lora-bench/doctor/1"


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "doctor",
        help="tell what can be measured on this machine, and what would help where something cannot",
        description="Tell what can be measured on this machine, why something cannot, and what would help. "
        "Nothing is changed: a command for an administrator is named, never run.",
    )
    verb.add_argument("--lora-device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA if there is one)")
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    output_option(verb)
    verb.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the findings; raises ValueError for a device that no name can mean."""
    device = resolve(options.lora_device)
    from lora_bench.bench.doctor import examine

    findings = examine(device, Path(options.lora_output))
    if options.json:
        found = [finding._asdict() for finding in findings]
        print(json.dumps({"schema": SCHEMA, "device": device, "findings": found}, indent=1))
    else:
        print(render(device, findings))
    return FINE


def resolve(text: str) -> str:
    """The device meant, which need not be there: that it is not is a finding."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise ValueError(f"--lora-device must be auto, cpu, cuda or cuda:N, got {text!r}")
    if text != "auto":
        return text
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def render(device: str, findings: Sequence[Finding]) -> str:
    """A table for the terminal: a block for each section, a row for each quantity."""
    from rich.console import Console
    from rich.table import Table

    output = StringIO()
    console = Console(file=output, width=WIDTH, no_color=True, highlight=False, markup=False, emoji=False)
    table = Table(title=f"What can be measured here, device={device}", title_justify="left", title_style="")
    table.box, table.pad_edge = None, False
    table.add_column("")
    table.add_column("there?")
    table.add_column("why, and → what would help")
    for section in dict.fromkeys(finding.section for finding in findings):
        table.add_row(section.upper() if section != "GPU" else section)
        for finding in findings:
            if finding.section == section:
                helping = f"\n→ {finding.help}" if finding.help else ""
                table.add_row(f"  {finding.quantity}", finding.answer, f"{finding.why}{helping}")
    console.print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
