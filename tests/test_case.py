"""Cases: their text is the case, and replays it for ever."""

import hashlib
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.case import DIMENSIONS, DTYPES, KINDS, OPS, Case, cases
from tests.expected import exactly

any_case = st.builds(
    Case,
    tokens=st.integers(0, 2**40),
    d_in=st.integers(1, 2**40),
    d_out=st.integers(1, 2**40),
    rank=st.integers(1, 2**40),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**64 - 1),
    gain=st.floats(allow_nan=False, allow_infinity=False),
    adapters=st.integers(1, 2**40),
    bias=st.just(False),
    rslora=st.booleans(),
    lora_bias=st.booleans(),
    dora=st.booleans(),
    kind=st.sampled_from([kind for kind in KINDS if kind not in DIMENSIONS]),
    ops=st.lists(st.sampled_from(OPS)).map(tuple),
)


@given(cases(adapters=st.integers(1, 5), tokens=st.integers(0, 9)))
def test_a_drawn_case_is_its_text(case: Case) -> None:
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_drawn_case_of_any_kind_is_its_text_and_can_be_drawn(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, adapters=st.integers(1, 3)))
    problem = case.draw()

    assert Case.parse(str(case)) == case
    assert problem.weight.shape == (case.d_out, case.fan_in)
    assert all(factors.d_in == case.fan_in and factors.d_out == case.d_out for _, factors in problem.adapters)


def test_groups_of_a_convolution_share_neither_inputs_nor_ranks() -> None:
    case = Case.parse("t2 i4 o6 r4 a3 fp64 s0 n2 kernel2 groups2 conv1d")
    problem = case.draw()

    assert problem.x.shape == (2, 4, 3)
    assert problem.grad.shape == (2, 6, 2)
    for _, factors in problem.adapters:
        for matrix in (problem.weight, factors.b):
            rows, columns = matrix.shape[0] // 2, matrix.shape[1] // 2
            assert matrix[:rows, :columns].all()
            assert matrix[rows:, columns:].all()
            assert not matrix[:rows, columns:].any()
            assert not matrix[rows:, :columns].any()
        assert factors.a.all()


def test_what_a_variant_adds_is_drawn() -> None:
    ((spec, factors),) = Case(lora_bias=True, dora=True).draw().adapters

    assert spec.lora_bias
    assert spec.dora
    assert factors.bias is not None
    assert factors.magnitude is not None
    assert factors.magnitude.min() >= 1


@settings(max_examples=4 * settings().max_examples)
@given(any_case)
def test_every_case_is_its_text(case: Case) -> None:
    assert Case.parse(str(case)) == case


# Frozen for ever: failures are kept and replayed by these strings.
TEXTS = {
    "t3 i5 o4 r2 a3 fp64 s0": Case(),
    "t0 i1 o1 r1 a1 fp16 s65535": Case(tokens=0, d_in=1, d_out=1, rank=1, alpha=1.0, dtype="fp16", seed=65535),
    "t1 i64 o8 r9 a0.5 bf16 s17 g0.01 n3 bias rslora": Case(
        1, 64, 8, 9, 0.5, "bf16", 17, gain=0.01, adapters=3, bias=True, rslora=True
    ),
    "t3 i5 o4 r2 a3 fp32 s0 g0.0001 rslora": Case(dtype="fp32", gain=1e-4, rslora=True),
    "t3 i5 o4 r2 a3 fp64 s0 g1e-08 n2 bias": Case(gain=1e-8, adapters=2, bias=True),
    "t3 i5 o4 r2 a3 fp64 s0 lora_bias dora embedding": Case(lora_bias=True, dora=True, kind="embedding"),
    "t3 i4 o4 r2 a3 fp64 s0 kernel3 stride2 dilation2 padding1 groups2 conv2d circular": Case(
        d_in=4, kind="conv2d", kernel=3, stride=2, dilation=2, padding=1, groups=2, padding_mode="circular"
    ),
    "t3 i5 o4 r2 a3 fp64 s0 ops=merge,load,unmerge": Case(ops=("merge", "load", "unmerge")),
}


@pytest.mark.parametrize(("text", "case"), TEXTS.items())
def test_texts_stay_what_they_are(text: str, case: Case) -> None:
    assert str(case) == text
    assert Case.parse(text) == case


def test_a_text_may_leave_out_what_is_usual_and_come_in_any_order() -> None:
    assert Case.parse("") == Case()
    assert Case.parse("bias o7  bf16 t2") == Case(tokens=2, d_out=7, dtype="bf16", bias=True)
    assert Case.parse("g1e2 a1e-1") == Case(gain=100.0, alpha=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t3 q5", "'q5' is no part of a case"),
        ("t3 fp8", "'fp8' is no part of a case"),
        ("nobias", "'nobias' is no part of a case"),
        ("t3,i5", "'t3,i5' is no part of a case"),
        ("t", "'t' is no part of a case"),
        ("anan", "'anan' is no part of a case"),
        ("t3.5 i2", "tokens must be an integer, got 't3.5'"),
        ("s1e3", "seed must be an integer, got 's1e3'"),
        ("t3 t4", "tokens is given twice in the case 't3 t4'"),
        ("fp32 bf16", "dtype is given twice in the case 'fp32 bf16'"),
        ("bias bias", "bias is given twice in the case 'bias bias'"),
        ("i0", "d_in must be at least 1, got 0"),
        (
            "ops=merge,fly",
            "ops must be among load, merge, unmerge, on, off, train, eval, reload, copy, switch, back, got fly",
        ),
        ("kernel2", "kernel, stride and the like are for convolutions, got a case of kind linear"),
        ("conv1d groups2", "d_in must be a multiple of the 2 groups, got 5"),
        ("conv1d padding2", "padding must be less than the size of x, 2, got 2"),
        ("conv1d kernel0", "kernel must be at least 1, got 0"),
    ],
)
def test_a_text_that_is_no_case_is_refused_by_its_word(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Case.parse(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"d_in": 0}, "d_in must be at least 1, got 0"),
        ({"d_out": 0}, "d_out must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"adapters": 0}, "adapters must be at least 1, got 0"),
        ({"dtype": "fp8"}, "dtype must be one of fp64, fp32, bf16, fp16, got 'fp8'"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"gain": float("inf")}, "gain must be finite, got inf"),
    ],
)
def test_a_case_out_of_range_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Case(**values)  # type: ignore[arg-type]


