"""The bounds: the worst rounding reaches them."""

import pytest
import torch
from torch import Tensor

from lora_bench.bounds import Arithmetic
from lora_bench.case import Problem
from lora_bench.spec import Factors
from tests.lora_forms import judged


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
