"""`lora-bench fit`: the search, on machines that exist only here; and processes that do run, or run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lora_bench.__main__ import main
from lora_bench.bench import fit, measure
from lora_bench.bench.fit import Broken, Trial, attempt, estimate, row_of, search
from lora_bench.bench.isolate import Failure
from lora_bench.bench.workload import BASE, Row

PLACE: dict[str, Any] = {"model": "micro", "dtype": "fp32", "rank": 4, "batch": 2, "sequence": 8}
MIB = 2**20


def pretend(monkeypatch: pytest.MonkeyPatch, *messages: Any) -> None:
    """Let every trial's process say this."""

    def stream(function: Any, row: Row, *arguments: Any) -> Iterator[Any]:
        yield from messages

    monkeypatch.setattr(fit, "stream", stream)


def grows(monkeypatch: pytest.MonkeyPatch, capacity: int) -> list[int]:
    """Let memory be as much as `capacity` sequences take; returns the batches that are tried."""
    tried: list[int] = []

    def stream(function: Any, row: Row, *arguments: Any) -> Iterator[Any]:
        batch = row.workload.batch
        tried.append(batch)
        yield 10 * MIB
        if batch > 4 * capacity:
            yield Failure("oom", "OutOfMemoryError: no more")
        else:
            yield row, {"resident_peak_bytes": (10 + batch) * MIB}

    monkeypatch.setattr(fit, "stream", stream)
    return tried


def trial_of(size: int, largest: int) -> Trial:
    return Trial(size, size <= largest, size, 0, size)


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("largest", [2, 3, 7, 8, 31, 63, 64, 100, 1000, 4096])
def test_the_search_ends_within_a_32nd_of_the_largest(largest: int, least: int) -> None:
    trials = list(search(lambda size: trial_of(size, largest), least))
    best = max(trial.size for trial in trials if trial.fits)

    assert best <= largest < min(trial.size for trial in trials if not trial.fits)
    assert largest - best < max(1, largest / 32)
    assert len({trial.size for trial in trials}) == len(trials)
    assert len(trials) <= largest.bit_length() + 6


def test_the_search_ends_where_nothing_fits() -> None:
    assert list(search(lambda size: trial_of(size, 0), 1)) == [Trial(1, False, 1, 0, 1)]


@pytest.mark.parametrize(
    ("mode", "adapters", "phase", "subject", "setup"),
    [
        ("lora", 1, "train", "peft", "separate"),
        ("lora", 3, "decode", "peft", "batched"),
        ("qlora", 1, "train", "peft", "four_bit"),
        ("full", 1, "train", BASE, "base"),
    ],
)
def test_a_mode_is_measured_as_the_suite_does(mode: str, adapters: int, phase: str, subject: str, setup: str) -> None:
    row = row_of(mode, "peft", phase, adapters, **PLACE)

    assert (row.subject, row.workload.setup, row.workload.adapters) == (subject, setup, adapters)
    assert row.workload.rank == (0 if mode == "full" else 4)


def test_a_mode_that_costs_what_another_does_is_not_measured() -> None:
    with pytest.raises(ValueError, match="the mode must be one of lora, qlora, full, got 'rslora'"):
        row_of("rslora", "reference", "train", 1, **PLACE)


def test_the_estimate_is_the_peak_of_the_budget_and_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("lora", "reference", "train", 1, **PLACE)
    pretend(monkeypatch, 3 * MIB, (row, {"resident_peak_bytes": 9 * MIB}))

    for limit, fits in ((9 * MIB, True), (9 * MIB - 1, False)):
        trial = attempt(5, row, "lora", device="cpu", limit=limit)
        assert trial == Trial(5, fits, 9 * MIB, 3 * MIB, 3 * MIB + estimate(row, "lora", "cpu").peak)


