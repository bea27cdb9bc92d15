"""Promotion: only what passed becomes a baseline, by hand, and the last ten of a machine are kept."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_bench.__main__ import main
from lora_bench.bench.records import read
from lora_bench.gate.figures import load
from lora_bench.gate.promote import promote
from tests.kept_runs import HARD, MINE, ROWS, keep, lines
from tests.micro_rows import row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of baselines with a first run, "first"."""
    made = promote(keep(tmp_path / "first.jsonl", lines()), tmp_path / "kept", first=True)
    assert made.code == 0
    return tmp_path / "kept"


def run(folder: Path, name: str = "new", **of: Any) -> Path:
    return keep(folder.parent / f"{name}.jsonl", lines(**of))


def kept(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.jsonl"))


def test_a_promoted_run_is_a_copy_with_one_record_more(folder: Path) -> None:
    path = run(folder)
    made = promote(path, folder)
    assert made.target is not None
    *records, promotion = read(made.target)

    assert records == read(path)
    assert (promotion["quantity"], promotion["begins"], promotion["accepted"]) == ("promotion", False, "")
    assert {line["verdict"] for line in promotion["compared"]} == {"pass"}
    assert (made.code, kept(folder)) == (0, ["first", "new"])
    assert not list(folder.rglob("*.part"))


def test_the_first_on_a_machine_must_be_said_to_be(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"kept has no baseline of A-GPU-.*: where this is to be the first, say --first"
    ):
        promote(run(folder, hard=HARD | {"driver": "590"}), folder)
    with pytest.raises(ValueError, match="say --first"):
        promote(run(folder), folder.parent / "empty")

    assert promote(run(folder, hard=HARD | {"driver": "590"}), folder, first=True).code == 0
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("seconds", "code"), [(1.02, 0), (1.04, 1), (0.9, 0)])
def test_what_regressed_is_never_the_baseline(folder: Path, seconds: float, code: int) -> None:
    made = promote(run(folder, seconds=seconds), folder, first=True)

    assert (made.code, made.target is None) == (code, bool(code))
    assert kept(folder) == (["first"] if code else ["first", "new"])


def test_not_beside_other_scenarios_either(folder: Path) -> None:
    more = (*ROWS, row("other", "separate", "decode"))

    assert promote(run(folder, seconds=1.04, rows=more), folder, first=True).code == 1
    assert promote(run(folder, seconds=1.02, rows=more), folder, first=True).code == 0


def test_a_regression_is_accepted_for_a_reason_that_stays_and_begins_a_history(folder: Path) -> None:
    made = promote(run(folder, seconds=1.5), folder, accepted="a safer kernel")
    assert made.target is not None
    told = read(made.target)[-1]

    assert (told["accepted"], told["begins"]) == ("a safer kernel", True)
    assert [line["verdict"] for line in told["compared"]] == ["pass", "pass", "REGRESSION"]
    assert promote(run(folder, "next", seconds=1.5), folder).code == 0
    assert promote(run(folder, "slow", seconds=1.6), folder).code == 1


def test_a_reason_without_a_regression_is_not_kept(folder: Path) -> None:
    made = promote(run(folder), folder, accepted="just in case")
    assert made.target is not None

    assert (read(made.target)[-1]["accepted"], read(made.target)[-1]["begins"]) == ("", False)


def test_a_reason_accepts_nothing_but_a_regression(folder: Path) -> None:
    told = [each | {"memory": {"allocated_peak_bytes": 5}} if "memory" in each else each for each in lines(seconds=1.5)]
    made = promote(keep(folder.parent / "new.jsonl", told), folder, accepted="reason")

    assert (made.code, made.target) == (6, None)


Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def each(**fields: Any) -> Change:
    """Other fields in the times of the row that is judged."""
    return lambda told: [
        one | fields if one["quantity"] == "latency" and one["subject"] == "mine" else one for one in told
    ]


UNFIT: dict[str, tuple[Change, str]] = {
    "not measured": (lambda told: told[:-2], "not measured"),
    "failed": (
        lambda told: [*told[:-2], told[-2] | {"quantity": "failure", "kind": "oom", "text": "oom: none left"}],
        "oom: none left",
    ),
    "not proven": (each(correctness=None), "not proven right"),
    "proven wrong": (
        each(correctness={"checks": 7, "error_ratio": 1.5, "visibility": 9.0}),
        "proven wrong: its error is 1.5 of the bound",
    ),
    "throttled": (each(window={"throttled": True}), "the clock was throttled (no reason told)"),
    "not weighed": (lambda told: told[:-1], "its memory was not measured"),
    "weighed in vain": (
        lambda told: [*told[:-1], told[-1] | {"memory": {"attribution": "unavailable (crashed: x)"}}],
        "its memory was not measured",
    ),
}


