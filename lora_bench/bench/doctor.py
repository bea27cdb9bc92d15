"""What can be measured on this machine, and what stands in the way: read and told, never changed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from lora_bench import subjects
from lora_bench.bench import nvml_state
from lora_bench.bench.clocks import cpu_clock_mhz, cpu_throttle_counters, own_cpus
from lora_bench.bench.doctor_gpu import examine_gpu
from lora_bench.bench.finding import Finding
from lora_bench.bench.memory import reset_resident_peak, resident_peak
from lora_bench.bench.meter import rapl_meter
from lora_bench.bench.nvml import GpuLost, Unavailable
from lora_bench.bench.records import ROOM
from lora_bench.bounds import Arithmetic

PROC, CGROUP, CPUS = Path("/proc"), Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")
CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"), Path("/singularity"))
"""What Docker, Podman and Apptainer leave in a container."""
NO_LIMIT = 1 << 60
"""A limit of so many bytes is how the older control groups write "none"."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "nvidia-ml-py", "triton", "bitsandbytes")


def examine(device: str, folder: Path) -> list[Finding]:
    """All findings on a device ("cpu", "cuda", "cuda:1"), which need not be there; `folder`: where output would go."""
    return [*_device(device), *_processor(), *_machine(folder), *_software()]


def _device(device: str) -> list[Finding]:
    there = device.startswith("cuda") and int(device.partition(":")[2] or 0) < torch.cuda.device_count()
    if not there:
        needing = "device events, CUDA graphs, memory by torch and NVML, accounting, power, SM clocks, MIG: "
        why = f"{needing}each is told as unavailable, never as 0"
        return [_no_gpu(device), _nvml(), Finding("GPU", "what needs one", "no", why)]
    try:
        gpu, *rest = examine_gpu(device)
    except (GpuLost, RuntimeError) as error:  # torch says by RuntimeError that it cannot use a device
        why, _, _ = str(error).partition("\n")
        return [Finding("GPU", "GPU", "no", why, "`nvidia-smi`; a lost GPU is an administrator's to reset"), _nvml()]
    return [gpu, _nvml(), *rest]


def _no_gpu(device: str) -> Finding:
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA: the CPU alone can be timed and weighed"
        return Finding("GPU", "GPU", "no", why, "where there is one: install torch with CUDA (pytorch.org)")
    count = torch.cuda.device_count()
    why = f"torch {torch.__version__} sees {count or 'no'} CUDA device{'s' * (count > 1)}"
    why += f", and {device} is asked for" if count else ""
    return Finding("GPU", "GPU", "no", why, "look at CUDA_VISIBLE_DEVICES and `nvidia-smi`; in Docker: --gpus all")


def _nvml() -> Finding:
    count = nvml_state.device_count()
    if isinstance(count, Unavailable):
        help_ = "it comes with NVIDIA's driver; in a container: --gpus all, and the capability `utility`"
        return Finding("GPU", "NVML", "no", count.reason.removeprefix("NVML: "), help_)
    return Finding("GPU", "NVML", "yes", f"it shows {count} GPU{'s' * (count != 1)}")


def _processor() -> list[Finding]:
    """What a run on the CPU can tell."""
    name = "CPU"
    clock, throttle, meter = cpu_clock_mhz(), cpu_throttle_counters(), rapl_meter()
    nanoseconds = time.get_clock_info("perf_counter").resolution * 1e9
    return [
        Finding(name, "wall clock", "yes", f"monotonic, in steps of {nanoseconds:.0f} ns"),
        _switches(),
        _resident_peak(),
        _told(name, "energy (RAPL)", meter, "joules of the whole package, so of every process on it"),
        _told(name, "frequency", clock, f"{clock} MHz now"),
        _governor(),
        _told(name, "throttling by heat", throttle, "counted, and compared before and after"),
    ]


def _told(section: str, quantity: str, value: object, how: str) -> Finding:
    if isinstance(value, Unavailable):
        why, _, help_ = value.reason.partition(": an administrator")
        return Finding(section, quantity, "no", why, f"an administrator{help_}" if help_ else "")
    return Finding(section, quantity, "yes", how)


def _switches() -> Finding:
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    if usage.ru_nvcsw + usage.ru_nivcsw == 0:
        return Finding(
            "CPU", "context switches", "no", "the kernel counts none (gVisor?): disturbed samples cannot be told"
        )
    return Finding("CPU", "context switches", "yes", f"{usage.ru_nivcsw:,} involuntary ones of this process so far")


def _resident_peak() -> Finding:
    for value in (reset_resident_peak(), resident_peak()):
        if isinstance(value, Unavailable):
            return Finding("CPU", "resident set peak", "no", value.reason, "a Linux kernel with /proc/self/clear_refs")
    return Finding("CPU", "resident set peak", "yes", "of this process, by the kernel; reset before each step")


