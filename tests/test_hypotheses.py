"""The hypotheses: every fault that is known is named when it is planted, and no other."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_bench.conformance.hypotheses import HYPOTHESES
from lora_bench.conformance.seen import Seen
from lora_bench.spec import Factors, LoraSpec
from tests.faulty_layers import FORWARD, MERGED, OFF, ROUTED, SUMMED, Fault, Given, given, square
from tests.seen_answers import (
    IDS,
    SEVERAL,
    SINGLE,
    alone,
    bare,
    lengths,
    lora_biased,
    merged,
    mixed,
    name_of,
    summed,
    weighed,
)

both_dtypes = pytest.mark.parametrize("dtype", ["fp64", "fp32"])


def biased(g: Given, times: float) -> Tensor:
    beta = g.adapters[0][1].bias
    assert beta is not None
    return g.base + g.delta + times * beta


def magnified(g: Given, norm: Callable[[Tensor], Tensor], bias: bool = False) -> Tensor:
    """DoRA's output, with another norm, or with a bias that is multiplied too."""
    weight, magnitude = g.w + g.s * g.B @ g.A, g.adapters[0][1].magnitude
    assert magnitude is not None
    times = magnitude[:, None] / norm(weight)
    return linear(g.x, times * weight, times[:, 0] * g.b if bias and g.b is not None else g.b)


LORA_BIAS: dict[str, Fault] = {
    "lora_bias_is_dropped": lambda g: biased(g, 0),
    "lora_bias_is_unscaled": lambda g: biased(g, 1),
    "lora_bias_is_doubled": lambda g: biased(g, 2 * g.s),
}
DORA: dict[str, Fault] = {
    "magnitude_is_ignored": lambda g: g.base + g.delta,
    "dora_norm_is_of_the_base": lambda g: magnified(g, lambda _: lengths(g.w)),
    "dora_norm_is_of_columns": lambda g: magnified(g, lambda w: lengths(w.T).T if square(w) else lengths(w)),
    "dora_norm_is_missing": lambda g: magnified(g, torch.ones_like),
    "dora_scales_the_bias": lambda g: magnified(g, lengths, bias=True),
}


def dropped(g: Given) -> Tensor:
    return torch.nn.functional.dropout(g.x, 0.5)


OTHERS: dict[str, Fault] = {
    "dropout_is_active": lambda g: g.base + g.s * g.ba(g.A, g.B, dropped(g)),
    "dropout_is_on_the_base": lambda g: replace(g, x=dropped(g)).y,
    "base_is_not_quantised": lambda g: linear(g.x, original(g), g.b) + g.delta,
    "padding_mode_is_ignored": lambda g: g.base + g.s * g.ba(g.A, g.B, zero_padded(g)),
}


def original(g: Given) -> Tensor:
    """The weight before it was quantised: any other will do."""
    return g.w + g.w.flip(0) / 8 + 1 / 16


def zero_padded(g: Given) -> Tensor:
    """x with zeros at an edge."""
    return torch.cat([g.x[:, :-1], 0 * g.x[:, -1:]], 1)


def beside(g: Given, found: Tensor) -> Seen:
    """As the answer to one adapter, with dropout, and with what else its layer may have taken for its own."""
    adapters = [(replace(spec, dropout=0.5), own) for spec, own in g.adapters]
    return alone(g, found)._replace(adapters=adapters, original=original(g), zero_padded=zero_padded(g))


# The faults of a family, the cases that they are planted in, and as what answer they are seen.
FAMILIES: dict[str, tuple[dict[str, Fault], Sequence[str], Callable[[Given, Tensor], Seen]]] = {
    "of one layer": (FORWARD, SINGLE, alone),
    "of an adapter that is off": (OFF, SEVERAL, bare),
    "of a merged weight": (MERGED, SINGLE, merged),
    "of the bias of B": (LORA_BIAS, [f"{text} lora_bias" for text in SINGLE], lora_biased),
    "of DoRA": (DORA, [f"{text} dora" for text in SINGLE], weighed),
    "beside the adapter": (OTHERS, SINGLE, beside),
}


@both_dtypes
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in FAMILIES[family][0]])
def test_a_fault_is_named(family: str, name: str, dtype: str) -> None:
    faults, texts, seen = FAMILIES[family]
    every = [given(text, dtype) for text in texts]
    torch.manual_seed(0)

    assert name_of([seen(g, faults[name](g)) for g in every]) == name


@both_dtypes
@pytest.mark.parametrize("name", ROUTED)
def test_a_fault_of_a_mixed_batch_is_named(name: str, dtype: str) -> None:
    every = [given(text, dtype, ids) for text, ids in zip(SEVERAL, IDS, strict=True)]

    assert name_of([mixed(g, ROUTED[name](g)) for g in every]) == name


