"""The pytest plugin: every option and hook of lora-bench.

It is loaded in every pytest run of an environment that has lora-bench installed, so importing it must stay cheap:
nothing here imports torch before a suite of ours is collected.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_bench import ending, options
from lora_bench.bench import matrix
from lora_bench.bench.workload import BASE, Row
from lora_bench.gate import baseline
from lora_bench.report import github

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lora_bench.bench.scenario import Scenario, Workshop
    from lora_bench.bench.session import Session

EXIT_LOST = 7
"""The device was lost: what had been measured is kept."""
WORKSHOP: pytest.StashKey[Workshop] = pytest.StashKey()
SESSION: pytest.StashKey[Session] = pytest.StashKey()
SCREEN = pytest.StashKey[ending.Screen]()
REPORTED = pytest.StashKey[list[str]]()
"""Lines on the reports of a run that has ended, and for GitHub."""
JUDGED = pytest.StashKey[list[Any]]()
REACHED = pytest.StashKey[bool]()
"""Of some subject a row was measured or checked."""
SKIPPED = "lora-bench: rows of subjects were asked for, and none of them was measured or checked"


def pytest_addoption(parser: pytest.Parser) -> None:
    options.declare(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lora_setup(setup, *phases): a set-up of the GPU suites and its phases")
    options.check(config)
    if config.option.benchmark:
        # Our table says more, unless runs are compared; and saved ones without their samples cannot be, honestly.
        config.option.benchmark_quiet |= config.get_verbosity() <= 0 and not config.option.benchmark_compare
        config.option.benchmark_save_data = True
    if config.option.lora_baseline is not None:
        config.stash[SCREEN] = ending.Screen(Path(config.option.lora_baseline))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("lora_setup")
    if "scenario" not in metafunc.fixturenames or marker is None:
        return
    chosen = options.settings(metafunc.config)
    setup, *phases = marker.args
    place = {name: getattr(chosen, name) for name in ("model", "dtype", "batch", "sequence", "targets")}
    rows = matrix.rows(chosen.matrix, setup, phases, chosen.subjects, **place)
    ids = [str(row.workload) if row.subject == BASE else f"{_short(row.subject)}-{row.workload}" for row in rows]
    metafunc.parametrize("scenario", rows, indirect=True, ids=ids)


def _short(subject: str) -> str:
    """A subject's place in a test id: its name, or what follows the colon of module:attr."""
    return subject.rpartition(":")[2]


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """One planned row of the GPU suites: `check()` it, then `measure()` it."""
    from lora_bench.bench.scenario import Scenario

    stash = request.config.stash
    return Scenario(request.param, stash[WORKSHOP], stash.get(SESSION, None), request)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (judged := _judged(item)) is not None:
        option = item.config.option
        judged.docket.output = Path(option.lora_output)
        judged.docket.examples = option.lora_examples
        if option.lora_timeout is not None:
            judged.docket.seconds = option.lora_timeout


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if "lora_verdict" not in dict(item.user_properties):
        item.user_properties += _properties(item)
    report: pytest.TestReport = yield
    if report.when == "call" and not report.skipped and _of_subject(item):
        item.config.stash[REACHED] = True
    return report


def _of_subject(item: pytest.Item) -> bool:
    return (row := _row_of(item)) is not None and row.subject != BASE


def _properties(item: pytest.Item) -> list[tuple[str, object]]:
    """What is known by now of the check or the row that a test is about."""
    if (judged := _judged(item)) is not None:
        return judged.verdict.properties() if judged.verdict is not None else []
    run, row = item.config.stash.get(SESSION, None), _row_of(item)
    if run is None or row is None or row not in run.results or run.results[row].pending:
        return []
    return ending.properties(run, row, item.config.stash.get(SCREEN, None))


def _judged(item: pytest.Item) -> Any:
    """The conformance check that a test is about, or None; told by its module, so as to import nothing."""
    callspec = getattr(item, "callspec", None)
    check = callspec.params.get("check") if callspec else None
    return check if type(check).__module__ == "lora_bench.conformance.collect" else None


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

    device = options.settings(config).device
    config.stash[WORKSHOP] = Workshop(device)
    reasons = {item: reason_to_skip(row, device) for item, row in rows.items()}
    for item, reason in reasons.items():
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.option.benchmark and not config.option.collectonly:
        session = options.or_usage_error(_session, config)
        options.or_usage_error(session.plan, [row for item, row in rows.items() if reasons[item] is None])
        config.stash[SESSION] = session
        for item, row in rows.items():
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=row.workload.phase))


def _session(config: pytest.Config) -> Session:
    from lora_bench.bench.records import Records
    from lora_bench.bench.session import Session

    option = config.option
    records = Records(Path(option.lora_output), option.lora_resume)
    session = Session(options.settings(config).device, option.lora_seconds, records, _teller(config))
    session.energy_seconds = option.lora_energy
    if option.lora_timeout is not None:
        session.seconds = option.lora_timeout
    return session


