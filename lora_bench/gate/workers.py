"""Worker processes driven in turn: each side of a comparison in processes of its own, forked from a warm server.

A server runs in its side's environment and has imported torch; each pair is measured in fresh children. Whoever drives
them sends one byte string and waits for one, so that at any moment one process works and the others sleep.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING, Any

from lora_bench.bench.isolate import LAST_SECONDS
from lora_bench.bench.sampling import MOST_WARM_UP_ROUNDS, ROUNDS_IN_PLACE, WARM_UP_ROUNDS
from lora_bench.gate.pair import LEAST_ROUNDS, Pair
from lora_bench.gate.worker import PROTOCOL, receive, send

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection
    from types import TracebackType
    from typing import Self

SECONDS = 300.0
"""How long a worker may take to answer before it is taken to hang."""
MOST_ROUNDS = 300


class Broken(Exception):
    """A worker that can go on no more.

    kind: "wrong", "oom", "crashed", "timeout", "gpu_lost", "error", "not_offered", "not_used" where nothing of a
    git revision was imported, or "protocol" where the side's lora-bench is too old or too new to be asked.
    """

    def __init__(self, side: str, kind: str, text: str) -> None:
        super().__init__(f"{side}: {kind}: {text}")
        self.side, self.kind, self.text = side, kind, text


class Server:
    """A side's interpreter, warm; `argv` starts its Python, `environment` is all of its environment.

    Raises `Broken` where it does not start.
    """

    def __init__(
        self, side: str, argv: Sequence[str], environment: Mapping[str, str], *, seconds: float = SECONDS
    ) -> None:
        self.side, self._seconds = side, seconds
        self._connection, theirs = Pipe()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server runs
        try:
            self._process = subprocess.Popen(
                [*argv, "-m", "lora_bench.gate.worker", str(theirs.fileno())],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                start_new_session=True,  # it and its children can then be killed together
            )
        except OSError as error:
            self._connection.close()
            self._words.close()
            raise Broken(side, "crashed", f"{argv[0]}: {error.strerror}") from None
        finally:
            theirs.close()
        self._warm = False

    def start(self, task: Mapping[str, Any]) -> Worker:
        """A child with this task, which may still be preparing it."""
        self.warm_up()
        try:
            ours, theirs = Pipe()
            send(self._connection, **task)
            send_handle(self._connection, theirs.fileno(), self._process.pid)
            theirs.close()
        except (EOFError, OSError):
            raise Broken(self.side, "crashed", self._last_words()) from None
        return Worker(self.side, ours, self._seconds)

    def warm_up(self) -> None:
        """Wait until it is ready to fork."""
        if self._warm:
            return
        if not self._connection.poll(self._seconds):
            raise Broken(self.side, "timeout", f"its Python did not start within {self._seconds:g} s")
        try:
            protocol = receive(self._connection)["protocol"]
        except (EOFError, OSError):
            raise Broken(self.side, "crashed", self._last_words()) from None
        if protocol != PROTOCOL:
            raise Broken(self.side, "protocol", f"its lora-bench speaks protocol {protocol}, wanted {PROTOCOL}")
        self._warm = True

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"

    def close(self) -> None:
        """End it; one that has not started, or does not end by itself, is killed."""
        self._connection.close()
        try:
            self._process.wait(timeout=LAST_SECONDS if self._warm else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # a child that hangs would disturb whatever comes next
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker:
    """A process with one step, which it runs and times whenever it is asked to."""

    def __init__(self, side: str, connection: Connection, seconds: float) -> None:
        self.side, self._connection, self._seconds = side, connection, seconds

    def ready(self) -> dict[str, Any]:
        """Wait until the step is built and proven; what is known of it, such as its machine's fingerprint."""
        told = self._answer()
        assert isinstance(told, dict)
        return dict(told["ready"])

    def time(self) -> tuple[float, bool]:
        """Seconds of one step, and whether it was interrupted."""
        self._ask(b'"time"')
        seconds, interrupted = self._answer()
        return seconds, interrupted

    def do(self, what: str) -> dict[str, Any]:
        """Have it "relocate", "begin" or "end" the watch over its device's clocks."""
        self._ask(json.dumps(what).encode())
        told = self._answer()
        assert isinstance(told, dict)
        return told

    def close(self) -> None:
        self._connection.close()

    def _ask(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError:
            raise Broken(self.side, "crashed", "its process ended") from None

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(self._seconds):
                raise Broken(self.side, "timeout", f"nothing came for {self._seconds:g} s")
            answer = receive(self._connection)
        except (EOFError, OSError):
            raise Broken(self.side, "crashed", "its process ended") from None
        if isinstance(answer, dict) and "failed" in answer:
            raise Broken(self.side, answer["failed"], answer["text"])
        return answer


class Turns:
    """Rounds of workers in random order, each round every worker once.

    It warms them up when it is made, until a round is no quicker than the quickest before it.
    """

    def __init__(self, workers: Mapping[str, Worker], seed: int) -> None:
        self._workers, self._order = workers, random.Random(seed)
        self.seconds: dict[str, list[float]] = {name: [] for name in workers}
        self._interrupted: dict[str, list[bool]] = {name: [] for name in workers}
        self._throttled = False
        totals: list[float] = []
        while len(totals) < WARM_UP_ROUNDS or (totals[-1] < min(totals[:-1]) and len(totals) < MOST_WARM_UP_ROUNDS):
            totals.append(sum(seconds for seconds, _ in self._round(len(totals)).values()))
        self.round_seconds = min(totals)

    def run(self, rounds: int) -> None:
        """Add so many rounds."""
        for worker in self._workers.values():
            worker.do("begin")
        for number in range(rounds):
            for name, (seconds, interrupted) in self._round(number).items():
                self.seconds[name].append(seconds)
                self._interrupted[name].append(interrupted)
        ends = [worker.do("end")["throttled"] for worker in self._workers.values()]
        self._throttled |= any(ends)

    def pair(self, head: str, *, head_first: bool = False) -> Pair:
        """What these rounds tell of `head` against "base" and "control"."""
        sides = {"base": "base", "head": head, "control": "control"}
        return Pair(
            self.seconds["base"],
            self.seconds[head],
            self.seconds["control"],
            interrupted={side: self._interrupted[name] for side, name in sides.items()},
            head_first=head_first,
            throttled=self._throttled,
        )

    def _round(self, number: int) -> dict[str, tuple[float, bool]]:
        if number % ROUNDS_IN_PLACE == 0:
            for name in self._shuffled():
                self._workers[name].do("relocate")
        return {name: self._workers[name].time() for name in self._shuffled()}

    def _shuffled(self) -> list[str]:
        return self._order.sample(list(self._workers), len(self._workers))


def rounds_in(budget_seconds: float, round_seconds: float) -> int:
    """How many rounds a pair has: as many as the budget holds, but 20 at least and 300 at most."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget_seconds / round_seconds)))
