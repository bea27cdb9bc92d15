"""`Subject`: the record that an implementer fills in, so that the suites can judge and measure an implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from lora_bench.spec import Factors, LoraSpec

Layer = Any
"""Whatever a subject's `wrap` returns: callable on x (..., d_in), giving (..., d_out); a torch module in models."""


@dataclass(frozen=True)
class Subject:
    """An implementation of LoRA under test, as functions over one layer.

    `wrap` takes ownership of the base layer (it may alias it, and `merge` may write into it) and returns a layer ready
    to train: only A and B require gradients. `load` copies factors in. Every other verb is optional; one left as None
    is reported as "not offered".

    Raises ValueError for an empty name or layer kind, TypeError for a verb that cannot be called.
    """

    name: str
    wrap: Callable[[Layer, LoraSpec], Layer]
    load: Callable[[Layer, Factors], None]
    _: KW_ONLY
    factors: Callable[[Layer], Factors] | None = None
    """The live parameters (not copies), so that their gradients can be read."""
    merge: Callable[[Layer], Layer | None] | None = None
    """The merged callable: the layer itself (or None, meaning the same), a copy, or a loaded export."""
    unmerge: Callable[[Layer], None] | None = None
    merge_and_unload: Callable[[Layer], Layer] | None = None
    """What one deploys: a layer with the merged weight and nothing of the adapter left."""
    enable: Callable[[Layer, bool], None] | None = None
    """Switch the adapter on or off."""
    weight: Callable[[Layer], Any] | None = None
    """The weight that the base path multiplies by now, dequantised: (d_out, d_in)."""
    state: Callable[[Layer], dict[str, Any]] | None = None
    """The adapter's own state: A and B under the implementation's names."""
    pool: Callable[[Layer, Sequence[tuple[LoraSpec, Factors]]], Any] | None = None
    """Several adapters of one layer made ready; timed apart from the step."""
    plan: Callable[[Any, Any], Any] | None = None
    """plan(ids, device) -> what one forward derives from its ids (n,) int64 on the CPU, -1 = no adapter, and shares
    among its layers; left as None, `route` gets the ids."""
    route: Callable[[Layer, Any, Any, Any], Any] | None = None
    """route(layer, pool, x, plan) -> y with one id for each leading index of x: (n, d_in) or (n, tokens, d_in)."""
    supports: Callable[[LoraSpec], str | None] = lambda _spec: None
    """None, or why a spec is not offered."""
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    layers: tuple[str, ...] = ("linear",)
    """Kinds of base layer that `wrap` accepts: "linear" (nn.Linear), "nf4" (ours), "linear4bit" (bitsandbytes')."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a subject needs a name, got ''")
        for verb in VERBS:
            value = getattr(self, verb)
            if not callable(value) and (value is not None or verb in ("wrap", "load", "supports")):
                raise TypeError(f"{self.name}: {verb} must be a function, got {value!r}")
        for field in ("dtypes", "devices", "layers"):
            values, known = getattr(self, field), KNOWN[field]
            if not isinstance(values, tuple) or not values or not set(values) <= set(known):
                raise ValueError(f"{self.name}: {field} must be a tuple of {', '.join(known)}, got {values!r}")

    def __str__(self) -> str:
        return self.name

    def offers(self, *verbs: str) -> bool:
        """Whether every one of `verbs` is there."""
        return all(getattr(self, verb) is not None for verb in verbs)


KNOWN = {
    "dtypes": ("fp64", "fp32", "bf16", "fp16"),
    "devices": ("cpu", "cuda"),
    "layers": ("linear", "nf4", "linear4bit"),
}
VERBS = tuple(field.name for field in fields(Subject) if field.name not in ("name", *KNOWN))
