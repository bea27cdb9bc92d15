"""Bugs of the output, the beginning and the misuse of one adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_bench.conformance.zoo.planting import (
    bug,
    computing,
    correct,
    delta,
    output,
    specified,
    specimens,
    wrapped,
)
from lora_bench.spec import Factors


def truncated(layer: Any, kept: slice) -> None:
    """Ranks that are left out: their A stays zero whatever is loaded."""
    load = layer.load

    def partial(factors: Factors) -> None:
        left = torch.zeros_like(factors.a)
        left[kept] = factors.a[kept]
        load(Factors(left, factors.b, factors.bias))

    layer.load = partial


def narrow(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    return y + delta(layer, x).bfloat16().to(y.dtype)


def twice_biased(layer: Any, x: Tensor) -> Tensor:
    bias = getattr(layer.base_layer, "bias", None)
    y = correct(layer, x)
    return y if bias is None else output(layer, y, lambda own: own + bias)


def unscaled_rslora(layer: Any, factor: float) -> None:
    """A scale that is set anew is set as alpha / r."""
    layer.scaling = factor * layer.spec.alpha / layer.spec.rank


def compounded(layer: Any, factor: float) -> None:
    layer.scaling *= factor


def switched_off_on_the_way(layer: Any, x: Tensor) -> Tensor:
    """What is switched off for a moment stays off where that moment ends in an exception."""
    acting, layer.acting = getattr(layer, "acting", True), False
    y: Tensor = layer.base_layer(x)
    layer.acting = acting
    return y + delta(layer, x) if acting else y


SHARED: dict[Any, nn.Parameter] = {}


def shares_a(layer: Any) -> None:
    """Layers of one shape get one and the same A."""
    layer.lora_A = SHARED.setdefault((layer.lora_A.shape, layer.lora_A.dtype), layer.lora_A)


def dropped_under_autocast(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x) if torch.is_autocast_enabled("cpu") else correct(layer, x)
    return y


def dropped(x: Tensor, training: bool) -> Tensor:
    return functional.dropout(x, 0.5, training)


def of_numbers(factors: Factors) -> Factors:
    return factors.map(torch.nan_to_num)


SPECIMENS = (
    *specimens(
        "forward.matches_definition",
        the_scale_is_alpha=(specified(alpha=lambda spec: spec.alpha * spec.rank), "LLMs-from-scratch#821"),
        the_scale_is_one=specified(alpha=lambda spec: float(spec.rank), rslora=lambda _: False),
        the_scale_is_floored=specified(
            alpha=lambda spec: float(spec.alpha // spec.rank * spec.rank), rslora=lambda _: False
        ),
        the_scale_is_applied_twice=(specified(alpha=lambda spec: spec.alpha * spec.scaling), "peft#3111"),
        rslora_is_ignored=(specified(rslora=lambda _: False), "vllm#6909, sglang#40835, lorax#299, TensorRT-LLM#1668"),
        rslora_always=specified(rslora=lambda _: True),
        a_hundredth_off=specified(alpha=lambda spec: spec.alpha * 1.01),
        a_ten_thousandth_off=specified(alpha=lambda spec: spec.alpha * 1.0001),
        a_millionth_off=specified(alpha=lambda spec: spec.alpha * 1.000001),
        the_last_rank_is_dropped=wrapped(lambda layer: truncated(layer, slice(-1))),
        half_of_the_ranks_are_dropped=wrapped(lambda layer: truncated(layer, slice((layer.spec.rank + 1) // 2))),
        the_adapter_is_in_bf16=computing(narrow),
        the_adapter_is_dropped=(
            computing(lambda layer, x: layer.base_layer(x)),
            "vllm#55193, vllm#34186, diffusers#9950",
        ),
        the_adapter_is_applied_twice=computing(lambda layer, x: correct(layer, x) + delta(layer, x)),
        the_adapter_is_subtracted=computing(lambda layer, x: layer.base_layer(x) - delta(layer, x)),
        the_base_is_missing=computing(delta),
        outputs_are_rolled=computing(
            lambda layer, x: layer.base_layer(x) + output(layer, delta(layer, x), lambda y: y.roll(1, -1))
        ),
        tokens_are_rolled=computing(lambda layer, x: layer.base_layer(x) + delta(layer, x).roll(1, 0)),
        the_first_token_only=computing(
            lambda layer, x: layer.base_layer(x) + torch.cat([delta(layer, x)[:1], 0 * delta(layer, x)[1:]])
        ),
        it_raises=computing(lambda _layer, _x: 1 / 0),
        it_returns_nothing=computing(lambda _layer, _x: None),
    ),
    *specimens("merge.keeps_bias", the_bias_is_added_twice=computing(twice_biased)),
    *specimens("forward.keeps_dtype", fp32_comes_out=computing(lambda layer, x: correct(layer, x).float())),
    *specimens(
        "forward.keeps_leading_dimensions",
        the_output_is_flat=computing(lambda layer, x: correct(layer, x).flatten(0, -2)),
        the_first_token_only=computing(lambda layer, x: layer.base_layer(x) + delta(layer, x[..., :1, :])),
        two_dimensions_only=computing(lambda layer, x: correct(layer, x) if x.ndim == 2 else layer.base_layer(x)),
    ),
    *specimens("forward.leaves_input_untouched", scaled_in_place=computing(lambda layer, x: correct(layer, x.mul_(2)))),
    *specimens(
        "forward.disabled_is_base",
        off_is_ignored=bug(enable=lambda _layer, _enabled: None),
        off_for_good=bug(enable=lambda layer, _enabled: layer.enable(False)),
    ),
    *specimens(
        "forward.scale_multiplies",
        the_factor_is_ignored=bug(scale=lambda _layer, _factor: None),
        factors_compound=bug(scale=compounded),
        alpha_over_r_for_rslora=(bug(scale=unscaled_rslora), "peft#2733"),
    ),
    *specimens("forward.error_leaves_no_trace", off_after_an_error=computing(switched_off_on_the_way)),
    *specimens("forward.layers_are_independent", one_a_for_all=wrapped(shares_a)),
    *specimens("forward.autocast_only_rounds", dropped_under_autocast=computing(dropped_under_autocast)),
    *specimens(
        "forward.dropout_only_in_training",
        in_evaluation_too=computing(lambda layer, x: layer.base_layer(x) + delta(layer, dropped(x, True))),
        on_the_input_of_the_base=computing(lambda layer, x: correct(layer, dropped(x, layer.training))),
        never=specified(dropout=lambda _: 0.0),
    ),
    *specimens("init.is_identity", b_is_random=wrapped(lambda layer: nn.init.normal_(layer.lora_B))),
    *specimens(
        "init.a_is_random_b_is_zero",
        both_are_random=wrapped(lambda layer: nn.init.normal_(layer.lora_B)),
        both_are_zero=wrapped(lambda layer: nn.init.zeros_(layer.lora_A)),
        a_is_the_same_in_every_layer=wrapped(lambda layer: nn.init.constant_(layer.lora_A, 0.1)),
    ),
    *specimens(
        "misuse.rank_below_one_is_refused",
        at_least_one=specified(rank=lambda spec: max(spec.rank, 1)),
    ),
    *specimens(
        "misuse.alpha_that_is_no_number_shows",
        taken_for_zero=specified(alpha=lambda spec: spec.alpha if math.isfinite(spec.alpha) else 0.0),
    ),
    *specimens(
        "misuse.alpha_of_zero_is_base",
        taken_for_the_rank=specified(alpha=lambda spec: spec.alpha or 1.0),
    ),
    *specimens("misuse.negative_alpha_subtracts", its_sign_is_dropped=specified(alpha=lambda spec: abs(spec.alpha))),
    *specimens(
        "misuse.dropout_above_one_is_refused",
        taken_for_none=specified(dropout=lambda spec: spec.dropout if spec.dropout < 1 else 0.0),
    ),
    *specimens(
        "misuse.factors_that_are_no_numbers_show",
        taken_for_zero=bug(load=lambda layer, factors: layer.load(of_numbers(factors))),
    ),
    *specimens(
        "misuse.foreign_state_is_refused",
        passed_over=bug(
            load_state=lambda layer, state: layer.load_adapter_state(
                layer.adapter_state() | {k: v for k, v in state.items() if k in layer.adapter_state()}
            )
        ),
    ),
)
