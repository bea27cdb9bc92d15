"""DoRA: the definition is the paper's, no honest computation exceeds the bounds, and no wrong one hides."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lora_bench import bounds, dora
from lora_bench.bounds import Arithmetic, worst
from lora_bench.case import DTYPES, Case, Problem, cases
from lora_bench.spec import Factors
from tests.dora_forms import HONEST, SLOPES, Form, Terms, computed, judged, magnitude_of

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def exceeding(problem: Problem, factors: Factors, s: float, turn: int = 0) -> list[str]:
    """The honest results that are outside of the bounds."""
    squares = dora.norms(problem.weight, factors, s) ** 2
    assume(squares.max() < torch.finfo(problem.x.dtype).max / 2)  # overflow is outside of the bounds
    results = computed(problem, factors, s, turn)
    outside = []
    for of, (wanted, allowed) in judged(problem, factors, s, Arithmetic.of(problem.x.dtype)).items():
        for name, found in results[of].items():
            deviation = worst(found, wanted, allowed)
            if found.dtype != problem.x.dtype or (deviation.ratio > 1 and deviation.allowed != torch.inf):
                outside.append(f"{of}, {name}: {found.dtype}, {deviation}")
    return outside


def trials(dtype: str) -> st.SearchStrategy[Case]:
    any_gain = {"dtype": st.just(dtype), "gain": st.sampled_from([1.0, 0.01, 4.0, 1e-4, 1e-6]), "dora": st.just(True)}
    large = cases(**any_gain, d_in=st.just(64), d_out=st.just(64), rank=st.sampled_from([1, 16]))
    return st.one_of(*[cases(**any_gain)] * 3, large)


@each_dtype
@given(st.data(), st.sampled_from([1.0, 0.01, 30.0, -1.0]), st.integers(0, 5))
def test_no_honest_computation_exceeds_the_bounds(dtype: str, data: st.DataObject, stretch: float, turn: int) -> None:
    case = data.draw(trials(dtype))
    problem, s = case.draw(), case.spec.scaling
    a, b = problem.adapters[0][1].a, problem.adapters[0][1].b
    factors = Factors(a, b, magnitude=stretch * magnitude_of(problem.adapters[0][1]))

    assert exceeding(problem, factors, s, turn) == []


@given(cases(dtype=st.just("fp64"), dora=st.just(True)))
def test_the_definitions_own_rounding_is_allowed_for(case: Case) -> None:
    given_ = (problem := case.draw()), problem.adapters[0][1], case.spec.scaling
    exact, rounded = judged(*given_, Arithmetic(0.0, 0.0, 0.0)), judged(*given_, Arithmetic.of(torch.float64))
    for of in exact:
        assert exact[of][1].all()
        assert (rounded[of][1] > exact[of][1]).all()


# x, A, B and m; of a smaller m the inverse of c overflows.
SHARES = [(1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0.25), (0, 0.5, 0.5, 0), (0.75, 0, 0, 0.25)]


@pytest.mark.parametrize(
    ("dtype", "tiny", "flush"),
    [("fp64", 1e-308, False), ("fp16", 1e-6, False)]
    + [(dtype, 1e-38, flush) for dtype in ("fp32", "bf16") for flush in (False, True)],
)
@given(st.data(), st.integers(-1, 2), st.sampled_from(SHARES))
def test_what_underflows_is_allowed_for(
    dtype: str, tiny: float, flush: bool, data: st.DataObject, tenfold: int, shares: tuple[float, ...]
) -> None:
    case = data.draw(cases(dtype=st.just(dtype), dora=st.just(True)))
    problem, s, to = case.draw(), case.spec.scaling, case.torch_dtype
    given_ = problem.x, problem.adapters[0][1].a, problem.adapters[0][1].b, magnitude_of(problem.adapters[0][1])
    x, a, b, m = (
        (part.double() * (tiny * 10.0**tenfold) ** share).to(to) for part, share in zip(given_, shares, strict=True)
    )
    torch.set_flush_denormal(flush)
    try:
        outside = exceeding(problem._replace(x=x, bias=None), Factors(a, b, magnitude=m), s, turn=case.seed % 5)
    finally:
        torch.set_flush_denormal(False)

    assert outside == []


def test_the_gradients_are_those_of_autograd_with_the_norm_held() -> None:
    problem = Case(tokens=4, d_in=6, d_out=5, rank=3, dora=True, bias=True).draw()
    factors, s = problem.adapters[0][1], 1.5
    leaves = [tensor.clone().requires_grad_() for tensor in (factors.a, factors.b, problem.x, magnitude_of(factors))]
    a, b, x, m = leaves
    total = problem.weight + s * b @ a
    y = linear(x, (m / total.norm(dim=1).detach())[:, None] * total, problem.bias)
    torch.testing.assert_close(
        dora.gradients(problem.x, problem.grad, problem.weight, factors, s),
        dora.Gradients(*torch.autograd.grad(y, leaves, problem.grad)),
    )


def test_a_fresh_layer_is_its_base_and_a_direction_has_no_length() -> None:
    problem = Case(tokens=4, d_in=6, d_out=5, rank=3, dora=True, bias=True).draw()
    x, w, bias, *_ = problem
    a, b = problem.adapters[0][1].a, problem.adapters[0][1].b
    fresh = Factors(a, torch.zeros_like(b), magnitude=w.norm(dim=1))
    torch.testing.assert_close(dora.forward(x, w, bias, fresh, 2.0), linear(x, w, bias))

    factors = Factors(a, b, magnitude=magnitude_of(problem.adapters[0][1]))
    torch.testing.assert_close(dora.forward(x, w, bias, factors, 2.0), dora.forward(x, 3 * w, bias, factors, 6.0))
    torch.testing.assert_close(dora.merged_weight(w, factors, 2.0).norm(dim=1), magnitude_of(factors))


def test_factors_without_a_magnitude_are_refused() -> None:
    factors = Factors(torch.ones(1, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match="factors of DoRA must have a magnitude, got None"):
        dora.forward(torch.ones(1, 2), torch.ones(3, 2), None, factors, 1.0)


def test_a_row_of_zeros_has_no_value_and_any_error_is_allowed() -> None:
    problem = Case(tokens=2, dora=True).draw()
    factors = problem.adapters[0][1]
    weight, b = problem.weight.clone(), factors.b.clone()
    weight[1] = b[1] = 0
    for of, (wanted, allowed) in judged(
        problem._replace(weight=weight), Factors(factors.a, b, magnitude=factors.magnitude), 1.0, bounds.FLOAT64
    ).items():
        if of in ("y", "y merged"):
            assert wanted[:, 1].isnan().all()
            assert allowed[:, 1].isinf().all()
            assert allowed[:, 0].isfinite().all()
        elif of in ("W merged", "dB", "dm"):
            assert wanted[1].isnan().all()
            assert allowed[1].isinf().all()
            assert allowed[0].isfinite().all()


def columns(w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    return (w + s * (b @ a)).norm(dim=0)


# What is computed instead, of a layer as wide as it is long, and where it must be seen: c is near 1.
FAULTS: dict[str, tuple[Form, str]] = {
    "no magnitude": (lambda t: t.plus_bias(linear(t.x, t.w + t.s * (t.b @ t.a))), "y dx dm"),
    "norm of the base": (lambda t: HONEST["c last"](t._replace(n=t.w.norm(dim=1))), "y dA dB dx dm"),
    "norm of columns": (lambda t: HONEST["c last"](t._replace(n=columns(t.w, t.a, t.b, t.s))), "y dA dB dx dm"),
    "norm without s": (lambda t: HONEST["c last"](t._replace(n=(t.w + t.b @ t.a).norm(dim=1))), "y dA dB dx dm"),
    "norm not held": (lambda t: HONEST["c last"](t._replace(n=(t.w + t.s * (t.b @ t.a)).norm(dim=1))), "dA dB"),
    "bias scaled": (lambda t: t.c * (linear(t.x, t.w, t.bias) + t.s * linear(linear(t.x, t.a), t.b)), "y dm"),
    "c on the base alone": (lambda t: t.plus_bias(t.c * linear(t.x, t.w) + t.s * linear(linear(t.x, t.a), t.b)), "y"),
}


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_exceeds_the_bounds(fault: str, dtype: str) -> None:
    form, spoils = FAULTS[fault]
    for seed in range(8):
        problem = Case(tokens=3, d_in=4, d_out=4, alpha=6, dtype=dtype, seed=seed, bias=True, dora=True).draw()
        (x, w, bias, grad, *_), factors, s = problem, problem.adapters[0][1], 3.0
        a, b, x, m = leaves = [
            tensor.clone().requires_grad_() for tensor in (factors.a, factors.b, x, magnitude_of(factors))
        ]
        y = form(Terms(x, w, bias, a, b, s, m, (w + s * (b @ a)).norm(dim=1).detach()))
        slopes = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
        found = {"y": y.detach()} | dict(zip(SLOPES, slopes, strict=True))
        limits = judged(problem, factors, s, Arithmetic.of(w.dtype))
        assert {of for of in found if worst(found[of], *limits[of]).ratio > 100} >= set(spoils.split())
