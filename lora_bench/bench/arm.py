"""An arm of a comparison: one subject in one set-up, put into a model, with the steps that are timed."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from lora_bench.bench.switch import Switch
from lora_bench.case import DTYPES
from lora_bench.models.bases import FOUR_BIT, quantise
from lora_bench.models.inject import adapt, find_targets, replace
from lora_bench.models.routing import route_model
from lora_bench.models.single import SingleLayer
from lora_bench.spec import Factors, LoraSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedModel

    from lora_bench.bench.workload import Workload
    from lora_bench.models.routing import Router
    from lora_bench.subject import Subject


@dataclass
class Arm:
    """A model ready to run, and what is needed to judge it.

    layers: the replaced modules by name; controls: the same layers without an adapter, whose (dequantised) weight and
    bias the definition uses; adapters: the spec and factors of each layer's adapters; stored: the weight that a merged
    layer of that name holds, if it tells; switch: puts other adapters in their place; ids: which adapter each sequence
    of a batch uses.
    """

    setup: str
    model: PreTrainedModel
    layers: dict[str, nn.Module] = field(default_factory=dict)
    controls: dict[str, nn.Module] = field(default_factory=dict)
    adapters: dict[str, list[tuple[LoraSpec, Factors]]] = field(default_factory=dict)
    stored: Callable[[str], object] = lambda _name: None
    switch: Switch | None = None
    router: Router | None = None
    ids: Tensor | None = None

    def routed(self) -> AbstractContextManager[object]:
        """The context in which a forward of this arm runs."""
        return nullcontext() if self.router is None or self.ids is None else self.router.ids(self.ids)


def build_arm(
    model: PreTrainedModel, subject: Subject | None, workload: Workload, pristine: PreTrainedModel | None = None
) -> Arm:
    """The arm of `workload`, made of `model` in place; `pristine` holds the same weights, unadapted, to judge it by.

    B is random and not zero, of a size that makes the adapter's output about as large as the base's: time does not
    depend on it, and a dropped adapter cannot hide in the rounding.
    """
    if subject is None:
        return Arm(workload.setup, model)
    spec = LoraSpec(workload.rank, alpha=2.0 * workload.rank)
    targets = workload.adapted
    adapters = {name: draw_adapters(name, layer, workload) for name, layer in find_targets(model, targets).items()}
    if workload.setup == "four_bit":
        quantise(model, next(kind for kind in subject.layers if kind in FOUR_BIT), targets)
    bases = find_targets(model, targets)
    layers = adapt(model, subject, spec, targets)
    for name, layer in layers.items():
        subject.load(layer, adapters[name][0][1])
    arm = Arm(workload.setup, model.eval())
    if pristine is not None:  # otherwise nothing is judged, and what judges would be weighed with the model
        arm.adapters = adapters
        arm.controls = bases if workload.setup == "four_bit" else find_targets(pristine, targets)
    if workload.phase == "switch":
        others = {name: draw_adapters(f"{name}, other", layer, workload) for name, layer in bases.items()}
        arm.switch = Switch(workload.setup, subject, model, layers, (adapters, others))
    if workload.setup == "merged":
        _merge(arm, subject, layers)
    elif workload.setup == "batched":
        arm.router = route_model(model, subject, layers, adapters)
        arm.ids = torch.tensor(workload.asked)
    arm.layers = {name: model.get_submodule(name) for name in layers}
    return arm


def _merge(arm: Arm, subject: Subject, layers: dict[str, Any]) -> None:
    """Merge every layer: for good where the subject can, but not where another adapter is to take its place."""
    in_place = arm.switch is not None or subject.merge_and_unload is None
    merge = subject.merge if in_place else subject.merge_and_unload
    assert merge is not None  # or there would be no such arm
    for name, layer in layers.items():
        merged = merge(layer)
        replace(arm.model, name, layer if merged is None else merged)
    if not in_place:
        arm.stored = lambda name: getattr(arm.layers[name], "weight", None)
    elif (weight := subject.weight) is not None:
        arm.stored = lambda name: weight(layers[name])


def draw_adapters(name: str, linear: Any, workload: Workload) -> list[tuple[LoraSpec, Factors]]:
    """Seeded random adapters of one layer: of one rank, each with its own scale, so that a mixed-up one is seen."""
    weight = linear.weight.detach()
    d_out, d_in = weight.shape
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    place = {"generator": generator, "device": weight.device, "dtype": torch.float32}
    spread = float(weight.float().std())
    drawn = []
    for index in range(workload.adapters):
        own = LoraSpec(workload.rank, alpha=2 * workload.rank * (1 + index / workload.adapters))
        size = spread * math.sqrt(d_in / own.rank) / own.scaling
        a = torch.randn(own.rank, d_in, **place) / math.sqrt(d_in)
        b = torch.randn(d_out, own.rank, **place) * size
        drawn.append((own, Factors(a.to(weight.dtype), b.to(weight.dtype))))
    return drawn


@dataclass(frozen=True)
class Step:
    """One timed call, and what is not timed: `prepare` before each, and now and then `relocate`.

    `parts` is asked afterwards: seconds of each part of the last so many calls, of a step that has parts. `reads` is
    what a call will read and then let go of: who keeps it can repeat what the call has put into a queue.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    relocate: Callable[[], object] = lambda: None
    parts: Callable[[int], dict[str, list[float]]] = lambda _calls: {}
    reads: Callable[[], object] = lambda: None


