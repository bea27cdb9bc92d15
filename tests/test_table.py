"""The table at the end of a run, for results made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench.clocks import USUAL
from lora_bench.bench.counts import Ceilings
from lora_bench.bench.records import Records
from lora_bench.bench.result import Result
from lora_bench.bench.sampling import Samples
from lora_bench.bench.session import Session
from lora_bench.bench.workload import BASE, Row, Workload
from lora_bench.report.table import render

MIB = 2**20
ROUNDS = [0.99, 1.0, 1.01, 0.98, 1.0, 1.02, 1.0]
CEILINGS = Ceilings(1e9, 1e10)
BASE_ROW = Row(BASE, Workload(BASE, "decode", "micro", "fp32", rank=0, batch=2, sequence=8))


def row(subject: str, setup: str, **changes: Any) -> Row:
    return Row(subject, Workload(**BASE_ROW.workload.as_dict() | {"setup": setup, "rank": 4} | changes))


def samples(seconds: list[float]) -> Samples:
    return Samples(seconds, [0] * len(seconds), [False] * len(seconds))


def result(of: Row, seconds: float, rounds: list[float] = ROUNDS, base: float | None = 2e-3, **memory: Any) -> Result:
    base_samples = samples([] if of.subject == BASE or base is None else [base for _ in rounds])
    memory = memory or {"resident_peak_bytes": 300 * MIB}
    return Result(of, samples([seconds * part for part in rounds]), base_samples, memory=memory)


def session(tmp_path: Path, *results: Result, device: str = "cpu", name: str = "A Processor") -> Session:
    made = Session(device, 1.0, Records(tmp_path), print)
    made.results = {result.row: result for result in results}
    made.fingerprint = {"hard": {"device_name": name}}
    made.ceilings = {"fp32": CEILINGS}
    return made


def test_the_table_reads_as_written_here(tmp_path: Path) -> None:
    train = BASE_ROW.workload.as_dict() | {"phase": "train"}
    full = Row(BASE, Workload(**train))
    made = session(
        tmp_path,
        Result(row("peft", "merged"), kind="wrong", failure="Wrong: model.layers.0.self_attn.q_proj"),
        result(row("reference", "separate"), 3e-3),
        result(row("reference", "separate", rank=64), 3.5e-3),
        result(row("reference", "batched", adapters=3), 3.123456e-3, rounds=[1.0, 1.1]),
        result(row("reference", "batched", rank=64, adapters=32, popularity="zipf"), 4e-3),
        result(row("peft", "separate"), 12.5, base=5.0, resident_peak_bytes="unavailable (no mark)"),
        result(row("peft", "four_bit"), 2e-3, base=None, attribution="unavailable (oom)"),
        result(row("reference", "separate", phase="switch"), 1e-3),
        result(BASE_ROW, 2e-3),
        result(full, 5e-3),
        result(Row("peft", Workload(**train | {"setup": "separate", "rank": 4})), 4e-3),
    )

    assert (
        render(made)
        == """\
decode: micro fp32, batch 2 x 8 tokens, device=cpu
set-up    subject     r    n         ms                x base  tokens/s      bound  MiB  samples
base                              2 ±2%                     1     1,000  17% bytes  300        7
merged    peft        4                                 wrong
separate  reference   4           3 ±2%  1.500 [1.470, 1.530]       667  12% bytes  300        7
separate  reference  64         3.5 ±2%  1.750 [1.715, 1.785]       571  25% bytes  300        7
separate  peft        4       12500 ±2%  2.500 [2.450, 2.550]         0   0% bytes  n/a        7
batched   reference   4    3       3.28     1.640 [-inf, inf]       610  12% bytes  300        2
batched   reference  64  32z      4 ±2%  2.000 [1.960, 2.040]       500  35% bytes  300        7
four_bit  peft        4           2 ±2%               no base     1,000   6% bytes  n/a        7

switch: micro fp32, to other adapters, device=cpu
set-up    subject    r  n     ms                x base  tokens/s  bound  MiB  samples
separate  reference  4     1 ±2%  0.500 [0.490, 0.510]                   300        7

