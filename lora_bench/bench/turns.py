"""Rows that take turns: every arm is proven, then every row of a phase runs once in each round."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from lora_bench.bench import launches
from lora_bench.bench.clock import clock_of
from lora_bench.bench.clocks import Window
from lora_bench.bench.proof import summary
from lora_bench.bench.ready import build, ready_row, refusal_kind, release, told
from lora_bench.bench.sampling import NONE, Samples, interleave
from lora_bench.bench.workload import BASE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.result import Proof
    from lora_bench.bench.workload import Row
    from lora_bench.subject import Subject


class Progress(NamedTuple):
    """A line for whoever waits."""

    text: str


class Timing(NamedTuple):
    """One row's samples, and the base's of the same rounds; `beside`: all that took turns.

    `window` is what happened to the device's clocks meanwhile, as `Window.as_dict` tells it; `parts` holds the seconds
    of each part of a step that has parts, sample by sample. Where it is not `interleaved` the base ran before the row
    and after it: its samples have the turns 0 and 2, and the row's have 1.
    """

    row: Row
    samples: Samples
    base: Samples
    proof: Proof | None
    beside: list[str]
    window: dict[str, Any]
    parts: dict[str, list[float]] = {}  # noqa: RUF012  # of a tuple, and never changed
    interleaved: bool = True


class Launches(NamedTuple):
    """What a GPU told of one row beside its samples, as in `lora_bench.bench.launches.look`."""

    row: Row
    found: dict[str, Any]


class Refusal(NamedTuple):
    """A row that was not timed, and why: the build or the proof failed ("error", "wrong", "oom")."""

    row: Row
    kind: str
    text: str


Message: TypeAlias = Progress | Timing | Launches | Refusal


def take_turns(
    rows: Sequence[Row],
    base: PreTrainedModel,
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Message]:
    """Prove the rows' arms, all beside `base`, and time those that are right; `holding` is told what is in hand.

    On a GPU each row is looked at once more when all of them are timed.
    """
    steps: dict[Row, Step] = {}
    proofs: dict[Row, Proof | None] = {}
    for of_arm in by_arm(rows):
        holding(of_arm[0])
        for row, (step, proof) in (yield from made_ready(of_arm, partial(build, base), device)).items():
            steps[row], proofs[row] = step, proof
    yield from timed(steps, proofs, device, budget_seconds, holding)


def by_arm(rows: Sequence[Row]) -> list[list[Row]]:
    """The base last: it serves as the definition's weights until its own training changes them."""
    arms = sorted(dict.fromkeys(row.arm for row in rows), key=lambda arm: arm[0] == BASE)
    return [[row for row in rows if row.arm == arm] for arm in arms]


def made_ready(
    rows: Sequence[Row], make: Callable[[Row], tuple[Subject | None, Arm]], device: str
) -> Generator[Message, None, dict[Row, tuple[Step, Proof | None]]]:
    """The steps of one arm's rows and what proves them; none where the arm or a step fails, which is said of each."""
    made: dict[Row, tuple[Step, Proof | None]] = {}
    refused: list[Refusal] = []
    try:
        made = _steps(rows, make)
    except Exception as error:  # a subject may raise anything; its rows are refused by name
        if (kind := refusal_kind(error)) == "gpu_lost":
            raise
        refused = [Refusal(row, kind, told(error, device)) for row in rows]
    if refused:
        release(device)  # first: where it finds the device out of order, that is no row's fault
        yield from refused
    if shown := [proof for _, proof in made.values() if proof is not None]:
        checks, error_ratio, _ = summary(shown)
        yield Progress(f"{rows[0].arm_name} is right: {checks} checks, errors up to {error_ratio:.2f} of their bounds")
    return made


def _steps(
    rows: Sequence[Row], make: Callable[[Row], tuple[Subject | None, Arm]]
) -> dict[Row, tuple[Step, Proof | None]]:
    subject, arm = make(rows[0])
    return {row: ready_row(row, subject, arm) for row in rows}


def timed(
    steps: Mapping[Row, Step],
    proofs: Mapping[Row, Proof | None],
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Progress | Timing | Launches]:
    """Time the rows of each phase beside each other, and look at all of them once more on a GPU."""
    hot: dict[Row, list[float]] = {}
    for phase in dict.fromkeys(row.workload.phase for row in steps):
        of_phase = [row for row in steps if row.workload.phase == phase]
        controls = {row.base() for row in of_phase}
        chosen = {row: step for row, step in steps.items() if row in of_phase or row in controls}
        yield Progress(f"timing {phase}: {len(chosen)} rows taking turns, about {budget_seconds:.0f} s")
        with Window(device) as window:
            samples = sampled(chosen, device, budget_seconds, holding)
        control = next((samples[row] for row in samples if row.subject == BASE), NONE)
        for row in samples:
            beside = [str(other) for other in samples]
            parts = steps[row].parts(len(samples[row].seconds))
            yield Timing(row, samples[row], control, proofs[row], beside, window.as_dict(), parts)
            hot[row] = samples[row].seconds
    yield from looked_at(steps, hot, device, budget_seconds, holding)  # last: what fails here costs no row its times


def sampled(
    steps: Mapping[Row, Step], device: str, budget_seconds: float, holding: Callable[[Row], None]
) -> dict[Row, Samples]:
    """Samples of these steps, taken in turns."""
    relocating = not device.startswith("cuda")
    clock = clock_of(device)
    return interleave(steps, clock, budget_seconds=budget_seconds, relocating=relocating, holding=holding)


def looked_at(
    steps: Mapping[Row, Step],
    hot: Mapping[Row, Sequence[float]],
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Progress | Launches]:
    """On a GPU, what `launches.look` finds of steps with `hot` samples."""
    if device.startswith("cuda") and hot:
        yield Progress(f"{len(hot)} rows with cold caches, and without their launches")
        found = launches.look(steps, hot, device, budget_seconds=budget_seconds, holding=holding)
        yield from (Launches(*each) for each in found)