def make_step(arm: Arm, workload: Workload) -> Step:
    """The step of the workload's phase: what is timed is what was judged, on the same modules."""
    steps = {"prefill": _prefill, "decode": _decode, "train": _train}
    if isinstance(arm.model, SingleLayer):
        steps = {"prefill": _rows, "decode": _rows, "train": _train_rows}
    step = _switch(arm) if workload.phase == "switch" else steps[workload.phase](arm, workload)
    return replace_fields(step, relocate=lambda: relocate(arm.model))


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Every tensor that the model's modules hold, once: parameters, buffers, and those in tuples, as in our `Pool`."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    loose = [part for value in attributes if isinstance(value, tuple) for part in value if isinstance(part, Tensor)]
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers(), *loose]}.values())


def relocate(model: nn.Module) -> None:
    """Move the model's tensors to other memory, each that has its storage to itself; their values stay.

    Where the allocator happened to lay a model's weights changes its time on a CPU by several per cent for as long as
    they lie there, which no number of samples averages out.
    """
    tensors = tensors_of(model)
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if owners[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes:
            tensor.data = tensor.data.clone()


def draw_tokens(arm: Arm, batch: int, length: int) -> Tensor:
    """Seeded random token ids (batch, length) on the model's device."""
    tokens = torch.randint(arm.model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    return tokens.to(arm.model.device)


def _prefill(arm: Arm, workload: Workload) -> Step:
    tokens = draw_tokens(arm, workload.batch, workload.sequence)

    @torch.inference_mode()
    def run() -> object:
        with arm.routed():
            return arm.model(tokens, use_cache=True, logits_to_keep=1)

    return Step(run)


def _decode(arm: Arm, workload: Workload) -> Step:
    tokens = draw_tokens(arm, workload.batch, workload.sequence + 1)
    cache = DynamicCache(config=arm.model.config)
    with torch.inference_mode(), arm.routed():
        arm.model(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> object:
        with arm.routed():
            return arm.model(tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def forget() -> None:
        for layer in cache.layers:  # each by itself: a step that broke off has reached only some
            if extra := layer.get_seq_length() - workload.sequence:
                layer.crop(-extra)

    return Step(run, prepare=forget, reads=lambda: [(layer.keys, layer.values) for layer in cache.layers])


def _rows(arm: Arm, workload: Workload) -> Step:
    layer = cast("SingleLayer", arm.model)
    x = layer.draw(workload.batch, workload.tokens // workload.batch)

    @torch.inference_mode()
    def run() -> object:
        with arm.routed():
            return layer(x)

    return Step(run)


def _switch(arm: Arm) -> Step:
    assert arm.switch is not None
    return Step(arm.switch, parts=arm.switch.seconds)


def _train(arm: Arm, workload: Workload) -> Step:
    tokens = draw_tokens(arm, workload.batch, workload.sequence)
    optimiser = _optimiser(arm)

    def run() -> None:
        arm.model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return Step(run)


def _train_rows(arm: Arm, workload: Workload) -> Step:
    """As in the middle of a model: dL/dy comes from above, and dL/dx goes down."""
    layer = cast("SingleLayer", arm.model)
    x = layer.draw(workload.batch, workload.sequence).requires_grad_()
    grad = layer.draw(workload.batch, workload.sequence, outputs=True)
    optimiser = _optimiser(arm)

    def run() -> None:
        layer(x).backward(grad)
        optimiser.step()
        optimiser.zero_grad()
        x.grad = None

    return Step(run)


def _optimiser(arm: Arm) -> torch.optim.Optimizer:
    arm.model.train()
    if arm.setup == "base":
        arm.model.requires_grad_(True)
    return torch.optim.AdamW([p for p in arm.model.parameters() if p.requires_grad], lr=1e-5)


def backward_once(arm: Arm, length: int) -> None:
    """A forward and backward of one sequence whose inputs are leaves: the first layers get a dL/dx as well."""
    if isinstance(arm.model, SingleLayer):
        x = arm.model.draw(1, length).requires_grad_()
        arm.model(x).backward(arm.model.draw(1, length, outputs=True))
        return
    tokens = draw_tokens(arm, 1, length)
    embedded = arm.model.get_input_embeddings()(tokens).detach().requires_grad_()
    arm.model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss.backward()


def torch_dtype(name: str) -> torch.dtype:
    """The dtype by our short name ("bf16")."""
    dtype = getattr(torch, DTYPES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype
