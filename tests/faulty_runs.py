"""Runs in which something goes wrong: what is planted in them, and what their workers say."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lora_bench.bench import isolate, measure
from lora_bench.bench import session as sessions
from lora_bench.bench.isolate import Failure
from lora_bench.bench.records import read
from lora_bench.bench.workload import Row
from tests import faulty_workers
from tests.fake_nvml import install
from tests.faulty_subjects import FAULTY
from tests.planted_subjects import PLANTED
from tests.pytest_runs import SMALL, Run, run
from tests.scripted_workers import MEMORY, timing

if TYPE_CHECKING:
    import pytest

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


def on_a_gpu(failure: Failure, function: str = "", code: int = 0, *, weighing: bool = False) -> Plant:
    """A worker that dies on a GPU with the reference in hand, after which a function of NVML answers with this code."""

    def dies(rows: list[Row], *_: object) -> Iterator[Any]:
        yield HERE | {"soft": {"uuid": "GPU-one"}}
        if not weighing:
            yield timing(rows[0])
        yield failure

    def plant(bench: Bench) -> None:
        install(bench.patch).fault(function, code, 0, -1)
        bench.patch.setattr(torch.cuda, "device_count", lambda: 1)
        bench.options.append("--lora-device=cuda")
        bench.jobs[measure.weigh if weighing else measure.compare] = dies
        bench.phases = "decode or train" if weighing else "decode"

    return plant


def another_writes(bench: Bench) -> None:
    def flock(_descriptor: int, _how: int) -> None:
        raise BlockingIOError

    begun(bench)
    bench.patch.setattr(fcntl, "flock", flock)


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
