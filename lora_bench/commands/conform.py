"""`lora-bench conform` and `lora-bench replay`: judge implementations by every check, or one case again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench.case import DTYPES, FLAGS, KINDS, LETTERS, MODES
from lora_bench.commands.arguments import FAILED, FINE, INCONCLUSIVE, at_least, kept, output_option, writable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lora_bench.commands.arguments import Verbs
    from lora_bench.conformance import Verdict


def declare(verbs: Verbs) -> None:
    """Add both verbs."""
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
    output_option(verb)
    verb.set_defaults(run=conform)

    verb = verbs.add_parser(
        "replay",
        help="judge one case again, as the last line of a failure says",
        description="Judge one case of one check again.",
    )
    verb.add_argument("subject", metavar="SUBJECT", help="as for conform --lora-subject")
    verb.add_argument("check", metavar="CHECK", help="the id of a check, such as merge.equals_separate")
    verb.epilog = f"A case is made of {_parts()}."
    verb.add_argument("case", metavar="CASE", help="the case in quotes, such as 't1 i2 o2 r1 a1 fp64 s0'")
    verb.set_defaults(run=replay)


def _parts() -> str:
    numbers = [f"{letter}N" if letter == name else f"{letter}N ({name})" for name, letter in LETTERS.items()]
    return ", ".join([*numbers, *DTYPES, *FLAGS, *KINDS, *MODES, "ops=VERB,VERB"])


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
    whole = True
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
        texts = {"conformance.json": json.dumps(as_json(verdicts), indent=1) + "\n"}
        texts["conformance.md"] = as_markdown(verdicts)
        whole = all(kept(output / name, text) for name, text in texts.items())  # the last writes all of them
    found = [verdict for own in verdicts.values() for verdict in own]
    for verdict in found:
        if verdict.failed:
            print(verdict, end="\n\n")
    print(summary(found))
    if whole:
        print(f"table and verdicts: {output / 'conformance.md'}, {output / 'conformance.json'}")
    return exit_code(found) if whole else FAILED


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
