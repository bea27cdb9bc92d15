"""NF4 is bitsandbytes' byte for byte, and strays from the weight as far as the format must."""

from collections.abc import Callable
from itertools import product
from statistics import NormalDist
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_bench import bounds
from lora_bench.reference import nf4
from lora_bench.reference.nf4 import CODEBOOK, block_bound, dequantise, half_step, quantise

NARROW = [torch.float32, torch.float16, torch.bfloat16]  # what bitsandbytes quantises
DTYPES = [*NARROW, torch.float64]
BORDERS = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier() -> Tensor:
    values = torch.zeros(130)
    values[70] = 100.0
    return values


def on_borders(length: int) -> Tensor:
    """Values half-way between codes in blocks whose maximum is a power of two, 1 or a random number."""
    absmax = torch.stack([torch.tensor(1.0), torch.tensor(2.0**-9), *normal(14).abs()]).repeat_interleave(64)
    values = BORDERS[torch.randint(15, (length,), generator=torch.Generator().manual_seed(0))]
    values[::64] = 1
    return values * absmax.repeat(-(-length // 1024))[:length]


def spread(blocks: int) -> Tensor:
    """Blocks whose maxima lie between about 1e-4 and 1e4."""
    return normal(blocks, 64) * (4 * normal(blocks, 1, seed=1)).clamp(-10, 8).exp()


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: normal(48, 128),
    "one value": lambda: torch.tensor([-0.3]),
    "odd": lambda: normal(7, 31),
    "a pair beyond whole blocks": lambda: normal(130),
    "rows across blocks": lambda: normal(10, 96),
    "a block beyond 256": lambda: normal(257, 64),
    "many groups, odd": lambda: normal(64 * 1000 + 7),
    "all equal": lambda: torch.full((70,), 0.3),
    "zeros": lambda: torch.zeros(2, 65),
    "negative zeros": lambda: -torch.zeros(64),
    "zero blocks among others": lambda: torch.cat([normal(64), torch.zeros(64), normal(64), torch.zeros(9)]),
    "one outlier": outlier,
    "on the borders": lambda: on_borders(4099),
    "small": lambda: 1e-6 * normal(300),
    "large": lambda: 1e4 * normal(300),
    "maxima far apart": lambda: spread(300),
}
EXTREME: dict[str, Callable[[], Tensor]] = {  # beyond the range of float16
    "subnormal": lambda: 1e-39 * normal(5, 64),
    "barely subnormal": lambda: 1e-42 * normal(300),
    "around the smallest normal": lambda: 1e-38 * normal(7, 193),
    "largest": lambda: 3.3e38 * normal(64).clamp(-1, 1),
}


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    return pytest.importorskip("bitsandbytes.functional", reason="byte equality is judged against bitsandbytes")


def bits(values: Tensor) -> Tensor:
    """Their memory, so that -0.0 differs from 0.0."""
    return values.contiguous().flatten().view(torch.uint8)


def assert_is_bitsandbytes(theirs: ModuleType, weight: Tensor, *, double: bool) -> None:
    codes, state = theirs.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    ours = quantise(weight, double=double)

    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(bits(ours.absmax), bits(state.absmax))
    if double:
        assert ours.nested_absmax is not None
        assert ours.offset is not None
        assert torch.equal(bits(ours.nested_absmax), bits(state.state2.absmax))
        assert torch.equal(bits(ours.offset), bits(state.offset))

    # Flat, because its AVX-512 kernel (0.50) takes other rows' statistics for a width of 16 n that is not 64 m.
    state.shape = torch.Size((weight.numel(),))
    with torch.compiler.set_stance("force_eager"):  # its path for odd lengths would compile for seconds
        expected = theirs.dequantize_4bit(codes, state).flatten()
    found = dequantise(ours, weight.dtype).flatten()
    if weight.dtype == torch.bfloat16:  # that kernel flushes bfloat16 subnormals to zero, its scalar one does not
        kept = found.abs() > torch.finfo(torch.bfloat16).smallest_normal
        found, expected = found[kept], expected[kept]
    assert torch.equal(bits(found), bits(expected))


def test_the_codebook_is_the_papers_quantiles() -> None:
    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(float(p)) for p in torch.linspace(0.9677083, 0.5, count + 1)[:-1]]

    values = torch.tensor(sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))]))

    assert torch.equal(CODEBOOK, values / values.max())


