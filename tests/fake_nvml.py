"""NVML without a GPU: the real pynvml over a library made here, in C (nvml_stub.c) or of Python functions.

Both hold the same GPU ("GPU-one") with a MIG instance ("MIG-part"), take values by name and fail on request.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import pynvml

from lora_bench.bench import clocks, nvml, nvml_state
from lora_bench.bench.nvml import GpuLost, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
GPU, MIG = 1, 2
UUIDS = {b"GPU-one": GPU, b"MIG-part": MIG}
UNSIGNED, UNSIGNED_LONG_LONG = 1, 3
VALUES = {
    "driver": 82,
    "total": 80 << 30,
    "used": 3 << 30,
    "free": 76 << 30,
    "reserved": 1 << 30,
    "processes": 1,
    "pid 0": 7,
    "bytes 0": 2 << 30,
    "accounting": 1,
    "accounted pid": 7,
    "accounted peak": 5 << 30,
    "millijoules": 123_456,
    "milliwatts": 300_000,
    "limit": 700_000,
    "field 186": 250_000,
    "type 186": UNSIGNED,
    **{f"type {number}": UNSIGNED_LONG_LONG for number in nvml.THROTTLE_FIELDS},
    **{f"field {number}": 1000 + number for number in nvml.THROTTLE_FIELDS},
    "clock": 1410,
    "most clock": 1980,
    "celsius": 45,
    "ecc": 1,
    "compute mode": 3,
    "reasons": 0x4 | 0x40,
}
"""What a healthy device says, by the names that both libraries know."""
PLAIN = {
    "nvmlDeviceGetTotalEnergyConsumption": "millijoules",
    "nvmlDeviceGetPowerUsage": "milliwatts",
    "nvmlDeviceGetEnforcedPowerLimit": "limit",
    "nvmlDeviceGetCurrentClocksEventReasons": "reasons",
    "nvmlDeviceGetAccountingMode": "accounting",
    "nvmlDeviceGetComputeMode": "compute mode",
    "nvmlDeviceGetPersistenceMode": "persistence",
    "nvmlDeviceGetClockInfo": "clock",
    "nvmlDeviceGetMaxClockInfo": "most clock",
    "nvmlDeviceGetTemperature": "celsius",
    "nvmlDeviceGetEccMode": "ecc",
    "nvmlDeviceGetMigMode": "mig",
}
"""Functions that answer one number of the whole GPU, in each of their results."""


class Control(Protocol):
    """How a library is told what to answer."""

    def reset(self) -> None: ...
    def set(self, name: str, value: int) -> None: ...
    def fault(self, function: str, code: int, after: int, times: int) -> None: ...


class PythonLibrary:
    """In the place of `pynvml.nvmlLib`: its attributes are called as the library's functions are."""

    def __init__(self, absent: tuple[str, ...] = ()) -> None:
        self.absent = absent
        self.values: dict[str, int] = {}
        self.faults: list[list[Any]] = []

    def reset(self) -> None:
        self.values, self.faults = {}, []

    def set(self, name: str, value: int) -> None:
        self.values[name] = value

    def fault(self, function: str, code: int, after: int, times: int) -> None:
        self.faults.append([function, code, after, times])

    def get(self, name: str) -> int:
        return self.values.get(name, 0)

    def __getattr__(self, name: str) -> Any:
        if name in self.absent or not (name in PLAIN or hasattr(type(self), f"_{name}")):
            raise AttributeError(name)

        def function(*arguments: Any) -> Any:
            if code := self._fault(name):
                return code
            return self._plain(name, *arguments) if name in PLAIN else getattr(self, f"_{name}")(*arguments)

        return function

    def _fault(self, name: str) -> int:
        for fault in self.faults:
            if fault[0] == name:
                if fault[2] > 0:
                    fault[2] -= 1
                    return 0
                if fault[3]:
                    fault[3] -= 1
                    return int(fault[1])
        return 0

    def _plain(self, name: str, device: Any, *arguments: Any) -> int:
        if handle(device) == MIG:
            return pynvml.NVML_ERROR_NOT_SUPPORTED
        for result in arguments:
            if hasattr(result, "_obj"):
                result._obj.value = self.get(PLAIN[name])
        return 0

    def _nvmlInitWithFlags(self, _flags: int) -> int:  # noqa: N802  # NVML's names
        return 0

    def _nvmlShutdown(self) -> int:  # noqa: N802
        return 0

    def _nvmlErrorString(self, _code: int) -> bytes:  # noqa: N802
        return b"an error that the stub does not name"

    def _nvmlSystemGetDriverVersion(self, version: Any, _length: Any) -> int:  # noqa: N802
        version.value = f"580.{self.get('driver')}".encode()
        return 0

    def _nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:  # noqa: N802
        if uuid.value not in UUIDS:
            return pynvml.NVML_ERROR_NOT_FOUND
        point(device, UUIDS[uuid.value])
        return 0

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, _device: Any, board: Any) -> int:  # noqa: N802
        point(board, GPU)
        return 0

    def _nvmlDeviceGetMemoryInfo(self, _device: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = self.get("total"), self.get("free")
        memory._obj.used = self.get("used") + self.get("reserved")
        return 0

    def _nvmlDeviceGetMemoryInfo_v2(self, _device: Any, memory: Any) -> int:  # noqa: N802
        for name in ("total", "free", "used", "reserved"):
            setattr(memory._obj, name, self.get(name))
        return 0

    def _nvmlDeviceGetFieldValues(self, device: Any, _count: Any, fields: Any) -> int:  # noqa: N802
        if handle(device) == MIG:
            return pynvml.NVML_ERROR_NOT_SUPPORTED
        for item in fields._obj:
            item.nvmlReturn, item.valueType = self.get(f"code {item.fieldId}"), self.get(f"type {item.fieldId}")
            item.value.ullVal = self.get(f"field {item.fieldId}")
        return 0

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, _device: Any, count: Any, found: Any) -> int:  # noqa: N802
        there, room = self.get("processes"), count._obj.value
        count._obj.value = there
        if room < there:
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        for number in range(there):
            found[number].pid = self.get(f"pid {number}")
            found[number].usedGpuMemory = self.get(f"bytes {number}")
        return 0

    def _nvmlDeviceGetAccountingStats(self, _device: Any, pid: Any, found: Any) -> int:  # noqa: N802
        if pid.value != self.get("accounted pid"):
            return pynvml.NVML_ERROR_NOT_FOUND
        found._obj.maxMemoryUsage = self.get("accounted peak")
        return 0


