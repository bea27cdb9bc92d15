"""How far an honest computation of LoRA on nn.MultiheadAttention may stray from its definition.

The bounds carry each number's allowed error from step to step (a running error analysis: Higham, Accuracy and
Stability of Numerical Algorithms (2nd ed.), section 3.3). The projections' are those of `lora_bench.bounds`.
Assumed of an honest softmax: it subtracts the row's maximum, its exponential errs by no more than `_exponential`, and
where it goes through the keys in blocks they have at least 16. Loose where heads are wide or keys many, each sum being
taken at its worst, and where logits are large in a narrow dtype: then all that is known of a probability is that it
lies in [0, 1]. With a single key the adapter has no effect through query and key, right or wrong.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lora_bench import bounds, definition
from lora_bench.attention.definition import Adapted, Attended, Gradients, Inputs, Projection, joined, split
from lora_bench.bounds import FLOAT64, Arithmetic

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 16  # keys; torch's and FlashAttention's kernels take 16 to 512 at a time
HOPELESS = 300.0  # an error of a logit that says nothing of its probability, and whose exponential does not overflow


def bound(inputs: Inputs, layer: Adapted, arithmetic: Arithmetic) -> Attended:
    """The allowed |error|, however each projection is computed: as base and adapter, or through a merged weight."""
    return _attended(inputs, layer, arithmetic, bounds.either).allowed


def merged_bound(inputs: Inputs, layer: Adapted, arithmetic: Arithmetic) -> Attended:
    """The allowed |error| where both weights are merged and stored in the dtype."""
    return _attended(inputs, layer, arithmetic, bounds.merged).allowed


def gradient_bounds(inputs: Inputs, grad: Tensor, layer: Adapted, arithmetic: Arithmetic) -> Gradients:
    """The allowed |error| of the gradients, also by kernels that compute the probabilities again.

    Those take sum(context · its gradient) for sum(p · its gradient) in the derivative of the softmax.
    """
    at = _attended(inputs, layer, arithmetic, bounds.either)
    out_a, out_b, coming = _slopes(at.context.map(_rows), _exact(_rows(grad)), layer.out_proj, arithmetic)
    context, coming = (own.map(lambda t: split(t.view_as(grad), layer.heads)) for own in (at.context, coming))
    for_weights = product(coming, at.value.turned, arithmetic, 2)
    common = _common(at.weights, for_weights, coming, context, arithmetic)
    around = Estimate(for_weights.value - common.value, for_weights.error + common.error)
    around = _stored(around, around.most + for_weights.most + common.most, arithmetic)
    for_logits = _times(at.weights, around)
    for_logits = _stored(for_logits, for_logits.most, arithmetic)
    scale = math.sqrt(at.query.value.shape[-1])
    slopes = (
        product(for_logits, at.key, arithmetic, 6).map(lambda t: t / scale),
        product(for_logits.turned, at.query, arithmetic, 6).map(lambda t: t / scale),
        product(at.weights.turned, coming, arithmetic, 2),
    )
    # One layer whose rows are those of query, key and value, each with a gradient at its own third of the outputs.
    grads = Estimate(*(torch.block_diag(*(_rows(joined(t)) for t in each)) for each in zip(*slopes, strict=True)))
    x = _exact(torch.cat([_rows(own) for own in inputs[:3]]))
    in_a, in_b, of_x = _slopes(x, grads, layer.in_proj, arithmetic)
    shares = of_x.error.split([len(_rows(own)) for own in inputs[:3]])
    of_inputs = (share.view_as(own) for share, own in zip(shares, inputs[:3], strict=True))
    return Gradients(in_a.error, in_b.error, out_a.error, out_b.error, *of_inputs)


class Estimate(NamedTuple):
    """A number of the definition with the allowed |error| of an honest computation of it."""

    value: Tensor
    error: Tensor

    @property
    def most(self) -> Tensor:
        """The most that its absolute value may be."""
        return self.value.abs() + self.error

    @property
    def turned(self) -> Estimate:
        return self.map(lambda tensor: tensor.mT)

    def map(self, change: Callable[[Tensor], Tensor]) -> Estimate:
        return Estimate(change(self.value), change(self.error))


class _Attended(NamedTuple):
    """The way to an output, which the gradients go back: heads are (n, heads, length or source, head_dim)."""

    query: Estimate
    key: Estimate
    value: Estimate
    weights: Estimate
    context: Estimate  # (n, length, d), joined
    allowed: Attended


@torch.no_grad()
def _attended(inputs: Inputs, layer: Adapted, arithmetic: Arithmetic, project: Callable[..., Tensor]) -> _Attended:
    def projected(x: Tensor, part: Projection) -> Estimate:
        error = project(_rows(x), *part, arithmetic).view_as(x)
        return Estimate(definition.forward(x, *part), error).map(lambda t: split(t, layer.heads))

    query, key, value = map(projected, inputs[:3], layer.in_proj.thirds)
    scale = math.sqrt(query.value.shape[-1])
    # The factor is made of three roundings (a root, a quotient, as it is stored), multiplies q, k or both, and the
    # logits are stored.
    logits = product(query, key.turned, arithmetic, 6).map(lambda t: t / scale)
    weights = softmax(logits, inputs.mask, arithmetic)
    context = product(weights, value, arithmetic, 1).map(joined)
    # The projection's own error at the largest input that there may be, and what the input's becomes.
    out = layer.out_proj
    output = project(_rows(context.most), *out, arithmetic).view_as(context.value)
    output += context.error @ definition.merged_weight(out.weight, out.factors, out.scaling).abs().T
    mean = _growth(arithmetic, (layer.heads,), 2) * weights.most.mean(1) + 3 * arithmetic.underflow
    return _Attended(query, key, value, weights, context, Attended(output, weights.error.mean(1) + mean))


def softmax(logits: Estimate, mask: Tensor | None, arithmetic: Arithmetic) -> Estimate:
    """The probabilities: the range of softmax over all logits that there may be, and its own roundings.

    A probability is largest where its own logit errs upward and all others downward, so that the range is known
    exactly; it never leaves [0, 1]. The difference from the maximum is rounded, the exponential (twice: in the
    numerator and in the sum), the sum, its inverse, and the quotient; in blocks all is rescaled at each new maximum,
    whose differences add up to no more than the first. Computed again in a backward pass, a probability is the
    exponential of its logit less the logarithm of the sum, which is rounded too.
    """
    hidden = torch.zeros((), dtype=torch.bool) if mask is None else mask
    source = logits.value.shape[-1]
    largest = logits.most.masked_fill(hidden, 0).amax(-1, keepdim=True) + math.log(source)
    unit = arithmetic.unit + FLOAT64.unit
    error = (logits.error + unit * (logits.most + largest)).masked_fill(hidden, 0)
    p = logits.value.masked_fill(hidden, -math.inf).softmax(-1)
    up, down = p * error.clamp(max=HOPELESS).exp(), p * torch.exp(-error)
    rest, rise, fall = _others(p), p * torch.expm1(error.clamp(max=HOPELESS)), -p * torch.expm1(-error)
    more = (rest * rise + p * _others(fall)) / (up + _others(down))
    less = (rest * fall + p * _others(rise)) / (down + _others(up))
    strayed = torch.maximum(more, less).where(error.amax(-1, keepdim=True) < HOPELESS, 1.0).masked_fill(hidden, 0)
    times, own = 2 * (1 + source // BLOCK), 0.0
    for each in (arithmetic, FLOAT64):
        own += times * (math.log1p(each.accumulator) - math.log1p(-_exponential(each)))
        own += math.log1p(each.growth((source,), 5))
    again = torch.expm1(own + 2 * (arithmetic.accumulator + FLOAT64.accumulator) * largest)
    return Estimate(p, strayed + again * (p + strayed) + (source + 3) * arithmetic.underflow)


def _others(terms: Tensor) -> Tensor:
    """Of each, the sum of all others in its row, without a cancellation."""
    before, after = (functional.pad(t.cumsum(-1)[..., :-1], (1, 0)) for t in (terms, terms.flip(-1)))
    return before + after.flip(-1)


def _exponential(arithmetic: Arithmetic) -> float:
    """The relative error that an exponential may have, before it is stored.

    torch's own is within 1 unit in the last place, CUDA's within 2, and exp_u20, that of torch's attention on a CPU,
    within 20 of float32, which is 40 roundings. For 16-bit numbers that has a faster one, within one unit of theirs.
    """
    return 40 * arithmetic.accumulator + 2 * arithmetic.unit


def product(left: Estimate, right: Estimate, arithmetic: Arithmetic, roundings: int) -> Estimate:
    """left @ right, computed in the dtype."""
    terms = left.value.shape[-1]
    lost = left.most.sum(-1, keepdim=True) + right.most.sum(-2, keepdim=True) + terms + roundings
    error = left.error @ right.most + left.value.abs() @ right.error
    error += _growth(arithmetic, (terms,), roundings) * (left.most @ right.most)
    return Estimate(left.value @ right.value, error + 2 * arithmetic.underflow * lost)


def _times(left: Estimate, right: Estimate) -> Estimate:
    """left · right, before it is rounded."""
    return Estimate(left.value * right.value, left.error * right.most + left.value.abs() * right.error)


def _stored(estimate: Estimate, size: Tensor, arithmetic: Arithmetic) -> Estimate:
    """An estimate after two roundings of numbers of that size."""
    return estimate._replace(error=estimate.error + _growth(arithmetic, (), 2) * size + 2 * arithmetic.underflow)


def _common(
    weights: Estimate, slope: Estimate, coming: Estimate, context: Estimate, arithmetic: Arithmetic
) -> Estimate:
    """Of each row, the sum of the probabilities times their gradients, or of the context times its own: (..., 1)."""

    def summed(left: Estimate, right: Estimate) -> Estimate:
        size = _growth(arithmetic, (left.value.shape[-1],), 2) * left.most * right.most
        lost = arithmetic.underflow * (left.most + right.most + 2)
        each = _times(left, right)
        return Estimate(each.value, each.error + size + lost).map(lambda t: t.sum(-1, keepdim=True))

    one, other = summed(weights, slope), summed(coming, context)
    return Estimate(one.value, torch.maximum(one.error, other.error) + (one.value - other.value).abs())


def _slopes(
    x: Estimate, grad: Estimate, layer: Projection, arithmetic: Arithmetic
) -> tuple[Estimate, Estimate, Estimate]:
    """dL/dA, dL/dB and dL/dx of x (W + s B A)ᵀ, x (n, d_in) and grad (n, d_out); parts of a sum may be stored first."""
    own = layer.weight, layer.factors, layer.scaling
    absolute = layer.weight.abs(), layer.factors.map(torch.abs), abs(layer.scaling)
    values = definition.gradients(x.value, grad.value, *own)
    size = definition.gradients(x.most, grad.most, *absolute)
    allowed = bounds.gradients(x.most, grad.most, *own, arithmetic)
    of_x = definition.gradients(x.error, grad.most, *absolute)
    of_grad = definition.gradients(x.value.abs(), grad.error, *absolute)
    carried = of_x.a + of_grad.a, of_x.b + of_grad.b, of_grad.x
    added = _growth(arithmetic, (), 2)
    a, b, of_input = (
        Estimate(value, (1 + added) * error + added * most + inherited)
        for value, error, most, inherited in zip(values, allowed, size, carried, strict=True)
    )
    return a, b, of_input


def _growth(arithmetic: Arithmetic, sums: tuple[int, ...], roundings: int) -> float:
    """What a computation errs by, and the definition in float64."""
    return arithmetic.growth(sums, roundings) + FLOAT64.growth(sums, roundings)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _exact(value: Tensor) -> Estimate:
    return Estimate(value.double(), torch.zeros_like(value.double()))
