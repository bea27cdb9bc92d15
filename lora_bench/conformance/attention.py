"""LoRA on nn.MultiheadAttention, with one adapter on in_proj and one on out_proj.

Of a case embed_dim is d_in, with two heads where that is even, and tokens is the length of the query. The subject's
verbs are those of the other kinds, with a pair for what those have one of: `load` takes two `Factors`, `factors` gives
them and `weight` two weights, in_proj's first. The layer is called as a base with batch_first is.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_bench import bounds
from lora_bench.attention import Inputs, bound, forward, gradient_bounds, gradients, merged_bound
from lora_bench.conformance.attending import Attention
from lora_bench.conformance.check import WIDE, check
from lora_bench.conformance.outcome import NotOffered, Raised, blaming
from lora_bench.conformance.state import saved
from lora_bench.conformance.training import judge_trained
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial

EMBED_DIM = st.shared(st.integers(1, 8), key="embed_dim")
EVEN = st.shared(st.sampled_from([2, 4, 6]), key="even embed_dim")
DRAWS = {"tokens": st.integers(2, 4), "d_in": EMBED_DIM, "d_out": EMBED_DIM, "dtype": WIDE}
DEFINED = "attention.matches_definition"
claim = partial(check, bases=("multihead_attention",), draws=DRAWS, effort=0.6)


@claim("The output is that of attention with W + s B A for both weights, with and without a mask.")
def matches_definition(trial: Trial) -> None:
    attention = Attention(trial)
    layer = attention.layer()
    attention.defined(layer, "self")
    attention.defined(layer, "masked")


@claim("The output for a query and other keys and values is the definition's.", after=DEFINED)
def matches_definition_across(trial: Trial) -> None:
    attention = Attention(trial)
    attention.defined(attention.layer(), "cross")


@claim("A fresh layer computes what its base does.")
def is_identity_when_fresh(trial: Trial) -> None:
    attention = Attention(trial)
    attention.judge(attention.wrap(), "self", attention.bare, bound)


@claim("Both A and both B require a gradient, and nothing else does.")
def only_factors_train(trial: Trial) -> None:
    attention = Attention(trial)
    halves = zip(("in_proj", "out_proj"), attention.factors, strict=True)
    sizes = {f"{part} of {name}": getattr(own, part).numel() for name, own in halves for part in ("a", "b")}
    judge_trained(trial, attention.wrap(), sizes)


@claim(
    "The gradients of A and B, and of query, key and value are those of the definition.",
    needs=("factors",),
    after=DEFINED,
)
def gradients_match(trial: Trial) -> None:
    attention = Attention(trial)
    layer, inputs = attention.layer(), attention.inputs("cross")
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    trial.backward(attention.output(layer, inputs), attention.grad.clone())
    into, out = attention.pair("factors", layer, Factors)
    live = {"in_a": into.a, "in_b": into.b, "out_a": out.a, "out_b": out.b}
    found = {name: trial.gradient_of(name, parameter) for name, parameter in live.items()}
    for name in ("query", "key", "value"):
        found[name] = trial.tensor_of(f"the gradient of {name}", getattr(inputs, name).grad)
    terms = attention.inputs("cross"), attention.grad, attention.adapted
    wanted, allowed = gradients(*terms), gradient_bounds(*terms, trial.arithmetic)
    for name, gradient in found.items():
        trial.near(f"grad of {name}", gradient, getattr(wanted, name), getattr(allowed, name))
    trial.visible(wanted.in_b, allowed.in_b)
    trial.visible(wanted.out_b, allowed.out_b)


@claim("With its adapters off a layer is its base, and on again it is not.", needs=("enable",), after=DEFINED)
def disabled_is_base(trial: Trial) -> None:
    attention = Attention(trial)
    layer = attention.layer()
    trial.ask("enable", layer, False)
    attention.judge(layer, "self", attention.bare, bound)
    trial.ask("enable", layer, True)
    attention.defined(layer)


@claim("The merged layer computes the definition.", needs=("merge",), after=DEFINED)
def merged_equals_definition(trial: Trial) -> None:
    attention = Attention(trial)
    attention.defined(trial.merge(attention.layer()), "masked", merged_bound)


@claim(
    "Unmerging restores both weights, and with them the output.",
    needs=("merge", "unmerge", "weight"),
    after="attention.merged_equals_definition",
)
def unmerge_restores(trial: Trial) -> None:
    attention = Attention(trial)
    layer = attention.layer()
    trial.merge(layer)
    trial.ask("unmerge", layer)
    attention.judge_base(layer, cycles=1)
    attention.judge(layer, "self", attention.over(attention.weights_of(layer)), bound)


@claim("What is deployed computes the definition.", needs=("merge_and_unload",), after=DEFINED)
def unloaded_equals_definition(trial: Trial) -> None:
    attention = Attention(trial)
    unloaded = trial.ask("merge_and_unload", attention.layer())
    attention.defined(unloaded, "masked", merged_bound)


@claim("What is deployed trains nothing: the base stays frozen.", needs=("merge_and_unload",))
def unloaded_trains_nothing(trial: Trial) -> None:
    trainable = trial.trainable(trial.ask("merge_and_unload", Attention(trial).layer()))
    trial.require(not trainable, f"{', '.join(trainable)} requires a gradient")


@claim(
    "Adapters that were saved and loaded into a fresh layer compute the same.",
    needs=("state", "load_state"),
    after=DEFINED,
)
def survives_saving(trial: Trial) -> None:
    attention = Attention(trial)
    kept, fresh = saved(trial, attention.layer()), attention.wrap()
    trial.ask("load_state", fresh, kept)
    attention.defined(fresh)


@claim("A deep copy of a layer that was used computes what the layer did, and has factors of its own.")
def survives_deepcopy(trial: Trial) -> None:
    attention = Attention(trial)
    layer = attention.layer()
    before = attention.output(layer, attention.inputs()).detach().clone()
    with blaming("copy.deepcopy"):
        twin = copy.deepcopy(layer)
    into, out = attention.factors
    trial.ask("load", layer, (Factors(-into.a, into.b), Factors(-out.a, out.b)))
    allowed = 2 * bound(attention.inputs(), attention.adapted, trial.arithmetic).output
    trial.near("the copy's output", attention.output(twin, attention.inputs()), before.double(), allowed)
    attention.visible()


@claim("A deep copy of a merged layer computes what that does.", needs=("merge",))
def merged_survives_deepcopy(trial: Trial) -> None:
    attention = Attention(trial)
    merged = trial.merge(attention.layer())
    wanted = attention.output(merged, attention.inputs()).detach().double()
    with blaming("copy.deepcopy"):
        twin = copy.deepcopy(merged)
    allowed = 2 * merged_bound(attention.inputs(), attention.adapted, trial.arithmetic).output
    trial.near("the copy's output", attention.output(twin, attention.inputs()), wanted, allowed)
    attention.visible(allow=merged_bound)


@claim("Forward and backward leave the base as it was.", needs=("weight",))
def base_is_untouched_by_a_step(trial: Trial) -> None:
    attention = Attention(trial)
    layer, steps = attention.layer(), 3
    for _ in range(steps):
        trial.backward(attention.output(layer, attention.inputs()), attention.grad.clone())
    attention.judge_base(layer, cycles=steps)


@claim(
    "Steps with gradient checkpointing leave the base as it was.",
    needs=("weight",),
    after="attention.base_is_untouched_by_a_step",
)
def base_is_untouched_by_checkpointing(trial: Trial) -> None:
    attention = Attention(trial)
    layer, steps = attention.layer(), 3
    for _ in range(steps):
        with blaming("forward"):
            output, _ = checkpoint(layer, *attention.inputs()[:3], use_reentrant=False)
        trial.backward(trial.tensor_of("the output", output), attention.grad.clone())
    attention.judge_base(layer, cycles=2 * steps)  # each is computed again on the way back


@claim(
    "In an nn.TransformerEncoderLayer the adapters act in evaluation as well, where torch has a kernel for the whole.",
    draws=DRAWS | {"d_in": EVEN, "d_out": EVEN, "bias": st.just(True)},
)
def acts_in_an_encoder(trial: Trial) -> None:
    attention = Attention(trial)
    d, dtype = trial.case.d_in, trial.case.torch_dtype
    encoder: Any = nn.TransformerEncoderLayer(
        d, attention.heads, 1, 0.0, batch_first=True, norm_first=True, dtype=dtype
    )
    # Attention is given the bias of its norm, whatever x is, and what comes after it adds nothing: x + attention.
    x, same = attention.inputs().query, attention.grad[0, 0]
    for parameter in (encoder.norm1.weight, encoder.linear2.weight, encoder.linear2.bias):
        nn.init.zeros_(parameter)
    encoder.norm1.bias.data.copy_(same)
    encoder.self_attn = trial.module(attention.layer())
    try:
        with blaming("forward"), torch.no_grad():
            y = encoder.eval()(x.clone())
    except Raised as refused:
        if isinstance(refused.__cause__, AttributeError):  # torch reads what an nn.MultiheadAttention has
            raise NotOffered(f"not inside an nn.TransformerEncoderLayer: {refused.__cause__}") from None
        raise
    given = Inputs(*[same.expand_as(x).clone()] * 3)
    exact, allowed = forward(given, attention.adapted).output, bound(given, attention.adapted, trial.arithmetic).output
    wanted = x.double() + exact
    allowed = allowed + (trial.arithmetic.unit + bounds.FLOAT64.unit) * (wanted.abs() + allowed)
    trial.near("the encoder's output", y, wanted, allowed)
    trial.visible(exact - forward(given, attention.bare).output, allowed)


@claim("A dropout acts in training, or is refused.")
def dropout_acts(trial: Trial) -> None:
    attention = Attention(trial)
    layer = attention.layer(replace(trial.spec, dropout=0.5))
    trial.train(layer, False)
    steady = attention.output(layer, attention.inputs()).detach().double()
    # Two roundings of one number may differ by twice what each may stray.
    allowed = 2 * bound(attention.inputs(), attention.adapted, trial.arithmetic).output
    attention.visible()
    trial.train(layer, True)
    in_training = [attention.output(layer, attention.inputs()).detach().double() for _ in range(4)]
    differs = any(bool(((y - steady).abs() > allowed).any()) for y in in_training)
    trial.require(differs, "with a dropout of 0.5 four outputs in training are those of evaluation")
