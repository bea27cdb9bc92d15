"""Results as JSON lines, appended and flushed as they are made: a killed run loses nothing that it had finished."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1


class Records:
    """The record file of one run, `folder`/`run_id`.jsonl; raises OSError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{self.run_id}.jsonl"
        self.path.touch(exist_ok=False)
        self._common = {"schema": SCHEMA, "run_id": self.run_id, "git": git_state()}

    def append(self, **fields: Any) -> None:
        """Write one record and force it to the disk."""
        record = self._common | {"time": datetime.now(UTC).isoformat(timespec="seconds")} | fields
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def git_state() -> dict[str, Any] | None:
    """The commit of the working directory and whether it has changes; None outside of a repository."""
    try:
        sha = _git("rev-parse", "HEAD")
        return {"sha": sha, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout.strip()
