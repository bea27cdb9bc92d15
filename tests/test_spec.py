"""The words: specs and factors, and how they refuse what no adapter can be."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scaling"),
    [
        (8, 16.0, False, 2.0),
        (16, 8, False, 0.5),
        (16, 8, True, 2.0),
        (2, 3.0, True, 3 / math.sqrt(2)),
        (1, -2, True, -2.0),
    ],
)
def test_scaling_is_alpha_over_r_or_over_its_root(rank: int, alpha: float, rslora: bool, scaling: float) -> None:
    assert LoraSpec(rank, alpha, rslora=rslora).scaling == scaling


@given(rank=st.integers(1, 300), d_in=st.integers(1, 9000), d_out=st.integers(1, 9000))
def test_parameters_are_those_of_both_factors(rank: int, d_in: int, d_out: int) -> None:
    factors = Factors(torch.empty(rank, d_in, device="meta"), torch.empty(d_out, rank, device="meta"))

    assert LoraSpec(rank, 1).parameters(d_in, d_out) == factors.a.numel() + factors.b.numel()


def test_a_spec_needs_a_rank_and_an_alpha_and_no_more() -> None:
    assert LoraSpec(4, 8) == LoraSpec(rank=4, alpha=8.0, dropout=0.0, rslora=False)
    assert LoraSpec(99, 1, dropout=0.999).dropout == 0.999  # a rank above the layer's features is legal, too


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"rank": "8"}, TypeError, "rank must be an integer, got '8'"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        ({"alpha": -math.inf}, ValueError, "alpha must be finite, got -inf"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be in [0, 1), got -0.1"),
        ({"dropout": math.nan}, ValueError, "dropout must be in [0, 1), got nan"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=exactly(message)):
        LoraSpec(**({"rank": 2, "alpha": 1.0} | values))


def test_factors_know_their_sizes() -> None:
    factors = Factors(torch.zeros(2, 5), torch.zeros(7, 2))

    assert (factors.rank, factors.d_in, factors.d_out) == (2, 5, 7)
    factors.fit(2, 5, 7)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(2, 5, 1), torch.zeros(7, 2), ValueError, "factor a must be a matrix, got shape (2, 5, 1)"),
        (torch.zeros(2, 5), torch.zeros(7), ValueError, "factor b must be a matrix, got shape (7,)"),
        (
            torch.zeros(5, 2),
            torch.zeros(7, 2),
            ValueError,
            "factors must share a rank: a is (r, d_in) and b is (d_out, r), got a (5, 2) and b (7, 2)",
        ),
        (
            torch.zeros(2, 5).half(),
            torch.zeros(7, 2),
            TypeError,
            "factors must share a dtype, got a torch.float16 and b torch.float32",
        ),
        (
            torch.zeros(2, 5, dtype=torch.int32),
            torch.zeros(7, 2),
            TypeError,
            "factor a must be of a 16-, 32- or 64-bit floating dtype, got torch.int32",
        ),
        (
            torch.zeros(2, 5),
            torch.zeros(7, 2, dtype=torch.float8_e4m3fn),
            TypeError,
            "factor b must be of a 16-, 32- or 64-bit floating dtype, got torch.float8_e4m3fn",
        ),
        (
            torch.zeros(2, 5, dtype=torch.complex64),
            torch.zeros(7, 2),
            TypeError,
            "factor a must be of a 16-, 32- or 64-bit floating dtype, got torch.complex64",
        ),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    a: torch.Tensor, b: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=exactly(message)):
        Factors(a, b)


@pytest.mark.parametrize("wanted", [(3, 5, 7), (2, 6, 7), (2, 5, 8), (2, 7, 5)])
def test_factors_of_another_layer_do_not_fit(wanted: tuple[int, int, int]) -> None:
    rank, d_in, d_out = wanted
    message = f"factors must be a ({rank}, {d_in}) and b ({d_out}, {rank}) here, got a (2, 5) and b (7, 2)"

    with pytest.raises(ValueError, match=exactly(message)):
        Factors(torch.zeros(2, 5), torch.zeros(7, 2)).fit(*wanted)


def test_factors_change_to_a_dtype_that_holds_them() -> None:
    factors = Factors(torch.full((1, 2), 70000.0), torch.tensor([[1.0], [math.inf]]))

    assert factors.to(torch.bfloat16).a.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold factor a: it has the value 70000"):
        factors.to(torch.float16)
    assert torch.equal(Factors(factors.b.T, factors.b).to(torch.float16).b, factors.b.half())


def test_what_keeps_its_dtype_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a look waits for it, and a switch loads hundreds of factors."""

    def looks(*_: object) -> None:
        raise AssertionError("looked")

    factors = Factors(torch.ones(2, 3), torch.ones(4, 2))
    monkeypatch.setattr(torch.Tensor, "isfinite", looks)
    monkeypatch.setattr(torch.Tensor, "count_nonzero", looks)

    assert factors.to(torch.float32).a.dtype == torch.float32
    assert factors.blocks(1)[0] is factors.b
    with pytest.raises(AssertionError, match="looked"):
        factors.to(torch.bfloat16)
