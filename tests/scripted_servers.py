"""Servers of workers that do what a test says: how long each side takes, and what it breaks with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from lora_bench.gate.workers import Broken

STARTED: list[str] = []
"""What was started, closed and ended, in order."""


class ScriptedWorker:
    """Takes so many seconds for each step, or breaks."""

    def __init__(self, side: str, seconds: float, fault: Broken | None) -> None:
        self.side, self.seconds, self.fault = side, seconds, fault

    def ready(self) -> dict[str, Any]:
        if self.fault:
            raise self.fault
        return {"fingerprint": {"hard": {"device": "cpu"}}, "correctness": None}

    def time(self) -> tuple[float, bool]:
        return self.seconds, False

    def do(self, what: str) -> dict[str, Any]:
        return {"done": what, "throttled": ScriptedServer.throttled if what == "end" else None}

    def close(self) -> None:
        STARTED.append(f"{self.side} closed")


class ScriptedServer:
    """Knows what each side takes; a fault may be set for one side in one phase, or at its start ("").

    With `once` it is a fault of the first time alone.
    """

    seconds: dict[str, float]
    faults: dict[tuple[str, str], Broken]
    once = False
    throttled = False

    def __init__(self, side: str, *_command: object) -> None:
        self.side = side

    def warm_up(self) -> None:
        if fault := self.faults.get((self.side, "")):
            raise fault

    def start(self, task: dict[str, Any]) -> ScriptedWorker:
        STARTED.append(self.side)
        fault = self.faults.get((self.side, task["workload"]["phase"]))
        if fault and self.once:
            del self.faults[self.side, task["workload"]["phase"]]
        return ScriptedWorker(self.side, self.seconds[self.side], fault)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        STARTED.append(f"{self.side} ended")
