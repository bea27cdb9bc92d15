"""The sides of a comparison: what each imports, what it is called, and what is wrong with it before work is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_bench
from lora_bench.gate import environments
from lora_bench.gate.environments import NEEDED, Side, command, describe, here, of_python, same
from lora_bench.gate.inside import digest

VERSIONS = {"torch": "2.11.0", "transformers": "4.57.6", "peft": "0.18.1"}
Environment = Callable[..., Path]


def add(site: Path, module: str, distribution: str, version: str, text: str = "") -> None:
    """What pip leaves of a distribution of one module."""
    (site / module).mkdir(exist_ok=True)
    (site / module / "__init__.py").write_text(text)
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "RECORD").write_text(f"{module}/__init__.py,,\n")


def site_of(python: Path) -> Path:
    return next(python.parent.parent.glob("lib/python*/site-packages"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Makes environments that hold next to nothing; a module of version None is not in them."""

    def make(name: str = "other", **versions: str | None) -> Path:
        venv.create(tmp_path / name, symlinks=True)
        python = tmp_path / name / "bin" / "python"
        for module, distribution in (NEEDED | {"peft": "peft"}).items():
            version = (VERSIONS | versions).get(module, "1.0")
            if version is not None:
                add(site_of(python), module, distribution, version)
        return python

    return make


def output(side: Side, program: str, cwd: Path | None = None) -> str:
    python, variables = command(side)
    done = subprocess.run([*python, "-c", program], env=variables, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_here_imports_what_this_process_does(tmp_path: Path) -> None:
    side = here("reference")

    assert (side.name, side.python) == ("reference", sys.executable)
    assert output(side, "import lora_bench; print(lora_bench.__file__)", tmp_path) == lora_bench.__file__


def test_here_goes_on_with_the_callers_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    assert output(here("mine:SUBJECT"), "import mine; print(mine.__file__)") == str(tmp_path / "mine.py")


def test_a_subject_in_a_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert here("mine.py:SUBJECT").subject == f"{tmp_path}/mine.py:SUBJECT"


def test_another_environment_is_called_by_its_library(environment: Environment, tmp_path: Path) -> None:
    side = of_python(str(environment()), "peft", lent=tmp_path / "lent")
    told = describe(side)

    assert (side.name, side.subject) == ("peft 0.18.1", "peft")
    assert told["library"] == "peft 0.18.1"
    assert told["packages"].items() >= VERSIONS.items()
    assert "hypothesis" not in told["packages"]
    package = Path(lora_bench.__file__).parent
    assert told["content"] == {"lora_bench": digest(package), "peft": digest(site_of(Path(side.python)) / "peft")}
    assert json.loads(json.dumps(told)) == told


def test_the_harness_itself_goes_by_the_subjects_name(environment: Environment, tmp_path: Path) -> None:
    assert of_python(str(environment()), "reference", lent=tmp_path / "lent").name == "reference"


def test_nothing_of_the_caller_gets_into_another_environment(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = environment()
    user = tmp_path / "home" / "lib" / python.resolve().name / "site-packages"
    for folder in (tmp_path / "path", tmp_path / "cwd", user):
        folder.mkdir(parents=True)
        add(folder, "peft", "peft", "9")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    side = of_python(str(python), "peft", lent=tmp_path / "lent")
    program = "import lora_bench, peft, sys; print(lora_bench.__file__, peft.__file__, *sys.path, sep='\\n')"
    ours, theirs, *path = output(side, program, tmp_path / "cwd").splitlines()

    assert Path(ours).resolve() == Path(lora_bench.__file__)
    assert Path(theirs).parent.parent == site_of(python)
    assert path[0] == str(tmp_path / "lent")
    assert not {"", str(tmp_path / "path"), str(tmp_path / "cwd"), str(user)} & set(path)
    assert output(side, "import sys; print(sys.flags.no_user_site)") == "1", "also where it is no virtual environment"


def test_no_bytecode_is_written_beside_what_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / "borrowed.py").touch()

    assert output(here("reference")._replace(path=(str(tmp_path),)), "import borrowed") == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["borrowed.py"]


@pytest.mark.parametrize("before", ["nothing", "a link to another", "a copy"])
@pytest.mark.parametrize("links", [True, False])
def test_our_package_alone_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, links: bool) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    lent, package = tmp_path / "lent", Path(lora_bench.__file__).parent
    lent.mkdir()
    if before == "a link to another":
        (lent / "lora_bench").symlink_to(tmp_path)
    elif before == "a copy":
        (lent / "lora_bench").mkdir()
        (lent / "lora_bench" / "old.py").touch()
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)

    assert environments._lend(lent) == environments._lend(lent) == lent
    assert [entry.name for entry in lent.iterdir()] == ["lora_bench"]
    assert (lent / "lora_bench").is_symlink() == links
    assert digest(lent / "lora_bench") == digest(package)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lent"]