def _teller(config: pytest.Config) -> Any:
    """Print a line of progress, past pytest's capturing."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def tell(text: str) -> None:
        with nullcontext() if capture is None else capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"  {text}")

    return tell


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    if WORKSHOP not in config.stash:
        return []
    chosen = options.settings(config)
    what = f"device={chosen.device} model={chosen.model} dtype={chosen.dtype}"
    what += f" batch={chosen.batch} sequence={chosen.sequence}"
    what += f" targets={chosen.targets}" if chosen.targets != "all" else ""
    lines = [f"lora-bench: {what} {chosen.matrix}"]
    if chosen.device == "cpu" and config.option.lora_device == "auto":
        lines.append("lora-bench: no CUDA device: a small model on the CPU; nothing here speaks of a GPU")
    if (session := config.stash.get(SESSION, None)) is not None and session.records.moved:
        lines.append(f"lora-bench: of the run that goes on, {session.records.moved}")
    if (screen := config.stash.get(SCREEN, None)) is not None and config.option.benchmark:
        lines += [f"lora-bench: {line}" for line in screen.shelf.trouble]
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is not None and session.results:
        from lora_bench.report.table import render

        terminalreporter.section("lora-bench")
        terminalreporter.write_line(render(session))
        terminalreporter.write_line(f"records: {session.records.path}")
        if ending.cut_off(session):
            goes_on = f"--lora-resume {session.records.run_id} goes on with it"
            terminalreporter.write_line(f"not all was measured: {goes_on}", yellow=True)
        if session.records.unwritten:
            terminalreporter.write_line(f"they are not whole: {session.records.unwritten}", red=True)
    if (screen := config.stash.get(SCREEN, None)) is not None and not config.option.collectonly:
        terminalreporter.section(f"against {config.option.lora_baseline}")
        for line in screen.lines:
            terminalreporter.write_line(str(line))
        terminalreporter.write_line(baseline.closing(screen.lines))
        if screen.changed:
            terminalreporter.write_line(f"also changed: {'; '.join(screen.changed)}")
        if loose := _loose(config):
            terminalreporter.write_line(f"WARNING: {loose}", yellow=True, bold=True)
    for told in config.stash.get(REPORTED, []):
        terminalreporter.ensure_newline()
        terminalreporter.write_line(told)
    if verdicts := config.stash.get(JUDGED, None):
        from lora_bench.conformance import summary

        terminalreporter.section("lora-bench")
        terminalreporter.write_line(summary(verdicts))


def pytest_sessionfinish(session: pytest.Session) -> None:
    stash, option = session.config.stash, session.config.option
    if option.collectonly:
        return
    run, screen, exits = stash.get(SESSION, None), stash.get(SCREEN, None), [_conclude(session)]
    nobody = REACHED not in stash and any(map(_of_subject, session.items))
    told = [SKIPPED] if nobody and session.exitstatus == pytest.ExitCode.OK else []
    exits.append(baseline.EXIT_INCONCLUSIVE if told else 0)
    if screen is not None:
        lenient = option.lora_on_inconclusive == "warn"
        exits.append(baseline.exit_code(screen.judge(run), lenient=lenient))
    if run is not None:
        exits.append(baseline.EXIT_REGRESSION if run.records.unwritten else 0)
        exits.append(baseline.EXIT_INCONCLUSIVE if run.differs else 0)
        reached = [run.results[row] for row in run.planned if row in run.results]
        if run.lost:
            session.exitstatus = EXIT_LOST
        elif session.testsfailed and session.testsfailed == sum(result.not_comparable for result in reached):
            session.exitstatus = pytest.ExitCode.OK  # nothing else has failed
    if session.exitstatus == pytest.ExitCode.OK and any(exits):
        session.exitstatus = (
            baseline.EXIT_REGRESSION if baseline.EXIT_REGRESSION in exits else baseline.EXIT_INCONCLUSIVE
        )
    stash[REPORTED] = told + _report(session.config)


def _report(config: pytest.Config) -> list[str]:
    """Write the reports of a measured run; lines on them."""
    run, screen = config.stash.get(SESSION, None), config.stash.get(SCREEN, None)
    told = ending.write_reports(run.records.path) if run is not None and run.results else []
    if github.active() and (run is not None or screen is not None):
        told += ending.tell_github(run, screen.lines if screen else [], _loose(config))
    return told


def _loose(config: pytest.Config) -> str:
    """What is to be said loudly where verdicts that are no pass did not count."""
    screen = config.stash.get(SCREEN, None)
    if screen is None or config.option.lora_on_inconclusive != "warn":
        return ""
    strict = baseline.exit_code(screen.lines)
    if strict != baseline.EXIT_INCONCLUSIVE or baseline.exit_code(screen.lines, lenient=True) == strict:
        return ""
    others = [line for line in screen.lines if line.verdict in (baseline.INCONCLUSIVE, baseline.NOT_COMPARABLE)]
    return ending.LOOSE.format(len(others), len(screen.lines))


def _conclude(session: pytest.Session) -> int:
    """Keep the verdicts of the conformance checks that ran; 6 where some were asked for and none conforms."""
    checks = filter(None, map(_judged, session.items))
    reached = session.config.stash[JUDGED] = [check.verdict for check in checks if check.verdict is not None]
    nothing = reached and not any(verdict.status == "conforms" for verdict in reached)
    return baseline.EXIT_INCONCLUSIVE if nothing else 0
