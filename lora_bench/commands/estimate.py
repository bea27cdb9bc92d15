"""`lora-bench estimate`: how much memory an adapted model would take, worked out without building it."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from lora_bench.bench.activations import total_bytes
from lora_bench.bench.budget import DEVICES, ITEMSIZES, MODES, PHASES, Budget, terms
from lora_bench.commands.arguments import FINE, at_least
from lora_bench.models.presets import widths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.bench.activations import Term
    from lora_bench.commands.arguments import Verbs

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
MODEL = "a preset's name, a single layer as linear-D_INxD_OUT, or a checkpoint's directory"
CHOICES = ("model", "mode", "rank", "batch", "sequence", "dtype", "phase", "adapters")


def declare(verbs: Verbs) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "estimate",
        help="how much memory a model with LoRA would take, without running it",
        description="Work out, term by term, the memory that training or running an adapted model takes.",
    )
    scenario_options(verb, MODES, sequence=512, dtype="bf16", phase="train")
    verb.add_argument("--lora-device", choices=DEVICES, default="cuda", help="where it would run (cuda)")
    verb.add_argument(
        "--targets", type=words, default=(), metavar="NAME,NAME", help="the adapted layers (all seven of a layer)"
    )
    verb.add_argument("--checkpointing", action="store_true", help="decoder layers save their inputs alone")
    verb.add_argument("--context", type=byte_count, metavar="SIZE", help="what the driver keeps, such as 500MiB")
    verb.add_argument("--json", action="store_true", help="print JSON, in bytes")
    verb.set_defaults(run=estimate)


def scenario_options(verb: argparse.ArgumentParser, modes: Sequence[str], **defaults: Any) -> None:
    """Declare what says which model does what; a default may be None, for the verb to settle."""
    number = at_least(1, int)
    known = {name: f" ({value})" if value else " (by device)" for name, value in defaults.items()}
    phase = known["phase"] if defaults["phase"] else " (train, for adapters prefill)"
    verb.add_argument("--model", required=True, help=MODEL)
    verb.add_argument("--mode", choices=modes, default="lora", help="what is trained, over which weights (lora)")
    verb.add_argument("--rank", type=number, default=16, metavar="R", help="of every adapter (16)")
    verb.add_argument("--batch", type=number, default=8, metavar="B", help="sequences in a batch (8)")
    verb.add_argument("--sequence", type=at_least(2, int), metavar="S", help="tokens of each" + known["sequence"])
    verb.add_argument("--dtype", choices=tuple(ITEMSIZES), help="of weights and adapters" + known["dtype"])
    verb.add_argument("--phase", choices=PHASES, help="what is run" + phase)
    verb.add_argument("--adapters", type=number, default=1, metavar="N", help="that share a batch (1)")
    verb.set_defaults(**defaults)


def words(text: str) -> tuple[str, ...]:
    """The option type of "q_proj,v_proj"."""
    return tuple(text.split(","))


def byte_count(text: str) -> int:
    """The option type of "2GiB": bytes, of which KiB, MiB, GiB and KB, MB, GB hold many."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([A-Za-z]*)", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 2GiB, 500MiB or 1000000, got {text}")
    return int(float(match[1]) * unit)


def readable(count: float) -> str:
    """Bytes as "1.50 GiB", less than one in MiB."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.2f} MiB"


def estimate(options: argparse.Namespace) -> int:
    """Print the budget: each field, its terms with the numbers in them, the total and the peak."""
    found = terms(
        **{name: getattr(options, name) for name in CHOICES},
        targets=options.targets,
        device=options.lora_device,
        checkpointing=options.checkpointing,
        context=options.context or 0,
    )
    total = Budget(**{name: total_bytes(own) for name, own in found.items()})
    known = options.context is not None or options.lora_device == "cpu"
    print(as_json(options, found, total) if options.json else as_text(options, found, total, context_known=known))
    return FINE


def as_json(options: argparse.Namespace, found: dict[str, list[Term]], total: Budget) -> str:
    """Everything in bytes; `total` is the sum of the fields, `peak` what is there at once."""
    shown = {
        "schema": "lora-bench/estimate/1",
        **{name: getattr(options, name) for name in (*CHOICES, "lora_device", "checkpointing", "targets")},
        "bytes": total._asdict() | {"context": options.context},
        "total": total.total,
        "peak": total.peak,
        "terms": {
            name: [{"name": term.name, "bytes": term.bytes, "factors": dict(term.factors)} for term in own]
            for name, own in found.items()
        },
    }
    return json.dumps(shown, indent=1)


def as_text(options: argparse.Namespace, found: dict[str, list[Term]], total: Budget, *, context_known: bool) -> str:
    """The table: a line for each field and, indented, one for each of its terms."""
    unit, of = ("GiB", 2**30) if total.total >= 2**30 else ("MiB", 2**20)
    lines = [title(options), "", f"{'':<44} {unit:>8} {'share':>6}"]

    def line(name: str, count: int, formula: str = "") -> None:
        lines.append(f"{name:<44} {count / of:>8.3f} {count / total.total:>6.1%}  {formula}".rstrip())

    for name, own in found.items():
        if own:
            line(name.replace("_", " "), total_bytes(own))
            for term in own:
                line(f"  {term.name}", term.bytes, term.formula)
    lines.append("")
    line("total, if all were there at once", total.total)
    line("peak", total.peak, _why(total, options.model))
    if not context_known:
        lines.append("context: measured per device, not estimated (give it with --context)")
    return "\n".join(lines)


def _why(total: Budget, model: str) -> str:
    """Which moment the peak is."""
    if not total.gradients:
        return "in the forward"
    if total.gradients > total.activations + total.workspace:
        return "when all gradients are there, and the activations gone"
    return "before the optimiser's step" if widths(model) else "as the backward begins, before there are gradients"


def title(options: argparse.Namespace, without: str = "") -> str:
    """What is asked about, in one line; `without` is what is still to be found."""
    parts = {
        "model": options.model,
        "mode": options.mode if options.mode == "full" else f"{options.mode} r{options.rank}",
        "adapters": f"{options.adapters} adapters" if options.adapters > 1 else "",
        "phase": options.phase,
        "dtype": options.dtype,
        "batch": f"batch {options.batch}",
        "sequence": f"sequence {options.sequence}",
        "device": f"on {options.lora_device}",
    }
    return ", ".join(text for name, text in parts.items() if text and name != without)
