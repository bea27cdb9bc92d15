"""PEFT's adapter folder, written and read without PEFT: adapter_config.json beside adapter_model.safetensors.

A failure's smallest adapter is saved by `write(folder, Adapter({"layer": Adapted(spec, factors)}))`.

Source: the folders that PEFT 0.21 writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_bench.adapter.config import BIASES, CONFIG, HARMLESS, checked, naming, once, patterned, spec_of
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


@dataclass(frozen=True, eq=False)
class Adapted:
    """One module's adapter, and what its matrices do not tell of their shape on disk.

    Of a convolution `kernel` is the kernel's shape: lora_A is then (r, channels, *kernel), its flattening `factors.a`,
    and lora_B (d_out, r / groups, 1, ...), `factors.b` being zero outside the groups.

    Raises ValueError where spec, factors and these do not fit together.
    """

    spec: LoraSpec
    factors: Factors
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        spec, factors = self.spec, self.factors
        if spec.rank != factors.rank:
            raise ValueError(f"the spec's rank is {spec.rank}, and that of the factors {factors.rank}")
        for name, wanted, there in (
            ("dora", spec.dora, factors.magnitude is not None),
            ("lora_bias", spec.lora_bias, factors.bias is not None),
        ):
            if wanted != there:
                raise ValueError(
                    f"the spec says {name}={wanted}, and the factors {'have' if there else 'lack'} its vector"
                )
        if self.embedding and (self.kernel or spec.lora_bias):
            raise ValueError("an embedding has neither a kernel nor a lora_bias")
        if self.groups > 1 and not self.kernel:
            raise ValueError(f"only a convolution has groups, got {self.groups} without a kernel")
        if factors.d_in % prod(self.kernel):
            raise ValueError(f"a kernel {self.kernel} does not divide factor a of {factors.d_in} columns")
        if self.groups < 1 or spec.rank % self.groups or factors.d_out % self.groups:
            raise ValueError(f"{self.groups} groups do not divide rank {spec.rank} and {factors.d_out} outputs")
        factors.blocks(self.groups)  # which refuses a b that is not made of them

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they lie on disk, by the end of their key."""
        factors, ones = self.factors, [1] * len(self.kernel)
        if self.embedding:
            parts = {"lora_embedding_A": factors.a, "lora_embedding_B": factors.b}
        else:
            b = torch.cat(factors.blocks(self.groups))
            parts = {
                "lora_A.weight": factors.a.unflatten(1, (-1, *self.kernel)),
                "lora_B.weight": b.view(*b.shape, *ones),
            }
        if factors.bias is not None:
            parts["lora_B.bias"] = factors.bias
        if factors.magnitude is not None:
            parts["lora_magnitude_vector"] = factors.magnitude.view(1, -1, *ones) if ones else factors.magnitude
        return parts


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a folder holds: each adapted module's factors by its path in the model, and what was trained beside them.

    `target_modules` are PEFT's words (names, their ends, or one pattern), by default the paths themselves. `saved` are
    other tensors by their names in the plain model: of `modules_to_save`, biases as `bias` tells, and embeddings that
    PEFT has added. `kept` are the harmless fields.

    Raises ValueError where the modules differ in what one configuration says for all, and for fields that do not fit.
    """

    modules: Mapping[str, Adapted]
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    saved: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    bias: str = "none"
    fan_in_fan_out: bool = False
    kept: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("an adapter needs at least one adapted module, got none")
        for name in ("dropout", "rslora", "dora", "lora_bias"):
            if len(values := {getattr(module.spec, name) for module in self.modules.values()}) > 1:
                raise ValueError(f"{name} must be one for all modules, got {', '.join(map(str, sorted(values)))}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if unknown := set(self.kept) - set(HARMLESS):
            raise ValueError(f"kept fields must be among {', '.join(HARMLESS)}, got {', '.join(sorted(unknown))}")
        for module in self.modules_to_save:
            if not any(_of(module, name) for name in self.saved):
                raise ValueError(f"modules_to_save names {module!r}, of which there is no tensor")


def write(folder: str | Path, adapter: Adapter) -> None:
    """Write the adapter's two files into `folder`, which is made; ranks and alphas that differ become patterns.

    Tensors keep their dtype. Raises OSError where the folder cannot be written to.
    """
    held = {key: value.detach().cpu().contiguous().clone() for key, value in _keyed(adapter).items()}
    config = json.dumps(_config(adapter), indent=2, sort_keys=True, allow_nan=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(held, Path(folder) / TENSORS, metadata={"format": "pt"})
    (Path(folder) / CONFIG).write_text(f"{config}\n", encoding="utf-8")


def read(folder: str | Path) -> Adapter:
    """The adapter of a folder, every tensor on the CPU in the dtype that it is stored in.

    Values that are not finite are read as they are: `non_finite` finds them.

    Raises FileNotFoundError for a missing file, ValueError, naming file and field or key, for one that is truncated or
    broken, a configuration that is not understood, and tensors that do not fit together or do not fit it.
    """
    config_file, tensor_file = Path(folder) / CONFIG, Path(folder) / TENSORS
    for file in (config_file, tensor_file):
        if not file.is_file():
            there = ", ".join(sorted(found.name for found in Path(folder).glob("adapter*"))) or "nothing like it"
            raise FileNotFoundError(f"{folder} has no {file.name}; there is {there}")
    with naming(config_file):
        config = checked(json.loads(config_file.read_text(encoding="utf-8"), object_pairs_hook=once))
    with naming(tensor_file):
        parts, saved = _sorted(load_file(tensor_file), config.get("modules_to_save") or ())
    with naming(config_file):
        specs = {path: spec_of(config, path) for path in parts}
    with naming(tensor_file):
        modules = {path: _adapted(path, specs[path], found) for path, found in parts.items()}
    with naming(config_file):
        return Adapter(
            modules,
            target_modules=_names(config.get("target_modules")),
            exclude_modules=_names(config.get("exclude_modules")),
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            saved=saved,
            bias=config.get("bias", "none"),
            fan_in_fan_out=config.get("fan_in_fan_out", False),
            kept={name: config[name] for name in HARMLESS if name in config},
        )


def non_finite(adapter: Adapter) -> dict[str, int]:
    """How many NaN and infinite values each tensor holds, by its key; those that hold none are left out."""
    counts = {key: int((~value.isfinite()).sum()) for key, value in _keyed(adapter).items()}
    return {key: count for key, count in counts.items() if count}


def _keyed(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor by its key on disk; an adapted module's own are those of its `base_layer` there."""
    keyed: dict[str, Tensor] = {}
    for path, module in adapter.modules.items():
        keyed |= {f"{PREFIX}{path}.{part}": value for part, value in module.tensors().items()}
    for name, value in adapter.saved.items():
        owner, _, leaf = name.rpartition(".")
        keyed[f"{PREFIX}{owner}.base_layer.{leaf}" if owner in adapter.modules else PREFIX + name] = value
    return keyed


