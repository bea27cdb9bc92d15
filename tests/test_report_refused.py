"""What `lora-bench report` cannot show is named, with its file, before anything is drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lora_bench.report.run import CONFORMANCE, load
from tests.made_records import comparison, run


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.jsonl", None, "there is no run"),
        ("empty.jsonl", "", "holds no result to report"),
        (
            "plan.jsonl",
            '{"schema": 2, "quantity": "plan"}\n',
            "cannot be reported: a plan record lacks or has too much: 'rows'",
        ),
        ("absent.json", None, "cannot be read: No such file"),
        ("other.json", "[]", "holds no verdicts of lora-bench conform"),
        ("new.json", '{"schema": "lora-bench/conformance/9", "subjects": {}}', "is of schema lora-bench/conformance/9"),
    ],
)
def test_what_cannot_be_reported_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


NESTED = json.loads("[" * 200 + "]" * 200)
ODD: dict[str, tuple[str, list[str | int], Any, str]] = {
    "a quantity": ("latency", ["quantity"], {}, "quantity must be a text, got '{}'"),
    "a subject": ("latency", ["subject"], None, "subject must be a text, got 'None'"),
    "a workload": ("plan", ["rows", 0, "workload"], [], "workload must be an object"),
    "a model": ("plan", ["rows", 0, "workload", "model"], 0, "workload.model must be a text, got '0'"),
    "a rank": ("memory", ["workload", "rank"], True, "workload.rank must be a whole number, got 'True'"),
    "a ceiling": ("ceilings", ["ceilings", "bytes_per_second"], [], "ceilings.bytes_per_second must be a number"),
    "no ceiling": ("ceilings", ["ceilings", "bytes_per_second"], 0, "ceilings.bytes_per_second must be above 0, got 0"),
    "a window": ("latency", ["window"], [[1]], "window must be an object, got '[[1]]'"),
    "what a window lacks": ("latency", ["window", "unavailable"], 7, "window.unavailable must be an object"),
    "why a clock was not read": (
        "latency",
        ["window", "unavailable"],
        {"clock": [1]},
        "window.unavailable.clock must be",
    ),
    "a counter": ("latency", ["window", "throttle_delta"], {"a": "x"}, "window.throttle_delta.a must be a number"),
    "a span": ("latency", ["window", "seconds"], "x", "window.seconds must be a number, got 'x'"),
    "parts": ("latency", ["parts_seconds"], "x", "parts_seconds must be an object, got 'x'"),
    "a part": ("latency", ["parts_seconds"], {"load": ["x"]}, "parts_seconds.load.0 must be a number, got 'x'"),
    "a proof": ("latency", ["correctness", "error_ratio"], "x", "correctness.error_ratio must be a number"),
    "joules": ("energy", ["energy", "joules_per_step"], math.nan, "energy.joules_per_step must be finite, got nan"),
    "bytes without end": ("memory", ["memory"], {"a": [10**400]}, "memory.a.0 must be finite, got 1000"),
    "a part without end": ("latency", ["parts_seconds"], {"load": [10**400]}, "parts_seconds.load.0 must be a number"),
    "what is nested": ("memory", ["memory"], {"a": NESTED}, "a memory record is nested deeper than 50"),
    "a fingerprint": ("memory", ["fingerprint", "hard"], True, "fingerprint.hard must be an object, got 'True'"),
    "git": ("memory", ["git"], [1], "git must be an object, got '[1]'"),
    "a commit": ("memory", ["git"], {"sha": 5}, "git.sha must be a text, got '5'"),
    "no commit": ("memory", ["git"], {"a": 5}, "a memory record lacks or has too much: 'sha'"),
    "a reason": ("failure", ["text"], 5, "text must be a text, got '5'"),
    "margins": ("ab", ["limits", "location", "fail"], [], "limits.location.fail must be a number, got '[]'"),
    "a margin": ("ab", ["limits", "tail", "accept"], 1e308, "limits.tail.accept must be from 0 to 10, got 1e+308"),
    "a pair": ("ab", ["attempts", 0, "pairs", 0, "head", 3], -1.0, "a pair's seconds are above 0"),
}


@pytest.mark.parametrize(("quantity", "at", "value", "message"), ODD.values(), ids=ODD.keys())
def test_a_record_with_something_odd_in_it_is_named(
    tmp_path: Path, quantity: str, at: list[str | int], value: Any, message: str
) -> None:
    path = comparison(tmp_path, 0.0) if quantity == "ab" else run(tmp_path, subjects=("reference",))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    place = next(line for line in lines if line["quantity"] == quantity)
    for name in at[:-1]:
        place = place[name]
    place[at[-1]] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("deep.jsonl", "[" * 100_000 + "\n", "deep.jsonl, line 1, is no record"),
        ("deep.json", "[" * 100_000, "deep.json cannot be read"),
    ],
)
def test_what_is_nested_without_end_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=said):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "subjects", [{"a": 5}, {"a": [5]}, {"a": [{"check": "x"}]}, {"a": [{"check": 1, "status": 2}]}]
)
def test_verdicts_that_are_none_are_named(tmp_path: Path, subjects: dict[str, Any]) -> None:
    path = tmp_path / "conformance.json"
    path.write_text(json.dumps({"schema": CONFORMANCE, "subjects": subjects}))

    with pytest.raises(ValueError, match=r"conformance.json cannot be reported"):
        load(path)
