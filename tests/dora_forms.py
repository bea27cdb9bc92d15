"""DoRA as honest implementations compute it, and as the definition and its bounds do."""

from collections.abc import Callable
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_bench import dora
from lora_bench.bounds import Arithmetic
from lora_bench.case import Problem
from lora_bench.spec import Factors


class Terms(NamedTuple):
    """What a layer computes with, its norm included."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    s: float
    m: Tensor
    n: Tensor

    @property
    def c(self) -> Tensor:
        return self.m / self.n

    @property
    def column(self) -> Tensor:
        """c, times rows of a weight."""
        return self.c[:, None]

    @property
    def wide(self) -> "Terms":
        """In float32 or wider."""
        x, w, a, b, m, n = map(far, (self.x, self.w, self.a, self.b, self.m, self.n))
        return Terms(x, w, None if self.bias is None else far(self.bias), a, b, self.s, m, n)

    def plus_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


Form = Callable[[Terms], Tensor]
SLOPES = ("dA", "dB", "dx", "dm")


def far(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def magnitude_of(factors: Factors) -> Tensor:
    assert factors.magnitude is not None
    return factors.magnitude


def from_base(t: Terms, y: Tensor) -> Tensor:
    """What PEFT does, of the base's output."""
    without_bias = y if t.bias is None else y - t.bias
    return y + ((t.c - 1) * without_bias + t.c * linear(linear(t.x, t.a), t.b) * t.s)


HONEST: dict[str, Form] = {
    "from the base": lambda t: from_base(t, linear(t.x, t.w, t.bias)),
    "wide but for the base": lambda t: from_base(t.wide, far(linear(t.x, t.w, t.bias))).to(t.x.dtype),
    "base twice": lambda t: (
        linear(t.x, t.w, t.bias) + (t.c - 1) * linear(t.x, t.w) + linear(linear(t.x, t.a), t.column * t.s * t.b)
    ),
    "what the weight gains": lambda t: (
        linear(t.x, t.w, t.bias) + linear(t.x, t.column * (t.w + t.s * (t.b @ t.a)) - t.w)
    ),
    "c last": lambda t: t.plus_bias(t.c * (linear(t.x, t.w) + t.s * linear(linear(t.x, t.a), t.b))),
    "c on both": lambda t: linear(t.x, t.column * t.w, t.bias) + linear(linear(t.x, t.a) * t.s, t.column * t.b),
    "direction": lambda t: t.plus_bias(t.m * linear(t.x, (t.w + t.s * (t.b @ t.a)) / t.n[:, None])),
    "weight": lambda t: linear(t.x, t.column * (t.w + (t.s * t.b) @ t.a), t.bias),
    "weight in parts": lambda t: linear(t.x, t.column * t.w + (t.column * t.s * t.b) @ t.a, t.bias),
}
MERGES: dict[str, Form] = {
    "c on the sum": lambda t: t.column * (t.w + t.s * (t.b @ t.a)),
    "direction": lambda t: t.m[:, None] * ((t.w + (t.s * t.b) @ t.a) / t.n[:, None]),
    "in parts": lambda t: t.column * t.w + (t.column * t.s * t.b) @ t.a,
    "wide": lambda t: (t.wide.column * torch.addmm(t.wide.w, t.wide.b, t.wide.a, alpha=t.s)).to(t.w.dtype),
}


def expanded(w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """The norm without the sum, ||W||² + 2 s W·BA + s² ||BA||², which cancels: honest in a wider dtype alone."""
    squares = (w * w).sum(1) + 2 * s * ((w @ a.T) * b).sum(1) + s**2 * ((b @ (a @ a.T)) * b).sum(1)
    return squares.clamp(min=0).sqrt()


def lengths(w: Tensor, a: Tensor, b: Tensor, s: float) -> dict[str, Tensor]:
    """Norms of sums that were rounded on the way, and of others."""
    through_eye = w + s * linear(linear(torch.eye(a.shape[1], dtype=a.dtype), a), b).T
    found = {
        "norm": torch.linalg.norm(w + s * (b @ a), dim=1),
        "never zero": through_eye.norm(dim=1) + torch.finfo(w.dtype).eps,
        "squares": ((w + b @ (s * a)) ** 2).sum(1).sqrt(),
        "dots": torch.einsum("oi,oi->o", through_eye, through_eye).sqrt(),
        "wide": torch.addmm(far(w), far(b), far(a), alpha=s).norm(dim=1).to(w.dtype),
    }
    return found | ({"expanded": expanded(far(w), far(a), far(b), s).to(w.dtype)} if w.dtype.itemsize == 2 else {})


UNMERGES: dict[str, Callable[[Terms, Tensor], Tensor]] = {
    "by c": lambda t, merged: merged / t.column - t.s * (t.b @ t.a),
    "by 1/c": lambda t, merged: merged * (t.n / t.m)[:, None] - t.b @ (t.s * t.a),
}


def computed(problem: Problem, factors: Factors, s: float, turn: int = 0) -> dict[str, dict[str, Tensor]]:
    """What honest implementations get, by what it is and by name; each has one of the norms, the next at each turn."""
    x, w, bias, grad, *_ = problem
    norms = lengths(w, factors.a, factors.b, s)
    results: dict[str, dict[str, Tensor]] = {of: {} for of in ("y", "W merged", "y merged", "W restored", *SLOPES)}
    a, b, x, m = (
        tensor.detach().clone().requires_grad_() for tensor in (factors.a, factors.b, x, magnitude_of(factors))
    )
    turns = cycle([(length, Terms(x, w, bias, a, b, s, m, n)) for length, n in norms.items()])
    for (length, terms), (name, form) in zip(islice(turns, turn, None), HONEST.items(), strict=False):
        y = form(terms)
        results["y"][f"{name}, {length}"] = y.detach()
        for of, slope in zip(SLOPES, torch.autograd.grad(y, (a, b, x, m), grad), strict=True):
            results[of][f"{name}, {length}"] = slope
    with torch.no_grad():
        for (length, terms), (name, form) in zip(turns, MERGES.items(), strict=False):
            merged = results["W merged"][f"{name}, {length}"] = form(terms)
            results["y merged"][f"{name}, {length}"] = linear(x, merged, bias)
            for undo, unmerge in UNMERGES.items():
                results["W restored"][f"{name}, {length}, {undo}"] = unmerge(terms, merged)
    return results | {"norm": norms}


def judged(problem: Problem, factors: Factors, s: float, arithmetic: Arithmetic) -> dict[str, tuple[Tensor, Tensor]]:
    """What the definition says and the bounds allow, by what it is."""
    x, w, bias, grad, *_ = problem
    layer, adapter = (x, w, bias, factors, s), (w, factors, s)
    y, slopes = dora.forward(*layer), dora.gradients(x, grad, *adapter)
    allowed = dora.gradient_bounds(x, grad, *adapter, arithmetic, bias=bias)
    return {
        "norm": (dora.norms(*adapter), dora.norm_bound(*adapter, arithmetic)),
        "y": (y, dora.separate_bound(*layer, arithmetic)),
        "W merged": (dora.merged_weight(*adapter), dora.merged_weight_bound(*adapter, arithmetic)),
        "y merged": (y, dora.merged_bound(*layer, arithmetic)),
        "W restored": (w.double(), dora.unmerged_weight_bound(*adapter, arithmetic)),
    } | dict(zip(SLOPES, zip(slopes, allowed, strict=True), strict=True))
