"""Where no model fits the device's memory beside its base: each alone, its base before it and after it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.clocks import Window, joined
from lora_bench.bench.isolate import failure_kind
from lora_bench.bench.ready import build_alone, release
from lora_bench.bench.sampling import AFTER, BEFORE, BETWEEN, NONE, Samples
from lora_bench.bench.turns import Progress, Timing, by_arm, looked_at, made_ready, sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from lora_bench.bench.result import Proof
    from lora_bench.bench.turns import Message
    from lora_bench.bench.workload import Row


class Run(NamedTuple):
    """One row, timed alone; as in `Timing`."""

    samples: Samples
    proof: Proof | None
    window: dict[str, Any]
    parts: dict[str, list[float]]


Runs = dict["Row", Run]


def bracketed(
    rows: Sequence[Row],
    host: PreTrainedModel,
    device: str,
    budget_seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Message]:
    """Time each arm alone on the device, between two runs of the base; `holding` is told what is in hand.

    `host` has the base's weights for the proofs, and waits in the host's memory. Yields as `take_turns` does, with rows
    that are not interleaved; their windows are those of all three runs. A base that fails after it has run costs an
    arm nothing but its ratio.
    """
    *arms, bases = by_arm(rows)
    seconds = budget_seconds / (2 * len(arms) + 1)
    run = partial(_alone, host=host, device=device, seconds=seconds)
    before = yield from run(bases, holding=holding)
    for row, alone in before.items():
        yield Timing(row, alone.samples, alone.samples, alone.proof, [str(row)], alone.window, alone.parts)
    again, hot = list(before), {row: alone.samples.seconds for row, alone in before.items()}
    for of_arm in arms:

        def hold(_row: Row, arm: Row = of_arm[0]) -> None:
            holding(arm)  # the base has its times: should it end this process, that is to cost this arm alone

        if again and not before:
            before = yield from _once_more(run(again, holding=hold))
        if found := (yield from run(of_arm, holding=holding)):
            after = (yield from _once_more(run(again, holding=hold))) if before else {}
            yield from (_between(row, alone, before, after) for row, alone in found.items())
            before = after
            hot |= {row: alone.samples.seconds for row, alone in found.items()}
        release(device)
    for of_arm in by_arm(list(hot)) if device.startswith("cuda") else []:
        yield from _look({row: hot[row] for row in of_arm}, host, device, seconds, holding)
        release(device)


def _alone(
    rows: Sequence[Row],
    *,
    host: PreTrainedModel,
    device: str,
    seconds: float,
    holding: Callable[[Row], None],
) -> Generator[Message, None, Runs]:
    """One arm on the device, built, proven, timed phase by phase, and let go of."""
    holding(rows[0])
    found = yield from _timed(rows, host, device, seconds, holding)
    release(device)
    return found


def _timed(
    rows: Sequence[Row],
    host: PreTrainedModel,
    device: str,
    seconds: float,
    holding: Callable[[Row], None],
) -> Generator[Message, None, Runs]:
    found: Runs = {}
    made = yield from made_ready(rows, partial(build_alone, device=device, pristine=host), device)
    for row, (step, proof) in made.items():
        yield Progress(f"timing {row} alone, about {seconds:.1f} s")
        with Window(device) as window:
            samples = sampled({row: step}, device, seconds, holding)[row]
        found[row] = Run(samples, proof, window.as_dict(), step.parts(len(samples.seconds)))
    return found


def _once_more(run: Generator[Message, None, Runs]) -> Generator[Message, None, Runs]:
    """A further run of a base: where it fails there is none, and the base keeps its times."""
    while True:
        try:
            message = next(run)
        except StopIteration as end:
            found: Runs = end.value
            return found
        except Exception as error:  # whatever it is, the arm before is still to be told of
            if failure_kind(error) == "gpu_lost":
                raise
            yield Progress(f"the base did not run again: {type(error).__name__}: {error}")
            return {}
        if isinstance(message, Progress):
            yield message


def _between(row: Row, alone: Run, before: Runs, after: Runs) -> Timing:
    """The row's timing, with its base's samples of both runs where there are two."""
    samples = alone.samples._replace(turns=[BETWEEN] * len(alone.samples.turns))
    around = [runs[row.base()] for runs in (before, after) if row.base() in runs]
    base = _around(*(each.samples for each in around)) if len(around) > 1 else NONE
    window = joined([each.window for each in (*around, alone)])
    return Timing(row, samples, base, alone.proof, [], window, alone.parts, interleaved=False)


def _around(before: Samples, after: Samples) -> Samples:
    """Both runs of a base as one, its turns telling which is which."""
    turns = [BEFORE] * len(before.turns) + [AFTER] * len(after.turns)
    return Samples(before.seconds + after.seconds, turns, before.interrupted + after.interrupted)


def _look(
    hot: Mapping[Row, Sequence[float]],
    host: PreTrainedModel,
    device: str,
    seconds: float,
    holding: Callable[[Row], None],
) -> Iterator[Message]:
    """What a GPU tells of an arm that has its times: last, so that what fails here costs it none of them."""
    holding(next(iter(hot)))
    made = yield from made_ready(list(hot), partial(build_alone, device=device, pristine=host), device)
    steps = {row: step for row, (step, _) in made.items()}
    yield from looked_at(steps, {row: hot[row] for row in steps}, device, seconds, holding)
