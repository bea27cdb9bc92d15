"""The bounds: no honest computation exceeds them, in whatever order or precision it goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.bounds import UNIT_ROUNDOFF, Arithmetic, worst
from lora_bench.case import DTYPES, Case, Problem, cases
from lora_bench.spec import Factors
from tests.lora_forms import computed, judged

thorough = settings(max_examples=2 * settings().max_examples)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exceeding(problem: Problem, factors: Factors, s: float, *, flush: bool = False) -> list[str]:
    """The honest results that are outside of the bounds."""
    torch.set_flush_denormal(flush)
    try:
        results = computed(problem, factors, s)
    finally:
        torch.set_flush_denormal(False)
    outside = []
    for of, (wanted, allowed) in judged(problem, factors, s, Arithmetic.of(problem.x.dtype)).items():
        for name, found in results[of].items():
            deviation = worst(found, wanted, allowed)
            if found.dtype != problem.x.dtype or deviation.ratio > 1:
                outside.append(f"{of}, {name}: {found.dtype}, {deviation}")
    return outside


def trials(dtype: str) -> st.SearchStrategy[Case]:
    """Cases of up to 8 and of 64 features, with B ordinary, large, small, and so small that fp16 underflows."""
    any_gain = {"dtype": st.just(dtype), "gain": st.sampled_from([1.0, 0.01, 4.0, 1e-4, 1e-6])}
    large = cases(**any_gain, d_in=st.just(64), d_out=st.just(64), rank=st.sampled_from([1, 16]))
    return st.one_of(*[cases(**any_gain)] * 3, large)


@each_dtype
@thorough
@given(st.data())
def test_no_honest_computation_exceeds_the_bounds(dtype: str, data: st.DataObject) -> None:
    case = data.draw(trials(dtype))
    problem = case.draw()

    assert exceeding(problem, problem.adapters[0][1], case.spec.scaling) == []


SHARES = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]


# Without weight and bias a layer shows nothing but the adapter. Some processors take subnormal numbers for zeros.
@pytest.mark.parametrize(
    ("dtype", "tiny", "flush"),
    [("fp64", 1e-308, False), ("fp16", 1e-6, False)]
    + [(dtype, 1e-38, flush) for dtype in ("fp32", "bf16") for flush in (False, True)],
)
@given(data=st.data(), tenfold=st.integers(-1, 2), shares=st.sampled_from(SHARES))
def test_what_underflows_is_allowed_for(
    dtype: str, tiny: float, flush: bool, data: st.DataObject, tenfold: int, shares: tuple[float, ...]
) -> None:
    case = data.draw(cases(dtype=st.just(dtype)))
    problem = case.draw()
    factors, to = problem.adapters[0][1], problem.x.dtype
    small = [(tiny * 10.0**tenfold) ** share for share in shares]
    x, a, b = ((part.double() * by).to(to) for part, by in zip((problem.x, factors.a, factors.b), small, strict=True))
    bare = problem._replace(x=x, weight=torch.zeros_like(problem.weight), bias=None)

    assert exceeding(bare, Factors(a, b), case.spec.scaling, flush=flush) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("size", [1, 16])
def test_a_sum_may_lose_each_of_many_small_terms(dtype: torch.dtype, rank: int, size: int) -> None:
    # 1 + e + ... + e with e just under half a unit in the last place of 1: added one after another, each e is lost.
    x, w, a = (torch.ones(rows, 1, dtype=dtype) for rows in (size, size, rank))
    factors = Factors(a, torch.full((size, rank), 0.98 * UNIT_ROUNDOFF[dtype], dtype=dtype))
    problem = Problem(x, w, None, torch.ones(size, size, dtype=dtype), [], torch.empty(0))

    assert exceeding(problem, factors, 1.0) == []
