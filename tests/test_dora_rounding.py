"""The bounds of DoRA: the worst rounding comes near them."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora_bench import dora
from lora_bench.bounds import Arithmetic
from lora_bench.case import Problem
from lora_bench.spec import Factors
from tests.dora_forms import judged, magnitude_of


@dataclass(frozen=True)
class Worst:
    """An arithmetic in which everything read and every rounding errs by the most that it may, upward or downward."""

    arithmetic: Arithmetic
    s: float
    way: int

    @property
    def other(self) -> "Worst":
        return replace(self, way=-self.way)

    def read(self, values: Tensor) -> Tensor:
        return values + self.way * self.arithmetic.underflow

    def keep(self, values: Tensor) -> Tensor:
        return self.read(values + self.way * self.arithmetic.unit * values.abs())

    def summed(self, terms: Tensor, count: int, start: Tensor | float = 0.0) -> Tensor:
        """Positive products, added one by one to the first or to `start`, and stored."""
        way, of = self.way, self.arithmetic
        terms = (1 + way * of.operand) ** 2 * (1 + way * of.unit) ** of.partials * terms + way * count * of.underflow
        return self.keep((1 + way * of.accumulator) ** count * (start + terms))

    def dot(self, left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> Tensor:
        return self.summed(self.read(left) @ self.read(right), left.shape[1], start)

    def times(self, values: Tensor) -> Tensor:
        return self.keep((1 + self.way * self.arithmetic.unit) * self.s * values)

    def product(self, *parts: Tensor) -> list[Tensor]:
        """s times a product from left to right, s at each of its places."""
        results = [parts[0], self.times(parts[0])]
        for part in parts[1:]:
            s_on_part = self.dot(results[0], self.times(part))
            results = [*(self.dot(one, part) for one in results), s_on_part]
            results.append(self.times(results[0]))
        return results[1:]

    def weights(self, w: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        """W + s B A."""
        sums = [self.keep(self.read(w) + one) for one in self.product(b, a)]
        return [*sums, self.dot(self.times(b), a, w), self.dot(b, self.times(a), w)]

    def furthest(self, values: list[Tensor]) -> Tensor:
        return self.way * (self.way * torch.stack(values)).amax(0)

    def norm(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        squares = [self.summed(self.keep(one**2).sum(1), w.shape[1]) for one in self.weights(w, a, b)]
        length = self.keep(self.furthest(squares).clamp(min=0).sqrt()).clamp(min=0)
        return self.keep(length + 2 * self.arithmetic.unit) if self.way > 0 else length


def worst_rounded(problem: Problem, factors: Factors, of: Worst) -> dict[str, list[Tensor]]:
    """What comes of positive numbers in the worst arithmetic.

    What is divided by, and what c - 1 < 0 multiplies, errs the other way.
    """
    (x, w, bias, grad, *_), a, b, m = problem, factors.a, factors.b, of.read(magnitude_of(factors))
    keep, dot, product, exact = of.keep, of.dot, of.product, of.s * b @ a
    n = of.other.norm(w, a, b)
    c = of.read(keep(m / n))
    rise = keep(c - 1)
    against = of.other if rise.sum() < 0 else of

    def with_bias(y: Tensor) -> list[Tensor]:
        return [y] if bias is None else [keep(of.read(y + bias))]

    def layer(weight: Tensor) -> list[Tensor]:
        return [*with_bias(dot(x, weight.T)), dot(x, weight.T, 0.0 if bias is None else bias)]

    sums, deltas, parts = of.weights(w, a, b), product(x, a.T, b.T), product(b, a)
    merges = [
        *(keep(c[:, None] * one) for one in sums),
        *(keep(m[:, None] * keep(one / n[:, None])) for one in sums),
        *(keep(keep(c[:, None] * w) + keep(c[:, None] * one)) for one in parts),
    ]
    merged_y = [
        *(y for one in merges for y in layer(one)),
        *(y for one in sums for y in with_bias(keep(c * dot(x, one.T)))),
    ]
    base = of.furthest(layer(w))
    freed = of.furthest([dot(x, w.T), *([] if bias is None else [keep(base - bias)])])
    again = keep(rise * (freed if against is of else against.dot(x, w.T)))
    gain = of.furthest([keep(c * delta) for delta in deltas])
    inverse = of.read(keep(of.read(n) / m))[:, None]
    scaled, risen = keep(c * of.read(grad)), keep(rise * against.read(grad))
    apart = dot(risen, w) if against is of else -against.dot(-risen, w)
    back = [dot(keep(of.read(grad) + risen), w), keep(dot(grad, w) + apart)]
    turned = [*(keep(freed + delta) for delta in deltas), *(dot(x, one.T) for one in sums)]
    return {
        "norm": [n],
        "y": [
            *(keep(base + keep(again + gain)), keep(keep(base + again) + gain)),
            *(keep(base + dot(x, keep(one - w).T)) for one in merges),
            *(y for delta in deltas for y in with_bias(keep(c * keep(dot(x, w.T) + delta)))),
            *merged_y,
        ],
        "W merged": merges,
        "y merged": merged_y,
        "W restored": [
            keep(keep(inverse * one) - exact + (exact - part)) for one in merges for part in of.other.product(b, a)
        ],
        "dA": product(b.T, scaled.T, x),
        "dB": product(scaled.T, x, a.T),
        "dx": [
            *(keep(one + delta) for one in back for delta in product(scaled, b, a)),
            *(dot(grad, one) for one in merges),
            *(dot(scaled, one) for one in sums),
        ],
        "dm": [keep(of.summed(keep(of.read(grad) * one).sum(0), len(x)) / n) for one in turned],
    }


REACHED = {"norm": 0.95, "W merged": 0.95, "y merged": 0.9, "W restored": 0.5, "dA": 0.95, "dB": 0.95, "dm": 0.8}


# Where c is small, what is base + (c - 1) base + ... may err as the base does, and its last sums do not.
@pytest.mark.parametrize(
    ("c", "reached", "biased"), [(0.01, 0.3, True), (1.0, 0.5, False), (1.0, 0.5, True), (100.0, 0.75, True)]
)
@pytest.mark.parametrize("zero", ["nothing", "all but W", "all but the bias", "all but B"])
@pytest.mark.parametrize(
    ("size", "arithmetic"),
    [
        (1, Arithmetic(2.0**-9, 2.0**-24, 0.0)),  # few roundings, and the bounds count each one
        (1, Arithmetic(2.0**-9, 2.0**-24, 0.0, operand=2.0**-10, partials=2)),
        (32, Arithmetic(2.0**-24, 2.0**-24, 0.0)),  # long sums, and the bounds count each term
        (1, Arithmetic(0.0, 0.0, 2.0**-30)),
        (8, Arithmetic(0.0, 0.0, 2.0**-30)),
    ],
)
def test_bounds_are_reached_by_the_worst_rounding(
    size: int, arithmetic: Arithmetic, biased: bool, zero: str, c: float, reached: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-6, 7, (6, 1, 1), generator=generator)
    x, w, a, b, grad, bias = sizes * torch.rand(6, size, size, generator=generator, dtype=torch.float64)
    s = 2.0 ** float(torch.randint(-3, 6, (), generator=generator))
    x, b, bias = x * (zero != "all but the bias"), b * (zero in ("nothing", "all but B")), bias[0]
    w, bias = w * (zero != "all but B"), bias * (zero in ("nothing", "all but the bias"))
    factors = Factors(a, b, magnitude=c * dora.norms(w, Factors(a, b), s))
    given_ = Problem(x, w, bias if biased else None, grad, [], torch.empty(0)), factors
    up, down = (worst_rounded(*given_, Worst(arithmetic, s, way)) for way in (1, -1))
    for of, (wanted, allowed) in judged(*given_, s, arithmetic).items():
        ratios = torch.stack([(found - wanted).abs() / allowed for found in up[of] + down[of]]).amax(0)
        assert ratios.max() <= 1, of
        assert ratios.min() >= REACHED.get(of, reached) or not arithmetic.unit or not wanted.any(), of
