"""What can go wrong in a run, row by row: its verdict, what becomes of the others, and the exit code."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from lora_bench.bench import isolate, measure
from lora_bench.bench import session as sessions
from lora_bench.bench.isolate import Failure
from lora_bench.bench.records import SCHEMA, read
from lora_bench.bench.workload import Row
from tests import faulty_workers
from tests.faulty_subjects import FAULTY
from tests.planted_subjects import PLANTED
from tests.pytest_runs import SMALL, Run, run
from tests.scripted_workers import MEMORY, timing

FILES = ("suites/gpu/test_base.py", "suites/gpu/test_separate.py", "suites/gpu/test_training.py")
Job = Callable[..., Iterator[Any]]


class Bench:
    """A run of two subjects in the place of the user's, and what is to go wrong in it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.options = ["--lora-subject=reference"]
        self.phases = "decode"
        self.jobs: dict[Any, Job] = {measure.compare: times, measure.weigh: weighs}
        self.real = isolate.stream
        self.asked = 0
        patch.setattr(sessions, "stream", self.stream)

    def stream(self, function: Any, *arguments: Any, seconds: float) -> Iterator[Any]:
        self.asked += 1
        job = self.jobs[function]
        if job.__module__ == __name__:
            return job(*arguments)
        return self.real(job, *arguments, seconds=seconds)

    def run(self) -> Run:
        small = [option for option in SMALL if option.partition("=")[0] not in " ".join(self.options)]
        output = [f"--lora-output={self.folder}"]
        return run(*FILES, *small, "-k", self.phases, "--benchmark", "--lora-seconds=0.01", *output, *self.options)

    def records(self) -> list[dict[str, Any]]:
        (path,) = self.folder.glob("*.jsonl")
        return read(path)


HERE: dict[str, Any] = {"hard": {"device_name": "here"}, "soft": {}}


def times(rows: list[Row], *_: object) -> Iterator[Any]:
    yield HERE
    yield from map(timing, rows)


def weighs(rows: list[Row], *_: object) -> Iterator[Any]:
    return ((row, MEMORY) for row in rows)


# --- what goes wrong ------------------------------------------------------------------------------------------------

Plant = Callable[[Bench], None]


def subject(name: str, *options: str, where: Path = FAULTY, phases: str = "decode") -> Plant:
    """A subject beside the reference, in a real process that really compares them."""

    def plant(bench: Bench) -> None:
        bench.jobs[measure.compare] = faulty_workers.compare
        bench.options = [f"--lora-subject={where}:{name}", *bench.options, *options]
        bench.phases = phases

    return plant


def out_of_memory(bench: Bench) -> None:
    """The kernel's counter moves whenever it is read."""
    subject("KILLED")(bench)
    bench.patch.setattr(isolate, "oom_kills", itertools.count().__next__)


def base_exits(bench: Bench) -> None:
    bench.jobs[measure.compare] = faulty_workers.compare_without_base


def weighing(kind: str, text: str) -> Plant:
    def weigh(rows: list[Row], *_: object) -> Iterator[Any]:
        yield Failure(kind, text, held=0) if rows[0].subject == "reference" else (rows[0], MEMORY)

    def plant(bench: Bench) -> None:
        bench.jobs[measure.weigh] = weigh
        bench.phases = "decode or train"

    return plant


def full_disk(bench: Bench) -> None:
    """Full as soon as the plan is written."""
    written = itertools.count()

    def fsync(_file: int) -> None:
        if next(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.patch.setattr(os, "fsync", fsync)


def read_only(bench: Bench) -> None:
    def touch(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    bench.patch.setattr(Path, "touch", touch)


def no_room(bench: Bench) -> None:
    bench.patch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=15 << 20))


def taken(bench: Bench) -> None:
    bench.options.append(f"--lora-output={PLANTED}")


def options(*given: str) -> Plant:
    return lambda bench: bench.options.extend(given)


def no_cuda(bench: Bench) -> None:
    bench.patch.setattr(torch.cuda, "device_count", lambda: 0)
    bench.options.append("--lora-device=cuda")


def begun(bench: Bench) -> Path:
    """A run with its latencies alone, to be gone on with."""
    assert bench.run().code == 0
    (path,) = bench.folder.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["quantity"] in ("plan", "latency")))
    bench.options.append(f"--lora-resume={path.stem}")
    bench.asked = 0
    return path


def resumed(line: bytes, *given: str) -> Plant:
    """A run whose second record is this one instead."""

    def plant(bench: Bench) -> None:
        path = begun(bench)
        first, second, *rest = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([first, line or second, *rest]))
        bench.options.extend(given)

    return plant


def cut_off(bench: Bench) -> None:
    path = begun(bench)
    path.write_bytes(path.read_bytes()[:-9])


def elsewhere(bench: Bench) -> None:
    """On another machine, with the reference still to be timed and all to be weighed."""
    path = begun(bench)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join(line for line in lines if b'"quantity": "latency"' not in line or b'"base"' in line[:600])
    )

    def there(*_: object) -> Iterator[Any]:
        yield {"hard": {"device_name": "there"}, "soft": {}}
        raise AssertionError("asked for more")

    bench.jobs = dict.fromkeys(bench.jobs, there)


# --- what comes of it -----------------------------------------------------------------------------------------------


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
        resumed(RECORD), "*.jsonl cannot be gone on with: a latency record lacks or has too much: 'workload'"
    ),
    "a plan without its rows": refused(resumed(PLAN), "*.jsonl cannot be gone on with: 'rows'"),
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