@both_dtypes
@pytest.mark.parametrize("name", SUMMED)
def test_a_fault_of_a_sum_of_adapters_is_named(name: str, dtype: str) -> None:
    every = [given(text, dtype) for text in SEVERAL]
    if name == "cross_terms":  # which take adapters of one rank
        every = [replace(g, adapters=[*(alike(g, own) for own in g.adapters[:2]), *g.adapters[2:]]) for g in every]

    assert name_of([summed(g, SUMMED[name](g)) for g in every]) == name


def alike(g: Given, adapter: tuple[LoraSpec, Factors]) -> tuple[LoraSpec, Factors]:
    """An adapter with the ranks of the first."""
    (spec, factors), rank = adapter, g.spec.rank
    return replace(spec, rank=rank), Factors(factors.a[:rank], factors.b[:, :rank])


@both_dtypes
def test_a_right_answer_of_a_variant_resembles_nothing(dtype: str) -> None:
    biased_ones, weighed_ones = ([given(f"{text} {flag}", dtype) for text in SINGLE] for flag in ("lora_bias", "dora"))

    assert name_of([lora_biased(g, biased(g, g.s)) for g in biased_ones]) is None
    assert name_of([weighed(g, magnified(g, lengths)) for g in weighed_ones]) is None
    assert name_of([beside(g, g.y) for g in [given(text, dtype) for text in SINGLE]]) is None
    assert name_of([merged(g, g.w + g.s * g.B @ g.A) for g in biased_ones]) is None
    assert name_of([merged(g, g.w) for g in biased_ones]) == "adapter_is_dropped"


def test_a_weight_has_no_bias_no_tokens_and_no_dropout() -> None:
    g = given(SINGLE[1], "fp64")
    update = g.s * g.B @ g.A
    first = torch.cat([update[:, :1], 0 * update[:, 1:]], 1)
    some = torch.cat([2 * update[:, :3], 0 * update[:, 3:]], 1)
    dropout = [(replace(g.spec, dropout=0.5), g.adapters[0][1])]

    assert name_of([merged(g, g.w)._replace(bias=g.b)]) == "adapter_is_dropped"
    assert name_of([merged(g, g.w + first)]) is None
    assert name_of([merged(g, g.w + some)._replace(adapters=dropout)]) is None


def test_of_more_features_than_there_are_masks_no_dropout_is_told() -> None:
    torch.manual_seed(0)
    few, many = given("t4 i10 o6 r3 a4 fp64 s1", "fp64"), given("t4 i11 o6 r3 a4 fp64 s1", "fp64")

    assert name_of([beside(few, OTHERS["dropout_is_active"](few))]) == "dropout_is_active"
    assert name_of([beside(many, OTHERS["dropout_is_active"](many))]) is None


PARTS = ("x", "factors", "x_and_factors", "delta", "output")
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rounded(g: Given, part: str, narrow: torch.dtype) -> Tensor:
    """The output with a part computed in a narrower dtype."""

    def through(*tensors: Tensor) -> list[Tensor]:
        return [tensor.to(narrow) for tensor in tensors]

    wide = g.x.dtype
    match part:
        case "x":
            return g.base + g.s * g.ba(g.A, g.B, g.x.to(narrow).to(wide))
        case "factors":
            return g.base + g.s * g.ba(g.A.to(narrow).to(wide), g.B.to(narrow).to(wide))
        case "x_and_factors":
            return g.base + g.s * g.ba(g.A.to(narrow).to(wide), g.B.to(narrow).to(wide), g.x.to(narrow).to(wide))
        case "delta":
            x, a, b = through(g.x, g.A, g.B)
            return g.base + (g.s * g.ba(a, b, x)).to(wide)
    x, w, a, b = through(g.x, g.w, g.A, g.B)
    return (linear(x, w, None if g.b is None else g.b.to(narrow)) + g.s * g.ba(a, b, x)).to(wide)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("dtype", "narrow"), [("fp64", "bf16"), ("fp64", "fp16"), ("fp64", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
)
def test_a_part_that_is_rounded_is_named(part: str, dtype: str, narrow: str) -> None:
    every = [given(text, dtype) for text in SINGLE]

    assert name_of([alone(g, rounded(g, part, NARROW[narrow])) for g in every]) == f"{part}_in_{narrow}"


def test_every_fault_that_is_known_is_planted() -> None:
    families = (ROUTED, SUMMED, *(faults for faults, _, _ in FAMILIES.values()))
    planted = {name for family in families for name in family}
    planted |= {f"{part}_in_{narrow}" for part in PARTS for narrow in NARROW}

    assert planted == {hypothesis.name for hypothesis in HYPOTHESES} | {"scale_is_off", "adapter_is_left_over"}
