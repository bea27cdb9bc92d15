"""Records are appended and complete after every single one."""

import json
import os
import stat
from pathlib import Path

import pytest

from lora_bench.bench.records import SCHEMA, Records


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
