"""The pytest plugin: every option and hook of lora-bench.

It is loaded in every pytest run of an environment that has lora-bench installed, so importing it must stay cheap:
nothing here imports torch before a suite of ours is collected.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from lora_bench.bench.workload import BASE, Row, Workload
from lora_bench.gate import baseline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_bench.bench.scenario import Scenario, Workshop
    from lora_bench.bench.session import Session

T = TypeVar("T")
R = TypeVar("R")
DTYPES = ("fp64", "fp32", "bf16", "fp16")
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
    rank: int
    adapters: int
    subjects: tuple[str, ...]


SETTINGS = pytest.StashKey[Settings]()
WORKSHOP: pytest.StashKey[Workshop] = pytest.StashKey()
SESSION: pytest.StashKey[Session] = pytest.StashKey()
BASELINE = pytest.StashKey[dict[Row, dict[str, Any]]]()
VERDICTS = pytest.StashKey[list[baseline.Line]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora-bench", "lora-bench: is a LoRA implementation right, and what does it cost?")
    group.addoption("--benchmark", action="store_true", help="measure the GPU suites instead of only checking them")
    group.addoption(
        "--lora-subject",
        action="append",
        metavar="NAME",
        help="implementation under test: a name, module:attr or path.py:ATTR; repeatable (default: reference and peft)",
    )
    group.addoption("--lora-device", default="auto", help="auto, cpu, cuda or cuda:N (default: CUDA if there is one)")
    group.addoption("--lora-model", help="a preset's name or a checkpoint's directory (default: tiny on a CPU)")
    group.addoption("--lora-dtype", help=f"{', '.join(DTYPES)} (default: fp32 on a CPU, bf16 on a GPU)")
    group.addoption("--lora-rank", type=int, default=16, help="rank r of every adapter (default: 16)")
    group.addoption("--lora-adapters", type=int, default=8, help="adapters sharing a batch (default: 8)")
    group.addoption("--lora-batch", type=int, help="sequences in a batch (default: 8)")
    group.addoption("--lora-sequence", type=int, help="tokens of each sequence (default: 64 on a CPU, 512 on a GPU)")
    group.addoption("--lora-seconds", type=float, default=20.0, help="time for each phase's comparison (default: 20)")
    group.addoption("--lora-output", default=".lora_bench", help="folder for the records (default: .lora_bench)")
    group.addoption("--lora-baseline", metavar="FILE", help="a JSON of --benchmark-json to compare with")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lora_setup(setup, *phases): a set-up of the GPU suites and its phases")
    option = config.option
    _check_values(option)
    # Only what was asked for is looked up here: subjects and devices need torch.
    if option.lora_model is not None:
        _or_usage_error(_check_model, option.lora_model)
    if option.lora_device != "auto":
        _or_usage_error(_resolve_device, option.lora_device)
    for text in option.lora_subject or ():
        _or_usage_error(_find_subject, text)
    if option.benchmark:
        _configure_benchmark(config)
    if option.lora_baseline is not None:
        if not option.benchmark:
            raise pytest.UsageError("--lora-baseline needs --benchmark: without it nothing is measured to compare")
        config.stash[BASELINE] = _or_usage_error(baseline.load, Path(option.lora_baseline))


def _check_values(option: argparse.Namespace) -> None:
    for name in ("rank", "adapters", "batch", "sequence"):
        value, least = getattr(option, f"lora_{name}"), 2 if name == "sequence" else 1
        if value is not None and value < least:
            raise pytest.UsageError(f"--lora-{name} must be at least {least}, got {value}")
    if option.lora_dtype not in (None, *DTYPES):
        raise pytest.UsageError(f"--lora-dtype must be one of {', '.join(DTYPES)}, got {option.lora_dtype!r}")
    if not option.lora_seconds > 0:
        raise pytest.UsageError(f"--lora-seconds must be above 0, got {option.lora_seconds:g}")


def _configure_benchmark(config: pytest.Config) -> None:
    option = config.option
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark, which is not installed or switched off")
    if getattr(option, "dist", "no") != "no" or os.environ.get("PYTEST_XDIST_WORKER"):
        raise pytest.UsageError("--benchmark cannot measure under xdist: the workers would disturb each other; drop -n")
    for name in ("disable", "skip", "only", "cprofile"):
        if getattr(option, f"benchmark_{name}", None):
            raise pytest.UsageError(
                f"--benchmark takes its samples before pytest-benchmark sees them: drop --benchmark-{name}"
            )
    try:
        Path(option.lora_output).mkdir(parents=True, exist_ok=True)
        probe = Path(option.lora_output) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise pytest.UsageError(f"--lora-output {option.lora_output}: {error.strerror}") from None
    # Our table says more, and saved runs without their samples cannot be compared honestly.
    option.benchmark_quiet = not config.get_verbosity() > 0
    option.benchmark_save_data = True


def _or_usage_error(check: Callable[[T], R], text: T) -> R:
    try:
        return check(text)
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


def _resolve_device(text: str) -> str:
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
        device = _resolve_device(option.lora_device)
        defaults: dict[str, Any] = DEFAULTS[device.partition(":")[0]]
        chosen = {name: getattr(option, f"lora_{name}") or default for name, default in defaults.items()}
        subjects = tuple(dict.fromkeys(option.lora_subject or DEFAULT_SUBJECTS))
        config.stash[SETTINGS] = Settings(
            device=device, rank=option.lora_rank, adapters=option.lora_adapters, subjects=subjects, **chosen
        )
    return config.stash[SETTINGS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("lora_setup")
    if "scenario" not in metafunc.fixturenames or marker is None:
        return
    chosen = settings(metafunc.config)
    setup, *phases = marker.args
    rows = [
        _row(subject, setup, phase, chosen)
        for phase in phases
        for subject in ((BASE,) if setup == BASE else chosen.subjects)
    ]
    ids = [str(row.workload) if row.subject == BASE else f"{_short(row.subject)}-{row.workload}" for row in rows]
    metafunc.parametrize("scenario", rows, indirect=True, ids=ids)


def _row(subject: str, setup: str, phase: str, chosen: Settings) -> Row:
    rank, adapters = (0 if setup == BASE else chosen.rank), (chosen.adapters if setup == "batched" else 1)
    workload = Workload(setup, phase, chosen.model, chosen.dtype, rank, chosen.batch, chosen.sequence, adapters)
    return Row(subject, workload)


def _short(subject: str) -> str:
    """A subject's place in a test id: its name, or what follows the colon of module:attr."""
    return subject.rpartition(":")[2]


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """One planned row of the GPU suites: `check()` it, then `measure()` it."""
    from lora_bench.bench.scenario import Scenario

    stash = request.config.stash
    return Scenario(request.param, stash[WORKSHOP], stash.get(SESSION, None), request)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    rows = {item: row for item in items if (row := _row_of(item)) is not None}
    yield
    if not rows:
        return
    chosen = {rows[item] for item in items if item in rows}
    if not chosen:
        return
    controls = {row.base() for row in chosen}
    items[:0] = [item for item, row in rows.items() if row in controls and item not in items]
    _prepare(config, {item: rows[item] for item in items if item in rows})


