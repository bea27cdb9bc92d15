"""Worker processes: real ones with a known operation, and what each way to die is reported as."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from lora_bench.gate import worker as worker_module
from lora_bench.gate.pair import LEAST_ROUNDS, LOCATION
from lora_bench.gate.workers import MOST_ROUNDS, Broken, Server, Turns, Worker, rounds_in

PLAIN = {"products": 0, "seldom": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with Server("base", [sys.executable, "-P"], environment, seconds=60) as server:
        yield server


def test_a_pair_of_processes_is_timed_in_turns(server: Server) -> None:
    tasks = {"base": PLAIN, "head": {"products": 100, "seldom": 0}, "control": PLAIN}
    workers = {name: server.start(task) for name, task in tasks.items()}
    assert [worker.ready() for worker in workers.values()] == [{}] * 3

    turns = Turns(workers, seed=0)
    turns.run(LEAST_ROUNDS)
    pair = turns.pair("head", head_first=True)
    for worker in workers.values():
        worker.close()

    assert {len(side) for side in (pair.base, pair.head, pair.control)} == {LEAST_ROUNDS}
    assert pair.head_first
    # Twice the work: no claim about time, but the sides cannot have been mixed up.
    assert pair.log_ratio(LOCATION) > pair.log_ratio(LOCATION, "control")


def test_a_task_that_cannot_be_prepared_is_that_sides_failure(server: Server) -> None:
    workload = {"setup": "separate", "phase": "decode", "model": "micro", "dtype": "fp32", "rank": 0}
    worker = server.start(
        {"subject": "reference", "workload": {**workload, "batch": 1, "sequence": 2}, "device": "cpu"}
    )

    with pytest.raises(Broken, match="base: error: ValueError: rank must be at least 1, got 0") as broken:
        worker.ready()
    assert (broken.value.side, broken.value.kind) == ("base", "error")


def test_what_a_subject_does_not_claim_is_no_fault_of_it(server: Server) -> None:
    workload = {"setup": "batched", "phase": "decode", "model": "micro", "dtype": "fp32", "rank": 4}
    task = {"subject": "loralib", "workload": {**workload, "batch": 1, "sequence": 2}, "device": "cpu"}
    with pytest.raises(Broken, match="loralib") as broken:
        server.start(task).ready()
    assert broken.value.kind == "not_offered"


@pytest.mark.parametrize("own", [[], ["{home}"], ["{tmp}", "{home}"], ["{tmp}"]])
def test_a_revision_of_which_nothing_is_imported_is_refused(server: Server, tmp_path: Path, own: list[str]) -> None:
    (tmp_path / "other_project-1.dist-info").mkdir()
    (tmp_path / "other_project-1.dist-info" / "METADATA").write_text("Name: other-project\nVersion: 1\n")
    (tmp_path / "other_project-1.dist-info" / "RECORD").write_text("other_project.py,,\n")
    workload = {"setup": "separate", "phase": "decode", "model": "linear-8x8", "dtype": "fp32", "rank": 1}
    task = {"subject": "reference", "workload": {**workload, "batch": 1, "sequence": 2}, "device": "cpu"}
    places = {"home": Path(__file__).parent.parent, "tmp": tmp_path}
    worker = server.start({**task, "own": [each.format(**places) for each in own]})

    if own != ["{tmp}"]:
        assert worker.ready()["correctness"]
        return
    with pytest.raises(Broken, match="reference imports nothing of the revision, which has other_project: ") as broken:
        worker.ready()
    assert broken.value.kind == "not_used"


def test_a_module_that_cannot_be_asked_is_none_of_a_revision_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError(f"{name} is not installed")

    odd = ModuleType("odd")
    odd.__file__ = 7  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "odd", odd)

    worker_module._must_be_used([], "reference")
    worker_module._must_be_used([str(Path(__file__).parent)], "reference")
    with pytest.raises(worker_module.NotUsed):
        worker_module._must_be_used([str(tmp_path)], "reference")


@pytest.mark.parametrize("wish", [lambda worker: worker.time(), lambda worker: worker.ready()])
def test_a_worker_that_ends_is_a_crash(wish: Callable[[Worker], object]) -> None:
    ours, theirs = Pipe()
    theirs.close()

    with pytest.raises(Broken, match="base: crashed: its process ended"):
        wish(Worker("base", ours, 60))


def test_a_worker_that_hangs_ends_with_its_server() -> None:
    """One that no longer listens, as a subject that never returns, would disturb all that is measured later."""
    program = "import os, time; os.fork() or time.sleep(600); print(os.getpid()); time.sleep(600)"
    with Server("head", [sys.executable, "-c", program], os.environ, seconds=0.2) as server:
        with pytest.raises(Broken, match="timeout"):
            server.warm_up()
        group = server._process.pid
        assert [process.pid for process in psutil.process_iter() if of(group, process)]

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and [1 for process in psutil.process_iter() if of(group, process)]:
        time.sleep(0.01)
    assert not [process.pid for process in psutil.process_iter() if of(group, process)]


def of(group: int, process: psutil.Process) -> bool:
    """Whether the process is alive and of that group."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_an_unknown_wish_is_an_error(server: Server) -> None:
    worker = server.start(PLAIN)
    worker.ready()

    with pytest.raises(Broken, match="KeyError: 'dance'"):
        worker.do("dance")


def test_a_worker_that_does_not_answer_is_a_timeout(server: Server) -> None:
    worker = server.start(PLAIN)
    worker.ready()
    worker._seconds = 0.1
    os.killpg(server._process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Broken, match=r"timeout: nothing came for 0\.1 s"):
            worker.time()
    finally:
        os.killpg(server._process.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("argv", "kind", "text"),
    [
        ([sys.executable, "-c", "raise SystemExit('no such library')"], "crashed", "no such library"),
        ([sys.executable, "-c", "import sys; sys.exit(3)"], "crashed", "it ended without a word"),
        ([sys.executable, "-c", "import time; time.sleep(9)"], "timeout", "did not start within 0.5 s"),
    ],
)
def test_an_interpreter_that_does_not_start_says_why(argv: list[str], kind: str, text: str) -> None:
    seconds = 0.5 if kind == "timeout" else 60
    with Server("head", argv, os.environ, seconds=seconds) as server, pytest.raises(Broken, match=text) as broken:
        server.warm_up()
    assert (broken.value.side, broken.value.kind) == ("head", kind)


@pytest.mark.parametrize(("budget", "step", "rounds"), [(5, 0.1, 50), (5, 1.0, LEAST_ROUNDS), (5, 1e-4, MOST_ROUNDS)])
def test_rounds_are_what_the_budget_holds(budget: float, step: float, rounds: int) -> None:
    assert rounds_in(budget, step) == rounds


def test_an_interpreter_that_is_not_there_says_so() -> None:
    with pytest.raises(Broken, match="head: crashed: /no/such/python: No such file or directory"):
        Server("head", ["/no/such/python"], os.environ)
