"""Several adapters in one batch: each row is what it would be alone, whatever stands beside it."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic, worst
from lora_bench.case import Case, Problem, cases
from lora_bench.reference import LoraLinear, Nf4Linear
from lora_bench.reference.batched import Pool, plan, pool, route
from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly, within
from tests.reference_layers import base_of, each_dtype

several = cases(adapters=st.integers(1, 4))
Adapter = tuple[LoraSpec, Factors]


def made(case: Case, *, four_bit: bool = False) -> tuple[LoraLinear, Problem, Pool]:
    problem = case.draw()
    base = base_of(problem)
    layer = LoraLinear(Nf4Linear.from_linear(base) if four_bit else base, case.spec)
    return layer, problem, pool(layer, problem.adapters)


def run(layer: LoraLinear, ready: Pool, x: Tensor, ids: Tensor) -> Tensor:
    return route(layer, ready, x, plan(ids, x.device))


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal bit for bit, NaN to NaN."""
    return found.dtype == wanted.dtype and worst(found, wanted).error == 0


def astray(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, adapters: list[Adapter], ids: Tensor) -> list[int]:
    """The rows that are not the definition's, within the bound of that row alone."""
    pairs = [(factors, spec.scaling) for spec, factors in adapters]
    wanted, arithmetic = definition.routed(x, w, bias, pairs, ids), Arithmetic.of(x.dtype)
    none = Factors(x.new_zeros(1, x.shape[1]), x.new_zeros(len(w), 1)), 1.0
    wrong = []
    for row, index in enumerate(ids.tolist()):
        factors, scaling = pairs[index] if index >= 0 else none
        allowed = bounds.separate(x[row : row + 1], w, bias, factors, scaling, arithmetic)
        if not within(y[row], wanted[row], allowed[0]):
            wrong.append(row)
    return wrong


@given(several, st.booleans())
def test_each_row_goes_through_its_adapter(case: Case, four_bit: bool) -> None:
    layer, (x, w, bias, _, adapters, ids), ready = made(case, four_bit=four_bit)
    if isinstance(layer.base_layer, Nf4Linear):
        w = layer.base_layer.dequantise()
    kept = x.clone()
    y = run(layer, ready, x, ids)

    assert y.dtype == x.dtype
    assert astray(y, x, w, bias, adapters, ids) == []
    assert same(x, kept)
    for row in range(case.tokens):
        one = slice(row, row + 1)
        assert astray(run(layer, ready, x[one], ids[one]), x[one], w, bias, adapters, ids[one]) == []


@given(several, st.integers(1, 4), st.booleans())
def test_each_sequence_goes_through_its_adapter(case: Case, tokens: int, turned: bool) -> None:
    layer, (x, w, bias, _, adapters, ids), ready = made(case)
    x = torch.stack([x.roll(shift, 0) for shift in range(tokens)], 1)
    x = x.mT.contiguous().mT if turned else x
    y = run(layer, ready, x, ids)

    assert y.shape == (case.tokens, tokens, case.d_out)
    assert astray(y.flatten(0, 1), x.flatten(0, 1), w, bias, adapters, ids.repeat_interleave(tokens)) == []


@given(several, st.booleans(), st.booleans())
def test_a_row_without_adapter_is_the_bases_bit_for_bit(case: Case, spoil: bool, all_bare: bool) -> None:
    layer, (x, *_, ids), ready = made(case)
    if all_bare:
        ids = torch.full_like(ids, -1)
    if spoil:
        x[::2, 0], x[1::2, -1] = torch.inf, torch.nan
    bare = ids < 0

    assert same(run(layer, ready, x, ids)[bare], layer.base_layer(x)[bare])
    sequences = x[:, None].expand(-1, 2, -1)
    assert same(run(layer, ready, sequences, ids)[bare], layer.base_layer(sequences)[bare])


