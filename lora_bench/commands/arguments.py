"""What the verbs share: their exit codes, and options read with care."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001  # the type has no other name

FINE, FAILED, USAGE, INCONCLUSIVE, LOST, INTERRUPTED = 0, 1, 2, 6, 7, 130
"""0 fine, 1 a check failed, 2 usage, 6 inconclusive or nothing was judged, 7 the device was lost, 130 Ctrl-C."""


def output_option(verb: argparse.ArgumentParser) -> None:
    """Declare --lora-output."""
    verb.add_argument("--lora-output", default=".lora_bench", metavar="FOLDER", help="for what is kept (.lora_bench)")


def writable(folder: str) -> Path:
    """The folder, made and tried; ValueError where nothing can be written into it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tried = path / f".writable-{os.getpid()}"  # another process may be trying too
        tried.touch()
        tried.unlink()
    except OSError as error:
        raise ValueError(
            f"--lora-output: wanted a folder that can be written, got {folder}: {error.strerror}"
        ) from None
    return path


def kept(path: Path, text: str) -> bool:
    """Put a text in a file's place, whole or not at all; whether it is there, and if it is not, standard error says so.

    What it tells was printed as well: that it cannot be kept is no reason to end.
    """
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        not_kept(path, error)
        return False
    return True


def not_kept(path: Path, error: OSError) -> None:
    """Tell that a file could not be written."""
    print(f"lora-bench: {path} could not be written: {error.strerror}", file=sys.stderr)


def at_least(least: int, number: type[int | float]) -> Callable[[str], float]:
    """An option's type: a finite number that is not smaller."""

    def read(text: str) -> float:
        value = number(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        return value

    read.__name__ = number.__name__  # argparse names it where the text is no number
    return read
