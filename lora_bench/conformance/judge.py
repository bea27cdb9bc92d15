"""Judging: one case, the cases that Hypothesis draws for one check, or every check of one subject."""

from __future__ import annotations

import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
from hypothesis.errors import Flaky, Unsatisfiable

from lora_bench.case import QUANTISED, Case
from lora_bench.conformance.catalogue import find_check
from lora_bench.conformance.limit import limited
from lora_bench.conformance.outcome import Fails, Inconclusive, NotOffered, TimeIsUp
from lora_bench.conformance.resembles import resembles
from lora_bench.conformance.trial import Trial
from lora_bench.conformance.verdict import Nonconformance, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from lora_bench.conformance.check import Check
    from lora_bench.conformance.seen import Seen
    from lora_bench.subject import Known, Subject

EXAMPLES = 60
"""Cases per check: five times what the most elusive bug of the zoo took over eight seeds, and seconds for a subject."""
TRIES = 100
"""How many cases are drawn of which none is offered, before the check is taken for one that is not."""
SECONDS = 60.0
"""How long a case may take, which is a thousandth of that as a rule: what takes longer hangs."""

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


def judge(
    subject: Subject,
    check: Check,
    *,
    examples: int = EXAMPLES,
    seconds: float = SECONDS,
    address: str = "",
    explain: bool = True,
) -> Verdict:
    """The verdict of one check over as many cases, and if it fails, the smallest case in which it does.

    A known failure must happen in its own case, and then excuses that check, but for the cases that it is said not to
    be about; those that it is about are left out of the checks that build on it. `seconds` is the limit for a case.
    `address` is how the command line finds the subject, where its name is not enough. Without `explain` the first case
    that fails will do, and its cause is not looked for. It takes the same cases each time: they depend on Hypothesis'
    version and on nothing else.
    """
    if lacking := _lacking(subject, check):
        return Verdict(subject.name, check, "not_offered", because=lacking, address=address)
    judged = partial(judge_case, subject, check, seconds=seconds, address=address)
    known = subject.known.get(check.id)
    if known is not None:
        verdict = _excused(judged(Case.parse(known.case)), known)
        if verdict.status != "known" or known.where is None:
            return verdict
    phases = (Phase.generate, Phase.shrink) if explain else (Phase.generate,)
    chosen = settings(_SETTINGS, max_examples=max(1, round(examples * check.effort)), phases=phases)
    found = _explore(check, _unexcused(subject, check), chosen, judged)
    if found is None:
        because = "no case is left beside the known failures"
        return Verdict(subject.name, check, "inconclusive", because=because, address=address)
    if known is not None and not found.failed:
        return replace(found, status="known", because=known.because)
    if found.status != "fails":
        return found
    if explain and not found.hung:
        found = _shortened(found, judged)
        found = replace(found, resembles=explained(subject, check, found, seconds))
    return replace(found, status="advice") if check.since > subject.contract else found


def _unexcused(subject: Subject, check: Check) -> Callable[[Case], bool]:
    """Whether a case is in none of those where this check, or one that it builds on, is known to fail."""
    lineage = {check.id, f"forward.matches_definition{check.id.removeprefix(check.id.partition('@')[0])}"}
    while check.after is not None:
        check = find_check(check.after)
        lineage.add(check.id)
    places = [known.where for name, known in subject.known.items() if name in lineage and known.where is not None]
    return lambda case: not any(where(case) for where in places)


PROBES: tuple[dict[str, Any], ...] = (
    {"tokens": 6, "d_in": 6, "d_out": 7, "rank": 5, "alpha": 7.0},
    {"tokens": 5, "d_in": 8, "d_out": 8, "rank": 8, "alpha": 3.0},
    {"tokens": 4, "d_in": 7, "d_out": 6, "rank": 6, "alpha": 5.0, "rslora": True},
)
"""Cases in which faults that look alike in the smallest one do not: of several sizes, square, and with rsLoRA."""


def explained(subject: Subject, check: Check, failed: Verdict, seconds: float = SECONDS) -> str:
    """The known fault that a failure resembles, fitted to it and to the same case in larger shapes; or nothing."""
    if failed.case is None or failed.hung:
        return ""
    cases = [failed.case]
    for probe in PROBES:
        shape = dict(probe)
        for name in ("d_in", "d_out", "rank"):
            shape[name] *= failed.case.groups
        if failed.case.kind in QUANTISED:  # not of every width
            del shape["d_in"]
        cases.append(replace(failed.case, **shape, gain=1.0))
    seen: list[Seen] = []
    for case in cases:
        judge_case(subject, check, case, seconds=seconds, seen=seen)
    cause = resembles(seen) if seen else None
    return "" if cause is None else str(cause)


def _shortened(failed: Verdict, judged: Callable[[Case], Verdict]) -> Verdict:
    """The same failure with every operation left out that it does not need: Hypothesis draws their order as a whole."""
    assert failed.case is not None
    for place in range(len(failed.case.ops)):
        fewer = failed.case.ops[:place] + failed.case.ops[place + 1 :]
        verdict = judged(replace(failed.case, ops=fewer))
        if verdict.failed and not verdict.hung:
            return _shortened(verdict, judged)
    return failed


