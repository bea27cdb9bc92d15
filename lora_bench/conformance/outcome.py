"""How a check ends other than by returning, and whose fault an exception is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from lora_bench.bounds import Deviation


class Outcome(Exception):
    """Raised by a check to say what it found."""


class Fails(Outcome):
    """The claim does not hold: `deviation` of the tensor of that name says where, or `because` says why."""

    def __init__(self, because: str = "", *, tensor: str = "", deviation: Deviation | None = None) -> None:
        super().__init__(because)
        self.because = because
        self.tensor = tensor
        self.deviation = deviation


class Raised(Fails):
    """The subject raised an exception where an answer was wanted."""


class Inconclusive(Outcome):
    """This case cannot tell: what the claim is about is no larger than the rounding it may hide in."""


class NotOffered(Outcome):
    """The subject says that it does not do this."""


class blaming:  # noqa: N801 - a context manager, read as a verb
    """Whatever exception leaves this block was raised by the subject's `verb`, and becomes `Raised`."""

    def __init__(self, verb: str) -> None:
        self.verb = verb

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, Outcome):
            raise Raised(f"{self.verb} raised {type(error).__name__}: {error}") from error
