"""The options of the plugin: declared, checked before any work is done, and resolved for the device there is."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from lora_bench.bench.matrix import MATRICES, Matrix
from lora_bench.bench.workload import POPULARITIES, TARGET_SETS
from lora_bench.case import DTYPES
from lora_bench.models.presets import widths

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
R = TypeVar("R")
DEFAULT_SUBJECTS = ("reference", "peft")
DEFAULTS = {
    "cpu": {"model": "tiny", "dtype": "fp32", "batch": 8, "sequence": 64},
    "cuda": {"model": "llama-3.2-1b", "dtype": "bf16", "batch": 8, "sequence": 512},
}
"""What is measured where nothing is said: a model that suits the device."""


@dataclass(frozen=True)
class Settings:
    """The options, resolved for the device there is."""

    device: str
    model: str
    dtype: str
    batch: int
    sequence: int
    matrix: Matrix
    targets: str
    subjects: tuple[str, ...]


SETTINGS = pytest.StashKey[Settings]()


def declare(parser: pytest.Parser) -> None:
    """Add the options to pytest's."""
    group = parser.getgroup("lora-bench", "lora-bench: is a LoRA implementation right, and what does it cost?")
    group.addoption("--benchmark", action="store_true", help="measure the GPU suites instead of only checking them")
    group.addoption(
        "--lora-subject",
        action="append",
        metavar="NAME",
        help="implementation under test: a name, module:attr or path.py:ATTR; repeatable (default: those of the suite)",
    )
    group.addoption("--lora-device", default="auto", help="auto, cpu, cuda or cuda:N (default: CUDA if there is one)")
    group.addoption(
        "--lora-model",
        help="a preset's name, a single layer as linear-D_INxD_OUT, or a checkpoint's directory "
        "(default: tiny on a CPU, llama-3.2-1b on a GPU)",
    )
    group.addoption("--lora-dtype", help=f"{', '.join(DTYPES)} (default: fp32 on a CPU, bf16 on a GPU)")
    group.addoption(
        "--lora-matrix",
        default="quick",
        metavar="NAME",
        help="; ".join(f"{name}: {matrix}" for name, matrix in MATRICES.items()) + " (default: quick)",
    )
    group.addoption("--lora-rank", type=_numbers, metavar="N,N", help="ranks r, in place of the matrix's")
    group.addoption("--lora-adapters", type=_numbers, metavar="N,N", help="numbers of adapters that share a batch")
    group.addoption(
        "--lora-popularity", type=_words, metavar="HOW", help=f"{', '.join(POPULARITIES)}: how a batch asks"
    )
    group.addoption(
        "--lora-targets", default="all", help=f"{', '.join(TARGET_SETS)}: the layers adapted (default: all)"
    )
    group.addoption("--lora-batch", type=int, help="sequences in a batch (default: 8)")
    group.addoption("--lora-sequence", type=int, help="tokens of each sequence (default: 64 on a CPU, 512 on a GPU)")
    group.addoption("--lora-seconds", type=float, default=20.0, help="time for each phase's comparison (default: 20)")
    group.addoption(
        "--lora-energy",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also measure joules, in a window of so many seconds for each row: 10 or more (default: 0, not at all)",
    )
    group.addoption("--lora-output", default=".lora_bench", help="folder for what is kept (default: .lora_bench)")
    group.addoption("--lora-examples", type=int, default=60, help="cases for each conformance check (default: 60)")
    group.addoption(
        "--lora-timeout",
        type=float,
        help="seconds after which a case of a check hangs (default: 60), or a row of a benchmark (600); 0: never",
    )
    group.addoption("--lora-resume", metavar="RUN", help="go on with a run that was cut off: its id, or its .jsonl")
    group.addoption(
        "--lora-baseline",
        metavar="PLACE",
        help="compare with an earlier run: its .jsonl or --benchmark-json, or a folder of lora-bench promote",
    )
    group.addoption(
        "--lora-on-inconclusive",
        choices=("fail", "warn"),
        default="fail",
        help="what cannot be told beside the baseline: exit with 6 (default), or with 0 if anything passed",
    )


def check(config: pytest.Config) -> None:
    """Raise pytest.UsageError for the first option that cannot be meant.

    Only what was asked for is looked up here: subjects and devices need torch.
    """
    option = config.option
    _check_values(option)
    if option.lora_model is not None:
        or_usage_error(_check_model, option.lora_model)
        if option.lora_targets != "all" and widths(option.lora_model):
            raise pytest.UsageError(
                f"--lora-targets must be all for {option.lora_model}, which is one layer, got {option.lora_targets!r}"
            )
    if option.lora_device != "auto":
        or_usage_error(resolve_device, option.lora_device)
    for text in option.lora_subject or ():
        or_usage_error(_find_subject, text)
    if option.benchmark:
        _check_benchmark(config)
        _check_output(option.lora_output)
    for name in ("baseline", "resume"):
        if getattr(option, f"lora_{name}") is not None and not option.benchmark:
            raise pytest.UsageError(f"--lora-{name} needs --benchmark: without it nothing is measured")


