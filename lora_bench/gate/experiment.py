"""How often the gate is wrong on this machine: `python -m lora_bench.gate.experiment`, in well under 90 minutes.

Known operations are compared with the very code that `lora-bench ab` runs: the operation against itself, and against
itself with 2, 3 or 5 per cent of work more, 5 per cent less, or 30 per cent more every fifth time. For 20 of every 40
seconds another process keeps a core busy. The thresholds of pytest-benchmark and a Mann-Whitney test judge the same
samples, and those of this trial beside the base of the trial before, as where two runs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.gate.pair import LOCATION, TAIL
from lora_bench.gate.verdict import FAIL, INCONCLUSIVE, PASS, Comparison
from lora_bench.gate.workers import MOST_ROUNDS, Server, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lora_bench.gate.verdict import Attempt

EQUAL = "A/A"
TAIL_ARM = "every fifth +30 %"
ARMS = {EQUAL: (0, 0), "+2 %": (2, 0), "+3 %": (3, 0), "+5 %": (5, 0), "-5 %": (-5, 0), TAIL_ARM: (0, 30)}
"""What is compared with the operation: how many more products than its hundred, and how many more every fifth time."""
VERDICTS = (FAIL, INCONCLUSIVE, PASS)
LOADED_SECONDS = 20.0
POOLED = 7
"""The other gates see the samples of so many pairs: those that this one looks at first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials that the file has not, each appended as it ends, and print the table of what it holds then."""
    parser = argparse.ArgumentParser(prog="python -m lora_bench.gate.experiment", description=__doc__)
    parser.add_argument("--trials", type=int, default=300, help="of the operation against itself (default: 300)")
    parser.add_argument("--effects", type=int, default=100, help="of them also with each effect (default: 100)")
    parser.add_argument("--output", type=Path, default=Path(".lora_bench/gate-trials.jsonl"))
    options = parser.parse_args(arguments)
    if options.trials < 1:
        parser.error(f"--trials must be at least 1, got {options.trials}")
    if not 0 <= options.effects <= options.trials:
        parser.error(f"--effects must be from 0 to --trials, {options.trials}, got {options.effects}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = len(options.output.read_text().splitlines()) if options.output.exists() else 0
    if done < options.trials:
        run(options, done)
    records = [json.loads(line) for line in options.output.read_text().splitlines()]
    print(table(records))
    print(closing(records))


def run(options: argparse.Namespace, done: int) -> None:
    """Make the trials that are still to be made."""
    started = time.monotonic()
    with loaded(), Server("operation", [sys.executable, "-P"], os.environ) as server:
        earlier: list[float] = []
        for number in range(done, options.trials):
            effects = (number + 1) * options.effects // options.trials > number * options.effects // options.trials
            record, earlier = trial(server, number, list(ARMS) if effects else [EQUAL], earlier)
            with options.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if number % 10 == 9:
                print(
                    f"{number + 1} of {options.trials} trials, {(time.monotonic() - started) / 60:.0f} min", flush=True
                )


def trial(
    server: Server, number: int, names: Sequence[str], earlier: list[float]
) -> tuple[dict[str, Any], list[float]]:
    """Each arm's comparison, by blocks that all unsettled ones share; `earlier`: base's samples of the trial before."""
    comparisons = {name: Comparison() for name in names}
    samples: dict[str, list[float]] = {name: [] for name in ("base", *names)}
    block = 0
    while left := [name for name, comparison in comparisons.items() if not comparison.settled]:
        # While the other gates' samples are taken every arm takes part.
        arms = list(names) if block < POOLED else left
        more = {"base": ARMS[EQUAL], "control": ARMS[EQUAL]} | {name: ARMS[name] for name in arms}
        order = list(more) if block % 2 == 0 else list(reversed(more))
        workers = {name: server.start({"products": more[name][0], "seldom": more[name][1]}) for name in order}
        for worker in workers.values():
            worker.ready()
        turns = Turns(workers, seed=number * 1000 + block)
        turns.run(MOST_ROUNDS)
        for worker in workers.values():
            worker.close()
        for name in left:
            comparisons[name].add(turns.pair(name, head_first=block % 2 == 1))
        if block < POOLED:
            for name in samples:
                samples[name] += turns.seconds[name]
        block += 1
    found = {name: _arm(comparisons[name], samples, name, earlier) for name in names}
    return {"trial": number, "blocks": block, "arms": found}, samples["base"]


def _arm(comparison: Comparison, samples: Mapping[str, list[float]], name: str, earlier: list[float]) -> dict[str, Any]:
    return {
        "verdict": comparison.verdict,
        "because": comparison.because,
        "attempts": [_attempt(attempt) for attempt in comparison.attempts],
        "same_rounds": others(samples["base"], samples[name]),
        "other_run": others(earlier, samples[name]) if earlier else None,
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    """The pairs' statistics: what the gate's verdict follows from."""
    pairs = [
        {
            "location": pair.log_ratio(LOCATION),
            "tail": pair.log_ratio(TAIL),
            "control": pair.log_ratio(LOCATION, "control"),
            "clean": len(pair.clean),
        }
        for pair in attempt.pairs
    ]
    return {"verdict": attempt.verdict, "pairs": pairs, "quarantined": len(attempt.quarantined)}


def others(base: Sequence[float], head: Sequence[float]) -> dict[str, bool]:
    """What other gates say: pytest-benchmark's thresholds of 5 per cent, and a Mann-Whitney test at 1 per cent."""
    from scipy.stats import mannwhitneyu  # an extra, which nothing but this needs

    reduced: dict[str, Callable[[Sequence[float]], float]] = {
        "mean:5%": statistics.fmean,
        "median:5%": statistics.median,
        "min:5%": min,
    }
    said = {name: bool(reduce(head) > 1.05 * reduce(base)) for name, reduce in reduced.items()}
    return said | {"Mann-Whitney 1%": bool(mannwhitneyu(head, base, alternative="greater").pvalue < 0.01)}