def _config(adapter: Adapter) -> dict[str, Any]:
    specs = {path: module.spec for path, module in adapter.modules.items()}
    (any_spec, *_) = specs.values()
    r, ranks = patterned({path: spec.rank for path, spec in specs.items()})
    alpha, alphas = patterned({path: _whole(spec.alpha) for path, spec in specs.items()})
    return {
        **adapter.kept,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "lora_dropout": any_spec.dropout,
        "use_rslora": any_spec.rslora,
        "use_dora": any_spec.dora,
        "lora_bias": any_spec.lora_bias,
        "target_modules": sorted(specs) if adapter.target_modules is None else adapter.target_modules,
        "exclude_modules": adapter.exclude_modules,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "bias": adapter.bias,
    }


def _sorted(
    tensors: dict[str, Tensor], modules_to_save: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each adapted module, and the other tensors by their names in the plain model."""
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"the key {key!r} does not begin with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if part is not None:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = value
        elif ".lora_" in name and not any(_of(module, name) for module in modules_to_save):
            raise ValueError(f"the key {key!r} ends in none of {', '.join(PARTS)}")
        else:
            others[name] = value
    if not parts:
        raise ValueError(f"no key ends in one of {', '.join(PARTS)}")
    saved = {}
    for name, value in others.items():
        owner, _, leaf = name.rpartition(".")
        bare = owner.removesuffix(".base_layer")
        plain = f"{bare}.{leaf}" if bare in parts else name
        if plain in saved:
            raise ValueError(f"{PREFIX}{plain} is there twice, also as that of a base_layer")
        saved[plain] = value
    return parts, saved


def _of(module: str, name: str) -> bool:
    """Whether a tensor of this name is of the module to save of that name, or end of a name."""
    return f".{module}." in f".{name}"


def _adapted(path: str, spec: LoraSpec, parts: dict[str, Tensor]) -> Adapted:
    """One module's tensors brought together; their shapes tell what kind of layer it is."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    of_a, of_b = PARTS[3:5] if embedding else PARTS[0:2]
    wanted = {of_a, of_b, *["lora_B.bias"] * spec.lora_bias, *["lora_magnitude_vector"] * spec.dora}
    for part in PARTS:  # the order makes the message the same every time
        if (part in wanted) != (part in parts):
            fault = "is missing" if part in wanted else "is one too many"
            there = ", ".join(name for name in PARTS if name in wanted)
            raise ValueError(f"{PREFIX}{path}.{part} {fault}: by {CONFIG} there should be {there}")
    a, b, kernel = parts[of_a], parts[of_b], tuple(parts[of_a].shape[2:])
    fits = a.ndim == b.ndim >= 2 and a.numel() and b.numel() and set(b.shape[2:]) <= {1}
    if not fits or a.shape[0] != spec.rank or spec.rank % b.shape[1] or (b.shape[1] != spec.rank and not kernel):
        raise ValueError(
            f"{PREFIX}{path}.{of_a} is of shape {tuple(a.shape)} and {of_b} of shape {tuple(b.shape)}, "
            f"and {CONFIG} gives the rank {spec.rank}"
        )
    groups = spec.rank // b.shape[1]
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    with naming(f"{PREFIX}{path}"):
        if b.shape[0] % groups:
            raise ValueError(f"the {groups} groups of lora_B do not divide its {b.shape[0]} outputs")
        whole = torch.block_diag(*b.flatten(1).chunk(groups)) if groups > 1 else b.flatten(1)
        factors = Factors(
            a.flatten(1), whole, bias, magnitude.flatten() if magnitude is not None and kernel else magnitude
        )
        return Adapted(spec, factors, embedding, kernel, groups)


def _names(value: list[str] | str | None) -> tuple[str, ...] | str | None:
    return tuple(value) if isinstance(value, list) else value


def _whole(alpha: float) -> float:
    """An integer where it is one, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha
