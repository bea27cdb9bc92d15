"""What an environment holds, told from inside: its Python runs this file, which needs the standard library alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

OLDEST = (3, 11)


def facts(subject: str, needed: list[str], path: list[str]) -> dict[str, Any]:
    """What could matter to a comparison: versions of all that is installed, and digests of what is under test.

    `subject` is an entry point of this environment, `module:attr` or `path.py:ATTR`; its module is None where it is
    none of them. `missing` are the modules among `needed` that are not there. `content` has, by module, a digest of
    the subject's own, of lora_bench, and of all that was installed into a folder of `path`; `elsewhere` are those of
    the latter that Python would take from another place.
    """
    packages: dict[str, str] = {}
    for installed in importlib.metadata.distributions():
        told = installed.metadata  # parsed anew whenever it is asked for
        if name := told["Name"]:
            packages.setdefault(_plain(name), told["Version"])
    source = source_of(subject)
    is_file = source is not None and source.endswith(".py")
    module = source if source is None or is_file else source.partition(".")[0]
    content = {"lora_bench": digest(*places("lora_bench"))}
    elsewhere = {}
    for name, folder in put_first(path).items():
        found = places(name)
        content[name] = digest(*found)
        if not any(place.is_relative_to(folder) for place in found):
            elsewhere[name] = ", ".join(map(str, found))
    if module is not None:
        content[Path(module).name] = digest(*(filter(Path.is_file, [Path(module)]) if is_file else places(module)))
    return {
        "python": platform.python_version(),
        "build": ", ".join((*platform.python_build(), platform.python_compiler())),
        "packages": dict(sorted(packages.items())),
        "module": module,
        "library": None if module is None or is_file else library(module, packages),
        "content": content,
        "elsewhere": elsewhere,
        "missing": [name for name in needed if not places(name)],
    }


def source_of(subject: str) -> str | None:
    """The dotted module or the file that a subject is in."""
    for point in importlib.metadata.entry_points(group="lora_bench.subjects"):
        if point.name == subject:
            return point.module
    return subject.rpartition(":")[0] or None


def places(module: str) -> list[Path]:
    """Where Python would find a module, which is not imported: its folder, its file, or nowhere."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder).resolve() for folder in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


def put_first(path: list[str]) -> dict[str, Path]:
    """The modules that were installed into the folders of a path, and into which."""
    found: dict[str, Path] = {}
    for folder in path:
        for installed in importlib.metadata.distributions(path=[folder]):
            if installed.read_text("RECORD") is None:
                continue  # a checkout that was built in place: nothing was installed into it
            tops = {file.parts[0] for file in installed.files or ()}
            names = {inspect.getmodulename(top) or top for top in tops}
            for name in sorted(filter(str.isidentifier, names - {"__pycache__", "bin"})):
                found.setdefault(name, Path(folder).resolve())
    return found


def library(module: str, packages: dict[str, str]) -> str | None:
    """The distribution that brings a module, with its version: the one of its name, or else by all lists of files."""
    name = _plain(module)
    if name not in packages:
        name = next((_plain(name) for name in importlib.metadata.packages_distributions().get(module, ())), "")
    return f"{name} {packages[name]}" if name else None


def _plain(name: str) -> str:
    """A distribution's name, in the one spelling of all that pip takes for the same."""
    return re.sub("[-_.]+", "-", name).lower()


def digest(*found: Path) -> str | None:
    """Of the names and contents of these files and folders, without what Python compiles; None of none."""
    if not found:
        return None
    total = hashlib.sha256()
    for place in found:
        files = sorted(file for file in place.rglob("*") if file.suffix != ".pyc") if place.is_dir() else [place]
        for file in files:
            if file.is_file():
                total.update(f"{file.relative_to(place)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        answer: dict[str, Any] = {"python": platform.python_version()}
    else:
        answer = facts(**json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(answer))
