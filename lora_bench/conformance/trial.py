"""`Trial`: one case put before a subject, with what a check may ask of the subject and say about the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.case import QUANTISED
from lora_bench.conformance import kinds
from lora_bench.conformance.outcome import Fails, Inconclusive, NotOffered, blaming
from lora_bench.conformance.seen import Seen
from lora_bench.models.bases import dequantised
from lora_bench.spec import Factors
from lora_bench.subject import KNOWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.case import Case
    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Layer, Subject


class Terms(NamedTuple):
    """What `definition` and `bounds` take, in their order: x as rows (n, fan_in), whatever the kind of layer."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    factors: Factors
    scaling: float

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scaling: float) -> Terms:
        """The terms of a problem. A bias of B is one more column of B, over a feature of x that is 1."""
        if factors.bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
            a = torch.block_diag(factors.a, torch.ones_like(factors.a[:1, :1]))
            factors = Factors(a, torch.cat([factors.b, factors.bias[:, None]], 1))
        return cls(x, weight, bias, factors, scaling)


class Trial:
    """A case's tensors, a subject's verbs and the definition, brought together.

    Every tensor and base layer that it gives out is a fresh copy, since a subject may keep or overwrite what it gets;
    `terms` alone are the originals, for `definition` and `bounds`. Verbs are called through here, so that what they
    raise is laid to the subject and an error of a check is not. `deviation` is the largest that was found.
    """

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject = subject
        self.case = case
        self.spec = case.spec
        self.arithmetic = bounds.Arithmetic.of(case.torch_dtype)
        self.deviation: bounds.Deviation | None = None
        self.tensor = ""
        self._problem = case.draw()
        self._weight = self._problem.weight
        if case.kind in QUANTISED:
            self._weight = dequantised(self.base())
        self._original = self._weight

    # What a check starts from

    @property
    def x(self) -> Tensor:
        """The input as the kind of layer takes it: (tokens, d_in) for a linear one."""
        return self._problem.x.clone()

    @property
    def grad(self) -> Tensor:
        """A loss's gradient at the output, (tokens, d_out) for a linear layer."""
        return self._problem.grad.clone()

    @property
    def ids(self) -> Tensor:
        """An adapter for each token, (tokens,) int64 in -1 .. adapters - 1."""
        return self._problem.ids.clone()

    @property
    def factors(self) -> Factors:
        """The first adapter's."""
        return copied(self._problem.adapters[0][1])

    @property
    def adapters(self) -> list[tuple[LoraSpec, Factors]]:
        """Every adapter of the case."""
        return [(spec, copied(factors)) for spec, factors in self._problem.adapters]

    @property
    def terms(self) -> Terms:
        """The case as drawn: for the definition and the bounds, never for a subject.

        The weight of a quantised base is what its bits stand for, and where wrapping moves a part of W into A and B
        it is what was left by the last `wrap`.
        """
        return self.terms_of(self._problem.adapters[0][1], self.spec.scaling)

    def terms_of(self, factors: Factors, scaling: float) -> Terms:
        """The terms with other factors."""
        return Terms.of(kinds.rows(self.case, self._problem.x), self._weight, self._problem.bias, factors, scaling)

    @property
    def bare_terms(self) -> Terms:
        """The terms of the base alone, its adapter all zeros."""
        return self.terms._replace(factors=self.terms.factors.map(torch.zeros_like), scaling=0.0)

    @property
    def asked(self) -> Seen:
        """What an output is an answer to; what was found and what is allowed are still to come."""
        case, problem, nothing = self.case, self._problem, torch.empty(0)
        original = problem.weight if case.kind in QUANTISED else None
        zero_padded = None
        if case.padding_mode != "zeros":
            zero_padded = kinds.rows(replace(case, padding_mode="zeros"), problem.x)
        x = kinds.rows(case, problem.x)
        adapters = problem.adapters
        return Seen(
            nothing, nothing, x, self._weight, problem.bias, adapters, original=original, zero_padded=zero_padded
        )

    @property
    def unquantised(self) -> Tensor:
        """The weight before it was quantised, (d_out, fan_in)."""
        return self._problem.weight.clone()

    def base(self) -> Layer:
        """A base layer of the case's kind with its weight and bias, trainable as every new one is."""
        bias = None if self._problem.bias is None else self._problem.bias.clone()
        try:
            return kinds.base(self.case, self._problem.weight.clone(), bias)
        except (ImportError, TypeError) as reason:  # not installed, or not of this dtype
            raise NotOffered(str(reason)) from None

    # What is asked of the subject

    def ask(self, verb: str, *arguments: Any) -> Any:
        """What the subject's verb returns."""
        with blaming(verb, refusable=verb != "load"):
            return getattr(self.subject, verb)(*arguments)

    def wrap(self, spec: LoraSpec | None = None) -> Layer:
        """A layer as `wrap` makes it, of the case's spec or another; NotOffered where the subject says so."""
        self.must_support(spec := spec or self.spec)
        layer = self.ask("wrap", self.base(), spec)
        if not callable(layer):
            raise Fails(f"wrap returned {layer!r}, wanted a layer that can be called", verb="wrap")
        if self.subject.residual:
            left = self.weight_of(layer)
            self._weight = left if left.isfinite().all() else self._original
        return layer

    def layer(self, factors: Factors | None = None, spec: LoraSpec | None = None) -> Layer:
        """A layer with factors loaded, the case's first or others."""
        layer = self.wrap(spec)
        self.ask("load", layer, factors or self.factors)
        return layer

    def must_support(self, spec: LoraSpec) -> None:
        """Raise NotOffered where the subject says that it does not do such a spec."""
        for variant in KNOWN["variants"]:
            if getattr(spec, variant) and variant not in self.subject.variants:
                raise NotOffered(f"no {variant}")
        if reason := self.ask("supports", spec):
            raise NotOffered(reason)

    def call(self, layer: Layer, x: Tensor) -> Tensor:
        """The layer's output."""
        with blaming("forward"):
            y = layer(x)
        return self.tensor_of("the output", y)

    def backward(self, y: Tensor, grad: Tensor) -> None:
        """Propagate a loss's gradient at `y`."""
        with blaming("backward"):
            y.backward(grad)

    def merge(self, layer: Layer) -> Layer:
        """The merged callable: what `merge` returns, or the layer itself."""
        merged = self.ask("merge", layer)
        return layer if merged is None else merged

    def module(self, layer: Layer) -> nn.Module:
        """The layer, which must have parameters and a training mode; NotOffered where it has not."""
        if not isinstance(layer, nn.Module):
            raise NotOffered("the layer is no torch module")
        return layer

    def train(self, layer: Layer, training: bool) -> None:
        """Put the layer into training or evaluation mode."""
        module = self.module(layer)
        with blaming("train"):
            module.train(training)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's parameters by name."""
        module = self.module(layer)
        with blaming("named_parameters"):
            return dict(module.named_parameters())

    def trainable(self, layer: Layer) -> dict[str, Tensor]:
        """Those that require a gradient."""
        return {name: value for name, value in self.parameters(layer).items() if value.requires_grad}

    def weight_of(self, layer: Layer) -> Tensor:
        """A copy of the weight that the base path multiplies by now, (d_out, fan_in)."""
        weight = self.tensor_of("the weight", self.ask("weight", layer)).detach().clone()
        self.require_shape("the weight", weight, kinds.native(self.case, self._problem.weight).shape)
        return kinds.matrix(self.case, weight)

    def factors_of(self, layer: Layer) -> Factors:
        """The live parameters."""
        factors = self.ask("factors", layer)
        if not isinstance(factors, Factors):
            raise Fails(f"factors gave a {type(factors).__name__}, not Factors", verb="factors")
        return factors

    def gradient_of(self, name: str, live: Tensor) -> Tensor:
        """The gradient of a parameter, or of the part of one that a view of it shows."""
        parameter = live._base  # noqa: SLF001  # torch has no other name for what a view shows
        if live.is_leaf or parameter is None:
            return self.tensor_of(f"the gradient of {name}", live.grad)
        whole = self.tensor_of(f"the gradient of {name}", parameter.grad)
        alike = torch.empty_like(parameter).copy_(whole)  # strided as the parameter is
        offset = live.storage_offset() - parameter.storage_offset()
        return alike.as_strided(live.shape, live.stride(), offset)

    # What is said about the answer

    def require(self, holds: bool, because: str) -> None:
        """Fail `because` unless it holds."""
        if not holds:
            raise Fails(because)

    def require_shape(self, name: str, found: Tensor, shape: Sequence[int]) -> None:
        """Fail unless `found` is of that shape."""
        self.require(found.shape == tuple(shape), f"{name} is of shape {tuple(found.shape)}, wanted {tuple(shape)}")

    def tensor_of(self, name: str, found: Any) -> Tensor:
        """`found`, which must be a tensor."""
        if not isinstance(found, Tensor):
            raise Fails(f"{name} is a {type(found).__name__}, not a tensor")
        return found

    def near(
        self, tensor: str, found: Tensor, wanted: Tensor, allowed: Tensor | float = 0.0, *, of: Seen | None = None
    ) -> None:
        """Fail where |found - wanted| exceeds `allowed` (0: must be equal) anywhere; `of` is what it is an answer to.

        Inconclusive where the answer is not finite and the magnitudes behind it are near the end of the dtype's range.
        """
        self.require_shape(tensor, found, wanted.shape)
        deviation = bounds.worst(found, wanted, allowed)
        if self.deviation is None or deviation.ratio > self.deviation.ratio:
            self.deviation, self.tensor = deviation, tensor
        if deviation.ratio <= 1:
            return
        # A bound is at least one unit roundoff of the magnitudes that it is made of.
        magnitude = max(deviation.allowed / self.arithmetic.unit, self._largest)
        if not found.isfinite().all() and magnitude > torch.finfo(self.case.torch_dtype).max:
            raise Inconclusive(f"{self.case.dtype} overflows")
        seen = None
        if of is not None:
            seen = of._replace(found=found.detach().clone(), allowed=torch.as_tensor(allowed).expand_as(wanted))
        raise Fails(tensor=tensor, deviation=deviation, seen=seen)

    @property
    def _largest(self) -> float:
        """The largest number that any order of the products may come by, also where a zero of x hides it."""
        x, largest = kinds.rows(self.case, self._problem.x).double().abs(), 0.0
        for spec, factors in self._problem.adapters:
            a, b, s = factors.a.double().abs(), factors.b.double().abs(), abs(spec.scaling)
            for product in (s * b, s * a, max(s, 1) * x @ a.T, s * b @ a + self._weight.double().abs()):
                largest = max(largest, float(product.max()) if product.numel() else 0.0)
        return largest

    def visible(self, effect: Tensor, allowed: Tensor) -> None:
        """Raise Inconclusive unless the absence of `effect` would have broken the bound."""
        if bounds.visibility(effect, allowed) <= 1:
            raise Inconclusive("the whole effect is within the bound")

    def rows_of(self, y: Tensor) -> Tensor:
        """An output of the kind of layer as rows (n, d_out)."""
        self.require_shape("y", y, self._problem.grad.shape)
        return kinds.outputs(self.case, y)

    def defined(self, y: Tensor, allowed: Tensor) -> None:
        """Fail unless `y` is the definition's output, within a bound that an adapter left out would break."""
        self.near("y", self.rows_of(y), definition.forward(*self.terms), allowed, of=self.asked)
        self.visible(self.effect, allowed)

    def bare(self, y: Tensor) -> None:
        """Fail unless `y` is the base's output."""
        wanted = definition.base(self.terms.x, self.terms.weight, self.terms.bias)
        self.near("y", self.rows_of(y), wanted, self.bare_bound, of=self.asked._replace(acting=()))

    def begun(self, y: Tensor, layer: Layer) -> None:
        """Fail unless `y`, of a fresh layer, is the output of the base as it was before it was wrapped.

        Where a part of W was moved into A and B, what was left is W - s B A as it was computed and stored; elsewhere
        B A is zero, be it but for rounding.
        """
        live, scaling = copied(self.factors_of(layer).map(torch.Tensor.detach)), self.spec.scaling
        now = self.terms_of(live, scaling)
        moved = self.subject.residual
        strayed = (
            bounds.merged_weight(self._original, live, scaling, self.arithmetic)
            if moved
            else bounds.vanishing(live, scaling, self.arithmetic)
        )
        x = kinds.rows(self.case, self._problem.x)
        allowed = bounds.separate(*now, self.arithmetic) + x.double().abs() @ strayed.T
        wanted = definition.base(x, self._original, now.bias)
        self.near("y", self.rows_of(y), wanted, allowed, of=self.asked._replace(weight=self._original, acting=()))
        if moved:
            self.visible(definition.delta(x, live, scaling), allowed)

    @property
    def effect(self) -> Tensor:
        """What the adapter adds to the output."""
        return definition.delta(self.terms.x, self.terms.factors, self.terms.scaling)

    @property
    def separate_bound(self) -> Tensor:
        """How far the output of base and adapter may stray."""
        return bounds.separate(*self.terms, self.arithmetic)

    @property
    def merged_bound(self) -> Tensor:
        """How far the output of the merged layer may stray."""
        return bounds.merged(*self.terms, self.arithmetic)

    @property
    def bare_bound(self) -> Tensor:
        """How far the base's own output may stray."""
        return bounds.separate(*self.bare_terms, self.arithmetic)


def copied(factors: Factors) -> Factors:
    """The same values in other storage."""
    return factors.map(torch.clone)
