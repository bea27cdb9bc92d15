"""Finding a subject by text: a shipped name, an installed entry point, `module:attr` or `path.py:ATTR`.

Each implementation that ships with the package has a file of its own here, imported only when it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

GROUP = "lora_bench.subjects"


class Shipped(NamedTuple):
    """Where a shipped subject lives, the package that it drives, and what pip installs for it."""

    home: str
    package: str | None = None
    install: str = ""


SHIPPED = {
    "reference": Shipped("lora_bench.reference:REFERENCE"),
    "peft": Shipped("lora_bench.subjects.peft:PEFT", "peft", "peft"),
    "peft-model": Shipped("lora_bench.subjects.peft_model:PEFT_MODEL", "peft", "peft"),
    "peft-gaussian": Shipped("lora_bench.subjects.peft_inits:GAUSSIAN", "peft", "peft"),
    "peft-random": Shipped("lora_bench.subjects.peft_inits:RANDOM", "peft", "peft"),
    "peft-orthogonal": Shipped("lora_bench.subjects.peft_inits:ORTHOGONAL", "peft", "peft"),
    "peft-pissa": Shipped("lora_bench.subjects.peft_inits:PISSA", "peft", "peft"),
    "peft-pissa-niter-4": Shipped("lora_bench.subjects.peft_inits:PISSA_NITER_4", "peft", "peft"),
    "peft-olora": Shipped("lora_bench.subjects.peft_inits:OLORA", "peft", "peft"),
    "peft-eva": Shipped("lora_bench.subjects.peft_inits:EVA", "peft", "peft"),
    "peft-corda": Shipped("lora_bench.subjects.peft_inits:CORDA", "attr", "peft attrs"),
    "peft-lora-ga": Shipped("lora_bench.subjects.peft_inits:LORA_GA", "peft", "peft"),
    "loralib": Shipped("lora_bench.subjects.loralib:LORALIB", "loralib", "lora-bench[loralib]"),
    "lora-pytorch": Shipped(
        "lora_bench.subjects.lora_pytorch:LORA_PYTORCH", "lora_pytorch", "lora-bench[lora-pytorch]"
    ),
    "lycoris": Shipped("lora_bench.subjects.lycoris:LYCORIS", "lycoris", "lora-bench[lycoris]"),
    "lycoris-bypass": Shipped("lora_bench.subjects.lycoris:BYPASS", "lycoris", "lora-bench[lycoris]"),
    "diffusers": Shipped("lora_bench.subjects.diffusers:DIFFUSERS", "diffusers", "lora-bench[diffusers]"),
}


def shipped() -> tuple[str, ...]:
    """The names of the subjects that ship with the package."""
    return tuple(SHIPPED)


def missing(name: str) -> str | None:
    """Why a shipped subject cannot be used here, with what to install, or None; imports nothing.

    Raises ValueError for a name that is not shipped.
    """
    if name not in SHIPPED:
        raise ValueError(f"no shipped subject is called {name!r}: they are {', '.join(SHIPPED)}")
    package = SHIPPED[name].package
    if package is None or find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install {SHIPPED[name].install}"


def find(text: str) -> Subject:
    """The subject that `text` names: a shipped name, an entry point, `module:attr` or `path.py:ATTR`.

    Raises ValueError, in one sentence, for a text that names none, whatever went wrong.
    """
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    if text in SHIPPED:
        if (reason := missing(text)) is not None:
            raise ValueError(reason)
        home = SHIPPED[text].home
    elif text in installed:
        home = installed[text]
    elif ":" in text:
        home = text
    else:
        raise ValueError(_unknown(text, [*SHIPPED, *installed]))
    source, _, attribute = home.rpartition(":")
    module = _load(text, source)
    if not hasattr(module, attribute):
        there = ", ".join(name for name, value in vars(module).items() if isinstance(value, Subject))
        raise ValueError(f"{text!r}: {source} has no {attribute!r}; its subjects are {there or 'none'}")
    subject = getattr(module, attribute)
    if not isinstance(subject, Subject):
        found = type(subject).__name__
        raise ValueError(f"{text!r}: wanted a lora_bench.Subject, got a {found}")  # noqa: TRY004  # the text is wrong
    return subject


NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
    "torch.utils._pytree": "%s is an Enum subclass",
    "torchao": "Failed to load",
    "torchao.kernel.intmm": "Warning: Detected no triton",
}
"""By logger, how a notice begins that is of no use here: mostly that an optional kernel is not installed."""


@contextmanager
def quiet_import() -> Iterator[None]:
    """Imports inside do not print the `NOTICES`; those of torchao come with peft too, where it is installed."""
    with ExitStack() as stack:
        for name, beginning in NOTICES.items():
            logger, wanted = logging.getLogger(name), partial(_other_than, beginning)
            logger.addFilter(wanted)
            stack.callback(logger.removeFilter, wanted)
        yield


def _other_than(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)


def _unknown(text: str, known: list[str]) -> str:
    near = difflib.get_close_matches(text.lower(), known, n=1)
    if text.endswith(".py"):
        hint = f"which subject of the file? write {text}:NAME"
    else:
        hint = f"known are {', '.join(known)}{f' (nearest: {near[0]})' if near else ''}"
    return f"no subject is called {text!r}: {hint}; or give module:attr or path.py:ATTR"


def _load(text: str, source: str) -> ModuleType:
    """The module that `source` names, by its dotted name or the path of its file."""
    try:
        return _load_file(Path(source)) if source.endswith(".py") else import_module(source)
    except FileNotFoundError as error:
        raise ValueError(f"{text!r}: {error}") from None
    except Exception as error:  # a stranger's file may raise anything
        raise ValueError(f"{text!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """A file as a module, once; its name is made of its path, and a file that fails leaves no module behind."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path = path.resolve()
    name = f"lora_bench_subject_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
