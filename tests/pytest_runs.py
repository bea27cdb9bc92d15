"""Runs of pytest as if they were typed in the project's root."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = "suites/gpu"
SIZES = ("--lora-rank=4", "--lora-adapters=2", "--lora-batch=2", "--lora-sequence=8")
SMALL = ("--lora-device=cpu", "--lora-model=micro", *SIZES)


@dataclass
class Run:
    """One run of pytest within this process: exit code, what it printed, and each test's report by its name."""

    code: int = -1
    text: str = ""
    reports: dict[str, pytest.TestReport] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.reports[report.nodeid.rpartition("::")[2]] = report

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(report.outcome for report in self.reports.values())


def run(*arguments: str) -> Run:
    """`pytest` with these arguments in the project's root, as if it were typed there."""
    found, printed = Run(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(ROOT), redirect_stdout(printed), redirect_stderr(printed):
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        patch.setenv("COLUMNS", "200")
        gc.freeze()  # a pytest looks for garbage five times when it ends: not among all that torch has imported
        try:
            found.code = int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[found]))
        finally:
            gc.unfreeze()
    found.text = printed.getvalue()
    return found


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
