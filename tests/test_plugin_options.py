"""The options of the GPU suites: what is refused in one sentence."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.planted_subjects import PLANTED
from tests.pytest_runs import GPU, SMALL, Run, python, run

UNWRITTEN = "--lora-output: wanted a folder that can be written, got *"
REFUSED = {
    "subject, near": ("--lora-subject=pefd", "no subject is called 'pefd': known are * (nearest: peft)"),
    "subject, far": ("--lora-subject=zzz", "no subject is called 'zzz': known are *reference"),
    "subject, no file": ("--lora-subject=absent.py:X", "'absent.py:X': there is no file absent.py"),
    "subject, no attribute": (f"--lora-subject={PLANTED}:X", "has no 'X'; its subjects are *DROPPED"),
    "subject, no subject": (f"--lora-subject={PLANTED}:NO_SUBJECT", "wanted a lora_bench.Subject, got a int"),
    "subject, no module": ("--lora-subject=absent.module:X", "'absent.module:X' cannot be loaded: ModuleNotFoundError"),
    "model, near": ("--lora-model=mikro", "no model is called 'mikro' (nearest: micro)"),
    "model, no checkpoint": ("--lora-model=tests", "'tests' is no checkpoint: the directory has no config.json"),
    "targets of a single layer": (
        "--lora-targets=qv --lora-model=linear-8x16",
        "--lora-targets must be all for linear-8x16, which is one layer, got 'qv'",
    ),
    "rank": ("--lora-rank=0", "--lora-rank must be at least 1, got 0"),
    "rank, one of several": ("--lora-rank=8,0,4", "--lora-rank must be at least 1, got 0"),
    "adapters": ("--lora-adapters=0", "--lora-adapters must be at least 1, got 0"),
    "adapters, one of several": ("--lora-adapters=8,-1", "--lora-adapters must be at least 1, got -1"),
    "popularity": (
        "--lora-popularity=zipf,pareto",
        "--lora-popularity must be among distinct, identical, uniform, zipf, got 'pareto'",
    ),
    "matrix": ("--lora-matrix=huge", "--lora-matrix must be one of quick, standard, full, got 'huge'"),
    "timeout": ("--lora-timeout=-1", "--lora-timeout must be at least 0, got -1"),
    "timeout, no number": ("--lora-timeout=nan", "--lora-timeout must be at least 0, got nan"),
    "energy, too short": ("--benchmark --lora-energy=9", "--lora-energy must be 0 or at least 10 seconds, got 9"),
    "energy, no number": ("--benchmark --lora-energy=nan", "--lora-energy must be 0 or at least 10 seconds, got nan"),
    "energy, without end": ("--benchmark --lora-energy=inf", "--lora-energy must be finite, got inf"),
    "resume, unmeasured": ("--lora-resume=absent", "--lora-resume needs --benchmark"),
    "batch": ("--lora-batch=0", "--lora-batch must be at least 1, got 0"),
    "sequence": ("--lora-sequence=1", "--lora-sequence must be at least 2, got 1"),
    "dtype": ("--lora-dtype=fp8", "--lora-dtype must be one of fp64, fp32, bf16, fp16, got 'fp8'"),
    "no CUDA": ("--lora-device=cuda", "--lora-device cuda: torch * sees 0 CUDA devices"),
    "no second CUDA device": ("--lora-device=cuda:1", "--lora-device cuda:1: torch * sees 0 CUDA devices"),
    "device": ("--lora-device=tpu", "--lora-device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "device, no index": ("--lora-device=cuda:", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
    "device, wrong index": ("--lora-device=cuda:-1", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
    "device, a CPU's index": ("--lora-device=cpu:0", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cpu:0'"),
    "seconds": ("--benchmark --lora-seconds=0", "--lora-seconds must be above 0, got 0"),
    "seconds, no number": ("--benchmark --lora-seconds=nan", "--lora-seconds must be above 0, got nan"),
    "baseline, unmeasured": ("--lora-baseline=absent.json", "--lora-baseline needs --benchmark"),
    "output is a file": (f"--benchmark --lora-output={PLANTED}", f"{UNWRITTEN}.py: File exists"),
    "output below a file": (f"--benchmark --lora-output={PLANTED}/x", f"{UNWRITTEN}.py/x: Not a directory"),
    "xdist": ("--benchmark -n 2", "--benchmark cannot measure under xdist"),
    "xdist by its nodes": ("--benchmark --dist=load --tx=2*popen", "--benchmark cannot measure under xdist"),
    "no pytest-benchmark": ("--benchmark -p no:benchmark", "--benchmark needs pytest-benchmark"),
    "disabled": ("--benchmark --benchmark-disable", "drop --benchmark-disable"),
    "skipped": ("--benchmark --benchmark-skip", "drop --benchmark-skip"),
    "only": ("--benchmark --benchmark-only", "drop --benchmark-only"),
    "compared by pytest-benchmark": (
        "--benchmark --benchmark-compare-fail=mean:5%",
        "--benchmark-compare-fail compares times with whatever was saved last, on whatever machine: use --lora-base",
    ),
    "profiled": ("--benchmark --benchmark-cprofile=tottime", "drop --benchmark-cprofile"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_option_is_refused_in_one_sentence(
    options: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    output = [] if "--lora-output" in options else [f"--lora-output={tmp_path / 'out'}"]
    found = run(GPU, *output, *options.split())

    assert found.code == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in found.text.splitlines() if line)
    assert fnmatchcase(line, f"ERROR: *{sentence}*")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("option", "got"), [("--lora-rank", "x"), ("--lora-rank", ""), ("--lora-rank", "8,"), ("--lora-adapters", "1.5")]
)
def test_a_list_of_numbers_must_be_one(option: str, got: str) -> None:
    found = run(GPU, f"{option}={got}")

    assert found.code == pytest.ExitCode.USAGE_ERROR
    assert f"error: argument {option}: wanted whole numbers with commas between them, got {got!r}" in found.text


def test_no_room_is_refused_before_there_is_something_to_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(count: int) -> Run:
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=count))
        return run(GPU, *SMALL, "--benchmark", "--collect-only", f"--lora-output={tmp_path}")

    assert free(16 << 20).code == pytest.ExitCode.OK
    found = free((16 << 20) - 1)
    assert found.code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --lora-output: wanted 16 MiB of room, got 15 in {tmp_path}" in found.text
    assert not list(tmp_path.iterdir())


def test_a_worker_of_xdist_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    found = python("-m", "pytest", GPU, "--benchmark")

    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark cannot measure under xdist" in found.stderr
