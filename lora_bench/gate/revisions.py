"""A git revision of a project, built and installed into a folder of its own, which is kept for the next time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from contextlib import contextmanager
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_bench.gate.inside import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAKING = ".making-"
LAST_LINES = 6
OF_ANOTHER_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX"}
OF_ANOTHER_REPOSITORY |= {"GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_NAMESPACE"}
"""What git sets for its hooks: there it would have every command work on the repository of the hook."""


class Revision(NamedTuple):
    """A commit of a project: what to call it, its hash, the repository's top folder, the project's folder in it."""

    name: str
    sha: str
    top: Path
    inner: str


def resolve(revision: str, repository: Path) -> Revision:
    """The commit that `revision` names in `repository`, which may be a folder inside of one.

    A revision is what is committed: where it is the commit that is checked out and files were changed since, the name
    says that the changes are not in it.

    Raises ValueError for what is no repository, no revision of it, or no project that pip can install.
    """
    if shutil.which("git") is None:
        raise ValueError("a revision needs git, which is not installed")
    if not repository.is_dir() or (top := _told(repository, "rev-parse", "--show-toplevel")) is None:
        raise ValueError(f"{repository} is no git repository with a working tree")
    sha = None
    if not revision.startswith("-"):
        sha = _told(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if sha is None:
        shallow = _told(repository, "rev-parse", "--is-shallow-repository") == "true"
        hint = ", which is a shallow clone: git fetch --unshallow brings the rest" if shallow else ""
        raise ValueError(f"{revision!r} is no commit, branch or tag of {top}{hint}")
    inner = _told(repository, "rev-parse", "--show-prefix") or ""
    if not any(_holds(Path(top), sha, f"{inner}{name}") for name in ("pyproject.toml", "setup.py")):
        raise ValueError(f"{revision} holds no {inner}pyproject.toml or {inner}setup.py: pip cannot install it")
    return Revision(_name(revision, sha, Path(top)), sha, Path(top), inner)


def _name(revision: str, sha: str, top: Path) -> str:
    short = sha[:7]
    if _told(top, "rev-parse", "HEAD") == sha and _told(top, "status", "--porcelain", "--untracked-files=no"):
        short += ", without uncommitted changes"
    return short if short == sha[:7] and sha.startswith(revision) else f"{revision[:40]} ({short})"


def installed(revision: Revision, cache: Path, python: Sequence[str], environment: Mapping[str, str]) -> Path:
    """The folder that holds the revision and nothing else, to be put first on the path of this Python.

    It is made once for each commit, Python and torch, under another name until it is whole; whoever comes meanwhile
    waits. One that was changed afterwards is made anew. Nothing is downloaded: neither what the project needs, which
    is the present environment's, nor what builds it, which must be installed here; so both sides of a comparison share
    all but themselves.

    Raises ValueError with pip's last lines where that does not work.
    """
    if not any(distributions(name="pip")):
        raise ValueError(f"a revision needs pip, which {python[0]} lacks: {python[0]} -m ensurepip")
    place = cache.resolve() / f"{revision.sha}-{sys.implementation.cache_tag}-torch{version('torch')}"
    with _locked(place.parent):
        if not _whole(place):
            making = Path(tempfile.mkdtemp(prefix=MAKING, dir=place.parent))
            try:
                _install(revision, making, python, environment)
                shutil.rmtree(place, ignore_errors=True)
                making.rename(place)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return place / "installed"


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Alone in the cache, and without what an earlier process had to leave there; a process's end opens the lock."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _whole(place: Path) -> bool:
    try:
        return (place / "digest").read_text() == digest(place / "installed")
    except OSError:
        return False


def _install(revision: Revision, making: Path, python: Sequence[str], environment: Mapping[str, str]) -> None:
    source, target = making / "source", making / "installed"
    _check_out(revision, source)
    project = source / revision.inner
    install = [*python, "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    install += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target), str(project)]
    done = subprocess.run(install, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode or not target.is_dir():
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        said = "\n  ".join(lines[-LAST_LINES:])
        raise ValueError(f"{revision.name} cannot be built here{_builders(project)}; pip's last lines:\n  {said}")
    shutil.rmtree(source)
    (making / "digest").write_text(digest(target) or "")


def _check_out(revision: Revision, source: Path) -> None:
    """The revision's files, as a clone that borrows the repository's objects.

    Of the ways there are this one leaves no trace in the repository, where a worktree is registered; and unlike an
    archive it is still a repository, from which build backends read version and file list. No hook is run.
    """
    clone = ["clone", "--quiet", "--shared", "--no-checkout", str(revision.top), str(source)]
    check_out = ["-C", str(source), "checkout", "--quiet", "--detach", revision.sha]
    for arguments in (clone, check_out):
        done = _git("-c", f"core.hooksPath={os.devnull}", *arguments)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise ValueError(f"git could not check out {revision.name}: {said}")


def _builders(project: Path) -> str:
    """What the project asks for to be built with."""
    try:
        wanted = tomllib.loads((project / "pyproject.toml").read_text())["build-system"]["requires"]
    except (OSError, ValueError, KeyError):
        wanted = ["setuptools"]
    return f" (what builds it must be installed, it asks for {', '.join(wanted)})"


def file_in(revision: Revision, file: Path, cache: Path) -> Path:
    """The file as the revision has it, written into the cache; one that it has not, as it stands.

    Raises ValueError where there is none at all.
    """
    file = file.resolve()
    inside = file.is_relative_to(revision.top.resolve())
    name = file.relative_to(revision.top.resolve()).as_posix() if inside else ""
    if not inside or not _holds(revision.top, revision.sha, name):
        if not file.is_file():
            raise ValueError(f"there is no file {file}, neither here nor in {revision.name}")
        return file
    place = files_of(revision, cache) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as written:
        written.write(_git("-C", str(revision.top), "show", f"{revision.sha}:{name}").stdout)
    return Path(written.name).replace(place)


def files_of(revision: Revision, cache: Path) -> Path:
    """The folder for the single files of a revision."""
    return cache.resolve() / "files" / revision.sha


def _holds(top: Path, sha: str, name: str) -> bool:
    return _told(top, "cat-file", "-e", f"{sha}:{name}") is not None


def _told(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where it refuses; the index is not even refreshed."""
    done = _git("--no-optional-locks", "-C", str(folder), *arguments)
    return None if done.returncode else done.stdout.decode(errors="replace").strip()


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_REPOSITORY}
    return subprocess.run(
        ("git", *arguments), env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