def test_a_digest_is_of_names_and_contents_and_not_of_bytecode(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("1")
    before = digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "one.cpython-311.pyc").touch()

    assert digest(tmp_path) == before
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    assert digest(tmp_path) != before
    (tmp_path / "two.py").rename(tmp_path / "one.py").write_text("2")
    assert digest(tmp_path) != before


def script(folder: Path, text: str) -> Path:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    answers = {
        "": "does not answer as Python does: it says nothing",
        "echo broken >&2; exit 1": "does not answer as Python does: it says broken",
        "echo '[]'": "does not answer as Python does",
        "printf '\\377'; echo odd >&2": "does not answer as Python does: it says odd",
        """echo '{"python": "3.12.1"}'; echo odd >&2""": "does not answer as Python does: it says odd",
        """echo '{"python": 3}'""": "does not answer as Python does",
        """echo '{"python": "3.10.4"}'""": "is Python 3.10.4, wanted 3.11 or newer",
    }
    for text, said in answers.items():
        with pytest.raises(ValueError, match=said):
            of_python(str(script(tmp_path, text)), "peft", lent=tmp_path / "lent")
    (tmp_path / "python").write_bytes(b"\x7fELF nothing")

    with pytest.raises(ValueError, match="python does not run: Exec format error"):
        of_python(str(tmp_path / "python"), "peft", lent=tmp_path / "lent")
    with pytest.raises(ValueError, match=r"there is no interpreter nowhere/python$"):
        of_python("nowhere/python", "peft", lent=tmp_path / "lent")


def test_a_folder_is_no_interpreter(environment: Environment, tmp_path: Path) -> None:
    python = environment()

    with pytest.raises(ValueError, match=f"there is no interpreter {tmp_path}/other: try {python}"):
        of_python(str(tmp_path / "other"), "peft", lent=tmp_path / "lent")


@pytest.mark.parametrize(
    ("versions", "subject", "said"),
    [
        ({"torch": None}, "peft", "python has no torch: .*python -m pip install torch$"),
        ({"pynvml": None, "psutil": None}, "peft", "has no psutil, pynvml: .* -m pip install psutil nvidia-ml-py$"),
        ({"torch": "2.10.1+cpu"}, "peft", "python has torch 2.10.1.cpu, wanted 2.11 or newer"),
        ({"peft": None}, "peft-olora", "python has no peft: .*python -m pip install peft$"),
        ({}, "mine:SUBJECT", "python has no mine$"),
        ({}, "nowhere/mine.py:SUBJECT", "there is no file .*/nowhere/mine.py"),
        ({}, "pef", "no subject is called 'pef' in .*python; or give module:attr"),
    ],
)
def test_what_an_environment_lacks_is_told(
    environment: Environment, tmp_path: Path, versions: dict[str, str | None], subject: str, said: str
) -> None:
    python = environment(**versions)

    with pytest.raises(ValueError, match=said):
        of_python(str(python), subject, lent=tmp_path / "lent")


def test_the_same_environment_is_the_same(tmp_path: Path) -> None:
    side = here("reference")

    assert same(side, side._replace(name="another name"))
    assert same(side, of_python(sys.executable, "reference", lent=tmp_path / "lent"))
    assert not same(here("peft"), here("peft-olora")), "of one library, but not one subject"


def test_environments_that_differ_are_not_the_same(environment: Environment, tmp_path: Path) -> None:
    pythons = [
        environment("one"),
        environment("alike"),
        environment("newer", peft="0.18.2"),
        environment("beside", transformers="5.0.0"),
        environment("patched"),
    ]
    (site_of(pythons[-1]) / "peft" / "__init__.py").write_text("faster = True")
    one, *others = [of_python(str(python), "peft", lent=tmp_path / "lent") for python in pythons]

    assert [same(one, other) for other in others] == [True, False, False, False]
