"""What a test of the GPU suites receives: one planned row, to be checked and, with --benchmark, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench import subjects
from lora_bench.bench import measure, ready
from lora_bench.bench.carrier import carry
from lora_bench.bench.proof import Unproven, Wrong
from lora_bench.bench.workload import BASE, verbs
from lora_bench.models.bases import FOUR_BIT, missing
from lora_bench.spec import LoraSpec

if TYPE_CHECKING:
    from torch import nn

    from lora_bench.bench.arm import Arm
    from lora_bench.bench.session import Session
    from lora_bench.bench.workload import Row, Workload
    from lora_bench.subject import Subject


class Workshop:
    """Builds arms in this process for the unmeasured run, keeping the last base model and the last arm."""

    def __init__(self, device: str) -> None:
        measure.settle_threads(device)
        self.device = device
        self._base: tuple[object, nn.Module] | None = None
        self._arm: tuple[object, tuple[Subject | None, Arm]] | None = None

    def prove(self, row: Row) -> None:
        """Build the row's arm and run its step once; raises `Wrong` where it is not LoRA."""
        if self._base is None or self._base[0] != row.comparison:
            self._base, self._arm = None, None
            self._base = row.comparison, ready.build_base(row, self.device)
        if self._arm is None or self._arm[0] != (row.arm, row.comparison):
            self._arm = None
            self._arm = (row.arm, row.comparison), ready.build(self._base[1], row)
        subject, arm = self._arm[1]
        ready.ready_row(row, subject, arm)
        if row.subject == BASE and row.workload.phase == "train":
            self._base = None  # its weights were trained: they are no control any more


class Scenario:
    """One row under test: `check` it, then `measure` it."""

    def __init__(self, row: Row, workshop: Workshop, session: Session | None, request: pytest.FixtureRequest) -> None:
        self.row, self._workshop, self._session, self._request = row, workshop, session, request

    def check(self) -> None:
        """Every adapted layer agrees with the float64 definition within the derived bound; fails the test otherwise.

        With --benchmark the rows of a comparison are proven in the worker that then times the same modules.
        """
        __tracebackhide__ = True
        if failure := self._failure():
            pytest.fail(f"{self.row}\n  {failure}", pytrace=False)

    def _failure(self) -> str:
        if self._session is not None:
            return self._session.result(self.row).failure
        try:
            self._workshop.prove(self.row)
        except (Wrong, Unproven) as error:
            return str(error)
        return ""

    def measure(self) -> None:
        """With --benchmark, hand the row's samples to pytest-benchmark; otherwise nothing."""
        if self._session is not None:
            result = self._session.result(self.row)
            carry(self._request.getfixturevalue("benchmark"), result.samples.seconds, self._session.extra_info(result))


def reason_to_skip(row: Row, device: str) -> str | None:
    """Why this row cannot be run here, or None."""
    if row.subject == BASE:
        return None
    if row.subject in subjects.shipped() and (reason := subjects.missing(row.subject)):
        return reason
    subject, workload = subjects.find(row.subject), row.workload
    alternatives = verbs(workload)
    if not any(subject.offers(*each) for each in alternatives):
        return f"{subject} does not offer {' or '.join(', '.join(each) for each in alternatives)}"
    if workload.phase == "train" and not subject.offers("factors"):
        return f"{subject} does not offer factors, without which its gradients cannot be proven"
    if workload.dtype not in subject.dtypes:
        return f"{subject} does not claim {workload.dtype}"
    if device.partition(":")[0] not in subject.devices:
        return f"{subject} does not claim {device}"
    if reason := subject.supports(LoraSpec(workload.rank, alpha=2.0 * workload.rank)):
        return f"{subject} does not offer rank {workload.rank}: {reason}"
    return _wrong_base(subject, workload)


def _wrong_base(subject: Subject, workload: Workload) -> str | None:
    if workload.setup != "four_bit":
        return None if "linear" in subject.layers else f"{subject} takes no dense base"
    kinds = [kind for kind in subject.layers if kind in FOUR_BIT]
    if not kinds:
        return f"{subject} takes no 4-bit base"
    if kinds[0] == "linear4bit" and workload.dtype == "fp64":
        return "bitsandbytes quantises 16- and 32-bit weights, not fp64"
    return missing(kinds[0])
