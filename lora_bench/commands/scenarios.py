"""The options of the verbs that measure pairs of processes, and the workloads that they name."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_bench.bench.workload import SETUPS, TARGET_SETS, Workload
from lora_bench.commands.arguments import at_least
from lora_bench.commands.estimate import MODEL
from lora_bench.options import DEFAULTS, resolve_device

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

PHASES = {
    "merged": ("prefill", "decode", "switch"),
    "separate": ("prefill", "decode", "switch", "train"),
    "batched": ("prefill", "decode", "switch"),
    "four_bit": ("prefill", "decode"),
}
"""The phases in which each set-up is measured."""


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare what says which workloads are measured, and where."""
    verb.add_argument("--setup", default="separate", metavar="NAME,NAME", help=f"of {', '.join(SETUPS[1:])} (separate)")
    verb.add_argument(
        "--phase", default="decode", metavar="NAME,NAME", help="of prefill, decode, switch, train (decode)"
    )
    number = at_least(1, int)
    verb.add_argument("--model", help=f"{MODEL} (by device)")
    verb.add_argument("--rank", type=number, default=16, metavar="R", help="of every adapter (16)")
    verb.add_argument("--adapters", type=number, default=8, metavar="N", help="that share a mixed batch (8)")
    verb.add_argument("--targets", choices=tuple(TARGET_SETS), default="all", help="the layers adapted (all)")
    verb.add_argument("--batch", type=number, metavar="B", help="sequences in a batch (8)")
    verb.add_argument("--sequence", type=at_least(2, int), metavar="S", help="tokens of each (by device)")
    verb.add_argument("--dtype", help="of weights and adapters (by device)")
    verb.add_argument("--lora-device", default="auto", help="auto, cpu, cuda or cuda:N (CUDA if there is one)")
    verb.add_argument(
        "--pair-seconds",
        type=at_least(1, float),
        default=5.0,
        metavar="SECONDS",
        help="to measure in each pair of processes: 20 to 300 rounds (5)",
    )


def workloads(options: argparse.Namespace) -> tuple[str, list[Workload]]:
    """The device, and each set-up that is asked for in each phase that it has.

    Raises ValueError for a name that is not known, or where no set-up has such a phase.
    """
    from lora_bench.models.build import check_model

    device = resolve_device(options.lora_device)
    defaults = DEFAULTS[device.partition(":")[0]]
    place: dict[str, Any] = {name: getattr(options, name) or default for name, default in defaults.items()}
    check_model(str(place["model"]))
    setups, phases = options.setup.split(","), options.phase.split(",")
    if unknown := [name for name in setups if name not in PHASES]:
        raise ValueError(f"--setup must be among {', '.join(PHASES)}, got {unknown[0]!r}")
    known = tuple(dict.fromkeys(phase for every in PHASES.values() for phase in every))
    if unknown := [name for name in phases if name not in known]:
        raise ValueError(f"--phase must be among {', '.join(known)}, got {unknown[0]!r}")
    chosen = [
        Workload(
            setup,
            phase,
            rank=options.rank,
            adapters=options.adapters if setup == "batched" else 1,
            targets=options.targets,
            **place,
        )
        for setup in dict.fromkeys(setups)
        for phase in dict.fromkeys(phases)
        if phase in PHASES[setup]
    ]
    if not chosen:
        raise ValueError(f"--setup {options.setup} is not measured in --phase {options.phase}")
    return device, chosen


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Inside, SIGTERM leaves by an exception, so that what is measured can still be kept."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
