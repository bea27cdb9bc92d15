"""The command line: what an implementer types, and what comes back."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_bench import REFERENCE, Case, __version__
from lora_bench.__main__ import main
from lora_bench.adapter import read
from lora_bench.commands.arguments import writable
from lora_bench.commands.conform import exit_code
from lora_bench.conformance import CHECKS, Verdict, docket, find_check
from lora_bench.conformance.zoo import SPECIMENS
from tests.plug_in import PLUG_IN, WRONG

FEW = ("matches_definition", "keeps_dtype", "keeps_leading_dimensions", "leaves_input_untouched", "disabled_is_base")


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the plug-in, in the present folder."""
    monkeypatch.chdir(tmp_path)
    Path("acme.py").write_text(PLUG_IN)
    return "acme.py:ACME"


@pytest.fixture
def wrong(acme: str) -> str:
    """The address of a plug-in with a bug."""
    Path("wrong.py").write_text(WRONG)
    return "wrong.py:ACME"


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (*(find_check(f"forward.{name}") for name in FEW), find_check("state.survives_deepcopy"))
    monkeypatch.setattr(docket, "checks_for", lambda _subject: few)


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys, lora_bench.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert "conform" in shown
    assert "replay" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"lora-bench {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("conform --lora-subject nobody", "no subject is called 'nobody'"),
        ("conform --lora-subject nowhere.py:ACME", "there is no file nowhere.py"),
        ("replay nobody merge.twice_is_once 't1 i1'", "no subject is called 'nobody'"),
        ("replay reference merge.thrice 't1 i1'", "no check is called 'merge.thrice'; the nearest are merge"),
        ("replay reference merge.twice_is_once 't1 z1'", "'z1' is no part of a case"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(arguments)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"lora-bench {arguments.split(maxsplit=1)[0]}: ")
    assert sentence in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["", "conform nobody", "replay reference"])
def test_a_command_that_is_none_shows_the_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments.split())
    assert capsys.readouterr().err.startswith("usage: lora-bench")


def test_conform_prints_a_line_for_each_check_and_a_summary(
    acme: str, few_checks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conform", "--lora-subject", acme, "--lora-subject", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"torch \S+, cpu; a float32 product keeps its operands .*", lines[0])
    assert lines[2] == "acme"
    assert re.fullmatch(r"  conforms      forward\.matches_definition +error 0\.\d\d of the bound", lines[3])
    assert re.fullmatch(r"  conforms      forward\.keeps_dtype", lines[4])
    assert re.fullmatch(r"  not offered   forward\.disabled_is_base +no enable", lines[7])
    assert lines[10] == "reference"
    assert lines[-3:] == [
        "lora_bench: acme 5 of 6 checks conform, 0 fail, 1 not offered (no enable)",
        "lora_bench: reference 6 of 6 checks conform, 0 fail",
        "table and verdicts: .lora_bench/conformance.md, .lora_bench/conformance.json",
    ]
    table = Path(".lora_bench/conformance.md").read_text()
    assert "| check | acme | reference |" in table
    assert "| forward.disabled_is_base | - | yes |" in table
    kept = json.loads(Path(".lora_bench/conformance.json").read_text())
    assert kept["schema"] == "lora-bench/conformance/1"
    assert [entry["status"] for entry in kept["subjects"]["acme"]] == ["conforms"] * 4 + ["not_offered", "conforms"]


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_judged(
    acme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert main(["conform", "--lora-subject", acme, "--lora-output", "file/folder"]) == 2
    assert (
        capsys.readouterr().err
        == "lora-bench conform: --lora-output: wanted a folder that can be written, got file/folder: Not a directory\n"
    )


def test_two_processes_may_try_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Path.unlink

    def with_another(tried: Path, missing_ok: bool = False) -> None:
        with monkeypatch.context() as other:
            other.setattr(Path, "unlink", remove)
            other.setattr(os, "getpid", lambda: -1)
            writable(str(tmp_path))
        remove(tried, missing_ok)

    monkeypatch.setattr(Path, "unlink", with_another)
    assert writable(str(tmp_path)) == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--lora-examples 0", "argument --lora-examples: must be at least 1, got 0"),
        ("--lora-examples many", "argument --lora-examples: invalid int value: 'many'"),
        ("--lora-timeout -1", "argument --lora-timeout: must be at least 0, got -1"),
        ("--lora-timeout nan", "argument --lora-timeout: must be at least 0, got nan"),
        ("--lora-timeout inf", "argument --lora-timeout: must be finite, got inf"),
    ],
)
def test_a_wrong_number_is_said(option: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["conform", *option.split()])
    assert sentence in capsys.readouterr().err


