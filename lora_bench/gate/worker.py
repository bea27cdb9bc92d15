"""The other end of `workers`: a server that has imported torch, and the children it forks, each with one step to run.

`python -m lora_bench.gate.worker FD` runs in the environment of one side, whose libraries may be of other versions than
those of whoever asks: so the messages are JSON. FD is its end of a socket pair.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.bench.arm import Step

PROTOCOL = 1
"""What both ends must agree upon."""


class NotOffered(Exception):
    """The subject does not claim to do what is asked."""


class NotUsed(Exception):
    """Nothing of the revision is imported: it would be measured without its own code."""


def send(connection: Connection, **message: Any) -> None:
    """Send a message."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Any:
    """Wait for a message; raises EOFError where the other end has gone."""
    return json.loads(connection.recv_bytes())


KINDS: dict[type[Exception], str] = {NotOffered: "not_offered", NotUsed: "not_used"}


def main(fd: int) -> None:
    """Fork a child for every task that comes, until the connection ends."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # so that no child has to

    from lora_bench.bench import clock, clocks, machine, measure  # noqa: F401
    from lora_bench.gate import operation  # noqa: F401

    server = Connection(fd)
    gc.collect()
    gc.freeze()  # what torch has imported is no garbage: to look through it takes each child a tenth of a second
    send(server, protocol=PROTOCOL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    while True:
        try:
            task = receive(server)
        except EOFError:
            return
        handle = recv_handle(server)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            _child(Connection(handle), task)
            os._exit(0)
        os.close(handle)


def _child(connection: Connection, task: dict[str, Any]) -> None:
    from lora_bench.bench.ready import refusal_kind

    try:
        step, clock, device, told = _prepare(task)
        gc.collect()
        gc.freeze()
        send(connection, ready=told)
        _serve(connection, step, clock, device)
    except (EOFError, ConnectionError):  # whoever asked has gone
        return
    except Exception as error:  # noqa: BLE001  # a subject may raise anything: it becomes this side's failure
        kind = KINDS.get(type(error))
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        kind = kind or refusal_kind(error)
        send(connection, failed=kind, text=text, detail=traceback.format_exc())


def _prepare(task: dict[str, Any]) -> tuple[Step, Callable[[Callable[[], object]], float], str, dict[str, Any]]:
    """The step of a task, proven right where it is a row's, with its device's clock and what is known of it."""
    from lora_bench.bench.clock import clock_of, wall_clock

    if "products" in task:
        from lora_bench.gate.operation import products

        return products(task["products"], seldom=task["seldom"]), wall_clock, "cpu", {}
    from lora_bench.bench import measure, ready
    from lora_bench.bench.machine import fingerprint
    from lora_bench.bench.scenario import reason_to_skip
    from lora_bench.bench.workload import Row, Workload

    row, device = Row(task["subject"], Workload(**task["workload"])), task["device"]
    if reason := reason_to_skip(row, device):
        raise NotOffered(reason)
    measure.settle_threads(device)
    base = ready.build_base(row, device)
    subject, arm = ready.build(base, row)
    step, proof = ready.ready_row(row, subject, arm)
    _must_be_used(task.get("own", []), row.subject)
    arm.controls = {}  # what judged it would be weighed with it
    del base
    ready.release(device)
    told = {"fingerprint": fingerprint(device), "correctness": proof._asdict() if proof else None}
    return step, clock_of(device), device, told


def _must_be_used(own: Sequence[str], subject: str) -> None:
    """Raise NotUsed where a revision has files of its own, and what was built has imported none of them."""
    if not own:
        return
    from lora_bench.gate.inside import put_first

    # Not by getattr: some modules import something when they are asked for what they have not.
    found = [vars(module).get("__file__") for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    files = [file for file in found if isinstance(file, str)]
    if not any(Path(file).is_relative_to(folder) for file in files for folder in own):
        has = ", ".join(put_first(list(own)))
        raise NotUsed(f"{subject} imports nothing of the revision, which has {has}: it would be the same in any other")


def _serve(connection: Connection, step: Step, clock: Callable[[Callable[[], object]], float], device: str) -> None:
    """Time the step whenever asked to, until the connection ends."""
    from lora_bench.bench.clocks import Window
    from lora_bench.bench.sampling import interruptions

    window = Window(device)
    relocate = (lambda: None) if device.startswith("cuda") else step.relocate
    answers: dict[str, Callable[[], Any]] = {"relocate": relocate, "begin": window.__enter__}
    answers["end"] = partial(window.__exit__, None, None, None)
    while True:
        asked = receive(connection)
        if asked == "time":
            step.prepare()
            before = interruptions()
            seconds = clock(step.run)
            connection.send_bytes(json.dumps([seconds, interruptions() > before]).encode())
            continue
        answers[asked]()
        send(connection, done=asked, throttled=window.throttled is True if asked == "end" else None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