def rates(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, int]]]:
    """By arm and gate: in how many of how many trials it told a regression; the gate's other verdicts too."""
    counted: dict[str, dict[str, tuple[int, int]]] = {}
    for arm in ARMS:
        found = [record["arms"][arm] for record in records if arm in record["arms"]]
        verdicts = {f"lora-bench {verdict}": [one["verdict"] == verdict for one in found] for verdict in VERDICTS}
        for which in ("same_rounds", "other_run"):
            for one in found:
                for gate, flagged in (one[which] or {}).items():
                    verdicts.setdefault(f"{gate}, {which.replace('_', ' ')}", []).append(flagged)
        counted[arm] = {gate: (sum(flags), len(flags)) for gate, flags in verdicts.items()}
    return counted


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The rates in per cent with their exact 95 % intervals, as Markdown; by Clopper and Pearson 1934."""
    from scipy.stats import binomtest  # an extra

    counted = rates(records)
    gates = list(dict.fromkeys(gate for arm in counted.values() for gate in arm))
    trials = {arm: max((of for _, of in found.values()), default=0) for arm, found in counted.items()}
    lines = [
        "| told | " + " | ".join(f"{arm} ({trials[arm]})" for arm in counted) + " |",
        "|---" * (len(ARMS) + 1) + "|",
    ]
    for gate in gates:
        cells = []
        for arm in counted:
            flagged, of = counted[arm].get(gate, (0, 0))
            if not of:
                cells.append("")
                continue
            interval = binomtest(flagged, of).proportion_ci(method="exact")
            cells.append(f"{100 * flagged / of:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]")
        lines.append(f"| {gate} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def closing(records: Sequence[Mapping[str, Any]]) -> str:
    """After how many pairs comparisons of equals were over, how much equals differ, how many pairs were laid aside."""
    equals = [record["arms"][EQUAL]["attempts"] for record in records]
    ended = Counter(len(attempts[0]["pairs"]) for attempts in equals)
    every = [attempt for record in records for arm in record["arms"].values() for attempt in arm["attempts"]]
    aside, kept = sum(each["quarantined"] for each in every), sum(len(each["pairs"]) for each in every)
    spread = statistics.pstdev(pair["control"] for attempts in equals for each in attempts for pair in each["pairs"])
    told = ", ".join(f"{ended[count]} after {count}" for count in sorted(ended))
    return (
        f"equals: {told} pairs; log-ratios of base to itself: sd {spread:.4f}; pairs: {kept} kept, {aside} laid aside"
    )


BUSY = """import os, time
while os.getppid() == {parent}:
    end = time.monotonic() + {seconds}
    while time.monotonic() < end: pass
    time.sleep({seconds})
"""
"""Ends by itself where the experiment was killed."""


@contextmanager
def loaded() -> Iterator[None]:
    """Keep a core busy for 20 of every 40 seconds, by another process."""
    program = BUSY.format(parent=os.getpid(), seconds=LOADED_SECONDS)
    busy = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    main()
