"""The quantised bases of third parties multiply by what they dequantise to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic, worst
from lora_bench.spec import Factors


def quantisers(kind: str) -> tuple[Callable[[nn.Linear], Any], Callable[[Any], Tensor]]:
    if kind == "int4":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install lora-bench[torchao]")
        from lora_bench.subjects import torchao

        return torchao.int4, torchao.dequantise
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install lora-bench[bitsandbytes]")
    from lora_bench.subjects import bitsandbytes

    return bitsandbytes.linear8bit, bitsandbytes.dequantise


@pytest.mark.parametrize("kind", ["int4", "linear8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantised_base_multiplies_by_what_it_dequantises_to(kind: str, dtype: torch.dtype) -> None:
    make, dequantise = quantisers(kind)
    torch.manual_seed(0)
    linear = nn.Linear(64, 7, dtype=dtype)
    before, x = linear.weight.detach().clone(), torch.randn(3, 64, dtype=dtype)
    base = make(linear)
    weight = dequantise(base)
    none = Factors(torch.zeros(1, 64, dtype=dtype), torch.zeros(7, 1, dtype=dtype))
    terms = x, weight, linear.bias.detach(), none, 0.0
    with torch.no_grad():
        y = base(x)

    assert worst(y, definition.forward(*terms), bounds.separate(*terms, Arithmetic.of(dtype))).ratio <= 1
    assert torch.equal(dequantise(base), weight)
    assert weight.dtype == dtype
    assert 0 < (weight - before).abs().max() < before.abs().max() / (7 if kind == "int4" else 127)
    assert torch.equal(linear.weight, before)
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_an_8_bit_base_strays_in_evaluation_by_no_more_than_it_says() -> None:
    make, dequantise = quantisers("linear8bit")
    torch.manual_seed(0)
    base, x = make(nn.Linear(64, 7)).eval(), torch.randn(5, 64)
    weight = dequantise(base).double()
    strayed = base(x).detach() - (x.double() @ weight.T + base.bias.detach().double())
    rounded = x.abs().max(1, keepdim=True).values / 254 + x.abs() / 2048

    assert (strayed.abs() <= rounded.double() @ weight.abs().T).all()
    assert strayed.abs().max() > 1e-3


def test_torchao_refuses_what_it_cannot_quantise() -> None:
    int4, _ = quantisers("int4")
    with pytest.raises(TypeError, match=r"^torchao quantises .*, got torch\.float64$"):
        int4(nn.Linear(32, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^in_features must be a multiple of 32, got 33$"):
        int4(nn.Linear(33, 4))
