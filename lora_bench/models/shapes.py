"""`Shapes`: sizes of a Llama-like decoder or one layer, from which memory, FLOPs, traffic follow; nothing is built."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_bench.models.build import check_model
from lora_bench.models.presets import PRESETS, SINGLE, widths

ARCHITECTURES = ("llama", "mistral", "qwen2")
"""The `model_type`s that are built alike: attention of q, k, v and o, a gated MLP, an RMSNorm before each."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_KV_HEADS = {"mistral": 8, "qwen2": 32}  # where a configuration says nothing; Llama's are as many as the query heads


class Linears:
    """Linear layers, `layers` times those of `linears`, and what follows for their adapters."""

    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each linear layer, by the end of its name."""
        raise NotImplementedError

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """How many parameter tensors there are of each kind, and of how many values; tied ones once."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        """How many there are, tied ones once."""
        return sum(count * values for count, values in self.tensors)

    def lora_tensors(self, rank: int, targets: Sequence[str]) -> list[tuple[int, int]]:
        """As `tensors`, of A (r, d_in) and B (d_out, r) over every target; ValueError as `check_targets` raises it."""
        self.check_targets(targets)
        return [(self.layers, rank * width) for name in targets for width in self.linears[name]]

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """r (d_in + d_out) summed over every target (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""
        return sum(count * values for count, values in self.lora_tensors(rank, targets))

    def check_targets(self, targets: Sequence[str]) -> None:
        """Raise ValueError for targets that are none, that come twice or that no linear layer has as its name."""
        known = ", ".join(self.linears)
        if not targets:
            raise ValueError(f"targets must name at least one of {known}")
        for name in targets:
            if name not in self.linears:
                raise ValueError(f"a target is one of {known}, got {name!r}")
            if targets.count(name) > 1:
                raise ValueError(f"every target must be named once, got {name!r} {targets.count(name)} times")


@dataclass(frozen=True)
class LayerShapes(Linears):
    """Sizes of a single layer in the place of a model."""

    d_in: int
    d_out: int
    layers: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return {SINGLE: (self.d_in, self.d_out)}

    @property
    def tensors(self) -> list[tuple[int, int]]:
        return [(1, self.d_in * self.d_out)]


@dataclass(frozen=True)
class Shapes(Linears):
    """Sizes of one decoder, named as in transformers' configurations.

    `heads` are the query heads, each of `head_dim`; every key-value head serves heads / kv_heads of them. `biased`
    names the linear layers that have a bias. With `tied` embeddings the head is the embedding's own weight.

    Raises ValueError for a size below 1 and for heads that kv_heads does not divide.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    biased: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocabulary", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide the {self.heads} heads, got {self.kv_heads}")

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """How wide a token's keys are, and its values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each linear layer of one decoder layer, by the end of its name."""
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, self.query_width),
            "k_proj": (hidden, self.kv_width),
            "v_proj": (hidden, self.kv_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }

    @property
    def biases(self) -> int:
        """Values in the biases of one decoder layer."""
        return sum(self.linears[name][1] for name in self.biased)

    @property
    def norms(self) -> int:
        """Two in each decoder layer and one before the head, each with a weight (hidden,)."""
        return 2 * self.layers + 1

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """How many parameter tensors there are of each kind, and of how many values; tied ones once."""
        embeddings = 1 if self.tied else 2
        linears = [(self.layers, d_in * d_out) for d_in, d_out in self.linears.values()]
        biases = [(self.layers, self.linears[name][1]) for name in self.biased]
        return [(embeddings, self.vocabulary * self.hidden), *linears, *biases, (self.norms, self.hidden)]


def shapes(model: str) -> Shapes | LayerShapes:
    """The shapes of a preset, a single layer, or the checkpoint folder whose config.json is read, and nothing else.

    Raises ValueError for a model that is neither, and for a configuration that is of another architecture, that lacks
    a size or that says something which the shapes do not: quantised weights, a sliding window.
    """
    if model in PRESETS:
        return _of_config(PRESETS[model])
    if single := widths(model):
        return LayerShapes(*single)
    path = Path(model) / "config.json"
    if not path.is_file():
        check_model(model)  # says what is wrong with it
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _refuse(config)
        return _of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse(config: Any) -> None:
    architecture = config.get("model_type") if isinstance(config, dict) else None
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if "quantization_config" in config:
        raise ValueError("the checkpoint is quantised already, and only dense ones are known")
    slides = config.get("use_sliding_window", architecture == "mistral")
    window = config.get("sliding_window", 4096)  # as transformers takes a missing one
    if slides and window is not None:
        raise ValueError(f"attention in a sliding window, here of {window} tokens, is not known")


def _of_config(config: Mapping[str, Any]) -> Shapes:
    """The shapes that a configuration of transformers describes; what may be missing is what it takes then."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {config.get(name)!r}")
    heads, architecture = config["num_attention_heads"], config.get("model_type", "llama")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ValueError(f"num_attention_heads must divide the hidden_size {config['hidden_size']}, got {heads}")
    head_dim, kv_heads = config.get("head_dim"), config.get("num_key_value_heads", _KV_HEADS.get(architecture, heads))
    return Shapes(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=config["hidden_size"] // heads if head_dim is None else head_dim,
        tied=bool(config.get("tie_word_embeddings")),
        biased=_biased(architecture, config),
    )


def _biased(architecture: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    if architecture == "llama":
        return (ATTENTION if config.get("attention_bias") else ()) + (MLP if config.get("mlp_bias") else ())
    return ("q_proj", "k_proj", "v_proj") if architecture == "qwen2" else ()