def _excused(verdict: Verdict, known: Known) -> Verdict:
    """The verdict on the case of a known failure: known if it fails there, a failure of the entry if it does not."""
    if verdict.status == "fails":
        return replace(verdict, status="known", because=known.because)
    stale = f"it is said to be known to fail in this case ({known.because}), where it {WORDING[verdict.status]}"
    return replace(verdict, status="fails", because=f"{stale}: correct or remove the entry in `known`")


WORDING = {
    "conforms": "holds",
    "inconclusive": "cannot be told",
    "not_offered": "is not offered",
    "error": "cannot be judged",
}


class _Stop(BaseException):
    """No further case is to be tried: one has hung and others might, or none of many was offered."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


def _explore(
    check: Check, wanted: Callable[[Case], bool], chosen: settings, judged: Callable[[Case], Verdict]
) -> Verdict | None:
    """The verdict over the cases that Hypothesis draws, or None where none of them is wanted."""
    reached: list[Verdict] = []
    found: Verdict | None

    @chosen
    @given(check.cases)
    def explore(case: Case) -> None:
        if not wanted(case):
            reject()
        verdict = _offered(judged, case)
        reached.append(verdict)
        if verdict.hung:
            raise _Stop(verdict)
        if verdict.failed:
            raise Nonconformance(verdict)
        if verdict.status == "not_offered":
            _give_up(reached)
            reject()

    try:
        explore()
    except (Nonconformance, _Stop) as smallest:
        found = smallest.verdict
    except Flaky:
        unsteady = next(verdict for verdict in reversed(reached) if verdict.failed)
        because = "; ".join(filter(None, [unsteady.because, "and not every time: the same case has also not failed"]))
        found = replace(unsteady, because=because)
    except Unsatisfiable:
        found = _most_telling(reached) if reached else None
    else:
        found = _most_telling(reached)
    offered = [verdict for verdict in reached if verdict.status != "not_offered"]
    first = next((number for number, verdict in enumerate(offered, start=1) if verdict.failed), len(offered))
    return None if found is None else replace(found, cases=first)


def _offered(judged: Callable[[Case], Verdict], case: Case) -> Verdict:
    """The verdict on a case, or where that is not offered on the same at a scaling of 1: some know no other."""
    verdict = judged(case)
    return judged(replace(case, alpha=float(case.rank), rslora=False)) if verdict.status == "not_offered" else verdict


def _give_up(reached: list[Verdict]) -> None:
    """Stop where none of many cases is offered."""
    if len(reached) >= TRIES and all(verdict.status == "not_offered" for verdict in reached):
        raise _Stop(reached[-1])


def judge_case(
    subject: Subject,
    check: Check,
    case: Case,
    *,
    seconds: float = SECONDS,
    address: str = "",
    seen: list[Seen] | None = None,
) -> Verdict:
    """The verdict of one check in one case; `seen` gets the answer that it fails by.

    Raises ValueError for a case of another kind of base layer than the check's.
    """
    if case.kind != check.kind:
        raise ValueError(f"{check} is about a base of kind {check.kind}, got a case of kind {case.kind}")
    bare = Verdict(subject.name, check, "not_offered", case, address=address)
    if lacking := _lacking(subject, check):
        return replace(bare, because=lacking)
    if case.dtype not in subject.dtypes:
        return replace(bare, because=f"no {case.dtype}")
    with _Attempt() as attempt, limited(seconds), _steady(case):
        trial = Trial(subject, case)
        check.run(trial)
    match attempt.error:
        case None:
            return replace(bare, status="conforms", tensor=trial.tensor, deviation=trial.deviation)
        case Fails() as fails:
            if seen is not None and fails.seen is not None:
                seen.append(fails.seen)
            verdict = replace(bare, status="fails", because=fails.because, verb=fails.verb)
            return replace(verdict, tensor=fails.tensor, deviation=fails.deviation)
        case TimeIsUp() as stuck:
            because = f"{stuck.verb} did not return within {seconds:g} s"
            return replace(bare, status="fails", because=because, verb=stuck.verb, hung=True)
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
    return "" if check.kind in subject.layers else f"no {check.kind} base layer"


def _most_telling(verdicts: list[Verdict]) -> Verdict:
    """What conforms, by the largest deviation, before what could not be judged."""
    order = ("conforms", "inconclusive", "not_offered")

    def telling(verdict: Verdict) -> tuple[int, float]:
        return order.index(verdict.status), -(verdict.deviation.ratio if verdict.deviation else 0.0)

    return min(verdicts, key=telling)


@contextmanager
def _steady(case: Case) -> Iterator[None]:
    """The same random numbers for the same case, gradients on, and a subject's warnings not taken for errors.

    On one thread: so small a case gains nothing by more, and where another program runs, waits for them.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        torch.default_generator.manual_seed(case.seed)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class _Attempt:
    """Runs a block and keeps the exception that ended it, if one did: whose fault it is, is said afterwards."""

    error: Exception | TimeIsUp | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.error = error if isinstance(error, Exception | TimeIsUp) else None
        return self.error is not None
