"""The command line: `lora-bench VERB`. Exit codes: 0 fine, 1 a check failed, 2 usage, 6 inconclusive."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """Judge subjects: a line for each check, the failures in full, a summary; the table and all verdicts as files."""
    from lora_bench import subjects
    from lora_bench.conformance import Docket, summary
    from lora_bench.report.compliance import as_json, as_markdown

    output = writable(options.lora_output)
    asked = dict.fromkeys(options.lora_subject or ["reference"])
    limits = {"examples": options.lora_examples, "seconds": options.lora_timeout, "output": output}
    dockets = [Docket(subjects.find(text), address=text, **limits) for text in asked]
    print(arithmetic())
    verdicts: dict[str, list[Verdict]] = {}
    for docket in dockets:
        print(docket.subject)
        own = verdicts[str(docket.subject)] = []
        for verdict in docket.verdicts():
            own.append(verdict)
            print(
                f"  {verdict.status.replace('_', ' '):<13} {verdict.check.id:<42} {_remark(verdict)}".rstrip(),
                flush=True,
            )
        print()
        (output / "conformance.json").write_text(json.dumps(as_json(verdicts), indent=1) + "\n", encoding="utf-8")
        (output / "conformance.md").write_text(as_markdown(verdicts), encoding="utf-8")
    found = [verdict for own in verdicts.values() for verdict in own]
    for verdict in found:
        if verdict.failed:
            print(verdict, end="\n\n")
    print(summary(found))
    print(f"table and verdicts: {output / 'conformance.md'}, {output / 'conformance.json'}")
    return exit_code(found)


def selftest(options: argparse.Namespace) -> int:
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
        examples = max(
            1, round(options.correct_examples * (0.02 if name == "compiled" else 1))
        )  # seconds for each shape
        own = list(false_alarms(subject, examples=examples))
        right += own
        print(f"correct       {name:<14} {sum(verdict.cases for verdict in own):>8,} cases", flush=True)
        for verdict in own:
            if verdict.failed:
                print(f"\nfalse alarm: {verdict}\n", flush=True)
    print(summary(hunts, right))
    (output / "selftest.txt").write_text(summary(hunts, right) + "\n", encoding="utf-8")
    survived = any(not each.killed for each in hunts) or (bool(hunts) and bool(idle(hunts)))
    return FAILED if survived or any(verdict.failed for verdict in right) else FINE


def writable(folder: str) -> Path:
    """The folder, made and tried; ValueError where nothing can be written into it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"--lora-output {folder}: {error.strerror}") from None
    return path


def arithmetic() -> str:
    """What the bounds were derived for: the versions, and the settings of this process."""
    import torch

    from lora_bench.bounds import Arithmetic

    fp32 = Arithmetic.of(torch.float32)
    operands = f"rounds its operands to {fp32.operand:.0e}" if fp32.operand else "keeps its operands"
    return f"torch {torch.__version__}, cpu; a float32 product {operands} (read from torch's settings)\n"


def replay(options: argparse.Namespace) -> int:
    """Judge one case again."""
    from lora_bench import Case, subjects
    from lora_bench.conformance import explained, find_check, judge_case

    check, case = find_check(options.check), Case.parse(options.case)
    subject = subjects.find(options.subject)
    verdict = judge_case(subject, check, case, address=options.subject)
    if verdict.failed:
        verdict = replace(verdict, resembles=explained(subject, check, verdict))
    print("conforms" if verdict.status == "conforms" else verdict)
    return exit_code([verdict])


def at_least(least: int, number: type[int | float]) -> Callable[[str], float]:
    """An option's type: a number that is not smaller."""

    def read(text: str) -> float:
        value = number(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    read.__name__ = number.__name__  # argparse names it where the text is no number
    return read


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 where a check failed, 6 where one was inconclusive or none was judged at all, else 0."""
    statuses = {verdict.status for verdict in verdicts}
    if any(verdict.failed for verdict in verdicts):
        return FAILED
    return INCONCLUSIVE if "inconclusive" in statuses or "conforms" not in statuses else FINE


def _remark(verdict: Verdict) -> str:
    if verdict.status in ("inconclusive", "blocked", "not_offered", "known", "advice"):
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
    verb.add_argument("--lora-examples", type=at_least(1, int), default=60, metavar="N", help="cases per check (60)")
    verb.add_argument(
        "--lora-timeout",
        type=at_least(0, float),
        default=60.0,
        metavar="SECONDS",
        help="after which a case hangs; 0: never (60)",
    )
    verb.add_argument("--lora-output", default=".lora_bench", metavar="FOLDER", help="for what is kept (.lora_bench)")
    verb.set_defaults(run=conform)

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
    verb.add_argument("--lora-output", default=".lora_bench", metavar="FOLDER", help="for the result (.lora_bench)")
    verb.set_defaults(run=selftest)

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
