"""Judging on several cores: the checks are shared out among processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from lora_bench.conformance.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from lora_bench.conformance.check import Check


@contextmanager
def sharing(
    subject: str, checks: Sequence[Check], judge: Callable[[Check], Verdict]
) -> Iterator[Callable[[Check], Verdict]]:
    """What gives the verdicts that other processes reach by `judge`, one process for each core.

    `checks` are all that may be asked for. Those of one theme about one kind of base layer are judged by one process,
    in their order, since they build on each other. One that the subject brings down leaves "fails" for the check that
    it had in hand, and "blocked" for the rest of its own. Where a process cannot safely be forked it is `judge` itself.
    """
    if sys.platform != "linux":  # elsewhere not once a framework is loaded
        yield judge
        return
    with ExitStack() as stack:
        shares = _shares(checks, len(os.sched_getaffinity(0)))
        judges = [stack.enter_context(_Judge(subject, share, judge)) for share in shares]
        of = {check.id: judge for judge in judges for check in judge.checks}
        yield lambda check: of[check.id].verdict(check)


def _shares(checks: Sequence[Check], number: int) -> list[list[Check]]:
    """The checks in at most so many parts of about equal effort, those of one theme and kind together."""
    effort: dict[tuple[str, str], float] = {}
    for check in checks:
        effort[_together(check)] = effort.get(_together(check), 0.0) + check.effort
    parts: list[set[tuple[str, str]]] = [set() for _ in range(min(number, len(effort)))]
    for group in sorted(effort, key=effort.__getitem__, reverse=True):
        min(parts, key=lambda part: sum(map(effort.__getitem__, part))).add(group)
    return [[check for check in checks if _together(check) in part] for part in parts]


def _together(check: Check) -> tuple[str, str]:
    return check.id.partition(".")[0], check.kind


class _Judge:
    """A forked process that judges its checks one after the other and tells each verdict as soon as it has it."""

    def __init__(self, subject: str, checks: list[Check], judge: Callable[[Check], Verdict]) -> None:
        self.checks = checks
        self._subject = subject
        self._heard: dict[str, Verdict] = {}
        self._ear, mouth = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=(mouth, checks, judge))
        self._process.daemon = True
        self._mouth = mouth

    def __enter__(self) -> Self:
        self._process.start()
        self._mouth.close()  # so that the end of the process is the end of what is heard
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._ear.close()

    def verdict(self, check: Check) -> Verdict:
        """The process's verdict, once it is there."""
        while check.id not in self._heard:
            try:
                verdict: Verdict = self._ear.recv()
            except EOFError:
                self._mourn()
            else:
                self._heard[verdict.check.id] = verdict
        return self._heard[check.id]

    def _mourn(self) -> None:
        """Say what the process had in hand, and what it will not come to, when it has ended."""
        self._process.join()
        in_hand, *rest = [check for check in self.checks if check.id not in self._heard]
        because = f"the process that judged it {_end(self._process.exitcode)}"
        self._heard[in_hand.id] = Verdict(self._subject, in_hand, "fails", because=because)
        for check in rest:
            self._heard[check.id] = Verdict(self._subject, check, "blocked", because=f"{in_hand} ended the process")


def _work(mouth: Connection, checks: list[Check], judge: Callable[[Check], Verdict]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who waits for it is interrupted, and ends it
    for check in checks:
        mouth.send(judge(check))


def _end(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"
