"""`Check`: one claim about LoRA, and the function that puts it to the proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from lora_bench.case import Case, cases
from lora_bench.subject import KNOWN, VERBS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from lora_bench.conformance.trial import Trial

ANY = cases()
WIDE = st.sampled_from(["fp64", "fp32"])
"""The dtypes for claims that the rounding of 16 bits would hide."""


@dataclass(frozen=True, eq=False)
class Check:
    """A claim in one sentence, judged by `run` over the cases that the strategy `cases` draws.

    `run` returns when the claim holds in its trial, and raises `Fails`, `Inconclusive` or `NotOffered` otherwise.
    `needs` are the verbs without which a subject is not asked. `after` is the id of a check of which a failure would
    show here again: where it fails, this one is blocked. `bases` are the kinds of base layer the claim is about; it
    must hold for each of them that the subject accepts.

    Raises ValueError for an unknown verb or kind.
    """

    id: str
    claim: str
    run: Callable[[Trial], None]
    _: KW_ONLY
    cases: SearchStrategy[Case]
    needs: tuple[str, ...] = ()
    after: str | None = None
    bases: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        for field, given, known in (("needs", self.needs, VERBS), ("bases", self.bases, KNOWN["layers"])):
            if unknown := set(given) - set(known):
                raise ValueError(f"{self.id}: {field} must be among {', '.join(known)}, got {', '.join(unknown)}")

    def __str__(self) -> str:
        return self.id


def check(
    claim: str,
    *,
    cases: SearchStrategy[Case] = ANY,
    needs: tuple[str, ...] = (),
    after: str | None = None,
    bases: tuple[str, ...] = ("linear",),
) -> Callable[[Callable[[Trial], None]], Check]:
    """Make a `Check` of a function; its id is `theme.claim`, by the names of the module and of the function."""

    def made(run: Callable[[Trial], None]) -> Check:
        theme = run.__module__.rpartition(".")[2]
        return Check(f"{theme}.{run.__name__}", claim, run, cases=cases, needs=needs, after=after, bases=bases)

    return made
