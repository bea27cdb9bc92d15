"""Functions in processes of their own: what they yield arrives, and what kills them is told."""

import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from itertools import count, starmap
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_bench.bench import isolate
from lora_bench.bench.isolate import Failure, failure_kind, hold, oom_kills, stream
from lora_bench.bench.nvml import GpuLost


def test_values_arrive_as_they_come() -> None:
    assert list(stream(map, math.sqrt, [4.0, 9.0])) == [2.0, 3.0]


def test_an_exception_is_reported_with_its_type_and_text_after_what_came_before() -> None:
    first, failure = stream(map, operator.inv, [1, "two"])

    assert first == -2
    assert isinstance(failure, Failure)
    assert failure.kind == "error"
    assert failure.text == "TypeError: bad operand type for unary ~: 'str'"
    assert "Traceback" in failure.detail


def test_running_out_of_memory_is_named() -> None:
    (failure,) = stream(map, bytearray, [2**62])

    assert (failure.kind, failure.text) == ("oom", "MemoryError: ")


def test_an_exit_is_a_crash() -> None:
    (failure,) = stream(map, os._exit, [3])

    assert (failure.kind, failure.text) == ("crashed", "the worker exited with 3 before its result")


def test_a_signal_is_named() -> None:
    first, failure = stream(starmap, operator.call, [(os.getppid,), (signal.raise_signal, signal.SIGKILL)])

    assert first != os.getpid()
    assert (failure.kind, failure.text) == ("crashed", "the worker was killed by SIGKILL (out of memory?)")


def test_a_kill_that_the_kernel_counted_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "oom_kills", count().__next__)
    (killed,) = stream(map, signal.raise_signal, [signal.SIGKILL])
    (terminated,) = stream(map, signal.raise_signal, [signal.SIGTERM])

    assert (killed.kind, killed.text) == ("oom", "the worker was killed by SIGKILL (out of memory?)")
    assert (terminated.kind, terminated.text) == ("crashed", "the worker was killed by SIGTERM")


def test_a_worker_killed_in_the_middle_of_a_message_is_a_crash() -> None:
    # The second value is larger than a pipe, so that it is being sent until somebody listens.
    values = stream(starmap, operator.call, [(os.getpid,), (bytes, 1 << 24)])
    pid = next(values)
    wait_until_asleep(pid)
    os.kill(pid, signal.SIGKILL)

    (failure,) = values
    assert failure.kind == "crashed"


def wait_until_asleep(pid: int) -> None:
    """Until it waits for the pipe to be read: it has nothing else to wait for."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)


# --- hold -----------------------------------------------------------------------------------------------------------


def holds(last: str, pause: float = 0.0) -> Iterator[int]:
    """Take 4, then 2 in hand, and end so."""
    yield -1
    hold(4)
    yield 4
    for _ in range(4):
        time.sleep(pause)
        hold(2)
    if last == "raise":
        raise MemoryError("full")
    if last == "exit":
        os._exit(3)
    if last == "hang":
        signal.pause()


@pytest.mark.parametrize(("last", "kind"), [("raise", "oom"), ("exit", "crashed"), ("hang", "timeout")])
def test_what_a_worker_had_in_hand_is_told_with_its_failure(last: str, kind: str) -> None:
    *values, failure = stream(holds, last, seconds=0.5)

    assert values == [-1, 4]
    assert (failure.kind, failure.held) == (kind, 2)


def test_a_worker_that_ends_well_tells_nothing_of_it() -> None:
    assert list(stream(holds, "")) == [-1, 4]


@pytest.mark.parametrize("what", [(os._exit, 3), (operator.truediv, 1, 0)])
def test_a_worker_that_took_nothing_in_hand_does_not_say_so(what: Any) -> None:
    (failure,) = stream(starmap, operator.call, [what])

    assert failure.held is None


def test_outside_of_a_worker_nobody_listens() -> None:
    hold(3)

    assert isolate._held is None


# --- seconds --------------------------------------------------------------------------------------------------------


def test_a_worker_without_a_sign_of_life_is_killed() -> None:
    pid, failure = stream(starmap, operator.call, [(os.getpid,), (signal.pause,)], seconds=0.3)

    assert (failure.kind, failure.text) == ("timeout", "nothing came for 0.3 s")
    assert gone(pid)


def test_one_that_takes_something_else_in_hand_now_and_then_is_not() -> None:
    started = time.monotonic()

    assert list(stream(holds, "", 0.3, seconds=0.8)) == [-1, 4]
    assert time.monotonic() - started > 0.8


def test_without_seconds_it_may_take_as_long_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", count(step=1000).__next__)

    assert list(stream(map, time.sleep, [0.1])) == [None]


# --- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "error"),
        (RuntimeError("the queue is out of memory"), "error"),
        (GpuLost("GPU-0", "nvmlInit", "GPU is lost"), "gpu_lost"),
        (RuntimeError("CUDA error: no CUDA-capable device is detected\nCUDA kernel errors"), "gpu_lost"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "gpu_lost"),
        (RuntimeError("CUDA error: unspecified launch failure"), "error"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "error"),
        (RuntimeError("No CUDA GPUs are available"), "error"),  # so says torch of a machine without one
        (AssertionError(), "error"),
        (RuntimeError("no kernel"), "error"),
    ],
)
def test_exceptions_are_told_apart(error: Exception, kind: str) -> None:
    assert failure_kind(error) == kind


def test_torch_out_of_host_memory_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)

    assert failure_kind(error.value) == "oom"


@pytest.mark.parametrize(
    ("texts", "kills"),
    [
        (["low 0\noom 9\noom_kill 3\n", "oom_kill 5\n"], 3),
        (["low 0\n", "nr_free_pages 12\noom_kill 5\n"], 5),
        ([None, "oom_kill 5\n"], 5),
        (["no numbers\nin here at all\n", "oom_kill 5\n"], 5),
        ([None, "low 0\n"], 0),
        ([None, None], 0),
    ],
)
def test_kills_are_counted_by_the_container_or_else_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str | None], kills: int
) -> None:
    paths = [tmp_path / str(number) for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        if text is not None:
            path.write_text(text)
    monkeypatch.setattr(isolate, "OOM_KILLS", paths)

    assert oom_kills() == kills


# --- ending ---------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_whoever_stops_listening_leaves_no_worker_behind() -> None:
    pids = stream(starmap, operator.call, [(os.getpid,), (signal.pause,)])
    pid = next(pids)
    assert isinstance(pids, Generator)
    pids.close()

    assert gone(pid)


def test_what_workers_import_first_says_nothing(tmp_path: Path) -> None:
    script = "import lora_bench.bench.preload, sys; sys.exit('lora_bench.bench.measure' not in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
