"""`Case`: one small problem as a short string, so that every failure replays; and the tensors drawn from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.spec import Factors, LoraSpec
from lora_bench.subject import KNOWN

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
    "kernel": "kernel",
    "stride": "stride",
    "dilation": "dilation",
    "padding": "padding",
    "groups": "groups",
}
FLAGS = ("bias", "rslora", "lora_bias", "dora")
KINDS = KNOWN["layers"]
QUANTISED = ("nf4", "linear4bit", "linear8bit", "int4")
DIMENSIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
MODES = ("zeros", "reflect", "replicate", "circular")
OPS = ("load", "merge", "unmerge", "on", "off", "train", "eval", "reload", "copy", "switch", "back")
"""What a sequence of verbs may hold; `lora_bench.conformance.lifecycle` says what each does."""


class Problem(NamedTuple):
    """The tensors of a case, rounded once to its dtype.

    x (tokens, d_in), weight (d_out, fan_in), bias (d_out,) or None, grad (tokens, d_out) a loss's gradient at y,
    adapters the specs and factors of one or more adapters, ids (tokens,) int64 in -1 .. adapters - 1. For an embedding
    x is int64 (tokens,), below d_in; for a convolution x is (tokens, d_in, ...) and grad (tokens, d_out, ...).
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
    scale (the faults of multi-adapter code hide behind equal ones). `kind` is that of the base layer, by the words of
    `Subject.layers`; what is said after `rslora` shapes a convolution, but for `ops`, a sequence of verbs.

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
    lora_bias: bool = False
    dora: bool = False
    kind: str = "linear"
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    groups: int = 1
    padding_mode: str = "zeros"
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "gain"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        for name, known in (("dtype", tuple(DTYPES)), ("kind", KINDS), ("padding_mode", MODES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if unknown := set(self.ops) - set(OPS):
            raise ValueError(f"ops must be among {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
        if self.kind == "embedding" and self.bias:
            raise ValueError("an embedding has no bias, got a case of kind embedding with one")
        self._check_convolution()

    def _check_convolution(self) -> None:
        if self.kind not in DIMENSIONS and any(getattr(self, name) != usual for name, usual in CONVOLUTION.items()):
            raise ValueError(f"kernel, stride and the like are for convolutions, got a case of kind {self.kind}")
        for name in ("d_in", "d_out", "rank"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name} must be a multiple of the {self.groups} groups, got {getattr(self, name)}")
        if self.padding >= self.size:
            raise ValueError(f"padding must be less than the size of x, {self.size}, got {self.padding}")

    @property
    def fan_in(self) -> int:
        """How many numbers of x each output is made of: d_in, for a convolution times the places of its kernel."""
        return self.d_in * self.kernel ** DIMENSIONS.get(self.kind, 0)

    @property
    def size(self) -> int:
        """How long each side of a convolution's x is: one place more than the kernel covers."""
        return self.dilation * (self.kernel - 1) + 2

    @property
    def places(self) -> int:
        """How long each side of a convolution's output is."""
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def __str__(self) -> str:
        """Shapes, dtype and seed always; what is at its default otherwise is left out."""
        always = {"tokens", "d_in", "d_out", "rank", "alpha", "seed"}
        words = [
            f"{letter}{_number(getattr(self, name))}"
            for name, letter in LETTERS.items()
            if name in always or getattr(self, name) != getattr(Case, name)
        ]
        words.insert(5, self.dtype)
        words += [flag for flag in FLAGS if getattr(self, flag)]
        words += [value for name in WORDS if (value := getattr(self, name)) != getattr(Case, name)]
        return " ".join([*words, f"ops={','.join(self.ops)}"] if self.ops else words)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `text` names; ValueError naming the word that is not understood."""
        values: dict[str, object] = {}
        for word in text.split():
            name, value = _part(word)
            if name in values:
                raise ValueError(f"{name} is given twice in the case {text!r}")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]  # each value was made by its field's type

    @property
    def spec(self) -> LoraSpec:
        """The first adapter's spec."""
        return LoraSpec(self.rank, self.alpha, rslora=self.rslora, dora=self.dora, lora_bias=self.lora_bias)

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

        around = DIMENSIONS.get(self.kind, 0)
        x = normal(self.tokens, self.d_in, *[self.size] * around)
        if self.kind == "embedding":
            x = torch.randint(self.d_in, (self.tokens,), generator=generator)
        own = self._grouped(torch.ones(self.d_out, self.groups))  # which outputs read which inputs
        weight = normal(self.d_out, self.fan_in) * own.repeat_interleave(self.fan_in // self.groups, 1).to(
            self.torch_dtype
        )
        bias, grad = normal(self.d_out), normal(self.tokens, self.d_out, *[self.places] * around)
        adapters = []
        for index in range(self.adapters):
            rank = self.rank + index * self.groups
            alpha = self.alpha * (1 + index / 4) * rank / self.rank
            spec = replace(self.spec, rank=rank, alpha=alpha)
            a, b = normal(rank, self.fan_in), normal(self.d_out, rank, gain=self.gain)
            factors = Factors(
                a,
                b * own.repeat_interleave(rank // self.groups, 1).to(self.torch_dtype),
                bias=normal(self.d_out, gain=self.gain) if self.lora_bias else None,
                magnitude=1 + normal(self.d_out).abs() if self.dora else None,
            )
            adapters.append((spec, factors))
        ids = torch.randint(-1, self.adapters, (self.tokens,), generator=generator)
        return Problem(x, weight, bias if self.bias else None, grad, adapters, ids)

    def _grouped(self, ones: Tensor) -> Tensor:
        """(d_out, groups): 1 where an output is of a group."""
        import torch

        groups = torch.arange(self.groups)
        return ones * (groups.repeat_interleave(self.d_out // self.groups)[:, None] == groups)


LEAST = {"tokens": 0, "d_in": 1, "d_out": 1, "rank": 1, "seed": 0, "adapters": 1}
LEAST |= {"kernel": 1, "stride": 1, "dilation": 1, "padding": 0, "groups": 1}
PARTS = (
    "wanted some like 't3 i5 o4 r2 a3 fp64 s0' (tokens, d_in, d_out, rank, alpha, dtype, seed; `replay --help` has all)"
)
WORDS = ("kind", "padding_mode")
CONVOLUTION = {
    name: getattr(Case, name) for name in ("kernel", "stride", "dilation", "padding", "groups", "padding_mode")
}


def _part(word: str) -> tuple[str, object]:
    """The field that a word of a case gives, and its value."""
    for name, known in (("dtype", DTYPES), ("kind", KINDS), ("padding_mode", MODES)):
        if word in known:
            return name, word
    if word in FLAGS:
        return word, True
    if word.startswith("ops="):
        return "ops", tuple(filter(None, word.removeprefix("ops=").split(",")))
    match = re.fullmatch(r"([a-z]+)(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", word)
    name = next((name for name, letter in LETTERS.items() if match and match[1] == letter), "")
    if not (match and name):
        raise ValueError(f"{word!r} is no part of a case; {PARTS}")
    try:
        return name, type(getattr(Case, name))(match[2])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {word!r}") from None


def _number(value: float) -> str:
    """As short as it goes without becoming another number."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


def cases(kind: str = "linear", /, **strategies: SearchStrategy[object]) -> SearchStrategy[Case]:
    """Hypothesis' strategy over small cases of one kind, any field replaced by `strategies`; shrinks to 1 x 1 layers.

    Square layers come often, since a forgotten transpose hides in every other shape.
    """
    from hypothesis import strategies as st

    small = st.integers(1, 8)
    fields: dict[str, SearchStrategy[object]] = {
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
    if kind in QUANTISED:
        # Up to several blocks of 64 values, with and without a broken last one.
        widths = [32, 64] if kind == "int4" else [5, 8, 32, 64]  # int4 has no broken ones
        fields |= {"d_in": st.sampled_from(widths), "d_out": st.sampled_from([1, 4, 7, 16])}
    elif kind in DIMENSIONS:
        several = st.integers(1, 2)  # for each group
        fields |= {
            "groups": st.sampled_from([1, 1, 1, 2]),
            "tokens": st.integers(1, 2),
            "d_in": several,
            "d_out": st.integers(1, 3),
            "rank": several,
            "kernel": st.integers(1, 2 if kind == "conv3d" else 3),
            "stride": st.integers(1, 2),
            "dilation": st.sampled_from([1, 1, 2]),
            "padding": st.integers(0, 1),
            "padding_mode": st.sampled_from(["zeros"] * 4 + list(MODES)),
        }
    elif not {"d_in", "d_out"} & strategies.keys():
        fields["square"] = st.booleans()
    if kind == "embedding":
        del fields["bias"]
    by_group = {"d_in", "d_out", "rank"} - strategies.keys()

    # One flat strategy, fitted afterwards: those that depend on each other's draws take several times as long.
    def fitted(drawn: dict[str, Any]) -> Case:
        if drawn.pop("square", False):
            drawn["d_out"] = drawn["d_in"]
        for name in by_group:
            drawn[name] *= drawn.get("groups", 1)
        return Case(kind=kind, **drawn)

    return st.fixed_dictionaries(fields | strategies).map(fitted)
