"""LoRA in attention: no honest computation exceeds the bounds, and no wrong delta hides."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from lora_bench import attention
from lora_bench.attention import Adapted, Inputs, Projection
from lora_bench.bounds import Arithmetic
from lora_bench.spec import Factors
from tests.attention_trials import base_of, brief, drawn, each_dtype, factors_of, ratio, ratios, trials

Call = Callable[[Inputs, Adapted], tuple[Tensor, Tensor | None]]


def in_dtype(weight: Tensor, factors: Factors, s: float) -> Tensor:
    return weight + s * (factors.b @ factors.a)


def in_wide(weight: Tensor, factors: Factors, s: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(*(own.to(wide) for own in (weight, factors.b, factors.a)), alpha=s).to(weight.dtype)


def by_torch(plus: Callable[[Tensor, Factors, float], Tensor], need_weights: bool) -> Call:
    """nn.MultiheadAttention with merged weights: without gradients its fast path."""

    def call(inputs: Inputs, layer: Adapted) -> tuple[Tensor, Tensor | None]:
        (w_in, _, f_in, s), (w_out, _, f_out, _), _ = layer
        merged = {"in_proj_weight": plus(w_in, f_in, s), "out_proj.weight": plus(w_out, f_out, s)}
        options = {"need_weights": need_weights, "attn_mask": inputs.mask}
        attended: tuple[Tensor, Tensor | None] = torch.func.functional_call(base_of(layer), merged, inputs[:3], options)
        return attended

    return call


def written_out(attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]) -> Call:
    """Each projection as base and adapter."""

    def apply(x: Tensor, part: Projection) -> Tensor:
        return linear(x, part.weight, part.bias) + part.scaling * linear(linear(x, part.factors.a), part.factors.b)

    def call(inputs: Inputs, layer: Adapted) -> tuple[Tensor, Tensor | None]:
        parts = zip(inputs[:3], layer.in_proj.thirds, strict=True)
        q, k, v = (apply(x, part).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x, part in parts)
        context, weights = attend(q, k, v, inputs.mask)
        return apply(context.transpose(1, 2).flatten(2), layer.out_proj), None if weights is None else weights.mean(1)

    return call


def hidden(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else logits.masked_fill(mask, -math.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = hidden(q @ k.mT / math.sqrt(q.shape[-1]), mask).softmax(-1)
    return weights @ v, weights


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = hidden((q / torch.tensor(q.shape[-1], dtype=q.dtype).sqrt()) @ k.mT, mask)
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = powers / powers.sum(-1, keepdim=True)
    return weights @ v, weights


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    return functional.scaled_dot_product_attention(q, k, v, None if mask is None else ~mask), None


MERGED: dict[str, Call] = {
    "torch": by_torch(in_dtype, False),
    "torch, weights": by_torch(in_dtype, True),
    "torch, wide": by_torch(in_wide, False),
    "torch, wide, weights": by_torch(in_wide, True),
}
HONEST = MERGED | {"plain": written_out(plain), "by hand": written_out(by_hand), "fused": written_out(fused)}


@each_dtype
@brief
@given(data=st.data())
def test_no_honest_output_exceeds_the_bounds(dtype: str, data: st.DataObject) -> None:
    inputs, layer, _ = data.draw(trials(dtype))
    arithmetic, wanted = Arithmetic.of(inputs.query.dtype), attention.forward(inputs, layer)
    either, merged = (bound(inputs, layer, arithmetic) for bound in (attention.bound, attention.merged_bound))
    for name, call in HONEST.items():
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                found = call(inputs, layer)
            assert found[0].dtype == inputs.query.dtype
            assert max(ratios(found, wanted, merged if name in MERGED else either)) <= 1, name


def slopes(inputs: Inputs, layer: Adapted, grad: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The gradients that autograd gives, those of an input that is several in one."""
    (into, out, heads), (query, key, value, mask) = layer, inputs
    kept = (into.factors.a, into.factors.b, out.factors.a, out.factors.b, query, key)
    leaves = [own.detach().clone().requires_grad_() for own in (kept[:5] if query is key else kept)]
    x, source = leaves[4], leaves[-1]
    assert value is key
    adapted = Adapted(into._replace(factors=Factors(*leaves[:2])), out._replace(factors=Factors(*leaves[2:4])), heads)
    return torch.autograd.grad(call(Inputs(x, source, source, mask), adapted)[0], leaves, grad)


def pooled(inputs: Inputs, of: attention.Gradients) -> tuple[Tensor, ...]:
    """Those of an input that is several in one."""
    several = (of.query + of.key + of.value,) if inputs.query is inputs.key else (of.query, of.key + of.value)
    return *of[:4], *several


@each_dtype
@brief
@given(data=st.data())
def test_no_honest_gradient_exceeds_the_bounds(dtype: str, data: st.DataObject) -> None:
    inputs, layer, grad = data.draw(trials(dtype))
    wanted = pooled(inputs, attention.gradients(inputs, grad, layer))
    allowed = pooled(inputs, attention.gradient_bounds(inputs, grad, layer, Arithmetic.of(grad.dtype)))
    for name, call in HONEST.items():
        for found, slope, limit in zip(slopes(inputs, layer, grad, call), wanted, allowed, strict=True):
            assert ratio(found, slope, limit) <= 1, name


def changed(layer: Adapted, of: str, times: float) -> Adapted:
    """One of the four deltas of a layer times a number."""
    part = layer.out_proj if of == "out" else layer.in_proj
    b = part.factors.b.clone()
    (b if of == "out" else b.chunk(3)["qkv".index(of)]).mul_(times)
    part = part._replace(factors=Factors(part.factors.a, b))
    return layer._replace(out_proj=part) if of == "out" else layer._replace(in_proj=part)


@pytest.mark.parametrize("of", ["q", "k", "v", "out"])
@pytest.mark.parametrize("times", [0.0, 2.0, -1.0, 1 + 1e-8])
@pytest.mark.parametrize("causal", [True, False])
def test_in_float64_no_wrong_delta_hides(of: str, times: float, causal: bool) -> None:
    for seed in range(10):
        inputs, layer, grad = drawn(seed=seed, causal=causal)
        wrong, arithmetic = changed(layer, of, times), Arithmetic.of(torch.float64)
        found, wanted = attention.forward(inputs, wrong), attention.forward(inputs, layer)
        assert max(ratios(found, wanted, attention.bound(inputs, layer, arithmetic))) > 1e4

        both = attention.gradients(inputs, grad, wrong), attention.gradients(inputs, grad, layer)
        allowed = attention.gradient_bounds(inputs, grad, layer, arithmetic)
        assert all(ratio(*each) > 10 for each in zip(*(own[4:] for own in (*both, allowed)), strict=True))


@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_is_read_from_its_base_and_without_a_scaling_it_is_the_base(biased: bool) -> None:
    inputs, layer, _ = drawn(biased=biased)
    base, arithmetic = base_of(layer), Arithmetic.of(torch.float64)
    read = Adapted.of(base, factors_of(layer), layer.in_proj.scaling)
    bare = Adapted.of(base, factors_of(layer), 0.0)
    base.in_proj_weight.data.zero_()

    assert torch.equal(attention.forward(inputs, read).output, attention.forward(inputs, layer).output)
    found = base_of(layer)(*inputs[:3])
    assert max(ratios(found, attention.forward(inputs, bare), attention.bound(inputs, bare, arithmetic))) <= 1
