"""`Case`: one small problem as a short string, so that every failure replays; and the tensors drawn from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy
    from torch import Tensor

DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LETTERS = {
    "tokens": "t",
    "d_in": "i",
    "d_out": "o",
    "rank": "r",
    "alpha": "a",
    "seed": "s",
    "gain": "g",
    "adapters": "n",
}


class Problem(NamedTuple):
    """The tensors of a case, rounded once to its dtype.

    x (tokens, d_in), weight (d_out, d_in), bias (d_out,) or None, grad (tokens, d_out) a loss's gradient at y,
    adapters the specs and factors of one or more adapters, ids (tokens,) int64 in -1 .. adapters - 1.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    adapters: list[tuple[LoraSpec, Factors]]
    ids: Tensor


@dataclass(frozen=True)
class Case:
    """A problem for one layer, equal to its text: `Case.parse(str(case)) == case`.

    `gain` multiplies B's unit-variance entries; with several `adapters` each next one has another rank and another
    scale (the faults of multi-adapter code hide behind equal ones).

    Raises ValueError for a value out of range.
    """

    tokens: int = 3
    d_in: int = 5
    d_out: int = 4
    rank: int = 2
    alpha: float = 3.0
    dtype: str = "fp64"
    seed: int = 0
    gain: float = 1.0
    adapters: int = 1
    bias: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tokens", 0), ("d_in", 1), ("d_out", 1), ("rank", 1), ("seed", 0), ("adapters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "gain"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def __str__(self) -> str:
        """Shapes, dtype and seed always; what is at its default otherwise is left out."""
        always = {"tokens", "d_in", "d_out", "rank", "alpha", "seed"}
        words = [
            f"{letter}{_number(getattr(self, name))}"
            for name, letter in LETTERS.items()
            if name in always or getattr(self, name) != getattr(Case, name)
        ]
        words.insert(5, self.dtype)
        return " ".join(words + [flag for flag in ("bias", "rslora") if getattr(self, flag)])

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `text` names; ValueError naming the word that is not understood."""
        names = {letter: name for name, letter in LETTERS.items()}
        types = {field.name: field.type for field in fields(cls)}
        values: dict[str, object] = {}
        for word in text.split():
            match = re.fullmatch(r"([a-z])(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", word)
            name: str
            value: object
            if word in DTYPES:
                name, value = "dtype", word
            elif word in ("bias", "rslora"):
                name, value = word, True
            elif match and match[1] in names:
                name = names[match[1]]
                try:
                    value = int(match[2]) if types[name] == "int" else float(match[2])
                except ValueError:
                    raise ValueError(f"{name} must be an integer, got {word!r} in the case {text!r}") from None
            else:
                known = ", ".join([f"{letter}N ({name})" for name, letter in LETTERS.items()] + [*DTYPES])
                raise ValueError(f"{word!r} is no part of a case in {text!r}; known are {known}, bias, rslora")
            if name in values:
                raise ValueError(f"{name} is given twice in the case {text!r}")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]  # each value was made by its field's type

    @property
    def spec(self) -> LoraSpec:
        """The first adapter's spec."""
        return LoraSpec(rank=self.rank, alpha=self.alpha, rslora=self.rslora)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, DTYPES[self.dtype])
        assert isinstance(dtype, torch.dtype)
        return dtype

    def draw(self) -> Problem:
        """The tensors: drawn in float64 from the seed alone, then rounded once to the dtype."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, gain: float = 1.0) -> Tensor:
            return (gain * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(self.torch_dtype)

        x, weight, bias = normal(self.tokens, self.d_in), normal(self.d_out, self.d_in), normal(self.d_out)
        grad = normal(self.tokens, self.d_out)
        adapters = []
        for index in range(self.adapters):
            alpha = self.alpha * (1 + index / 4) * (self.rank + index) / self.rank
            spec = LoraSpec(self.rank + index, alpha, rslora=self.rslora)
            factors = Factors(normal(spec.rank, self.d_in), normal(self.d_out, spec.rank, gain=self.gain))
            adapters.append((spec, factors))
        ids = torch.randint(-1, self.adapters, (self.tokens,), generator=generator)
        return Problem(x, weight, bias if self.bias else None, grad, adapters, ids)


def _number(value: float) -> str:
    """As short as it goes without becoming another number."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


def cases(**strategies: SearchStrategy[object]) -> SearchStrategy[Case]:
    """Hypothesis' strategy over small cases, any field replaced by `strategies`; shrinks to 1 x 1 layers.

    Square layers come often, since a forgotten transpose hides in every other shape.
    """
    from hypothesis import strategies as st

    small = st.integers(1, 8)
    defaults: dict[str, SearchStrategy[object]] = {
        "tokens": st.integers(1, 6),
        "d_in": small,
        "d_out": small,
        "rank": st.integers(1, 5),
        "alpha": st.sampled_from([1.0, 2.0, 3.0, 0.5, 6.0, 8.0, 16.0, 32.0]),
        "dtype": st.sampled_from(list(DTYPES)),
        "seed": st.integers(0, 2**16),
        "gain": st.sampled_from([1.0, 0.01, 4.0]),
        "bias": st.booleans(),
        "rslora": st.booleans(),
    }
    either = st.builds(Case, **(defaults | strategies))
    if {"d_in", "d_out"} & strategies.keys():
        return either
    square = small.flatmap(lambda size: st.builds(Case, **(defaults | strategies | _square(size))))
    return st.one_of(either, square)


def _square(size: int) -> dict[str, SearchStrategy[object]]:
    from hypothesis import strategies as st

    return {"d_in": st.just(size), "d_out": st.just(size)}