def _row_of(item: pytest.Item) -> Row | None:
    callspec = getattr(item, "callspec", None)
    row = callspec.params.get("scenario") if callspec else None
    return row if isinstance(row, Row) else None


def _prepare(config: pytest.Config, rows: dict[pytest.Item, Row]) -> None:
    from lora_bench.bench.carrier import CLOCK
    from lora_bench.bench.scenario import Workshop, reason_to_skip

    device = settings(config).device
    config.stash[WORKSHOP] = Workshop(device)
    reasons = {item: reason_to_skip(row, device) for item, row in rows.items()}
    for item, reason in reasons.items():
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.option.benchmark and not config.option.collectonly:
        from lora_bench.bench.records import Records
        from lora_bench.bench.session import Session

        session = Session(device, config.option.lora_seconds, Records(Path(config.option.lora_output)), _teller(config))
        session.planned = [row for item, row in rows.items() if reasons[item] is None]
        config.stash[SESSION] = session
        for item, row in rows.items():
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=row.workload.phase))


def _teller(config: pytest.Config) -> Any:
    """Print a line of progress, past pytest's capturing."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"  {text}")

    return tell


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    if WORKSHOP not in config.stash:
        return []
    chosen = settings(config)
    what = f"device={chosen.device} model={chosen.model} dtype={chosen.dtype} rank={chosen.rank}"
    lines = [f"lora-bench: {what} batch={chosen.batch} sequence={chosen.sequence} adapters={chosen.adapters}"]
    if chosen.device == "cpu" and config.option.lora_device == "auto":
        lines.append("lora-bench: no CUDA device: a small model on the CPU; nothing here speaks of a GPU")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is not None and session.results:
        from lora_bench.report.table import render

        terminalreporter.section("lora-bench")
        terminalreporter.write_line(render(session))
        terminalreporter.write_line(f"records: {session.records.path}")
    if VERDICTS in config.stash:
        terminalreporter.section(f"against {config.option.lora_baseline}")
        for line in config.stash[VERDICTS]:
            terminalreporter.write_line(str(line))


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash = session.config.stash
    if BASELINE in stash and not session.config.option.collectonly:
        infos: dict[Row, dict[str, Any]] = {}
        if (run := stash.get(SESSION, None)) is not None:
            # Of planned rows only, as in the baseline's own file: a base that stands in for no test is in neither.
            results = [run.results[row] for row in run.planned if row in run.results]
            infos = {result.row: run.extra_info(result) for result in results if result.seconds}
        stash[VERDICTS] = baseline.compare(infos, stash[BASELINE])
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = baseline.exit_code(stash[VERDICTS])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    if SESSION in config.stash:
        machine_info["lora_bench"] = config.stash[SESSION].fingerprint
