"""`lora-bench report`: what files it takes, and that every format tells what the records say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_bench.__main__ import main
from lora_bench.bench.records import read
from lora_bench.bench.result import Result
from lora_bench.bench.upgrade import upgrade
from lora_bench.bench.workload import Row
from lora_bench.report import findings
from lora_bench.report.cells import DETAILS
from lora_bench.report.compare import compared
from lora_bench.report.document import document, schema
from lora_bench.report.markdown import markdown
from lora_bench.report.run import Run, load
from lora_bench.report.table import render
from lora_bench.report.terminal import terminal
from tests.made_records import HOSTILE, comparison, run

PUBLISHED = Path(__file__).parents[1] / "reports"
OLD = PUBLISHED / "cpu-2-cores" / "records-2-threads.jsonl"
VERDICTS = PUBLISHED / "conformance" / "conformance.json"
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
TYPES |= {"integer": int, "number": (int, float)}


def faults(value: Any, rule: dict[str, Any], whole: dict[str, Any], at: str = "") -> list[str]:
    """Where `value` breaks a JSON Schema made of the few words that ours uses."""
    known = {"$schema", "$id", "$defs", "$ref", "title", "description", "type", "required", "additionalProperties"}
    assert rule.keys() <= known | {"properties", "items", "const", "enum"}
    if "$ref" in rule:
        return faults(value, whole["$defs"][rule["$ref"].removeprefix("#/$defs/")], whole, at)
    types = rule.get("type", [])
    names = [types] if isinstance(types, str) else types
    if names and not any(isinstance(value, TYPES[name]) and (name == "boolean") >= (value is True) for name in names):
        return [f"{at} is {type(value).__name__}, wanted {names}"]
    wrong = [f"{at} is {value}"] if value not in rule.get("enum", [rule.get("const", value)]) else []
    if isinstance(value, list):
        for number, each in enumerate(value):
            wrong += faults(each, rule.get("items", {}), whole, f"{at}[{number}]")
    if isinstance(value, dict):
        wrong += [f"{at} lacks {name}" for name in rule.get("required", []) if name not in value]
        others = rule.get("additionalProperties", {})
        for name, each in value.items():
            own = rule.get("properties", {}).get(name, others)
            wrong += [f"{at}.{name} is unknown"] if own is False else faults(each, own or {}, whole, f"{at}.{name}")
    return wrong


# --- reading --------------------------------------------------------------------------------------------------------


def test_records_of_the_first_schema_are_read() -> None:
    old = load(OLD)
    raw = [json.loads(line) for line in OLD.read_text().splitlines()]
    (first,) = {record["schema"] for record in raw}
    measured = {(record["subject"], record["workload"]["setup"], record["workload"]["phase"]): record for record in raw
                if record["quantity"] == "latency"}  # fmt: skip

    assert first == 1
    assert len(old.results) == len(measured) == 10
    for result in old.results.values():
        record = measured[result.row.subject, result.row.workload.setup, result.row.workload.phase]
        assert result.samples.seconds == record["samples_seconds"]
        assert len(result.seconds) == len(result.samples.seconds)
    said = [(record["workload"]["popularity"], record["workload"]["targets"]) for record in read(OLD)]
    assert set(said) == {("distinct", "all")}
    assert "2.984 [2.957, 3.012]" in render(old)
    assert findings.Unread("interruptions", "records of schema 1 did not note it", 10) in findings.unread(old)


@pytest.mark.parametrize("schema", [0, 3, "2", None])
def test_a_schema_that_there_never_was_is_refused(schema: object) -> None:
    with pytest.raises(ValueError, match=f"is of schema {schema}, wanted 2"):
        upgrade({"schema": schema, "quantity": "memory"})


def test_an_old_record_that_lacks_something_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text('{"schema": 1, "quantity": "latency", "workload": {}}\n')

    with pytest.raises(ValueError, match=r"old\.jsonl, line 1, is no record: it lacks 'samples_seconds'"):
        read(path)


def test_rows_that_were_planned_and_never_measured_are_told(tmp_path: Path) -> None:
    told = findings.failures(load(run(tmp_path)))

    assert told[-1] == findings.Failed(str([*load(run(tmp_path)).results][-1]), "not measured", findings.BEFORE)
    assert {each.kind for each in told} == {"oom", "crashed", "timeout", "wrong", "not measured"}
    assert not any(each.reason.startswith(each.kind) for each in told)


def test_a_row_whose_gpu_was_lost_says_so(tmp_path: Path) -> None:
    path = run(tmp_path)
    path.write_text(path.read_text().replace('"kind": "oom"', '"kind": "gpu_lost"'))

    assert "gpu_lost" in {each.kind for each in findings.failures(load(path))}


# --- formats --------------------------------------------------------------------------------------------------------


def test_the_json_keeps_to_its_schema(tmp_path: Path) -> None:
    paths = (run(tmp_path), OLD, comparison(tmp_path, 0.04), VERDICTS)
    kept = json.loads(json.dumps(document([load(path) for path in paths]), allow_nan=False))

    assert faults(kept, schema(), schema()) == []
    statuses = [row["status"] for row in kept["runs"][0]["rows"]]
    quantities = [json.loads(line)["quantity"] for line in paths[0].read_text().splitlines()]
    assert {name: statuses.count(name) for name in ("measured", "not measured")} == {
        "measured": quantities.count("latency"),
        "not measured": 1,
    }
    assert len(statuses) == quantities.count("latency") + quantities.count("failure") + 1
    assert faults({**kept, "runs": [{**kept["runs"][0], "rows": [{"name": 7}]}]}, schema(), schema())


def test_an_interval_that_too_few_samples_tell_has_no_ends_in_json(tmp_path: Path) -> None:
    path = run(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in [name for name in line if isinstance(line[name], list) and name != "rows"]:
            line[name] = line[name][:3]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row, *_) = document([load(path)])["runs"][0]["rows"]

    assert row["seconds"]["low"] is row["seconds"]["high"] is None


def looked_at(folder: Path) -> Run:
    """A run of which the first decode row waits for launches, the second has reasons, and one switches."""
    of = load(run(folder, subjects=("reference",), every=1000))
    first, second, third, *_ = (result for row, result in of.results.items() if row.workload.phase == "decode")
    first.launches = {"cold_seconds": [3e-3, 5e-3, 4e-3], "device_seconds": [1e-3], "launch_share": 0.75}
    second.launches = {"graph_seconds": "unavailable (it cannot be captured: a copy)", "launch_share": 0.25}
    for phase_of, parts in ((second, {"load": [1e-3] * 12}), (third, {})):
        row = Row("reference", replace(phase_of.row.workload, phase="switch"))
        of.results[row] = Result(row, phase_of.samples, phase_of.base, parts=parts)
    return of


def test_launches_and_the_parts_of_a_switch_are_medians_or_reasons_in_json(tmp_path: Path) -> None:
    kept = json.loads(json.dumps(document([looked_at(tmp_path)]), allow_nan=False))
    rows = [row for row in kept["runs"][0]["rows"] if row.get("launches") or row.get("parts_seconds")]

    assert faults(kept, schema(), schema()) == []
    assert [row["launches"] for row in rows] == [
        {"cold_seconds": 4e-3, "device_seconds": 1e-3, "launch_share": 0.75},
        {"graph_seconds": "unavailable (it cannot be captured: a copy)", "launch_share": 0.25},
        {},
    ]
    assert [row["parts_seconds"] for row in rows] == [{}, {}, {"load": 1e-3}]
    assert [row["bound"] and row["bound"]["by"] for row in rows] == ["launches", "bytes", None]


def test_a_row_without_them_says_why_among_what_could_not_be_read(tmp_path: Path) -> None:
    of = looked_at(tmp_path)
    measured = sum(result.measured for result in of.results.values())
    told = findings.unread(of)

    assert findings.Unread("graph seconds", "it cannot be captured: a copy", 1) in told
    assert findings.Unread("launches", findings.NOT_TOLD, measured - 2) in told
    assert findings.Unread("parts of a switch", findings.NOT_TOLD, 1) in told
    assert not [each for each in findings.unread(load(OLD)) if each.probe in ("launches", "parts of a switch")]


def test_markdown_has_their_columns_where_a_row_has_a_figure(tmp_path: Path) -> None:
    heads = [line for line in markdown([looked_at(tmp_path)]).splitlines() if line.startswith("| set-up")]

    assert [[name for name in head.strip("| ").split(" | ") if name in DETAILS] for head in heads] == [
        [],
        ["cold", "launch share"],
        ["load"],
    ]


def test_markdown_says_it_all_and_lets_no_html_through(tmp_path: Path) -> None:
    text = markdown([load(run(tmp_path)), load(VERDICTS), load(comparison(tmp_path, 0.04, attempts=2))])
    rows = [line for line in text.splitlines() if line.startswith("| batched |")]

    assert "<" not in text.replace("\\<", "")
    assert len(rows) == sum(row.workload.setup == "batched" for row in load(tmp_path / "made.jsonl").results)
    for heading in (
        "Recommendation",
        "Subjects ranked",
        "What was not measured",
        "What could not be read",
        "Conformance",
    ):
        assert f"## {heading}\n" in text
    assert "CUDA out of memory" in text
    assert "## separate" in text
    assert ": FAIL\n" in text
    assert "slower, and again with fresh pairs." in text
    widths = {line.count("|") for line in rows}
    assert len(widths) == 1


def test_in_markdown_nothing_that_a_record_says_is_a_link_a_name_or_a_formula(tmp_path: Path) -> None:
    image, odd = "PASS <img src=x onerror=alert(1)>", "see https://a.b or www.a.b, @somebody, me@a.b, $x$"
    path = comparison(tmp_path, 0.0)
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"verdict": image, "because": f"head: crashed: {odd}"}) + "\n")
    of = load(run(tmp_path, subjects=("reference",)))
    text = markdown([replace(of, device=image, origin={"time": image}), load(path)])

    assert "<" not in text.replace("\\<", "")
    assert text.count("PASS \\<img") == 5  # the device three times, the time, the verdict
    assert "see https\\://a.b or www\\.a.b, @&#8203;somebody, me@&#8203;a.b, \\$x\\$".replace("\\\\", "\\") in text


@pytest.mark.parametrize(
    ("kept", "because", "told"),
    [
        ("PASS", "it was fast", "INCONCLUSIVE"),
        ("INCONCLUSIVE", "it was not", "INCONCLUSIVE"),
        ("FAIL", "head: oom: none left", "FAIL"),
    ],
)
def test_a_comparison_s_verdict_is_that_of_its_pairs_unless_a_side_broke(
    tmp_path: Path, kept: str, because: str, told: str
) -> None:
    path = comparison(tmp_path, 0.04, pairs=3)
    now = {"verdict": kept, "because": because, "broken": kept == "FAIL"}
    path.write_text(json.dumps(json.loads(path.read_text()) | now) + "\n")
    of = load(path)
    found = compared(of.comparisons[0], "")

    assert found["verdict"] == document([of])["runs"][0]["comparisons"][0]["verdict"] == told
    assert f": {told}\n" in markdown([of])
    if told == "FAIL":
        assert found["because"] == because
    else:
        assert found["because"].startswith("it ended after 3 pairs, and 7 are the fewest that tell")
        assert found["because"].endswith("; but the record says PASS: it was fast") == (kept != told)


def test_in_the_terminal_no_line_is_wider_than_a_hundred_columns(tmp_path: Path) -> None:
    text = terminal([load(run(tmp_path)), load(VERDICTS), load(comparison(tmp_path, 0.04, attempts=2))])

    assert max(map(len, text.splitlines())) <= 100
    assert "- oom: merged[" in text
    assert "accounting peak bytes" in text
    assert "peft: 179 conforms" in text
    assert f"separate[{HOSTILE}-decode-micro-fp32-r4-b2-s8]: FAIL" in text


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "start"), [("terminal", "== made"), ("markdown", "# made"), ("json", "{"), ("html", "<!DOCTYPE html>")]
)
def test_a_run_s_id_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, start: str) -> None:
    run(tmp_path, subjects=("reference",))

    assert main(["report", "made", "--lora-output", str(tmp_path), "--format", form]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_a_file_without_a_result_hides_no_other_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, subjects=("reference",))
    empty = tmp_path / "empty.jsonl"
    empty.touch()

    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("== made\n")
    assert told.err == f"skipped: {empty} holds no result to report\n"
    assert main(["report", str(tmp_path), str(empty)]) == 2
    (tmp_path / "made.jsonl").unlink()
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: no file holds a result to report" in capsys.readouterr().err


def test_a_folder_is_all_that_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, subjects=("reference",))
    comparison(tmp_path, 0.0)
    (tmp_path / "conformance.json").write_text(VERDICTS.read_text())
    file = tmp_path / "out.json"

    assert main(["report", str(tmp_path), str(tmp_path / "made.jsonl"), "--format", "json", "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"report: {file}\n"
    assert len(json.loads(file.read_text())["runs"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no run nothing: wanted a .jsonl or .json file, a folder, or an id in"),
        (["{folder}"], "holds neither records (.jsonl) nor conformance.json"),
        ([str(OLD), "-o", "{folder}/no/such"], "-o: wanted a file that can be written, got {folder}/no/such: No such"),
    ],
)
def test_a_wrong_option_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    asked = [text.format(folder=tmp_path) for text in arguments]

    assert main(["report", "--lora-output", str(tmp_path), *asked]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err
