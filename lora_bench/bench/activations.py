"""Activations, tensor by tensor: what a training step saves for backward, and what is alive at once to infer.

For a Llama-like decoder of transformers under torch's sdpa. Read off the modelling code, and checked against what
`torch.autograd.graph.saved_tensors_hooks` and torch's allocator tell. Autograd saves what an operation's derivative
needs, and nothing for operands that need no gradient. A frozen linear layer saves its weight alone, which is there
anyway; our `Nf4Linear` saves nothing and dequantises again. So what LoRA saves is the input of every A, the r numbers
between A and B, and all that the gradient passes through on its way down.

transformers 5.17 and 5.23 save the same (they differ in how cos and sin come about, not in what they are). Releases
that repeat keys and values before sdpa save `heads` of them in place of `kv_heads`. sdpa is taken to run a fused
kernel: the CPU's in any dtype, FlashAttention in 16 bits on CUDA. Where it falls back to plain products (fp32 on CUDA
with kv_heads < heads) it saves batch × heads × sequence² numbers more in every layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_bench.models.shapes import LayerShapes, Shapes

FP32, INT64 = 4, 8


class Term(NamedTuple):
    """One line of a budget: a product of named numbers, the last of which is the bytes of one element."""

    name: str
    factors: Mapping[str, float]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.factors.values()))

    @property
    def formula(self) -> str:
        numbers = ((unit, int(number) if number == int(number) else number) for unit, number in self.factors.items())
        return " × ".join(f"{number:,} {unit}" for unit, number in numbers)


def total_bytes(terms: Iterable[Term]) -> int:
    """The sum of several."""
    return sum(term.bytes for term in terms)


class Reached(NamedTuple):
    """In how many decoder layers the gradient passes through a place; in the first it may end before it."""

    attention_norm: int
    query: int
    key: int
    attention: int
    mlp_norm: int
    gate: int
    up: int


def reached(layers: int, targets: tuple[str, ...] | None) -> Reached:
    """Where gradients pass when `targets` are adapted, or when everything trains (None).

    Every layer above the first has an adapter below it. In the first, gradients end at the lowest adapters.
    """
    if targets is None:
        return Reached(*[layers] * len(Reached._fields))
    query, key = "q_proj" in targets, "k_proj" in targets
    attention = query or key or "v_proj" in targets
    mlp_norm = attention or "o_proj" in targets
    gate, up = (mlp_norm or name in targets for name in ("gate_proj", "up_proj"))
    first = (False, query, key, attention, mlp_norm, gate, up)
    return Reached(*(layers - 1 + each for each in first))


def saved(
    shapes: Shapes, *, batch: int, sequence: int, itemsize: int, rank: int, targets: tuple[str, ...] | None
) -> tuple[list[Term], list[Term], list[Term]]:
    """What the decoder layers save, what is saved besides, and what the loss saves; `targets` None is full fine-tuning.

    A tensor that several operations save is listed once, as it lies in memory once.
    """
    layers, tokens = shapes.layers, {"tokens": batch * sequence}
    at = reached(layers, targets)
    full = targets is None
    named = frozenset(shapes.linears if targets is None else targets)

    def term(name: str, count: int, width: str, elements: int, size: int = itemsize) -> Term:
        return Term(name, {"tensors": count} | tokens | {width: elements, "bytes": size})

    hidden, intermediate = shapes.hidden, shapes.intermediate
    normed = [
        # RMSNorm computes x rsqrt(mean x²) in float32 whatever the dtype, then weight * (that, in the dtype).
        *([term("norms, before their weight", 2 * layers, "hidden", hidden)] if full else []),
        term("norms, input in fp32", at.attention_norm + at.mlp_norm, "hidden", hidden, FP32),
        term("norms, rsqrt", at.attention_norm + at.mlp_norm, "mean square", 1, FP32),
    ]
    decoder = [
        *normed,
        term("x of q, k, v", layers * bool(named & {"q_proj", "k_proj", "v_proj"}), "hidden", hidden),
        term("sdpa, query", at.attention, "query width", shapes.query_width),
        term("sdpa, key and value", 2 * at.attention, "kv width", shapes.kv_width),
        term("sdpa, output = x of o", layers if "o_proj" in named else at.attention, "query width", shapes.query_width),
        term("sdpa, log-sum-exp", at.attention, "heads", shapes.heads, max(FP32, itemsize)),
        term("x of gate, up", layers * bool(named & {"gate_proj", "up_proj"}), "hidden", hidden),
        term("gate, before silu", at.gate, "intermediate", intermediate),
        term("silu(gate)", at.up, "intermediate", intermediate),
        term("up", at.gate, "intermediate", intermediate),
        term("x of down", layers * ("down_proj" in named), "intermediate", intermediate),
        *([] if full else [term("A x, scaled", layers * len(named), "rank", rank)]),
    ]
    besides = [
        *([Term("token ids", tokens | {"bytes": INT64})] if full else []),
        *([Term("last norm, before its weight", tokens | {"hidden": hidden, "bytes": itemsize})] if full else []),
        *([Term("x of the head", tokens | {"hidden": hidden, "bytes": itemsize})] if full else []),
        Term("last norm, input in fp32", tokens | {"hidden": hidden, "bytes": FP32}),
        Term("last norm, rsqrt", tokens | {"mean square": 1, "bytes": FP32}),
        *rotary(shapes, sequence, itemsize, rotates=at.query + at.key > 0),
    ]
    loss = [
        # The logits are cast to float32; log_softmax saves its result, nll_loss that same tensor, labels and weight.
        Term("loss, log-probabilities in fp32", tokens | {"vocabulary": shapes.vocabulary, "bytes": FP32}),
        # Shifted by one: a batch of one stays a view of the longer, padded ones, others are copied.
        Term("loss, labels", {"labels": batch * sequence + (batch == 1), "bytes": INT64}),
        Term("loss, total weight", {"bytes": FP32}),
    ]
    return [each for each in decoder if each.bytes], besides, loss


def checkpointed(shapes: Shapes, decoder: list[Term], *, tokens: int, itemsize: int) -> tuple[list[Term], list[Term]]:
    """What decoder layers save that keep their input alone (Chen et al. 2016, arXiv 1604.06174, section 4).

    And what the one saves that is computed again at a time: its part of `decoder`.
    """
    inputs = Term(
        "inputs of the layers",
        {"tensors": shapes.layers, "tokens": tokens, "hidden": shapes.hidden, "bytes": itemsize},
    )
    again = []
    for name, factors in decoder:
        times = math.ceil(factors["tensors"] / shapes.layers)
        again.append(Term(f"one layer again: {name}", {**factors, "tensors": times}))
    return [inputs], again


def transient(
    shapes: Shapes,
    *,
    batch: int,
    read: int,
    past: int,
    itemsize: int,
    rank: int,
    targets: tuple[str, ...],
    pooled: bool,
    dequantising: list[Term],
) -> list[Term]:
    """The most that is alive at once beside the weights and the cache, where nothing is saved.

    Each of `batch` sequences reads `read` tokens after `past` of them. One of five moments: sdpa's query in the making,
    the up-projection, its product with a weight that is being dequantised, a cache that is copied to make room, the
    head (which reads each sequence's last token alone).
    With `targets` the up-projection's output, the adapter's and their sum are alive together; the algebra for a mixed
    batch (`pooled`) adds in one product, but first gathers a copy of B for each sequence.
    """
    tokens, bytes_ = {"tokens": batch * read}, {"bytes": itemsize}

    def alive(name: str, count: int, width: str, elements: int) -> Term:
        return Term(name, {"tensors": count} | tokens | {width: elements} | bytes_)

    beneath = 3 if shapes.layers > 1 else 2  # the model's input, the layer's, and what the norm made of it
    adapted = "up_proj" in targets
    inputs = alive("inputs of model, layer, MLP, up", beneath + 1, "hidden", shapes.hidden)
    mlp = [
        inputs,
        alive(
            "silu(gate), up and what follows", 4 if adapted and not pooled else 3, "intermediate", shapes.intermediate
        ),
    ]
    if adapted and pooled:
        gathered = {"sequences": batch, "rank": rank, "intermediate": shapes.intermediate} | bytes_
        mlp += [Term("B, for each sequence", gathered), Term("A x", tokens | {"rank": rank} | bytes_)]
    product = [inputs, alive("silu(gate), up", 2, "intermediate", shapes.intermediate), *dequantising]
    attention = [
        alive("inputs of model, layer, q", beneath, "hidden", shapes.hidden),
        alive("query, and three while it is turned", 4, "query width", shapes.query_width),
        alive("key, value", 2, "kv width", shapes.kv_width),
    ]
    longer = [
        alive("inputs of model, layer, q", beneath, "hidden", shapes.hidden),
        Term("keys before this token", {"tokens": batch * past, "kv width": shapes.kv_width} | bytes_),
    ]
    head = [
        alive("last hidden state", 1, "hidden", shapes.hidden),
        Term("logits", {"sequences": batch, "vocabulary": shapes.vocabulary} | bytes_),
    ]
    places = [*rotary(shapes, read, itemsize, rotates=True), Term("positions", {"tokens": read, "bytes": INT64})]
    moments = [[*moment, *places] for moment in (attention, mlp, product, longer)]
    return max((*moments, head), key=total_bytes)


def rotary(shapes: Shapes, sequence: int, itemsize: int, *, rotates: bool) -> list[Term]:
    """cos and sin, which all layers and all sequences share."""
    factors = {"tables": 2, "tokens": sequence, "head_dim": shapes.head_dim, "bytes": itemsize}
    return [Term("cos and sin", factors)] if rotates else []


def layer_saved(layer: LayerShapes, *, tokens: int, itemsize: int, rank: int, adapted: bool) -> list[Term]:
    """What a single layer saves for backward: x, of which A's gradient or the weight's is made, and A x."""
    rows = {"tokens": tokens}
    between = [Term("A x, scaled", rows | {"rank": rank, "bytes": itemsize})] if adapted else []
    return [Term("x of the layer", rows | {"d_in": layer.d_in, "bytes": itemsize}), *between]


def layer_passing(
    layer: LayerShapes,
    *,
    tokens: int,
    itemsize: int,
    adapted: bool,
    gradients: list[Term],
    dequantising: list[Term],
) -> tuple[list[Term], list[Term]]:
    """The most that goes through a single layer beside what it saves; and what stays for the optimiser's step.

    dL/dy is there from the beginning, as x is, and y until the backward has ended. The most is in the forward, where y,
    the adapter's part and their sum are alive, or in the backward. With an adapter dL/dx has two parts that are added
    up, and that of the base comes second, after the adapter's gradients; a 4-bit one makes it of a product and a copy.
    """
    rows, bytes_ = {"tokens": tokens}, {"bytes": itemsize}

    def outputs(name: str, count: int) -> Term:
        return Term(name, {"tensors": count} | rows | {"d_out": layer.d_out} | bytes_)

    def inputs(name: str, count: int) -> Term:
        return Term(name, {"tensors": count} | rows | {"d_in": layer.d_in} | bytes_)

    both = outputs("y and its gradient", 2)
    forward = [outputs("gradient of y", 1), outputs("y, the adapter's part and their sum", 3)] if adapted else [both]
    rounded = [Term("weights, rounded", {**each.factors, "bytes": itemsize}) for each in dequantising[:1]]
    name, count = ("gradient of x, and of its parts", 3) if adapted else ("gradient of x", 1)
    backward = [both, *gradients, inputs(name, count), *rounded]
    again = [both, *gradients, inputs("gradients of x, by adapter and base", 2), *dequantising] if dequantising else []
    staying = [outputs("gradient of y", 1), inputs("x and its gradient", 2)]
    return max(forward, backward, again, key=total_bytes), staying


def layer_transient(
    layer: LayerShapes,
    *,
    batch: int,
    tokens: int,
    itemsize: int,
    rank: int,
    adapted: bool,
    pooled: bool,
    dequantising: list[Term],
) -> list[Term]:
    """The most that is alive at once around a single layer: x, y, the adapter's part and their sum.

    As in `transient`, the algebra for a mixed batch gathers a copy of B for each sequence; and a weight is dequantised
    before there is an adapter's part.
    """
    rows, bytes_ = {"tokens": tokens}, {"bytes": itemsize}

    def outputs(name: str, count: int) -> Term:
        return Term(name, {"tensors": count} | rows | {"d_out": layer.d_out} | bytes_)

    x = Term("x", rows | {"d_in": layer.d_in} | bytes_)
    adding = [x, outputs("y", 1)]
    if adapted:
        adding = [x, outputs("y, the adapter's part and their sum", 3)]
    if pooled:
        gathered = Term("B, for each sequence", {"sequences": batch, "rank": rank, "d_out": layer.d_out} | bytes_)
        adding = [x, outputs("y and the adapter's part", 2), gathered, Term("A x", rows | {"rank": rank} | bytes_)]
    return max(adding, [x, outputs("y", 1), *dequantising], key=total_bytes)
