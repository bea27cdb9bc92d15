"""`lora-bench ab` and `calibrate`: their words and exit codes, on scripted workers."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lora_bench.__main__ import main
from lora_bench.bench import machine
from lora_bench.commands.ab import differences
from lora_bench.gate import ab, calibration, environments
from lora_bench.gate.ab import comparison_of
from lora_bench.gate.workers import Broken
from tests.scripted_servers import STARTED, ScriptedServer

HARD = {"device": "cpu"}


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    STARTED.clear()
    ScriptedServer.seconds = {"base": 1.0, "head": 1.0, "control": 1.0}
    ScriptedServer.faults = {}
    monkeypatch.setattr(ab, "Server", ScriptedServer)
    monkeypatch.setattr(environments, "describe", lambda side: {"library": side.subject})
    monkeypatch.setattr(machine, "fingerprint", lambda _: {"hard": HARD})
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return main(["ab", "--model", "micro", "--lora-device", "cpu", *arguments])


def kept() -> list[dict[str, object]]:
    (path,) = Path(".lora_bench").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_equals_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0

    said = capsys.readouterr().out
    assert "the two sides are the same: whatever differs is noise" in said
    assert "separate decode r16  1000 ms -> 1000 ms  +0.0 % [+0.0, +0.0]  PASS (7 pairs)\n" in said
    assert max(map(len, said.splitlines())) <= 100
    assert "smallest change to be found nine times in ten" in said
    (record,) = kept()
    assert comparison_of(record).verdict == record["verdict"] == "PASS"


def test_slower_fails(capsys: pytest.CaptureFixture[str]) -> None:
    ScriptedServer.seconds["head"] = 1.1

    assert run("--lora-subject", "reference", "--lora-subject", "peft") == 1

    said = capsys.readouterr().out
    assert "base reference, head peft" in said
    assert "+10.0 % [+10.0, +10.0]  FAIL (7 + 7 pairs)\n  slower, and again with fresh pairs\n" in said


@pytest.mark.parametrize(
    ("fault", "arguments", "code"),
    [
        (Broken("head", "wrong", "it is not LoRA"), (), 1),
        (Broken("base", "oom", "no memory"), (), 6),
        (Broken("head", "not_offered", "no such verb"), (), 6),
        (Broken("head", "gpu_lost", "it is gone"), (), 7),
        (Broken("base", "oom", "no memory"), ("--phase", "decode,prefill"), 6),
        (Broken("base", "oom", "no memory"), ("--phase", "decode,prefill", "--lora-on-inconclusive", "warn"), 0),
        (Broken("base", "oom", "no memory"), ("--lora-on-inconclusive", "warn"), 6),
        (Broken("head", "wrong", "it is not LoRA"), ("--lora-on-inconclusive", "warn"), 1),
    ],
)
def test_faults_have_exit_codes(
    fault: Broken, arguments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ScriptedServer.faults[fault.side, "decode"] = fault

    assert run(*arguments) == code
    assert str(fault) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--setup", "glued"), "--setup must be among merged, separate, batched, four_bit, got 'glued'"),
        (("--phase", "sleep"), "--phase must be among prefill, decode, switch, train, got 'sleep'"),
        (("--setup", "merged", "--phase", "train"), "--setup merged is not measured in --phase train"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--lora-device", "tpu"), "--lora-device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--lora-subject", "a", "--lora-subject", "b", "--lora-subject", "c"), "given once or twice, got a, b, c"),
        (("--base-rev", "main", "--base-python", "python"), "--base-python and --base-rev: wanted one of them"),
        (("--head-python", "no-such-python"), "there is no interpreter no-such-python"),
        (("--calibration", "nowhere.json"), "there is no calibration nowhere.json"),
    ],
)
def test_what_cannot_be_meant_is_said_before_any_work(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert STARTED == []


@pytest.mark.parametrize(("what", "code"), [("fail", 6), ("warn", 0)])
def test_what_was_compared_and_cannot_be_told_is_a_matter_of_choice(
    what: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ScriptedServer.seconds["control"] = 1.1

    assert run("--lora-on-inconclusive", what) == code
    assert ("WARNING: --lora-on-inconclusive=warn lets this run pass" in capsys.readouterr().err) == (code == 0)


def test_a_page_lies_beside_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    ScriptedServer.seconds["head"] = 1.1
    run()

    (page,) = Path(".lora_bench").glob("*.html")
    assert f"reports: {page}\n" in capsys.readouterr().out
    assert "slower, and again with fresh pairs" in page.read_text()


def test_github_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ScriptedServer.seconds["head"] = 1.1
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")

    assert run("--phase", "decode") == 1

    assert "::error title=FAIL%3A separate decode r16::slower, and again" in capsys.readouterr().out
    assert "FAIL" in Path("summary.md").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_measured_before_a_signal_is_kept_and_where_is_told(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_bench.report.duels.heard", lambda _: signal.raise_signal(number))

    try:
        ended: Any = run()
    except SystemExit as error:
        ended = error.code

    assert ended == code

    (record,) = kept()
    (path,) = Path(".lora_bench").glob("*.jsonl")
    assert f"lora-bench ab: cut off; records: {path}\n" in capsys.readouterr().err
    assert record["verdict"] == "INCONCLUSIVE"
    assert len(comparison_of(record).last.pairs) == 1


def test_a_calibration_is_kept_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    ScriptedServer.seconds["head"] = 1.05  # equals that differ, always: a runner of which little can be told

    assert main(["calibrate", "--model", "micro", "--lora-device", "cpu", "--pairs", "7"]) == 0
    assert "equals differ by up to 5.0 %" in capsys.readouterr().out
    ((row, noise),) = calibration.read(Path(".lora_bench/calibration.json")).scenarios.items()
    assert (row.partition("-")[0], len(noise.location)) == ("separate[reference", 7)

    ScriptedServer.seconds["head"] = 1.045
    assert run() == 0  # within what equals differ by
    ScriptedServer.seconds["head"] = 1.2
    assert run() == 1
    ScriptedServer.seconds["head"] = 1.045
    assert run("--rank", "4") == 1  # of that nothing is known
    assert "is not calibrated for this machine" in capsys.readouterr().out


def test_what_is_settled_is_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedServer.faults["base", "prefill"] = Broken("base", "wrong", "it is not LoRA")
    seen: list[int] = []
    monkeypatch.setattr("lora_bench.report.duels.heard", lambda _: seen.append(len(kept())))

    run("--phase", "prefill,decode")

    assert seen[:3] == [0, 1, 1]


def test_a_calibration_that_cannot_be_kept_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calibration.Calibration, "write", full)

    assert main(["calibrate", "--model", "micro", "--lora-device", "cpu", "--pairs", "7"]) == 1
    told = capsys.readouterr()
    assert "equals differ by up to 0.0 %" in told.out
    assert "kept in" not in told.out
    assert "lora-bench: .lora_bench/calibration.json could not be written: No space left" in told.err


@pytest.mark.parametrize(("kind", "code"), [("", 1), ("gpu_lost", 7)])
def test_records_that_are_not_whole_are_told(
    kind: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    if kind:
        ScriptedServer.faults["head", "decode"] = Broken("head", kind, "it is gone")

    assert run() == code
    assert "lora-bench ab: they are not whole: " in capsys.readouterr().err


def test_calibrations_of_one_machine_are_kept_together() -> None:
    for phase in ("decode", "prefill"):
        arguments = ["--model", "micro", "--lora-device", "cpu", "--pairs", "7", "--phase", phase]
        assert main(["calibrate", *arguments]) == 0

    assert len(calibration.read(Path(".lora_bench/calibration.json")).scenarios) == 2


def test_a_worker_s_text_cannot_begin_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    ScriptedServer.faults["head", "decode"] = Broken("head", "wrong", "one\n::error::forged")

    assert run() == 1

    assert "one ::error::forged" in (said := capsys.readouterr().out)
    assert not [line for line in said.splitlines() if line.startswith("::")]


def test_a_calibration_of_another_machine_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ScriptedServer.seconds["head"] = 1.05
    assert main(["calibrate", "--model", "micro", "--lora-device", "cpu", "--pairs", "7"]) == 0
    monkeypatch.setattr(machine, "fingerprint", lambda _: {"hard": {"device": "another"}})

    assert run() == 1
    assert "is not calibrated for this machine" in capsys.readouterr().out


def test_a_calibration_takes_7_to_50_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", "--pairs", "6"])
    assert main(["calibrate", "--pairs", "51"]) == 2

    said = capsys.readouterr().err
    assert "must be at least 7, got 6" in said
    assert "must be at most 50, got 51" in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 9}',
        '{"schema": 1, "hard": {}, "scenarios": []}',
        '{"schema": 1, "hard": {}, "scenarios": {"a": {}}}',
        *(
            json.dumps({"schema": 1, "hard": {}, "scenarios": {"a": {"location": location, "tail": tail}}})
            for location, tail in [
                ([], []),
                ([0.0] * 6, []),
                ([3.0] * 7, []),
                (["x"] * 7, []),
                ([math.nan] * 7, []),
                ([0.0] * 7, [math.inf]),
                (5, []),
            ]
        ),
    ],
)
def test_what_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        calibration.read(path)


def test_how_many_other_packages_differ_is_told() -> None:
    sides: list[dict[str, Any]] = [{"packages": {"torch": version, "six": version, "attrs": "1"}} for version in "12"]

    assert differences(*sides) == "torch 1 -> 2, 1 other package"
    sides[1]["packages"]["attrs"] = "2"
    assert differences(*sides) == "torch 1 -> 2, 2 other packages"
