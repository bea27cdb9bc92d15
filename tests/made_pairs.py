"""Pairs with known changes, for tests of the gate."""

import numpy as np

from lora_bench.gate.pair import SIDES, Pair

ROUNDS = 64


def made(
    head: float = 1.0,
    control: float = 1.0,
    *,
    tail: float = 1.0,
    seed: int = 0,
    noise: float = 0.001,
    interrupted: int = 0,
    throttled: bool = False,
) -> Pair:
    """A pair of about a millisecond a step: head takes so many times as long, every fifth time `tail` times that."""
    draw = np.random.default_rng(seed)

    def side(times: float, worst: float) -> list[float]:
        own = 1e-3 * times * np.exp(draw.normal(0, noise)) * np.exp(np.abs(draw.normal(0, noise, ROUNDS)))
        own[::5] *= worst
        return [float(value) for value in own]

    marks = {name: [number < interrupted for number in range(ROUNDS)] for name in SIDES}
    return Pair(side(1.0, 1.0), side(head, tail), side(control, 1.0), marks, throttled=throttled)


def calm(rounds: int = ROUNDS) -> dict[str, list[bool]]:
    """Nobody was interrupted."""
    return {name: [False] * rounds for name in SIDES}
