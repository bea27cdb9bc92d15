"""The table at the end of a run, for results made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_bench.bench.records import Records
from lora_bench.bench.session import Result, Session
from lora_bench.bench.workload import BASE, Row, Workload
from lora_bench.report.table import render

MIB = 2**20
ROUNDS = [0.99, 1.0, 1.01, 0.98, 1.0, 1.02, 1.0]
BASE_ROW = Row(BASE, Workload(BASE, "decode", "micro", "fp32", rank=0, batch=2, sequence=8))


def row(subject: str, setup: str, **changes: Any) -> Row:
    return Row(subject, Workload(**BASE_ROW.workload.as_dict() | {"setup": setup, "rank": 4} | changes))


def result(of: Row, seconds: float, rounds: list[float] = ROUNDS, base: float = 2e-3, **memory: Any) -> Result:
    base_seconds = [] if of.subject == BASE else [base for _ in rounds]
    memory = memory or {"resident_peak_bytes": 300 * MIB}
    return Result(of, [seconds * part for part in rounds], base_seconds, memory=memory)


def session(tmp_path: Path, *results: Result, device: str = "cpu", name: str = "A Processor") -> Session:
    made = Session(device, 1.0, Records(tmp_path), print)
    made.results = {result.row: result for result in results}
    made.fingerprint = {"hard": {"device_name": name}}
    return made


def test_the_table_reads_as_written_here(tmp_path: Path) -> None:
    train = BASE_ROW.workload.as_dict() | {"phase": "train"}
    full = Row(BASE, Workload(**train))
    made = session(
        tmp_path,
        Result(row("peft", "merged"), failure="wrong: model.layers.0.self_attn.q_proj"),
        result(row("reference", "separate"), 3e-3),
        result(row("reference", "batched", adapters=3), 3.123456e-3, rounds=[1.0, 1.1]),
        result(row("peft", "separate"), 12.5, base=0.2, resident_peak_bytes="unavailable (no mark)"),
        Result(row("peft", "four_bit"), [2e-3] * 7, memory={"attribution": "unavailable (oom)"}),
        result(BASE_ROW, 2e-3),
        result(full, 5e-3),
        result(Row("peft", Workload(**train | {"setup": "separate", "rank": 4})), 4e-3),
    )

    assert (
        render(made)
        == """\
decode: micro fp32, batch 2 x 8 tokens, rank 4, 3 adapters batched, device=cpu
set-up    subject                      ms                   x base  tokens/s     peak MiB  samples
base                       2 [1.96, 2.04]                        1     1,000          300        7
merged    peft                     failed
separate  reference        3 [2.94, 3.06]     1.500 [1.470, 1.530]       667          300        7
separate  peft       12500 [12250, 12750]  62.500 [61.250, 63.750]         0  unavailable        7
batched   reference      3.28 [-inf, inf]        1.640 [-inf, inf]       610          300        2
four_bit  peft                   2 [2, 2]                  no base     1,000  unavailable        7

train: micro fp32, batch 2 x 8 tokens, rank 4, device=cpu
set-up            subject              ms                x base  tokens/s  peak MiB  samples
full fine-tuning             5 [4.9, 5.1]                     1     3,200       300        7
separate          peft     4 [3.92, 4.08]  2.000 [1.960, 2.040]     4,000       300        7

device=cpu (A Processor); medians with 95 % intervals; x base: median of the ratios
of samples taken in the same round; memory: resident set peak in a process of its own."""
    )


def test_a_gpu_s_table_names_the_device_and_the_allocator_s_peak(tmp_path: Path) -> None:
    peaks: dict[str, Any] = {
        "allocated_peak_bytes": 4 * MIB,
        "resident_peak_bytes": "unavailable (measured on the device instead)",
    }
    text = render(session(tmp_path, result(BASE_ROW, 2e-3, **peaks), device="cuda:1", name="A GPU"))

    assert "device=cuda:1\n" in text
    assert text.splitlines()[2].split()[-2:] == ["4", "7"]
    assert text.endswith(
        "device=cuda:1 (A GPU); medians with 95 % intervals; x base: median of the ratios\n"
        "of samples taken in the same round; memory: torch allocated peak in a process of its own."
    )


def test_without_any_memory_the_table_says_so(tmp_path: Path) -> None:
    text = render(session(tmp_path, result(BASE_ROW, 2e-3, attribution="unavailable (oom)")))

    assert text.endswith("memory: unavailable.")


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.99996, "10000"), (0.99996, "1000"), (0.12345678, "123.5"), (1e-7, "0.0001")]
)
def test_milliseconds_have_no_exponent(tmp_path: Path, seconds: float, text: str) -> None:
    assert f" {text} [" in render(session(tmp_path, result(BASE_ROW, seconds, [1.0] * 6)))


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
    # Folded, never cut: the end of the text tells two subjects of one file apart.
    (first,) = (number for number, line in enumerate(lines) if line.startswith("separate"))
    pieces = [line[len("separate  ") :].split(" ")[0] for line in lines[first : lines.index("device=cpu")]]
    assert "".join(pieces) == long.subject