def test_the_codebooks_are_those_of_bitsandbytes(bitsandbytes: ModuleType) -> None:
    assert torch.equal(CODEBOOK, bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", WEIGHTS)
def test_bytes_are_those_of_bitsandbytes(bitsandbytes: ModuleType, name: str, dtype: torch.dtype, double: bool) -> None:
    assert_is_bitsandbytes(bitsandbytes, WEIGHTS[name]().to(dtype), double=double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXTREME)
def test_bytes_at_the_ends_of_the_range(bitsandbytes: ModuleType, name: str, dtype: torch.dtype, double: bool) -> None:
    assert_is_bitsandbytes(bitsandbytes, EXTREME[name]().to(dtype), double=double)


@pytest.mark.parametrize("seed", range(10))
def test_bytes_on_the_borders_of_a_short_last_block(bitsandbytes: ModuleType, seed: int) -> None:
    """There a quotient and a product with the reciprocal differ now and then."""
    weight = torch.cat([torch.ones(1), BORDERS.repeat(4)[:60]]) * normal(1, seed=seed)
    assert_is_bitsandbytes(bitsandbytes, weight, double=False)


@given(
    values=st.lists(st.floats(-6e4, 6e4, width=16) | st.sampled_from([1.0, *BORDERS.tolist()]), min_size=1),
    repeats=st.integers(1, 200),
    dtype=st.sampled_from(NARROW),
    double=st.booleans(),
)
def test_bytes_of_any_values(values: list[float], repeats: int, dtype: torch.dtype, double: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="byte equality is judged against bitsandbytes")
    assert_is_bitsandbytes(theirs, torch.tensor(values).repeat(repeats).to(dtype), double=double)


def test_every_point_of_the_statistics_grid_is_that_of_bitsandbytes(bitsandbytes: ModuleType) -> None:
    halves = torch.arange(-nf4.GRID, nf4.GRID + 1, dtype=torch.float64) / nf4.GRID  # the points and half-way between
    near = torch.cat([halves.float(), halves.float().nextafter(torch.tensor(2.0))]).clamp(-1, 1)
    centred = torch.cat([torch.cat([torch.ones(1), part]) for part in near.split(255)])
    codes, state = bitsandbytes.quantize_blockwise(centred, blocksize=256)
    found, absmax = nf4.quantise_statistics(centred)

    assert torch.equal(found, codes)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = normal(70)
    weight[[3, 68]] = bad
    with pytest.raises(ValueError, match="weight must be finite in float32, got 2 values that are not"):
        quantise(weight)


def test_other_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        quantise(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight must hold at least one value, got shape \(0, 4\)"):
        quantise(torch.ones(0, 4))
    with pytest.raises(ValueError, match="weight must be finite in float32, got 1 values"):
        quantise(torch.tensor([1e300, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="too large for double quantisation: its block maxima average inf"):
        quantise(torch.full((256,), 3e38))


# Not small ones in float16, which holds their dequantised values in two or three bits.
@pytest.mark.parametrize(
    ("name", "dtype"), [case for case in product(WEIGHTS, NARROW) if case != ("small", torch.float16)]
)
def test_quantising_again_changes_nothing(name: str, dtype: torch.dtype) -> None:
    once = quantise(WEIGHTS[name]().to(dtype), double=False)
    twice = quantise(dequantise(once, dtype), double=False)

    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.absmax, once.absmax)


@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantising_again_keeps_the_codes_where_the_scale_is_positive(name: str) -> None:
    """The statistics themselves drift, and a scale that was rounded to zero or below loses or mirrors its codes."""
    once = quantise(WEIGHTS[name]())
    twice = quantise(dequantise(once, torch.float32))
    kept = (once.scale > 0).repeat_interleave(32)[: once.codes.numel()]

    assert torch.equal(twice.codes[kept], once.codes[kept])


def test_double_quantisation_may_mirror_a_small_block_beside_a_large_one() -> None:
    absmax = torch.ones(100, 1)
    absmax[7], absmax[20] = 180.0, 1e-3
    once = quantise(absmax * torch.linspace(-1, 1, 64))
    again = quantise(dequantise(once, torch.float32))

    assert once.scale[20] < -0.2
    assert not torch.equal(again.codes.view(100, 32)[20], once.codes.view(100, 32)[20])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"), [*product(WEIGHTS, DTYPES), *product(EXTREME, [torch.float32, torch.bfloat16, torch.float64])]
)
def test_the_error_is_within_the_block_bound(name: str, dtype: torch.dtype, double: bool) -> None:
    weight = (WEIGHTS | EXTREME)[name]().to(dtype)
    found = dequantise(quantise(weight, double=double), dtype)

    assert bounds.worst(found, weight, block_bound(weight, dtype, double=double)).ratio <= 1


def test_the_block_bound_is_reached_and_no_more() -> None:
    assert half_step(CODEBOOK) == (1 - 0.6961928009986877) / 2
    weight = torch.tensor([1.0, -1.0, (-1 - 0.6961928009986877) / 2])
    found = dequantise(quantise(weight, double=False), torch.float32)

    assert 0.99999 < bounds.worst(found, weight, block_bound(weight, torch.float32, double=False)).ratio <= 1


def forgotten_offset(weight: Tensor) -> Tensor:
    made = quantise(weight)
    assert made.offset is not None
    return dequantise(nf4.Nf4(made.codes, made.scale - made.offset, None, None, made.shape), torch.float32)


def next_code(weight: Tensor) -> Tensor:
    made = quantise(weight)
    return dequantise(nf4.Nf4(made.codes + 1, made.scale, None, None, made.shape), torch.float32)


def swapped_nibbles(weight: Tensor) -> Tensor:
    made = quantise(weight)
    return dequantise(nf4.Nf4(made.codes << 4 | made.codes >> 4, made.scale, None, None, made.shape), torch.float32)


def transposed_blocks(weight: Tensor) -> Tensor:
    return dequantise(quantise(weight.T.contiguous()), torch.float32).view(weight.shape)


@pytest.mark.parametrize("wrong", [forgotten_offset, next_code, swapped_nibbles, transposed_blocks])
def test_a_wrong_quantiser_is_outside_of_the_block_bound(wrong: Callable[[Tensor], Tensor]) -> None:
    weight = normal(128, 64)

    assert bounds.worst(wrong(weight), weight, block_bound(weight, torch.float32)).ratio > 1


def test_for_normal_weights_it_errs_less_than_evenly_spaced_codes() -> None:
    weight = normal(256, 64)
    absmax, scaled = nf4.normalise(weight.flatten())
    even = ((scaled * 7).round() / 7).view(weight.shape) * absmax.unsqueeze(1)
    single, double = (dequantise(quantise(weight, double=double), torch.float32) for double in (False, True))

    assert (single - weight).norm() < (even - weight).norm()
    assert (double - weight).norm() < (even - weight).norm()


def test_bits_per_parameter() -> None:
    weight = torch.ones(1024, 1024)

    assert quantise(weight, double=False).bits_per_parameter == 4 + 32 / 64
    assert quantise(weight).bits_per_parameter == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2
