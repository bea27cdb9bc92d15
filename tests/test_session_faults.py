"""What can go wrong in a run, row by row: its verdict, what becomes of the others, and the exit code."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pynvml
import pytest

from lora_bench.bench.isolate import Failure
from lora_bench.bench.records import SCHEMA
from tests.faulty_runs import (
    Bench,
    Plant,
    another_writes,
    base_exits,
    cut_off,
    elsewhere,
    full_disk,
    no_cuda,
    no_room,
    on_a_gpu,
    options,
    out_of_memory,
    read_only,
    resumed,
    subject,
    taken,
    weighing,
)
from tests.planted_subjects import PLANTED
from tests.pytest_runs import Run


class Fault(NamedTuple):
    """Verdicts by subject ("measured", or kind and text of the failure), the exit code, and a line that is printed."""

    plant: Plant
    verdicts: dict[str, str]
    code: int
    says: str = "records: *.jsonl"


def costs(name: str, verdict: str, plant: Plant | None = None) -> Fault:
    """A fault that costs its own row, and no other."""
    verdicts = {"base": "measured", name: verdict, "reference": "measured"}
    return Fault(plant or subject(name), verdicts, 1)


def costs_all(plant: Plant, verdict: str, code: int, *names: str) -> Fault:
    return Fault(plant, dict.fromkeys(["base", *names, "reference"], verdict), code)


def refused(plant: Plant, says: str) -> Fault:
    """A run that is none: nothing is measured."""
    return Fault(plant, {}, 4, f"ERROR: {says}")


ALL = {"base": "measured", "reference": "measured"}
GONE = "gpu_lost: GpuLost: GPU is lost: device GPU-0, in nvmlDeviceGetUtilizationRates"
LAUNCH = Failure("error", "AcceleratorError: CUDA error: unspecified launch failure", held=1)
CRASH = Failure("crashed", "the worker was killed by SIGSEGV", held=1)
HANG = Failure("timeout", "nothing came for 600 s", held=1)
ANSWER, HANDLE = "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetHandleByUUID"
RECORD = f'{{"schema": {SCHEMA}, "quantity": "latency", "subject": "base"}}\n'.encode()
PLAN = f'{{"schema": {SCHEMA}, "quantity": "plan"}}\n'.encode()
FAULTS = {
    "out of host memory in wrap": costs("MEMORY", "oom: MemoryError: no host memory"),
    "out of device memory in wrap": costs("CUDA_MEMORY", "oom: OutOfMemoryError: CUDA out of memory"),
    "torch out of host memory": costs("CPU_MEMORY", "oom: RuntimeError: *DefaultCPUAllocator: *"),
    "out of memory in the first step": costs("STEP_MEMORY", "oom: OutOfMemoryError: CUDA out of memory"),
    "out of host memory in a timed step": costs("TIMED_MEMORY", "oom: MemoryError: no host memory"),
    "out of device memory in a timed step": costs("TIMED_CUDA_MEMORY", "oom: OutOfMemoryError: CUDA out of memory"),
    "killed": costs("KILLED", "crashed: the worker was killed by SIGKILL (out of memory?)"),
    "killed for memory": costs("KILLED", "oom: the worker was killed by SIGKILL (out of memory?)", out_of_memory),
    "exit in wrap": costs("EXITS", "crashed: the worker exited with 3 before its result"),
    "leaves in a step": costs("LEAVES", "crashed: the worker exited with 0 before its result"),
    "segfault": costs("SEGFAULTS", "crashed: the worker was killed by SIGSEGV"),
    "hangs in wrap": costs("HANGS", "timeout: nothing came for 1.5 s", subject("HANGS", "--lora-timeout=1.5")),
    "hangs in a step": costs(
        "STEP_HANGS", "timeout: nothing came for 1.5 s", subject("STEP_HANGS", "--lora-timeout=1.5")
    ),
    "is not LoRA": costs(
        "DROPPED", "Wrong: model.layers.0.self_attn.q_proj: found *", subject("DROPPED", where=PLANTED)
    ),
    "raises": costs("RAISES", "error: RuntimeError: no kernel for this machine", subject("RAISES", where=PLANTED)),
    "a clock that stands still": costs(
        "CLOCKLESS", "error: ValueError: a step takes more than 0 s and ends, got -* s by its clock"
    ),
    "GPU lost in wrap": costs_all(subject("LOSES"), GONE, 7, "LOSES"),
    "GPU lost in a timed step": costs_all(subject("STEP_LOSES"), GONE, 7, "STEP_LOSES"),
    "GPU lost after a comparison": Fault(
        subject("LAST_LOSES", phases="decode or train"),
        dict.fromkeys(["base", "LAST_LOSES", "reference"], "measured")
        | dict.fromkeys(["base train", "LAST_LOSES train", "reference train"], GONE),
        7,
    ),
    "GPU lost while weighing": Fault(
        weighing("gpu_lost", "GpuLost: fell off"),
        ALL | dict.fromkeys(["base train", "reference train"], "gpu_lost: GpuLost: fell off"),
        7,
    ),
    "a CUDA error that says so": costs_all(
        subject("NO_DEVICE"), "gpu_lost: RuntimeError: CUDA error: no CUDA-capable device is detected", 7, "NO_DEVICE"
    ),
    "broken memory in a timed step": costs_all(
        subject("STEP_ECC"),
        "gpu_lost: AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        7,
        "STEP_ECC",
    ),
    "a launch failure on a GPU that is lost": Fault(
        on_a_gpu(LAUNCH, ANSWER, pynvml.NVML_ERROR_GPU_IS_LOST),
        {
            "base": "measured",
            "reference": f"gpu_lost: *: device GPU-one, in nvmlDeviceGetMemoryInfo (the worker: error: {LAUNCH.text})",
        },
        7,
    ),
    "a crash on a GPU that needs a reset": Fault(
        on_a_gpu(CRASH, ANSWER, pynvml.NVML_ERROR_RESET_REQUIRED),
        {"base": "measured", "reference": f"gpu_lost: *(the worker: crashed: {CRASH.text})"},
        7,
    ),
    "a hang on a GPU that is there no more": Fault(
        on_a_gpu(HANG, HANDLE, pynvml.NVML_ERROR_NOT_FOUND),
        {"base": "measured", "reference": f"gpu_lost: *: device GPU-one (the worker: timeout: {HANG.text})"},
        7,
    ),
    "a launch failure on a GPU that answers": Fault(
        on_a_gpu(LAUNCH), {"base": "measured", "reference": f"error: {LAUNCH.text}"}, 1
    ),
    "a crash on a GPU of which NVML tells nothing": Fault(
        on_a_gpu(CRASH, "nvmlInitWithFlags", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        {"base": "measured", "reference": f"crashed: {CRASH.text}"},
        1,
    ),
    "a crash while weighing on a GPU that is lost": Fault(
        on_a_gpu(CRASH._replace(held=0), ANSWER, pynvml.NVML_ERROR_GPU_IS_LOST, weighing=True),
        ALL | dict.fromkeys(["base train", "reference train"], f"gpu_lost: *(the worker: crashed: {CRASH.text})"),
        7,
    ),
    "killed while weighing": Fault(
        weighing("crashed", "SIGKILL"), ALL | {f"{name} train": "measured" for name in ALL}, 0
    ),
    "the base exits": costs_all(base_exits, "crashed: the worker exited with 3 before its result", 1),
    "full disk": Fault(full_disk, ALL, 1, "they are not whole: *.jsonl: No space left on device"),
    "read-only folder": refused(read_only, "*--lora-output* got */out: Read-only file system"),
    "a file in the folder's place": refused(taken, "*--lora-output* got *planted_subjects.py: File exists"),
    "too little room": refused(no_room, "--lora-output: wanted 16 MiB of room, got 15 in */out"),
    "a bad line": refused(resumed(b"{]\n"), "*.jsonl, line 2, is no record: '{]'"),
    "another schema": refused(
        resumed(b'{"schema": 1, "quantity": "plan"}\n'), f"*.jsonl, line 2, is of schema 1, wanted {SCHEMA}"
    ),
    "a record without its fields": refused(
        resumed(RECORD), "*.jsonl cannot be gone on with: a latency record lacks or has too much: 'samples_seconds'"
    ),
    "a plan without its rows": refused(
        resumed(PLAN), "*.jsonl cannot be gone on with: a plan record lacks or has too much: 'rows'"
    ),
    "a run that another process writes": refused(another_writes, "the run * is being written by another process"),
    "no such run": refused(options("--lora-resume=absent"), "there is no run */absent.jsonl"),
    "resumed with other options": refused(
        resumed(b"", "--lora-rank=8"),
        "the run * had planned separate[[]reference-decode-*-r4-*: it goes on with the same *",
    ),
    "resumed elsewhere": Fault(
        elsewhere,
        {"base": "measured", "reference": "not_comparable: the run began with device_name here, and here it is there"},
        6,
    ),
    "a line cut off": Fault(cut_off, ALL, 0),
    "no CUDA": refused(no_cuda, "--lora-device cuda: torch * sees 0 CUDA devices"),
    "xdist": refused(options("-n", "2"), "--benchmark cannot measure under xdist: *"),
}


def verdicts(found: Run) -> dict[str, str]:
    """What became of each row, by its subject's name and, if it is not decoding, its phase."""
    told = {}
    for name, report in found.reports.items():
        test, _, place = name.partition("[")
        who = "base" if test == "test_base" else place.partition("-")[0]
        failure = str(report.longrepr).partition("\n  ")[2]
        told[who + " train" * ("train-" in place)] = "measured" if report.outcome == "passed" else failure
    return told


