"""Functions in processes of their own: what they yield arrives, and what kills them is told."""

import math
import operator
import os
import signal
from collections.abc import Generator
from itertools import starmap
from pathlib import Path

from lora_bench.bench.isolate import Failure, stream


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


def test_whoever_stops_listening_leaves_no_worker_behind() -> None:
    pids = stream(starmap, operator.call, [(os.getpid,), (signal.pause,)])
    pid = next(pids)
    assert isinstance(pids, Generator)
    pids.close()

    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
