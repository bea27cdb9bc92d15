"""`lora-bench ab`: two subjects, environments or git revisions compared on this machine now, by pairs of processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.commands import scenarios
from lora_bench.commands.arguments import FAILED, FINE, INCONCLUSIVE, LOST, output_option, writable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from lora_bench.bench.records import Records
    from lora_bench.bench.workload import Workload
    from lora_bench.commands.arguments import Verbs
    from lora_bench.gate.ab import Duel
    from lora_bench.gate.environments import Side
    from lora_bench.gate.verdict import Limits

SUBJECT = "reference"
TOLD = ("torch", "transformers", "numpy", "triton")


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "ab",
        help="compare two subjects, environments or git revisions on this machine now",
        description="Compare head with base on this machine now: fresh pairs of processes take turns, base runs beside "
        "itself, and a change counts that is significant, large, and there again in fresh pairs.",
        epilog="Exit codes: 0 PASS, 1 FAIL, 2 usage, 6 INCONCLUSIVE, 7 the device was lost.",
    )
    verb.add_argument(
        "--lora-subject",
        action="append",
        metavar="SUBJECT",
        help=f"as for conform; given twice, the first is base and the second head ({SUBJECT})",
    )
    for side in ("base", "head"):
        verb.add_argument(f"--{side}-python", metavar="FILE", help=f"the interpreter of {side}'s environment")
        verb.add_argument(f"--{side}-rev", metavar="REVISION", help=f"the git revision that is {side}")
    verb.add_argument("--repository", default=".", metavar="FOLDER", help="of the revisions (the current folder)")
    scenarios.declare(verb)
    verb.add_argument(
        "--calibration", metavar="FILE", help="of lora-bench calibrate (calibration.json in --lora-output, if there)"
    )
    verb.add_argument(
        "--lora-on-inconclusive",
        choices=("fail", "warn"),
        default="fail",
        help="fail: exit 6 (default); warn: exit 0 where at least something was compared",
    )
    output_option(verb)
    verb.set_defaults(run=ab)


def ab(options: argparse.Namespace) -> int:
    """Print each comparison as it grows, and the verdicts; keep every sample."""
    from lora_bench.bench.records import Records
    from lora_bench.gate.ab import Duel, compare
    from lora_bench.gate.environments import describe, same
    from lora_bench.gate.verdict import Comparison
    from lora_bench.report.duels import heard

    output = writable(options.lora_output)
    device, workloads = scenarios.workloads(options)
    base, head = sides(options, output)
    calibrated = limits(options, output, workloads, base.subject, device)
    known = {"base": describe(base), "head": describe(head)}
    told_of = {
        name: {**known[name], "name": side.name, "subject": side.subject}
        for name, side in zip(known, (base, head), strict=True)
    }
    records = Records(output)
    print(f"base {base.name}, head {head.name}; device={device}, {workloads[0].model} {workloads[0].dtype}")
    if apart := differences(known["base"], known["head"]):
        print(f"they differ in {apart}")
    elif same(base, head):
        print("the two sides are the same: whatever differs is noise")
    duels = [Duel(workload, Comparison(calibrated[workload])) for workload in workloads]
    left = list(duels)

    def keep(duel: Duel) -> None:
        left.remove(duel)
        records.append(device=device, **duel.as_record(told_of))

    def hear(duel: Duel) -> None:
        print(f"  {heard(duel)}", flush=True)
        if duel.settled:
            keep(duel)

    with scenarios.terminated_like_interrupted():
        try:
            compare(base, head, duels, device, pair_seconds=options.pair_seconds, hear=hear)
        except (KeyboardInterrupt, SystemExit):
            print(f"lora-bench ab: cut off; records: {records.path}", file=sys.stderr)
            raise
        finally:
            for duel in [duel for duel in left if duel.comparison.attempts or duel.broken]:
                keep(duel)
    return conclude(duels, records, options.lora_on_inconclusive)


def conclude(duels: Sequence[Duel], records: Records, on_inconclusive: str) -> int:
    """Print the verdicts and where they are kept; the exit code, 1 where not all of them are."""
    from lora_bench.ending import LOOSE
    from lora_bench.gate.verdict import PASS
    from lora_bench.report.duels import told

    for duel in duels:
        print("\n" + "\n".join(told(duel)))
    print("\n" + "\n".join(report(duels, records.path)))
    code = exit_code(duels, on_inconclusive)
    if records.unwritten:
        print(f"lora-bench ab: they are not whole: {records.unwritten}", file=sys.stderr)
        return code if code == LOST else FAILED
    if code == FINE and (open_ := sum(duel.verdict != PASS for duel in duels)):
        print(f"lora-bench ab: WARNING: {LOOSE.format(open_, len(duels))}", file=sys.stderr)
    return code


def sides(options: argparse.Namespace, output: Path) -> tuple[Side, Side]:
    """Base and head, made ready; ValueError where they cannot be."""
    from lora_bench.gate.environments import here, of_python, of_revision

    subjects = options.lora_subject or [SUBJECT]
    if len(subjects) > 2:
        raise ValueError(f"--lora-subject is given once or twice, got {', '.join(subjects)}")
    made = []
    for name, subject in zip(("base", "head"), (subjects[0], subjects[-1]), strict=True):
        python, revision = getattr(options, f"{name}_python"), getattr(options, f"{name}_rev")
        if python and revision:
            raise ValueError(f"--{name}-python and --{name}-rev: wanted one of them")
        if python:
            made.append(of_python(python, subject, lent=output / "lent"))
        elif revision:
            cache = output / "revisions"
            made.append(of_revision(revision, subject, repository=Path(options.repository), cache=cache))
        else:
            made.append(here(subject))
    return made[0], made[1]


def differences(base: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """The packages whose versions differ: those that matter most by name, and how many others."""
    then, now = base.get("packages", {}), head.get("packages", {})
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    libraries = {str(side.get("library")).partition(" ")[0] for side in (base, head)}
    first = [name for name in names if name in {*TOLD, *libraries}]
    told = [f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}" for name in sorted(first)]
    others = len(names) - len(first)
    return ", ".join([*told, *([f"{others} other package{'s' * (others > 1)}"] if others else [])])


def limits(
    options: argparse.Namespace, output: Path, workloads: Sequence[Workload], subject: str, device: str
) -> dict[Workload, Limits]:
    """The margins of each workload: the gate's own, or wider where this runner was calibrated and is noisier."""
    from lora_bench.bench.machine import fingerprint
    from lora_bench.bench.measure import settle_threads
    from lora_bench.bench.workload import Row
    from lora_bench.gate import calibration
    from lora_bench.gate.verdict import Limits

    path = Path(options.calibration) if options.calibration else output / calibration.NAME
    if not options.calibration and not path.exists():
        return dict.fromkeys(workloads, Limits())
    settle_threads(device)
    found, hard = calibration.read(path), fingerprint(device)["hard"]
    chosen = {}
    for workload in workloads:
        row = Row(subject, workload)
        noise = found.noise(row, hard)
        chosen[workload] = noise.limits if noise else Limits()
        if noise is None:
            print(f"{row} is not calibrated for this machine in {path}: the gate's own margins")
        elif chosen[workload] != Limits():
            margins = chosen[workload].location
            print(f"{row}: as calibrated, FAIL above {margins.fail:+.1%}, PASS below {margins.accept:+.1%}")
    return chosen


