"""PEFT's initialisations: each begins as its paper says, and leaves the output what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.bounds import Arithmetic, worst
from lora_bench.conformance.trial import Trial
from lora_bench.spec import Factors, LoraSpec
from tests.shipped_subjects import subject_here
from tests.third_party_trials import trial

RESIDUAL = ("peft-pissa", "peft-pissa-niter-4", "peft-olora", "peft-corda", "peft-lora-ga")
INITS = ("peft-gaussian", "peft-random", "peft-orthogonal", "peft-eva", *RESIDUAL)
BOTH_KINDS = pytest.mark.parametrize("kind", ["linear", "fan_in_fan_out"])
OF_A_CONV1D = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")


def begun(name: str, kind: str = "linear") -> tuple[Trial, Tensor, Factors, Any]:
    """A trial in float32, W as it was and the fresh layer's factors in float64, and the layer."""
    fresh = trial(name, kind, dtype="fp32")
    before = fresh.terms.weight
    layer = fresh.wrap()
    return fresh, before.double(), fresh.factors_of(layer).map(lambda factor: factor.detach().double()), layer


@OF_A_CONV1D
@BOTH_KINDS
@pytest.mark.parametrize("name", [name for name in INITS if name != "peft-random"])
def test_an_initialisation_leaves_the_output_what_it_was(name: str, kind: str) -> None:
    if (name, kind) == ("peft-olora", "fan_in_fan_out"):
        pytest.skip("known: it decomposes the weight of a Conv1D without transposing it")
    fresh, before, live, layer = begun(name, kind)
    after, scaling = fresh.weight_of(layer), fresh.spec.scaling
    moved = bounds.merged_weight(before, live, scaling, fresh.arithmetic)
    allowed = bounds.separate(fresh.x, after, fresh.terms.bias, live, scaling, fresh.arithmetic)
    wanted = definition.base(fresh.x, before, fresh.terms.bias)

    assert worst(fresh.call(layer, fresh.x), wanted, allowed + fresh.x.double().abs() @ moved.T).ratio <= 1


@OF_A_CONV1D
@BOTH_KINDS
@pytest.mark.parametrize("name", INITS)
def test_a_part_of_the_weight_moves_where_it_is_said_to(name: str, kind: str) -> None:
    if (name, kind) == ("peft-olora", "fan_in_fan_out"):
        pytest.skip("known: it decomposes the weight of a Conv1D without transposing it")
    fresh, before, live, layer = begun(name, kind)
    moved = not torch.equal(fresh.weight_of(layer).double(), before)

    assert moved == fresh.subject.residual == (name in RESIDUAL)
    assert bool(live.b.any()) == (moved or name in ("peft-random", "peft-orthogonal"))


def test_each_initialisation_begins_as_its_paper_says() -> None:
    single, eye = Arithmetic.of(torch.float32), torch.eye(2, dtype=torch.float64)

    def same(found: Tensor, wanted: Tensor, scale: Tensor) -> bool:
        return worst(found, wanted, bounds.decomposed(scale, single).max()).ratio <= 1

    for name in ("peft-pissa", "peft-pissa-niter-4"):
        fresh, before, _, layer = begun(name)
        left, whole = (torch.linalg.svdvals(weight) for weight in (fresh.weight_of(layer).double(), before))
        assert left[0] < whole[1]
        assert name != "peft-pissa" or same(left[:2], whole[2:], before)
    _, _, olora, _ = begun("peft-olora")
    assert same(olora.b.T @ olora.b, eye, olora.b)
    _, _, eva, _ = begun("peft-eva")
    assert same(eva.a @ eva.a.T, eye, eva.a)
    _, _, orthogonal, _ = begun("peft-orthogonal")
    both = orthogonal.b.norm() * orthogonal.a.norm()
    assert same(orthogonal.b @ orthogonal.a, torch.zeros(4, 5).double(), both.view(1, 1).expand(4, 5))


@pytest.mark.parametrize(
    ("name", "highest", "error", "message"),
    [
        ("peft-eva", 5, ValueError, "n_components=6 invalid for n_features=5"),
        ("peft-corda", 4, ValueError, "rank mismatch: 4 vs. 5"),
        ("peft-lora-ga", 2, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_a_rank_is_refused_where_peft_raises(name: str, highest: int, error: type[Exception], message: str) -> None:
    subject = subject_here(name)
    from lora_bench.subjects import peft_inits
    from lora_bench.subjects.peft import Box

    make = {"peft-eva": peft_inits.eva, "peft-corda": peft_inits.corda, "peft-lora-ga": peft_inits.lora_ga}[name]
    subject.wrap(nn.Linear(5, 4), LoraSpec(highest, 4.0))
    with pytest.raises(NotImplementedError, match=f"a rank of at most {highest} for this layer, got {highest + 1}"):
        subject.wrap(nn.Linear(5, 4), LoraSpec(highest + 1, 4.0))
    with pytest.raises(error, match=message):
        make(Box(nn.Linear(5, 4)), LoraSpec(highest + 1, 4.0))


def test_an_odd_rank_is_refused_where_peft_raises() -> None:
    subject = subject_here("peft-orthogonal")

    assert subject.supports(LoraSpec(3, 4.0)) == "an even rank, got 3"
    assert subject.supports(LoraSpec(2, 4.0)) is None
    with pytest.raises(ValueError, match="requires the LoRA rank to be even, got 3"):
        subject.wrap(nn.Linear(5, 4), LoraSpec(3, 4.0))
