"""LoRA on nn.MultiheadAttention: its definition in float64.

Concat over heads of softmax(q kᵀ / sqrt(head_dim)) v, through an output projection (Vaswani et al. 2017, arXiv
1706.03762, section 3.2), with W + s B A for the weight of both projections, that of query, key and value and that of
the output (Hu et al. 2021, arXiv 2106.09685, section 4.2). Shapes: d is embed_dim, (n, length, d) a batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from lora_bench import definition
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from torch import nn


class Inputs(NamedTuple):
    """What attention is called with: query (n, length, d), key and value (n, source, d).

    mask (length, source) is bool, as nn.MultiheadAttention's attn_mask: True where a query may not look. It must leave
    each query a key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None


class Projection(NamedTuple):
    """A linear layer with its adapter: what `definition.forward` takes after x."""

    weight: Tensor
    bias: Tensor | None
    factors: Factors
    scaling: float

    @property
    def thirds(self) -> list[Projection]:
        """Of in_proj, those of query, key and value, which share A."""
        biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
        parts = zip(self.weight.chunk(3), biases, self.factors.b.chunk(3), strict=True)
        return [Projection(weight, bias, Factors(self.factors.a, b), self.scaling) for weight, bias, b in parts]


class Adapted(NamedTuple):
    """An nn.MultiheadAttention with adapters: in_proj's weight is (3 d, d), out_proj's (d, d)."""

    in_proj: Projection
    out_proj: Projection
    heads: int

    @classmethod
    def of(cls, base: nn.MultiheadAttention, factors: tuple[Factors, Factors], scaling: float) -> Self:
        """That of a base (its parameters are copied) and the factors of in_proj, a (r, d) and b (3 d, r), and out_proj.

        With a scaling of 0 it is the base. Raises ValueError for a base whose key or value has another size than query.
        """
        state = {name: parameter.clone() for name, parameter in base.state_dict().items()}
        if "in_proj_weight" not in state:
            raise ValueError(
                f"query, key and value must be of one size, got {base.embed_dim}, {base.kdim}, {base.vdim}"
            )
        into = Projection(state["in_proj_weight"], state.get("in_proj_bias"), factors[0], scaling)
        out = Projection(state["out_proj.weight"], state.get("out_proj.bias"), factors[1], scaling)
        return cls(into, out, base.num_heads)


class Attended(NamedTuple):
    """output (n, length, d) and weights (n, length, source), the mean over heads; or the allowed |error| of each."""

    output: Tensor
    weights: Tensor


class Gradients(NamedTuple):
    """Those of in_proj's and of out_proj's factors, and of query, key and value; or the allowed |error| of each.

    Where one tensor is several of query, key and value, its gradient is their sum, and so is its bound.
    """

    in_a: Tensor
    in_b: Tensor
    out_a: Tensor
    out_b: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def forward(inputs: Inputs, layer: Adapted) -> Attended:
    """Multi-head attention with W + s B A for both weights, in float64."""
    parts = zip(inputs[:3], layer.in_proj.thirds, strict=True)
    query, key, value = (split(definition.forward(x, *part), layer.heads) for x, part in parts)
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if inputs.mask is not None:
        logits = logits.masked_fill(inputs.mask, -math.inf)
    weights = logits.softmax(-1)
    return Attended(definition.forward(joined(weights @ value), *layer.out_proj), weights.mean(1))


def gradients(inputs: Inputs, grad: Tensor, layer: Adapted) -> Gradients:
    """The gradients of a loss whose gradient at the output is `grad` (n, length, d): autograd's, of `forward`."""
    into, out, heads = layer
    tensors = (into.factors.a, into.factors.b, out.factors.a, out.factors.b, *inputs[:3])
    leaves = [tensor.detach().double().clone().requires_grad_() for tensor in tensors]
    in_a, in_b, out_a, out_b, query, key, value = leaves
    into, out = into._replace(factors=Factors(in_a, in_b)), out._replace(factors=Factors(out_a, out_b))
    with torch.enable_grad():
        output = forward(Inputs(query, key, value, inputs.mask), Adapted(into, out, heads)).output
    return Gradients(*torch.autograd.grad(output, leaves, grad.double()))


def split(x: Tensor, heads: int) -> Tensor:
    """(n, length, d) -> (n, heads, length, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(n, heads, length, head_dim) -> (n, length, d)."""
    return x.transpose(1, 2).flatten(2)
