"""Switching to other adapters: what is served afterwards is what was switched to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from lora_bench import REFERENCE
from lora_bench.bench import switch as switching
from lora_bench.bench.arm import Arm, build_arm, make_step
from lora_bench.bench.clock import wall_clock
from lora_bench.bench.proof import Wrong, prove_switched
from lora_bench.bench.ready import build_base
from lora_bench.bench.workload import BASE, Row, verbs
from lora_bench.subject import Subject
from tests.micro_rows import row

SETUPS = ("separate", "merged", "batched")


def arm_of(subject: Subject, setup: str) -> tuple[Arm, Row]:
    own = row("reference", setup, "switch", adapters=2 if setup == "batched" else 1)
    base = build_base(own.base(), "cpu")
    model = build_base(own.base(), "cpu")
    return build_arm(model, subject, own.workload, pristine=base), own


@pytest.mark.parametrize("setup", SETUPS)
def test_after_a_switch_the_other_adapters_are_served_and_after_two_the_first(setup: str) -> None:
    arm, own = arm_of(REFERENCE, setup)
    first = arm.adapters
    proofs = [prove_switched(arm, own.workload) for _ in range(2)]

    assert all(proof.error_ratio <= 1 < proof.visibility for proof in proofs)
    assert arm.switch is not None
    assert arm.switch.served is first


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("setup", "broken"),
    [
        ("separate", {"load": nothing}),
        ("merged", {"merge": nothing}),
        ("merged", {"unmerge": nothing}),
        ("batched", {"pool": lambda layer, adapters: layer.first_pool}),
    ],
)
def test_a_switch_that_does_not_switch_is_wrong(setup: str, broken: dict[str, Any]) -> None:
    arm, own = arm_of(REFERENCE, setup)
    assert arm.switch is not None
    for name, layer in arm.switch.layers.items():
        layer.first_pool = getattr(arm.model.get_submodule(name), "pool", None)
    arm.switch.subject = replace(REFERENCE, **broken)

    with pytest.raises((Wrong, RuntimeError)):
        prove_switched(arm, own.workload)


def test_the_step_is_the_switch_and_its_control_a_token_of_the_base() -> None:
    arm, own = arm_of(REFERENCE, "separate")
    assert arm.switch is not None
    before = arm.switch.served
    make_step(arm, own.workload).run()

    assert arm.switch.other is before
    assert (own.base().subject, own.base().workload.phase) == (BASE, "decode")
    assert own.arm != row("reference", "separate", "decode").arm
    assert own.workload.tokens == 0


PARTS = {"separate": ["load"], "merged": ["unmerge", "load", "merge"], "batched": ["pool"]}


@pytest.mark.parametrize("setup", SETUPS)
def test_each_part_is_timed_apart_over_all_layers_and_within_the_total(
    setup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, own = arm_of(REFERENCE, setup)
    assert arm.switch is not None
    now, calls = [0], []
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def verb(name: str, seconds: int) -> Any:
        def noted(*_: Any) -> Any:
            calls.append(name)
            now[0] += seconds * 1_000_000_000
            return getattr(REFERENCE, name)(*_)

        return noted

    took = {"unmerge": 1, "load": 2, "merge": 4, "pool": 8}
    arm.switch.subject = replace(REFERENCE, **{name: verb(name, seconds) for name, seconds in took.items()})
    step = make_step(arm, own.workload)
    totals = [wall_clock(step.run) for _ in range(3)]
    layers = len(arm.layers)

    assert calls == [name for _ in range(3) for name in PARTS[setup] for _ in range(layers)]
    found = step.parts(2)
    assert list(found) == list(switching.PARTS[setup])
    told = dict(zip(("evict", "load", "merge"), ("unmerge", "load", "merge"), strict=True)) | {"pool": "pool"}
    for name, seconds in found.items():
        dropped = setup == "batched" and name == "evict"
        assert seconds == [0.0 if dropped else took[told[name]] * layers] * 2
    assert [sum(each) for each in zip(*found.values(), strict=True)] == totals[-2:]
    with pytest.raises(ValueError, match=r"^3 switches are kept, asked for 4$"):
        step.parts(4)


def test_the_pool_before_is_let_go_of_before_the_next_is_made() -> None:
    arm, own = arm_of(REFERENCE, "batched")
    assert arm.switch is not None
    seen: list[Any] = []

    def pool(layer: Any, adapters: Any) -> Any:
        seen.append([getattr(arm.model.get_submodule(name), "pool", 0) for name in arm.layers])
        return REFERENCE.pool(layer, adapters)  # type: ignore[misc]  # it offers one

    arm.switch.subject = replace(REFERENCE, pool=pool)
    make_step(arm, own.workload).run()

    assert seen[0] == [None] * len(arm.layers)


def test_a_merged_model_switches_by_merging_in_place() -> None:
    assert verbs(row("reference", "merged", "switch").workload) == (("merge", "unmerge"),)
    assert verbs(row("reference", "merged", "decode").workload) == (("merge_and_unload",), ("merge",))
