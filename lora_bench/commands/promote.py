"""`lora-bench promote`: make a run that passed the baseline of its machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.commands.arguments import output_option

if TYPE_CHECKING:
    import argparse

    from lora_bench.commands.arguments import Verbs


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "promote",
        help="make a run that passed the baseline for pytest's --lora-baseline",
        description="Copy the records of a run into a folder of baselines, only if every planned row was measured and "
        "right, no clock was throttled, and nothing has regressed. The last ten runs of each machine and choice of "
        "scenarios are kept, and the one that began their history. Nothing is ever promoted without this command.",
    )
    verb.add_argument("records", metavar="RUN", help="a run's id, or its .jsonl")
    verb.add_argument("folder", metavar="DIR", type=Path, help="the folder of baselines")
    verb.add_argument("--first", action="store_true", help="begin a history: needed on a machine that has none")
    verb.add_argument(
        "--accept-regression", metavar="REASON", default="", help="promote what has regressed; the reason stays with it"
    )
    output_option(verb)
    verb.set_defaults(run=promote)


def promote(options: argparse.Namespace) -> int:
    """Promote, and tell what was compared, copied and deleted, or why not."""
    from lora_bench.gate.baseline import PASS
    from lora_bench.gate.promote import promote as promoted

    named = options.records
    path = Path(named) if named.endswith(".jsonl") else Path(options.lora_output) / f"{named}.jsonl"
    try:
        made = promoted(path, options.folder, first=options.first, accepted=options.accept_regression)
    except OSError as error:
        raise ValueError(f"{options.folder} cannot be written: {error.strerror}") from None
    for fault in made.faults:
        print(f"{'unfit':14} {fault}")
    for line in made.lines:
        if line.verdict != PASS:
            print(line)
    if made.target is None:
        print(f"\nnot promoted: {path}")
        return made.code
    passed = sum(line.verdict == PASS for line in made.lines)
    print(f"promoted: {made.target} ({f'{passed} comparisons passed' if made.lines else 'the first of its kind'})")
    for old in made.deleted:
        print(f"deleted: {old} (the last ten are kept, and the first)")
    return made.code
