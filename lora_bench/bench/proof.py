"""No timing without proof: every adapted layer of the very model that is timed, against the float64 definition."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_bench import bounds, definition
from lora_bench.bench.arm import backward_once, make_step
from lora_bench.bench.result import Proof
from lora_bench.bounds import Arithmetic, Deviation, probable
from lora_bench.models.bases import dequantised
from lora_bench.spec import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from lora_bench.bench.arm import Arm, Step
    from lora_bench.bench.workload import Workload
    from lora_bench.subject import Subject

ROWS = 16
STORED_ROWS = 64
DEQUANTISED = 3
"""How often a kernel for 4-bit weights may round where the definition has them already: statistic, code, product."""
TRAIN_TOKENS = 16


class Wrong(AssertionError):
    """An arm that does not compute LoRA; the text names the layer."""


class Unproven(Exception):
    """An arm of which nothing can be shown: its adapter cannot be told from rounding; the text names the layer."""


class Capture(NamedTuple):
    """Rows of one layer's forward: x (n, d_in), y (n, d_out), ids (n,) with the adapter of each."""

    x: Tensor
    y: Tensor
    ids: Tensor


def prove(arm: Arm, step: Step) -> Proof:
    """Run `step` once and judge up to 16 rows of every adapted layer against the definition.

    Raises `Wrong` at the first layer outside its bound, and `Unproven` where a dropped adapter would stay inside it.
    """
    captures: dict[str, Capture] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shift = zlib.crc32(name.encode())  # other rows in each layer: together they see every adapter
            captures[name] = sample_rows(inputs[0].detach(), output.detach(), arm.ids, shift)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in arm.layers.items()]
    try:
        step.prepare()
        step.run()
    finally:
        for handle in handles:
            handle.remove()
    if missed := arm.layers.keys() - captures.keys():
        raise Wrong(f"{min(missed)} was adapted but never ran")
    return summary([judge_layer(arm, name, capture) for name, capture in captures.items()])


def prove_switched(arm: Arm, workload: Workload) -> Proof:
    """Switch once and judge what a prefill computes then, by the adapters that are to be served."""
    assert arm.switch is not None
    switch, prefill = arm.switch, make_step(arm, replace(workload, phase="prefill"))
    switch()
    arm.adapters = switch.served
    return prove(arm, prefill)