XDIST = pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed: pip install .[dev]")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=name, marks=[XDIST] if name == "xdist" else []) for name, fault in FAULTS.items()],
)
def test_a_fault_has_its_verdict_and_its_exit_code(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "out", monkeypatch)
    fault.plant(bench)
    before = [path.read_bytes() for path in bench.folder.glob("*.jsonl")]
    found = bench.run()

    assert found.code == fault.code, found.text
    assert any(fnmatchcase(line, fault.says) for line in found.text.splitlines()), found.text
    told = verdicts(found)
    assert told.keys() == fault.verdicts.keys()
    for name, verdict in fault.verdicts.items():
        assert fnmatchcase(told[name], verdict), name
    assert "INTERNALERROR" not in found.text
    if fault.code == pytest.ExitCode.USAGE_ERROR:
        assert not bench.asked
        assert [path.read_bytes() for path in bench.folder.glob("*.jsonl")] == before
        return
    kept = [each["subject"].rpartition(":")[2] for each in bench.records() if each["quantity"] == "latency"]
    unwritten = fault.plant is full_disk
    measured = [name.partition(" ")[0] for name, verdict in told.items() if verdict == "measured"]
    assert sorted(kept) == ([] if unwritten else sorted(measured))
    if fault.plant is elsewhere:
        assert [path.read_bytes() for path in bench.folder.glob("*.jsonl")] == before


def test_there_are_many() -> None:
    assert len(FAULTS) >= 20