def flat(case: Case) -> list[torch.Tensor]:
    x, weight, bias, grad, adapters, ids = case.draw()
    factors = [factor for _, pair in adapters for factor in (pair.a, pair.b)]
    return [x, weight, grad, ids, *factors, *([] if bias is None else [bias])]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        ("t3 i5 o4 r2 a3 fp64 s0", "fc8fe5b82ae6f986"),
        ("t6 i64 o33 r8 a16 bf16 s12345 g0.01 n3 bias", "8c07c55dbe658006"),
    ],
)
def test_the_tensors_of_a_text_stay_what_they_are(text: str, digest: str) -> None:
    # To 2**-20, so that the last bits of another machine's logarithm do not matter.
    numbers = [(tensor.double() * 2**20).round().long().tolist() for tensor in flat(Case.parse(text))]

    assert hashlib.sha256(repr(numbers).encode()).hexdigest()[:16] == digest


@given(cases(adapters=st.integers(1, 4)))
def test_tensors_have_the_shapes_and_the_dtype_of_the_case(case: Case) -> None:
    x, weight, bias, grad, adapters, ids = case.draw()

    assert x.shape == (case.tokens, case.d_in)
    assert weight.shape == (case.d_out, case.d_in)
    assert grad.shape == (case.tokens, case.d_out)
    assert (bias is None) is (not case.bias)
    assert bias is None or bias.shape == (case.d_out,)
    assert ids.shape == (case.tokens,)
    assert ids.dtype == torch.int64
    assert all(-1 <= index < case.adapters for index in ids.tolist())
    assert adapters[0][0] == case.spec
    assert len(adapters) == case.adapters
    for spec, factors in adapters:
        factors.fit(spec.rank, case.d_in, case.d_out)
        assert spec.rslora is case.rslora
        assert factors.b.any()
    assert {tensor.dtype for tensor in flat(case)} == {case.torch_dtype, torch.int64}


@given(cases(dtype=st.just("fp64"), adapters=st.integers(1, 3)), st.sampled_from(["fp32", "bf16", "fp16"]))
def test_every_dtype_rounds_the_same_numbers_once(case: Case, dtype: str) -> None:
    rounded = Case.parse(str(case).replace("fp64", dtype))
    for exact, found in zip(flat(case), flat(rounded), strict=True):
        assert torch.equal(exact.to(found.dtype), found)


def test_a_bias_a_gain_or_more_adapters_change_nothing_else() -> None:
    plain, biased, louder, more = (
        Case(**values).draw() for values in ({}, {"bias": True}, {"gain": 4.0}, {"adapters": 3})
    )

    for other in (biased, louder, more):
        assert torch.equal(other.x, plain.x)
        assert torch.equal(other.weight, plain.weight)
        assert torch.equal(other.grad, plain.grad)
        assert torch.equal(other.adapters[0][1].a, plain.adapters[0][1].a)
    assert torch.equal(louder.adapters[0][1].b, 4 * plain.adapters[0][1].b)
    assert torch.equal(more.adapters[0][1].b, plain.adapters[0][1].b)


def test_ids_name_every_adapter_and_none() -> None:
    assert set(Case(tokens=100, adapters=3).draw().ids.tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
def test_no_two_adapters_share_a_rank_or_a_scaling(rank: int, rslora: bool) -> None:
    specs = [spec for spec, _ in Case(rank=rank, adapters=6, rslora=rslora).draw().adapters]

    for one, other in itertools.combinations(specs, 2):
        assert one.rank != other.rank
        assert one.scaling != pytest.approx(other.scaling, rel=1e-9)


def test_square_layers_are_drawn_often() -> None:
    drawn: list[Case] = []

    @settings(max_examples=200, database=None)
    @given(cases())
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    square = [case for case in drawn if case.d_in == case.d_out]
    assert len(square) >= len(drawn) / 2
    assert len(square) < len(drawn)
    assert len({case.d_in for case in square}) >= 4
    assert {case.dtype for case in drawn} == set(DTYPES)
    assert any(case.rank > min(case.d_in, case.d_out) for case in drawn)
    assert {case.bias for case in drawn} == {case.rslora for case in drawn} == {False, True}


@given(cases(d_in=st.just(64)))
def test_a_field_can_be_fixed(case: Case) -> None:
    assert case.d_in == 64
    assert case.d_out <= 8
