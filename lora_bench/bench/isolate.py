"""A function in a process of its own: its crash costs one result, and its peaks are its own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "lora_bench.bench.measure"]


class Failure(NamedTuple):
    """What a worker ended with instead of its result: kind is "error", "oom" or "crashed"."""

    kind: str
    text: str
    detail: str = ""


def stream(function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """What the generator `function(*arguments)` yields in a fresh process, as it comes; a `Failure` last if it failed.

    Everything must pickle. The process is forked from a server that has imported torch but never used it, so that it
    starts in milliseconds and holds no other scenario's memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_serve, args=(sender, function, arguments, sys.path), daemon=True)
    worker.start()
    sender.close()
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except EOFError:
                worker.join()
                yield Failure("crashed", _death(worker.exitcode))
                return
            if kind == "end":
                return
            yield value
            if kind == "failure":
                return
    finally:
        receiver.close()
        worker.join(timeout=5)
        if worker.is_alive():
            worker.kill()
            worker.join()


def _serve(
    sender: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], path: list[str]
) -> None:
    sys.path[:] = path
    try:
        for value in function(*arguments):
            sender.send(("value", value))
        sender.send(("end", None))
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent reports it as this row's failure
        kind = "oom" if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) else "error"
        sender.send(("failure", Failure(kind, f"{type(error).__name__}: {error}", traceback.format_exc())))
    finally:
        sender.close()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"the worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the worker exited with {exitcode} before its result"