def report(duels: Sequence[Duel], records: Path) -> list[str]:
    """Write the page, and on GitHub the step's summary; where they lie, annotations, and what could not be written."""
    from lora_bench import ending
    from lora_bench.gate.verdict import FAIL, INCONCLUSIVE
    from lora_bench.report import github
    from lora_bench.report.duels import label

    said = [f"records: {records}", *ending.write_reports(records)]
    if github.active():
        levels = {FAIL: "error", INCONCLUSIVE: "warning"}
        noted = [
            (levels[duel.verdict], f"{duel.verdict}: {label(duel.workload)}", duel.because)
            for duel in duels
            if duel.verdict in levels
        ]
        said += [*github.annotated(noted), *ending.summarise(records)]
    return said


def exit_code(duels: Sequence[Duel], on_inconclusive: str) -> int:
    """7 where the device was lost, 1 with a FAIL, 6 where something is inconclusive and that is to fail.

    It is 6 too where nothing was compared, whatever is to fail.
    """
    from lora_bench.gate.verdict import FAIL, PASS

    verdicts = [duel.verdict for duel in duels]
    if any(duel.lost for duel in duels):
        return LOST
    if FAIL in verdicts:
        return FAILED
    compared = any(duel.broken is None for duel in duels)
    if all(verdict == PASS for verdict in verdicts) or (compared and on_inconclusive == "warn"):
        return FINE
    return INCONCLUSIVE
