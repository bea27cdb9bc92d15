"""A toy model whose output shows each of its layers apart, so that each is judged by the bound of one layer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.adapter import Adapted, Adapter, read, write
from lora_bench.adapter.config import CONFIG
from lora_bench.adapter.peft_format import TENSORS
from lora_bench.conformance.outcome import Fails, Raised
from lora_bench.conformance.trial import Terms
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lora_bench.case import Case
    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

HEAD = "lm_head"
PROJECTIONS = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.xq_proj")
LINEARS = (*PROJECTIONS, HEAD)

Adapters = Mapping[str, tuple[LoraSpec, Factors]]
"""The adapters of a model by the places of their layers."""


class Model(nn.Module):
    """y is what every layer makes of the same x (n, d_in), side by side; the embedding is of each row's largest number.

    Its names are those of a language model, with one that only ends like another ("xq_proj").
    """

    def __init__(self, case: Case, *, tied: bool = False) -> None:
        super().__init__()
        width, dtype = case.d_in, case.torch_dtype
        self.embed = nn.Embedding(width + 1, width, dtype=dtype)
        projections = {
            place: nn.Linear(width, case.d_out + index, case.bias, dtype=dtype)
            for index, place in enumerate(PROJECTIONS)
        }
        self.layers = nn.ModuleList(
            nn.ModuleDict({place.split(".")[2]: layer for place, layer in projections.items() if f".{block}." in place})
            for block in range(2)
        )
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.lm_head = nn.Linear(width, width + 1, bias=False, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(drawn(generator, parameter))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        linears = [self.get_submodule(place)(x) for place in LINEARS]
        return torch.cat([self.embed(x.argmax(-1)), self.norm(x), *linears], -1)


class Toy:
    """A trial's toy model, with what the definition says of it.

    Everything that it gives out is a copy, as of a `Trial`.
    """

    def __init__(self, trial: Trial, *, tied: bool = False) -> None:
        self.trial = trial
        self.case = trial.case
        self.plain = Model(trial.case, tied=tied)

    def model(self) -> Model:
        """The model, trainable as every new one is."""
        return copy.deepcopy(self.plain)

    def weights(self, place: str) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of a linear layer."""
        layer = self.plain.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

    def adapters(self, places: Iterable[str], *, seed: int = 0, varied: bool = False) -> Adapters:
        """An adapter for each of the places, of the case's spec; `varied` ones differ in rank and alpha."""
        generator = torch.Generator().manual_seed(2 * self.case.seed + seed + 1)
        adapters: dict[str, tuple[LoraSpec, Factors]] = {}
        for index, place in enumerate(places):
            spec = self.case.spec
            if varied:
                spec = replace(spec, rank=spec.rank + index, alpha=spec.alpha * (1 + index))
            d_out, d_in = self.weights(place)[0].shape
            one = torch.empty((), dtype=self.case.torch_dtype)
            a, b = drawn(generator, one.expand(spec.rank, d_in)), drawn(generator, one.expand(d_out, spec.rank))
            beta = drawn(generator, one.expand(d_out)) if spec.lora_bias else None
            adapters[place] = spec, Factors(a, b, beta)
        return adapters

    def terms(self, place: str, adapters: Adapters) -> Terms:
        """The terms of one linear layer."""
        x, (weight, bias) = self.trial.x, self.weights(place)
        if place not in adapters:
            nothing = Factors(weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1))
            return Terms(x, weight, bias, nothing, 0.0)
        spec, factors = adapters[place]
        return Terms.of(x, weight, bias, factors, spec.scaling)

    def parts(self, y: Tensor) -> dict[str, Tensor]:
        """An output by the places of the layers that it is made of."""
        width = self.case.d_in
        sizes = {"embed": width, "norm": width} | {place: len(self.weights(place)[0]) for place in LINEARS}
        self.trial.require_shape("y", y, (self.case.tokens, sum(sizes.values())))
        return dict(zip(sizes, y.split(list(sizes.values()), -1), strict=True))

    def judge(self, y: Tensor, adapters: Adapters, bound: Callable[..., Tensor] = bounds.separate) -> None:
        """Fail unless y is the model's output with these adapters and no others, each of which could be missed."""
        plain = self.parts(self.plain(self.trial.x).detach())
        for place, part in self.parts(y).items():
            if place not in LINEARS:
                self.trial.near(f"y of {place}", part, plain[place])
                continue
            terms = self.terms(place, adapters)
            allowed = bound(*terms, self.trial.arithmetic)
            self.trial.near(f"y of {place}", part, definition.forward(*terms), allowed)
            if place in adapters:
                self.trial.visible(definition.delta(terms.x, terms.factors, terms.scaling), allowed)

    def judge_targets(self, targets: list[str] | str, places: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Fail unless these places, and maybe the optional ones, answer otherwise once what trains has moved."""
        model, wanted = self.adapted(targets), set(places)
        before = self.parts(self.run(model).detach().clone())
        self.move(model)
        after = self.parts(self.run(model).detach())
        found = {place for place, part in after.items() if not torch.equal(part, before[place])}
        because = f"{targets!r} adapts {', '.join(sorted(found)) or 'nothing'}, wanted {', '.join(sorted(wanted))}"
        self.trial.require(found - set(optional) == wanted, because)

    def judge_saved(self, found: Adapters, adapters: Adapters) -> None:
        """Fail unless A and B of each of the adapters were saved as they are."""
        for place, (_, factors) in adapters.items():
            self.trial.require(place in found, f"it saved no adapter of {place}")
            self.trial.near(f"A of {place}", found[place][1].a, factors.a)
            self.trial.near(f"B of {place}", found[place][1].b, factors.b)

    def run(self, model: Layer) -> Tensor:
        """A model's output for the trial's input."""
        return self.trial.call(model, self.trial.x)

    def numbers(self, places: Iterable[str]) -> int:
        """How many numbers adapters of the case's spec train in these places."""
        return sum(self.case.spec.parameters(*reversed(self.weights(place)[0].shape)) for place in places)

    # What is asked of the subject

    def adapted(self, targets: list[str] | str) -> Layer:
        """The model with fresh adapters on what the targets name."""
        self.trial.must_support(self.trial.spec)
        return self.trial.ask("adapt", self.model(), self.trial.spec, targets)

    def move(self, model: Layer) -> None:
        """Give every number that trains another value, as training would."""
        generator = torch.Generator().manual_seed(self.case.seed + 2)
        with torch.no_grad():
            for parameter in self.trial.trainable(model).values():
                parameter.copy_(drawn(generator, parameter))

    def restored(self, folder: str) -> Layer:
        """The model with a folder's adapters."""
        self.trial.must_support(self.trial.spec)
        return self.trial.ask("restore", self.model(), folder)

    def of_folder(self, adapters: Adapters, **fields: Any) -> Layer:
        """The model with adapters by way of a folder."""
        with TemporaryDirectory() as folder:
            written(folder, adapters, **fields)
            return self.restored(folder)

    def saved(self, model: Layer, folder: str | None = None) -> Adapter:
        """What the subject writes into a folder, which is a new one if none is given."""
        if folder is None:
            with TemporaryDirectory() as new:
                return self.saved(model, new)
        self.trial.ask("save", model, folder)
        try:
            return read(folder)
        except (ValueError, OSError) as broken:
            raise Fails(f"what it saved cannot be read: {broken}", verb="save") from None

    def judge_refused(
        self,
        fault: str,
        *,
        state: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Fail unless a folder with such a state, or such fields, is refused with an error or a warning.

        What is said of an intact folder is no warning.
        """
        with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            written(folder, self.adapters(PROJECTIONS))
            self.restored(folder)
            always = {str(one.message) for one in said}
            tensors, fields = Path(folder) / TENSORS, Path(folder) / CONFIG
            if state is not None:
                changed = {key: value.contiguous() for key, value in state(load_file(tensors)).items()}
                save_file(changed, tensors, metadata={"format": "pt"})
            fields.write_text(json.dumps(json.loads(fields.read_text()) | (config or {})))
            try:
                self.restored(folder)
            except Raised:
                return
        self.trial.require(bool({str(one.message) for one in said} - always), f"{fault}, and nothing was said")


def written(folder: str, adapters: Adapters, **fields: Any) -> None:
    """Write a folder in PEFT's format."""
    write(folder, Adapter({place: Adapted(*adapter) for place, adapter in adapters.items()}, **fields))


def adapters_of(adapter: Adapter) -> Adapters:
    """A folder's adapters by place."""
    return {place: (module.spec, module.factors) for place, module in adapter.modules.items()}


def drawn(generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn in float64 and rounded once."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)
