"""Several adapters in one batch: every row goes through its own, or through none."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_bench import bounds, definition
from lora_bench.conformance.check import check
from lora_bench.conformance.misuse import refused
from lora_bench.conformance.outcome import Raised

if TYPE_CHECKING:
    from lora_bench.conformance.trial import Trial
    from lora_bench.subject import Layer

NEEDS = ("pool", "route")
ROWS = "batch.rows_equal_single_rows"
MIXED = {"adapters": st.integers(2, 4)}
claim = partial(check, needs=NEEDS, after=ROWS, draws=MIXED)


@check("Each row of a mixed batch is what its adapter gives it alone.", needs=NEEDS, draws=MIXED)
def rows_equal_single_rows(trial: Trial) -> None:
    x, ids = trial.x, trial.ids.clamp(min=0)
    layer, pool = served(trial)
    judge_rows(trial, route(trial, layer, pool, x, ids), x, ids)
    # A prefill: several tokens to a row.
    x = torch.stack([trial.x, -trial.x], dim=1)
    judge_rows(trial, route(trial, layer, pool, x, ids), x, ids)


@claim("A row of id -1 gets the base's output.")
def minus_one_is_base(trial: Trial) -> None:
    layer, pool = served(trial)
    nobody = torch.full_like(trial.ids, -1)
    judge_rows(trial, route(trial, layer, pool, trial.x, nobody), trial.x, nobody)
    mixed = trial.ids
    mixed[0] = -1
    judge_rows(trial, route(trial, layer, pool, trial.x, mixed), trial.x, mixed)
    trial.visible(trial.effect[:1], trial.bare_bound[:1])


@claim(
    "A row does not change with its neighbours, their adapters or their inputs.",
    draws=MIXED | {"tokens": st.integers(2, 6)},
)
def neighbours_do_not_leak(trial: Trial) -> None:
    layer, pool = served(trial)
    x, ids = trial.x, trial.ids
    before = route(trial, layer, pool, trial.x, trial.ids)
    x[1:] = -x[1:].flip(0)
    ids[1:] = (ids[1:] + 2) % (trial.case.adapters + 1) - 1
    after = route(trial, layer, pool, x.clone(), ids.clone())
    trial.near("the first row", after[:1], before[:1].double(), 2 * allowed_rows(trial, x[:1], ids[:1]))
    judge_rows(trial, after, x, ids)


@check("An id that names no adapter is refused.", needs=NEEDS, draws=MIXED)
def unknown_id_raises(trial: Trial) -> None:
    layer, pool = served(trial)
    for unknown in (trial.case.adapters, -2):
        ids = trial.ids
        ids[-1] = unknown
        with refused(f"id {unknown} was taken in a pool of {trial.case.adapters}"):
            route(trial, layer, pool, trial.x, ids)


@claim("A mixed batch that raises leaves the layer as it was.")
def error_leaves_no_trace(trial: Trial) -> None:
    layer, pool = served(trial)
    wide = torch.cat([trial.x, trial.x], -1)
    with suppress(Raised):  # there is no such input; what matters is what comes after
        route(trial, layer, pool, wide, trial.ids.clamp(min=0))
    trial.defined(trial.call(layer, trial.x), trial.separate_bound)
    judge_rows(trial, route(trial, layer, pool, trial.x, trial.ids), trial.x, trial.ids)


@claim("The order of the adapters in a pool, and a second copy of one, do not matter.")
def slots_do_not_matter(trial: Trial) -> None:
    layer, _ = served(trial)
    adapters = trial.adapters
    last = len(adapters) - 1
    turned = trial.ask("pool", layer, [*reversed(adapters), adapters[0]])
    ids = trial.ids.clamp(min=0)
    places = torch.where(ids == 0, len(adapters), last - ids)  # the first adapter by its second copy
    judge_rows(trial, route(trial, layer, turned, trial.x, places), trial.x, ids)


@claim("A batch of no row and a batch of one are batches.")
def empty_and_single_row(trial: Trial) -> None:
    layer, pool = served(trial)
    for rows in (0, 1):
        x, ids = trial.x[:rows], trial.ids[:rows].clamp(min=0)
        y = route(trial, layer, pool, x.clone(), ids.clone())
        trial.require_shape("y", y, (rows, trial.case.d_out))
        if rows:
            judge_rows(trial, y, x, ids)


def served(trial: Trial) -> tuple[Layer, Any]:
    """A layer that serves, with an adapter of its own that no row is to see, and the pool of the case's adapters."""
    for spec, _ in trial.adapters:
        trial.must_support(spec)
    layer = trial.layer()
    if isinstance(layer, nn.Module):
        trial.train(layer, False)
    return layer, trial.ask("pool", layer, trial.adapters)


def route(trial: Trial, layer: Layer, pool: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The layer's output for a batch whose row i goes through adapter ids[i]."""
    plan = ids.clone() if trial.subject.plan is None else trial.ask("plan", ids.clone(), x.device)
    return trial.tensor_of("the output", trial.ask("route", layer, pool, x.clone(), plan)).detach().clone()


def judge_rows(trial: Trial, y: Tensor, x: Tensor, ids: Tensor) -> None:
    """Fail unless each row of y is the definition's with its own adapter; x is (n, d_in) or (n, tokens, d_in)."""
    if x.ndim == 3:
        trial.require_shape("y", y, (*x.shape[:2], trial.case.d_out))
        x, y, ids = x.flatten(0, 1), y.flatten(0, 1), ids.repeat_interleave(x.shape[1])
    weight, bias = trial.terms.weight, trial.terms.bias
    adapters = [(factors, spec.scaling) for spec, factors in trial.adapters]
    wanted = definition.routed(x, weight, bias, adapters, ids)
    allowed = allowed_rows(trial, x, ids)
    trial.near("y", y, wanted, allowed, of=trial.asked._replace(x=x, ids=ids))
    adapted = ids >= 0
    if adapted.any():
        trial.visible((wanted - definition.base(x, weight, bias))[adapted], allowed[adapted])


def allowed_rows(trial: Trial, x: Tensor, ids: Tensor) -> Tensor:
    """How far each row may stray: by the bound of its own adapter, or of the base."""
    _, weight, bias, none, _ = trial.bare_terms
    adapters = {-1: (none, 0.0)} | {i: (factors, spec.scaling) for i, (spec, factors) in enumerate(trial.adapters)}
    rows = [
        bounds.separate(row[None], weight, bias, *adapters[int(index)], trial.arithmetic)
        for row, index in zip(x, ids, strict=True)
    ]
    return torch.cat(rows)
