"""The bounds of LoRA in attention: the worst rounding comes near them, step by step."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_bench import attention, bounds
from lora_bench.attention import Adapted, Estimate, Inputs, Projection
from lora_bench.bounds import Arithmetic
from tests.attention_trials import brief, drawn, ratio


class Rounding:
    """A computation in which every number errs by the most that it may, in the direction of `signs`, or by nothing."""

    def __init__(self, arithmetic: Arithmetic, signs: list[Tensor] | None = None) -> None:
        self.arithmetic, self.signs, self.drawn = arithmetic, signs, list[Tensor]()

    def stray(self, values: Tensor, by: float) -> Tensor:
        sign = torch.zeros_like(values).requires_grad_() if self.signs is None else self.signs[len(self.drawn)]
        self.drawn.append(sign)
        return values * torch.exp(math.log1p(by) * sign)

    def keep(self, values: Tensor) -> Tensor:
        return self.stray(values, self.arithmetic.unit)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        terms = left.unsqueeze(-1) * right.unsqueeze(-3)
        return self.keep(self.stray(terms, self.arithmetic.gamma(left.shape[-1])).sum(-2))

    def project(self, x: Tensor, part: Projection) -> Tensor:
        adapter = self.keep(self.keep(self.dot(part.factors.b, part.factors.a)) * part.scaling)
        y = self.dot(x, self.keep(part.weight + adapter).T)
        return y if part.bias is None else self.keep(y + part.bias)

    def attend(self, inputs: Inputs, layer: Adapted) -> Tensor:
        parts = zip(inputs[:3], layer.in_proj.thirds, strict=True)
        q, k, v = (self.project(x, part).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x, part in parts)
        scale = self.keep(self.keep(torch.full_like(q, q.shape[-1] ** -0.5)))
        weights = self.softmax(self.dot(self.keep(q * scale), k.mT))
        return self.project(self.dot(weights, v).transpose(1, 2).flatten(2), layer.out_proj)

    def softmax(self, logits: Tensor) -> Tensor:
        difference = logits - logits.amax(-1, keepdim=True)
        power = self.stray(self.keep(difference).exp(), 40 * self.arithmetic.accumulator + 2 * self.arithmetic.unit)
        total = self.keep(self.stray(power, self.arithmetic.gamma(power.shape[-1])).sum(-1, keepdim=True))
        return self.keep(self.keep(power) * self.keep(1 / total))


def furthest(compute: Callable[[Rounding], Tensor], arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """A number that comes of roundings, without them and with all of them upward or downward, whichever adds up."""
    honest = Rounding(arithmetic)
    exact = compute(honest)
    signs = [slope.sign() for slope in torch.autograd.grad(exact, honest.drawn)]
    return exact.detach(), compute(Rounding(arithmetic, signs)).detach()


@brief
@given(st.integers(0, 2**16), st.sampled_from([0.05, 0.3]), st.sampled_from([2.0**-10, 2.0**-16, 2.0**-24]))
def test_the_worst_rounding_comes_near_the_bound(seed: int, size: float, unit: float) -> None:
    inputs, layer, _ = drawn(seed=seed, size=size, gain=size)
    arithmetic = Arithmetic(unit, unit, 0.0)
    exact, found = furthest(lambda rounding: rounding.attend(inputs, layer)[0, 0, 0], arithmetic)
    wanted = attention.forward(inputs, layer).output[0, 0, 0]
    allowed = attention.merged_bound(inputs, layer, arithmetic).output[0, 0, 0]

    torch.testing.assert_close(exact, wanted)
    # Over 900 seeds it was 0.08 to 0.46; not every sign can be the worst one at once.
    assert 0.05 < ratio(found, wanted, allowed) <= 1


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("spread", "unit", "accumulator"),
    [(0.0, 2.0**-16, 2.0**-16), (40.0, 2.0**-16, 2.0**-16), (40.0, 2.0**-12, 2.0**-18)],
)
def test_the_worst_rounding_of_a_softmax_comes_near_its_bound(
    place: int, spread: float, unit: float, accumulator: float
) -> None:
    arithmetic = Arithmetic(unit, accumulator, 0.0)
    logits = spread * torch.tensor([[0.0, -0.5, -1.0]], dtype=torch.float64)
    p, found = furthest(lambda rounding: rounding.softmax(logits)[0, place], arithmetic)
    allowed = attention.softmax(Estimate(logits, torch.zeros_like(logits)), None, arithmetic).error[0, place]

    assert 0.01 < ratio(found, p, allowed) <= 1


@pytest.mark.parametrize("way", ["separate", "merged"])
def test_the_bound_allows_for_both_ways_of_a_projection(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layer, _ = drawn()
    allowed, own = attention.bound(inputs, layer, Arithmetic.of(torch.float64)), getattr(bounds, way)
    monkeypatch.setattr(bounds, way, lambda *of: 1000 * own(*of))
    looser = attention.bound(inputs, layer, Arithmetic.of(torch.float64))

    assert all((one > 2 * other).all() for one, other in zip(looser, allowed, strict=True))


def test_a_product_carries_the_errors_of_both_and_its_own() -> None:
    generator, arithmetic = torch.Generator().manual_seed(0), Arithmetic(2.0**-8, 2.0**-12, 0.0)
    x, y, ex, ey = (torch.rand(*shape, generator=generator).double() for shape in [(3, 5), (5, 2)] * 2)
    allowed = attention.product(Estimate(x, ex), Estimate(y, ey), arithmetic, roundings=3).error

    # Of positive numbers that all err upward.
    torch.testing.assert_close(x @ y + allowed, (1 + arithmetic.growth((5,), 3)) * (x + ex) @ (y + ey))


@pytest.mark.parametrize("largest", [1e-6, 0.1, 3.0, 40.0, 290.0])
@given(seed=st.integers(0, 2**16))
def test_the_range_of_the_softmax_is_that_of_its_extremes(largest: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, error = 5 * torch.randn(3, 5, generator=generator), largest * torch.rand(3, 5, generator=generator)
    logits, error, none = logits.double(), error.double(), Arithmetic(0.0, 0.0, 0.0)
    signs = 2 * torch.eye(5, dtype=torch.float64) - 1  # one logit upward, all others downward
    least, most = (
        (logits[:, None] + sign * signs * error[:, None]).softmax(-1).diagonal(dim1=1, dim2=2) for sign in (-1, 1)
    )
    p, allowed = attention.softmax(Estimate(logits, error), None, none)

    torch.testing.assert_close(allowed, torch.maximum(most - p, p - least), rtol=1e-7, atol=1e-12)


def test_a_probability_of_which_nothing_is_known_may_be_anything() -> None:
    logits, hidden = Estimate(torch.zeros(1, 3).double(), torch.full((1, 3), 400.0).double()), torch.arange(3) == 1

    assert (attention.softmax(logits, hidden, Arithmetic.of(torch.float64)).error >= torch.tensor([1, 0, 1])).all()
    assert attention.softmax(logits, hidden, Arithmetic.of(torch.float64)).error[0, 1] < 1e-300
