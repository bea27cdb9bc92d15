"""Launches told apart from the device's own time, on a GPU that is made of two clocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

from lora_bench.bench import launches, measure, turns
from lora_bench.bench.arm import Step, make_step
from lora_bench.bench.clock import event_clock
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.launches import graph_seconds, look
from lora_bench.bench.nvml import GpuLost, Unavailable
from lora_bench.bench.ready import build, build_base
from lora_bench.bench.sampling import LEAST_ROUNDS
from lora_bench.bench.turns import Launches, Timing
from lora_bench.bench.workload import Row
from tests.fake_cuda import KERNEL, LAUNCH, FakeCuda
from tests.micro_rows import row, with_bases

KERNELS = 10
DECODE, PREFILL = row("one", "separate", "decode"), row("one", "separate", "prefill")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def waits() -> None:
    torch.cuda.synchronize("cpu")


def step_of(gpu: FakeCuda, before: Callable[[], object] = lambda: None, give: Any = None) -> Step:
    """A step of ten kernels, each of which the host takes longer to launch than the device to run."""
    output = torch.zeros(3)

    def run() -> object:
        before()
        for number in range(KERNELS):
            gpu.launch(partial(output.fill_, number + 1.0))
        return output if give is None else give

    return Step(run, prepare=lambda: gpu.log.append("prepare"), reads=lambda: gpu.log.append("keep"))


def looked(gpu: FakeCuda, *rows: Row) -> dict[Row, dict[str, Any]]:
    steps = {of: step_of(gpu) for of in rows}
    hot = {of: [event_clock(step.run, "cpu") for _ in range(3)] for of, step in steps.items()}
    return dict(look(steps, hot, "cpu", budget_seconds=0.0, holding=lambda of: gpu.log.append(f"hold {of}")))


def test_a_replay_needs_one_launch_and_a_full_queue_none(gpu: FakeCuda) -> None:
    found = looked(gpu, DECODE, PREFILL)
    wall, replayed, queued = KERNELS * LAUNCH + KERNEL, LAUNCH + KERNELS * KERNEL, KERNELS * KERNEL

    assert found[DECODE]["graph_seconds"] == pytest.approx([replayed] * launches.ROUNDS)
    assert found[DECODE]["device_seconds"] == found[DECODE]["graph_seconds"]
    assert found[DECODE]["launch_share"] == pytest.approx(1 - replayed / wall)
    assert found[PREFILL]["graph_seconds"] == "unavailable (only decoding is captured)"
    assert found[PREFILL]["device_seconds"] == pytest.approx([queued] * launches.ROUNDS)
    assert found[PREFILL]["launch_share"] == pytest.approx(1 - queued / wall)
    assert gpu.log.count("replay") == launches.ROUNDS + 1


def test_a_step_that_keeps_the_device_busy_waits_for_no_launch(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_cuda.LAUNCH", KERNEL / 10)

    assert looked(gpu, PREFILL)[PREFILL]["launch_share"] == pytest.approx(0, abs=0.02)


def test_before_each_cold_sample_more_than_the_cache_is_written(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    written, empty = [], torch.empty

    def buffer(size: int, **place: Any) -> Any:
        return SimpleNamespace(zero_=lambda: written.append(size), nbytes=empty(size, **place).nbytes)

    monkeypatch.setattr(torch, "empty", buffer)
    found = looked(gpu, DECODE, PREFILL)

    assert len(written) >= 2 * (LEAST_ROUNDS + 2)
    assert set(written) == {2000}
    for each in found.values():
        assert len(each["cold_seconds"]) == LEAST_ROUNDS
        assert all(0 < seconds < math.inf for seconds in each["cold_seconds"])


def test_where_there_is_no_room_for_that_cold_samples_are_unavailable_and_the_rest_is_not(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    found = looked(gpu, DECODE)[DECODE]

    assert found["cold_seconds"] == "unavailable (there is no room for the 2,000 bytes that empty the L2 cache)"
    assert len(found["graph_seconds"]) == launches.ROUNDS


def test_what_a_replay_reads_is_kept_from_before_the_capture(gpu: FakeCuda) -> None:
    graph_seconds(step_of(gpu), "cpu")

    assert gpu.log[: launches.WARM_UP + 3] == ["prepare"] * (launches.WARM_UP + 1) + ["keep", "capture"]


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (
            {"before": waits},
            "it cannot be captured: RuntimeError: CUDA error: operation not permitted",
        ),
        (
            {"give": "words"},
            "it cannot be captured: TypeError: a step is compared by the tensor that it gives, and this",
        ),
        ({"give": torch.ones(3)}, "a replay does not compute what the step does"),
        ({"give": torch.full((3,), torch.nan)}, "a replay does not compute what the step does"),
    ],
    ids=["waits", "gives none", "gives another", "gives no number"],
)
def test_what_cannot_be_captured_is_unavailable_and_its_share_is_the_queue_s(
    gpu: FakeCuda, plant: dict[str, Any], reason: str
) -> None:
    steps = {DECODE: step_of(gpu, **plant)}
    ((_, found),) = look(steps, {DECODE: [1.0]}, "cpu", budget_seconds=0.0, holding=lambda _: None)

    assert found["graph_seconds"].startswith(f"unavailable ({reason}")
    assert "\n" not in found["graph_seconds"]
    assert len(found["device_seconds"]) == launches.ROUNDS
    assert 0 < found["launch_share"] < 1


def test_a_step_that_waits_for_the_device_is_refused_before_it_is_captured(gpu: FakeCuda) -> None:
    found = graph_seconds(step_of(gpu, before=gpu.read), "cpu")

    assert found == Unavailable("it cannot be captured: RuntimeError: called a synchronizing CUDA operation")
    assert "capture" not in gpu.log
    assert gpu.log[-1] == "empty cache"
    assert not gpu.refuses


def test_after_a_capture_nothing_is_refused_and_torch_tells_again_whether_it_captures(gpu: FakeCuda) -> None:
    graph_seconds(step_of(gpu), "cpu")
    gpu.tape = []

    assert torch.cuda.is_current_stream_capturing()
    assert not gpu.refuses


def test_a_step_that_asks_is_told_that_nothing_is_captured(gpu: FakeCuda) -> None:
    told: list[tuple[bool, bool]] = []
    graph_seconds(
        step_of(gpu, lambda: told.append((gpu.tape is None, torch.cuda.is_current_stream_capturing()))), "cpu"
    )

    assert told == [(True, False)] * launches.WARM_UP + [(False, False)]


def test_a_replay_that_computes_nothing_is_found_out(gpu: FakeCuda) -> None:
    gpu.forgets = True

    assert graph_seconds(step_of(gpu), "cpu") == Unavailable("a replay does not compute what the step does")


def test_a_gpu_that_is_lost_meanwhile_is_no_reason(gpu: FakeCuda) -> None:
    def lost() -> None:
        raise GpuLost("GPU-0", "nvmlInit", "GPU is lost")

    with pytest.raises(GpuLost):
        graph_seconds(step_of(gpu, before=lost), "cpu")


def test_a_decoding_step_tells_which_cache_it_reads() -> None:
    own = row("reference", "separate", "decode")
    base = build_base(own.base(), "cpu")
    _, arm = build(base, own)
    step = make_step(arm, own.workload)
    step.prepare()
    before: Any = step.reads()
    step.run()
    after: Any = step.reads()

    assert [keys.shape[-2] for keys, _ in before] == [own.workload.sequence] * 2
    assert [keys.shape[-2] for keys, _ in after] == [own.workload.sequence + 1] * 2


def test_on_a_gpu_every_timed_row_is_looked_at_after_all_are_timed_and_on_a_cpu_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "measure_ceilings", lambda *_: Ceilings(1.0, 1.0))
    rows = with_bases(row("reference", "separate", "decode"), row("reference", "separate", "prefill"))
    assert not [each for each in measure.compare(rows, "cpu", 0.0) if isinstance(each, Launches)]

    steps = {of: Step(lambda: None) for of in rows}
    monkeypatch.setattr(turns, "clock_of", lambda _: lambda run: run() or 1.0)
    monkeypatch.setattr(turns, "Window", FakeWindow)
    monkeypatch.setattr(launches, "look", lambda steps, hot, *_, **__: ((of, {"of": len(hot[of])}) for of in steps))
    messages = list(turns.timed(steps, dict.fromkeys(rows), "cuda", 0.0, lambda _: None))

    kinds = [type(each) for each in messages if not isinstance(each, turns.Progress)]
    assert kinds == [Timing] * 4 + [Launches] * 4
    assert [each.row for each in messages if isinstance(each, Launches)] == rows


class FakeWindow:
    def __init__(self, _device: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def as_dict(self) -> dict[str, Any]:
        return {}
