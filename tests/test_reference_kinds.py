"""The reference over every kind of base layer, with and without a bias on B: one definition in other clothes."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.case import DTYPES, MODES, Case, cases
from lora_bench.conformance import kinds
from lora_bench.conformance.check import DENSE
from lora_bench.conformance.lora_bias import stored_bias
from lora_bench.conformance.training import overlap
from lora_bench.conformance.trial import Trial
from lora_bench.reference import REFERENCE, LoraLinear, wrap
from lora_bench.reference.batched import plan, pool, route
from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly, within
from tests.reference_layers import of_kind

each_kind = pytest.mark.parametrize("kind", DENSE)
biased = {"lora_bias": st.booleans()}
CONVOLUTIONS: dict[str, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def blocks(case: Case, b: Tensor) -> Tensor:
    """What B's parameter holds of the matrix b: the blocks of its groups, one over the other."""
    return torch.cat([rows.chunk(case.groups, 1)[group] for group, rows in enumerate(b.chunk(case.groups))])


def mergeable(case: Case) -> bool:
    """Whether there is a weight, and where B has a bias a bias, that the sum could be written into."""
    return case.groups == 1 and (case.bias or not case.lora_bias or case.kind in ("embedding", "fan_in_fan_out"))


@each_kind
@given(data=st.data())
def test_output_and_gradients_are_those_of_the_definition(kind: str, data: st.DataObject) -> None:
    trial, layer = of_kind(case := data.draw(cases(kind, **biased)))
    x, (rows, w, _, factors, s) = trial.x, trial.terms
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    y.backward(trial.grad)

    assert y.dtype == case.torch_dtype
    assert within(trial.rows_of(y), definition.forward(*trial.terms), trial.separate_bound)
    given_ = (rows, kinds.outputs(case, trial.grad), w, factors, s)
    wanted, allowed = (
        definition.gradients(*given_),
        bounds.gradients(*given_, trial.arithmetic, overlap=overlap(trial)),
    )
    a, b = (slice(case.rank), slice(case.fan_in)), (slice(None), slice(case.rank))
    assert layer.lora_A.grad is not None
    assert within(layer.lora_A.grad.flatten(1), wanted.a[a], allowed.a[a])
    assert layer.lora_B.grad is not None
    assert within(layer.lora_B.grad.flatten(1), blocks(case, wanted.b[b]), blocks(case, allowed.b[b]))
    if layer.lora_bias is not None:
        assert layer.lora_bias.grad is not None
        assert within(layer.lora_bias.grad, wanted.b[:, -1], allowed.b[:, -1])
    if x.grad is not None:
        feature = (slice(None), slice(case.fan_in))
        folded = [kinds.folded(case, trial.x, own.x[feature]) for own in (wanted, allowed)]
        assert within(x.grad, *folded)
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@each_kind
@given(data=st.data())
def test_merged_it_is_the_definition_and_unmerged_what_it_was(kind: str, data: st.DataObject) -> None:
    trial, layer = of_kind(case := data.draw(cases(kind, **biased)))
    x, y, kept = trial.x, layer(trial.x), copy.deepcopy(layer.state_dict())
    if not mergeable(case):
        reason = f"^with {case.groups} groups B A is no kernel" if case.groups > 1 else "^the base has no bias to merge"
        with pytest.raises(NotImplementedError, match=reason):
            layer.merge()
        assert not layer.merged
        assert torch.equal(layer(x), y)
        return
    wanted, allowed = definition.forward(*trial.terms), trial.merged_bound
    if case.bias and case.lora_bias:
        allowed = allowed + stored_bias(trial)
    for _ in range(2):
        layer.merge()
        merged = layer(x)
        assert within(trial.rows_of(merged), wanted, allowed)
        assert merged.dtype == layer.base_weight().dtype == case.torch_dtype
    _, w, _, factors, s = trial.terms_of(replace(trial.factors, bias=None), trial.spec.scaling)
    if not (kind == "embedding" and case.lora_bias):  # where a token's row holds B's bias too
        weight, slack = definition.merged_weight(w, factors, s), bounds.merged_weight(w, factors, s, trial.arithmetic)
        assert within(trial.weight_of(layer), weight, slack)
    layer.unmerge()
    assert torch.equal(layer(x), y)
    assert all(torch.equal(kept[name], value) for name, value in layer.state_dict().items())
    layer.merge()
    layer.enable(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable(True)
    assert torch.equal(layer(x), y)


@each_kind
@given(data=st.data())
def test_what_is_deployed_is_a_plain_layer_of_the_kind(kind: str, data: st.DataObject) -> None:
    trial, layer = of_kind(case := data.draw(cases(kind, **biased)))
    if case.groups > 1:
        with pytest.raises(
            NotImplementedError, match=exactly(f"with {case.groups} groups B A is no kernel that the base could have")
        ):
            layer.merge_and_unload()
        return
    deployed = layer.merge_and_unload()
    y = deployed(trial.x)
    if mergeable(case):
        layer.merge()
        assert torch.equal(y, layer(trial.x))
        assert torch.equal(y, layer.merge_and_unload()(trial.x))

    assert type(deployed) is type(layer.base_layer)
    assert within(trial.rows_of(y), definition.forward(*trial.terms), trial.merged_bound)
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    theirs = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in deployed.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_a_new_layer_is_its_base_with_a_drawn_as_the_base_s_weight(kind: str, dtype: str) -> None:
    case = Case(d_in=60, d_out=40, rank=40, kind=kind, dtype=dtype, lora_bias=True)
    trial = Trial(REFERENCE, case)
    base, x = trial.base(), trial.x
    y = base(x)
    torch.manual_seed(0)
    layer = wrap(base, case.spec)

    assert torch.equal(layer(x), y)
    assert not layer.lora_B.any()
    assert layer.lora_bias is not None
    assert not layer.lora_bias.any()
    # Of 2,400 draws of N(0, 1) one is beyond 1, and one of U(±1/sqrt(60)) beyond 0.9 of it, but for odds of 1e-100.
    limit = 1 / 60**0.5
    largest = layer.lora_A.double().abs().max()
    assert largest > 1 if kind == "embedding" else 0.9 * limit < largest <= limit * (1 + trial.arithmetic.unit)


@each_kind
def test_factors_are_the_live_parameters(kind: str) -> None:
    _, layer = of_kind(Case(kind=kind, lora_bias=True))
    factors = layer.factors
    assert factors.bias is layer.lora_bias
    for matrix, parameter in ((factors.a, layer.lora_A), (factors.b, layer.lora_B)):
        assert matrix.data_ptr() == parameter.data_ptr()


def test_groups_have_no_matrix_b() -> None:
    trial, layer = of_kind(Case(kind="conv2d", d_in=4, d_out=6, rank=4, kernel=2, groups=2))
    message = "with 2 groups B A is no kernel that the base could have"
    with pytest.raises(NotImplementedError, match=exactly(message)):
        _ = layer.factors
    with pytest.raises(NotImplementedError, match=exactly(message)):
        layer.merge()
    b = trial.factors.b
    b[0, -1] = 1  # the first group's output, of the second's ranks
    with pytest.raises(ValueError, match=exactly("factor b must be zero outside its 2 groups")):
        layer.load(Factors(trial.factors.a, b))
    assert within(trial.rows_of(layer(trial.x)), definition.forward(*trial.terms), trial.separate_bound)
    with pytest.raises(ValueError, match=exactly("rank must be a multiple of the 2 groups, got 3")):
        wrap(trial.base(), LoraSpec(3, 1.0))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_a_convolution_s_adapter_pads_as_its_base(kind: str, mode: Any, padding: str | int) -> None:
    generator = torch.Generator().manual_seed(0)

    def whole(like: Tensor) -> Tensor:
        return torch.randint(-3, 4, like.shape, generator=generator, dtype=torch.float64)

    base = CONVOLUTIONS[kind](2, 3, 2, padding=padding, dilation=2, padding_mode=mode, dtype=torch.float64)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(whole(parameter))
    layer = wrap(copy.deepcopy(base), LoraSpec(2, 4.0))
    layer.load(Factors(whole(torch.empty(2, base.weight[0].numel())), whole(torch.empty(3, 2))))
    x = whole(torch.empty(2, 2, *[5] * (base.weight.ndim - 2)))
    with torch.no_grad():
        base.weight += 2 * (layer.factors.b @ layer.factors.a).view_as(base.weight)

    # In whole numbers nothing is rounded.
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer(x[0]), base(x[0]))
    layer.merge()
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_dropout_is_on_the_adapter_s_path_in_training_alone(kind: str) -> None:
    case = Case(tokens=200, d_in=6, kind=kind)
    trial, layer = of_kind(case)
    plain, x = layer(trial.x), trial.x
    layer = trial.layer(spec=replace(case.spec, dropout=0.5))

    assert torch.equal(layer.eval()(x), plain)
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), plain)
    layer.load(Factors(trial.factors.a, torch.zeros_like(trial.factors.b)))
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_on_an_embedding_drops_whole_tokens_and_keeps_the_mean() -> None:
    trial, _ = of_kind(case := Case(tokens=1000, d_in=6, kind="embedding", rank=3))
    layer = trial.layer(spec=replace(case.spec, dropout=0.25)).train()
    torch.manual_seed(0)
    base, y = layer.base_layer(trial.x), layer(trial.x)
    dropped = (y == base).all(1)

    assert torch.equal(dropped, (y == base).any(1))
    # Hoeffding, for 1,000 draws and a doubt of 1e-9.
    assert abs(float(dropped.double().mean()) - 0.25) <= math.sqrt(math.log(2 / 1e-9) / (2 * 1000))
    terms = trial.terms._replace(scaling=trial.terms.scaling / 0.75)
    allowed = bounds.separate(*terms, trial.arithmetic)
    assert within(y[~dropped], definition.forward(*terms)[~dropped], allowed[~dropped])


