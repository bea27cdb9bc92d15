"""The command line: `lora-bench VERB`. Exit codes: 0 fine, 1 a check failed, 2 usage, 6 inconclusive."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lora_bench import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.conformance import Verdict

FINE, FAILED, USAGE, INCONCLUSIVE = 0, 1, 2, 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except ValueError as error:
        print(f"lora-bench {options.verb}: {error}", file=sys.stderr)
        return USAGE
    return code


def conform(options: argparse.Namespace) -> int:
    """Judge subjects: a line for each check, the failures in full, a summary."""
    from lora_bench import subjects
    from lora_bench.conformance import CHECKS, Docket, summary

    asked = dict.fromkeys(options.lora_subject or ["reference"])
    dockets = [Docket(subjects.find(text), address=text) for text in asked]
    verdicts = []
    for docket in dockets:
        print(docket.subject)
        for check in CHECKS:
            verdict = docket.verdict(check)
            verdicts.append(verdict)
            print(f"  {verdict.status.replace('_', ' '):<13} {check.id:<38} {_remark(verdict)}".rstrip(), flush=True)
        print()
    for verdict in verdicts:
        if verdict.failed:
            print(verdict, end="\n\n")
    print(summary(verdicts))
    return exit_code(verdicts)


def replay(options: argparse.Namespace) -> int:
    """Judge one case again."""
    from lora_bench import Case, subjects
    from lora_bench.conformance import find_check, judge_case

    check, case = find_check(options.check), Case.parse(options.case)
    verdict = judge_case(subjects.find(options.subject), check, case, address=options.subject)
    print("conforms" if verdict.status == "conforms" else verdict)
    return exit_code([verdict])


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 where a check failed, 6 where one was inconclusive or none was judged at all, else 0."""
    statuses = {verdict.status for verdict in verdicts}
    if any(verdict.failed for verdict in verdicts):
        return FAILED
    return INCONCLUSIVE if "inconclusive" in statuses or "conforms" not in statuses else FINE


def _remark(verdict: Verdict) -> str:
    if verdict.status in ("inconclusive", "blocked", "not_offered"):
        return verdict.because
    if verdict.status == "conforms" and verdict.deviation and verdict.deviation.allowed:
        return f"error {verdict.deviation.ratio:.2f} of the bound"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lora-bench",
        description="Is an implementation of LoRA (Low-Rank Adaptation) right?",
        epilog="What it costs is measured by pytest: `pytest suites/gpu --benchmark`. "
        "Exit codes: 0 fine, 1 a check failed, 2 usage, 6 inconclusive or nothing was judged.",
    )
    parser.add_argument("--version", action="version", version=f"lora-bench {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)

    verb = verbs.add_parser(
        "conform",
        help="judge implementations by every check",
        description="Judge implementations by every check, each over cases drawn for it, and replayable.",
    )
    verb.add_argument(
        "--lora-subject",
        action="append",
        metavar="SUBJECT",
        help="a name (reference, peft, loralib, an installed one), module:attr or path.py:ATTR; repeatable "
        "(default: reference)",
    )
    verb.set_defaults(run=conform)

    verb = verbs.add_parser(
        "replay",
        help="judge one case again, as the last line of a failure says",
        description="Judge one case of one check again.",
    )
    verb.add_argument("subject", metavar="SUBJECT", help="as for conform --lora-subject")
    verb.add_argument("check", metavar="CHECK", help="the id of a check, such as merge.equals_separate")
    verb.add_argument("case", metavar="CASE", help="the case in quotes, such as 't1 i2 o2 r1 a1 fp64 s0'")
    verb.set_defaults(run=replay)
    return parser


if __name__ == "__main__":
    sys.exit(main())