@given(several, st.data())
def test_a_row_does_not_see_its_neighbours(case: Case, data: st.DataObject) -> None:
    layer, (x, _, _, _, adapters, ids), ready = made(case)
    row = data.draw(st.integers(0, case.tokens - 1))
    others = torch.arange(case.tokens) != row
    y = run(layer, ready, x, ids)[row]

    elsewhere, rerouted, spoilt = x.clone(), ids.clone(), []
    elsewhere[others] = data.draw(st.sampled_from([0.0, 1.0, torch.inf, torch.nan]))
    rerouted[others] = data.draw(st.integers(-1, case.adapters - 1))
    for index, (spec, factors) in enumerate(adapters):
        nan = Factors(torch.full_like(factors.a, torch.nan), torch.full_like(factors.b, torch.nan))
        spoilt.append((spec, factors if index == ids[row] else nan))
    assert same(run(layer, ready, elsewhere, ids)[row], y)
    assert same(run(layer, ready, x, rerouted)[row], y)
    assert same(run(layer, pool(layer, spoilt), elsewhere, rerouted)[row], y)


@given(several)
def test_slots_are_but_names(case: Case) -> None:
    layer, (x, _, _, _, adapters, ids), ready = made(case)
    y = run(layer, ready, x, ids)
    order = torch.randperm(case.adapters, generator=torch.Generator().manual_seed(case.seed))
    moved = torch.where(ids < 0, ids, order.argsort()[ids])

    assert same(run(layer, pool(layer, [adapters[i] for i in order]), x, moved), y)
    twice = torch.where(ids < 0, ids, ids + case.adapters * (torch.arange(case.tokens) % 2))
    assert same(run(layer, pool(layer, adapters + adapters), x, twice), y)


@given(several)
def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    layer, (x, w, bias, _, adapters, ids), ready = made(case)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(case.seed))

    assert astray(run(layer, ready, x[order], ids[order]), x[order], w, bias, adapters, ids[order]) == []


@given(several)
def test_a_pool_holds_copies_padded_with_zeros(case: Case) -> None:
    layer, (x, _, _, _, adapters, ids), ready = made(case)
    y = run(layer, ready, x, ids)
    numbers = sum(factors.a.count_nonzero() for _, factors in adapters)
    assert ready.a.count_nonzero() == numbers
    assert plan(ids, "cpu").bare is None or (ids < 0).any()
    for _, factors in adapters:
        factors.a.fill_(torch.nan)
        factors.b.fill_(torch.nan)

    assert same(run(layer, ready, x, ids), y)
    assert not any(tensor.requires_grad for tensor in ready if tensor is not None)
    assert all(tensor.dtype == case.torch_dtype for tensor in ready if tensor is not None)


@each_dtype
def test_a_pool_takes_the_layers_dtype_and_trained_factors(dtype: str) -> None:
    layer, (x, w, _, _, adapters, ids), _ = made(Case(dtype=dtype, adapters=2))
    wide = [
        (spec, Factors(nn.Parameter(factors.a.double()), nn.Parameter(factors.b.double())))
        for spec, factors in adapters
    ]
    again = pool(layer, wide)

    assert not any(tensor.requires_grad for tensor in again if tensor is not None)
    y = run(layer, again, x, ids)
    assert y.dtype == x.dtype
    assert astray(y, x, w, None, adapters, ids) == []


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("four_bit", [False, True])
def test_an_empty_batch_is_empty(dims: int, four_bit: bool) -> None:
    layer, _, ready = made(Case(adapters=2), four_bit=four_bit)
    x = torch.empty(0, *(3,) * (dims - 1), 5, dtype=torch.float64)

    assert run(layer, ready, x, torch.empty(0, dtype=torch.int64)).shape == (*x.shape[:-1], 4)


