"""Problems for LoRA in attention, and a layer's output beside what the bounds allow."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_bench.attention import Adapted, Attended, Inputs, Projection
from lora_bench.bounds import worst
from lora_bench.case import DTYPES
from lora_bench.spec import Factors

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
brief = settings(max_examples=settings().max_examples // 2)


class Trial(NamedTuple):
    """A problem for one layer; its tensors come of the seed, those of B times `gain`, W times `size`."""

    inputs: Inputs
    layer: Adapted
    grad: Tensor


def drawn(
    *,
    dtype: str = "fp64",
    seed: int = 0,
    heads: int = 2,
    head_dim: int = 2,
    n: int = 2,
    length: int = 4,
    source: int | None = None,
    rank: int = 2,
    scaling: float = 1.5,
    gain: float = 1.0,
    size: float = 0.5,
    biased: bool = True,
    causal: bool = False,
) -> Trial:
    """Self-attention, or with a `source` a key, which is the value too, of another length."""
    generator, d = torch.Generator().manual_seed(seed), heads * head_dim

    def normal(*shape: int, times: float = 1.0) -> Tensor:
        values = times * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(getattr(torch, DTYPES[dtype]))

    def projection(rows: int) -> Projection:
        factors = Factors(normal(rank, d), normal(rows, rank, times=gain))
        return Projection(normal(rows, d, times=size), normal(rows) if biased else None, factors, scaling)

    query = normal(n, length, d)
    key = query if source is None else normal(n, source, d)
    mask = torch.ones(length, key.shape[1], dtype=torch.bool).triu(1) if causal else None
    return Trial(Inputs(query, key, key, mask), Adapted(projection(3 * d), projection(d), heads), normal(n, length, d))


def trials(dtype: str) -> st.SearchStrategy[Trial]:
    few: dict[str, st.SearchStrategy[object]] = {"dtype": st.just(dtype), "seed": st.integers(0, 2**16)}
    few |= {"n": st.integers(1, 2), "heads": st.integers(1, 3), "rank": st.integers(1, 4)}
    few |= {"scaling": st.sampled_from([0.5, 1.0, 1.5, 4.0, -2.0]), "biased": st.booleans(), "causal": st.booleans()}
    few |= {"gain": st.sampled_from([1.0, 0.01, 4.0, 1e-4, 1e-6]), "size": st.sampled_from([1.0, 0.3, 0.05])}
    few["source"] = st.none() | st.integers(1, 6)
    small = few | {"head_dim": st.sampled_from([1, 2, 4]), "length": st.integers(1, 5)}
    large = few | {"head_dim": st.just(16), "length": st.just(20)}
    return st.one_of(*[st.builds(drawn, **small)] * 4, st.builds(drawn, **large))


def factors_of(layer: Adapted) -> tuple[Factors, Factors]:
    return layer.in_proj.factors, layer.out_proj.factors


def base_of(layer: Adapted, batch_first: bool = True) -> nn.MultiheadAttention:
    into, out, heads = layer
    d, biased = into.weight.shape[1], into.bias is not None
    base = nn.MultiheadAttention(d, heads, bias=biased, batch_first=batch_first, dtype=into.weight.dtype)
    state = {"in_proj_weight": into.weight, "in_proj_bias": into.bias}
    state |= {"out_proj.weight": out.weight, "out_proj.bias": out.bias}
    base.load_state_dict({name: own for name, own in state.items() if own is not None})
    return base.eval()


def ratio(found: Tensor, wanted: Tensor, allowed: Tensor) -> float:
    """The error as a multiple of what is allowed; 0 where float16 overflows, which is outside of the bounds."""
    overflows = found.dtype == torch.float16 and not found.isfinite().all()
    return 0.0 if overflows else worst(found.detach(), wanted, allowed).ratio


def ratios(found: tuple[Tensor, Tensor | None], wanted: Attended, allowed: Attended) -> Iterator[float]:
    for one, other, limit in zip(found, wanted, allowed, strict=True):
        if one is not None:
            yield ratio(one, other, limit)
