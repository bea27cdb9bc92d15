"""Several adapters on a reference layer: what acts is what the definition adds up, and no more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic
from lora_bench.case import Case, Problem, cases
from lora_bench.reference import LoraLinear
from lora_bench.reference.several import activate, add, combine, delete
from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly, within
from tests.reference_layers import NAMES, base_of, each_dtype, made_several, obeys, ones, stacked

several = cases(adapters=st.just(3))

chosen = st.lists(st.sampled_from(NAMES), unique=True, max_size=3)

factor = st.sampled_from([1.0, 0.5, -1.5, 3.0])


def acting(case: Case, names: list[str]) -> tuple[LoraLinear, Problem, Tensor]:
    """A layer of which these adapters act, its problem and its output."""
    layer, problem = made_several(case)
    activate(layer, names)
    return layer, problem, layer(problem.x)


@given(several)
def test_what_is_added_neither_acts_nor_trains(case: Case) -> None:
    layer, problem = made_several(case)
    alone = LoraLinear(base_of(problem), case.spec)
    alone.load(problem.adapters[0][1])

    assert torch.equal(layer(problem.x), alone(problem.x))
    assert [name for name, one in layer.named_parameters() if one.requires_grad] == ["lora_A", "lora_B"]
    assert list(layer.adapter_state()) == ["lora_A", "lora_B"]


@given(several, chosen)
def test_what_is_active_adds_up_and_trains(case: Case, names: list[str]) -> None:
    layer, problem = made_several(case)
    activate(layer, names)
    layer(problem.x.clone().requires_grad_()).sum().backward()

    assert obeys(layer, problem, ones(names), {})
    for name, (spec, factors) in zip(NAMES, problem.adapters, strict=True):
        own = layer.adapter(name)
        assert own.lora_A.requires_grad == own.lora_B.requires_grad == (name in names)
        if name not in names:
            assert own.lora_A.grad is own.lora_B.grad is None
            continue
        given_ = (problem.x, torch.ones_like(problem.grad), problem.weight, factors, spec.scaling)
        wanted, allowed = definition.gradients(*given_), bounds.gradients(*given_, Arithmetic.of(case.torch_dtype))
        assert own.lora_A.grad is not None
        assert own.lora_B.grad is not None
        assert within(own.lora_A.grad, wanted.a, allowed.a)
        assert within(own.lora_B.grad, wanted.b, allowed.b)
    activate(layer, ["default"])
    assert obeys(layer, problem, ones(["default"]), {})


@given(several, chosen, st.data())
def test_a_part_is_merged_and_the_rest_goes_on(case: Case, names: list[str], data: st.DataObject) -> None:
    layer, problem, y = acting(case, names)
    part = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    rest = [name for name in names if name not in part]
    layer.merge(part)

    assert layer.merged is bool(part)
    assert obeys(layer, problem, ones(rest), ones(part))
    assert obeys(layer.merge_and_unload(), problem, {}, ones(names))
    layer.merge()
    assert obeys(layer, problem, {}, ones(names))
    assert torch.equal(layer.base_weight(), layer.merge_and_unload().weight)  # type: ignore[arg-type]
    # However many, they are summed in float32 or wider and rounded once.
    total, arithmetic = definition.merged_weight(problem.weight, *stacked(problem, ones(names))), Arithmetic.of(y.dtype)
    wide = Arithmetic.of(torch.promote_types(y.dtype, torch.float32))
    slack = bounds.merged_weight(problem.weight, *stacked(problem, ones(names)), wide)
    once = slack + arithmetic.unit * (total.abs() + slack) + arithmetic.underflow
    assert within(layer.base_weight(), total, once)
    layer.unmerge()
    assert torch.equal(layer.base_weight(), problem.weight)
    assert torch.equal(layer(problem.x), y)


@given(several, chosen, factor)
def test_a_scaled_adapter_adds_a_multiple(case: Case, names: list[str], times: float) -> None:
    layer, problem, y = acting(case, names)
    layer.scale(times)
    assert obeys(layer, problem, dict.fromkeys(names, times), {})
    add(layer, "late", *problem.adapters[0])
    activate(layer, ["late"])
    assert obeys(layer, problem, {"default": times}, {})
    activate(layer, names)
    layer.merge()
    assert obeys(layer, problem, {}, dict.fromkeys(names, times))
    layer.unmerge()
    layer.scale(1)
    assert torch.equal(layer(problem.x), y)


@given(several, chosen, factor)
def test_merged_at_a_factor_it_is_a_multiple_until_it_is_unmerged(case: Case, names: list[str], times: float) -> None:
    layer, problem, y = acting(case, names)
    layer.merge(factor=times)
    assert obeys(layer, problem, {}, dict.fromkeys(names, times))
    assert obeys(layer.merge_and_unload(), problem, {}, dict.fromkeys(names, times))
    if names and times != 1:
        with pytest.raises(RuntimeError, match=exactly("unmerge before merging at another scale")):
            layer.merge()
        assert obeys(layer, problem, {}, dict.fromkeys(names, times))
    layer.unmerge()
    assert torch.equal(layer(problem.x), y)


@pytest.mark.parametrize("how", ["cat", "svd"])
@given(case=several, weights=st.lists(factor, min_size=3, max_size=3), count=st.integers(1, 3))
def test_a_combination_is_the_weighted_sum(how: str, case: Case, weights: list[float], count: int) -> None:
    layer, problem = made_several(case)
    x, w, bias, *_ = problem
    parts = dict(zip(NAMES, weights[:count], strict=False))
    combine(layer, "all", parts, how)
    assert obeys(layer, problem, ones(["default"]), {})
    activate(layer, ["all"])

    ranks = sum(spec.rank for spec, _ in problem.adapters[:count])
    assert layer.adapter("all").spec.rank == (ranks if how == "cat" else min(ranks, case.d_in, case.d_out))
    assert layer.adapter("all").spec.scaling == 1
    arithmetic, held = Arithmetic.of(x.dtype), layer.matrices(layer.adapter("all"))
    assert within(
        layer(x), definition.forward(x, w, bias, held, 1.0), bounds.separate(x, w, bias, held, 1.0, arithmetic)
    )
    # Made in float64, A and B were rounded as they were stored.
    wanted, a, b = definition.merged_weight(0 * w, *stacked(problem, parts)), held.a.double(), held.b.double()
    lost = arithmetic.underflow * (b.abs().sum(1, keepdim=True) + a.abs().sum(0) + len(a))
    rounded = arithmetic.growth((), 3) * b.abs() @ a.abs() + lost
    assert within(b @ a, wanted, rounded + bounds.decomposed(wanted, bounds.FLOAT64))


def test_a_linear_combination_is_of_one_a() -> None:
    layer, problem = made_several(Case(adapters=2))
    x, w, bias, _, adapters, _ = problem
    (spec, factors), (_, others) = adapters
    other = LoraSpec(2, 7.0)
    add(layer, "like", other, Factors(factors.a, others.b[:, :2]))
    combine(layer, "sum", {"default": 0.5, "like": -2.0}, "linear")
    activate(layer, ["sum"])

    assert layer.adapter("sum").spec.rank == 2
    shares = [0.5 * spec.scaling * factors.b, -2 * other.scaling * others.b[:, :2]]
    together = Factors(torch.cat([factors.a, factors.a]), torch.cat(shares, 1)), 1.0
    allowed = bounds.separate(x, w, bias, *together, Arithmetic.of(x.dtype))
    assert within(layer(x), definition.forward(x, w, bias, *together), allowed)
    with pytest.raises(NotImplementedError, match=exactly("the adapters' A differ: combine them by cat or svd")):
        combine(layer, "no", {"default": 1.0, "b": 1.0}, "linear")


@each_dtype
def test_biases_of_b_merge_and_combine_as_b_does(dtype: str) -> None:
    problem = Case(adapters=3, bias=True, lora_bias=True, dtype=dtype).draw()
    x, w, bias, _, adapters, _ = problem
    layer = LoraLinear(base_of(problem), adapters[0][0])
    layer.load(adapters[0][1])
    for name, adapter in zip(NAMES[1:], adapters[1:], strict=True):
        add(layer, name, *adapter)
    together, arithmetic = stacked(problem, ones(NAMES)), Arithmetic.of(x.dtype)
    combine(layer, "all", ones(NAMES), "cat")
    assert bias is not None

    # The biases as weights of one column, over factors A of 1.
    betas = [spec.scaling * own.bias.double() for spec, own in adapters if own.bias is not None]
    column = bias[:, None], Factors(torch.ones(3, 1).double(), torch.stack(betas, 1)), 1.0
    total = definition.merged_weight(*column)[:, 0]
    slack = bounds.merged_weight(*column, Arithmetic.of(torch.promote_types(x.dtype, torch.float32)))[:, 0]
    once = slack + arithmetic.unit * (total.abs() + slack) + arithmetic.underflow
    wanted, size = definition.forward(x, w, total, *together), bias.double().abs() + torch.stack(betas).abs().sum(0)
    stray = bounds.merged_weight(w, *together, arithmetic)
    heavy = definition.merged_weight(w.abs(), together[0].map(torch.abs), together[1]) + stray
    allowed = bounds.separate(x, heavy, size, *together, arithmetic, sums=4) + x.double().abs() @ stray.T
    for part in ([], ["b"], ["b", "default"], list(NAMES)):
        activate(layer, NAMES)
        layer.merge(part)
        assert within(layer(x), wanted, allowed)
        layer.merge()
        for merged in (layer.base_layer.bias, layer.merge_and_unload().bias):
            assert isinstance(merged, Tensor)
            assert merged.dtype == bias.dtype
            assert within(merged, total, once)
        layer.unmerge()
        assert torch.equal(layer.base_layer.bias, bias)  # type: ignore[arg-type]
    activate(layer, ["all"])
    assert within(layer(x), wanted, allowed)


def test_deployed_with_none_active_it_is_a_copy_of_the_base() -> None:
    layer, problem = made_several(Case(bias=True, dtype="fp32"))
    activate(layer, [])
    deployed = layer.merge_and_unload()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()

    assert torch.equal(deployed(problem.x), base_of(problem)(problem.x))


def test_a_deleted_adapter_is_gone_and_its_name_is_free() -> None:
    layer, problem = made_several(Case(adapters=3))
    delete(layer, "b")
    with pytest.raises(ValueError, match=exactly("no adapter is called 'b', there are default, c")):
        activate(layer, ["b"])
    assert obeys(layer, problem, ones(["default"]), {})
    add(layer, "b", *problem.adapters[2])
    activate(layer, ["b"])
    assert obeys(layer, problem, ones(["c"]), {})
    with pytest.raises(NotImplementedError, match=exactly("'default' is the layer's own adapter and stays with it")):
        delete(layer, "default")
