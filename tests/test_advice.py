"""What a run's figures say: break-even and cliffs, on figures made by hand."""

from __future__ import annotations

from typing import Any

from lora_bench.bench.result import Result
from lora_bench.bench.sampling import Samples
from lora_bench.report.advice import advice
from tests.micro_rows import row


def result(setup: str, phase: str, seconds: float, **changes: Any) -> Result:
    taken = [seconds * (1 + part / 1000) for part in range(-5, 6)]
    return Result(row("one", setup, phase, sequence=10, batch=8, **changes), Samples(taken, [0] * 11, [False] * 11))


def mixed(adapters: int, seconds: float) -> list[Result]:
    return [result("batched", phase, seconds, adapters=adapters) for phase in ("prefill", "decode")]


MERGED = [result("merged", "decode", 1.0), result("merged", "prefill", 1.0), result("merged", "switch", 0.5)]


def test_merging_one_after_the_other_is_compared_with_a_mixed_batch_for_each_number_of_adapters() -> None:
    # Merged, k adapters take 0.5 k + 1 + 10 k seconds; mixed, eleven steps.
    (said,) = advice([*MERGED, *mixed(1, 2.0), *mixed(2, 2.1)])

    assert said == (
        "one r4, 10 tokens read and 10 written: merge one after the other, up to 2 adapters in a batch "
        "(merged / mixed, 1: 0.52, 2: 0.95)"
    )


def test_where_it_turns_both_sides_are_named() -> None:
    (said,) = advice([*MERGED, *mixed(1, 1.5), *mixed(4, 1.6)])

    assert said == (
        "one r4, 10 tokens read and 10 written: merge up to 1 adapter in a batch, mix from 4 on "
        "(merged / mixed, 1: 0.70, 4: 2.44)"
    )


def test_where_mixing_always_wins_it_says_so() -> None:
    (said,) = advice([*MERGED, *mixed(2, 1.0)])

    assert said.startswith("one r4, 10 tokens read and 10 written: mix, from 2 adapters in a batch on")


def test_without_every_part_nothing_is_said() -> None:
    assert not advice([*MERGED[:2], *mixed(2, 1.0)])
    assert not advice([*MERGED, mixed(2, 1.0)[1]])


def test_a_jump_beyond_the_intervals_is_a_cliff() -> None:
    said = advice([*mixed(1, 1.0), *mixed(8, 1.2), *mixed(32, 1.8)])

    assert said == [
        f"batched[one-{phase}-micro-fp32-r4-b8-s10-n32]: 1.50 times as long with adapters 32 as with 8"
        for phase in ("prefill", "decode")
    ]


def test_a_jump_within_the_intervals_is_none() -> None:
    noisy = [1.0, 2.0, 0.5, 3.0, 1.1, 0.9, 1.3]
    one, other = (
        Result(row("one", "batched", "decode", adapters=number), Samples([*noisy, last], [0] * 8, [False] * 8))
        for number, last in ((1, 1.0), (8, 3.0))
    )
    other.samples.seconds[:] = [1.3 * taken for taken in other.samples.seconds]

    assert not advice([one, other])
