"""Kill a measured run again and again, go on with it each time, and compare what it has written with its plan."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lora_bench.bench.records import read

ROOT = Path(__file__).parents[2]
SMALL = ("--lora-device=cpu", "--lora-model=micro", "--lora-matrix=standard", "--lora-batch=2", "--lora-sequence=8")
COMMAND = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "suites/gpu", "--benchmark", *SMALL)
QUANTITIES = ("latency", "memory")
POLL_SECONDS = 0.05


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def written(folder: Path) -> list[dict[str, Any]]:
    """The records of the one run in the folder, if it has begun."""
    return [record for path in folder.glob("*.jsonl") for record in read(path)]


def rows(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(f"{record['subject']} {sorted(record['workload'].items())}" for record in records)


def go_on(folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Begin a run, or go on with the one that has a plan, in a process group of its own."""
    resume = [f"--lora-resume={path}" for path in folder.glob("*.jsonl") if written(folder)]
    command = (*COMMAND, "--lora-seconds=1", f"--lora-output={folder}", *options, *resume)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def kill(run: subprocess.Popen[bytes], folder: Path, more: int, delay: float) -> bool:
    """Wait for so many more records and seconds, and SIGKILL the group; False if the run has ended by itself."""
    enough = len(written(folder)) + more
    while run.poll() is None and (not written(folder) or len(written(folder)) < enough):
        time.sleep(POLL_SECONDS)
    time.sleep(delay)
    ended = run.poll() is not None
    if not ended:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return not ended


def main(kills: int, seed: int, options: list[str]) -> int:
    draw, start = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1, kills + 1):
            run = go_on(folder, options)
            planned = len(written(folder)[0]["rows"]) if number > 1 else 0
            if not kill(run, folder, draw.randrange(2 * planned // kills + 1), draw.uniform(0, 3)):
                say(f"run {number} ended by itself with exit code {run.returncode}")
                break
            say(f"kill {number} after {len(written(folder))} records, {time.monotonic() - start:.0f} s")
        last = go_on(folder, options).wait()
        right = compare(written(folder))
        say(f"the last run: exit code {last}, {time.monotonic() - start:.0f} s; seed {seed}")
        if last or not right:
            say((folder / "output.txt").read_text())
    return int(bool(last) or not right)


def compare(records: list[dict[str, Any]]) -> bool:
    """Whether each quantity was written once for each planned row; says what was not."""
    plans = [record for record in records if record["quantity"] == "plan"]
    planned = rows(plans[0]["rows"])
    say(f"{len(plans)} plan of {planned.total()} rows")
    right = len(plans) == 1
    for quantity in QUANTITIES:
        found = rows([record for record in records if record["quantity"] == quantity])
        lost, twice = planned - found, found - planned
        say(f"{quantity}: {found.total()} records, {lost.total()} lost, {twice.total()} too many")
        for row in lost | twice:
            say(f"  {row}")
        right = right and found == planned
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="Other options go to pytest.")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen, others = parser.parse_known_args()
    sys.exit(main(chosen.kills, chosen.seed, others))
