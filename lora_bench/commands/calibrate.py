"""`lora-bench calibrate`: what equals differ by on this runner, and so the smallest change that it can show."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from lora_bench.commands import scenarios
from lora_bench.commands.ab import SUBJECT
from lora_bench.commands.arguments import FAILED, FINE, INCONCLUSIVE, LOST, at_least, not_kept, output_option, writable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.commands.arguments import Verbs
    from lora_bench.gate.ab import Duel
    from lora_bench.gate.calibration import Calibration, Noise

LEAST_PAIRS = 7


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "calibrate",
        help="measure this runner's noise, and the smallest change that it can show",
        description="Compare a subject with itself, pair by pair, and keep by how much equals differ on this runner: "
        "lora-bench ab and --lora-baseline then ask for more than that.",
    )
    verb.add_argument("--lora-subject", default=SUBJECT, metavar="SUBJECT", help=f"as for conform ({SUBJECT})")
    verb.add_argument(
        "--pairs", type=at_least(LEAST_PAIRS, int), default=20, metavar="N", help="of processes for each workload (20)"
    )
    scenarios.declare(verb)
    output_option(verb)
    verb.set_defaults(run=calibrate)


def calibrate(options: argparse.Namespace) -> int:
    """Print and keep each workload's noise floor, and the smallest change that can be found."""
    from lora_bench.gate.ab import Duel, compare
    from lora_bench.gate.calibration import NAME, read
    from lora_bench.gate.environments import here
    from lora_bench.gate.signed_rank import MOST
    from lora_bench.gate.verdict import Comparison
    from lora_bench.report.duels import heard, label, one_line

    if options.pairs > MOST:
        raise ValueError(f"--pairs must be at most {MOST}, got {options.pairs}")
    output, side = writable(options.lora_output), here(options.lora_subject)
    device, workloads = scenarios.workloads(options)
    path = output / NAME
    earlier = read(path) if path.exists() else None
    duels = [Duel(workload, Comparison(), wanted=options.pairs) for workload in workloads]
    print(f"{side.name} beside itself, {options.pairs} pairs for each workload; device={device}")
    measured: dict[str, Noise] = {}
    whole = True
    with scenarios.terminated_like_interrupted():
        try:
            compare(
                side,
                side,
                duels,
                device,
                pair_seconds=options.pair_seconds,
                hear=lambda duel: print(f"  {heard(duel)}", flush=True),
            )
        finally:
            measured, whole = keep(path, side.subject, duels, earlier)
    for duel in duels:
        if duel.broken is not None:
            print(f"lora-bench calibrate: {label(duel.workload)}: {one_line(duel.broken)}", file=sys.stderr)
    print()
    for name, noise in measured.items():
        print(line(name, noise))
    if measured and whole:
        print(f"\nkept in {path}")
    if any(duel.lost for duel in duels):
        return LOST
    if not whole:
        return FAILED
    return FINE if len(measured) == len(duels) else INCONCLUSIVE


def keep(path: Path, subject: str, duels: Sequence[Duel], earlier: Calibration | None) -> tuple[dict[str, Noise], bool]:
    """Write what was measured, beside what the file has of the same machine; what was, by row, and if it is written."""
    from lora_bench.bench.workload import Row
    from lora_bench.gate.calibration import LEAST, Calibration, noise_of

    enough = [duel for duel in duels if len(duel.pairs) >= LEAST]
    measured = {str(Row(subject, duel.workload)): noise_of(duel.pairs) for duel in enough}
    if enough:
        hard = enough[0].told["base"]["fingerprint"]["hard"]
        known = dict(earlier.scenarios) if earlier is not None and earlier.hard == hard else {}
        try:
            Calibration(hard, known | measured).write(path)
        except OSError as error:
            not_kept(path, error)
            return measured, False
    return measured, True


def line(name: str, noise: Noise) -> str:
    """One workload's noise in words."""
    from lora_bench.gate.power import noise_floor

    smallest = noise.smallest_change
    shown = "none" if math.isinf(smallest) else f"about +{100 * smallest:.1f} %"
    tail = f"{100 * noise_floor(noise.tail):.1f} %" if noise.tail else "unknown"
    return (
        f"{name}: equals differ by up to {100 * noise_floor(noise.location):.1f} %, at their worst steps by {tail}; "
        f"smallest change to be found nine times in ten {shown}"
    )
