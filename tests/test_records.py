"""Records are appended and complete after every single one; a run that was cut off goes on with them."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench import records as recording
from lora_bench.bench.records import SCHEMA, Records, command, read


def test_every_record_is_on_the_disk_when_append_returns(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "folder")
    records.append(quantity="latency", samples_seconds=[0.1, 0.2])
    first = records.path.read_text()
    records.append(quantity="memory")

    one, two = map(json.loads, records.path.read_text().splitlines())
    assert records.path.read_text().startswith(first)
    assert (one["quantity"], one["samples_seconds"], two["quantity"]) == ("latency", [0.1, 0.2], "memory")
    assert one["schema"] == SCHEMA
    assert one["run_id"] == two["run_id"] == records.path.stem


def test_two_runs_never_share_a_file(tmp_path: Path) -> None:
    assert Records(tmp_path).path != Records(tmp_path).path


def test_a_file_in_the_place_of_the_folder_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")

    with pytest.raises(OSError, match="taken"):
        Records(tmp_path / "taken")


def test_records_are_no_secret(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = Records(tmp_path).path
    finally:
        os.umask(before)

    assert stat.filemode(path.stat().st_mode) == "-rw-r--r--"


# --- full disk ------------------------------------------------------------------------------------------------------


def fill(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> None:
    """As on a full disk: the line is begun, and what says that it has arrived fails."""

    def fsync(_file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


def test_what_cannot_be_written_is_told_once_and_leaves_no_half_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    records.append(quantity="plan")
    before = records.path.read_bytes()
    assert not records.unwritten

    with monkeypatch.context() as full:
        fill(full)
        records.append(quantity="latency")
        fill(full, errno.EIO)
        records.append(quantity="memory")
    assert records.unwritten == f"{records.path}: No space left on device"
    assert records.path.read_bytes() == before
    records.append(quantity="failure")
    assert [record["quantity"] for record in read(records.path)] == ["plan", "failure"]


def test_a_folder_that_is_gone_is_told_as_well(tmp_path: Path) -> None:
    records = Records(tmp_path / "out")
    records.path.unlink()
    records.path.parent.rmdir()
    records.append(quantity="plan")

    assert records.unwritten == f"{records.path}: No such file or directory"


def test_a_folder_that_can_no_longer_be_looked_into_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    records = Records(tmp_path)
    with monkeypatch.context() as gone:
        gone.setattr(Path, "stat", stat)
        records.append(quantity="plan")
    assert records.unwritten == f"{records.path}: Stale file handle"


# --- read and resumed -----------------------------------------------------------------------------------------------


def begun(folder: Path) -> Records:
    records = Records(folder)
    records.append(quantity="plan", rows=[])
    records.append(quantity="memory", memory={})
    return records


@pytest.mark.parametrize("by", ["id", "file"])
def test_a_run_goes_on_in_its_file_under_its_id(tmp_path: Path, by: str) -> None:
    first = begun(tmp_path)
    again = Records(tmp_path if by == "id" else tmp_path / "other", first.run_id if by == "id" else str(first.path))
    again.append(quantity="latency")

    assert (again.path, again.run_id) == (first.path, first.run_id)
    assert [record["quantity"] for record in again.earlier] == ["plan", "memory"]
    assert [record["quantity"] for record in read(first.path)] == ["plan", "memory", "latency"]
    assert {record["run_id"] for record in read(first.path)} == {first.run_id}


@pytest.mark.parametrize("rest", ['{"schema": 2, "quan', "{", '{"schema": 2, "quantity": "memory"}', "\x00"])
def test_a_last_line_without_its_end_is_taken_away(tmp_path: Path, rest: str) -> None:
    first = begun(tmp_path)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole + rest.encode())

    assert len(read(first.path)) == 2
    again = Records(tmp_path, first.run_id)
    assert first.path.read_bytes() == whole
    again.append(quantity="latency")
    assert len(read(first.path)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2, is no record: '{'"),
        (b"", "line 2, is no record: ''"),
        (b"[1, 2]", "line 2, is no record: '[1, 2]'"),
        (b"7", "line 2, is no record: '7'"),
        (b'{"quantity": "plan"}', "line 2, is no record: "),
        (b'{"schema": 2}', "line 2, is no record: "),
        (b'{"schema": 1, "quantity": "plan"}', "line 2, is of schema 1, wanted 2"),
        (b'{"schema": 3, "quantity": "plan"}', "line 2, is of schema 3, wanted 2"),
        (b"\xff\xfe", " cannot be read: 'utf-8' codec can't decode"),
        (b"x" * 100, "line 2, is no record: '" + "x" * 60 + "'"),
        (b"[" * 100_000, "line 2, is no record: '" + "[" * 60 + "'"),
        (b'{"schema": 1, "quantity": "memory", "workload": [1]}', "line 2, is no record: unsupported operand"),
        (b'{"schema": 1, "quantity": "memory"}', "line 2, is no record: it lacks 'workload'"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_its_file(tmp_path: Path, line: bytes, message: str) -> None:
    records = begun(tmp_path)
    first, second = records.path.read_bytes().splitlines()
    records.path.write_bytes(b"\n".join([first, line, second, b""]))

    for attempt in (lambda: read(records.path), lambda: Records(tmp_path, records.run_id)):
        with pytest.raises(ValueError, match=r"\.jsonl") as error:
            attempt()
        assert str(error.value).startswith(str(records.path))
        assert message in str(error.value)
    assert records.path.read_bytes() == b"\n".join([first, line, second, b""])


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("absent", "there is no run {folder}/absent.jsonl"),
        ("{folder}/absent.jsonl", "there is no run {folder}/absent.jsonl"),
        ("empty", "{folder}/empty.jsonl holds no plan of a run to go on with"),
        ("planless", "{folder}/planless.jsonl holds no plan of a run to go on with"),
        ("folder", "{folder}/folder.jsonl cannot be read: "),
    ],
)
def test_a_run_that_cannot_be_gone_on_with_is_named(tmp_path: Path, resume: str, message: str) -> None:
    record: dict[str, Any] = {"schema": SCHEMA, "quantity": "latency"}
    (tmp_path / "planless.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()

    with pytest.raises(ValueError, match=r"\.jsonl") as error:
        Records(tmp_path, resume.format(folder=tmp_path))
    assert str(error.value).startswith(message.format(folder=tmp_path))
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_run_whose_file_cannot_be_written_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(tmp_path)
    opened = Path.open

    def read_only(path: Path, mode: str = "r", **how: Any) -> Any:
        if mode not in ("r", "rb"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, mode, **how)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(ValueError, match=rf"^{first.path} cannot be written: Read-only file system$"):
        Records(tmp_path, first.run_id)


# --- two processes --------------------------------------------------------------------------------------------------

BEGIN = """
import sys
from pathlib import Path
from lora_bench.bench.records import Records
records = Records(Path(sys.argv[1]), *sys.argv[2:])
records.append(quantity="plan", rows=[])
print(records.run_id, flush=True)
sys.stdin.read()
"""


def other(*arguments: str) -> subprocess.Popen[str]:
    """Another process that begins a run, or goes on with one, and holds it until it is killed."""
    command = [sys.executable, "-c", BEGIN, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


def test_what_another_process_writes_is_left_alone_until_that_is_killed(tmp_path: Path) -> None:
    with other(str(tmp_path)) as writer:
        assert writer.stdout is not None
        run_id = writer.stdout.readline().strip()
        path = tmp_path / f"{run_id}.jsonl"
        with path.open("a") as file:
            file.write('{"schema": 2, "quan')  # as in the middle of a line
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"^the run {run_id} is being written by another process$"):
                Records(tmp_path, run_id)
        assert path.read_bytes() == before
        writer.kill()

    assert len(Records(tmp_path, run_id).earlier) == 1
    Records(tmp_path, run_id)  # which is of this process, as before


def test_a_run_that_goes_on_is_held_as_well(tmp_path: Path) -> None:
    run_id = begun(tmp_path).run_id
    again = subprocess.run(
        [sys.executable, "-c", BEGIN, str(tmp_path), run_id],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert again.stderr.endswith(f"ValueError: the run {run_id} is being written by another process\n")


def test_where_files_cannot_be_locked_a_run_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(Records(tmp_path, begun(tmp_path).run_id).earlier) == 2


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["/venv/bin/python", "-m", "pytest", "suites/gpu", "-k", "a or b"], "python -m pytest suites/gpu -k 'a or b'"),
        (["python", "-m", "pytest"], "python -m pytest"),
        (["/venv/bin/python3", "/venv/bin/lora-bench", "ab"], "lora-bench ab"),
        (["/usr/bin/python3", "measure.py"], "python3 measure.py"),
        (["python"], "python"),
    ],
)
def test_the_command_is_told_without_the_folders_of_programs(typed: list[str], told: str) -> None:
    assert command(typed) == told


def test_the_first_record_tells_the_command(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.append(quantity="one")
    records.append(quantity="other")

    first, second = read(records.path)
    assert first["command"] == command(sys.orig_argv)
    assert "command" not in second


@pytest.mark.parametrize(
    ("began", "now", "told"),
    [
        ({"sha": "a" * 40, "dirty": False}, {"sha": "a" * 40, "dirty": False}, ""),
        (None, None, ""),
        (
            {"sha": "a" * 40, "dirty": False},
            {"sha": "b" * 40, "dirty": True},
            "it began at commit aaaaaaaaaaaa, and here it is commit bbbbbbbbbbbb with changes",
        ),
        (None, {"sha": "b" * 40, "dirty": False}, "it began at no commit, and here it is commit bbbbbbbbbbbb"),
    ],
)
def test_a_run_that_goes_on_elsewhere_in_the_history_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: Any, now: Any, told: str
) -> None:
    monkeypatch.setattr(recording, "git_state", lambda: began)
    first = Records(tmp_path)
    first.append(quantity="plan")
    recording.unlock(first.path)
    monkeypatch.setattr(recording, "git_state", lambda: now)

    assert first.moved == ""
    assert Records(tmp_path, first.run_id).moved == told
