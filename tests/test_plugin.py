"""The GPU suites without measuring: what is collected, proven and left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_bench import subjects
from tests.planted_subjects import PLANTED
from tests.pytest_runs import GPU, SMALL, python, run


def test_a_run_of_other_tests_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("import sys\n\ndef test_other():\n    assert 'torch' not in sys.modules\n")
    found = python(
        "-m", "pytest", "-p", "lora_bench.plugin", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)
    )

    assert found.returncode == 0, found.stdout
    assert "1 passed" in found.stdout
    assert "lora-bench: device" not in found.stdout


PLACE = ("--lora-device=cpu", "--lora-model=micro", "--lora-batch=2", "--lora-sequence=8", "--lora-subject=reference")


# --- collected ------------------------------------------------------------------------------------------------------


def collected(*arguments: str) -> list[str]:
    found = run(GPU, *SMALL, "--collect-only", "-q", *arguments)
    assert found.code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return [line.rpartition("::")[2] for line in found.text.splitlines() if "::" in line]


BASES = [f"test_base[{phase}-micro-fp32-b2-s8]" for phase in ("prefill", "decode", "train")]


def test_a_selection_keeps_the_base_of_what_it_selects() -> None:
    separate = [
        f"test_separate[{name}-{phase}-micro-fp32-r4-b2-s8]"
        for phase in ("prefill", "decode", "switch")
        for name in ("reference", "peft")
    ]

    assert collected("-k", "separate") == [*BASES[:2], *separate]
    # A switch is compared with a token that the base reads.
    assert collected("-k", "separate and switch and peft") == [BASES[1], separate[-1]]
    assert collected("-k", "peft and train") == [BASES[2], "test_training[peft-train-micro-fp32-r4-b2-s8]"]
    assert collected("-k", "base") == BASES
    assert collected("-k", "nothing_of_the_kind") == []


def test_a_subject_s_rows_are_named_by_it_and_every_one_is_there() -> None:
    names = collected(f"--lora-subject={PLANTED}:DROPPED", "--lora-subject=reference", "--lora-subject=reference")

    assert len(names) == len(set(names)) == 3 + 2 * (4 * 2 + 1 + 3)
    assert "test_batched[DROPPED-decode-micro-fp32-r4-b2-s8-n2]" in names


def test_a_matrix_of_ranks_and_adapters_is_collected_whole_and_named() -> None:
    ranks = collected("-k", "separate and decode", "--lora-subject=reference", "--lora-rank=4,8,4")
    mixed = collected(
        "-k", "batched and decode", "--lora-subject=peft", "--lora-adapters=1,2", "--lora-popularity=zipf"
    )

    assert ranks == [BASES[1], *(f"test_separate[reference-decode-micro-fp32-r{rank}-b2-s8]" for rank in (4, 8))]
    assert mixed == [BASES[1], *(f"test_batched[peft-decode-micro-fp32-r4-b2-s8-{n}]" for n in ("n1", "n2-zipf"))]


@pytest.mark.parametrize(("name", "rows"), [("quick", 1), ("standard", 2 * 3), ("full", 6 * 25)])
def test_a_matrix_has_a_name(name: str, rows: int) -> None:
    found = run("suites/gpu/test_batched.py", "--collect-only", "-q", "-k", "decode", f"--lora-matrix={name}", *PLACE)

    assert len([line for line in found.text.splitlines() if "::test_batched[reference-decode-micro-" in line]) == rows


def test_collecting_measures_nothing_and_writes_no_record(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, "--collect-only", "--benchmark", f"--lora-output={tmp_path}")

    assert found.code == 0
    assert "building" not in found.text
    assert not list(tmp_path.iterdir())


def test_a_run_that_selects_nothing_writes_no_record(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, "--benchmark", "-k", "nothing_of_the_kind", f"--lora-output={tmp_path}")

    assert found.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert not list(tmp_path.iterdir())


def test_the_settings_are_told_and_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run(GPU, "--collect-only", "--lora-rank=4")

    assert "lora-bench: device=cpu model=tiny dtype=fp32 batch=8 sequence=64 rank=4 adapters=8" in found.text
    assert "lora-bench: no CUDA device: a small model on the CPU; nothing here speaks of a GPU" in found.text
    fewer = run(GPU, "--collect-only", "--lora-device=cpu", "--lora-targets=qv").text
    assert "no CUDA device" not in fewer
    assert "sequence=64 targets=qv rank=16 adapters=8" in fewer


# --- unmeasured -----------------------------------------------------------------------------------------------------


def test_an_unmeasured_run_proves_every_row_and_writes_nothing(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, f"--lora-output={tmp_path / 'out'}")

    assert found.code == 0
    assert found.outcomes == {"passed": 27}
    assert not (tmp_path / "out").exists()
    assert "records:" not in found.text


def test_an_unmeasured_row_that_is_wrong_fails_shortly_with_its_layer() -> None:
    found = run(
        GPU, *SMALL, "-k", "decode and not batched", f"--lora-subject={PLANTED}:DROPPED", "--lora-subject=reference"
    )
    wrong = {name for name, report in found.reports.items() if report.outcome == "failed"}

    assert found.code == 1
    # Merged it is right: only its own forward drops the adapter.
    assert wrong == {f"test_{setup}[DROPPED-decode-micro-fp32-r4-b2-s8]" for setup in ("separate", "four_bit")}
    for name in wrong:
        text = str(found.reports[name].longrepr)
        assert len(text.splitlines()) == 2
        assert "model.layers.0.self_attn.q_proj: found " in text
    assert "Traceback" not in found.text


def test_a_shipped_subject_that_is_not_installed_is_a_skip_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subjects, "find_spec", lambda _: None)
    found = run("suites/gpu/test_separate.py", *SMALL, "-k", "decode", "--lora-subject=loralib")
    (skipped,) = found.reports.values()

    assert found.code == 6
    assert "Skipped: loralib is not installed: pip install lora-bench[loralib]" in str(skipped.longrepr)


def test_a_run_in_which_only_the_base_ran_judged_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "find_spec", lambda _: None)
    asked = ("suites/gpu", *SMALL, "--lora-subject=loralib")
    found = run(*asked, "-k", "separate and decode")

    assert found.code == 6
    assert found.outcomes == {"passed": 1, "skipped": 1}
    assert "lora-bench: rows of subjects were asked for, and none of them was measured or checked" in found.text
    found = run(*asked, "-k", "base and decode")
    assert (found.code, "none of them" in found.text) == (0, False)
