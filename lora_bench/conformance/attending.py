"""A case put before a subject as attention, and what a check may ask of the subject and say about the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_bench import bounds
from lora_bench.attention import Adapted, Attended, Inputs, Projection, bound, forward
from lora_bench.conformance.outcome import Fails, blaming
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.bounds import Arithmetic
    from lora_bench.conformance.trial import Trial
    from lora_bench.spec import LoraSpec
    from lora_bench.subject import Layer

    Bound = Callable[[Inputs, Adapted, Arithmetic], Attended]


class Attention:
    """A trial's case as attention; what it gives out is a fresh copy but for `adapted`, which is for the definition."""

    def __init__(self, trial: Trial) -> None:
        case, d = trial.case, trial.case.d_in
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int, gain: float = 1.0) -> Tensor:
            return (gain * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(case.torch_dtype)

        self.trial = trial
        self.heads = 1 if d % 2 else 2
        query, key, value = normal(2, case.tokens, d), normal(2, case.tokens + 1, d), normal(2, case.tokens + 1, d)
        causal = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)
        self._inputs = {
            "self": Inputs(query, query, query),
            "masked": Inputs(query, query, query, causal),
            "cross": Inputs(query, key, value),
        }
        self.grad = normal(2, case.tokens, d)
        into, out = (self._projection(normal, rows) for rows in (3 * d, d))
        self.adapted = Adapted(into, out, self.heads)

    def _projection(self, normal: Callable[..., Tensor], rows: int) -> Projection:
        case, d = self.trial.case, self.trial.case.d_in
        weight, bias = normal(rows, d, gain=d**-0.5), normal(rows)
        factors = Factors(normal(case.rank, d), normal(rows, case.rank, gain=case.gain * d**-0.5))
        return Projection(weight, bias if case.bias else None, factors, case.spec.scaling)

    @property
    def bare(self) -> Adapted:
        """The base alone."""
        into, out, heads = self.adapted
        return Adapted(into._replace(scaling=0.0), out._replace(scaling=0.0), heads)

    def over(self, weights: tuple[Tensor, Tensor]) -> Adapted:
        """The same adapters over other weights."""
        into, out, heads = self.adapted
        return Adapted(into._replace(weight=weights[0]), out._replace(weight=weights[1]), heads)

    @property
    def factors(self) -> tuple[Factors, Factors]:
        into, out, _ = self.adapted
        return into.factors.map(torch.clone), out.factors.map(torch.clone)

    def inputs(self, which: str = "self") -> Inputs:
        """As "self" a query attends to itself, as "masked" without a look ahead, as "cross" to other keys.

        In the first two query, key and value are one tensor.
        """
        own = self._inputs[which]
        copies = {id(tensor): tensor.clone() for tensor in own if tensor is not None}
        query, key, value = (copies[id(tensor)] for tensor in own[:3])
        return Inputs(query, key, value, None if own.mask is None else copies[id(own.mask)])

    def base(self) -> nn.MultiheadAttention:
        into, out, heads = self.adapted
        case = self.trial.case
        base = nn.MultiheadAttention(case.d_in, heads, bias=case.bias, batch_first=True, dtype=case.torch_dtype)
        state = {"in_proj_weight": into.weight, "in_proj_bias": into.bias}
        state |= {"out_proj.weight": out.weight, "out_proj.bias": out.bias}
        base.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
        return base

    # What is asked of the subject

    def wrap(self, spec: LoraSpec | None = None) -> Layer:
        self.trial.must_support(spec := spec or self.trial.spec)
        return self.trial.ask("wrap", self.base(), spec)

    def layer(self, spec: LoraSpec | None = None) -> Layer:
        """A layer with the case's factors loaded."""
        layer = self.wrap(spec)
        self.trial.ask("load", layer, self.factors)
        return layer

    def call(self, layer: Layer, inputs: Inputs, **options: Any) -> tuple[Any, Any]:
        """The output and the weights."""
        with blaming("forward"):
            attended = layer(*inputs[:3], attn_mask=inputs.mask, **options)
        if not isinstance(attended, tuple) or len(attended) != 2:
            raise Fails(f"the layer gave a {type(attended).__name__}, wanted the output and the weights")
        return attended

    def output(self, layer: Layer, inputs: Inputs) -> Tensor:
        return self.trial.tensor_of("the output", self.call(layer, inputs)[0])

    def weights_of(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Copies of in_proj's and out_proj's weight."""
        into, out = self.pair("weight", layer, Tensor)
        return into.detach().clone(), out.detach().clone()

    def pair(self, verb: str, layer: Layer, wanted: type) -> tuple[Any, Any]:
        """What the subject's verb gives for in_proj and for out_proj."""
        given = self.trial.ask(verb, layer)
        if not isinstance(given, tuple) or [isinstance(own, wanted) for own in given] != [True, True]:
            raise Fails(f"{verb} gave a {type(given).__name__}, wanted a pair of {wanted.__name__}", verb=verb)
        into, out = given
        return into, out

    # What is said about the answer

    def judge(self, layer: Layer, which: str, wanted: Adapted, allow: Bound) -> None:
        """Fail unless the layer computes what `wanted` does, also with torch's kernels for inference."""
        exact = forward(self.inputs(which), wanted)
        allowed = allow(self.inputs(which), wanted, self.trial.arithmetic)
        output, weights = self.call(layer, self.inputs(which), need_weights=True)
        self.trial.near("the output", self.trial.tensor_of("the output", output), exact.output, allowed.output)
        self.trial.near("the weights", self.trial.tensor_of("the weights", weights), exact.weights, allowed.weights)
        with torch.no_grad():
            output, _ = self.call(layer, self.inputs(which), need_weights=False)
        name = "the output without weights"
        self.trial.near(name, self.trial.tensor_of(name, output), exact.output, allowed.output)

    def defined(self, layer: Layer, which: str = "self", allow: Bound = bound) -> None:
        """Fail unless the layer computes the definition, within a bound that an adapter left out would break."""
        self.judge(layer, which, self.adapted, allow)
        self.visible(which, allow)

    def visible(self, which: str = "self", allow: Bound = bound) -> None:
        effect = forward(self.inputs(which), self.adapted).output - forward(self.inputs(which), self.bare).output
        self.trial.visible(effect, allow(self.inputs(which), self.adapted, self.trial.arithmetic).output)

    def judge_base(self, layer: Layer, cycles: int) -> None:
        """Fail unless the base is as it was, but for the rounding of so many merges and unmerges."""
        parts = zip(("in_proj", "out_proj"), self.weights_of(layer), self.adapted[:2], strict=True)
        for name, found, (weight, _, factors, scaling) in parts:
            slack = bounds.unmerged_weight(weight, factors, scaling, self.trial.arithmetic, cycles=cycles)
            self.trial.near(f"the base's weight of {name}", found, weight.double(), slack)
            self.trial.visible(scaling * (factors.b.double() @ factors.a.double()), slack)