def sample_rows(x: Tensor, y: Tensor, ids: Tensor | None, shift: int = 0) -> Capture:
    """Up to 16 rows spread evenly over the batch, beginning at row `shift`, with the adapter of each."""
    x, rows = x.reshape(len(x), -1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    owners = torch.zeros(len(x), dtype=torch.int64) if ids is None else ids
    owners = owners.repeat_interleave(x.shape[1])
    chosen = (torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long() + shift) % max(1, len(rows))
    here = chosen.to(y.device)
    return Capture(x.flatten(0, 1)[here].clone(), rows[here].clone(), owners[chosen])


def judge_layer(arm: Arm, name: str, capture: Capture) -> Proof:
    """One layer's rows against the definition, adapter by adapter."""
    control, adapters = arm.controls[name], arm.adapters[name]
    device = capture.x.device  # the control may wait in the host's memory
    weight = dequantised(control).to(device)
    bias: Tensor | None = control.bias  # type: ignore[assignment]  # nn.Module types any attribute as a module
    bias = None if bias is None else bias.to(device)
    # Of the model's dtype: an output in a narrower one is no excuse.
    arithmetic = Arithmetic.of(weight.dtype, weight.device.type, probabilistic=True)
    proofs = []
    for index in capture.ids.unique().tolist():
        rows = (capture.ids == index).to(capture.x.device)
        x, (spec, factors) = capture.x[rows], adapters[index]
        layer = (x, weight, bias, factors, spec.scaling)
        allowed = (probable.merged if arm.setup == "merged" else probable.separate)(*layer, arithmetic)
        if (slack := left_behind(arm, name, weight, spec.scaling, arithmetic)) is not None:
            allowed = allowed + probable.strayed(x, slack)
        if arm.setup == "four_bit":
            allowed = allowed + DEQUANTISED * arithmetic.unit * x.double().abs() @ weight.double().abs().T
        wanted = definition.forward(*layer)
        deviation = bounds.worst(capture.y[rows], wanted, allowed)
        if deviation.ratio > 1 and arm.setup != "merged":  # one that adds s B A to W each time may do so
            allowed = allowed.maximum(probable.merged(*layer, arithmetic))
            deviation = bounds.worst(capture.y[rows], wanted, allowed)
        visible = bounds.visibility(definition.delta(x, factors, spec.scaling), allowed)
        where = name if len(adapters) == 1 else f"{name}, adapter {index}"
        proofs.append(_proof(where, deviation, visible))
    if arm.setup == "merged":
        proofs += judge_stored(arm, name, weight, arithmetic)
    return summary(proofs)


def left_behind(arm: Arm, name: str, weight: Tensor, scaling: float, arithmetic: Arithmetic) -> Tensor | None:
    """How far the weight may have strayed by unmerging the adapter that was served before; None where none was."""
    if arm.setup != "merged" or arm.switch is None:
        return None
    ((_, other),) = arm.switch.other[name]
    return probable.unmerged_weight(weight, other, scaling, arithmetic)


def judge_stored(arm: Arm, name: str, weight: Tensor, arithmetic: Arithmetic) -> list[Proof]:
    """The weight that a merged layer tells it holds must be W + s B A: a merge that changes nothing is none.

    Some of its rows are looked at; all of them have a part in the outputs that were judged.
    """
    stored, ((spec, factors),) = arm.stored(name), arm.adapters[name]
    if not isinstance(stored, torch.Tensor) or stored.shape != weight.shape:
        return []
    slack = left_behind(arm, name, weight, spec.scaling, arithmetic)
    chosen = torch.linspace(0, len(weight) - 1, min(STORED_ROWS, len(weight))).long().to(weight.device)
    stored, weight, factors = stored[chosen], weight[chosen], Factors(factors.a, factors.b[chosen])
    wanted = definition.merged_weight(weight, factors, spec.scaling)
    allowed = probable.merged_weight(weight, factors, spec.scaling, arithmetic)
    if slack is not None:
        allowed = allowed + slack[chosen]
    visible = bounds.visibility(wanted - weight.double(), allowed)
    return [_proof(f"the merged weight of {name}", bounds.worst(stored, wanted, allowed), visible)]


def prove_training(arm: Arm, subject: Subject) -> Proof:
    """Judge outputs and the gradients of A, B and x of every layer in one backward pass over 1 x 16 tokens.

    Raises `Wrong` at the first that is outside its bound, and when anything but A and B would train; `Unproven` as
    `prove` does.
    """
    judge_trainable(arm)
    seen: dict[str, dict[str, Any]] = {name: {} for name in arm.layers}

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name].update(x=inputs[0].detach().clone(), y=output.detach().clone())

        def backward(_module: nn.Module, grad_x: tuple[Tensor | None, ...], grad_y: tuple[Tensor, ...]) -> None:
            seen[name].update(grad_x=grad_x[0], grad=grad_y[0].detach().clone())

        return forward, backward

    handles = []
    for name, layer in arm.layers.items():
        forward, backward = watch(name)
        handles += [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]
    try:
        arm.model.train()
        backward_once(arm, TRAIN_TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    proofs = []
    for name, values in seen.items():
        if "grad" not in values:
            raise Wrong(f"{name} was adapted but no gradient came through it")
        live = subject.factors(arm.layers[name])  # type: ignore[misc]  # only who offers factors is trained
        proofs.append(judge_layer(arm, name, sample_rows(values["x"], values["y"], None)))
        proofs += judge_gradients(arm, name, values, {"A": live.a.grad, "B": live.b.grad, "x": values["grad_x"]})
    arm.model.zero_grad()
    return summary(proofs)


def judge_trainable(arm: Arm) -> None:
    """Raise `Wrong` unless r (d_in + d_out) parameters of every adapted layer train, and none elsewhere."""
    elsewhere = {parameter for parameter in arm.model.parameters() if parameter.requires_grad}
    for name, layer in arm.layers.items():
        ((spec, factors),) = arm.adapters[name]
        training = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        found, wanted = sum(parameter.numel() for parameter in training), spec.parameters(factors.d_in, factors.d_out)
        if found != wanted:
            raise Wrong(f"{name}: {found:,} parameters train, wanted A and B alone, r (d_in + d_out) = {wanted:,}")
        elsewhere -= training
    if elsewhere:
        name = next(name for name, parameter in arm.model.named_parameters() if parameter in elsewhere)
        raise Wrong(f"{name} trains, wanted A and B of the adapted layers alone")


def judge_gradients(arm: Arm, name: str, values: dict[str, Tensor], found: dict[str, Tensor | None]) -> Iterator[Proof]:
    """The gradients of one layer against the formulas."""
    ((spec, factors),) = arm.adapters[name]
    x, grad = (values[key].flatten(0, -2) for key in ("x", "grad"))
    weight = dequantised(arm.controls[name]).to(x.device)
    arguments = (x, grad, weight, factors, spec.scaling)
    wanted = definition.gradients(*arguments)
    allowed = probable.gradients(*arguments, Arithmetic.of(weight.dtype, weight.device.type, probabilistic=True))
    for which, gradient, right, limit in zip(found, found.values(), wanted, allowed, strict=True):
        if gradient is None:
            raise Wrong(f"{name}: {which} got no gradient")
        deviation = bounds.worst(gradient.reshape(right.shape), right, limit)
        yield _proof(f"dL/d{which} of {name}", deviation, bounds.visibility(right, limit))


def _proof(where: str, deviation: Deviation, visibility: float) -> Proof:
    if deviation.ratio > 1:
        index = ",".join(map(str, deviation.at))
        raise Wrong(
            f"{where}: found {deviation.found:g} at [{index}], wanted {deviation.wanted:g}; "
            f"error {deviation.error:.2e}, allowed {deviation.allowed:.2e} (x{deviation.ratio:.3g})"
        )
    if visibility <= 1:
        raise Unproven(f"{where}: the adapter's effect may be below the rounding (visibility {visibility:.2g})")
    return Proof(1, deviation.ratio, visibility)


def summary(proofs: Sequence[Proof]) -> Proof:
    """Many proofs as one: all checks, the worst error, the least visible adapter."""
    return Proof(
        sum(proof.checks for proof in proofs),
        max(proof.error_ratio for proof in proofs),
        min(proof.visibility for proof in proofs),
    )
