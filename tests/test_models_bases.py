"""Bases of a model's layers, dense and quantised."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from lora_bench import bounds, definition
from lora_bench.bench.workload import TARGETS
from lora_bench.bounds import Arithmetic, worst
from lora_bench.models.bases import base_layer, dequantised, missing, quantise
from lora_bench.models.inject import find_targets, layer_kind
from lora_bench.reference import Nf4Linear
from lora_bench.spec import Factors
from tests.small_models import Nested, micro

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@BOTH_DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(128, 96), (5, 3), (64, 48), (96, 64)])
@pytest.mark.parametrize("kind", ["linear", "nf4", "linear4bit"])
def test_a_base_is_frozen_and_multiplies_by_its_dequantised_weight(
    kind: str, d_in: int, d_out: int, bias: bool, dtype: torch.dtype
) -> None:
    if reason := missing(kind):
        pytest.skip(reason)
    torch.manual_seed(0)
    linear, x = nn.Linear(d_in, d_out, bias=bias, dtype=dtype), torch.randn(4, d_in).to(dtype)
    base = base_layer(kind, copy.deepcopy(linear)).eval()
    weight = dequantised(base).clone()
    nothing = Factors(torch.zeros(1, d_in, dtype=dtype), torch.zeros(d_out, 1, dtype=dtype))
    terms = x, weight, linear.bias.detach() if bias else None, nothing, 0.0
    with torch.no_grad():
        y = base(x)

    assert layer_kind(base) == kind
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert worst(y, definition.forward(*terms), bounds.separate(*terms, Arithmetic.of(dtype))).ratio <= 1
    assert (weight.dtype, weight.shape) == (dtype, linear.weight.shape)
    assert torch.equal(dequantised(base), weight), "a forward in eval mode changed the weight"
    assert torch.equal(weight, linear.weight) == (kind == "linear")
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max()
    y = base(x.requires_grad_())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().sum() > 0


def test_a_linear_base_is_the_layer_itself() -> None:
    linear = nn.Linear(4, 3)

    assert base_layer("linear", linear) is linear


def test_quantise_replaces_exactly_the_targets() -> None:
    model = micro()
    quantise(model, "nf4", ["q_proj", "mlp.up_proj"])
    kinds = {place: layer_kind(layer) for place, layer in find_targets(model, [*TARGETS, "lm_head"]).items()}

    assert {place.rpartition(".")[2] for place, kind in kinds.items() if kind == "nf4"} == {"q_proj", "up_proj"}
    assert list(kinds.values()).count("nf4") == 4
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj is quantised already, as nf4$"):
        quantise(model, "nf4", ["k_proj", "q_proj"])
    assert layer_kind(model.model.layers[0].self_attn.k_proj) == "linear"


def test_a_layer_in_two_places_is_quantised_once() -> None:
    model = Nested()
    quantise(model, "nf4", ["twin", "xq_proj"])

    assert isinstance(model.twin, Nf4Linear)
    assert model.twin is model.block["xq_proj"]


def test_a_base_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "a base layer is one of linear, nf4, linear4bit, linear8bit, int4, got"
    with pytest.raises(ValueError, match=f"^{wanted} 'int8'$"):
        base_layer("int8", nn.Linear(2, 2))
    with pytest.raises(TypeError, match=f"^{wanted} a LayerNorm$"):
        dequantised(nn.LayerNorm(2))
    assert missing("nf4") is None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "lora_bench.subjects.bitsandbytes", raising=False)
    assert missing("linear4bit") == "bitsandbytes is not installed: pip install lora-bench[bitsandbytes]"
    with pytest.raises(ImportError, match=r"^bitsandbytes is not installed: pip install lora-bench\[bitsandbytes\]$"):
        base_layer("linear4bit", nn.Linear(2, 2))


def test_bitsandbytes_refuses_float64_and_what_it_cannot_dequantise() -> None:
    if reason := missing("linear4bit"):
        pytest.skip(reason)
    with pytest.raises(TypeError, match=r"torch\.float16, got torch\.float64$"):
        base_layer("linear4bit", nn.Linear(64, 2, dtype=torch.float64))
    layer: Any = base_layer("linear4bit", nn.Linear(64, 32))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        dequantised(layer)
