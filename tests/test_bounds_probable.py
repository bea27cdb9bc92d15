"""The bounds of the benchmark's proofs: no honest computation exceeds them, and of long sums in 16 bits they show."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_bench import definition
from lora_bench.bounds import Arithmetic, probable, visibility, worst
from lora_bench.case import DTYPES, Case, Problem, cases
from lora_bench.spec import Factors
from tests.lora_forms import computed, judged

BF16 = torch.bfloat16
SCALING = 2.25
ROWS, OUTPUTS = 16, 128
CUDA = Arithmetic(2.0**-8, 2.0**-24, 2.0**-126, partials=2, probabilistic=True)
"""bfloat16 where sums may be split and their parts stored."""
EVERYTHING = ("y", "y merged", "W merged", "W restored", "dA", "dB", "dx")


def layer(
    d_in: int, d_out: int, rank: int, dtype: torch.dtype = BF16, *, bias: bool = False
) -> tuple[Problem, Factors]:
    """A layer as the benchmark draws it: the adapter's output is about as large as the base's."""
    draw = torch.Generator().manual_seed(d_in + rank)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * size).to(dtype)

    a = normal(rank, d_in, size=1 / math.sqrt(d_in))
    b = normal(d_out, rank, size=0.02 * math.sqrt(d_in / rank) / SCALING)
    x, weight, grad = normal(ROWS, d_in), normal(d_out, d_in, size=0.02), normal(ROWS, d_out)
    return Problem(x, weight, normal(d_out) if bias else None, grad, [], torch.empty(0)), Factors(a, b)


def exceeding(problem: Problem, factors: Factors, s: float) -> list[str]:
    """The honest results that are outside of the bounds."""
    wanted = judged(problem, factors, s, Arithmetic.of(problem.x.dtype, probabilistic=True), by=probable)
    results = computed(problem, factors, s)
    deviations = {f"{of}, {name}": worst(found, *wanted[of]) for of in wanted for name, found in results[of].items()}
    return [f"{name}: {deviation}" for name, deviation in deviations.items() if deviation.ratio > 1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_no_honest_computation_exceeds_them(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=st.just(dtype), gain=st.sampled_from([1.0, 0.01, 4.0, 1e-4])))
    problem = case.draw()

    assert exceeding(problem, problem.adapters[0][1], case.spec.scaling) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(2048, 64, 16), (64, 2048, 128), (4096, 48, 64)])
def test_nor_does_one_of_a_large_layer(dtype: str, d_in: int, d_out: int, rank: int) -> None:
    assert exceeding(*layer(d_in, d_out, rank, Case(dtype=dtype).torch_dtype, bias=True), SCALING) == []


def split(x: Tensor, w: Tensor, parts: int) -> Tensor:
    """x Wᵀ in parts of the sum, each stored in the dtype, and so is their sum."""
    stored = [one @ other.T for one, other in zip(x.chunk(parts, 1), w.chunk(parts, 1), strict=True)]
    return torch.stack(stored).float().sum(0).to(x.dtype)


@pytest.mark.parametrize("parts", [2, 8, 64])
@pytest.mark.parametrize("rank", [8, 128])
@pytest.mark.parametrize("gain", [1.0, 1e-3])
def test_the_parts_of_a_split_sum_may_be_stored(parts: int, rank: int, gain: float) -> None:
    problem = layer(2048, OUTPUTS, rank)
    (x, w, _, grad, *_), (a, b) = problem[0], (problem[1].a, problem[1].b * gain)
    problem = problem[0], Factors(a, b)
    hidden, through_b = split(x, a, parts), split(grad, b.T, parts)
    found = {
        "y": split(x, w, parts) + SCALING * (hidden @ b.T),
        "y merged": split(x, w + SCALING * (b @ a), parts),
        "dA": SCALING * (through_b.T @ x),
        "dB": SCALING * (grad.T @ hidden),
        "dx": split(grad, w.T, parts) + SCALING * (through_b @ a),
    }
    wanted = judged(*problem, SCALING, CUDA, by=probable)

    assert {of: worst(value, *wanted[of]).ratio <= 1 for of, value in found.items()} == dict.fromkeys(found, True)


@pytest.mark.parametrize("d_in", [64, 2048, 14336])
@pytest.mark.parametrize("rank", [8, 128])
def test_of_every_layer_of_the_models_in_16_bits_the_adapter_can_be_seen(d_in: int, rank: int) -> None:
    problem, factors = layer(d_in, OUTPUTS, rank)
    x, w, _, grad, *_ = problem
    wanted = judged(problem, factors, SCALING, CUDA, by=probable)
    effect = definition.delta(x, factors, SCALING)
    effects = {
        **dict.fromkeys(("y", "y merged"), effect),
        "W merged": SCALING * factors.b.double() @ factors.a.double(),
        "dx": definition.delta(grad, Factors(factors.b.T, factors.a.T), SCALING),
        **{of: wanted[of][0] for of in ("dA", "dB")},
    }
    seen = {of: visibility(value, wanted[of][1]) for of, value in effects.items()}
    slack = probable.strayed(x, wanted["W restored"][1])
    seen["switched"] = visibility(effect, wanted["y merged"][1] + slack)

    assert min(seen.values()) > 1, seen
    dropped = definition.base(x, w, None).to(BF16)
    for of in ("y", "y merged"):
        assert worst(dropped, *wanted[of]).ratio > 1


@pytest.mark.parametrize("fault", ["dropped", "doubled", "rolled", "another's"])
def test_what_is_wrong_is_outside(fault: str) -> None:
    problem, factors = layer(2048, OUTPUTS, 16)
    wanted = judged(problem, factors, SCALING, Arithmetic.of(BF16, probabilistic=True), by=probable)
    s = {"dropped": 0.0, "doubled": 2 * SCALING}.get(fault, SCALING)
    x = problem.x.roll(1, 0) if fault == "rolled" else problem.x
    other = layer(2048, OUTPUTS, 17)[1]
    used = Factors(other.a[:16], other.b[:, :16]) if fault == "another's" else factors
    results = computed(problem._replace(x=x), used, s)

    for of in ("y", "y merged", "dA", "dB") if fault == "rolled" else EVERYTHING:
        if of != "W restored":
            assert all(worst(found, *wanted[of]).ratio > 1 for found in results[of].values()), of
