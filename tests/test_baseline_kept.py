"""What there is to compare with: files of either kind, folders of promoted runs, and which of them is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.bench.ratio import Interval
from lora_bench.gate.baseline import Shelf, choose, screen, shelf, worst
from lora_bench.gate.calibration import NAME, Calibration, Noise
from lora_bench.gate.figures import Figures, load
from tests.kept_runs import HARD, MINE, ROWS, keep, lines, place, promotion
from tests.micro_rows import row

if TYPE_CHECKING:
    from collections.abc import Mapping

INFO: dict[str, Any] = place(MINE) | {
    "fingerprint": {"hard": HARD, "soft": {}},
    "memory": {"parameter_bytes": 7},
    "ratio_to_base": {"median": 2.0, "low": 1.9, "high": 2.1, "confidence": 0.95},
    "window": {},
}


def document(*infos: dict[str, Any], data: list[float] | None = None) -> str:
    stats = {"data": [1.0, 1.0] if data is None else data}
    return json.dumps({"benchmarks": [{"name": "n", "extra_info": info, "stats": stats} for info in infos]})


def test_our_rows_of_a_benchmark_json_are_read_and_those_of_others_passed_over(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(document(INFO, {"something": "else"}, {}, INFO | place(MINE.base())))
    run = load(tmp_path / "old.json")

    assert run.rows == dict.fromkeys(ROWS, Figures({"parameter_bytes": 7}, Interval(2.0, 1.9, 2.1), ""))
    assert (run.hard, set(run.planned), run.promotion) == (HARD, set(ROWS), None)


def test_records_tell_the_same(tmp_path: Path) -> None:
    run = load(keep(tmp_path / "old.jsonl", lines()))

    assert run.rows[MINE] == Figures({"parameter_bytes": 7}, Interval(2.0, 2.0, 2.0), "")
    assert (run.name, run.hard, run.planned, run.promotion) == ("old", HARD, ROWS, None)


def test_of_records_only_what_was_planned_is_compared(tmp_path: Path) -> None:
    plan, *rest = lines()
    run = load(keep(tmp_path / "old.jsonl", [plan | {"rows": [place(MINE)]}, *rest]))

    assert run.rows.keys() == {MINE}


def test_a_benchmark_json_without_its_samples_cannot_be_compared(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(document(INFO, data=[]))

    assert load(tmp_path / "old.json").rows[MINE].trouble == "no samples"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file .*old.json"),
        (b"", "old.json is no JSON of --benchmark-json: JSONDecodeError"),
        (b"\xff\xfe\x00", "old.json is no JSON of --benchmark-json: UnicodeDecodeError"),
        (b"[1, 2]", "old.json is no JSON of --benchmark-json: TypeError"),
        (b"null", "old.json is no JSON of --benchmark-json: TypeError"),
        (b"{}", "old.json is no JSON of --benchmark-json: KeyError: 'benchmarks'"),
        (b'{"benchmarks": {"a": 1}}', "old.json is no JSON of --benchmark-json: TypeError"),
        (b'{"benchmarks": [{}]}', "old.json is no JSON of --benchmark-json: KeyError: 'extra_info'"),
        (b'{"benchmarks": []}', "old.json holds no result of the GPU suites"),
        (document({"something": "else"}).encode(), "old.json holds no result of the GPU suites"),
        (document(INFO)[:-9].encode(), "old.json is no JSON of --benchmark-json: JSONDecodeError"),
        (document(INFO | {"workload": {"setup": "separate"}}).encode(), "TypeError: .* missing"),
        (document(INFO | {"workload": MINE.workload.as_dict() | {"rank": 0}}).encode(), "rank must be at least 1"),
        (document({name: INFO[name] for name in INFO if name != "memory"}).encode(), "KeyError: 'memory'"),
        (document({name: INFO[name] for name in INFO if name != "window"}).encode(), "KeyError: 'window'"),
        (document(INFO, INFO | {"fingerprint": {"hard": {}}}).encode(), "rows of more than one machine"),
        (document(INFO, data=["1.0"]).encode(), "TypeError"),  # type: ignore[list-item]
        (document(INFO | {"memory": None}).encode(), "memory must be an object, got 'None'"),
        (document(INFO | {"window": "x"}).encode(), "window must be an object, got 'x'"),
        (document(INFO | {"ratio_to_base": {"median": "x", "low": 1, "high": 2}}).encode(), "median must be a number"),
        (document(INFO | {"fingerprint": {"hard": None}}).encode(), "fingerprint.hard must be an object"),
        (b"[" * 100_000, "old.json cannot be read"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "old.json").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told[:1], "holds no result of the GPU suites"),
        (lambda told: [told[0] | {"rows": [{}]}, *told[1:]], "a plan record lacks or has too much: 'workload'"),
        (lambda told: [*told, told[1] | {"fingerprint": {"hard": {}}}], "rows of more than one machine"),
        (lambda told: [*told, told[1] | {"order": [0]}], "the samples must all have a turn"),
        (lambda told: [*told, told[1] | {"parts_seconds": "x"}], "parts_seconds must be an object, got 'x'"),
        (lambda told: [*told, told[1] | {"window": "x"}], "window must be an object, got 'x'"),
        (lambda told: [*told, told[1] | {"fingerprint": {"hard": True}}], "fingerprint.hard must be an object"),
        (lambda told: [*told, promotion(1, time=5)], "time must be a text, got '5'"),
        (lambda told: [*told[1:], promotion(1)], "was promoted without a plan"),
        (lambda told: [*told, promotion(1), told[1]], "was changed after it was promoted"),
    ],
)
def test_records_that_are_no_baseline_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = keep(tmp_path / "old.jsonl", change(lines()))

    with pytest.raises(ValueError, match=f"old.jsonl {message}|old.jsonl is no run .*{message}"):
        load(path)


def test_a_promoted_run_that_was_edited_is_no_baseline(tmp_path: Path) -> None:
    history(tmp_path / "kept", 2.0)
    path = tmp_path / "kept" / "01.jsonl"
    path.write_text(path.read_text().replace('"parameter_bytes": 7', '"parameter_bytes": 8'))
    (line,) = screen(load(keep(tmp_path / "new.jsonl", lines())), shelf(tmp_path / "kept"))

    assert (line.name, line.verdict) == ("01.jsonl", "NOT COMPARABLE")
    assert line.text.endswith("01.jsonl was changed after it was promoted")


@pytest.mark.parametrize("values", [[], ["x"] * 7, None, [[]]])
def test_noise_that_is_none_is_a_line(tmp_path: Path, values: Any) -> None:
    history(tmp_path / "kept", 2.0)
    noise = {str(each): {"location": values, "tail": []} for each in ROWS}
    (tmp_path / "kept" / NAME).write_text(json.dumps({"schema": 1, "hard": HARD, "scenarios": noise}))

    assert [line.verdict for line in shelf(tmp_path / "kept").trouble] == ["NOT COMPARABLE"]


# --- which is chosen ------------------------------------------------------------------------------------------------


def history(folder: Path, *ratios: float, first: int = 1, hard: dict[str, Any] = HARD, **fields: Any) -> None:
    """Promoted runs of one machine and one choice of rows, a day after the other."""
    for day, ratio in enumerate(ratios, start=first):
        told = lines(seconds=ratio / 2, hard=hard, rows=fields.get("rows", ROWS))
        keep(folder / f"{day:02}.jsonl", [*told, promotion(day, begins=fields.get("begins") == day)])


def names(folder: Path, new: Path) -> list[str]:
    return [run.name for run in choose(load(new), shelf(folder).runs)]


def test_the_first_and_the_last_ten_of_a_machine_are_its_history(tmp_path: Path) -> None:
    history(tmp_path / "kept", *[2.0] * 12)

    assert names(tmp_path / "kept", keep(tmp_path / "new.jsonl", lines())) == [
        "01",
        *(f"{day:02}" for day in range(3, 13)),
    ]


def test_a_history_begins_where_a_promotion_began_it(tmp_path: Path) -> None:
    history(tmp_path / "kept", *[2.0] * 4, begins=3)

    assert names(tmp_path / "kept", keep(tmp_path / "new.jsonl", lines())) == ["03", "04"]


def test_the_machine_that_differs_least_is_nearest_and_then_the_rows(tmp_path: Path) -> None:
    other = row("other", "separate", "decode")
    history(tmp_path / "a", 2.0, first=1)
    history(tmp_path / "b", 2.0, first=2, hard=HARD | {"driver": "590"})
    history(tmp_path / "c", 2.0, first=3, rows=(*ROWS, other))
    history(tmp_path / "d", 2.0, first=4, hard={"device_name": "another", "driver": "600"})

    def nearest(**of: Any) -> list[str]:
        return names(tmp_path, keep(tmp_path.parent / "new" / "new.jsonl", lines(**of)))

    assert nearest() == ["01"]
    assert nearest(hard=HARD | {"driver": "590"}) == ["02"]
    assert nearest(rows=(*ROWS, other)) == ["03"]
    assert nearest(hard={"device_name": "another", "driver": "610"}) == ["04"]
    assert nearest(rows=(*ROWS, other, row("third", "separate", "decode"))) == ["03"]


def test_another_machine_is_named_by_its_fields_and_passes_nothing(tmp_path: Path) -> None:
    history(tmp_path / "kept", 2.0)
    new = load(keep(tmp_path / "new.jsonl", lines(hard=HARD | {"driver": "590", "ecc": "on"})))
    (line,) = screen(new, shelf(tmp_path / "kept"))

    assert (line.verdict, line.text) == ("NOT COMPARABLE", "driver was 580, is 590; ecc was None, is on")


def test_a_run_is_held_against_the_whole_history(tmp_path: Path) -> None:
    history(tmp_path / "kept", 2.0, 1.9, 2.1, 1.95, 2.05)
    restless = shelf(tmp_path / "kept")

    assert worst(screen(load(keep(tmp_path / "a.jsonl", lines(seconds=1.05))), restless)) == "pass"
    assert worst(screen(load(keep(tmp_path / "b.jsonl", lines(seconds=1.07))), restless)) == "REGRESSION"


def test_what_equals_differ_by_on_the_machine_is_allowed(tmp_path: Path) -> None:
    history(tmp_path / "kept", 2.0)
    slower = load(keep(tmp_path / "new.jsonl", lines(seconds=1.05)))
    assert worst(screen(slower, shelf(tmp_path / "kept"))) == "REGRESSION"

    def calibrated(hard: Mapping[str, Any]) -> Shelf:
        noise = Noise([math.log(1.06)] * 7, [])
        Calibration(hard, {str(row): noise for row in slower.rows}).write(tmp_path / "kept" / NAME)
        return shelf(tmp_path / "kept")

    assert worst(screen(slower, calibrated(slower.hard))) == "pass"
    assert worst(screen(slower, calibrated({"device": "another"}))) == "REGRESSION"
    (tmp_path / "kept" / NAME).write_text("{}")
    assert "calibration.json is no calibration" in screen(slower, shelf(tmp_path / "kept"))[0].text


def test_what_cannot_be_used_in_a_folder_is_named_and_the_rest_is_compared(tmp_path: Path) -> None:
    history(tmp_path / "kept", 2.0)
    (tmp_path / "kept" / "broken.jsonl").write_text("{]\n")
    keep(tmp_path / "kept" / "stray.jsonl", lines())
    found = screen(load(keep(tmp_path / "new.jsonl", lines())), shelf(tmp_path / "kept"))

    assert [line.name for line in found[:2]] == ["broken.jsonl", "stray.jsonl"]
    assert [line.verdict for line in found] == ["NOT COMPARABLE", "NOT COMPARABLE", *["pass"] * 3]


def test_a_key_is_readable_and_of_the_machine_and_the_rows(tmp_path: Path) -> None:
    def key(**of: Any) -> str:
        return load(keep(tmp_path / "x.jsonl", lines(**of))).key

    assert key().startswith("A-GPU-")
    assert key() == key(seconds=3.0) == key(rows=ROWS[::-1])
    assert len({key(), key(hard=HARD | {"driver": "590"}), key(rows=ROWS[:1])}) == 3
