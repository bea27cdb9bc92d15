"""The budget against what is measured: parameters, saved tensors and the allocator's own peak, to the byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lora_bench.bench import memory
from lora_bench.bench.activations import Term
from lora_bench.bench.arm import Arm, Step, build_arm, make_step, torch_dtype
from lora_bench.bench.budget import BLOCK, CHUNK, ITEMSIZES, NESTED_BLOCK, Budget, budget, terms
from lora_bench.bench.workload import TARGETS, Workload
from lora_bench.case import DTYPES
from lora_bench.models.build import build
from lora_bench.models.inject import adapt
from lora_bench.models.shapes import shapes
from lora_bench.reference import REFERENCE, four_bit, nf4
from lora_bench.spec import LoraSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

SETUPS = {"lora": "separate", "rslora": "separate", "qlora": "four_bit", "full": "base"}
SMALL: dict[str, Any] = {"model": "tiny", "mode": "lora", "rank": 4, "batch": 2, "sequence": 8, "dtype": "fp32"}


def prepared(choices: Mapping[str, Any]) -> tuple[Arm, Step]:
    """The arm and the step that a budget is for, made by the suite itself."""
    fields: dict[str, Any] = {"phase": "train", "adapters": 1} | dict(choices)
    mode, targets = fields.pop("mode"), fields.pop("targets", None)
    setup = SETUPS[mode] if fields["adapters"] == 1 else "batched"
    fields["rank"] = 0 if mode == "full" else fields["rank"]
    workload = Workload(setup, **fields)
    model = build(workload.model, dtype=torch_dtype(workload.dtype), device="cpu")
    if mode == "rslora" or targets:
        spec = LoraSpec(workload.rank, alpha=8.0, rslora=mode == "rslora")
        adapt(model, REFERENCE, spec, targets or TARGETS)
        arm = Arm(setup, model)
    else:
        arm = build_arm(model, None if setup == "base" else REFERENCE, workload)
    return arm, make_step(arm, workload)


def allocated_peak(step: Step) -> int:
    """The most bytes that torch's CPU allocator gave out at once in a step, beyond what was there before."""
    step.run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step.run()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        level += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, level)
    return peak


