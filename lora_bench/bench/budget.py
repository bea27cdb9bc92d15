"""`Budget`: the memory that training or running an adapted model takes, worked out and not measured.

Every term is a product of sizes, read off transformers' Llama, our reference layers and torch's AdamW; no constant is
fitted. PEFT takes more in 16 bits: its adapters are in float32, and so is the copy of x that each A saves.
Left out are what an allocator rounds up and keeps, what libraries take beside torch's tensors (on a CPU without bf16
instructions oneDNN makes float32 copies), and the context, where it is not given. Of these torch's CUDA allocator
counts cuBLAS's workspaces, 8 MiB (on Hopper 32) for each thread that multiplies, of which the backward is one.
Sources: Hu et al. 2021 (arXiv 2106.09685) for LoRA, Dettmers et al. 2023 (arXiv 2305.14314) for NF4 with double
quantisation, Chen et al. 2016 (arXiv 1604.06174) for checkpointing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lora_bench.bench.activations import (
    FP32,
    Term,
    checkpointed,
    layer_passing,
    layer_saved,
    layer_transient,
    saved,
    total_bytes,
    transient,
)
from lora_bench.models.shapes import LayerShapes, Linears, Shapes, shapes

MODES = ("lora", "rslora", "qlora", "full")
"""rsLoRA differs from LoRA in its scaling alone, and costs the same; full is the model without adapters."""
PHASES = ("train", "prefill", "decode")
DEVICES = ("cpu", "cuda")
ITEMSIZES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
BLOCK, NESTED_BLOCK = 64, 256  # weights per statistic of NF4, and statistics per statistic of those
INT32 = 4
CHUNK = 2**17  # weights that `Nf4Linear` dequantises at a time on a CPU


class Budget(NamedTuple):
    """Bytes by what they are for.

    weights: parameters and buffers of the model, 4-bit codes among them. quantisation_constants: the statistics of
    NF4's blocks. adapters: every A and B. gradients: of what trains, and the most that the optimiser's step, or the end
    of the backward, takes beside them. optimiser: its state. activations: what is saved for backward; to infer, the
    most that is alive at once. kv_cache: keys and values. workspace: the most that one operation of the backward takes
    beside what is still saved. context: what the device's driver keeps, as it was given.
    """

    weights: int
    quantisation_constants: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    kv_cache: int
    workspace: int
    context: int = 0

    @property
    def total(self) -> int:
        """All of it, which is never there at once: the activations go as the gradients come.

        Of a single layer what is there at both ends counts twice: x, and the gradients that go through it.
        """
        return sum(self)

    @property
    def peak(self) -> int:
        """The higher of two moments: when the backward begins, and when all gradients are there.

        The first is the backward of the loss or, of few tokens, that of the last layer, whose 4-bit weights are
        dequantised; the second the optimiser's step, or the backward of the first layer. In between there may be more
        where the vocabulary is small: the gradients of one layer's activations. The total bounds that too.
        """
        return self.total - min(self.gradients, self.activations + self.workspace)


def budget(**choices: Any) -> Budget:
    """The sums of `terms`, which says what may be chosen."""
    return Budget(**{name: total_bytes(own) for name, own in terms(**choices).items()})


def terms(
    *,
    model: str,
    mode: str,
    rank: int,
    batch: int,
    sequence: int,
    dtype: str,
    phase: str = "train",
    adapters: int = 1,
    targets: tuple[str, ...] = (),
    device: str = "cpu",
    checkpointing: bool = False,
    context: int = 0,
) -> dict[str, list[Term]]:
    """The terms of each field of `Budget`.

    model is a preset, a single layer or a checkpoint's folder, of which only config.json is read; mode one of `MODES`.
    The phases are those of `Workload`, and so are batch, sequence and adapters: more than one are pooled for mixed
    batches, beside the layer's own and an empty slot. No targets are all linear layers of a decoder layer. With
    `checkpointing` each decoder layer saves its input alone and computes the rest again. `device` is "cpu" or "cuda".

    Raises ValueError for what is out of range, naming it, as `shapes` does for the model, and for training more than
    one adapter.
    """
    size, train = shapes(model), phase == "train"
    _check(mode, phase, dtype, device, {"rank": rank, "batch": batch, "adapters": adapters, "sequence": sequence})
    chosen = _targets(size, mode, targets)
    if adapters > 1 and (train or mode == "full"):
        why = "full has no adapters" if mode == "full" else "one adapter is trained at a time"
        raise ValueError(f"{why}, got adapters={adapters}")
    if checkpointing and not train:
        raise ValueError(f"checkpointing is for training, and the phase is {phase}")
    if checkpointing and isinstance(size, LayerShapes):
        raise ValueError(f"checkpointing is for decoder layers, and {model} has none")
    place = {"batch": batch, "itemsize": ITEMSIZES[dtype], "rank": rank}
    quantised = chosen if mode == "qlora" and chosen else ()
    weights, constants = _weights(size, ITEMSIZES[dtype], quantised)
    dequantising = _dequantising(size, ITEMSIZES[dtype], quantised, device)
    found: dict[str, list[Term]] = {name: [] for name in Budget._fields} | {
        "weights": weights,
        "quantisation_constants": constants,
        "adapters": [] if chosen is None else _adapters(size, ITEMSIZES[dtype], rank, chosen, adapters),
        "context": [Term("given", {"bytes": context})],
    }
    trains = size.tensors if chosen is None else size.lora_tensors(rank, chosen)
    trained = _trained(trains, ITEMSIZES[dtype], device) if train else None
    read, past = (1, sequence) if phase == "decode" else (sequence, 0)
    work: dict[str, Any] = place | {"trained": trained, "read": read, "targets": chosen, "dequantising": dequantising}
    if isinstance(size, LayerShapes):
        found |= _layer(size, pooled=adapters > 1, **work)
    else:
        found |= _decoder(size, pooled=adapters > 1, past=past, checkpointing=checkpointing, **work)
    return {name: [term for term in own if term.bytes] for name, own in found.items()}


def _decoder(
    size: Shapes,
    *,
    trained: Trained | None,
    read: int,
    past: int,
    targets: tuple[str, ...] | None,
    pooled: bool,
    dequantising: list[Term],
    checkpointing: bool,
    **place: int,
) -> dict[str, list[Term]]:
    """What a decoder's forward keeps, its backward takes, and its training adds."""
    batch, itemsize = place["batch"], place["itemsize"]
    if trained is None:
        cache = {"tensors": 2 * size.layers, "tokens": batch * (past + read), "kv width": size.kv_width}
        alive = transient(
            size, read=read, past=past, targets=targets or (), pooled=pooled, dequantising=dequantising, **place
        )
        return {"kv_cache": [Term("keys and values", cache | {"bytes": itemsize})], "activations": alive}
    decoder, besides, loss = saved(size, sequence=read, targets=targets, **place)
    logits = {"tensors": 2, "tokens": batch * read, "vocabulary": size.vocabulary, "bytes": FP32}
    backward = [Term("loss, the gradients of its two parts in fp32", logits)]
    layer = dequantising
    if checkpointing:  # what the loss has saved is gone when the layers are computed again
        decoder, again = checkpointed(size, decoder, tokens=batch * read, itemsize=itemsize)
        loss, backward, layer = [], loss + backward, again + dequantising
    gone = [Term(f"gone: {name}", {**factors, "bytes": -factors["bytes"]}) for name, factors in loss[:1]]
    return {
        "activations": decoder + besides + loss,
        "workspace": max(backward, layer + gone, key=total_bytes),
        "gradients": trained.gradients + max(trained.step, layer, key=total_bytes),
        "optimiser": trained.optimiser,
    }


