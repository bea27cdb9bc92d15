"""What a workload must compute, move and keep, whatever the implementation, beside what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lora_bench.bench.budget import ITEMSIZES, Budget, budget
from lora_bench.bench.workload import BASE
from lora_bench.models.shapes import LayerShapes, shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.bench.workload import Workload
    from lora_bench.models.shapes import Shapes

WITHOUT = (BASE, "merged")
"""The set-ups in which no adapter is left beside the weights."""
LAUNCH_BOUND = 0.5
"""From which share of its time on a step is one of launches."""
FORWARD, BACKWARD = 1, 2
"""Products of a matrix product's own size: y; and dL/dx and dL/dw."""


class Ceilings(NamedTuple):
    """What a device was seen to reach: in one large copy, read and written bytes counted, and in one large product."""

    bytes_per_second: float
    flops_per_second: float


class Bound(NamedTuple):
    """The least seconds of a step on a device with such ceilings, and what holds it: "bytes", "FLOPs" or "launches"."""

    seconds: float
    by: str


class Count(NamedTuple):
    """Floating-point operations (a multiplication and an addition are two), and bytes read or written."""

    flops: int
    bytes: int

    def bound(self, ceilings: Ceilings) -> Bound:
        """The roofline (Williams, Waterman, Patterson 2009): the slower of the two, as if they ran side by side."""
        moving, computing = self.bytes / ceilings.bytes_per_second, self.flops / ceilings.flops_per_second
        return Bound(moving, "bytes") if moving >= computing else Bound(computing, "FLOPs")


def budget_of(workload: Workload, device: str = "cpu") -> Budget:
    """The memory that a workload takes, worked out; ValueError as `budget` raises it, and for a switch."""
    mode = "qlora" if workload.setup == "four_bit" else "full" if workload.setup in WITHOUT else "lora"
    return budget(
        model=workload.model,
        mode=mode,
        rank=max(1, workload.rank),
        batch=workload.batch,
        sequence=workload.sequence,
        dtype=workload.dtype,
        phase=workload.phase,
        adapters=workload.adapters,
        targets=() if mode == "full" else workload.adapted,
        device=device.partition(":")[0],
    )


def count(workload: Workload) -> Count:
    """The count of one step.

    Of the activations of inference nothing is counted: an ideal kernel keeps them on the chip. Training writes and
    reads what is saved for backward once, reads the weights twice, and the optimiser passes over what trains: its
    gradient, parameter and two moments. A product with a causal mask counts the half that is not masked. What goes into
    a single layer and comes out of it is read and written: there is nothing beside it on the chip.

    Raises ValueError for a model whose shapes are not known, and for a switch, of which nothing is counted.
    """
    if workload.phase == "switch":
        raise ValueError("of a switch nothing is counted")
    size, targets = shapes(workload.model), workload.adapted
    return Count(_flops(workload, size, targets), _bytes(workload, size, targets))


def _flops(workload: Workload, size: Shapes | LayerShapes, targets: tuple[str, ...]) -> int:
    tokens, train = workload.tokens, workload.phase == "train"
    linears = size.layers * sum(d_in * d_out for d_in, d_out in size.linears.values())
    base, attention = 2 * tokens * linears, 0
    if not isinstance(size, LayerShapes):
        read = tokens if train else workload.batch  # logits of the last token alone
        base += 2 * size.vocabulary * size.hidden * read
        attention = 4 * size.layers * size.query_width * workload.batch * _pairs(workload)
    adapter = 0
    if workload.setup not in WITHOUT:
        adapter = 2 * tokens * size.lora_parameters(workload.rank, targets)
    if not train:
        return base + attention + adapter
    trains_all = workload.setup == BASE
    backward = BACKWARD if trains_all else BACKWARD - 1  # frozen weights get no gradient
    return (FORWARD + backward) * base + (FORWARD + BACKWARD) * (attention + adapter)


def _pairs(workload: Workload) -> int:
    """Query and key pairs of one sequence that the mask lets through."""
    if workload.phase == "decode":
        return workload.sequence + 1
    return workload.sequence * (workload.sequence + 1) // 2


def _bytes(workload: Workload, size: Shapes | LayerShapes, targets: tuple[str, ...]) -> int:
    itemsize, train = ITEMSIZES[workload.dtype], workload.phase == "train"
    kept = budget_of(workload)
    weights, passing = kept.weights + kept.quantisation_constants, 0
    if isinstance(size, LayerShapes):  # y, dL/dy and dL/dx to train, where x is among what is saved; or x and y
        passing = workload.tokens * (size.d_in + size.d_out * (2 if train else 1)) * itemsize
    elif not size.tied:
        weights -= size.vocabulary * size.hidden * itemsize  # a table of which few rows are read
    one = 0 if workload.setup in WITHOUT else size.lora_parameters(workload.rank, targets) * itemsize
    adapters = one * (len(set(workload.asked)) if workload.setup == "batched" else 1)
    if not train:
        return weights + adapters + kept.kv_cache + passing
    trained = size.parameters * itemsize if workload.setup == BASE else one
    passes = 8  # gradient: written, read; two moments: read, written; parameter: read, written
    return 2 * (weights + adapters) + passes * trained + 2 * kept.activations + passing


def bounded(workload: Workload, ceilings: Mapping[str, Ceilings], launch_share: float | None = None) -> Bound | None:
    """The least that a step could take, by ceilings for each dtype; None without them or where no shapes are known.

    Where it is known that the device waits for launches more than half of the time, they hold the step; but the least
    is still what the device could do.
    """
    if workload.dtype not in ceilings:
        return None
    try:
        bound = count(workload).bound(ceilings[workload.dtype])
    except ValueError:
        return None
    return bound._replace(by="launches") if launch_share is not None and launch_share > LAUNCH_BOUND else bound


def reconciled(workload: Workload, device: str, memory: dict[str, Any]) -> dict[str, Any]:
    """What was worked out beside what was measured: `budget` by what it is for, and the `unexplained_bytes`.

    Measured is torch's allocated peak on a GPU. On a CPU it is the resident set's peak, in which Python, its libraries
    and the gaps of the C library's heap are unexplained. Nothing where the shapes are not known, or for a switch.
    """
    try:
        worked_out = budget_of(workload, device)
    except ValueError:
        return {}
    measured = memory.get("allocated_peak_bytes" if device.startswith("cuda") else "resident_peak_bytes")
    found: dict[str, Any] = {"budget": worked_out._asdict() | {"peak": worked_out.peak}}
    if isinstance(measured, int):
        found["unexplained_bytes"] = measured - worked_out.peak
    return found