@given(several)
def test_one_plan_serves_many_layers(case: Case) -> None:
    here, problem, ready = made(case)
    there, _, other = made(Case.parse(str(case).replace(f"i{case.d_in} ", "i7 ")))
    once = plan(problem.ids, "cpu")

    x = torch.ones(case.tokens, 7, dtype=case.torch_dtype)
    assert same(route(here, ready, problem.x, once), run(here, ready, problem.x, problem.ids))
    assert same(route(there, other, x, once), run(there, other, x, problem.ids))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [None, 2])
def test_gradients_reach_the_input(four_bit: bool, bias: bool, tokens: int | None) -> None:
    layer, (x, w, _, grad, adapters, ids), ready = made(Case(adapters=3, tokens=8, bias=bias), four_bit=four_bit)
    if isinstance(layer.base_layer, Nf4Linear):
        w = layer.base_layer.dequantise()
    leaf = (x if tokens is None else x[:, None].repeat(1, tokens, 1)).requires_grad_()
    run(layer, ready, leaf, ids).backward(grad if tokens is None else grad[:, None].repeat(1, tokens, 1))

    assert leaf.grad is not None
    rows = leaf.grad if tokens is None else leaf.grad[:, 0]
    for row, index in enumerate(ids.tolist()):
        spec, factors = adapters[index]
        scaling = spec.scaling if index >= 0 else 0.0
        given_ = x.detach()[row : row + 1], grad[row : row + 1], w, factors, scaling
        wanted, allowed = definition.gradients(*given_).x, bounds.gradients(*given_, Arithmetic.of(x.dtype)).x
        assert within(rows[row : row + 1], wanted, allowed)


def test_what_cannot_be_routed_is_refused() -> None:
    layer, (x, *_, adapters, _), ready = made(Case(adapters=2))
    with pytest.raises(IndexError, match=exactly("adapter id 2 is not in the pool of 2")):
        run(layer, ready, x, torch.tensor([0, 2, -1]))
    with pytest.raises(ValueError, match=exactly("adapter ids start at -1 (no adapter), got -2")):
        plan(torch.tensor([0, -2, 1]), "cpu")
    with pytest.raises(ValueError, match=exactly("every row needs one adapter id: 3 rows, 2 ids")):
        run(layer, ready, x, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=exactly("adapter ids must be int64, got torch.int32")):
        plan(torch.tensor([0, 1], dtype=torch.int32), "cpu")
    with pytest.raises(ValueError, match=exactly("adapter ids must be of shape (n,), got (1, 2)")):
        plan(torch.tensor([[0, 1]]), "cpu")
    with pytest.raises(ValueError, match=exactly("adapter ids must be of shape (n,), got ()")):
        plan(torch.tensor(0), "cpu")
    with pytest.raises(ValueError, match=exactly("a pool needs at least one adapter, got none")):
        pool(layer, [])
    with pytest.raises(
        ValueError, match=exactly("factors must be a (3, 5) and b (4, 3) here, got a (2, 5) and b (4, 2)")
    ):
        pool(layer, [(LoraSpec(3, 1), adapters[0][1])])
    layer.merge()
    with pytest.raises(
        RuntimeError, match=exactly("unmerge before routing: the base would carry the merged adapter in every row")
    ):
        run(layer, ready, x, torch.tensor([0, 1, -1]))
    layer.unmerge()
    assert run(layer, ready, x, torch.tensor([0, 1, -1])).isfinite().all()


@pytest.mark.parametrize("shape", [(5,), (1, 2, 3, 5)])
def test_rows_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    layer, _, ready = made(Case())

    with pytest.raises(
        ValueError, match=r"x must be \(n, d_in\) or \(n, tokens, d_in\), got shape " + re.escape(str(shape))
    ):
        run(layer, ready, torch.zeros(shape, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


def test_a_pool_holds_only_what_its_dtype_can() -> None:
    layer, problem, _ = made(Case(dtype="fp16"))
    ((spec, factors),) = problem.adapters

    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold factor b: it has the value 1e\+06"):
        pool(layer, [(spec, Factors(factors.a.float(), torch.full_like(factors.b, 1, dtype=torch.float32) * 1e6))])
