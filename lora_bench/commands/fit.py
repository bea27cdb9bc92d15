"""`lora-bench fit`: the largest batch, sequence or number of adapters that fits in memory, found by measurement."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_bench.bench.budget import DEVICES, MODES
from lora_bench.commands.arguments import FAILED, FINE, INCONCLUSIVE
from lora_bench.commands.estimate import byte_count, readable, scenario_options, title

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lora_bench.bench.fit import Trial
    from lora_bench.bench.workload import Row
    from lora_bench.commands.arguments import Verbs

NAMES = {"batch": "batch", "sequence": "sequence", "adapters": "number of adapters"}
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
SEQUENCE = {"cpu": 64, "cuda": 512}


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "fit",
        help="find the largest batch, sequence or number of adapters that fits in memory",
        description="Find, by measurement, the largest batch, sequence or number of adapters that fits in memory.",
    )
    verb.add_argument("--what", choices=tuple(NAMES), default="batch", help="to find (batch)")
    scenario_options(verb, [mode for mode in MODES if mode != "rslora"], sequence=None, dtype=None, phase=None)
    verb.add_argument("--lora-subject", default="reference", metavar="SUBJECT", help="as for conform (reference)")
    verb.add_argument("--lora-device", choices=DEVICES, help="(cuda, where there is one)")
    verb.add_argument("--limit", type=byte_count, metavar="SIZE", help="such as 2GiB (what is free)")
    verb.set_defaults(run=fit)


def fit(options: argparse.Namespace) -> int:
    """Print each trial as it is made, then the largest size that fits, beside what the estimate had said."""
    from lora_bench.bench.fit import QUANTITIES, Broken, attempt, search

    what, least = options.what, QUANTITIES[options.what]
    settle(options)
    must_run(row_at(options, least), options)
    limit = "what the device has" if options.limit is None else readable(options.limit)
    print(f"the largest {NAMES[what]}: {title(options, without=what)}, within {limit}")
    print("each is tried in a process of its own; where one fits, smaller ones are taken to fit\n")
    trials: list[Trial] = []

    def try_one(size: int) -> Trial:
        row = row_at(options, size)
        return attempt(size, row, options.mode, device=options.lora_device, limit=options.limit)

    try:
        for trial in search(try_one, least):
            trials.append(trial)
            print(line(what, trial), flush=True)
    except Broken as error:
        print(f"lora-bench fit: {what} {error}", file=sys.stderr)
        return FAILED
    print(f"\n{answer(what, trials)}")
    return FINE if any(trial.fits for trial in trials) else INCONCLUSIVE


def settle(options: argparse.Namespace) -> None:
    """Fill in what depends on the device there is, or on what is looked for; ValueError for a device that is not."""
    import torch

    if options.lora_device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--lora-device cuda: torch {torch.__version__} sees no CUDA device")
    device = options.lora_device = options.lora_device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or DTYPE[device]
    options.sequence = options.sequence or SEQUENCE[device]
    options.phase = options.phase or ("prefill" if options.what == "adapters" else "train")
    if options.limit is None and device == "cpu":
        from lora_bench.bench.measure import free_bytes

        options.limit = free_bytes(device)


def row_at(options: argparse.Namespace, size: int) -> Row:
    """The row with that much of what is looked for."""
    from lora_bench.bench.fit import row_of

    names = ("model", "dtype", "rank", "batch", "sequence", "phase", "adapters")
    sizes = {name: getattr(options, name) for name in names} | {options.what: size}
    return row_of(options.mode, options.lora_subject, **sizes)


def must_run(row: Row, options: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be run here, before anything is."""
    from lora_bench.bench.fit import estimate
    from lora_bench.bench.scenario import reason_to_skip
    from lora_bench.models.build import check_model

    check_model(options.model)
    estimate(row, options.mode, options.lora_device)
    if options.what == "adapters":
        row = row_at(options, 2)  # one alone needs no mixed batch
    if reason := reason_to_skip(row, options.lora_device):
        raise ValueError(reason)


def line(what: str, trial: Trial) -> str:
    """One trial: its size, its verdict, the measured and the estimated peak."""
    verdict = "fits" if trial.fits else "does not fit"
    measured = "out of memory" if trial.peak_bytes is None else readable(trial.peak_bytes)
    estimated = readable(trial.estimated_bytes)
    return f"  {what} {trial.size:>6}   {verdict:<12}   peak {measured:>13}   estimated {estimated:>11}"


def answer(what: str, trials: Sequence[Trial]) -> str:
    """The largest that fits with its peak and what the estimate leaves unexplained, and the smallest that does not."""
    fails = min(trial.size for trial in trials if not trial.fits)
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return f"not even a {NAMES[what]} of {fails} fits"
    best = max(fitting, key=lambda trial: trial.size)
    assert best.peak_bytes is not None  # or it would not fit
    rest = best.peak_bytes - best.estimated_bytes
    before = f"{readable(best.context_bytes)} of them before there was a model"
    return (
        f"the largest {NAMES[what]} that fits is {best.size}; {fails} does not\n"
        f"  measured    {readable(best.peak_bytes)}, {before}\n"
        f"  estimated   {readable(best.estimated_bytes)}, with those\n"
        f"  unexplained {readable(rest)} ({rest / best.peak_bytes:+.0%}): gaps in the heap, and what libraries keep"
    )
