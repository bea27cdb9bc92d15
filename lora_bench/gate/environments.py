"""The sides of a comparison: a subject in this environment, in another one, or in this one with a git revision."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lora_bench import subjects
from lora_bench.gate import inside, revisions

TORCH = (2, 11)
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "psutil": "psutil",
    "pynvml": "nvidia-ml-py",
    "safetensors": "safetensors",
}
"""The modules that a worker needs, and what pip installs for each."""
TOLD = {
    "module": (str, type(None)),
    "library": (str, type(None)),
    "build": (str,),
    "missing": (list,),
    **dict.fromkeys(("packages", "content", "elsewhere"), (dict,)),
}
"""What an interpreter tells of itself beside its version, and of which types."""
SECONDS = 120.0
"""How long an interpreter may take to say what it holds."""


class Side(NamedTuple):
    """One side of a comparison: a subject, and the interpreter and import path that it runs with."""

    name: str
    """What a report calls it: "peft 0.18.1", "main (3f2a91c)", "reference"."""
    subject: str
    """What `lora_bench.subjects.find` is given in the worker."""
    python: str
    """The absolute path of the interpreter."""
    path: tuple[str, ...]
    """Folders that come before all others on its import path."""
    own: tuple[str, ...] = ()
    """Of a git revision, the folders with its files: what is measured must be imported from one of them."""


def here(subject: str) -> Side:
    """The side that runs with this interpreter, and imports what this process would import."""
    standard = sysconfig.get_path("stdlib")
    first = takewhile(lambda entry: entry != standard, sys.path)
    path = dict.fromkeys(str(Path(entry).absolute()) for entry in first if Path(entry).is_dir())
    return Side(subject, _absolute(subject), _present(), tuple(path))


def of_python(python: str, subject: str, *, lent: Path) -> Side:
    """The side that runs with another environment's interpreter, under the name of the library that it has.

    lora-bench need not be installed there: `lent`, a folder kept for that, will hold a link to this one's package and
    nothing else, so that nothing else of this environment is imported there.

    Raises ValueError where the interpreter does not run, is too old, or lacks a part; nothing is imported there yet.
    """
    found = shutil.which(Path(python).expanduser())
    if found is None:
        inner = Path(python, "bin", "python")
        raise ValueError(f"there is no interpreter {python}{f': try {inner}' if inner.exists() else ''}")
    side = Side(subject, _absolute(subject), str(Path(found).absolute()), (str(_lend(lent)),))
    told = _ask(side)
    wanted = {name: pip for name, pip in NEEDED.items() if name in told["missing"]}
    if wanted:
        install = f"{side.python} -m pip install {' '.join(wanted.values())}"
        raise ValueError(f"{side.python} has no {', '.join(wanted)}: {install}")
    torch = str(told["packages"].get("torch", "0"))
    if tuple(int(part) for part in re.findall("[0-9]+", torch)[:2]) < TORCH:
        raise ValueError(f"{side.python} has torch {torch}, wanted {'.'.join(map(str, TORCH))} or newer")
    return side if told["module"] == "lora_bench" else side._replace(name=told["library"] or subject)


def of_revision(revision: str, subject: str, *, repository: Path, cache: Path) -> Side:
    """The side that runs with this interpreter and a git revision of the project in `repository`, kept in `cache`.

    All but the project is the present environment's. A revision of lora-bench itself is measured by itself. A subject
    `path.py:ATTR` whose file the revision holds is taken from it. Whether the subject imports anything of the revision
    is seen when it is built: a worker refuses the task where it does not.

    Raises ValueError where the revision is not there, cannot be built, or would not be what is imported.
    """
    commit, present = revisions.resolve(revision, repository), here(subject)
    source, colon, attribute = subject.rpartition(":")
    if source.endswith(".py"):
        subject = f"{revisions.file_in(commit, Path(source), cache)}{colon}{attribute}"
    overlay = revisions.installed(commit, cache, *command(present))
    own = str(overlay), str(revisions.files_of(commit, cache))
    side = Side(commit.name, subject, present.python, (str(overlay), *present.path), own)
    for module, place in _ask(side)["elsewhere"].items():
        raise ValueError(
            f"{module} would be imported from {place or 'nowhere'}, and not from {commit.name} as installed"
        )
    return side


def command(side: Side) -> tuple[list[str], dict[str, str]]:
    """What starts the side's Python, to be followed by its arguments, and all of the environment that it gets.

    The caller's PYTHONPATH and the current folder are on its path only if `side.path` has them, and in another
    environment the user's own packages are not. It writes no bytecode: the package that it is lent is not its own.
    """
    taken = ("PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(side.path)}
    if side.python != _present():
        environment["PYTHONNOUSERSITE"] = "1"
    return [side.python], environment


def describe(side: Side) -> dict[str, Any]:
    """What the side consists of: two sides with equal descriptions and subjects are the same.

    "python" and "build" are its Python's, "library" is the distribution under test with its version (None where the
    subject belongs to none), "packages" are the versions of all that is installed, by name, and "content" has digests
    of the code under test and of lora_bench, by module.

    Raises ValueError where the interpreter does not answer, or the subject is not there.
    """
    told = _ask(side)
    return {name: told[name] for name in ("python", "build", "library", "packages", "content")}


def same(base: Side, head: Side) -> bool:
    """Whether the sides differ in nothing that could matter, so that whatever is measured between them is noise."""
    subjects_of = [Path(side.subject).name for side in (base, head)]
    return subjects_of[0] == subjects_of[1] and describe(base) == describe(head)


def _present() -> str:
    """This interpreter; its links are not followed, since in a virtual environment it is one."""
    return str(Path(sys.executable).absolute())


def _absolute(subject: str) -> str:
    """A subject in a file by its full path: a worker may start in another folder."""
    source, colon, attribute = subject.rpartition(":")
    return f"{Path(source).absolute()}{colon}{attribute}" if source.endswith(".py") else subject


def _lend(lent: Path) -> Path:
    """The folder with a link to our package, or with a copy where links cannot be made."""
    package, lent = Path(__file__).resolve().parents[1], lent.resolve()
    lent.mkdir(parents=True, exist_ok=True)
    link = lent / package.name
    if link.is_symlink() and link.resolve() == package:
        return lent
    with tempfile.TemporaryDirectory(dir=lent.parent) as folder:
        new = Path(folder, package.name)
        try:
            new.symlink_to(package, target_is_directory=True)
        except OSError:
            shutil.copytree(package, new, ignore=shutil.ignore_patterns("__pycache__"))
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        elif not new.is_symlink():
            link.unlink(missing_ok=True)
        new.replace(link)  # at once, where both are links: another run may be importing through the old one
    return lent


def _ask(side: Side) -> dict[str, Any]:
    """What `inside.facts` says in the side's interpreter."""
    python, environment = command(side)
    question = {"subject": _home(side.subject), "needed": list(NEEDED), "path": list(side.path)}
    try:
        done = subprocess.run(
            [*python, inside.__file__, json.dumps(question)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # whatever it is, it may say anything
            check=False,
            timeout=SECONDS,
        )
        told: dict[str, Any] = json.loads((done.stdout.strip().splitlines() or [""])[-1])
        given = tuple(int(part) for part in told["python"].split(".")[:2])
        understood = given < inside.OLDEST or all(type(told[name]) in kinds for name, kinds in TOLD.items())
    except OSError as error:
        raise ValueError(f"{side.python} does not run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{side.python} does not answer within {SECONDS:g} s") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        understood = False
    if not understood:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(f"{side.python} does not answer as Python does: it says {said}")
    if given < inside.OLDEST:
        raise ValueError(f"{side.python} is Python {told['python']}, wanted 3.11 or newer")
    _must_have(side, told)
    return told


def _must_have(side: Side, told: dict[str, Any]) -> None:
    """Raise ValueError where the subject, or its library, is not there."""
    module = told["module"]
    if module is None:
        raise ValueError(f"no subject is called {side.subject!r} in {side.python}; or give module:attr or path.py:ATTR")
    if told["content"].get(Path(module).name) is None:
        if module.endswith(".py"):
            raise ValueError(f"there is no file {module}")
        install = f": {side.python} -m pip install {module}" if side.subject in subjects.SHIPPED else ""
        raise ValueError(f"{side.python} has no {module}{install}")


def _home(subject: str) -> str:
    """The subject as `module:attr`; a shipped one as the library that it drives, and not as our file for it."""
    if subject not in subjects.SHIPPED:
        return subject
    module = subjects.SHIPPED[subject].home.rpartition(":")[0].removeprefix("lora_bench.subjects.")
    libraries = {shipped.package for shipped in subjects.SHIPPED.values() if shipped.package}
    return f"{next(filter(module.startswith, libraries), 'lora_bench')}:"