def test_the_replay_command_of_a_failure_shows_it_again(
    wrong: str, few_checks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conform", "--lora-subject", wrong]) == 1
    told = capsys.readouterr().out
    start, end = told.index("acme does not conform"), told.index("\n\nlora_bench: acme")
    message = told[start:end]
    command = shlex.split(message.splitlines()[-1].removeprefix("  replay "))
    assert command[:4] == ["lora-bench", "replay", "wrong.py:ACME", "forward.matches_definition"]
    saved = Path(".lora_bench/failures/acme/forward.matches_definition")
    assert f"  saved      {saved}\n" in message
    assert "  resembles  `" in message
    assert read(saved).modules["layer"].spec == Case.parse(command[4]).spec
    assert (saved / "verdict.txt").read_text().startswith("acme does not conform: forward.matches_definition\n")

    assert main(command[1:]) == 1
    assert capsys.readouterr().out == message.replace(f"  saved      {saved}\n", "") + "\n"


def test_a_case_that_holds_replays_as_such(acme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", acme, "forward.matches_definition", "t1 i1 o1 r1 a1 fp64 s0"]) == 0
    assert capsys.readouterr().out == "conforms\n"


def test_what_cannot_be_kept_costs_no_verdict(
    acme: str, few_checks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".lora_bench").mkdir()
    Path(".lora_bench/conformance.json").write_text("as it was")
    fill(monkeypatch)

    assert main(["conform", "--lora-subject", acme, "--lora-subject", "reference"]) == 1
    told = capsys.readouterr()
    assert "lora_bench: reference 6 of 6 checks conform, 0 fail\n" in told.out
    assert "lora-bench: .lora_bench/conformance.json could not be written: No space left" in told.err
    assert [(path.name, path.read_text()) for path in Path(".lora_bench").iterdir()] == [
        ("conformance.json", "as it was")
    ]


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: of a text the beginning arrives."""
    write = Path.write_text

    def full(path: Path, text: str, **how: Any) -> int:
        write(path, text[:9], **how)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)


def test_a_verb_that_the_system_stops_says_so_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", full)
        code = main(["estimate", "--model", "micro"])
    assert (code, capsys.readouterr().err) == (1, "lora-bench estimate: [Errno 28] No space left on device\n")


def test_a_case_that_cannot_be_judged_is_neither_right_nor_wrong(acme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", acme, "merge.equals_definition", "t1 i1 o1 r1 a1 fp64 s0"]) == 6
    assert capsys.readouterr().out.startswith("acme is not judged (not offered): merge.equals_definition\n")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ("conforms conforms", 0),
        ("conforms not_offered", 0),
        ("not_offered not_offered", 6),
        ("conforms inconclusive", 6),
        ("inconclusive fails blocked", 1),
        ("conforms error", 1),
    ],
)
def test_exit_codes(statuses: str, code: int) -> None:
    assert exit_code([Verdict("acme", CHECKS[0], status) for status in statuses.split()]) == code  # type: ignore[arg-type]


def test_selftest_tells_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_bench.conformance import selftest

    specimen = next(each for each in SPECIMENS if str(each) == "forward.keeps_dtype: fp32 comes out")
    hunts = list(selftest.hunt([specimen], examples=5))
    monkeypatch.setattr(selftest, "hunt", lambda: iter(hunts))
    monkeypatch.setattr(selftest, "idle", lambda _hunts: [])
    monkeypatch.setattr(selftest, "RIGHT", {"reference": replace(REFERENCE, layers=("embedding",))})
    monkeypatch.chdir(tmp_path)

    assert main(["selftest", "--correct-examples", "2"]) == 0
    told = capsys.readouterr().out
    assert "planted bugs: 1 of 1 found by the checks that they name (100.0%)" in told
    assert re.search(r"false alarms: 0 in \d+ cases on 1 correct implementations", told)
    assert Path(".lora_bench/selftest.txt").read_text() in told
    fill(monkeypatch)
    assert main(["selftest", "--correct-examples", "2"]) == 1
    assert "lora-bench: .lora_bench/selftest.txt could not be written" in capsys.readouterr().err


def test_the_help_of_replay_says_what_a_case_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["replay", "--help"])

    said = " ".join(capsys.readouterr().out.split())
    assert "A case is made of tN (tokens), iN (d_in), oN (d_out), rN (rank), aN (alpha)" in said
    for word in ("kernelN", "fp16", "rslora", "conv2d", "circular", "ops=VERB,VERB"):
        assert f", {word}" in said
