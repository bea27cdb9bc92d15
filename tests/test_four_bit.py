"""A linear layer over NF4 is its definition, trains nothing, and keeps its bytes wherever a module goes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.reference import four_bit, nf4
from lora_bench.reference.four_bit import Nf4Linear
from lora_bench.reference.nf4 import dequantise
from lora_bench.spec import Factors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(values: Tensor) -> Tensor:
    """Their memory, so that -0.0 differs from 0.0."""
    return values.contiguous().flatten().view(torch.uint8)


SHAPES = [(1, 1), (5, 31), (10, 96), (3, 64), (130, 192)]  # (d_out, d_in)


def layer(shape: tuple[int, int], dtype: torch.dtype, *, double: bool = True) -> tuple[Nf4Linear, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).to(dtype)
    return Nf4Linear.from_linear(linear, double=double), linear


def forward_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """As a multiple of what a base layer, one with an adapter that is zero, may err by."""
    none = Factors(torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1))
    x_rows, arithmetic = x.flatten(0, -2), bounds.Arithmetic.of(found.dtype)
    allowed = bounds.separate(x_rows, weight, bias, none, 0.0, arithmetic)
    return bounds.worst(found.flatten(0, -2), definition.base(x_rows, weight, bias), allowed).ratio


@pytest.fixture(params=["this CPU", "no 16-bit products", "small chunks"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways in which the forward and backward of one layer may be computed."""
    if request.param == "no 16-bit products":
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    if request.param == "small chunks":
        monkeypatch.setattr(four_bit, "CHUNK", 1000)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_match_the_definition(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    four, linear = layer(shape, dtype, double=double)
    x = normal(2, 3, shape[1]).to(dtype).requires_grad_()
    y = four(x)
    grad = normal(*y.shape, seed=1).to(dtype)
    y.backward(grad)
    weight = four.dequantise()
    none = Factors(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1))
    rows = (x.detach().flatten(0, 1), grad.flatten(0, 1), weight, none, 0.0)

    assert (y.shape, y.dtype, weight.shape, weight.dtype) == ((2, 3, shape[0]), dtype, shape, dtype)
    assert forward_error(y.detach(), x.detach(), weight, linear.bias.detach()) <= 1
    assert x.grad is not None
    wanted, allowed = definition.gradients(*rows), bounds.gradients(*rows, bounds.Arithmetic.of(dtype))
    assert bounds.worst(x.grad.flatten(0, 1), wanted.x, allowed.x).ratio <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_takes_the_dtype_of_x(dtype: torch.dtype) -> None:
    four, _ = layer((10, 96), torch.float32)
    x = normal(4, 96).to(dtype)
    assert four.bias is not None

    y = four(x)

    assert y.dtype == dtype
    assert forward_error(y.detach(), x, dequantise(four.nf4, dtype), four.bias.to(dtype)) <= 1


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_with_the_weight_as_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    """Sums of two 16-bit numbers are exact in float32: one rounding is all that may be seen of them."""
    four, _ = layer((40, 64), dtype)
    four.bias = None
    weight = four.dequantise().double()
    x, grad = torch.zeros(64, dtype=dtype), torch.zeros(40, dtype=dtype)
    x[[3, 40]] = grad[[7, 20]] = 1
    y = four(x.requires_grad_())
    y.backward(grad)

    assert torch.equal(y, weight[:, [3, 40]].sum(1).to(dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, weight[[7, 20]].sum(0).to(dtype))


def test_a_first_use_in_inference_mode_does_not_forbid_training() -> None:
    four, _ = layer((5, 64), torch.float32)
    nf4.tables.cache_clear()
    with torch.inference_mode():
        four(normal(2, 64))
    x = normal(2, 64).requires_grad_()
    four(x).sum().backward()

    assert x.grad is not None


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "CHUNK", 1000)
    four, _ = layer(shape, torch.float64)
    x = normal(2, shape[1]).double().requires_grad_()

    assert torch.autograd.gradcheck(four, (x,), fast_mode=True)


def test_no_more_than_a_chunk_of_the_weight_is_dequantised_and_none_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    four, _ = layer((130, 192), torch.float32)
    sizes: list[int] = []
    saved: list[Tensor] = []

    def spy(codes: Tensor, scale: Tensor) -> Tensor:
        sizes.append(scale.numel() * 64)
        return nf4.decode(codes, scale)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    monkeypatch.setattr(four_bit, "decode", spy)
    monkeypatch.setattr(four_bit, "CHUNK", 130 * 64)
    x = normal(3, 192).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = four(x)
    y.sum().backward()

    assert sizes == [43 * 192] * 3 + [192] + [130 * 64] * 3  # rows forward, columns backward
    assert saved == []


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    four, _ = layer((5, 64), torch.float32)

    assert four(normal(*shape, 64)).shape == (*shape, 5)


def test_an_x_of_another_width_is_refused() -> None:
    four, _ = layer((5, 64), torch.float32)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        four(normal(2, 32))


def test_nothing_trains_and_the_given_layer_is_left_alone() -> None:
    four, linear = layer((5, 64), torch.float32)
    before = copy.deepcopy(linear)
    four(normal(3, 64).requires_grad_()).sum().backward()

    assert not any(parameter.requires_grad for parameter in four.parameters())
    assert all(parameter.grad is None for parameter in [*four.parameters(), *linear.parameters()])
    assert torch.equal(before.weight, linear.weight)
    assert linear.weight.requires_grad
    assert four.bias is not None
    assert four.bias.data_ptr() != linear.bias.data_ptr()


def assert_same_state(found: Nf4Linear, wanted: Nf4Linear) -> None:
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(bits(found.state_dict()[name]), bits(tensor))


@pytest.mark.parametrize("double", [False, True])
def test_state_survives_copies_pickle_and_state_dict(double: bool) -> None:
    four, _ = layer((10, 96), torch.bfloat16, double=double)
    other = Nf4Linear.from_linear(nn.Linear(96, 10).to(torch.bfloat16), double=double)
    other.load_state_dict(four.state_dict())

    for found in (copy.deepcopy(four), pickle.loads(pickle.dumps(four)), other):  # noqa: S301
        assert_same_state(found, four)
        assert found.dequantise().dtype == torch.bfloat16
        assert torch.equal(found(normal(2, 96)), four(normal(2, 96)))


def test_a_state_with_other_statistics_is_refused() -> None:
    single, _ = layer((10, 96), torch.float32, double=False)
    double, _ = layer((10, 96), torch.float32)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        single.load_state_dict(double.state_dict())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_dtype_keeps_the_statistics(dtype: torch.dtype, double: bool) -> None:
    four, linear = layer((10, 96), torch.float32, double=double)
    cast = copy.deepcopy(four).half().to(dtype)
    assert cast.bias is not None

    assert cast.bias.dtype == cast.dequantise().dtype == dtype
    assert torch.equal(cast.dequantise(), dequantise(four.nf4, dtype))
    cast.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)  # it alone was rounded
    assert_same_state(cast, four)


def test_a_move_to_the_meta_device_takes_everything() -> None:
    four, _ = layer((10, 96), torch.float32)

    assert {tensor.device.type for tensor in four.half().to("meta").state_dict().values()} == {"meta"}


def test_its_size_is_that_of_four_bits() -> None:
    four, _ = layer((256, 256), torch.float32)

    assert four.nf4.bits_per_parameter == 8 * sum(b.nbytes for b in four.buffers()) / 256**2
    assert repr(four) == "Nf4Linear(in_features=256, out_features=256, bias=True, double=True)"
