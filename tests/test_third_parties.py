"""The third parties that ship as subjects: each computes the definition, and says what it does not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.conformance.trial import Trial
from lora_bench.models.bases import missing as missing_base
from lora_bench.spec import LoraSpec
from lora_bench.subjects import missing
from tests.expected import within
from tests.shipped_subjects import subject_here
from tests.third_party_trials import CONVOLUTIONS, trial

LAYERS = {
    "lora-pytorch": ("linear", "embedding", *CONVOLUTIONS),
    "lycoris": ("linear", *CONVOLUTIONS),
    "lycoris-bypass": ("linear", *CONVOLUTIONS),
    "diffusers": ("linear", "conv2d"),
}
PLACES = [(name, kind) for name, kinds in LAYERS.items() for kind in kinds]
EVERY_NAME = pytest.mark.parametrize("name", LAYERS)
EVERY_PLACE = pytest.mark.parametrize(("name", "kind"), PLACES)


def defined(of: Trial, y: Tensor, allowed: Tensor) -> bool:
    """Whether y is the definition's output, within a bound that an adapter left out would break."""
    return within(of.rows_of(y), definition.forward(*of.terms), allowed) and bounds.visibility(of.effect, allowed) > 1


def bare(of: Trial, y: Tensor) -> bool:
    """Whether y is the base's output."""
    return within(of.rows_of(y), definition.forward(*of.bare_terms), of.bare_bound)


@EVERY_NAME
def test_it_has_the_layers_that_it_can(name: str) -> None:
    assert subject_here(name).layers == LAYERS[name]


@EVERY_PLACE
def test_it_computes_the_definition(name: str, kind: str) -> None:
    fresh = trial(name, kind)
    new, loaded = fresh.call(fresh.wrap(), fresh.x), fresh.call(fresh.layer(), fresh.x)

    assert bare(fresh, new)
    assert defined(fresh, loaded, fresh.separate_bound)


@EVERY_PLACE
def test_it_merges_what_it_computes(name: str, kind: str) -> None:
    merged = trial(name, kind)
    in_place, unloaded = merged.merge(merged.layer()), merged.ask("merge_and_unload", merged.layer())

    assert defined(merged, merged.call(in_place, merged.x), merged.merged_bound)
    assert defined(merged, merged.call(unloaded, merged.x), merged.merged_bound)


@EVERY_PLACE
def test_only_the_factors_that_it_shows_train(name: str, kind: str) -> None:
    shown = trial(name, kind)
    layer = shown.layer()
    live = shown.factors_of(layer)

    assert torch.equal(live.a, shown.factors.a)
    assert torch.equal(live.b, shown.factors.b)
    trains = {parameter.data_ptr() for parameter in shown.trainable(layer).values()}
    assert trains == {live.a.data_ptr(), live.b.data_ptr()}


@EVERY_NAME
def test_its_state_reads_back(name: str) -> None:
    saved = trial(name)
    state = {key: value.detach().clone() for key, value in saved.ask("state", saved.layer()).items()}
    other = saved.wrap()
    saved.ask("load_state", other, state)

    assert defined(saved, saved.call(other, saved.x), saved.separate_bound)


@pytest.mark.parametrize("name", ["lycoris", "lycoris-bypass", "diffusers"])
def test_its_adapters_act_by_name(name: str) -> None:
    both = trial(name, adapters=2)
    (own, _), (spec, factors) = both.adapters
    layer = both.layer()
    terms = both.terms_of(factors, spec.scaling)
    allowed = bounds.separate(*terms, both.arithmetic)
    both.ask("add", layer, "other", spec, factors)
    assert defined(both, both.call(layer, both.x), both.separate_bound)
    both.ask("activate", layer, ["other"])
    assert within(both.call(layer, both.x), definition.forward(*terms), allowed)
    both.ask("activate", layer, ["default"])
    both.ask("delete", layer, "other")
    assert defined(both, both.call(layer, both.x), both.separate_bound)
    assert spec.scaling != own.scaling


@pytest.mark.parametrize("name", ["lycoris", "lycoris-bypass", "diffusers"])
@pytest.mark.parametrize("factor", [0.0, -2.0])
def test_its_effect_scales_and_switches_off(name: str, factor: float) -> None:
    scaled = trial(name)
    layer = scaled.layer()
    scaled.ask("scale", layer, factor)
    terms = scaled.terms_of(scaled.factors, factor * scaled.spec.scaling)
    allowed = bounds.separate(*terms, scaled.arithmetic)
    assert within(scaled.call(layer, scaled.x), definition.forward(*terms), allowed)
    scaled.ask("scale", layer, 1.0)
    assert defined(scaled, scaled.call(layer, scaled.x), scaled.separate_bound)
    scaled.ask("enable", layer, False)
    assert bare(scaled, scaled.call(layer, scaled.x))
    scaled.ask("enable", layer, True)
    assert defined(scaled, scaled.call(layer, scaled.x), scaled.separate_bound)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("loralib", LoraSpec(2, 4.0, rslora=True), "loralib has no rsLoRA"),
        ("loralib", LoraSpec(2, 4.0, dropout=0.5), None),
        ("lora-pytorch", LoraSpec(2, 4.0), "lora-pytorch has no alpha, its scaling is 1 and not 2"),
        ("lora-pytorch", LoraSpec(2, 2.0, dropout=0.5), "lora-pytorch has no dropout"),
        ("lora-pytorch", LoraSpec(4, 2.0, rslora=True), None),
        ("lycoris", LoraSpec(2, 4.0, rslora=True), "create_lycoris has no rsLoRA: it does not hand rs_lora on"),
        ("lycoris", LoraSpec(2, 0.0), "LyCORIS takes an alpha of 0 for the rank, so for a scaling of 1"),
        ("lycoris", LoraSpec(2, 4.0, dora=True, dropout=0.5), "LyCORIS has no dropout with DoRA, as it warns"),
        ("lycoris", LoraSpec(2, -4.0, dora=True), None),
        ("diffusers", LoraSpec(2, 4.0, dropout=0.5, rslora=True, dora=True, lora_bias=True), None),
    ],
)
def test_it_says_which_specs_it_does_not_do(name: str, spec: LoraSpec, reason: str | None) -> None:
    assert subject_here(name).supports(spec) == reason


@pytest.mark.parametrize("name", ["lora-pytorch", "lycoris", "lycoris-bypass"])
def test_a_grouped_convolution_is_not_offered(name: str) -> None:
    with pytest.raises(NotImplementedError, match="the groups of the convolution"):
        subject_here(name).wrap(nn.Conv2d(4, 4, 1, groups=2), LoraSpec(2, 2.0))


def test_an_adapter_in_16_bits_is_kept_as_each_library_keeps_it() -> None:
    kept = {"lora-pytorch": torch.bfloat16, "lycoris": torch.float32, "diffusers": torch.bfloat16}
    for name, dtype in kept.items():
        narrow = trial(name, dtype="bf16")
        assert narrow.factors_of(narrow.wrap()).a.dtype == dtype


def test_importing_the_third_parties_prints_nothing() -> None:
    libraries = {name: name.replace("-", "_") for name in ("peft", *LAYERS) if name != "lycoris-bypass"}
    modules = [module for name, module in libraries.items() if missing(name) is None]
    modules += ["torchao"] if missing_base("int4") is None else []
    command = [sys.executable, "-c", f"import {', '.join(f'lora_bench.subjects.{module}' for module in modules)}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)

    assert "peft" in modules
    assert (done.stdout, done.stderr) == ("", "")
