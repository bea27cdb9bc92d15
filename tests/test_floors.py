"""The house: imports go downward only, third parties stay in their room, and files can be read in one sitting."""

import ast
import math
import sys
from pathlib import Path

import pytest

import lora_bench
from tests.imported_modules import imported

HOUSE = Path(lora_bench.__file__).parent

# From the ground up. A room may import those on lower floors and itself; never its neighbours on the same floor.
FLOORS = (
    {"spec"},
    {"adapter", "definition", "subject", "targets"},
    {"case"},
    {"bounds"},
    {"attention", "dora"},
    {"reference"},
    {"subjects"},
    {"models"},
    {"bench", "claims", "conformance"},
    {"gate"},
    {"options", "report"},
    {"ending"},
    {"commands", "plugin"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What any room may import; everything else is under test, and imported only by `subjects`.
TOOLS = {"_pytest", "hypothesis", "pytest", "pytest_benchmark", "rich", "psutil", "pynvml", "safetensors"}
TOOLS |= {"jinja2", "markupsafe", "numpy", "scipy", "torch", "transformers"}
FILES = sorted(HOUSE.rglob("*.py"))


def names(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def faults(room: str, source: str) -> list[str]:
    """What `source`, a file of `room`, imports and may not."""
    wrong = []
    for module in imported(source):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package == "lora_bench":
            if not other or (other != room and FLOOR.get(other, math.inf) >= FLOOR[room]):
                wrong.append(module)
        elif package not in sys.stdlib_module_names | TOOLS and room != "subjects":
            wrong.append(module)
    return wrong


def test_every_room_has_a_floor() -> None:
    rooms = {
        path.stem for path in HOUSE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }

    assert rooms - {"__init__"} <= set(FLOOR), "place it in FLOORS"
    assert sum(map(len, FLOORS)) == len(FLOOR), "on one floor only"


@pytest.mark.parametrize("path", [path for path in FILES if path != HOUSE / "__init__.py"], ids=names)
def test_imports_go_downward(path: Path) -> None:
    room = path.relative_to(HOUSE).parts[0].removesuffix(".py")

    assert faults(room, path.read_text(encoding="utf-8")) == []


def test_the_door_imports_nothing_when_it_is_opened() -> None:
    body = ast.parse((HOUSE / "__init__.py").read_text(encoding="utf-8")).body
    modules = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    others = [node for node in body if isinstance(node, ast.Import)]

    assert set(modules) <= {"__future__", "importlib", "typing"}
    assert not others


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_so_can_the_tests() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in Path(__file__).parent.glob("*.py")
    }

    assert lengths[Path(__file__).name] > 0
    assert {name: length for name, length in lengths.items() if length > 350} == {}


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("spec", "from lora_bench.case import Case", ["lora_bench.case"]),
        ("definition", "def f():\n    from lora_bench import bounds, spec", ["lora_bench.bounds"]),
        ("bounds", "import lora_bench.reference.layer", ["lora_bench.reference.layer"]),
        ("bounds", "if TYPE_CHECKING:\n    from lora_bench import REFERENCE", ["lora_bench.reference"]),
        ("definition", "from lora_bench.case import Case", ["lora_bench.case"]),
        ("conformance", "from lora_bench.bench.clock import now", ["lora_bench.bench.clock"]),
        ("bench", "from lora_bench import conforms", ["lora_bench.conformance"]),
        ("gate", "from lora_bench.report import table", ["lora_bench.report"]),
        ("report", "import lora_bench", ["lora_bench"]),
        ("bench", "import os, peft.tuners", ["peft.tuners"]),
        ("models", "from importlib import import_module as load\nimportlib.import_module('loralib')", ["loralib"]),
        ("models", "library = quiet_import('bitsandbytes')", ["bitsandbytes"]),
        ("subjects", "import peft, bitsandbytes, torch", []),
        ("bench", "import torch, numpy.linalg, json\nfrom lora_bench.bench import arm\nimport lora_bench.models", []),
    ],
)
def test_a_wrong_import_is_seen(room: str, source: str, found: list[str]) -> None:
    assert faults(room, source) == found
