"""A/B comparisons in the terminal: a line for each pair as it comes, and the verdict with what it follows from."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.gate.pair import LOCATION
from lora_bench.gate.power import smallest_change
from lora_bench.gate.verdict import LOOKS
from lora_bench.gate.verdict import told as change_told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.bench.workload import Workload
    from lora_bench.gate.ab import Duel
    from lora_bench.gate.pair import Pair


def label(workload: Workload) -> str:
    """A workload where the model and the batch are said elsewhere."""
    adapters = f" n{workload.adapters}" if workload.setup == "batched" else ""
    return f"{workload.setup} {workload.phase} r{workload.rank}{adapters}"


def one_line(text: object) -> str:
    """A text of others on one line, so that it cannot begin one: a workflow would take that for its own command."""
    return " ".join(str(text).split())


def heard(duel: Duel) -> str:
    """What the last pair showed, in one line."""
    name = label(duel.workload)
    if duel.broken is not None or not duel.comparison.attempts:
        return f"{name}: {one_line(duel.broken or duel.stumbled)}"
    attempt = duel.comparison.last
    again = " again," if len(duel.comparison.attempts) > 1 else ""
    aside = f", {len(attempt.quarantined)} laid aside" if attempt.quarantined else ""
    found = ""
    if attempt.pairs:
        pair = attempt.pairs[-1]
        head, control = (f"{math.expm1(pair.log_ratio(LOCATION, side)):+.1%}" for side in ("head", "control"))
        found = f": head {head}, control {control} ({len(pair.rounds)} rounds)"
    return f"{name},{again} pair {len(attempt.pairs)}{aside}{found}"


def told(duel: Duel) -> list[str]:
    """The verdict with what it follows from: location, tail, base against itself, the smallest change to be seen."""
    name, comparison = label(duel.workload), duel.comparison
    if not comparison.attempts or not comparison.last.pairs:
        return [f"{name}  {duel.verdict}", f"  {one_line(duel.because)}"]
    last = comparison.last
    base, head = (milliseconds(last.pairs, side) for side in ("base", "head"))
    counted = " + ".join(str(len(attempt.pairs)) for attempt in comparison.attempts)
    tail = change_told(last.tail.change) if last.tail else "unknown, with fewer than 64 rounds in a pair"
    found = [
        f"{name}  {base} -> {head}  {change_told(last.location.change)}  {duel.verdict} ({counted} pairs)",
        f"  {one_line(duel.because)}",
        f"  worst steps {tail}",
        f"  base against itself {change_told(last.control.change)}",
    ]
    restless = sum(pair.restless for pair in last.pairs)
    if restless:
        found.append(f"  {restless} of these pairs were interrupted in most of their rounds")
    if duel.stumbled:
        found.append(f"  once, and not again: {one_line(duel.stumbled)}")
    if len(last.pairs) >= LOOKS[0]:
        change = smallest_change(last.control.values, last.limits.location)
        shown = "none: equals differ too much here" if math.isinf(change) else f"about +{100 * change:.1f} %"
        found.append(f"  smallest change to be found nine times in ten, with up to {LOOKS[-1]} such pairs: {shown}")
    return found


def milliseconds(pairs: Sequence[Pair], side: str) -> str:
    """The median over pairs of the percentile that is compared."""
    each = [float(np.percentile(np.asarray(getattr(pair, side))[pair.rounds], LOCATION)) for pair in pairs]
    return f"{statistics.median(each) * 1e3:.4g} ms"
