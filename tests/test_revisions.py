"""A git revision as one side of a comparison: what is built, kept and imported; the repository is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_bench.gate import revisions
from lora_bench.gate.environments import Side, command, describe, of_revision, same
from lora_bench.gate.inside import digest

PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
PROJECT += '[project]\nname = "tiny-lora"\nversion = "1"\n[tool.setuptools]\npy-modules = ["tiny_lora"]\n'
SUBJECT = "tiny_lora:SUBJECT"


def git(folder: Path, *arguments: str) -> str:
    author = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    )
    done = subprocess.run(("git", *author, *arguments), cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path, **texts: str) -> str:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of three commits: tagged v1, one that changes what it does, one that changes its README."""
    folder = tmp_path_factory.mktemp("project")
    git(folder, "init", "--quiet")
    commit(folder, pyproject__toml=PROJECT, tiny_lora__py="VALUE = 1\n", harness__py="FROM = 1\n")
    git(folder, "tag", "v1")
    commit(folder, tiny_lora__py="VALUE = 2\n", harness__py="FROM = 2\n")
    commit(folder, README="more words")
    return folder


@pytest.fixture
def repository(project: Path, tmp_path: Path) -> Path:
    return shutil.copytree(project, tmp_path / "repository")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The revisions that were installed, by a stand-in for pip."""
    names: list[str] = []

    def install(revision: revisions.Revision, making: Path, *_: Any) -> None:
        names.append(revision.sha)
        (making / "installed").mkdir()
        (making / "installed" / "tiny_lora.py").write_text(git(revision.top, "show", f"{revision.sha}:tiny_lora.py"))
        (making / "installed" / "tiny_lora-1.dist-info").mkdir()
        (making / "installed" / "tiny_lora-1.dist-info" / "METADATA").write_text("Name: tiny-lora\nVersion: 1\n")
        (making / "installed" / "tiny_lora-1.dist-info" / "RECORD").write_text("tiny_lora.py,,\n")
        (making / "digest").write_text(digest(making / "installed") or "")

    monkeypatch.setattr(revisions, "_install", install)
    return names


def side_of(revision: str, repository: Path, subject: str = SUBJECT) -> Side:
    return of_revision(revision, subject, repository=repository, cache=repository.parent / "cache")


def output(side: Side, program: str) -> str:
    python, variables = command(side)
    done = subprocess.run([*python, "-c", program], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def trace(repository: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(file for file in repository.rglob("*") if file.is_file())
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_revision_is_built_and_imported_and_leaves_no_trace(repository: Path) -> None:
    os.utime(repository / "tiny_lora.py", (1, 1))  # git would note in its index that the file is still the same
    before = trace(repository)
    side, sha = side_of("v1", repository), revisions.resolve("main~2", repository).sha
    revisions.resolve("main", repository)

    assert side.name == f"v1 ({sha[:7]})"
    assert (
        output(side, "import tiny_lora; print(tiny_lora.__file__, tiny_lora.VALUE)") == f"{side.path[0]}/tiny_lora.py 1"
    )
    assert describe(side)["library"] == "tiny-lora 1"
    assert trace(repository) == before
    assert names_in(Path(side.path[0]).parent) == ["digest", "installed"]
    assert revisions._whole(Path(side.path[0]).parent)


def test_revisions_are_the_same_where_their_code_is(repository: Path, built: list[str]) -> None:
    first, second, third = (side_of(revision, repository) for revision in ("v1", "main~1", "main"))

    assert not same(first, second)
    assert same(second, third), "only the README was changed"


def test_what_cannot_be_built_says_why_and_leaves_nothing(repository: Path) -> None:
    commit(repository, pyproject__toml=PROJECT.replace("setuptools.build_meta", "no_such_builder"))

    with pytest.raises(ValueError, match=r"(?s)^HEAD \(.{7}\) cannot be built here \(.*setuptools\).*no_such_builder"):
        side_of("HEAD", repository)
    assert names_in(repository.parent / "cache") == [".lock"]


def test_a_revision_is_made_once(repository: Path, built: list[str]) -> None:
    sides = [side_of(revision, repository) for revision in ("v1", "v1", "HEAD", "main")]

    assert built == [git(repository, "rev-parse", revision) for revision in ("v1", "HEAD")]
    assert sides[0] == sides[1]


def test_what_was_changed_or_is_not_whole_is_made_anew(repository: Path, built: list[str]) -> None:
    installed = Path(side_of("v1", repository).path[0])
    (installed / "tiny_lora.py").write_text("VALUE = 3\n")
    half_made = repository.parent / "cache" / f"{revisions.MAKING}x"
    half_made.mkdir()
    side_of("v1", repository)

    assert len(built) == 2
    assert (installed / "tiny_lora.py").read_text() == "VALUE = 1"
    assert not half_made.exists()
    (installed.parent / "digest").unlink()
    side_of("v1", repository)
    assert len(built) == 3


def test_an_interrupted_build_leaves_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(revision: revisions.Revision, making: Path, *_: Any) -> None:
        (making / "installed").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(revisions, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        side_of("v1", repository)

    assert names_in(repository.parent / "cache") == [".lock"]


def test_who_comes_at_the_same_time_waits(repository: Path, built: list[str]) -> None:
    revision, cache = revisions.resolve("v1", repository), repository.parent / "cache"
    places: list[Path] = []
    threads = [
        threading.Thread(target=lambda: places.append(revisions.installed(revision, cache, ["python"], {})))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(built) == 1
    assert len(places) == 4
    assert len(set(places)) == 1


def test_names(repository: Path) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    (repository / "new.py").touch()

    assert revisions.resolve("HEAD", repository).name == f"HEAD ({sha[:7]})"
    assert revisions.resolve(sha, repository).name == sha[:7]
    (repository / "tiny_lora.py").write_text("VALUE = 4\n")
    assert revisions.resolve("main", repository).name == f"main ({sha[:7]}, without uncommitted changes)"
    assert "without" not in revisions.resolve("v1", repository).name


def test_a_hooks_variables_do_not_lead_elsewhere(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository.parent / "other").mkdir()
    git(repository.parent / "other", "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(repository.parent / "other" / ".git"))

    assert revisions.resolve("v1", repository).top == repository


def test_what_is_no_revision_is_refused(repository: Path, built: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(repository, "rm", "--quiet", "pyproject.toml")
    git(repository, "commit", "--quiet", "--message", "x")
    refused: Sequence[tuple[str, Path, str]] = [
        ("v2", repository, f"^'v2' is no commit, branch or tag of {repository}$"),
        (".", repository, "^'.' is no commit"),
        ("--all", repository, "^'--all' is no commit"),
        ("v1:tiny_lora.py", repository, "is no commit"),
        ("main", repository, "^main holds no pyproject.toml or setup.py: pip cannot install it"),
        ("v1", empty, f"^{empty} is no git repository"),
        ("v1", tmp_path / "nowhere", "nowhere is no git repository"),
    ]

    for revision, folder, said in refused:
        with pytest.raises(ValueError, match=said):
            side_of(revision, folder)
    assert not built


def test_a_shallow_clone_says_so(repository: Path) -> None:
    old = git(repository, "rev-parse", "v1")
    git(repository.parent, "clone", "--quiet", "--depth=1", f"file://{repository}", "shallow")

    with pytest.raises(ValueError, match="which is a shallow clone: git fetch --unshallow brings the rest"):
        side_of(old, repository.parent / "shallow")


@pytest.mark.parametrize("of", ["a linked worktree", "a shallow clone", "a branch of nobody"])
def test_commits_are_checked_out_of(repository: Path, tmp_path: Path, of: str) -> None:
    sha = git(repository, "rev-parse", "HEAD")
    if of == "a linked worktree":
        git(repository, "worktree", "add", "--quiet", "--detach", str(tmp_path / "there"))
    elif of == "a shallow clone":
        git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "there")
    else:
        git(repository, "reset", "--quiet", "--hard", "v1")
    there = repository if of == "a branch of nobody" else tmp_path / "there"
    revisions._check_out(revisions.resolve(sha, there), tmp_path / "source")

    assert (tmp_path / "source" / "tiny_lora.py").read_text() == "VALUE = 2\n"
    assert (tmp_path / "source" / ".git" / "objects" / "info" / "alternates").exists() == (of != "a shallow clone")


def test_a_subject_in_a_file_is_that_of_the_revision(
    repository: Path, built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "untracked.py").touch()
    (tmp_path / "outside.py").touch()
    monkeypatch.chdir(repository)
    old, new = (revisions.resolve(revision, repository) for revision in ("v1", "main"))

    def file(revision: revisions.Revision, name: str) -> Path:
        return revisions.file_in(revision, Path(name), tmp_path / "cache")

    side = side_of("v1", repository, "harness.py:SUBJECT")
    assert side.subject == f"{file(old, 'harness.py')}:SUBJECT"
    assert file(old, "harness.py").is_relative_to(revisions.files_of(old, tmp_path / "cache"))
    assert side.own == (side.path[0], str(revisions.files_of(old, repository.parent / "cache")))
    assert [file(revision, "harness.py").read_text() for revision in (old, new)] == ["FROM = 1\n", "FROM = 2\n"]
    assert file(old, "untracked.py") == repository / "untracked.py"
    assert file(old, "../outside.py") == tmp_path / "outside.py"
    with pytest.raises(ValueError, match=r"there is no file .*/gone.py, neither here nor in v1 \("):
        side_of("v1", repository, "gone.py:SUBJECT")
    assert len(built) == 1, "before anything is built"


def test_a_project_in_a_folder_of_the_repository(repository: Path) -> None:
    (repository / "inner").mkdir()
    git(repository, "mv", "pyproject.toml", "tiny_lora.py", "inner")
    commit(repository)

    assert revisions.resolve("HEAD", repository / "inner").inner == "inner/"
    with pytest.raises(ValueError, match=r"v1 holds no inner/pyproject.toml"):
        revisions.resolve("v1", repository / "inner")


def test_a_revision_that_would_not_be_imported_is_refused(
    repository: Path, built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = side_of("v1", repository)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "tiny_lora.py").touch()
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path / 'first')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert "tiny_lora" in output(side, "import tiny_lora; print(tiny_lora.__file__)")
    with pytest.raises(ValueError, match=r"tiny_lora would be imported from .*/first/tiny_lora.py, and not from v1"):
        side_of("v1", repository)


def test_without_pip_nothing_is_begun(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "distributions", lambda name: iter(()))

    with pytest.raises(ValueError, match=r"needs pip, which .* lacks"):
        side_of("main", repository)