def weighed(choices: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that stand, and bytes that a step saves for backward, as measured."""
    arm, step = prepared(choices)
    return memory.parameter_bytes(arm.model), memory.saved_tensor_bytes(arm, step)


def worked_out(choices: Mapping[str, Any]) -> tuple[int, int]:
    """The same two by the budget."""
    found = budget(**choices)
    return standing(found), found.activations


def standing(found: Budget) -> int:
    return found.weights + found.quantisation_constants + found.adapters


@pytest.mark.parametrize(("rank", "batch", "sequence"), [(4, 1, 24), (32, 3, 8)])
@pytest.mark.parametrize("mode", ["full", "lora", "rslora", "qlora"])
def test_parameters_and_saved_tensors_are_as_measured(mode: str, rank: int, batch: int, sequence: int) -> None:
    choices = SMALL | {"mode": mode, "rank": rank, "batch": batch, "sequence": sequence}
    assert weighed(choices) == worked_out(choices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_so_are_they_in_every_dtype_where_heads_share_keys(mode: str, dtype: str) -> None:
    choices = SMALL | {"model": "micro", "mode": mode, "dtype": dtype}
    assert weighed(choices) == worked_out(choices)


@pytest.mark.parametrize(
    "targets",
    [
        *((name,) for name in TARGETS),
        ("q_proj", "v_proj"),
        ("gate_proj", "up_proj", "down_proj"),
        ("o_proj", "down_proj"),
    ],
    ids=",".join,
)
def test_fewer_targets_save_less_and_the_first_layer_less_still(targets: tuple[str, ...]) -> None:
    choices = SMALL | {"model": "micro", "targets": targets}
    assert weighed(choices) == worked_out(choices)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "full"},
        {"mode": "lora"},
        {"mode": "qlora", "sequence": 64},
    ],
    ids=str,
)
def test_the_peak_of_a_training_step_is_the_allocator_s(change: dict[str, Any]) -> None:
    choices = SMALL | {"sequence": 24} | change
    found = budget(**choices)

    # Token ids and labels are there before the step, and the loss itself is not counted.
    assert allocated_peak(prepared(choices)[1]) == pytest.approx(
        found.peak - standing(found) - found.optimiser, rel=1e-3
    )


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "full"},
        {},
        {"mode": "qlora"},
        {"adapters": 3, "rank": 16},
        {"model": "micro"},
    ],
    ids=str,
)
def test_so_is_that_of_a_prefill(change: dict[str, Any]) -> None:
    choices = SMALL | {"phase": "prefill", "batch": 3, "sequence": 16} | change
    found = budget(**choices)
    arm, step = prepared(choices)

    with arm.routed():
        peak = allocated_peak(step)
    assert memory.parameter_bytes(arm.model) == standing(found)
    assert peak == pytest.approx(found.activations + found.kv_cache, abs=64)


def test_checkpointing_saves_the_inputs_of_the_layers_alone() -> None:
    choices = SMALL | {"batch": 4, "sequence": 32}
    found, whole = budget(**choices, checkpointing=True), budget(**choices)
    arm, step = prepared(choices)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second is the older
    next(getattr(arm.model, name) for name in names if hasattr(arm.model, name))({"use_reentrant": False})

    assert found.activations < whole.activations / 2
    assert allocated_peak(step) == pytest.approx(
        found.peak - standing(found) - found.optimiser,
        abs=8 * torch.get_rng_state().nbytes,  # each layer's random state is kept with its input
    )


def test_the_optimiser_s_state_is_as_torch_keeps_it() -> None:
    choices = SMALL | {"model": "micro"}
    arm, _ = prepared(choices)
    trained = [p for p in arm.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    state = [value for own in optimiser.state.values() for value in own.values()]

    assert sum(tensor.nbytes for tensor in state) == budget(**choices).optimiser


def test_a_cache_holds_what_was_read() -> None:
    place = SMALL | {"model": "micro", "sequence": 40}
    width = 2 * 16  # two key-value heads

    assert budget(**place, phase="prefill").kv_cache == 2 * 2 * (2 * 40) * width * 4
    assert budget(**place, phase="decode").kv_cache == 2 * 2 * (2 * 41) * width * 4


def test_to_decode_the_cache_is_copied_or_the_head_is_read() -> None:
    long = {term.name for term in terms(**SMALL | {"phase": "decode", "sequence": 512})["activations"]}
    short = {term.name for term in terms(**SMALL | {"phase": "decode", "mode": "full"})["activations"]}

    assert "keys before this token" in long
    assert "silu(gate), up and what follows" in short


def test_the_constants_are_the_reference_s() -> None:
    assert (BLOCK, NESTED_BLOCK, CHUNK) == (nf4.BLOCK, nf4.NESTED_BLOCK, four_bit.CHUNK)
    assert {name: torch_dtype(name).itemsize for name in DTYPES} == ITEMSIZES


def test_the_published_bits_per_parameter_of_double_quantisation() -> None:
    found = budget(**SMALL | {"model": "llama-3-8b", "mode": "qlora"})
    linears = sum(d_in * d_out for d_in, d_out in shapes("llama-3-8b").linears.values()) * 32

    # Dettmers et al. 2023, section 3: 0.127 bits a parameter for the constants of double quantisation.
    assert 8 * found.quantisation_constants / linears == pytest.approx(0.127, abs=5e-4)


def test_a_gpu_takes_all_roots_and_a_whole_weight_at_once() -> None:
    cpu, cuda = (budget(**SMALL | {"mode": "full", "device": device}) for device in ("cpu", "cuda"))
    parameters = shapes("tiny").parameters

    assert cpu.gradients == 4 * (parameters + 2 * 4096 * 512)
    assert cuda.gradients == 4 * 2 * parameters
    assert cuda.optimiser == 4 * 2 * parameters  # the counts of its steps lie on the CPU
    reads = [budget(**SMALL | {"mode": "qlora", "phase": "decode", "device": device}) for device in ("cpu", "cuda")]
    assert reads[1].activations - reads[0].activations == 6 * (512 * 1408 - CHUNK)


def test_totals() -> None:
    found = Budget(1, 2, 4, gradients=8, optimiser=16, activations=32, kv_cache=64, workspace=128, context=256)

    assert found.total == 511
    assert found.peak == 511 - 8
    assert found._replace(gradients=1000).peak == 511 - 8 + 1000 - 160
    assert budget(**SMALL, context=7).context == 7


def test_a_term_says_how_it_is_counted() -> None:
    term = Term("codes", {"layers": 3, "weights": 1001, "bytes": 0.5})

    assert term.bytes == 1502
    assert term.formula == "3 layers × 1,001 weights × 0.5 bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tinny"}, "no model is called 'tinny' .nearest: tiny."),
        ({"mode": "dora"}, "mode must be one of lora, rslora, qlora, full, got 'dora'"),
        ({"phase": "generate"}, "phase must be one of train, prefill, decode, got 'generate'"),
        ({"dtype": "int8"}, "dtype must be one of fp64, fp32, bf16, fp16, got 'int8'"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"sequence": 1}, "sequence must be at least 2, got 1"),
        ({"adapters": 0}, "adapters must be at least 1, got 0"),
        ({"adapters": 2}, "one adapter is trained at a time, got adapters=2"),
        ({"adapters": 2, "mode": "full", "phase": "decode"}, "full has no adapters, got adapters=2"),
        ({"mode": "full", "targets": ("q_proj",)}, "full trains everything and has no targets, got q_proj"),
        ({"targets": ("lm_head",)}, "a target is one of .*, got 'lm_head'"),
        ({"checkpointing": True, "phase": "prefill"}, "checkpointing is for training, and the phase is prefill"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        budget(**SMALL | change)


# --- single layers --------------------------------------------------------------------------------------------------

LAYER: dict[str, Any] = SMALL | {"model": "linear-384x512", "batch": 3, "sequence": 16}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_single_layer_s_tensors_are_as_measured(mode: str, dtype: str) -> None:
    choices = LAYER | {"mode": mode, "dtype": dtype}
    assert weighed(choices) == worked_out(choices)


@pytest.mark.parametrize(
    "change", [{"mode": "full"}, {}, {"phase": "decode"}, {"mode": "qlora"}, {"adapters": 3, "rank": 16}], ids=str
)
def test_so_is_the_peak_around_a_single_layer(change: dict[str, Any]) -> None:
    choices = LAYER | {"phase": "prefill"} | change
    found = budget(**choices)
    arm, step = prepared(choices)
    read = choices["batch"] * (1 if choices["phase"] == "decode" else choices["sequence"])

    with arm.routed():
        peak = allocated_peak(step)
    assert memory.parameter_bytes(arm.model) == standing(found)
    assert peak == pytest.approx(found.activations - read * 384 * 4, rel=1e-3)  # x is there before the step
    assert not found.kv_cache


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_so_is_the_peak_of_training_a_single_layer(mode: str) -> None:
    choices = LAYER | {"mode": mode}
    found = budget(**choices)

    before = standing(found) + found.optimiser + 3 * 16 * (384 + 512) * 4  # x and dL/dy are there before the step
    assert allocated_peak(prepared(choices)[1]) == pytest.approx(found.peak - before, rel=5e-3)


def test_a_single_layer_has_no_checkpoints() -> None:
    with pytest.raises(ValueError, match=r"^checkpointing is for decoder layers, and linear-384x512 has none$"):
        budget(**LAYER, checkpointing=True)
