"""The reference layer after any sequence of its verbs, and after what it refuses."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.case import Case, Problem, cases
from lora_bench.reference import LoraLinear
from lora_bench.reference.several import activate, add, combine, delete
from lora_bench.spec import Factors, LoraSpec
from tests.expected import exactly
from tests.reference_layers import NAMES, made_several, obeys, pickled

chosen = st.lists(st.sampled_from(NAMES), unique=True, max_size=3)

factor = st.sampled_from([1.0, 0.5, -1.5, 3.0])

VERBS: dict[str, st.SearchStrategy[object]] = {
    "activate": chosen,
    "merge": st.none() | chosen,
    "merge at": factor,
    "unmerge": st.none(),
    "enable": st.booleans(),
    "scale": factor,
    "load": st.sampled_from([1.0, -2.0]),
    "mode": st.booleans(),
    "copy": st.sampled_from([copy.deepcopy, pickled]),
}

step = st.one_of([st.tuples(st.just(verb), arguments) for verb, arguments in VERBS.items()])


class State(NamedTuple):
    """What a layer should be after some verbs."""

    active: list[str]
    enabled: bool
    scale: float
    loaded: float  # what the own adapter's B is times
    merged: dict[str, float]

    def weighing(self, names: dict[str, float]) -> dict[str, float]:
        """The same with what was loaded last."""
        return {name: scale * self.loaded if name == "default" else scale for name, scale in names.items()}

    def merging(self, names: list[str], times: float) -> "State | None":
        together = self.merged | dict.fromkeys(names, times * self.scale)
        fits = self.enabled and set(names) <= set(self.active)
        return self._replace(merged=together) if fits and self.merged.items() <= together.items() else None

    def after(self, verb: str, value: Any) -> "State | None":
        """The state after a verb, or None where it is refused."""
        if self.merged and (verb in ("activate", "scale", "load") or (verb == "mode" and value)):
            return None
        match verb:
            case "activate":
                return self._replace(active=value)
            case "scale":
                return self._replace(scale=value)
            case "load":
                return self._replace(loaded=value)
            case "merge":
                return self.merging(self.active if value is None else value, 1.0)
            case "merge at":
                return self.merging(self.active, value)
            case "unmerge":
                return self._replace(merged={})
            case "enable":
                return self._replace(enabled=value, merged=self.merged if value else {})
        return self


def do(layer: LoraLinear, problem: Problem, verb: str, value: Any) -> LoraLinear:
    """The layer, or the copy of it, after a verb."""
    match verb:
        case "activate":
            activate(layer, value)
        case "merge at":
            layer.merge(factor=value)
        case "load":
            factors = problem.adapters[0][1]
            layer.load(Factors(factors.a, value * factors.b))
        case "mode":
            layer.train(value)
        case "copy":
            return cast("LoraLinear", value(layer))
        case "unmerge":
            layer.unmerge()
        case _:
            getattr(layer, verb)(value)
    return layer


@given(cases(adapters=st.just(3), gain=st.just(1.0)), st.lists(step, max_size=8))
def test_after_any_verbs_the_output_is_that_of_what_should_act(case: Case, steps: list[tuple[str, Any]]) -> None:
    layer, problem = made_several(case)
    state = State(["default"], enabled=True, scale=1.0, loaded=1.0, merged={})
    for verb, value in steps:
        wanted = state.after(verb, value)
        if wanted is None:
            with pytest.raises((RuntimeError, ValueError), match=r"merg"):
                do(layer, problem, verb, value)
        else:
            layer, state = do(layer, problem, verb, value), wanted
        beside = [name for name in state.active if state.enabled and name not in state.merged]
        assert layer.merged is bool(state.merged)
        assert obeys(layer, problem, state.weighing(dict.fromkeys(beside, state.scale)), state.weighing(state.merged))


def narrow(problem: Problem) -> Factors:
    factors = problem.adapters[0][1]
    return Factors(factors.a[:, 1:], factors.b)


def large(problem: Problem) -> Factors:
    factors = problem.adapters[0][1]
    return Factors(*(torch.full_like(own, 1e6, dtype=torch.float32) for own in (factors.a, factors.b)))


HOLDS = "torch.float16 cannot hold factor"
INFINITE = "the factor must be finite, got inf"
SHAPES = "factors must be a (2, 5) and b (4, 2) here, got a (2, 4) and b (4, 2)"
UNKNOWN = "no adapter is called 'x', there are default, b, c"

# What is asked of a layer with the adapters default, which acts, b and c; each is refused.
REFUSED: dict[str, tuple[Callable[[LoraLinear, Problem], object], str]] = {
    "a name that is taken": (
        lambda layer, problem: add(layer, "b", *problem.adapters[0]),
        "there is an adapter called 'b' already",
    ),
    "the own name": (
        lambda layer, problem: add(layer, "default", *problem.adapters[0]),
        "there is an adapter called 'default' already",
    ),
    "other shapes": (lambda layer, problem: add(layer, "new", problem.adapters[0][0], narrow(problem)), SHAPES),
    "too large": (
        lambda layer, problem: add(layer, "new", problem.adapters[0][0], large(problem)),
        f"{HOLDS} a: it has the value 1e+06",
    ),
    "dora": (
        lambda layer, problem: add(layer, "new", LoraSpec(2, 1.0, dora=True), problem.adapters[0][1]),
        "no DoRA as a further adapter",
    ),
    "one twice": (
        lambda layer, _: activate(layer, ["b", "b"]),
        "names must be a list of different adapters, got ['b', 'b']",
    ),
    "a word": (lambda layer, _: activate(layer, "b"), "names must be a list of different adapters, got 'b'"),
    "one unknown": (lambda layer, _: activate(layer, ["c", "x"]), UNKNOWN),
    "deleting what acts": (
        lambda layer, _: delete(layer, "default"),
        "activate others before deleting 'default', which is active",
    ),
    "deleting nothing": (lambda layer, _: delete(layer, "x"), UNKNOWN),
    "merging what does not act": (
        lambda layer, _: layer.merge(["default", "b"]),
        "only active adapters are merged (default), got 'b'",
    ),
    "merging infinitely": (lambda layer, _: layer.merge(factor=float("inf")), INFINITE),
    "scaling by nothing": (lambda layer, _: layer.scale(float("nan")), "the factor must be finite, got nan"),
    "combining nothing": (
        lambda layer, _: combine(layer, "new", {}, "cat"),
        "weights must name at least one adapter, got none",
    ),
    "combining unknown": (lambda layer, _: combine(layer, "new", {"x": 1.0}, "cat"), UNKNOWN),
    "combining into another": (
        lambda layer, _: combine(layer, "c", {"b": 1.0}, "cat"),
        "there is an adapter called 'c' already",
    ),
    "combining somehow": (
        lambda layer, _: combine(layer, "new", {"b": 1.0}, "ties"),
        "how must be one of cat, svd, linear, got 'ties'",
    ),
    "combining infinitely": (lambda layer, _: combine(layer, "new", {"b": float("inf")}, "cat"), INFINITE),
    "combining past the dtype": (
        lambda layer, _: combine(layer, "new", {"b": 1e6}, "cat"),
        f"{HOLDS} b: it has the value 2.51953e+06",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_changes_nothing(call: Callable[[LoraLinear, Problem], object], message: str) -> None:
    layer, problem = made_several(Case(adapters=3, dtype="fp16"))
    before = copy.deepcopy(layer)
    error = NotImplementedError if "DoRA" in message else ValueError
    with pytest.raises(error, match=exactly(message)):
        call(layer, problem)

    assert torch.equal(layer(problem.x), before(problem.x))
    assert layer.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in layer.state_dict().items())
    for one in ("active", "merged_at", "enabled", "factor"):
        assert getattr(layer, one) == getattr(before, one)
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in before.parameters()]
