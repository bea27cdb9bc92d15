"""Subjects are found by text, or refused in one sentence."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from lora_bench.reference import REFERENCE
from lora_bench.subjects import find, missing, quiet_import, shipped

KNOWN = f"known are {', '.join(shipped())}"

FILE = """
from lora_bench import Subject
MINE = Subject("mine", lambda base, spec: base, lambda layer, factors: None)
OTHER = 3
"""


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        find(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_subject_is_found_by_its_name(name: str) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    subject = find(name)

    assert subject.name == name
    assert find(name) is subject


def test_a_file_is_a_module_of_its_own_and_is_loaded_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "sub").mkdir()
    twin = file.parent / "sub" / "mine.py"
    twin.write_text(FILE)
    subject = find(f"{file}:MINE")
    monkeypatch.chdir(file.parent)

    assert subject.name == "mine"
    assert find("mine.py:MINE") is find("./mine.py:MINE") is subject
    assert find(f"{twin}:MINE") is not subject
    assert sys.modules[subject.wrap.__module__].MINE is subject
    assert "mine" not in sys.modules


def test_a_module_is_found_by_its_dotted_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)

    assert find("mine:MINE").name == "mine"
    assert find("lora_bench.reference:REFERENCE") is REFERENCE
    monkeypatch.delitem(sys.modules, "mine")


def test_an_entry_point_is_found_by_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = file.parent / "acme-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[lora_bench.subjects]\nacme = mine:MINE\n")
    monkeypatch.syspath_prepend(file.parent)

    assert find("acme").name == "mine"
    assert refusal("acne") == (
        f"no subject is called 'acne': {KNOWN}, acme (nearest: acme); or give module:attr or path.py:ATTR"
    )
    monkeypatch.delitem(sys.modules, "mine")


def test_what_names_no_subject_is_refused_in_one_sentence(file: Path) -> None:
    broken, wrong = file.parent / "broken.py", file.parent / "wrong.py"
    broken.write_text("import absent_package")
    wrong.write_text("def f(:")
    otherwise = "; or give module:attr or path.py:ATTR"

    assert refusal("pefft") == f"no subject is called 'pefft': {KNOWN} (nearest: peft){otherwise}"
    assert refusal("acme") == f"no subject is called 'acme': {KNOWN}{otherwise}"
    assert refusal("mine.py") == (
        f"no subject is called 'mine.py': which subject of the file? write mine.py:NAME{otherwise}"
    )
    assert refusal("no/file.py:X") == "'no/file.py:X': there is no file no/file.py"
    assert refusal("absent_package:X") == (
        "'absent_package:X' cannot be loaded: ModuleNotFoundError: No module named 'absent_package'"
    )
    assert refusal(f"{broken}:X").endswith(
        "broken.py:X' cannot be loaded: ModuleNotFoundError: No module named 'absent_package'"
    )
    assert "wrong.py:X' cannot be loaded: SyntaxError: " in refusal(f"{wrong}:X")
    assert refusal(f"{file}:YOURS") == f"'{file}:YOURS': {file} has no 'YOURS'; its subjects are MINE"
    assert refusal(f"{file}:OTHER") == f"'{file}:OTHER': wanted a lora_bench.Subject, got a int"
    assert refusal("math:YOURS") == "'math:YOURS': math has no 'YOURS'; its subjects are none"


def test_a_file_that_fails_leaves_no_module_behind(file: Path) -> None:
    before = set(sys.modules)
    file.write_text("MINE = 1\n1 / 0")
    for _ in range(2):
        assert refusal(f"{file}:MINE").endswith("cannot be loaded: ZeroDivisionError: division by zero")
    assert set(sys.modules) == before
    file.write_text(FILE)
    assert find(f"{file}:MINE").name == "mine"


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("peft", "peft", "peft"),
        ("loralib", "loralib", "lora-bench[loralib]"),
        ("lora-pytorch", "lora_pytorch", "lora-bench[lora-pytorch]"),
        ("lycoris", "lycoris", "lora-bench[lycoris]"),
        ("lycoris-bypass", "lycoris", "lora-bench[lycoris]"),
        ("diffusers", "diffusers", "lora-bench[diffusers]"),
    ],
)
def test_a_library_that_is_absent_says_what_to_install(
    name: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    assert missing(name) == f"{package} is not installed: pip install {install}"
    assert refusal(name) == missing(name)
    assert missing("reference") is None
    with pytest.raises(ValueError, match=f"^no shipped subject is called 'acme': they are {', '.join(shipped())}$"):
        missing("acme")


def test_exactly_one_notice_of_bitsandbytes_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    notice = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    with quiet_import():
        logger.warning(notice, "reason")
        logger.warning("something else")
    logger.warning(notice, "reason")

    assert [record.msg for record in caplog.records] == ["something else", notice]