def _layer(
    size: LayerShapes,
    *,
    trained: Trained | None,
    read: int,
    targets: tuple[str, ...] | None,
    pooled: bool,
    dequantising: list[Term],
    batch: int,
    itemsize: int,
    rank: int,
) -> dict[str, list[Term]]:
    """The same of a single layer."""
    work: dict[str, Any] = {"tokens": batch * read, "itemsize": itemsize, "adapted": targets is not None}
    if trained is None:
        work |= {"batch": batch, "rank": rank, "pooled": pooled, "dequantising": dequantising}
        return {"activations": layer_transient(size, **work)}
    passing, staying = layer_passing(size, gradients=trained.gradients, dequantising=dequantising, **work)
    return {
        "activations": layer_saved(size, rank=rank, **work),
        "workspace": passing,
        "gradients": trained.gradients + trained.step + staying,
        "optimiser": trained.optimiser,
    }


def _check(mode: str, phase: str, dtype: str, device: str, sizes: dict[str, int]) -> None:
    words = (("mode", mode, MODES), ("phase", phase, PHASES), ("dtype", dtype, tuple(ITEMSIZES)))
    for name, value, known in (*words, ("device", device, DEVICES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, number in sizes.items():
        least = 2 if name == "sequence" else 1
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def _targets(size: Linears, mode: str, targets: tuple[str, ...]) -> tuple[str, ...] | None:
    """The layers that are adapted, or None for full fine-tuning."""
    if mode == "full":
        if targets:
            raise ValueError(f"full trains everything and has no targets, got {', '.join(targets)}")
        return None
    chosen = targets or tuple(size.linears)
    size.check_targets(chosen)
    return chosen


def _weights(size: Shapes | LayerShapes, itemsize: int, quantised: tuple[str, ...]) -> tuple[list[Term], list[Term]]:
    """The model's own tensors; and, of NF4 with double quantisation, the statistics of its blocks."""
    values = {name: d_in * d_out for name, (d_in, d_out) in size.linears.items()}
    packed = [values[name] for name in quantised]
    each = {"layers": size.layers}
    linears = [
        Term("linear layers", each | {"weights": sum(values.values()) - sum(packed), "bytes": itemsize}),
        Term("linear layers, 4-bit codes", each | {"weights": sum(packed), "bytes": 0.5}),
    ]
    weights = linears if isinstance(size, LayerShapes) else _around(size, itemsize, linears)
    groups = each | {"groups": sum(math.ceil(number / BLOCK / NESTED_BLOCK) for number in packed)}
    constants = [
        Term("absmax of each 64 weights, in 8 bits", groups | {"blocks": NESTED_BLOCK, "bytes": 1}),
        Term("absmax of each group of those, in fp32", groups | {"bytes": FP32}),
        Term("their mean, in fp32", each | {"linear layers": len(quantised), "bytes": FP32}),
    ]
    return weights, constants


def _around(size: Shapes, itemsize: int, linears: list[Term]) -> list[Term]:
    """A decoder's tensors, its linear layers among them."""
    table = {"vocabulary": size.vocabulary, "hidden": size.hidden, "bytes": itemsize}
    biases = sum(size.linears[name][1] for name in size.biased)
    return [
        Term("embeddings, which are the head" if size.tied else "embeddings", table),
        *([] if size.tied else [Term("head", table)]),
        *linears,
        Term("biases", {"layers": size.layers, "biases": biases, "bytes": itemsize}),
        Term("norms", {"norms": size.norms, "hidden": size.hidden, "bytes": itemsize}),
        Term("rotary frequencies, kept twice", {"tensors": 2, "frequencies": size.head_dim // 2, "bytes": FP32}),
    ]


def _adapters(size: Linears, itemsize: int, rank: int, targets: tuple[str, ...], adapters: int) -> list[Term]:
    both = {"layers": size.layers, "rank": rank, "(d_in + d_out)": sum(sum(size.linears[name]) for name in targets)}
    own = Term("A and B of the layers", both | {"bytes": itemsize})
    pool = Term("A and B in the pool, one slot empty", {"slots": adapters + 1} | both | {"bytes": itemsize})
    return [own, pool] if adapters > 1 else [own]


def _dequantising(size: Linears, itemsize: int, quantised: tuple[str, ...], device: str) -> list[Term]:
    """`Nf4Linear` looks up pairs of float32 by int32, then rounds them: at once on a GPU, in chunks on a CPU."""
    if not quantised:
        return []
    largest = max(math.prod(size.linears[name]) for name in quantised)
    weights = largest if device == "cuda" else min(CHUNK, largest)
    beside = max(INT32 / 2, 0 if itemsize == FP32 else itemsize)  # an index for two, then what they are rounded to
    return [
        Term("weights dequantised", {"weights": weights, "bytes": FP32 + beside}),
        Term("their statistics, in fp32", {"blocks": math.ceil(largest / BLOCK), "bytes": FP32}),
    ]


class Trained(NamedTuple):
    """What training adds: gradients, the optimiser's state, and what its step takes beside them."""

    gradients: list[Term]
    optimiser: list[Term]
    step: list[Term]


def _trained(tensors: list[tuple[int, int]], itemsize: int, device: str) -> Trained:
    """Of these tensors, (how many, values in each), under AdamW, in the parameters' own dtype.

    Its step takes roots of exp_avg_sq: on a GPU of all at once (foreach), on a CPU two for a tensor at a time. The
    counts of its steps lie on the CPU in any case.
    """
    parameters, count = sum(count * values for count, values in tensors), sum(count for count, _ in tensors)
    largest = {"tensors": 2, "values": max(values for _, values in tensors)}
    roots = {"parameters": parameters} if device == "cuda" else largest
    counts = [] if device == "cuda" else [Term("AdamW's step count", {"tensors": count, "bytes": FP32})]
    moments = {"moments": 2, "parameters": parameters, "bytes": itemsize}
    return Trained(
        gradients=[Term("of what trains", {"parameters": parameters, "bytes": itemsize})],
        optimiser=[Term("AdamW's exp_avg and exp_avg_sq", moments), *counts],
        step=[Term("AdamW's step, roots of exp_avg_sq", roots | {"bytes": itemsize})],
    )