@pytest.mark.parametrize(("change", "why"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("reason", ["", "a reason"])
def test_a_run_that_is_not_whole_and_right_is_unfit(folder: Path, change: Change, why: str, reason: str) -> None:
    path = keep(folder.parent / "new.jsonl", change(lines()))
    made = promote(path, folder, first=True, accepted=reason)

    assert (made.code, made.target, made.faults) == (1, None, [f"{MINE}: {why}"])
    assert kept(folder) == ["first"]


def test_what_is_no_run_is_refused(folder: Path) -> None:
    whole = run(folder).read_bytes()
    (folder.parent / "new.jsonl").write_bytes(whole[:-5])
    (promoted,) = folder.rglob("*.jsonl")

    with pytest.raises(ValueError, match=r"new.jsonl is cut off"):
        promote(folder.parent / "new.jsonl", folder)
    with pytest.raises(ValueError, match=r"wanted the records of a run \(.jsonl\), got .*x.json"):
        promote(folder / "x.json", folder)
    with pytest.raises(ValueError, match="there is no file"):
        promote(folder / "absent.jsonl", folder)
    with pytest.raises(ValueError, match="is a baseline already"):
        promote(promoted, folder)
    with pytest.raises(ValueError, match="first was promoted before"):
        promote(folder.parent / "first.jsonl", folder)


def test_beside_a_broken_baseline_nothing_is_promoted(folder: Path) -> None:
    (folder / "broken.jsonl").write_text("{]\n")
    made = promote(run(folder), folder, first=True, accepted="reason")

    assert (made.code, made.target) == (6, None)
    assert [line.name for line in made.lines if line.verdict == "NOT COMPARABLE"] == ["broken.jsonl"]


def test_the_last_ten_of_a_machine_are_kept_and_the_one_that_began_the_history(folder: Path) -> None:
    promote(run(folder, "other", hard=HARD | {"driver": "590"}), folder, first=True)
    deleted = [promote(run(folder, f"{number:02}"), folder).deleted for number in range(11)]

    assert [[path.stem for path in each] for each in deleted] == [*[[]] * 10, ["00"]]
    assert kept(folder) == [*(f"{number:02}" for number in range(1, 11)), "first", "other"]


def test_a_full_disk_leaves_the_baselines_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        promote(run(folder), folder)

    assert kept(folder) == ["first"]
    assert not list(folder.rglob("*.part"))


def test_a_promotion_keeps_a_digest_of_the_records_before_it(folder: Path) -> None:
    path = run(folder)
    made = promote(path, folder)
    assert made.target is not None

    assert read(made.target)[-1]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    made.target.write_text(made.target.read_text().replace("0.5", "1.0"))
    with pytest.raises(ValueError, match=r"new.jsonl was changed after it was promoted"):
        load(made.target)


# --- as it is typed -------------------------------------------------------------------------------------------------


def test_the_verb_tells_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder)

    assert main(["promote", "new", str(folder), "--lora-output", str(folder.parent)]) == 0
    assert "/new.jsonl (3 comparisons passed)\n" in capsys.readouterr().out
    for number in range(10):
        assert main(["promote", str(run(folder, str(number))), str(folder)]) == 0
    assert "/new.jsonl (the last ten are kept, and the first)\n" in capsys.readouterr().out


def test_the_first_is_told_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = keep(tmp_path / "new.jsonl", lines())

    assert main(["promote", str(path), str(tmp_path / "kept"), "--first"]) == 0
    assert capsys.readouterr().out.endswith("/new.jsonl (the first of its kind)\n")


def test_the_verb_says_why_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", str(run(folder, seconds=1.04)), str(folder)]) == 1
    assert main(["promote", str(keep(folder.parent / "bad.jsonl", lines()[:-2])), str(folder)]) == 1
    told = capsys.readouterr().out

    assert f"REGRESSION     {MINE}: x base 2.000" in told
    assert f"unfit          {MINE}: not measured\n" in told
    assert told.count("\nnot promoted: ") == 2
    assert main(["promote", "absent", str(folder)]) == 2
    assert "lora-bench promote: there is no file .lora_bench/absent.jsonl" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_usage_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = run(folder)
    monkeypatch.setattr(Path, "mkdir", read_only)

    assert main(["promote", str(path), str(folder)]) == 2
    assert f"{folder} cannot be written: Read-only file system" in capsys.readouterr().err
