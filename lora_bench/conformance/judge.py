"""Judging: one case, the cases that Hypothesis draws for one check, or every check of one subject."""

from __future__ import annotations

import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
from hypothesis.errors import Flaky, Unsatisfiable

from lora_bench.conformance.catalogue import CHECKS, find_check
from lora_bench.conformance.outcome import Fails, Inconclusive, NotOffered
from lora_bench.conformance.trial import Trial
from lora_bench.conformance.verdict import Nonconformance, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from lora_bench.case import Case
    from lora_bench.conformance.check import Check
    from lora_bench.subject import Subject

EXAMPLES = 60
"""Cases per check: five times what the most elusive bug of the zoo took over eight seeds, and seconds for a subject."""

# Deterministic, silent and without a memory, whatever profile the caller's own tests are under.
_SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    verbosity=Verbosity.quiet,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def judge_all(subject: Subject, *, examples: int = EXAMPLES, address: str = "") -> list[Verdict]:
    """The verdict of every check, in order."""
    docket = Docket(subject, examples=examples, address=address)
    return [docket.verdict(check) for check in CHECKS]


class Docket:
    """The verdicts on one subject, each reached once, when it is asked for.

    A check is blocked where the one it comes `after` fails; one that is not offered blocks nothing.
    """

    def __init__(self, subject: Subject, *, examples: int = EXAMPLES, address: str = "") -> None:
        self.subject = subject
        self.examples = examples
        self.address = address
        self._reached: dict[str, Verdict] = {}

    def verdict(self, check: Check) -> Verdict:
        """The verdict of `check`, judging first what it comes after."""
        if check.id not in self._reached:
            first = self.verdict(find_check(check.after)) if check.after else None
            if first and (first.failed or first.status == "blocked"):
                because = f"{first.check.id} {'is blocked' if first.status == 'blocked' else 'does not hold'}"
                reached = Verdict(self.subject.name, check, "blocked", because=because, address=self.address)
            else:
                reached = judge(self.subject, check, examples=self.examples, address=self.address)
            self._reached[check.id] = reached
        return self._reached[check.id]


def judge(subject: Subject, check: Check, *, examples: int = EXAMPLES, address: str = "") -> Verdict:
    """The verdict of one check over as many cases, and if it fails, the smallest case in which it does.

    `address` is how the command line finds the subject, where its name is not enough. It takes the same cases each
    time: they depend on Hypothesis' version and on nothing else.
    """
    reached: list[Verdict] = []

    @settings(_SETTINGS, max_examples=examples)
    @given(check.cases)
    def explore(case: Case) -> None:
        verdict = judge_case(subject, check, case, address=address)
        reached.append(verdict)
        if verdict.failed:
            raise Nonconformance(verdict)
        if verdict.status == "not_offered":
            reject()

    if lacking := _lacking(subject, check):
        return Verdict(subject.name, check, "not_offered", because=lacking, address=address)
    try:
        explore()
    except Nonconformance as smallest:
        return smallest.verdict
    except Flaky:
        unsteady = next(verdict for verdict in reversed(reached) if verdict.failed)
        because = "; ".join(filter(None, [unsteady.because, "and not every time: the same case has also not failed"]))
        return replace(unsteady, because=because)
    except Unsatisfiable:
        pass
    return _most_telling(reached)


def judge_case(subject: Subject, check: Check, case: Case, *, address: str = "") -> Verdict:
    """The verdict of one check in one case, over every kind of base layer that the check and the subject share."""
    bare = Verdict(subject.name, check, "not_offered", case, address=address)
    if lacking := _lacking(subject, check):
        return replace(bare, because=lacking)
    if case.dtype not in subject.dtypes:
        return replace(bare, because=f"no {case.dtype}")
    kinds = [kind for kind in check.bases if kind in subject.layers]
    return _most_telling([_judge_on(kind, subject, bare) for kind in kinds])


def _judge_on(kind: str, subject: Subject, bare: Verdict) -> Verdict:
    assert bare.case is not None
    with _steady(bare.case), _Attempt() as attempt:
        trial = Trial(subject, bare.case, kind)
        bare.check.run(trial)
    where = "" if kind == "linear" else f"on a base of kind {kind}"
    match attempt.error:
        case None:
            return replace(bare, status="conforms", tensor=trial.tensor, deviation=trial.deviation, because=where)
        case Fails() as fails:
            because = ", ".join(filter(None, [fails.because, where]))
            return replace(bare, status="fails", tensor=fails.tensor, deviation=fails.deviation, because=because)
        case Inconclusive() as unclear:
            return replace(bare, status="inconclusive", because=str(unclear))
        case NotOffered() as refusal:
            return replace(bare, because=str(refusal))
        case error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            because = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            return replace(bare, status="error", because=because)


def _lacking(subject: Subject, check: Check) -> str:
    """What the subject would have to have for the check to be put to it; empty where nothing is missing."""
    missing = [verb for verb in check.needs if not subject.offers(verb)]
    if missing:
        return f"no {' and '.join(missing)}"
    if "cpu" not in subject.devices:
        return "no cpu"
    return "" if set(check.bases) & set(subject.layers) else f"no {' or '.join(check.bases)} base layer"


def _most_telling(verdicts: list[Verdict]) -> Verdict:
    """A failure before what conforms, by the largest deviation, before what could not be judged."""
    order = ("error", "fails", "conforms", "inconclusive", "not_offered")

    def telling(verdict: Verdict) -> tuple[int, float]:
        return order.index(verdict.status), -(verdict.deviation.ratio if verdict.deviation else 0.0)

    return min(verdicts, key=telling)


@contextmanager
def _steady(case: Case) -> Iterator[None]:
    """The same random numbers for the same case, gradients on, and a subject's warnings not taken for errors."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        torch.default_generator.manual_seed(case.seed)
        warnings.simplefilter("ignore")
        yield


class _Attempt:
    """Runs a block and keeps the exception that ended it, if one did: whose fault it is, is said afterwards."""

    error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None
