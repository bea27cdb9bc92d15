"""How much the place of a model's weights in memory moves its time: six equal copies, then the same copies moved.

PYTHONPATH=. python reports/cpu-2-cores/placement.py
"""

from __future__ import annotations

import copy
import statistics

import torch

from lora_bench.bench import ready
from lora_bench.bench.arm import Step, build_arm, make_step
from lora_bench.bench.clock import wall_clock
from lora_bench.bench.sampling import interleave
from lora_bench.bench.workload import BASE, Row, Workload

COPIES, SECONDS = 6, 8.0


def ratios(steps: dict[Row, Step], *, moved: bool) -> str:
    """Each copy's decode time over the first's, as the median over rounds."""
    taken = interleave(steps, wall_clock, budget_seconds=SECONDS, relocating=moved)
    seconds = [samples.seconds for samples in taken.values()]
    return " ".join(f"{statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)):.3f}" for own in seconds)


def main() -> None:
    torch.set_num_threads(1)
    workload = Workload(BASE, "decode", "tiny", "fp32", rank=0, batch=8, sequence=64)
    base = ready.build_base(Row(BASE, workload), "cpu")
    arms = [build_arm(copy.deepcopy(base), None, workload) for _ in range(COPIES)]
    steps = {Row(f"copy {number}", workload): make_step(arm, workload) for number, arm in enumerate(arms)}
    for _ in range(2):
        print("in place", ratios(steps, moved=False))  # noqa: T201
    for _ in range(2):
        print("moved   ", ratios(steps, moved=True))  # noqa: T201


if __name__ == "__main__":
    main()
