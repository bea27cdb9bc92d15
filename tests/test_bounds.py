"""The bounds: no honest computation exceeds them, in whatever order or precision it goes, and no wrong one hides."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from lora_bench import bounds, definition
from lora_bench.bounds import UNIT_ROUNDOFF, Arithmetic, visibility, worst
from lora_bench.case import DTYPES, Case, Problem, cases
from lora_bench.spec import Factors

Form = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]  # x, w, bias, a, b, s
Product = Callable[[Tensor, Tensor, float], Tensor]  # a, b, s

thorough = settings(max_examples=2 * settings().max_examples)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def turned(matrix: Tensor) -> Tensor:
    """The same matrix, stored column by column."""
    return matrix.T.contiguous().T


def bias_first(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    return torch.addmm(x @ w.T if bias is None else torch.addmm(bias, x, w.T), x @ a.T, b.T, alpha=s)


def rounded_once(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
    y = linear(x.double(), w.double(), None if bias is None else bias.double())
    return (y + s * x.double() @ a.double().T @ b.double().T).to(x.dtype)


HONEST: dict[str, Form] = {
    "s on t": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a) * s, b),
    "s on x": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x * s, a), b),
    "s on A": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a * s), b),
    "s on B": lambda x, w, bias, a, b, s: linear(x, w, bias) + linear(linear(x, a), b * s),
    "s on y": lambda x, w, bias, a, b, s: linear(x, w, bias) + s * linear(linear(x, a), b),
    "addmm": lambda x, w, bias, a, b, s: torch.addmm(linear(x, w, bias), linear(x, a), b.T, alpha=s),
    "einsum": lambda x, w, bias, a, b, s: linear(x, w, bias) + torch.einsum("ni,ri,or->no", x, a, b * s),
    "bmm": lambda x, w, bias, a, b, s: linear(x, w, bias) + (x[:, None] @ a.T[None] @ (s * b).T[None])[:, 0],
    "columns": lambda x, w, bias, a, b, s: linear(x, turned(w), bias) + linear(linear(turned(x), turned(a)) * s, b),
    "fused": lambda x, w, bias, a, b, s: linear(torch.cat([x, linear(x, a) * s], 1), torch.cat([w, b], 1), bias),
    "base last": lambda x, w, bias, a, b, s: linear(torch.cat([linear(x, a), x], 1), torch.cat([b * s, w], 1), bias),
    "wide": lambda x, w, bias, a, b, s: linear(x, w, bias) + (s * linear(linear(*wide(x, a)), *wide(b))).to(x.dtype),
    "bias first": bias_first,
    "bias last": lambda x, w, bias, a, b, s: linear(x, w) + linear(linear(x, a) * s, b) + (0 if bias is None else bias),
    "rounded once": rounded_once,
    "row by row": lambda x, w, bias, a, b, s: torch.stack(
        [linear(t, w, bias) + linear(linear(t, a) * s, b) for t in x]
    ),
}
PRODUCTS: dict[str, Product] = {
    "s on BA": lambda a, b, s: s * (b @ a),
    "s on B": lambda a, b, s: (s * b) @ a,
    "s on A": lambda a, b, s: b @ (s * a),
    "turned": lambda a, b, s: ((a.T @ b.T) * s).T,
    "wide": lambda a, b, s: s * torch.mm(*wide(b, a)),
    "wide, rounded": lambda a, b, s: (s * torch.mm(*wide(b, a))).to(a.dtype),
}


def merges(w: Tensor, a: Tensor, b: Tensor, s: float) -> dict[str, Tensor]:
    merged = {name: (w + product(a, b, s)).to(w.dtype) for name, product in PRODUCTS.items()}
    merged["addmm"] = torch.addmm(w, b, a, alpha=s)
    merged["wide addmm"] = torch.addmm(*wide(w, b, a), alpha=s).to(w.dtype)
    return merged


def computed(problem: Problem, factors: Factors, s: float) -> dict[str, dict[str, Tensor]]:
    """What honest implementations get, by what it is and by name."""
    (x, w, bias, grad, *_), a, b = problem, factors.a, factors.b
    weights = merges(w, a, b, s)
    results: dict[str, dict[str, Tensor]] = {
        "y": {name: form(x, w, bias, a, b, s) for name, form in HONEST.items()},
        "W merged": weights,
        "y merged": {name: linear(x, weight, bias) for name, weight in weights.items()},
        "W restored": {
            f"{name}, by {undo}": restored
            for name, weight in weights.items()
            for undo, restored in merges(weight, a, b, -s).items()
        },
    }
    x, a, b = (tensor.detach().clone().requires_grad_() for tensor in (x, a, b))
    outputs = {name: form(x, w, bias, a, b, s) for name, form in HONEST.items()}
    del outputs["row by row"]  # its rows' gradients are summed in the dtype, which is not honest
    outputs |= {f"through {name}": linear(x, weight, bias) for name, weight in merges(w, a, b, s).items()}
    gradients = {name: torch.autograd.grad(y, (a, b, x), grad, retain_graph=True) for name, y in outputs.items()}
    return results | {
        of: {name: found[place] for name, found in gradients.items()} for place, of in enumerate(("dA", "dB", "dx"))
    }


def judged(problem: Problem, factors: Factors, s: float, arithmetic: Arithmetic) -> dict[str, tuple[Tensor, Tensor]]:
    """What the definition says and the bounds allow, by what it is."""
    x, w, bias, grad, *_ = problem
    y = definition.forward(x, w, bias, factors, s)
    gradients = definition.gradients(x, grad, w, factors, s)
    allowed = bounds.gradients(x, grad, w, factors, s, arithmetic)
    return {
        "y": (y, bounds.separate(x, w, bias, factors, s, arithmetic)),
        "W merged": (definition.merged_weight(w, factors, s), bounds.merged_weight(w, factors, s, arithmetic)),
        "y merged": (y, bounds.merged(x, w, bias, factors, s, arithmetic)),
        "W restored": (w.double(), bounds.unmerged_weight(w, factors, s, arithmetic)),
    } | dict(zip(("dA", "dB", "dx"), zip(gradients, allowed, strict=True), strict=True))


def check(problem: Problem, factors: Factors, s: float, *, flush: bool = False) -> None:
    torch.set_flush_denormal(flush)
    try:
        results = computed(problem, factors, s)
    finally:
        torch.set_flush_denormal(False)
    for of, (wanted, allowed) in judged(problem, factors, s, Arithmetic.of(problem.x.dtype)).items():
        for name, found in results[of].items():
            assert found.dtype == problem.x.dtype
            deviation = worst(found, wanted, allowed)
            assert deviation.ratio <= 1, f"{of}, {name}: {deviation}"


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
    check(problem, problem.adapters[0][1], case.spec.scaling)


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
    check(bare, Factors(a, b), case.spec.scaling, flush=flush)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("size", [1, 16])
def test_a_sum_may_lose_each_of_many_small_terms(dtype: torch.dtype, rank: int, size: int) -> None:
    # 1 + e + ... + e with e just under half a unit in the last place of 1: added one after another, each e is lost.
    x, w, a = (torch.ones(rows, 1, dtype=dtype) for rows in (size, size, rank))
    factors = Factors(a, torch.full((size, rank), 0.98 * UNIT_ROUNDOFF[dtype], dtype=dtype))
    check(Problem(x, w, None, torch.ones(size, size, dtype=dtype), [], torch.empty(0)), factors, 1.0)


def worst_rounded(problem: Problem, factors: Factors, s: float, arithmetic: Arithmetic) -> dict[str, list[Tensor]]:
    """What comes of positive numbers where everything read and every rounding errs upward by the most that it may."""
    more, lost = 1 + arithmetic.unit, arithmetic.underflow
    (x, w, bias, grad, *_), a, b, exact = problem, factors.a, factors.b, s * factors.b @ factors.a
    x, w, a, b, grad = (tensor + lost for tensor in (x, w, a, b, grad))

    def keep(values: Tensor) -> Tensor:
        return more * values + lost

    def dot(left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> Tensor:
        """left @ right stored, each term added to the last and the first to `start`."""
        terms = (1 + arithmetic.operand) ** 2 * more**arithmetic.partials * left @ right + left.shape[1] * lost
        return keep((1 + arithmetic.accumulator) ** left.shape[1] * (start + terms))

    def times(values: Tensor) -> Tensor:
        return keep(more * s * values)

    def product(*factors: Tensor) -> list[Tensor]:
        """s times a product from left to right, s at each of its places."""
        results = [factors[0], times(factors[0])]  # the last has its s
        for factor in factors[1:]:
            plain, scaled = results[0], results[1:]
            results = [dot(plain, factor), *(dot(one, factor) for one in scaled), dot(plain, times(factor))]
            results.append(times(results[0]))
        return results[1:]

    def with_bias(y: Tensor) -> Tensor:
        return y if bias is None else keep(y + bias)

    start = 0.0 if bias is None else bias
    base, hidden, through_b, back = dot(x, w.T), times(dot(x, a.T)), times(dot(grad, b)), dot(grad, w)
    deltas, products = product(x, a.T, b.T), product(b, a)
    unstored = dot(times(b), a) / more
    weights = [*(keep(w + one) for one in products), dot(times(b), a, w), dot(b, times(a), w)]
    return {
        "y": [
            *(keep(with_bias(base) + delta) for delta in deltas),
            *(with_bias(keep(base + delta)) for delta in deltas),
            dot(hidden, b.T, dot(x, w.T, start)),
            dot(torch.cat([x, hidden], 1), torch.cat([w, b], 1).T, start),
        ],
        "W merged": weights,
        "y merged": [result for w in weights for result in (with_bias(dot(x, w.T)), dot(x, w.T, start))],
        # What is taken away errs the other way.
        "W restored": [
            *(keep(w - exact + (one - exact)) for w in weights for one in products),
            *(keep((1 + arithmetic.accumulator) ** b.shape[1] * w - exact + (unstored - exact)) for w in weights),
        ],
        "dA": [*product(b.T, grad.T, x), *(one.T for one in product(x.T, grad, b))],
        "dB": [*product(grad.T, x, a.T), *(one.T for one in product(a, x.T, grad))],
        "dx": [
            *(keep(back + one) for one in product(grad, b, a)),
            *(dot(grad, w) for w in weights),
            dot(torch.cat([grad, through_b], 1), torch.cat([w, a])),
        ],
    }


@pytest.mark.parametrize("zero", ["nothing", "all but W", "all but the bias", "all but B"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "arithmetic", "reached"),
    [
        (1, Arithmetic(2.0**-9, 2.0**-24, 0.0), 0.99),  # few roundings, and the bounds count each one
        (1, Arithmetic(2.0**-9, 2.0**-24, 0.0, operand=2.0**-10, partials=2), 0.99),
        (64, Arithmetic(2.0**-24, 2.0**-24, 0.0), 0.95),  # long sums, and the bounds count each term
        (1, Arithmetic(0.0, 0.0, 2.0**-30), 0.0),
        (8, Arithmetic(0.0, 0.0, 2.0**-30), 0.0),
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_bounds_are_reached_by_the_worst_rounding(
    size: int, arithmetic: Arithmetic, reached: float, biased: bool, zero: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** torch.randint(-6, 7, (6, 1, 1), generator=generator)
    x, w, a, b, grad, bias = sizes * torch.rand(6, size, size, generator=generator, dtype=torch.float64)
    s = 2.0 ** float(torch.randint(-3, 6, (), generator=generator))
    w, b, bias = w * (zero in ("nothing", "all but W")), b * (zero in ("nothing", "all but B")), bias[0]
    bias = bias * (zero in ("nothing", "all but the bias"))
    given_ = Problem(x, w, bias if biased else None, grad, [], torch.empty(0)), Factors(a, b), s, arithmetic
    results = worst_rounded(*given_)
    for of, (wanted, allowed) in judged(*given_).items():
        ratios = torch.stack([(found - wanted).abs() / allowed for found in results[of]]).amax(0)
        assert ratios.max() <= 1, of
        assert ratios.min() >= reached or zero == "nothing" or not wanted.any(), of


@given(cases(dtype=st.just("fp64")))
def test_the_definitions_own_rounding_is_allowed_for(case: Case) -> None:
    given_ = (problem := case.draw()), problem.adapters[0][1], case.spec.scaling
    exact, rounded = judged(*given_, Arithmetic(0.0, 0.0, 0.0)), judged(*given_, Arithmetic.of(torch.float64))
    for of in exact:
        assert exact[of][1].all()
        assert torch.equal(2 * exact[of][1], rounded[of][1])


EVERYTHING = "y dA dB dx"
FAULTS = {"dropped": EVERYTHING, "doubled": EVERYTHING, "1 % more": EVERYTHING, "rolled": "y dA dB", "bare": "y"}


@each_dtype
@pytest.mark.parametrize(("fault", "spoils"), FAULTS.items())
def test_what_is_visible_exceeds_the_bounds(dtype: str, fault: str, spoils: str) -> None:
    seen = dict.fromkeys(spoils.split(), 0)
    for seed in range(24):
        case = Case(dtype=dtype, seed=seed, gain=(1, 4, 0.01)[seed % 3], bias=True)
        (problem, s), arithmetic = (case.draw(), case.spec.scaling), Arithmetic.of(case.torch_dtype)
        factors = problem.adapters[0][1]
        wrong_s = {"dropped": 0.0, "doubled": 2 * s, "1 % more": 1.01 * s}.get(fault, s)
        x, bias = problem.x.roll(int(fault == "rolled"), 0), None if fault == "bare" else problem.bias
        wrong = problem._replace(x=x, bias=bias), factors, wrong_s
        wanted, results = judged(problem, factors, s, arithmetic), computed(*wrong)
        for of, (faulty, also) in judged(*wrong, arithmetic).items():
            exact, allowed = wanted[of]
            if visibility(faulty - exact, torch.maximum(allowed, also)) > 1:
                assert all(worst(found, exact, allowed).ratio > 1 for found in results[of].values()), of
                seen[of] = seen.get(of, 0) + 1

    # In 16 bits 1 % of the adapter hides in the roundings; where B is a hundredth, all of it may.
    least = 24 if dtype in ("fp64", "fp32") else 0 if fault == "1 % more" else 12
    assert all(seen[of] >= least for of in spoils.split()), seen


@each_dtype
@given(sums=st.lists(st.integers(1, 300), max_size=3).map(tuple), roundings=st.integers(0, 6))
def test_growth_is_that_of_higham(dtype: str, sums: tuple[int, ...], roundings: int) -> None:
    arithmetic = Arithmetic.of(Case(dtype=dtype).torch_dtype)
    unit, accumulator = Fraction(arithmetic.unit), Fraction(arithmetic.accumulator)
    chain = gammas = (1 + unit) ** roundings
    for terms in sums:
        chain *= (1 + accumulator) ** terms
        gammas *= 1 / (1 - terms * accumulator)  # 1 + gamma_n

    growth = Fraction(arithmetic.growth(sums, roundings))
    assert gammas >= chain
    assert abs(growth - (gammas - 1)) <= (gammas - 1) * Fraction(1, 2**45)


def test_long_sums_may_be_judged_by_the_probable_error() -> None:
    spread = 4 * 64 * 2.0**-24

    assert Arithmetic.of(torch.float32, probabilistic=True).gamma(4096) == spread / (1 - spread)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bounds are known for torch\.float64, .*, got torch\.int8"):
        Arithmetic.of(torch.int8)


CUBLAS, MKL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("home", "setting", "value", "dtype", "device", "allowed"),
    [
        (CUBLAS, "allow_tf32", True, torch.float32, "cuda:1", {"operand": 2.0**-11}),
        (CUBLAS, "fp32_precision", "tf32", torch.float32, "cuda", {"operand": 2.0**-11}),
        (torch.backends, "fp32_precision", "tf32", torch.float32, "cuda", {"operand": 2.0**-11}),
        (CUBLAS, "allow_bf16_reduced_precision_reduction", True, torch.bfloat16, "cuda", {"partials": 2}),
        (CUBLAS, "allow_fp16_reduced_precision_reduction", True, torch.float16, "cuda", {"partials": 2}),
        (CUBLAS, "allow_fp16_accumulation", True, torch.float16, "cuda", {"accumulator": 2.0**-11}),
        (MKL, "fp32_precision", "bf16", torch.float32, "cpu", {"operand": 2.0**-8}),
    ],
)
def test_the_settings_of_the_device_are_read(
    home: Any, setting: str, value: object, dtype: torch.dtype, device: str, allowed: dict[str, Any]
) -> None:
    reductions = [(CUBLAS, f"allow_{name}_reduced_precision_reduction", False) for name in ("bf16", "fp16")]
    usual = {dtype: Arithmetic.of(dtype) for dtype in UNIT_ROUNDOFF}
    with ExitStack() as settled:
        for where, name, to in [(CUBLAS, "fp32_precision", "none"), *reductions, (home, setting, value)]:
            settled.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, to)
        found = {place: {dtype: Arithmetic.of(dtype, place) for dtype in usual} for place in ("cpu", device)}

    assert found[device].pop(dtype) == replace(usual[dtype], **allowed)
    assert found[device] == {other: usual[other] for other in found[device]}
    assert found["cpu"] == usual or home is not CUBLAS


# found, wanted, allowed, ratio
SPECIAL = """1.5 1 .25 2, 1 1 0 0, 1.5 1 0 inf, 1.5 1 inf 0, 1 2 nan inf, inf 1 1 inf, 1 inf 1 inf, -inf inf 1 inf, \
inf 1 inf inf, inf inf 0 0, nan 1 1 inf, 1 nan 1 inf, nan nan 0 0"""


@pytest.mark.parametrize("values", SPECIAL.split(", "))
def test_the_deviation_of_special_values(values: str) -> None:
    *tensors, ratio = (torch.tensor([[0.0, float(value)]], dtype=torch.float64) for value in values.split())

    deviation = worst(*tensors)
    assert deviation.ratio == ratio[0, 1]
    assert deviation.at == (0, int(ratio[0, 1] > 0))


def test_worst_is_the_largest_ratio_not_the_largest_error() -> None:
    deviation = worst(torch.tensor([[9.0, 1.0], [1.0, 3.0]]), torch.ones(2, 2), torch.tensor([100.0, 1.0]))

    assert deviation == ((1, 1), 3.0, 1.0, 2.0, 1.0)
    assert worst(torch.ones(0, 3), torch.ones(0, 3)).ratio == 0
    assert worst(*torch.tensor([[3.0], [1.0], [4.0]], requires_grad=True)).ratio == 0.5
    assert worst(torch.tensor(2.0), torch.tensor(1.0), 0.5) == ((), 2.0, 1.0, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"shapes differ: found \(3,\), wanted \(1, 3\)"):
        worst(torch.ones(3), torch.ones(1, 3))


def test_visibility_is_that_of_the_clearest_place() -> None:
    allowed = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    assert visibility(torch.tensor([-4.0, 1.0, 0.0, math.nan]), allowed) == 2
    assert visibility(torch.tensor([0.0, 0.0, 1e-30, 0.0]), allowed) > 1e300
    assert visibility(torch.ones(0), torch.ones(0)) == 0