@pytest.mark.parametrize(
    ("memory", "peak", "context"),
    [
        ({"nvml_process_bytes": 50, "reserved_peak_bytes": 30}, 50, 20),
        ({"nvml_process_bytes": "unavailable (no driver)", "reserved_peak_bytes": 30}, 30, 0),
    ],
)
def test_on_a_gpu_the_driver_s_count_is_taken_where_it_tells(
    memory: dict[str, Any], peak: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of("lora", "reference", "train", 1, **PLACE)
    pretend(monkeypatch, (row, memory))
    trial = attempt(1, row, "lora", device="cuda", limit=None)

    assert (trial.fits, trial.peak_bytes, trial.context_bytes) == (True, peak, context)


@pytest.mark.parametrize(
    ("failure", "fits"),
    [
        (Failure("oom", "OutOfMemoryError: CUDA out of memory"), False),
        (Failure("error", "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to"), False),
        (Failure("error", "RuntimeError: shapes differ"), None),
        (Failure("crashed", "the worker was killed by SIGSEGV"), None),
    ],
)
def test_a_want_of_memory_does_not_fit_and_other_failures_are_told(
    failure: Failure, fits: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of("lora", "reference", "train", 1, **PLACE)
    pretend(monkeypatch, MIB, failure)

    if fits is None:
        with pytest.raises(Broken, match=f"at 3, {failure.text}"):
            attempt(3, row, "lora", device="cpu", limit=MIB)
    else:
        assert attempt(3, row, "lora", device="cpu", limit=MIB)[:3] == (3, False, None)


def test_a_peak_that_is_not_told_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("lora", "reference", "train", 1, **PLACE)
    pretend(monkeypatch, MIB, (row, {"resident_peak_bytes": "unavailable (no mark)"}))

    with pytest.raises(Broken, match=r"the resident peak is unavailable \(no mark\)"):
        attempt(1, row, "lora", device="cpu", limit=MIB)


def test_a_process_runs_within_what_is_free_or_is_refused_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("full", "reference", "prefill", 1, **PLACE | {"model": "tiny", "batch": 1})
    trial = attempt(1, row, "full", device="cpu", limit=2**40)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 32 * MIB)  # and the model takes 114 MiB
    starved = attempt(1, row, "full", device="cpu", limit=2**40)

    assert trial.fits
    assert trial.peak_bytes is not None
    assert trial.peak_bytes - trial.context_bytes > estimate(row, "full", "cpu").weights
    assert (starved.fits, starved.peak_bytes) == (False, None)


def test_every_trial_is_a_line_and_the_answer_stands_beside_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = grows(monkeypatch, capacity=5)
    arguments = ["fit", "--model", "micro", "--lora-device", "cpu", "--limit", "15MiB", "--batch", "99"]

    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()

    assert tried == [1, 2, 4, 8, 6, 5]
    assert lines[0] == "the largest batch: micro, lora r16, train, fp32, sequence 64, on cpu, within 15.00 MiB"
    assert lines[3].startswith("  batch      1   fits           peak     11.00 MiB   estimated ")
    assert lines[6].startswith("  batch      8   does not fit   peak     18.00 MiB   estimated ")
    assert lines[10] == "the largest batch that fits is 5; 6 does not"
    assert lines[11] == "  measured    15.00 MiB, 10.00 MiB of them before there was a model"
    assert lines[12].startswith("  estimated   1")
    assert lines[13].startswith("  unexplained ")


def test_out_of_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    grows(monkeypatch, capacity=1)

    assert main(["fit", "--model", "micro", "--lora-device", "cpu", "--limit", "1GiB"]) == 0
    assert "batch      8   does not fit   peak out of memory " in capsys.readouterr().out


def test_where_not_even_one_fits_the_exit_code_is_6(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grows(monkeypatch, capacity=1)

    assert main(["fit", "--model", "micro", "--lora-device", "cpu", "--limit", "1MiB"]) == 6
    assert capsys.readouterr().out.endswith("\n\nnot even a batch of 1 fits\n")


def test_a_broken_subject_is_told_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, MIB, Failure("error", "TypeError: no"))

    assert main(["fit", "--what", "sequence", "--model", "micro", "--lora-device", "cpu"]) == 1
    assert capsys.readouterr().err == "lora-bench fit: sequence at 2, TypeError: no\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model tinny", "no model is called 'tinny'"),
        ("--model micro --lora-subject nobody", "no subject is called 'nobody'"),
        ("--model micro --lora-subject loralib --what adapters", "loralib does not offer pool, route"),
        ("--model micro --mode qlora --what adapters", "several adapters share a batch in mode lora, to infer; "),
        ("--model micro --what adapters --phase train", "several adapters share a batch in mode lora, to infer; "),
        ("--model micro --rank 3 --lora-subject peft --dtype fp64 --lora-device cuda", "--lora-device cuda: torch "),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pretend(monkeypatch, Failure("error", "nothing should run"))

    assert main(["fit", *arguments.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"lora-bench fit: {sentence}")
