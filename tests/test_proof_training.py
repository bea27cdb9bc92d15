"""No timing without proof: bugs planted in training are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from torch.nn import functional

from lora_bench.bench import ready
from lora_bench.bench.proof import Wrong
from lora_bench.reference import REFERENCE, LoraLinear
from lora_bench.spec import LoraSpec
from lora_bench.subject import Subject
from tests.proven_arms import FIRST, arm_of, proven, row_of, wrapping

if TYPE_CHECKING:
    from torch import Tensor


class DetachedHidden(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.lora_A).detach()
        y: Tensor = self.base_layer(x) + functional.linear(hidden * self.spec.scaling, self.lora_B)
        return y


class DetachedInput(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x.detach(), self.lora_A)
        y: Tensor = self.base_layer(x) + functional.linear(hidden * self.spec.scaling, self.lora_B)
        return y


class DroppedInTraining(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) if self.training else super().forward(x)
        return y


def half_gradient(of: str) -> Subject:
    def wrap(base: Any, spec: LoraSpec) -> LoraLinear:
        layer = LoraLinear(base, spec)
        getattr(layer, of).register_hook(lambda grad: grad / 2)
        return layer

    return wrapping(wrap)


def base_trains(base: Any, spec: LoraSpec) -> LoraLinear:
    layer = LoraLinear(base, spec)
    layer.base_layer.requires_grad_(requires_grad=True)
    return layer


def a_is_frozen(base: Any, spec: LoraSpec) -> LoraLinear:
    layer = LoraLinear(base, spec)
    layer.lora_A.requires_grad_(False)
    return layer


# q_proj of the micro model: r (d_in + d_out) = 4 * (64 + 64), and a base weight of 64 * 64.
TRAINING = {
    "half dL/dA": (half_gradient("lora_A"), f"dL/dA of {FIRST}: found .* allowed"),
    "half dL/dB": (half_gradient("lora_B"), f"dL/dB of {FIRST}: found .* allowed"),
    "no dL/dx of the adapter": (wrapping(DetachedInput), f"dL/dx of {FIRST}: found .* allowed"),
    "detached hidden": (wrapping(DetachedHidden), f"{FIRST}: A got no gradient"),
    "dropped in training": (wrapping(DroppedInTraining), f"{FIRST}: found .* allowed"),
    "A is frozen": (wrapping(a_is_frozen), f"{FIRST}: 256 parameters train, wanted A and B alone, .* = 512"),
    "the base trains": (wrapping(base_trains), f"{FIRST}: 4,608 parameters train, wanted A and B alone, .* = 512"),
}


@pytest.mark.parametrize(("subject", "message"), TRAINING.values(), ids=TRAINING.keys())
def test_wrong_training_is_found(subject: Subject, message: str) -> None:
    with pytest.raises(Wrong, match=f"^{message}"):
        proven(subject, "separate", "train")


def test_what_trains_elsewhere_in_the_model_is_named() -> None:
    row = row_of("separate", "train")
    arm = arm_of(REFERENCE, row)
    arm.model.get_input_embeddings().requires_grad_(requires_grad=True)

    with pytest.raises(
        Wrong, match=r"^model\.embed_tokens\.weight trains, wanted A and B of the adapted layers alone$"
    ):
        ready.ready_row(row, REFERENCE, arm)
