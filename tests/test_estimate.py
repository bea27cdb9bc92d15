"""`lora-bench estimate`: what is typed and what is printed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from lora_bench.__main__ import main
from lora_bench.bench.budget import budget
from lora_bench.commands.estimate import byte_count, readable

LARGE = "estimate --model llama-3-8b --mode qlora --rank 16 --batch 8 --sequence 512"


def test_every_line_shows_its_numbers_and_the_parts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(LARGE)) == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == "llama-3-8b, qlora r16, train, bf16, batch 8, sequence 512, on cuda"
    assert lines[2].split() == ["GiB", "share"]
    found = budget(
        model="llama-3-8b", mode="qlora", rank=16, batch=8, sequence=512, dtype="bf16", phase="train", device="cuda"
    )
    fields = [line for line in lines[3:] if line and not line.startswith(" ")]
    named = {line[:44].strip(): line[44:].split() for line in fields}
    assert named["quantisation constants"][0] == f"{found.quantisation_constants / 2**30:.3f}"
    assert named["activations"] == [
        f"{found.activations / 2**30:.3f}",
        f"{found.activations / found.total:.1%}",
    ]
    assert named["total, if all were there at once"] == [f"{found.total / 2**30:.3f}", "100.0%"]
    assert named["peak"][0] == f"{found.peak / 2**30:.3f}"
    assert lines[-2].endswith("as the backward begins, before there are gradients")
    assert lines[-1] == "context: measured per device, not estimated (give it with --context)"
    codes = next(line for line in lines if "4-bit codes" in line)
    assert codes.endswith("32 layers × 218,103,808 weights × 0.5 bytes")
    assert all(len(line) <= 130 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        ("--mode full --batch 1 --sequence 8", "when all gradients are there, and the activations gone"),
        ("--phase prefill", "in the forward"),
        ("--dtype bf16", "as the backward begins, before there are gradients"),
        ("--model linear-64x32", "before the optimiser's step"),
    ],
)
def test_the_peak_says_when_it_is(arguments: str, moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", "tiny", "--lora-device", "cpu", *arguments.split()]) == 0
    told = capsys.readouterr().out

    assert told.splitlines()[-1].endswith(moment)
    assert "MiB" in told.splitlines()[2]
    assert "context" not in told


def test_a_single_layer_has_its_weight_its_adapter_and_what_goes_through_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = "--model linear-4096x11008 --rank 8 --batch 2 --sequence 64 --dtype fp32 --phase prefill --json"
    assert main(["estimate", *chosen.split()]) == 0
    found = json.loads(capsys.readouterr().out)["bytes"]

    assert {name: count for name, count in found.items() if count} == {
        "weights": 4 * 4096 * 11008,
        "adapters": 4 * 8 * (4096 + 11008),
        "activations": 4 * 2 * 64 * (4096 + 3 * 11008),
    }


def test_a_context_is_a_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"{LARGE} --context 512MiB")) == 0
    told = capsys.readouterr().out

    assert "\ncontext                                         0.500 " in told
    assert "not estimated" not in told


def test_json_is_in_bytes_and_a_context_that_is_not_known_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "estimate --model tiny --json --phase prefill --adapters 4 --targets q_proj,v_proj --dtype fp32"
    assert main(arguments.split()) == 0
    told = json.loads(capsys.readouterr().out)

    found = budget(
        model="tiny",
        mode="lora",
        rank=16,
        batch=8,
        sequence=512,
        dtype="fp32",
        phase="prefill",
        adapters=4,
        targets=("q_proj", "v_proj"),
        device="cuda",
    )
    assert told["schema"] == "lora-bench/estimate/1"
    assert told["bytes"] == found._asdict() | {"context": None}
    assert (told["total"], told["peak"]) == (found.total, found.peak)
    assert told["targets"] == ["q_proj", "v_proj"]
    assert sum(term["bytes"] for term in told["terms"]["adapters"]) == found.adapters


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "--model linear-8x0",
            "a single layer is linear-<d_in>x<d_out>, of whole numbers of at least 2, got 'linear-8x0'",
        ),
        ("--model linear-8x8 --targets q_proj", "a target is one of linear, got 'q_proj'"),
        ("--model llama-3-8bb", "no model is called 'llama-3-8bb' (nearest: llama-3-8b)"),
        ("--model tiny --targets q_prj", "a target is one of q_proj, k_proj, "),
        ("--model tiny --adapters 2", "one adapter is trained at a time, got adapters=2"),
        ("--model tiny --phase prefill --checkpointing", "checkpointing is for training"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_and_exit_code_2(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *arguments.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"lora-bench estimate: {sentence}")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--rank 0", "argument --rank: must be at least 1, got 0"),
        ("--sequence 1", "argument --sequence: must be at least 2, got 1"),
        ("--mode dora", "argument --mode: invalid choice: 'dora'"),
        ("--context much", "argument --context: must be a size such as 2GiB, 500MiB or 1000000, got much"),
    ],
)
def test_a_wrong_option_is_said(option: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["estimate", "--model", "tiny", *option.split()])
    assert sentence in capsys.readouterr().err


def test_it_imports_no_torch() -> None:
    program = (
        "import sys, lora_bench.__main__ as m\n"
        "assert m.main(['estimate', '--model', 'llama-3-8b']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("500MiB", 500 * 2**20), ("1.5 GB", 1500 * 10**6), ("7", 7), ("12b", 12), (".5KiB", 512)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert byte_count(text) == count


def test_sizes_are_written() -> None:
    assert [readable(3 * 2**29), readable(2**20), readable(-(2**31))] == ["1.50 GiB", "1.00 MiB", "-2.00 GiB"]
    assert [readable(350 * 2**20), readable(-(2**30) + 2**20)] == ["350.00 MiB", "-1023.00 MiB"]