def test_padding_gets_no_gradient() -> None:
    base = nn.Embedding(4, 3, padding_idx=1)
    layer = wrap(base, LoraSpec(2, 1.0))
    nn.init.ones_(layer.lora_B)
    layer(torch.arange(4)).sum().backward()

    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.any(0).tolist() == [True, False, True, True]


def test_a_bias_on_b_needs_one_of_the_base_to_merge_into_but_not_to_deploy() -> None:
    trial, layer = of_kind(Case(lora_bias=True))
    with pytest.raises(
        NotImplementedError,
        match=exactly("the base has no bias to merge the adapter's into; merge_and_unload makes one"),
    ):
        layer.merge()
    deployed = layer.merge_and_unload()

    assert isinstance(deployed, nn.Linear)
    assert isinstance(deployed.bias, nn.Parameter)
    assert layer.base_layer.bias is None
    assert within(deployed(trial.x), definition.forward(*trial.terms), trial.merged_bound)


def test_what_is_no_lora_here_is_refused() -> None:
    with pytest.raises(TypeError, match=exactly("no LoRA here for a ReLU")):
        wrap(nn.ReLU(), LoraSpec(2, 1.0))
    with pytest.raises(TypeError, match=exactly("no LoRA here for a ConvTranspose1d")):
        wrap(nn.ConvTranspose1d(2, 2, 1), LoraSpec(2, 1.0))
    with pytest.raises(
        NotImplementedError, match=exactly("an embedding with a max_norm changes its weight as it is used")
    ):
        wrap(nn.Embedding(3, 2, max_norm=1.0), LoraSpec(2, 1.0))
    dora = LoraSpec(2, 1.0, dora=True)
    with pytest.raises(NotImplementedError, match=exactly("DoRA is for nn.Linear here")):
        wrap(nn.Embedding(5, 4), dora)
    with pytest.raises(NotImplementedError, match=exactly("no DoRA in a mixed batch")):
        pool(of_kind(Case())[1], [(dora, Factors(torch.ones(2, 5), torch.ones(4, 2), magnitude=torch.ones(4)))])
    for bias, message in ((True, "no bias, as lora_bias=False says"), (False, "a bias, as lora_bias=True says")):
        _, layer = of_kind(Case(lora_bias=not bias))
        factors = Factors(torch.ones(2, 5), torch.ones(4, 2), torch.ones(4) if bias else None)
        with pytest.raises(ValueError, match=exactly(f"factors must have {message}")):
            layer.load(factors)
    with pytest.raises(ValueError, match=exactly("factors must have no magnitude, as dora=False says")):
        of_kind(Case())[1].load(Factors(torch.ones(2, 5), torch.ones(4, 2), magnitude=torch.ones(4)))


@given(cases(adapters=st.integers(1, 3), lora_bias=st.just(True), tokens=st.integers(1, 4)))
def test_in_a_mixed_batch_each_row_has_its_adapter_s_bias(case: Case) -> None:
    trial, layer = of_kind(case)
    y = route(layer, pool(layer, trial.adapters), trial.x, plan(trial.ids, "cpu"))
    for row, index in enumerate(trial.ids.tolist()):
        spec, factors = trial.adapters[max(index, 0)]
        terms = trial.terms_of(factors, spec.scaling if index >= 0 else 0.0)
        one = terms._replace(x=terms.x[row : row + 1])
        assert within(y[row : row + 1], definition.forward(*one), bounds.separate(*one, trial.arithmetic))


def test_only_linear_layers_take_mixed_batches() -> None:
    trial, layer = of_kind(Case(kind="embedding"))
    with pytest.raises(
        NotImplementedError, match=exactly("only linear layers take mixed batches, got a LoraEmbedding")
    ):
        pool(layer, trial.adapters)
    assert isinstance(of_kind(Case(kind="fan_in_fan_out"))[1], LoraLinear)
