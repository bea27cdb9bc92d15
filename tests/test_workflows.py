"""The workflows: every command that they name exists, they may do little, and nothing of a stranger reaches a shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_bench.__main__ import main
from lora_bench.commands.arguments import USAGE

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, without which no workflow can be read")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted([*GITHUB.glob("workflows/*.yml"), *GITHUB.glob("examples/*.yml")])
ACTIONS = sorted(GITHUB.glob("actions/*/action.yml"))
EVERY = [*WORKFLOWS, *ACTIONS]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name(path: Path) -> str:
    return path.relative_to(GITHUB).as_posix()


def load(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    found = load(path)
    if "runs" in found:
        return list(found["runs"]["steps"])
    return [step for job in found["jobs"].values() for step in job["steps"]]


def commands(path: Path) -> Iterator[list[str]]:
    """Every command's words, as far as a reader can tell."""
    for step in steps(path):
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].split()


def test_there_are_some() -> None:
    assert {name(path) for path in EVERY} >= {
        "workflows/ci.yml",
        "workflows/gate.yml",
        "examples/gpu.yml",
        "actions/lora-bench/action.yml",
    }
    assert {"make", "lora-bench"} <= {words[0] for path in EVERY for words in commands(path)}


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_every_command_exists(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in TARGETS
        if words[0] != "lora-bench":
            continue
        with pytest.raises(SystemExit, match=r"^0$"):
            main([words[1], "--help"])
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in known


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_nothing_is_put_into_a_shell_s_text(path: Path) -> None:
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_may_read_and_nothing_else(path: Path) -> None:
    found = load(path)

    assert found["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in found["jobs"].values())
    assert all("timeout-minutes" in job for job in found["jobs"].values())
    assert "pull_request_target" not in found[True]  # YAML's word for "on"


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_what_a_workflow_gives_to_our_action_is_asked_for(path: Path) -> None:
    inputs = load(GITHUB / "actions" / "lora-bench" / "action.yml")["inputs"]

    for step in steps(path):
        if "actions/lora-bench" in step.get("uses", ""):
            assert step["with"].keys() <= inputs.keys()


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_records_are_kept_whatever_happened(path: Path) -> None:
    uploads = [step for step in steps(path) if "upload-artifact" in step.get("uses", "")]

    assert all(step["if"] == "always()" and step["with"]["include-hidden-files"] is True for step in uploads)
    assert uploads or not any("lora-bench" in words[:1] for words in commands(path))


def test_a_verb_that_is_none_would_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=f"^{USAGE}$"):
        main(["compare-everything", "--help"])
