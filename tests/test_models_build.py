"""Models: the published shapes, and checkpoints from the disk alone."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_bench.models.build import build, check_model
from lora_bench.models.presets import config
from lora_bench.models.shapes import shapes
from lora_bench.models.single import SingleLayer
from tests.fresh_interpreter import loaded_by
from tests.small_models import micro

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tokens() -> Tensor:
    return torch.arange(15).view(3, 5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = build(name, dtype=torch.bfloat16, device="meta")

    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "k_proj", "theta", "stretch", "epsilon", "tied"),
    [
        ("llama-2-7b", (4096, 4096), 1e4, 1.0, 1e-5, False),
        ("llama-3-8b", (1024, 4096), 5e5, 1.0, 1e-5, False),
        ("llama-3.2-1b", (512, 2048), 5e5, 32.0, 1e-5, True),
    ],
)
def test_presets_have_the_published_heads_and_positions(
    name: str, k_proj: tuple[int, int], theta: float, stretch: float, epsilon: float, tied: bool
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model: Any = build(name, dtype=torch.bfloat16, device="meta")
    slowest = LlamaRotaryEmbedding(config(name)).inv_freq[-1]
    head_dim = model.config.head_dim

    assert tuple(model.model.layers[0].self_attn.k_proj.weight.shape) == k_proj
    assert slowest.item() == pytest.approx(theta ** (2 / head_dim - 1) / stretch)
    assert model.model.norm.variance_epsilon == epsilon
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_the_small_presets_are_small() -> None:
    tiny: Any = build("tiny", dtype=torch.float32, device="meta")

    assert (tiny.config.hidden_size, len(tiny.model.layers), tiny.config.num_attention_heads) == (512, 8, 8)
    assert tiny.model.layers[0].mlp.up_proj.weight.shape == (1408, 512)
    assert tiny.lm_head.weight.shape == (4096, 512)
    assert (micro().config.hidden_size, len(micro().model.layers)) == (64, 2)


def test_a_preset_is_drawn_from_its_seed_and_from_nothing_else(no_network: None) -> None:
    torch.manual_seed(5)
    model, again, other = micro(), micro(), build("micro", dtype=torch.float32, device="cpu", seed=1)
    after = torch.rand(1)

    assert not model.training
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


@BOTH_DTYPES
def test_a_checkpoint_is_read_from_its_directory_alone(tmp_path: Path, dtype: torch.dtype, no_network: None) -> None:
    saved = micro(dtype)
    saved.save_pretrained(tmp_path)
    model: Any = build(str(tmp_path), dtype=dtype, device="cpu")

    assert not model.training
    assert model.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, saved(tokens()).logits)


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    presets = "micro, tiny, llama-3.2-1b, llama-2-7b, llama-3-8b"
    wanted = f"wanted one of {presets}, linear-<d_in>x<d_out>, or the path of a directory with a checkpoint"
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "empty", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text("{}")
    messages = {
        "Llama-2-7B": f"no model is called 'Llama-2-7B' (nearest: llama-2-7b): {wanted}",
        "gpt": f"no model is called 'gpt': {wanted}",
        f"{tmp_path}/none": f"no model is called '{tmp_path}/none': {wanted}",
        f"{tmp_path}/empty": f"'{tmp_path}/empty' is no checkpoint: the directory has no config.json",
        f"{tmp_path}/bare": f"'{tmp_path}/bare' has a config.json but no weights "
        f"(*.safetensors or pytorch_model*.bin): for random weights name a preset, one of {presets}",
    }
    for name, message in messages.items():
        for refuse in (check_model, lambda name: build(name, dtype=torch.float32, device="cpu")):
            with pytest.raises(ValueError, match=r".") as caught:
                refuse(name)
            assert str(caught.value) == message
    check_model("tiny")


@pytest.mark.parametrize(
    "name",
    [
        *("linear-0x5", "linear-5x0", "linear-1x5", "linear-5x1", "linear-05x5", "linear-5x-5", "linear-5"),
        *("linear-ax5", "linear-5 x5", "linear-5x5\n", "linear-5x5/", "linear:5x5", "Linear-5x5", "linear-5.0x5"),
    ],
)
def test_a_shape_that_is_none_is_refused_as_such(name: str) -> None:
    message = f"a single layer is linear-<d_in>x<d_out>, of whole numbers of at least 2, got {name!r}"
    for refuse in (check_model, shapes, lambda name: build(name, dtype=torch.float32, device="cpu")):
        with pytest.raises(ValueError, match=r".") as caught:
            refuse(name)
        assert str(caught.value) == message


def test_a_folder_that_is_called_like_one_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    micro().save_pretrained("linear-probe")
    micro().save_pretrained("linear-8x8")

    check_model("linear-probe")
    assert build("linear-probe", dtype=torch.float32, device="cpu").config.hidden_size == 64
    assert isinstance(build("linear-8x8", dtype=torch.float32, device="cpu"), SingleLayer)
    assert build("./linear-8x8", dtype=torch.float32, device="cpu").config.hidden_size == 64


@BOTH_DTYPES
def test_a_single_layer_is_drawn_from_its_seed_and_from_nothing_else(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    one, again, other = (build("linear-24x40", dtype=dtype, device="cpu", seed=seed) for seed in (0, 0, 1))
    after = torch.rand(1)

    assert not one.training
    assert (one.linear.weight.shape, one.linear.weight.dtype, one.linear.bias) == ((40, 24), dtype, None)
    assert torch.equal(one.linear.weight, again.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    x = one.draw(3, 5)
    assert (x.shape, one.draw(3, 5, outputs=True).shape, x.dtype) == ((3, 5, 24), (3, 5, 40), dtype)
    assert torch.equal(one(x), x @ one.linear.weight.T)


def test_checking_a_name_imports_neither_torch_nor_transformers() -> None:
    loaded = loaded_by(
        "from lora_bench.models.build import check_model; check_model('tiny')\n"
        "from lora_bench.subjects import missing; missing('peft')"
    )

    assert {"lora_bench.models.build", "lora_bench.subjects"} <= loaded
    assert loaded.isdisjoint({"torch", "transformers", "peft"})
