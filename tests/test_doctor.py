"""`lora-bench doctor`: what it says of a processor and a machine that exist only here, and of this one."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

import lora_bench
from lora_bench import subjects
from lora_bench.__main__ import main
from lora_bench.bench import clocks, doctor, meter
from lora_bench.bench.doctor import examine
from lora_bench.bench.finding import Finding
from tests.fake_nvml import install
from tests.fresh_interpreter import loaded_by

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30


def found(device: str = "cpu", folder: Path = Path()) -> dict[str, Finding]:
    return {finding.quantity: finding for finding in examine(device, folder)}


def said(findings: dict[str, Finding], quantity: str) -> tuple[str, str]:
    return findings[quantity].answer, findings[quantity].why


@pytest.mark.parametrize(
    ("cuda", "count", "device", "why"),
    [
        (None, 0, "cpu", "is built without CUDA: the CPU alone can be timed and weighed"),
        ("13.0", 0, "cuda", "sees no CUDA device"),
        ("13.0", 2, "cuda:2", "sees 2 CUDA devices, and cuda:2 is asked for"),
        ("13.0", 1, "cpu", "sees 1 CUDA device, and cpu is asked for"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, count: int, device: str, why: str
) -> None:
    install(monkeypatch, "no library")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    findings = found(device)

    assert findings["GPU"].answer == "no"
    assert why in findings["GPU"].why
    assert said(findings, "NVML") == ("no", "NVML Shared Library Not Found")
    assert "--gpus all" in findings["NVML"].help
    assert "never as 0" in findings["what needs one"].why


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a file of a machine that has none of them, by its path."""
    monkeypatch.setattr(doctor, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(clocks, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(meter, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(doctor, "CONTAINERS", (tmp_path / "container",))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [
        ({}, ("no", "no control group is shown"), ("no", "no control group is shown")),
        (
            {"cgroup/memory.max": "max\n", "cgroup/cpu.max": "max 100000\n"},
            ("no", "no control group limits it"),
            ("no", "no control group limits it"),
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": f"{3 * GIB}",
                "cgroup/a/b/cpu.max": "150000 100000",
            },
            ("yes", "3.0 GiB, by control group: beyond it the kernel kills"),
            ("yes", "1.5 CPUs' worth of time, by control group: samples beyond it stand still"),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/own\n1:cpu,cpuacct:/\n0::/\n",
                "cgroup/memory/own/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "cgroup/cpu/cpu.cfs_period_us": "200000\n",
            },
            ("yes", "2.0 GiB, by control group: beyond it the kernel kills"),
            ("yes", "2 CPUs' worth of time, by control group: samples beyond it stand still"),
        ),
        (
            {"cgroup/memory/memory.limit_in_bytes": "9223372036854771712", "cgroup/cpu/cpu.cfs_quota_us": "-1"},
            ("no", "no control group limits it"),
            ("no", "no control group limits it"),
        ),
    ],
    ids=["none", "new, no limit", "new", "old", "old, no limit"],
)
def test_limits_of_control_groups(
    machine: Callable[[str, str], None], files: dict[str, str], memory: tuple[str, str], cpus: tuple[str, str]
) -> None:
    for path, text in files.items():
        machine(path, text)
    findings = found()

    assert said(findings, "memory limit") == memory
    assert said(findings, "CPU limit") == cpus


def test_a_bare_processor(machine: Callable[[str, str], None]) -> None:
    for cpu, governor in enumerate(["powersave", "performance"]):
        machine(f"cpus/cpu{cpu}/cpufreq/scaling_governor", governor)
        machine(f"cpus/cpu{cpu}/cpufreq/scaling_cur_freq", "2500000")
        machine(f"cpus/cpu{cpu}/thermal_throttle/core_throttle_count", "4")
    machine("powercap/intel-rapl:0/name", "package-0")
    machine("powercap/intel-rapl:0/energy_uj", "5")
    findings = found()

    assert said(findings, "frequency") == ("yes", "2500 MHz now")
    assert said(findings, "frequency governor") == ("partly", "performance, powersave")
    assert "cpupower" in findings["frequency governor"].help
    assert findings["throttling by heat"].answer == findings["energy (RAPL)"].answer == "yes"
    assert said(findings, "container") == ("no", "nothing shows one")


def test_energy_for_root_only_names_the_file_and_what_helps(
    machine: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("powercap/intel-rapl:0/name", "package-0")
    machine("powercap/intel-rapl:0/energy_uj", "5")
    path, read = tmp_path / "powercap/intel-rapl:0/energy_uj", Path.read_text

    def refused(self: Path, **more: str) -> str:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return read(self, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    finding = found()["energy (RAPL)"]

    assert finding[2:] == (
        "no",
        f"{path} is for root only",
        f"an administrator can allow it with `chmod a+r {path}`",
    )


def test_a_container_a_busy_machine_and_fewer_cpus_are_told(
    machine: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("container", "")
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    findings = found()

    assert findings["container"].answer == "yes"
    assert said(findings, "at rest") == ("no", "7.50 processes wanted to run in the last minute, on 2 CPUs")
    assert said(findings, "all CPUs") == ("partly", "this process may run on 2 of 64 CPUs (taskset, or a cpuset)")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    assert said(found(folder=tmp_path / "file" / "out"), "output folder") == (
        "no",
        f"{tmp_path / 'file'} cannot be written to",
    )
    assert found(folder=tmp_path / "new" / "out")["output folder"].answer == "yes"
    assert not (tmp_path / "new").exists(), "it is not made"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=15 << 20))
    assert said(found(folder=tmp_path), "output folder") == ("no", f"15 MiB free for {tmp_path}, wanted 16 MiB")


def test_a_kernel_that_counts_no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda _who: SimpleNamespace(ru_nvcsw=0, ru_nivcsw=0))

    assert found()["context switches"].answer == "no"


def test_subjects_that_are_not_installed_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"loralib": "loralib is not installed: pip install lora-bench[loralib]"}
    monkeypatch.setattr(subjects, "missing", absent.get)
    findings = found()

    assert findings["other subjects"][2:] == ("no", "loralib", "pip install lora-bench[loralib]")
    assert "loralib" not in findings["subjects"].why.split(", ")
    monkeypatch.setattr(subjects, "missing", lambda _name: None)
    assert "other subjects" not in found()


def test_rounded_float32_is_told() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert found()["full float32"].answer == "yes"
        torch.set_float32_matmul_precision("medium")
        assert found()["full float32"].answer == "no"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lora-device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("What can be measured here, device=cpu\n")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    assert told["schema"] == "lora-bench/doctor/1"
    assert told["device"] in ("cpu", "cuda")
    assert {each["answer"] for each in told["findings"]} <= {"yes", "partly", "no"}
    assert all(each["why"] for each in told["findings"])


def test_a_device_that_no_name_can_mean_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lora-device", "gpu"]) == 2
    assert capsys.readouterr().err == "lora-bench doctor: --lora-device must be auto, cpu, cuda or cuda:N, got 'gpu'\n"


def test_declaring_it_does_not_import_torch() -> None:
    assert "torch" not in loaded_by("import lora_bench.commands.doctor")


def test_no_setting_of_a_device_is_ever_changed() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(lora_bench.__file__).parent.rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"\bnvml[A-Z]\w+", source)}

    assert "nvmlDeviceGetPowerUsage" in named
    assert {
        name
        for name in named
        if not re.match("nvml(Device|System)Get|nvmlInit$|nvmlShutdown$|nvmlMemory_v2$|nvmlReturn$", name)
    } == set()
