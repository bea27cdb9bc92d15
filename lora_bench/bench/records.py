"""Results as JSON lines, appended and flushed as they are made: a killed run loses nothing that it had finished."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.bench.upgrade import TODAY, upgrade

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = TODAY
ROOM = 16 << 20
"""Bytes that must be free where the records go: the largest matrix with all its samples takes less."""
_locked: dict[Path, int] = {}
"""Of this process: the descriptors that hold the runs it writes. The system lets go of them when the process ends."""


class Records:
    """The record file of one run, `folder`/`run_id`.jsonl; with `resume` that of an earlier run, to be gone on with.

    `resume` is the run's id or its file, and `earlier` what it has written. A last line that was cut off is taken away.
    Where a record cannot be written the run goes on, and `unwritten` says why: what is measured is still told. The
    file is locked until this process ends, however it ends.

    Raises OSError where the file cannot be made, and ValueError where there is no such run, or one that cannot be gone
    on with: another process writes it, it cannot be written, another schema, a line that is no record, no plan.
    """

    def __init__(self, folder: Path, resume: str | None = None) -> None:
        self.earlier: list[dict[str, Any]] = []
        self.unwritten = ""
        if resume is None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}.jsonl"
            self.path.touch(exist_ok=False)
            lock(self.path)
        else:
            self.path = Path(resume) if resume.endswith(".jsonl") else folder / f"{resume}.jsonl"
            lock(self.path)  # before it is read: another process may be in the middle of a line
            self.earlier = read(self.path)
            if not any(record["quantity"] == "plan" for record in self.earlier):
                raise ValueError(f"{self.path} holds no plan of a run to go on with")
            self._mend()
        self.run_id = self.path.stem
        self._common = {"schema": SCHEMA, "run_id": self.run_id, "git": git_state()}

    @property
    def moved(self) -> str:
        """Where the working directory's commit is another than when the run began; empty where it is not."""
        began, now = (_commit(each) for each in (self.earlier[-1:] and self.earlier[0].get("git"), self._common["git"]))
        return f"it began at {began}, and here it is {now}" if self.earlier and began != now else ""

    def _mend(self) -> None:
        """Take away the line that a killed run was writing; ValueError where nothing could be written after it."""
        whole = self.path.read_bytes()
        try:
            with self.path.open("r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}") from None

    def append(self, **fields: Any) -> None:
        """Write one record and force it to the disk; the first of a file tells the command as well."""
        record = self._common | {"time": datetime.now(UTC).isoformat(timespec="seconds")} | fields
        size = None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            record |= {} if size else {"command": command(sys.orig_argv)}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.unwritten = self.unwritten or f"{self.path}: {error.strerror}"
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # or the next record would end a line that this one has begun


def command(arguments: Sequence[str]) -> str:
    """What was typed, by the arguments of the interpreter, without the folders of Python and of installed programs."""
    python, *rest = arguments
    if rest and Path(rest[0]).is_absolute() and Path(rest[0]).parent == Path(python).parent:
        return shlex.join([Path(rest[0]).name, *rest[1:]])
    return shlex.join([Path(python).name, *rest])


def lock(path: Path) -> None:
    """Hold a record file for this process, which may hold it already; nothing where it cannot be opened or locked.

    Raises ValueError where another process holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return  # whoever reads or writes it says why
    unlock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"the run {path.stem} is being written by another process") from None
    except OSError:  # of a file system without locks
        os.close(descriptor)
        return
    _locked[path.resolve()] = descriptor


def unlock(path: Path) -> None:
    """Let go of a record file, if this process holds it."""
    if (descriptor := _locked.pop(path.resolve(), None)) is not None:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a run in today's schema, without a last line that was cut off.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(f"there is no run {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line's end is nothing, or cut off
        try:
            record = json.loads(line)
            _ = record["schema"], record["quantity"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}, is no record: {line[:60]!r}") from None
        try:
            records.append(upgrade(record))
        except KeyError as error:
            raise ValueError(f"{path}, line {number}, is no record: it lacks {error}") from None
        except TypeError as error:
            raise ValueError(f"{path}, line {number}, is no record: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, {error}") from None
    return records


def git_state() -> dict[str, Any] | None:
    """The commit of the working directory and whether it has changes; None outside of a repository."""
    try:
        sha = _git("rev-parse", "HEAD")
        return {"sha": sha, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit(state: Any) -> str:
    """What `git_state` told, in short."""
    return f"commit {state['sha'][:12]}{' with changes' * bool(state.get('dirty'))}" if state else "no commit"


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout.strip()
