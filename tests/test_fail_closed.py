"""What can go wrong beside a stored baseline, fault by fault: its verdict and its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_bench.bench import measure
from lora_bench.bench.isolate import Failure
from lora_bench.bench.records import SCHEMA
from lora_bench.bench.workload import BASE, Row
from lora_bench.gate.promote import promote
from tests.faulty_runs import HERE, Bench, full_disk
from tests.kept_runs import keep, sealed
from tests.pytest_runs import Run
from tests.scripted_workers import MEMORY, samples, timing


class Beside(Bench):
    """A run of the reference beside a promoted baseline of the same, with workers that say what is planted."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        self.place = folder.parent / "baselines"

    def stream(self, function: Any, *arguments: Any, seconds: float) -> Iterator[Any]:
        self.asked += 1
        return self.jobs[function](*arguments)

    def run(self) -> Run:
        self.options.append(f"--lora-baseline={self.place}")
        return super().run()

    @property
    def kept(self) -> Path:
        """The promoted run."""
        (path,) = self.place.rglob("*.jsonl")
        return path


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one promoted run."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        assert Bench(folder / "out", patch).run().code == 0
    (path,) = (folder / "out").glob("*.jsonl")
    assert promote(path, folder / "baselines", first=True).code == 0
    return folder / "baselines"


# --- what goes wrong ------------------------------------------------------------------------------------------------

Plant = Callable[[Beside], None]


def times(seconds: float = 1.0, **changed: Any) -> Plant:
    """The reference takes so long, beside a base of half a second; or its timing is another."""

    def job(rows: list[Row], *_: object) -> Iterator[Any]:
        yield HERE
        for row in rows:
            yield timing(row) if row.subject == BASE else timing(row, seconds)._replace(**changed)

    return lambda bench: bench.jobs.update({measure.compare: job})


def weighs(**memory: Any) -> Plant:
    def job(rows: list[Row], *_: object) -> Iterator[Any]:
        return ((row, MEMORY | memory) for row in rows)

    return lambda bench: bench.jobs.update({measure.weigh: job})


def machine(hard: dict[str, Any], soft: dict[str, Any]) -> Plant:
    def job(rows: list[Row], *_: object) -> Iterator[Any]:
        yield {"hard": HERE["hard"] | hard, "soft": soft}
        yield from map(timing, rows)

    return lambda bench: bench.jobs.update({measure.compare: job})


def ends(kind: str, text: str) -> Plant:
    """The worker ends with the reference in hand."""

    def job(rows: list[Row], *_: object) -> Iterator[Any]:
        yield HERE
        yield timing(rows[0])
        yield Failure(kind, text, held=1)

    return lambda bench: bench.jobs.update({measure.compare: job})


def records(change: Callable[[bytes], bytes]) -> Plant:
    """The promoted run's file is not what it was."""
    return lambda bench: vars(bench).update(made=bench.kept.write_bytes(change(bench.kept.read_bytes())))


def latency(**changed: Any) -> Plant:
    """The promoted run's latencies are not what they were."""

    def change(text: bytes) -> bytes:
        found = [json.loads(line) for line in text.splitlines()]
        found = [each | changed if each["quantity"] == "latency" else each for each in found]
        return sealed(found)

    return records(change)


def place(name: str) -> Plant:
    return lambda bench: vars(bench).update(place=bench.place / name)


def emptied(bench: Beside) -> None:
    bench.kept.unlink()


def killed(bench: Beside) -> None:
    """The baseline is a run that did not get as far as the reference."""
    told = [
        line for line in bench.kept.read_bytes().splitlines(keepends=True) if b'"subject": "reference", ' not in line
    ]
    plan = bench.kept.read_bytes().splitlines(keepends=True)[0]
    bench.place = bench.place / "killed.jsonl"
    keep(bench.place, list(map(json.loads, [plan, *(line for line in told if line != plan)])))


def unpromoted(bench: Beside) -> None:
    """A run that was only measured lies among the promoted ones, as one that saves itself would."""
    whole = bench.kept.read_bytes().splitlines(keepends=True)
    (bench.place / "saved.jsonl").write_bytes(b"".join(whole[:-1]))


def options(*given: str) -> Plant:
    return lambda bench: bench.options.extend(given)


def phases(which: str) -> Plant:
    return lambda bench: vars(bench).update(phases=which)


def several(*plants: Plant) -> Plant:
    def plant(bench: Beside) -> None:
        for each in plants:
            each(bench)

    return plant


# --- what comes of it -----------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is planted, the exit code, and a line that is printed: verdict, row and text."""

    plant: Plant
    code: int
    says: str


