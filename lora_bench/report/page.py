"""One HTML page of runs, in a single file: it opens from a disk, asks nobody for anything, and needs no script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_bench import __version__
from lora_bench.bench.workload import BASE, PHASES, TARGET_SETS
from lora_bench.report import charts, findings
from lora_bench.report.advice import break_even, choices, cliffs
from lora_bench.report.cells import MIB, WORDS, cells, columns, interval, notes, phase_results, phase_title, spread
from lora_bench.report.compare import compared
from lora_bench.report.ranking import RULE, correctness, rankings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_bench.bench.ratio import Interval
    from lora_bench.bench.result import Result
    from lora_bench.report.ranking import Ranking
    from lora_bench.report.run import Run

MEANINGS = {
    "set-up": "merged: W + s B A in the weights; separate: the adapter beside the base; batched: mixed adapters",
    "r": "rank",
    "n": "adapters that a mixed batch may ask for",
    "ms": "median of one step, and the further end of its 95 % interval",
    "evict": "median ms to unmerge the adapter that was served, or to let go of its pool",
    "load": "median ms to copy the other adapter's factors in",
    "merge": "median ms to merge it into the weights",
    "pool": "median ms to make a pool of adapters ready for mixed batches",
    "graph": "median ms of replays as a CUDA graph, which needs a single launch",
    "cold": "median ms with nothing left in the L2 cache",
    "launch share": "how much of a step the device waits for launches",
    "x base": "median of the ratios to the base in the same round, with its 95 % interval; "
    "~: to runs of it before and after",
    "bound": "the least time this device could take, as a share of the time it took, and what sets it",
    "MiB": "peak memory in a process of its own",
    "J/token": "joules for each token, in a run of its own",
    "samples": "rounds that count / all",
}
SERIES = ("adapters", "rank")
REST = ("unexplained", "context")
"""What a bar of memory ends with, after the parts that were worked out."""


def page(runs: Sequence[Run]) -> str:
    """The page of these runs, all that it needs within it."""
    environment = Environment(
        loader=PackageLoader("lora_bench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [_view(run, f"run{number}") for number, run in enumerate(runs)]
    text = environment.get_template("page.html.j2").render(views=views, version=__version__, charts=charts)
    return text + "\n"


def _view(run: Run, key: str) -> dict[str, Any]:
    """What the template shows of a run; `key` begins its anchors."""
    results = list(run.results.values())
    ordered = [result for phase in PHASES for result in phase_results(run, phase) if result.measured]
    memories = list(findings.memories(ordered, run.device))
    phases = [_phase(run, phase) for phase in PHASES if phase_results(run, phase)]
    view = {
        "key": key,
        "run": run,
        "measured": len(ordered),
        "failures": findings.failures(run),
        "advice": [*choices(ordered), *break_even(ordered)],
        "cliffs": list(cliffs(ordered)),
        "words": WORDS,
        "meanings": MEANINGS,
        "phases": phases,
        "filters": {"set-up": _names(results, "setup"), "subject": _names(results, "subject")},
        "notes": notes(run),
        "rankings": [_ranked(each) for each in rankings(results)],
        "rule": RULE,
        "charts": {name: list(_charts(ordered, name, key)) for name in SERIES},
        "memories": _memories(memories),
        "parts": [name for name in (*findings.PARTS, *REST) if any(_part(each, name) for each in memories)],
        "unread": findings.unread(run),
        "energies": [_energy(each) for each in ordered if each.energy],
        "no_energy": findings.NO_ENERGY,
        "comparisons": [compared(record, f"{key}-ab{number}") for number, record in enumerate(run.comparisons)],
        "conformance": _conformance(run.conformance),
    }
    return view | {"sections": _sections(view)}


def _sections(view: dict[str, Any]) -> dict[str, str]:
    """The anchors of what the view has to show, with their names."""
    rows = bool(view["phases"])
    known = (
        ("table", "deployment", rows),
        ("ranking", "ranking", view["rankings"]),
        ("by-adapters", "by adapters", view["charts"]["adapters"]),
        ("by-rank", "by rank", view["charts"]["rank"]),
        ("memory", "memory", rows),
        ("energy", "energy", rows),
        ("failed", "failures", view["failures"]),
        ("unread", "unavailable", view["unread"]),
        ("duel1", "comparisons", view["comparisons"]),
        ("right", "conformance", view["run"].conformance),
        ("machine", "machine", view["run"].fingerprint),
    )
    return {anchor: name for anchor, name, there in known if there}


def _names(results: Sequence[Result], what: str) -> list[str]:
    """The values that a filter offers, in the order of the plan."""
    named = (each.row.subject if what == "subject" else each.row.workload.setup for each in results)
    return [name for name in dict.fromkeys(named) if name]


def _phase(run: Run, phase: str) -> dict[str, Any]:
    results = phase_results(run, phase)
    rows: list[dict[str, Any]] = [
        {
            "cells": cells(each, run),
            "more": findings.label(each).partition(" ")[2],
            "setup": each.row.workload.setup,
            "subject": each.row.subject,
            "failed": not each.measured,
        }
        for each in results
    ]
    shown = columns([row["cells"] for row in rows])
    return {"name": phase, "title": phase_title(results, run.device), "columns": shown, "rows": rows}


def _ranked(ranking: Ranking) -> dict[str, Any]:
    lines = [
        {
            "place": str(each),
            "rank": each.place,
            "subject": each.subject,
            "ms": spread(each.latency) if each.latency else "",
            "seconds": each.latency.median if each.latency else None,
            "against": _against(each.against),
            "times": each.against.median if each.against else None,
            "correctness": correctness(each.result),
        }
        for each in ranking.places
    ]
    return {"title": ranking.title, "setup": ranking.workload.setup, "places": lines}


def _against(ratio: Interval | None) -> str:
    """The ratio to the fastest; that of the fastest itself is 1."""
    if ratio is None:
        return ""
    return "1" if ratio.low == ratio.high == 1 else interval(ratio)


def _charts(measured: Sequence[Result], name: str, key: str) -> Iterator[dict[str, Any]]:
    """Latency against the number of adapters, or against the rank: a chart for what else is the same."""
    everybody = list(dict.fromkeys(result.row.subject for result in measured if result.row.subject != BASE))
    groups: dict[tuple[Any, ...], dict[str, dict[int, Result]]] = {}
    for result in measured:
        own = result.row.workload.as_dict()
        if result.row.subject == BASE or (name == "adapters" and own["setup"] != "batched"):
            continue
        place = own.pop(name)
        groups.setdefault(tuple(own.items()), {}).setdefault(result.row.subject, {})[place] = result
    for number, (alike, subjects) in enumerate(groups.items()):
        if max(map(len, subjects.values())) < 2:
            continue
        like = next(iter(next(iter(subjects.values())).values()))
        base = next((each for each in measured if each.row == like.row.base()), None)
        series = [
            charts.Series(name_of, everybody.index(name_of), {at: _scaled(each) for at, each in own.items()})
            for name_of, own in subjects.items()
        ]
        yield {
            "title": _alike(dict(alike), name),
            "x": name,
            "series": series,
            "svg": charts.lines(
                series,
                key=f"{key}-{name}{number}",
                title=_alike(dict(alike), name),
                x=name,
                y="ms",
                level=base.latency.median * 1e3 if base else None,
            ),
        }


def _scaled(result: Result) -> Any:
    """The interval of its latency in milliseconds."""
    latency = result.latency
    return latency._replace(**{end: getattr(latency, end) * 1e3 for end in ("median", "low", "high")})


def _alike(own: dict[str, Any], name: str) -> str:
    """What a chart's points have in common: "decode, batched r8"."""
    mixed = own["setup"] == "batched"
    parts = [f"{own['phase']}, {own['setup']}"]
    parts += [f"r{own['rank']}"] if name != "rank" else []
    parts += [f"n{own['adapters']}"] if name != "adapters" and mixed else []
    parts += [own["popularity"]] if own["popularity"] != "distinct" else []
    return " ".join(parts + ([own["targets"]] if own["targets"] != next(iter(TARGET_SETS)) else []))


