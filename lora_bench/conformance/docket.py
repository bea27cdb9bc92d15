"""`Docket`: the verdicts on one subject, and one cause reported as one failure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench.conformance.catalogue import checks_for, find_check
from lora_bench.conformance.judge import EXAMPLES, SECONDS, judge
from lora_bench.conformance.keep import keep
from lora_bench.conformance.share import sharing
from lora_bench.conformance.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lora_bench.conformance.check import Check
    from lora_bench.subject import Subject

ALWAYS = ("wrap", "load", "supports", "forward")
"""What every check asks of a subject."""


class Docket:
    """The verdicts on one subject, each reached once, when it is asked for.

    `checks` are those about the kinds of base layer that the subject takes. One is blocked where the check that it
    comes `after` fails, where a verb that it needs has hung, and where the subject raises just what it has raised in
    another check. One that is not offered blocks nothing. The smallest adapters that fail are saved under `output`.

    Raises ValueError for a known failure under an id that is no check's.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        examples: int = EXAMPLES,
        seconds: float = SECONDS,
        address: str = "",
        output: Path | None = None,
    ) -> None:
        self.subject = subject
        self.checks = checks_for(subject)
        self.examples = examples
        self.seconds = seconds
        self.address = address
        self.output = output
        self._reached: dict[str, Verdict] = {}
        self._judged: Callable[[Check], Verdict] = self._judge

    def verdict(self, check: Check) -> Verdict:
        """The verdict of `check`, judging first what it comes after."""
        if check.id not in self._reached:
            verdict = self._blocked(check) or self._told_once(self._judged(check))
            if verdict.failed and verdict.case is not None and self.output is not None:
                verdict = replace(verdict, saved=self._kept(verdict, self.output))
            self._reached[check.id] = verdict
        return self._reached[check.id]

    def _kept(self, verdict: Verdict, output: Path) -> str:
        try:
            return keep(verdict, output)
        except OSError as error:  # which is no reason to lose the verdict
            return f"not: {error}"

    def verdicts(self) -> Iterator[Verdict]:
        """Every verdict in order, the kinds of base layer judged side by side on the cores that there are."""
        own = Docket(self.subject, examples=self.examples, seconds=self.seconds, address=self.address)
        with sharing(self.subject.name, self.checks, own.verdict) as self._judged:
            yield from map(self.verdict, self.checks)
        self._judged = self._judge

    def _judge(self, check: Check) -> Verdict:
        return judge(self.subject, check, examples=self.examples, seconds=self.seconds, address=self.address)

    def _blocked(self, check: Check) -> Verdict | None:
        """A verdict without judging, where the outcome is known from other checks."""
        blocked = Verdict(self.subject.name, check, "blocked", address=self.address)
        if check.after is not None:
            first = self.verdict(find_check(check.after))
            if first.failed:
                return replace(blocked, because=f"{first.check} does not hold")
            if first.status == "blocked":
                return replace(blocked, because=first.because)
        for other in self._reached.values():
            if other.hung and other.verb in (*ALWAYS, *check.needs):
                return replace(blocked, because=f"{other.verb} hung in {other.check}")
        return None

    def _told_once(self, verdict: Verdict) -> Verdict:
        """The verdict, blocked where another check fails of the very same error."""
        if verdict.status == "fails" and verdict.verb and not verdict.hung:
            for other in self._reached.values():
                if other.status == "fails" and (other.verb, other.because) == (verdict.verb, verdict.because):
                    because = f"{verdict.verb} raises the same in {other.check}"
                    return Verdict(verdict.subject, verdict.check, "blocked", because=because, address=self.address)
        return verdict


def judge_all(subject: Subject, *, examples: int = EXAMPLES, address: str = "") -> list[Verdict]:
    """The verdict of every check about the kinds of base layer that the subject takes, in order."""
    return list(Docket(subject, examples=examples, address=address).verdicts())