REFERENCE = "separate[[]reference-decode-micro-fp32-r4-b2-s8]"
THROTTLED = {"throttled": True, "throttle_delta": {"thermal": 5}}
WARN = options("--lora-on-inconclusive=warn")
NOTHING = "NOT COMPARABLE "
SLOW = times(1.04)
FAULTS = {
    # the run
    "nothing": Fault(times(), 0, f"pass           {REFERENCE}: x base 2.000 [[]2.000, 2.000] -> 2.000 *"),
    "a slower ratio": Fault(SLOW, 1, f"REGRESSION     {REFERENCE}: x base * -> 2.080 * (+4.0%, limit 3.0%)"),
    "a slower ratio, with warn": Fault(several(SLOW, WARN), 1, f"REGRESSION     {REFERENCE}: *"),
    "more memory": Fault(weighs(parameter_bytes=8), 1, f"REGRESSION     {REFERENCE}: parameter_bytes 7 -> 8 *"),
    "a quicker ratio": Fault(times(0.9), 0, f"improved       {REFERENCE}: x base *: promote"),
    "memory that is not told": Fault(
        weighs(parameter_bytes="unavailable (x)"), 6, f"{NOTHING}{REFERENCE}: parameter_bytes was 7, is unavailable (x)"
    ),
    "a noisy ratio": Fault(
        times(samples=samples(1.04)._replace(seconds=[0.9, 0.9, 1.04, 1.04, 1.04, 1.1, 1.1])),
        6,
        f"INCONCLUSIVE   {REFERENCE}: x base *: measure again",
    ),
    "throttled": Fault(times(window=THROTTLED), 6, f"{NOTHING}{REFERENCE}: this run: the clock *led (thermal)"),
    "another GPU": Fault(
        machine({"device_name": "there"}, {}),
        6,
        f"{NOTHING}no baseline of this machine, the nearest *: device_name was here*",
    ),
    "another library": Fault(machine({}, {"packages": {"peft": "9"}}), 0, "also changed: peft None -> 9"),
    "a scenario too few": Fault(phases("base"), 6, f"{NOTHING}{REFERENCE}: missing from this run"),
    "a scenario too few, with warn": Fault(
        several(phases("base and decode"), WARN), 0, "WARNING: --lora-on-inconclusive=warn lets this run pass *"
    ),
    "a scenario too many": Fault(
        options("--lora-rank=4,8"), 6, f"{NOTHING}{REFERENCE.replace('r4', 'r8')}: not in the baseline"
    ),
    "a row that crashed": Fault(ends("crashed", "SIGSEGV"), 1, f"{NOTHING}{REFERENCE}: this run: crashed: SIGSEGV"),
    "a GPU lost midway": Fault(ends("gpu_lost", "fell off"), 7, f"{NOTHING}{REFERENCE}: this run: gpu_lost: fell off"),
    "a full disk": Fault(full_disk, 1, "they are not whole: *.jsonl: No space left on device"),
    # the baseline
    "no such baseline": Fault(place("absent"), 6, f"{NOTHING}*/absent: there is no such file or folder"),
    "no such baseline, with warn": Fault(several(place("absent"), WARN), 6, f"{NOTHING}*/absent: there is no such *"),
    "an empty folder": Fault(emptied, 6, f"{NOTHING}*/baselines: the folder holds no promoted run: *"),
    "a corrupt baseline": Fault(records(lambda _: b"\xff{]\n"), 6, f"{NOTHING}*.jsonl: *.jsonl cannot be read: *"),
    "a baseline cut off": Fault(records(lambda text: text[:-9]), 6, f"{NOTHING}*.jsonl is cut off: *"),
    "a baseline of a run that was killed": Fault(killed, 6, f"{NOTHING}{REFERENCE}: not in the baseline"),
    "an older schema": Fault(
        records(lambda text: text.replace(b'"schema": %d' % SCHEMA, b'"schema": 0')),
        6,
        f"{NOTHING}*, line 1, is of schema 0, *",
    ),
    "a sample that is no number": Fault(
        latency(samples_seconds=[float("nan")] * 7), 6, f"{NOTHING}*: *[[]0] must be above 0 s and finite, got nan"
    ),
    "no samples": Fault(
        latency(samples_seconds=[], order=[], interrupted=[]), 6, f"{NOTHING}*: a latency needs samples, got none"
    ),
    "a throttled baseline": Fault(latency(window=THROTTLED), 6, f"{NOTHING}{REFERENCE}: the baseline: the clock was *"),
    "a run that saved itself": Fault(unpromoted, 6, f"{NOTHING}saved.jsonl: it was never promoted: *"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_beside_a_baseline(
    fault: Fault, promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(promoted, tmp_path / "baselines")
    bench = Beside(tmp_path / "out", monkeypatch)
    fault.plant(bench)
    found = bench.run()

    assert found.code == fault.code, found.text
    told = found.text.partition("lora-bench =")[2].splitlines()
    assert any(fnmatchcase(line, fault.says) for line in told), found.text
    assert "INTERNALERROR" not in found.text
    assert bench.asked


def test_a_regressed_run_that_is_saved_does_not_become_the_baseline(
    promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(promoted, tmp_path / "baselines")
    bench = Beside(tmp_path / "baselines", monkeypatch)  # the records of each run fall among the promoted ones
    SLOW(bench)
    bench.options += ["--benchmark-autosave", f"--benchmark-storage={tmp_path / 'store'}"]
    bench.options.append(f"--junitxml={tmp_path / 'junit.xml'}")

    assert [bench.run().code for _ in range(2)] == [1, 1]
    assert len(list((tmp_path / "store").rglob("*.json"))) == 2
    assert '<property name="lora_verdict" value="REGRESSION"' in (tmp_path / "junit.xml").read_text()