def _part(memory: findings.Memory, name: str) -> int:
    """Bytes of a part, of what is unexplained, or of the context."""
    rest = {"unexplained": memory.unexplained, "context": memory.context or 0}
    return (memory.parts | rest)[name]


def _memories(memories: Sequence[findings.Memory]) -> list[dict[str, Any]]:
    """A row for each, its bar as wide as the largest of all."""
    widest = max((max(each.measured, each.worked_out) + (each.context or 0) for each in memories), default=1)
    used = [name for name in findings.PARTS if any(each.parts[name] for each in memories)]
    contexts = any(each.context is not None for each in memories)
    made = []
    for each in memories:
        figures: dict[str, int | None] = {
            "measured": each.measured,
            "worked_out": each.worked_out,
            "unexplained": each.unexplained,
        }
        figures |= {name: each.parts[name] for name in used} | ({"context": each.context} if contexts else {})
        bar = charts.stack({name: _part(each, name) for name in (*used, *REST)}, widest, each.measured)
        made.append(
            {
                "phase": each.result.row.workload.phase,
                "label": findings.label(each.result),
                "setup": each.result.row.workload.setup,
                "subject": each.result.row.subject,
                "figures": {name: None if value is None else value / MIB for name, value in figures.items()},
                "bar": bar,
            }
        )
    return made


def _energy(result: Result) -> dict[str, Any]:
    names = ("joules_per_step", "joules_per_token", "mean_watts", "idle_watts", "window_seconds", "ticks")
    told = {name: result.energy.get(name, "") for name in (*names, "source", "validity", "attribution")}
    return {"phase": result.row.workload.phase, "label": findings.label(result), **told}


def _conformance(kept: dict[str, Any]) -> dict[str, Any]:
    """The verdicts counted, their reasons, and a row for each check."""
    subjects = kept.get("subjects", {})
    table = {subject: {each["check"]: each["status"] for each in own} for subject, own in subjects.items()}
    claims = {each["check"]: each.get("claim", "") for own in subjects.values() for each in own}
    return {
        "versions": kept.get("versions", {}),
        "statuses": findings.VERDICTS,
        "tallies": {subject: findings.tally(own) for subject, own in subjects.items()},
        "reasons": findings.reasons(subjects),
        "checks": [
            {"check": check, "claim": claim, "cells": [own.get(check, "") for own in table.values()]}
            for check, claim in claims.items()
        ],
    }
