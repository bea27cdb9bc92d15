"""`lora-bench selftest`: show that the checks find planted bugs and accuse nothing that is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.commands.arguments import FAILED, FINE, at_least, kept, output_option, writable

if TYPE_CHECKING:
    import argparse

    from lora_bench.commands.arguments import Verbs

COMPILED = 0.02
"""The share of its cases for the compiled implementation, which takes seconds for each shape."""


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "selftest",
        help="show that the checks find planted bugs and accuse nothing that is right",
        description="Put every planted bug to the checks that must find it, and what is right to all checks.",
    )
    verb.add_argument(
        "--correct-examples",
        type=at_least(1, int),
        default=10,
        metavar="N",
        help="cases of each check for each correct implementation (10)",
    )
    verb.add_argument("--only-correct", action="store_true", help="leave the planted bugs out")
    output_option(verb)
    verb.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Put the checks to planted bugs and to implementations that are right."""
    from lora_bench.conformance.selftest import RIGHT, false_alarms, hunt, idle, summary

    output = writable(options.lora_output)
    hunts, right = [], []
    if not options.only_correct:
        for each in hunt():
            hunts.append(each)
            if not each.killed:
                print(f"survived      {each}", flush=True)
        for check in idle(hunts):
            print(f"never tripped {check}")
    for name, subject in RIGHT.items():
        examples = max(1, round(options.correct_examples * (COMPILED if name == "compiled" else 1)))
        own = list(false_alarms(subject, examples=examples))
        right += own
        print(f"correct       {name:<14} {sum(verdict.cases for verdict in own):>8,} cases", flush=True)
        for verdict in own:
            if verdict.failed:
                print(f"\nfalse alarm: {verdict}\n", flush=True)
    print(summary(hunts, right))
    whole = kept(output / "selftest.txt", summary(hunts, right) + "\n")
    survived = any(not each.killed for each in hunts) or (bool(hunts) and bool(idle(hunts)))
    return FAILED if survived or not whole or any(verdict.failed for verdict in right) else FINE
