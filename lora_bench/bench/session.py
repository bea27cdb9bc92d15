"""One run of the GPU suites: which rows are planned, their results, and the object that each test receives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_bench.bench import measure
from lora_bench.bench.isolate import Failure, stream
from lora_bench.bench.ratio import Interval, median_interval, paired_ratio
from lora_bench.bench.workload import BASE, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lora_bench.bench.proof import Proof
    from lora_bench.bench.records import Records


@dataclass
class Result:
    """What is known of a row: raw seconds in order, the base's of the same rounds, peak memory, or why not."""

    row: Row
    seconds: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    proof: Proof | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def latency(self) -> Interval:
        """Median seconds of one step."""
        return median_interval(self.seconds)

    @property
    def ratio(self) -> Interval | None:
        """Median of seconds over the base's, round by round; None where the base has none."""
        return paired_ratio(self.seconds, self.base_seconds) if self.base_seconds else None

    @property
    def tokens_per_second(self) -> float:
        return self.row.workload.tokens / self.latency.median


class Session:
    """Measures the planned rows, a comparison at a time, when the first of its results is asked for."""

    def __init__(self, device: str, budget_seconds: float, records: Records, tell: Callable[[str], None]) -> None:
        self.device, self.budget_seconds, self.records, self.tell = device, budget_seconds, records, tell
        self.planned: list[Row] = []
        self.results: dict[Row, Result] = {}
        self.fingerprint: dict[str, Any] = {}

    def result(self, row: Row) -> Result:
        """The row's result; measures its whole comparison if that has not happened yet."""
        if row not in self.results:
            together = [other for other in self.planned if other.comparison == row.comparison]
            bases = [other.base() for other in together]
            self._time(list(dict.fromkeys([*bases, *together])))
            self._weigh([self.results[other] for other in dict.fromkeys([*bases, *together])])
        return self.results[row]

    def _time(self, rows: list[Row]) -> None:
        self.tell(f"building and proving {len({row.arm for row in rows})} arms of {rows[0].workload.model}")
        self.results |= {row: Result(row) for row in rows}
        for message in stream(measure.compare, rows, self.device, self.budget_seconds):
            match message:
                case measure.Progress(text):
                    self.tell(text)
                case measure.Timing():
                    self._keep(message)
                case measure.Refusal(row, kind, text):
                    self._fail([self.results[row]], kind, text)
                case Failure(kind, text):
                    results = [self.results[row] for row in rows]
                    self._fail([result for result in results if not (result.seconds or result.failure)], kind, text)
                case dict():
                    self.fingerprint = message

    def _keep(self, timing: measure.Timing) -> None:
        result = self.results[timing.row]
        if result.seconds:
            return  # a further group's run of the base: its rows carry those samples themselves
        result.seconds, result.base_seconds = timing.seconds, timing.base_seconds
        result.proof, result.beside = timing.proof, timing.beside
        self._record(
            result,
            quantity="latency",
            samples_seconds=timing.seconds,
            base_samples_seconds=timing.base_seconds,
            interleaved_with=timing.beside,
            correctness=timing.proof._asdict() if timing.proof else None,
        )

    def _weigh(self, results: Iterable[Result]) -> None:
        """Peak memory, one process an arm."""
        arms: dict[tuple[str, str], list[Row]] = {}
        for result in results:
            if result.seconds:
                arms.setdefault(result.row.arm, []).append(result.row)
        for (subject, setup), rows in arms.items():
            self.tell(f"memory of {setup if subject == BASE else f'{subject} {setup}'}, in a process of its own")
            for message in stream(measure.weigh, rows, self.device):
                if isinstance(message, Failure):
                    for row in rows:
                        if not self.results[row].memory:
                            self.results[row].memory = {"attribution": f"unavailable ({message.text})"}
                            self._record(self.results[row], quantity="memory", memory=self.results[row].memory)
                else:
                    row, self.results[row].memory = message
                    self._record(self.results[row], quantity="memory", memory=self.results[row].memory)

    def _fail(self, results: list[Result], kind: str, text: str) -> None:
        for result in results:
            result.failure = text if kind == "wrong" else f"{kind}: {text}"
            self._record(result, quantity="failure", kind=kind, text=text)

    def _record(self, result: Result, **fields: Any) -> None:
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
            "tokens_per_second": result.tokens_per_second,
            "ratio_to_base": result.ratio._asdict() if result.ratio else None,
            "interleaved_with": result.beside,
            "memory": result.memory,
            "proof": result.proof._asdict() if result.proof else None,
        }
