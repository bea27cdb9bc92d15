"""Where no model fits the device's memory beside its base: each alone, its base before it and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_bench import subjects
from lora_bench.bench.arm import build_arm
from lora_bench.bench.clocks import Window
from lora_bench.bench.ready import build_base, release
from lora_bench.bench.sampling import Samples
from lora_bench.bench.turns import Progress, Timing, by_arm, looked_at, made_ready, sampled
from lora_bench.bench.workload import BASE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from transformers import PreTrainedModel

    from lora_bench.bench.arm import Arm
    from lora_bench.bench.result import Proof
    from lora_bench.bench.turns import Message
    from lora_bench.bench.workload import Row
    from lora_bench.subject import Subject

NONE = Samples([], [], [])


class Run(NamedTuple):
    """One row's samples, taken alone."""

    samples: Samples
    proof: Proof | None
    parts: dict[str, list[float]]


def bracketed(
    rows: Sequence[Row], device: str, budget_seconds: float, holding: Callable[[Row], None]
) -> Iterator[Message]:
    """Time each arm alone on the device, between two runs of the base; `holding` is told what is in hand.

    The weights that the proofs need wait in the host's memory. Yields as `take_turns` does, with rows that are not
    interleaved; their windows span both runs of the base, and whatever was built in between.
    """
    host = build_base(rows[0], device).to("cpu")
    release(device)
    *arms, bases = by_arm(rows)
    seconds = budget_seconds / (2 * len(arms) + 1)

    def run(of_arm: Sequence[Row], *, again: bool = False) -> Generator[Message, None, dict[Row, Run]]:
        holding(of_arm[0])
        found = yield from _alone(of_arm, host, device, seconds, holding, again=again)
        release(device)
        return found

    window = Window(device).__enter__()
    first = before = yield from run(bases)
    for of_arm in arms:
        found = yield from run(of_arm)
        following = Window(device).__enter__()
        after = (yield from run(list(before), again=True)) if before and found else before
        window.__exit__(None, None, None)
        for row, (samples, proof, parts) in first.items():
            yield Timing(row, samples, samples, proof, [str(row)], window.as_dict(), parts)
        for row, (samples, proof, parts) in found.items():
            own = samples._replace(turns=[1] * len(samples.turns))
            base = _around(before[row.base()].samples, after[row.base()].samples) if row.base() in before else NONE
            yield Timing(row, own, base, proof, [], window.as_dict(), parts, interleaved=False)
        first, before, window = {}, after, following


def _alone(
    rows: Sequence[Row],
    host: PreTrainedModel,
    device: str,
    seconds: float,
    holding: Callable[[Row], None],
    *,
    again: bool,
) -> Generator[Message, None, dict[Row, Run]]:
    """One arm on the device, built, proven and timed phase by phase; `again` where a GPU has told of it already."""

    def make(row: Row) -> tuple[Subject | None, Arm]:
        subject = None if row.subject == BASE else subjects.find(row.subject)
        return subject, build_arm(build_base(row, device), subject, row.workload, pristine=host)

    found: dict[Row, Run] = {}
    made = yield from made_ready(rows, make, device)
    steps = {row: step for row, (step, _) in made.items()}
    for row, (step, proof) in made.items():
        yield Progress(f"timing {row} alone, about {seconds:.0f} s")
        samples = sampled({row: step}, device, seconds, holding)[row]
        found[row] = Run(samples, proof, step.parts(len(samples.seconds)))
    if not again:
        hot = {row: each.samples.seconds for row, each in found.items()}
        yield from looked_at(steps, hot, device, seconds, holding)
    return found


def _around(before: Samples, after: Samples) -> Samples:
    """Both runs of a base as one, its turns telling which is which."""
    turns = [0] * len(before.turns) + [2] * len(after.turns)
    return Samples(before.seconds + after.seconds, turns, before.interrupted + after.interrupted)