train: micro fp32, batch 2 x 8 tokens, device=cpu
set-up    subject  r  n     ms                x base  tokens/s      bound  MiB  samples
full                     5 ±2%                     1     3,200  78% bytes  300        7
separate  peft     4     4 ±2%  2.000 [1.960, 2.040]     4,000  31% bytes  300        7

device=cpu (A Processor); medians with 95 % intervals; x base: median of the ratios of samples taken
in the same round; n: adapters that a mixed batch asks for; samples: those that count / all; bound:
the least time that 10 GFLOP/s (fp32) and 1.0 GB/s allow, as a share of this one; MiB: resident set
peak in a process of its own; z: zipf popularity.

Subjects ranked, times the fastest (=: a tie, the interval of the ratio holds 1):
- decode, separate r4: reference not timed in the rounds of the others, peft not timed in the rounds
of the others"""
    )


def test_a_gpu_s_table_names_the_device_and_the_allocator_s_peak(tmp_path: Path) -> None:
    peaks: dict[str, Any] = {
        "allocated_peak_bytes": 4 * MIB,
        "resident_peak_bytes": "unavailable (measured on the device instead)",
    }
    text = render(session(tmp_path, result(BASE_ROW, 2e-3, **peaks), device="cuda:1", name="A GPU"))

    assert "device=cuda:1\n" in text
    assert text.splitlines()[2].split()[-2:] == ["4", "7"]
    assert "device=cuda:1 (A GPU); medians" in text
    assert " ".join(text.split()).endswith("MiB: torch allocated peak in a process of its own.")


def looked(of: Result, **launches: Any) -> Result:
    of.launches = launches
    return of


def test_what_a_gpu_told_beside_the_hot_samples_has_a_table_of_its_own(tmp_path: Path) -> None:
    reason = "unavailable (it cannot be captured: RuntimeError: a copy)"
    text = render(
        session(
            tmp_path,
            looked(result(BASE_ROW, 2e-3), graph_seconds=[1e-3, 3e-3, 9e-3], cold_seconds=[4e-3], launch_share=0.25),
            looked(result(row("one", "merged"), 2e-3), graph_seconds=reason, cold_seconds=[5e-3], launch_share=0.75),
            result(row("two", "merged"), 2e-3),
            device="cuda:0",
            name="A GPU",
        )
    )

    assert (
        """\
decode in detail, medians in ms
set-up  subject  r  n     ms  graph  cold  launch share
base                   2 ±2%      3     4           25%
merged  one      4     2 ±2%    n/a     5           75%

device=cuda:0"""
        in text
    )
    assert [line.split()[-3] for line in text.splitlines()[2:5]] == ["bytes", "launches", "bytes"]
    assert "graph: replays of a CUDA graph, ms;" in " ".join(text.split())


def test_how_long_a_gpu_kept_to_its_power_limit_is_told_and_nothing_where_it_never_did(tmp_path: Path) -> None:
    one, other = result(BASE_ROW, 2e-3), result(row("one", "merged"), 2e-3)
    told = "the GPU kept to its power limit, at lower clocks, for up to"
    one.window, other.window = ({"throttle_delta": {USUAL: held}, "seconds": 2.0} for held in (500_000_000, 0))

    assert f"{told} 25% of a comparison's time" in " ".join(render(session(tmp_path, one, other)).split())
    assert told not in " ".join(render(session(tmp_path, other)).split())


def test_a_column_of_reasons_alone_is_none(tmp_path: Path) -> None:
    told = looked(result(BASE_ROW, 2e-3), graph_seconds="unavailable (only decoding is captured)")

    assert "in detail" not in render(session(tmp_path, told))


def test_the_parts_of_a_switch_are_medians_of_the_rounds_that_count(tmp_path: Path) -> None:
    switched = result(row("peft", "merged", phase="switch"), 9e-3, [1.0] * 12)
    switched.parts = {"evict": [1e-3] * 11 + [7.0], "load": [2e-3] * 5 + [7.0] * 6 + [2e-3], "merge": [3e-3] * 12}
    switched.samples.interrupted[5] = True
    pool = result(row("a/very/long/name/of/a/subject", "batched", phase="switch", adapters=32), 1.0)
    pool.parts = {"evict": [1e-5] * 7, "pool": [0.99999] * 7}
    text = render(session(tmp_path, switched, pool))

    assert (
        """\