def _governor() -> Finding:
    found = {text for cpu in own_cpus() if (text := _read(CPUS / f"cpu{cpu}/cpufreq/scaling_governor"))}
    if not found:
        return Finding("CPU", "frequency governor", "no", "none is shown: in a virtual machine its host decides")
    if found == {"performance"}:
        return Finding("CPU", "frequency governor", "yes", "performance")
    help_ = "steadier times: an administrator's `cpupower frequency-set -g performance`"
    return Finding("CPU", "frequency governor", "partly", ", ".join(sorted(found)), help_)


def _machine(folder: Path) -> list[Finding]:
    return [_cores(), _load(), _memory(), _limit_of_memory(), _limit_of_cpus(), _container(), _disk(folder)]


def _cores() -> Finding:
    mine, there = len(own_cpus()), os.cpu_count() or 1
    if mine == there:
        return Finding("machine", "all CPUs", "yes", f"{there} CPUs, all of them for this process")
    return Finding(
        "machine", "all CPUs", "partly", f"this process may run on {mine} of {there} CPUs (taskset, or a cpuset)"
    )


def _load() -> Finding:
    load, cpus = os.getloadavg()[0], len(own_cpus())
    why = f"{load:.2f} processes wanted to run in the last minute, on {cpus} CPUs"
    if load < cpus / 4:
        return Finding("machine", "at rest", "yes", why)
    return Finding(
        "machine", "at rest", "partly" if load < cpus else "no", why, "stop what else runs, or expect wide intervals"
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("machine", "memory", "yes", f"{_gib(memory.available)} of {_gib(memory.total)} free")


def _limit_of_memory() -> Finding:
    text = _limit("memory.max", "memory", "memory.limit_in_bytes")
    if text is None or not text.isdecimal() or int(text) >= NO_LIMIT:
        return Finding(
            "machine", "memory limit", "no", "no control group limits it" if text else "no control group is shown"
        )
    return Finding("machine", "memory limit", "yes", f"{_gib(int(text))}, by control group: beyond it the kernel kills")


def _limit_of_cpus() -> Finding:
    text = _limit("cpu.max", "cpu", "cpu.cfs_quota_us")
    if text is None:
        return Finding("machine", "CPU limit", "no", "no control group is shown")
    quota, _, period = text.partition(" ")
    if not quota.isdecimal():
        return Finding("machine", "CPU limit", "no", "no control group limits it")
    period = period or _limit("", "cpu", "cpu.cfs_period_us") or "100000"
    why = f"{int(quota) / int(period):g} CPUs' worth of time, by control group: samples beyond it stand still"
    return Finding("machine", "CPU limit", "yes", why, "raise the limit of the container (`docker run --cpus`)")


def _limit(newer: str, controller: str, older: str) -> str | None:
    """A limit of this process's control group, as the kernel writes it in either version, or None."""
    own: dict[str, str] = {}
    for line in (_read(PROC / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    paths = [CGROUP / own.get("", "") / newer, CGROUP / newer] if newer else []
    paths += [CGROUP / controller / own.get(controller, "") / older, CGROUP / controller / older]
    return next((text for path in paths if path.is_file() and (text := _read(path)) is not None), None)


def _container() -> Finding:
    seen = [mark for mark in CONTAINERS if mark.exists()]
    if "kubepods" in (_read(PROC / "self/cgroup") or ""):
        seen.append(PROC / "self/cgroup")
    if not seen:
        return Finding("machine", "container", "no", "nothing shows one")
    return Finding(
        "machine", "container", "yes", f"{', '.join(map(str, seen))}: NVML may know this process by another pid"
    )


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    why = "" if free >= ROOM else f"{free >> 20} MiB free for {folder}, wanted {ROOM >> 20} MiB"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} cannot be written to"
    if why:
        return Finding("machine", "output folder", "no", why, "--lora-output FOLDER")
    return Finding("machine", "output folder", "yes", f"{_gib(free)} free for {folder}")


def _software() -> list[Finding]:
    found = [
        f"python {sys.version.split()[0]}",
        *(f"{name} {release}" for name in PACKAGES if (release := _version(name))),
    ]
    absent = {name: why for name in subjects.shipped() if (why := subjects.missing(name))}
    installed = [name for name in subjects.shipped() if name not in absent]
    installs = dict.fromkeys(why.partition(": ")[2] for why in absent.values())
    return [
        Finding("software", "versions", "yes", ", ".join(found)),
        Finding("software", "subjects", "yes", ", ".join(installed)),
        *([Finding("software", "other subjects", "no", ", ".join(absent), "; ".join(installs))] if absent else []),
        _precision(),
    ]


def _precision() -> Finding:
    if Arithmetic.of(torch.float32).operand:
        why = "float32 products round their operands (TF32 or less)"
        return Finding("software", "full float32", "no", why, "torch.set_float32_matmul_precision('highest')")
    return Finding("software", "full float32", "yes", "float32 products keep their operands: TF32 is off")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
