"""Every fault of a driver, and what a probe then gives: over a library in C and one in Python, by the real pynvml."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.fake_nvml import Worker, answers, compile_stub, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NOT_LOADED, TIMEOUT = 3, 4, 6, 9, 10
NO_LIBRARY, NO_FUNCTION, LOST, RESET = 12, 13, 15, 16
EVER, NOTHING, GIB = -1, 2**64 - 1, 1 << 30
MEMORY = {"total": 80 * GIB, "used": 3 * GIB, "free": 76 * GIB, "reserved": GIB, "source": "v2"}
OLD_MEMORY = MEMORY | {"used": 4 * GIB, "reserved": None, "source": "v1"}
COUNTERS = {
    "software_power_cap_ns": 1074,
    "sync_boost_ns": 1076,
    "software_thermal_ns": 1269,
    "hardware_thermal_ns": 1270,
    "power_brake_ns": 1271,
}
EARLIER = 251, 252, 253
ENERGY, INFO, FIELDS = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetFieldValues"
PROCESSES, PARENT = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetDeviceHandleFromMigDeviceHandle"


class Row(NamedTuple):
    """A fault, and what it must come to."""

    name: str
    request: dict[str, Any]
    given: list[Any]
    world: str = "usual"


def unavailable(reason: str, code: int | None) -> dict[str, list[Any]]:
    return {"unavailable": [f"NVML: {reason}", code]}


def lost(reason: str, call: str, uuid: str = "GPU-one") -> dict[str, str]:
    return {"lost": f"{reason}: device {uuid}, in {call}"}


def reading(value: float, source: str, *, shared: bool = False) -> dict[str, Any]:
    return {"value": value, "source": source, "shared": shared}


def window(moved: dict[str, int], throttled: Any, *, shared: bool = False, **unread: str) -> dict[str, Any]:
    delta = {name: moved.get(name, 0) for name in COUNTERS if name not in unread}
    return {
        "clocks": [1410, 1410],
        "throttle_delta": delta,
        "throttled": throttled,
        "seconds": 0.0,
        "shared": shared,
        "unavailable": unread,
    }


def failing(probe: str, *faults: tuple[str, int, int, int], **more: Any) -> dict[str, Any]:
    return {"probe": probe, "faults": faults, **more}


def finding(probe: str, /, values: dict[str, int], **more: Any) -> dict[str, Any]:
    return {"probe": probe, "values": values, **more}


ROWS = [
    Row("healthy", {"probe": "memory"}, [MEMORY]),
    Row(
        "lost on the third call",
        failing("memory", (INFO, LOST, 2, EVER), calls=3),
        [MEMORY, MEMORY, lost("GPU is lost", "nvmlDeviceGetMemoryInfo")],
    ),
    Row(
        "lost before it is found",
        failing("joules", ("nvmlDeviceGetHandleByUUID", LOST, 0, EVER)),
        [lost("GPU is lost", "nvmlDeviceGetHandleByUUID")],
    ),
    Row(
        "reset required, and shutdown fails too",
        failing("watts", (FIELDS, RESET, 0, EVER), ("nvmlShutdown", RESET, 0, EVER)),
        [lost("GPU requires restart", FIELDS)],
    ),
    Row(
        "lost in a field",
        finding("throttle_counters", {"code 270": LOST}),
        [lost("GPU is lost", f"{FIELDS}, field 270")],
    ),
    Row("not supported", failing("joules", (ENERGY, NOT_SUPPORTED, 0, EVER)), [unavailable("Not Supported", 3)]),
    Row(
        "no permission",
        failing("accounting_peak_bytes", ("nvmlDeviceGetAccountingStats", NO_PERMISSION, 0, EVER), arguments=[7]),
        [unavailable("Insufficient Permissions", 4)],
    ),
    Row(
        "a code nobody knows",
        failing("joules", (ENERGY, 77, 0, EVER)),
        [unavailable("an error that the stub does not name", 77)],
    ),
    Row("timeout twice", failing("memory", (INFO, TIMEOUT, 0, 2)), [MEMORY]),
    Row("timeout three times", failing("memory", (INFO, TIMEOUT, 0, 3), calls=2), [unavailable("Timeout", 10), MEMORY]),
    Row(
        "timeout of the library",
        failing("joules", ("nvmlInitWithFlags", TIMEOUT, 0, 2)),
        [reading(123.456, "nvml-total-energy")],
    ),
    Row(
        "driver not loaded",
        failing("driver_version", ("nvmlInitWithFlags", NOT_LOADED, 0, EVER)),
        [unavailable("Driver Not Loaded", 9)],
    ),
    Row("no library", {"probe": "joules"}, [unavailable("NVML Shared Library Not Found", NO_LIBRARY)], "no library"),
    Row("no memory v2", {"probe": "memory"}, [OLD_MEMORY], "old driver"),
    Row("no field values", {"probe": "watts"}, [reading(300.0, "nvml-power-usage")], "old driver"),
    Row(
        "missing symbol",
        {"probe": "throttle_counters"},
        [unavailable("Function Not Found", NO_FUNCTION)],
        "old driver",
    ),
    Row(
        "missing symbol, over a span",
        {"probe": "window", "then": {}},
        [
            window({}, "unavailable (throttle counters: NVML: Function Not Found)")
            | {"throttle_delta": {}, "unavailable": {"throttle counters": "NVML: Function Not Found"}}
        ],
        "old driver",
    ),
    Row(
        "used memory is the largest number",
        finding("memory", {"used": NOTHING}),
        [unavailable("the driver does not tell used memory here", None)],
    ),
    Row("power by field", {"probe": "watts"}, [reading(250.0, "nvml-power-instant")]),
    Row(
        "a bad field falls back",
        finding("watts", {"code 186": NOT_SUPPORTED, "field 186": 9}),
        [reading(300.0, "nvml-power-usage")],
    ),
    Row(
        "power is the largest number, in both",
        finding("watts", {"field 186": 2**32 - 1, "milliwatts": 2**32 - 1}),
        [unavailable("the driver does not tell power here", None)],
    ),
    Row(
        "a bad counter is alone",
        finding("throttle_counters", {"code 271": NOT_SUPPORTED}),
        [COUNTERS | {"power_brake_ns": unavailable("field 271: Not Supported", 3)}],
    ),
    Row(
        "a counter of a strange type",
        finding("throttle_counters", {"type 74": 0}),
        [COUNTERS | {"software_power_cap_ns": unavailable("field 74 is no integer but of type 0", None)}],
    ),
    Row(
        "a driver that numbers the counters otherwise",
        finding(
            "throttle_counters", {"driver": 65} | {f"field {n}": n for n in EARLIER} | {f"type {n}": 3 for n in EARLIER}
        ),
        [COUNTERS | dict(zip(("software_thermal_ns", "hardware_thermal_ns", "power_brake_ns"), EARLIER, strict=True))],
    ),
    Row("counters stand still", {"probe": "window", "then": {}}, [window({}, throttled=False)]),
    Row(
        "a counter moves",
        {"probe": "window", "then": {"field 269": 1269 + 5}},
        [window({"software_thermal_ns": 5}, throttled=True)],
    ),
    Row(
        "a counter goes back",
        {"probe": "window", "then": {"field 269": 4}},
        [
            window(
                {},
                "unavailable (software_thermal_ns: it went back from 1269 to 4: was the driver loaded again?)",
                software_thermal_ns="it went back from 1269 to 4: was the driver loaded again?",
            )
        ],
    ),
    Row(
        "the GPU keeps to its power limit",
        {"probe": "window", "then": {"field 74": 1074 + 5}},
        [window({"software_power_cap_ns": 5}, throttled=False)],
    ),
    Row(
        "one counter moves, another cannot be read",
        finding("window", {"code 271": NOT_SUPPORTED}, then={"field 76": 2000}),
        [window({"sync_boost_ns": 924}, throttled=True, power_brake_ns="NVML: field 271: Not Supported")],
    ),
    Row(
        "lost within a span",
        failing("window", ("nvmlDeviceGetClockInfo", LOST, 1, EVER), then={}),
        [lost("GPU is lost", "nvmlDeviceGetClockInfo")],
    ),
    Row("a MIG instance has memory", {"probe": "memory", "uuid": "MIG-part"}, [MEMORY]),
    Row("by its bare name too", {"probe": "memory", "uuid": "part"}, [MEMORY]),
    Row(
        "a MIG instance's energy is the GPU's",
        {"probe": "joules", "uuid": "MIG-part"},
        [reading(123.456, "nvml-total-energy", shared=True)],
    ),
    Row(
        "a MIG instance's clocks are the GPU's",
        {"probe": "window", "uuid": "part", "then": {}},
        [window({}, throttled=False, shared=True)],
    ),
    Row(
        "a MIG instance whose GPU may not be asked",
        failing("watts", (PARENT, NO_PERMISSION, 0, EVER), uuid="MIG-part"),
        [unavailable("Insufficient Permissions", 4)],
    ),
    Row("uuid not found", {"probe": "memory", "uuid": "GPU-other"}, [unavailable("Not Found", NOT_FOUND)]),
    Row("bare uuid not found", {"probe": "memory", "uuid": "other"}, [unavailable("Not Found", NOT_FOUND)]),
    Row("process found", {"probe": "process_bytes", "arguments": [7]}, [2 * GIB]),
    Row(
        "host pids",
        finding("process_bytes", {"processes": 2, "pid 0": 70_001, "pid 1": 70_000}, arguments=[7]),
        [unavailable("process 7 is not among [70000, 70001]: in a container NVML shows host pids", None)],
    ),
    Row(
        "no processes at all",
        finding("process_bytes", {"processes": 0}, arguments=[7]),
        [unavailable("process 7 is not listed, nor is any other", None)],
    ),
    Row(
        "memory by process is the largest number",
        finding("process_bytes", {"bytes 0": NOTHING}, arguments=[7]),
        [unavailable("the driver does not tell memory by process here", None)],
    ),
    Row(
        "processes not supported",
        failing("process_bytes", (PROCESSES, NOT_SUPPORTED, 0, EVER)),
        [unavailable("Not Supported", 3)],
    ),
    Row("accounting on", {"probe": "accounting_peak_bytes", "arguments": [7]}, [5 * GIB]),
    Row(
        "accounting off",
        finding("accounting_peak_bytes", {"accounting": 0}, arguments=[7]),
        [unavailable("accounting mode is off", None)],
    ),
    Row(
        "accounting knows no such process",
        {"probe": "accounting_peak_bytes", "arguments": [8]},
        [unavailable("Not Found", NOT_FOUND)],
    ),
    Row("a limit", {"probe": "power_limit_watts"}, [700.0]),
    Row("a clock", {"probe": "sm_clock_mhz"}, [reading(1410, "nvml-sm-clock")]),
    Row("the highest clock", {"probe": "max_sm_clock_mhz"}, [reading(1980, "nvml-sm-clock")]),
    Row("reasons in words", {"probe": "throttle_reasons"}, [["software power cap", "hardware thermal slowdown"]]),
    Row("no reasons", finding("throttle_reasons", {"reasons": 0}), [[]]),
    Row("a reason of a later driver", finding("throttle_reasons", {"reasons": 0x4001}), [["idle", "unknown (0x4000)"]]),
    Row("a temperature", {"probe": "temperature_celsius"}, [45]),
    Row("correction of errors", {"probe": "ecc_mode"}, [True]),
    Row("no MIG", {"probe": "mig_mode"}, [False]),
    Row("a compute mode", {"probe": "compute_mode"}, ["exclusive process"]),
    Row(
        "a compute mode of a later driver",
        finding("compute_mode", {"compute mode": 9}),
        [unavailable("compute mode 9 is not known", None)],
    ),
    Row("no persistence", {"probe": "persistence_mode"}, [False]),
    Row("accounting mode", {"probe": "accounting_mode"}, [True]),
    Row("a count", {"probe": "device_count"}, [1]),
    Row(
        "no count",
        failing("device_count", ("nvmlInitWithFlags", NOT_LOADED, 0, EVER)),
        [unavailable("Driver Not Loaded", 9)],
    ),
    Row("a version", {"probe": "driver_version"}, ["580.82"]),
]


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Row], list[Any]]]:
    """Asks over the compiled library, each world in a process of its own."""
    workers: dict[str, Worker] = {}

    def ask(row: Row) -> list[Any]:
        if row.world not in workers:
            options = ["-DOLD_DRIVER"] if row.world == "old driver" else []
            folder = tmp_path_factory.mktemp("nvml")
            workers[row.world] = Worker(None if row.world == "no library" else compile_stub(folder, *options))
        return workers[row.world].ask(row.request)

    yield ask
    for worker in workers.values():
        worker.end()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to compile the stub with")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_fault_gives_what_it_must_over_a_library_in_c(row: Row, in_c: Callable[[Row], list[Any]]) -> None:
    assert in_c(row) == row.given


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_fault_gives_what_it_must_over_a_library_in_python(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(install(monkeypatch, row.world), row.request) == row.given


def test_names_of_rows_are_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