switch in detail, medians in ms
set-up   subject  r   n        ms  evict  load  merge  pool
merged   peft     4         9 ±0%      1     2      3
batched  subject  4  32  1000 ±2%   0.01               1000
"""
        in text
    )
    assert max(map(len, text.splitlines())) <= 100


def test_without_any_memory_the_table_says_so(tmp_path: Path) -> None:
    text = render(session(tmp_path, result(BASE_ROW, 2e-3, attribution="unavailable (oom)")))

    assert " ".join(text.split()).endswith("MiB: n/a, and the records say why.")


def test_before_anything_is_weighed_nothing_is_said_of_the_records(tmp_path: Path) -> None:
    cut_off = result(BASE_ROW, 2e-3)
    cut_off.memory = {}

    assert " ".join(render(session(tmp_path, cut_off)).split()).endswith("MiB: not measured.")


def test_which_layers_are_adapted_is_in_the_title_and_a_single_layer_reads_rows(tmp_path: Path) -> None:
    text = render(session(tmp_path, result(BASE_ROW, 2e-3), result(row("peft", "separate", targets="qv"), 3e-3)))
    alone = Row(BASE, Workload(BASE, "prefill", "linear-8x16", "fp32", rank=0, batch=2, sequence=8))

    assert text.startswith("decode: micro fp32, targets qv, batch 2 x 8 tokens, device=cpu\n")
    assert render(session(tmp_path, result(alone, 2e-3))).startswith("prefill: linear-8x16 fp32, batch 2 x 8 rows,")


@pytest.mark.parametrize(
    ("kind", "cell"),
    [*((kind, kind) for kind in ("wrong", "oom", "crashed", "timeout", "gpu_lost", "error")), ("", "not measured")],
)
def test_a_row_without_times_says_what_went_wrong(tmp_path: Path, kind: str, cell: str) -> None:
    failed = Result(row("peft", "merged", rank=64), kind=kind, failure=kind and f"{kind}: why")
    lines = render(session(tmp_path, failed, result(BASE_ROW, 2e-3))).splitlines()

    (line,) = (line for line in lines if line.startswith("merged"))
    assert line.split() == ["merged", "peft", "64", *cell.split()]


def test_samples_of_rounds_that_do_not_count_are_not_counted(tmp_path: Path) -> None:
    kept = result(BASE_ROW, 2e-3, [1.0] * 12)
    kept.samples.interrupted[3] = True
    kept.samples.seconds[3] = 9e9

    assert " 2 ±0% " in render(session(tmp_path, kept))
    assert render(session(tmp_path, kept)).splitlines()[2].endswith(" 11/12")


def test_without_ceilings_or_shapes_there_is_no_bound(tmp_path: Path) -> None:
    unknown = result(row("peft", "merged", model="some/checkpoint"), 2e-3)
    known = session(tmp_path, result(BASE_ROW, 2e-3), unknown)
    assert [line.count("% bytes") for line in render(known).splitlines()[2:4]] == [1, 0]

    known.ceilings = {}
    assert "% bytes" not in render(known)
    assert "unknown" in render(known)


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.99996, "10000"), (0.99996, "1000"), (0.12345678, "123.5"), (1e-7, "0.0001")]
)
def test_milliseconds_have_no_exponent(tmp_path: Path, seconds: float, text: str) -> None:
    assert f" {text} ±0% " in render(session(tmp_path, result(BASE_ROW, seconds, [1.0] * 6)))


def test_names_in_brackets_and_colons_are_printed_as_they_are(tmp_path: Path) -> None:
    named = row("a[bold]/[/b].py:fire:X", "separate", model="models/[red]tiny")
    text = render(session(tmp_path, result(named, 2e-3)))

    assert "a[bold]/[/b].py:fire:X" in text
    assert "models/[red]tiny" in text


def test_no_line_is_wider_than_a_terminal_nor_ends_in_spaces(tmp_path: Path) -> None:
    long = row("/a/rather/long/path/to/an/implementation/of/somebody.py:SUBJECT", "separate", model="/m" * 60)
    lines = render(
        session(tmp_path, result(long, 2e-3, [1.0, 1.1]), result(long.base(), 2e-3), name="N" * 90)
    ).splitlines()

    assert max(map(len, lines)) <= 100
    assert lines == [line.rstrip() for line in lines]
    (line,) = (line for line in lines if line.startswith("separate"))
    assert line.split()[1] == "somebody.py:SUBJECT"
    assert lines[-2:] == ["Subjects:", f"- somebody.py:SUBJECT: {long.subject}"]


def test_two_long_names_with_one_last_part_are_folded_and_never_cut(tmp_path: Path) -> None:
    long = [
        row(f"/a/rather/long/path/to/the/{which}/implementation.py:SUBJECT", "separate") for which in ("one", "two")
    ]
    results = [result(of, 2e-3, rank=4) for of in long]
    lines = render(session(tmp_path, *results)).splitlines()

    assert max(map(len, lines)) <= 100
    rows = [number for number, line in enumerate(lines) if line.startswith("separate")]
    for of, first, after in zip(long, rows, [rows[1], lines.index("", rows[1])], strict=True):
        begin = lines[1].index("subject")
        assert "".join(line[begin:].split(" ")[0] for line in lines[first:after]) == of.subject


def test_a_row_that_was_not_measured_makes_no_name_fold(tmp_path: Path) -> None:
    rows = [row(subject, "separate", adapters=1, rank=64) for subject in ("reference-of-ours", "peft")]
    mixed = row("peft", "batched", rank=64, adapters=32, popularity="identical")
    lines = render(
        session(tmp_path, result(BASE_ROW, 2e-3), *map(Result, rows), result(mixed, 12.5, base=5.0))
    ).splitlines()

    assert [line.split()[1] for line in lines if line.startswith("separate")] == ["reference-of-ours", "peft"]
    assert sum("not measured" in line for line in lines[:6]) == 2
    assert max(map(len, lines)) <= 100


def test_joules_have_a_column_where_they_were_measured(tmp_path: Path) -> None:
    with_joules = result(BASE_ROW, 2e-3)
    with_joules.energy = {"joules_per_token": 0.01234, "validity": "verified"}
    unsure = result(row("peft", "merged"), 2e-3)
    unsure.energy = {"joules_per_token": 5.0, "validity": "unverified: no power"}
    text = render(session(tmp_path, with_joules, unsure))
    lines = text.splitlines()

    assert "?: not verified" in text
    assert "?" not in render(session(tmp_path, with_joules))
    assert lines[1].split()[-2:] == ["J/token", "samples"]
    assert [line.split()[-2] for line in lines[2:4]] == ["0.0123", "5?"]


def test_a_ratio_to_a_base_that_ran_around_the_row_is_marked_and_ranked_with_nobody(tmp_path: Path) -> None:
    def apart(subject: str, seconds: float) -> Result:
        base = Samples([2e-3] * 20, [0] * 10 + [2] * 10, [False] * 20)
        return Result(row(subject, "separate"), samples([seconds] * 10), base, interleaved=False)

    text = render(session(tmp_path, result(BASE_ROW, 2e-3), apart("reference", 3e-3), apart("peft", 4e-3)))

    assert "  1.500 [1.500, 1.500]~  " in text
    assert "~: not interleaved, its base ran before and after it" in " ".join(text.split())
    assert " ".join(text.split()).count("not timed in the rounds of the others") == 2
    for order in (("reference", "peft"), ("peft", "reference")):
        mixed = {"reference": apart("reference", 3e-3), "peft": result(row("peft", "separate"), 4e-3)}
        told = render(session(tmp_path, result(BASE_ROW, 2e-3), *(mixed[name] for name in order)))
        assert " ".join(told.split()).count("not timed in the rounds of the others") == 2
    plain = render(session(tmp_path, result(BASE_ROW, 2e-3), result(row("peft", "separate"), 3e-3)))
    assert "~" not in plain