def _numbers(text: str) -> tuple[int, ...]:
    """The option type of "8,64"; what is named twice counts once."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between them, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    """The option type of "distinct,zipf"; what is named twice counts once."""
    return tuple(dict.fromkeys(text.split(",")))


def _check_values(option: argparse.Namespace) -> None:
    for name in ("rank", "adapters", "batch", "sequence", "examples"):
        given, least = getattr(option, f"lora_{name}"), 2 if name == "sequence" else 1
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value < least:
                raise pytest.UsageError(f"--lora-{name} must be at least {least}, got {value}")
    for name, known in (("dtype", tuple(DTYPES)), ("matrix", tuple(MATRICES)), ("targets", tuple(TARGET_SETS))):
        value = getattr(option, f"lora_{name}")
        if value not in (None, *known):
            raise pytest.UsageError(f"--lora-{name} must be one of {', '.join(known)}, got {value!r}")
    for value in option.lora_popularity or ():
        if value not in POPULARITIES:
            raise pytest.UsageError(f"--lora-popularity must be among {', '.join(POPULARITIES)}, got {value!r}")
    _check_seconds(option)


def _check_seconds(option: argparse.Namespace) -> None:
    if option.lora_timeout is not None and not option.lora_timeout >= 0:
        raise pytest.UsageError(f"--lora-timeout must be at least 0, got {option.lora_timeout:g}")
    if option.lora_energy != 0 and not option.lora_energy >= 10:
        raise pytest.UsageError(f"--lora-energy must be 0 or at least 10 seconds, got {option.lora_energy:g}")
    if option.lora_energy == math.inf:
        raise pytest.UsageError("--lora-energy must be finite, got inf")
    if not option.lora_seconds > 0:
        raise pytest.UsageError(f"--lora-seconds must be above 0, got {option.lora_seconds:g}")


def _check_benchmark(config: pytest.Config) -> None:
    option = config.option
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark, which is not installed or switched off")
    if getattr(option, "dist", "no") != "no" or os.environ.get("PYTEST_XDIST_WORKER"):
        raise pytest.UsageError("--benchmark cannot measure under xdist: the workers would disturb each other; drop -n")
    if getattr(option, "benchmark_compare_fail", None):
        raise pytest.UsageError(
            "--benchmark-compare-fail compares times with whatever was saved last, on whatever machine: "
            "use --lora-baseline"
        )
    for name in ("disable", "skip", "only", "cprofile"):
        if getattr(option, f"benchmark_{name}", None):
            raise pytest.UsageError(
                f"--benchmark takes its samples before pytest-benchmark sees them: drop --benchmark-{name}"
            )


def _check_output(folder: str) -> None:
    """Raise where nothing can be kept, before there is something to lose."""
    from lora_bench.bench.records import ROOM

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        wanted = "--lora-output: wanted a folder that can be written"
        raise pytest.UsageError(f"{wanted}, got {folder}: {error.strerror}") from None
    if free < ROOM:
        raise pytest.UsageError(f"--lora-output: wanted {ROOM >> 20} MiB of room, got {free >> 20} in {folder}")


def or_usage_error(check: Callable[[T], R], value: T) -> R:
    """`check(value)`, its ValueError or OSError as pytest's error for a wrong option."""
    try:
        return check(value)
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None


def _check_model(text: str) -> None:
    from lora_bench.models.build import check_model

    check_model(text)


def _find_subject(text: str) -> None:
    from lora_bench import subjects

    # A shipped subject whose library is not installed is a skip that says what to install, not a wrong option.
    if text not in subjects.shipped() or subjects.missing(text) is None:
        subjects.find(text)


def resolve_device(text: str) -> str:
    """The device that --lora-device means; ValueError for one that is not there."""
    import torch

    kind, _, index = text.partition(":")
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise ValueError(f"--lora-device must be auto, cpu, cuda or cuda:N, got {text!r}")
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--lora-device {text}: torch {torch.__version__} sees {count} CUDA devices")
    return text


def settings(config: pytest.Config) -> Settings:
    """The options resolved for the device; imports torch."""
    if SETTINGS not in config.stash:
        option = config.option
        device = resolve_device(option.lora_device)
        defaults: dict[str, Any] = DEFAULTS[device.partition(":")[0]]
        chosen = {name: getattr(option, f"lora_{name}") or default for name, default in defaults.items()}
        subjects = tuple(dict.fromkeys(option.lora_subject or DEFAULT_SUBJECTS))
        named = MATRICES[option.lora_matrix]
        matrix = Matrix(
            option.lora_rank or named.ranks,
            option.lora_adapters or named.adapters,
            option.lora_popularity or named.popularities,
        )
        config.stash[SETTINGS] = Settings(
            device=device, matrix=matrix, targets=option.lora_targets, subjects=subjects, **chosen
        )
    return config.stash[SETTINGS]
