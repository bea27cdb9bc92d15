"""One run of the GPU suites: which rows are planned, their results, and the object that each test receives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.bench import measure, turns
from lora_bench.bench.counts import Bound, Ceilings, bounded, count, reconciled
from lora_bench.bench.isolate import Failure, stream
from lora_bench.bench.nvml_state import why_gone
from lora_bench.bench.result import Result, recorded
from lora_bench.bench.sampling import percentiles
from lora_bench.bench.workload import BASE, Row, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.bench.records import Records

SECONDS = 600.0
"""How long a row may take without a sign of life, before it is taken to hang."""
ELSEWHERE = ("gpu_lost", "not_comparable")
"""Failures of this machine and not of a row: the run may still go on elsewhere, or later."""
SILENT = "the worker ended without a word about it"


class Session:
    """Measures the planned rows, a comparison at a time, when the first of its results is asked for.

    What a worker process dies of costs the row that it had in hand, and the others are measured without it; a lost GPU
    costs all that are left. What the records hold of an earlier part of the run is not measured again.

    Raises ValueError where those records lack something.
    """

    def __init__(
        self,
        device: str,
        budget_seconds: float,
        records: Records,
        tell: Callable[[str], None],
    ) -> None:
        self.device, self.budget_seconds, self.records, self.tell = device, budget_seconds, records, tell
        self.seconds, self.energy_seconds = SECONDS, 0.0
        self.planned: list[Row] = []
        self.lost = self.differs = self.uuid = ""
        try:
            self.results, self.ceilings, self._began = recorded(records.earlier), _ceilings(records), _plan(records)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{records.path} cannot be gone on with: {error}") from None
        fingerprints = [record["fingerprint"] for record in records.earlier if record.get("fingerprint")]
        self.fingerprint: dict[str, Any] = fingerprints[-1] if fingerprints else {}

    def plan(self, rows: Sequence[Row]) -> None:
        """Take on rows, and write down which. Raises ValueError where the run that goes on had others."""
        self.planned = list(rows)
        for row in rows:
            self.results.setdefault(row, Result(row))
        if self._began is None:
            now = [{"subject": row.subject, "workload": row.workload.as_dict()} for row in rows]
            self.records.append(quantity="plan", device=self.device, rows=now)
            return
        for one, other, had in ((self._began, rows, "had"), (rows, self._began, "had not")):
            if odd := next((row for row in one if row not in other), None):
                raise ValueError(f"the run {self.records.run_id} {had} planned {odd}: it goes on with the same options")

    def result(self, row: Row) -> Result:
        """The row's result; measures its whole comparison if that has not happened yet."""
        if row not in self.results or not self.settled(row):
            together = [other for other in self.planned if other.comparison == row.comparison]
            rows = list(dict.fromkeys([*(other.base() for other in together), *together]))
            for other in rows:
                self.results.setdefault(other, Result(other))
            self._time(rows)
            self._alone(rows, "memory", measure.weigh, ())
            if self.energy_seconds:
                self._alone(rows, "energy", measure.power, (self.energy_seconds,))
        return self.results[row]

    def settled(self, row: Row) -> bool:
        """Whether nothing is left to measure: it failed, or has its times, its memory and, if asked for, its energy."""
        result = self.results[row]
        measured = result.measured and result.memory and (result.energy or not self.energy_seconds)
        return bool(result.failure or measured)

    def _time(self, rows: list[Row]) -> None:
        """Time what has no times yet, beside its base, again without the row that ended a worker."""
        while left := [row for row in rows if self.results[row].pending]:
            if self.lost:
                self._fail(left, "gpu_lost", self.lost)
                return
            asked = list(dict.fromkeys([*(row.base() for row in left), *left]))
            self.tell(f"building and proving {len({row.arm for row in asked})} arms of {asked[0].workload.model}")
            failure = self._compare(asked)
            if failure is None:
                self._fail(left, "error", SILENT)
            elif failure.kind == "gpu_lost":
                self.lost = failure.text
            else:
                culprit = None if failure.held is None else asked[failure.held]
                # Without its base no row has anything to be compared with.
                self._fail(
                    left if culprit is None or culprit.subject == BASE else [culprit], failure.kind, failure.text
                )
                if culprit is not None:
                    self._unseen(culprit, failure)

    def _unseen(self, row: Row, failure: Failure) -> None:
        """Say why a row that has its times was not looked at once more on its GPU."""
        result = self.results[row]
        if self.device.startswith("cuda") and result.measured and not result.launches:
            self._note(row, "launches", {"launch_share": f"unavailable ({failure.kind}: {failure.text})"})

    def _compare(self, rows: list[Row]) -> Failure | None:
        """Time rows side by side in one worker; what ended it, if something did."""
        for message in stream(measure.compare, rows, self.device, self.budget_seconds, seconds=self.seconds):
            match message:
                case turns.Progress(text):
                    self.tell(text)
                case turns.Timing() | turns.Launches():
                    self._keep(message)
                case turns.Refusal(row, kind, text):
                    self._fail([row], kind, text)
                case Failure():
                    return self._explained(message)
                case dict() if differs := self._differs(message):
                    self._fail(rows, "not_comparable", differs)
                    return None
                case dict():
                    self.fingerprint = message
                case Ceilings():
                    self._reach(rows[0].workload.dtype, message)
        return None

    def _explained(self, failure: Failure) -> Failure:
        """A worker's failure on a GPU, of which NVML may say that it is gone: its CUDA error or crash tells less."""
        if failure.kind != "gpu_lost" and self.uuid and (why := why_gone(self.uuid)):
            return failure._replace(kind="gpu_lost", text=f"{why} (the worker: {failure.kind}: {failure.text})")
        return failure

    def _differs(self, fingerprint: dict[str, Any]) -> str:
        """Note which GPU this is, as far as NVML knows, and in what it is not the machine on which the run began."""
        self.uuid = fingerprint["soft"].get("uuid") or ""
        began = self.fingerprint.get("hard", {})
        self.differs = "; ".join(
            f"the run began with {name} {began[name]}, and here it is {value}"
            for name, value in fingerprint["hard"].items()
            if name in began and began[name] != value
        )
        return self.differs

    def _reach(self, dtype: str, ceilings: Ceilings) -> None:
        """Take the first ceilings of a dtype for those of the run."""
        if dtype not in self.ceilings:
            self.ceilings[dtype] = ceilings
            fields = {"dtype": dtype, "ceilings": ceilings._asdict()}
            self.records.append(quantity="ceilings", device=self.device, fingerprint=self.fingerprint, **fields)

    def bound(self, row: Row) -> Bound | None:
        """The least that the row's step could take on this device; None where its model's shapes are not known."""
        share = self.results[row].launches.get("launch_share") if row in self.results else None
        return bounded(row.workload, self.ceilings, share if isinstance(share, float) else None)

    def _keep(self, timing: turns.Timing | turns.Launches) -> None:
        result = self.results[timing.row]
        if isinstance(timing, turns.Launches):
            if not result.launches:
                self._note(timing.row, "launches", timing.found)
            return
        if result.measured:
            return  # a further run of the base: its rows carry those samples themselves
        result.samples, result.base = timing.samples, timing.base
        result.proof, result.beside, result.window = timing.proof, timing.beside, timing.window
        result.parts, result.interleaved = timing.parts, timing.interleaved
        self._record(result, result.timed())

    def _alone(
        self, rows: list[Row], quantity: str, function: Callable[..., Any], arguments: tuple[float, ...]
    ) -> None:
        """Take a quantity of what has been timed, one process an arm."""
        arms: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if self.results[row].measured and not getattr(self.results[row], quantity):
                arms.setdefault(row.arm, []).append(row)
        for own in arms.values():
            while left := [row for row in own if not getattr(self.results[row], quantity)]:
                failure = (
                    Failure("gpu_lost", self.lost) if self.lost else self._take(left, quantity, function, arguments)
                )
                if failure.kind == "gpu_lost":
                    self.lost = failure.text
                culprits = left if failure.held is None or failure.kind in ELSEWHERE else [left[failure.held]]
                for row in culprits:
                    if not getattr(self.results[row], quantity):
                        why = {"attribution": f"unavailable ({failure.kind}: {failure.text})"}
                        self._note(row, quantity, why, record=failure.kind not in ELSEWHERE)

    def _take(
        self, rows: list[Row], quantity: str, function: Callable[..., Any], arguments: tuple[float, ...]
    ) -> Failure:
        """Take it of rows of one arm in one worker; what ended it, or would have if none is left."""
        self.tell(f"{quantity} of {rows[0].arm_name}, in a process of its own")
        for message in stream(function, rows, self.device, *arguments, seconds=self.seconds):
            match message:
                case Failure():
                    return self._explained(message)
                case dict() if differs := self._differs(message):
                    return Failure("not_comparable", differs)
                case (row, found):
                    self._note(row, quantity, found)
        return Failure("error", SILENT)

    def _note(self, row: Row, quantity: str, found: dict[str, Any], *, record: bool = True) -> None:
        result = self.results[row]
        setattr(result, quantity, found)
        if record:
            self._record(result, {"quantity": quantity, quantity: found})

    def _fail(self, rows: list[Row], kind: str, text: str) -> None:
        """Fail those of the rows that have no times yet: what is measured stays."""
        for result in [self.results[row] for row in rows if self.results[row].pending]:
            result.kind, result.failure = kind, text if kind == "wrong" else f"{kind}: {text}"
            if not result.not_comparable:  # which is of this machine, and the run may still go on elsewhere
                self._record(result, result.failed())

    def _record(self, result: Result, fields: dict[str, Any]) -> None:
        row = result.row
        place = {"subject": row.subject, "workload": row.workload.as_dict(), "device": self.device}
        self.records.append(**place, fingerprint=self.fingerprint, **fields)

    def extra_info(self, result: Result) -> dict[str, Any]:
        """What a benchmark's JSON holds beside the samples."""
        return {
            "subject": result.row.subject,
            "workload": result.row.workload.as_dict(),
            "device": self.device,
            "fingerprint": self.fingerprint,
            "tokens_per_second": result.tokens_per_second if result.row.workload.tokens else None,
            "ratio_to_base": result.ratio._asdict() if result.ratio else None,
            "interleaved": result.interleaved,
            "interleaved_with": result.beside,
            "percentiles_seconds": percentiles(result.seconds),
            "parts_seconds": result.parts,
            "bound": self._bounded(result),
            "window": result.window,
            "launches": result.launches,
            "memory": result.memory,
            "reconciled": reconciled(result.row.workload, self.device, result.memory),
            "energy": result.energy,
            "proof": result.proof._asdict() if result.proof else None,
        }

    def _bounded(self, result: Result) -> dict[str, Any] | None:
        bound = self.bound(result.row)
        if bound is None:
            return None
        return (
            bound._asdict() | count(result.row.workload)._asdict() | {"fraction": bound.seconds / result.latency.median}
        )


def _ceilings(records: Records) -> dict[str, Ceilings]:
    kept = [record for record in records.earlier if record["quantity"] == "ceilings"]
    return {record["dtype"]: Ceilings(**record["ceilings"]) for record in kept}


def _plan(records: Records) -> list[Row] | None:
    """The rows that the run began with; None where it begins now."""
    plans = [record["rows"] for record in records.earlier if record["quantity"] == "plan"]
    return [Row(row["subject"], Workload(**row["workload"])) for row in plans[0]] if plans else None