NEWER = ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetFieldValues")
"""What a library for an old driver has not."""


def handle(device: Any) -> int | None:
    return ctypes.cast(device, ctypes.c_void_p).value


def point(device: Any, to: int) -> None:
    ctypes.cast(ctypes.pointer(device._obj), ctypes.POINTER(ctypes.c_void_p)).contents.value = to


def no_library(_name: str) -> None:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def install(patch: pytest.MonkeyPatch, world: str = "") -> PythonLibrary:
    """Put a Python library under pynvml: the usual one, or that of an "old driver", or "no library" at all."""
    library = PythonLibrary(NEWER if world == "old driver" else ())
    patch.setattr(pynvml, "nvmlLib", None if world == "no library" else library)
    patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    if world == "no library":
        patch.setattr(pynvml, "CDLL", no_library)
    library.reset()
    for name, value in VALUES.items():
        library.set(name, value)
    return library


def answers(control: Control, request: dict[str, Any]) -> list[Any]:
    """What a probe gives, called `calls` times, on a device with these `values` and `faults`; ready for JSON."""
    control.reset()
    for name, value in (VALUES | request.get("values", {})).items():
        control.set(name, value)
    for fault in request.get("faults", ()):
        control.fault(*fault)
    given = []
    for _ in range(request.get("calls", 1)):
        try:
            given.append(plain(asked(control, request)))
        except GpuLost as lost:
            given.append({"lost": str(lost)})
    return json.loads(json.dumps(given))


def asked(control: Control, request: dict[str, Any]) -> Any:
    name, uuid = request["probe"], request.get("uuid", "GPU-one")
    if name == "device_count":
        return nvml_state.device_count()
    if name != "window":
        module = nvml if hasattr(nvml, name) else nvml_state
        return getattr(module, name)(uuid, *request.get("arguments", ()))
    with clocks.Window("cuda", look=lambda: clocks.look_at_gpu(uuid), now=lambda: 0.0) as window:
        for key, value in request["then"].items():
            control.set(key, value)
    return window.as_dict()


def plain(value: Any) -> Any:
    if isinstance(value, Unavailable):
        return {"unavailable": list(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


class CLibrary:
    """The control of a compiled stub that this process has loaded."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def reset(self) -> None:
        self._library.stub_reset()

    def set(self, name: str, value: int) -> None:
        self._library.stub_set(name.encode(), ctypes.c_ulonglong(value))

    def fault(self, function: str, code: int, after: int, times: int) -> None:
        self._library.stub_fault(function.encode(), code, after, times)


def compile_stub(folder: Path, *options: str) -> Path:
    """The stub compiled by gcc, with the name inside that pynvml looks for."""
    library = folder / "stub.so"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1", *options]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return library


class Worker:
    """A process whose pynvml finds the stub, as a library of that name is loaded already. Other tests never see it."""

    def __init__(self, library: Path | None) -> None:
        program = f"from tests.fake_nvml import serve; serve({str(library or '')!r})"
        root = Path(__file__).parent.parent
        command = [sys.executable, "-c", program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def ask(self, request: dict[str, Any]) -> list[Any]:
        print(json.dumps(request), file=self._pipe(self._process.stdin), flush=True)
        return json.loads(self._pipe(self._process.stdout).readline())

    def end(self) -> None:
        self._process.communicate()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def serve(path: str) -> None:
    """Answer requests, a line each."""
    if path:
        control: Control = CLibrary(path)
    else:
        pynvml.CDLL, control = no_library, PythonLibrary()
    for line in requests():
        sys.stdout.write(json.dumps(answers(control, line)) + "\n")
        sys.stdout.flush()


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)
