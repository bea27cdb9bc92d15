"""The command line: options that are refused in one sentence, runs without and with measuring, and what they leave."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_bench import subjects
from lora_bench.bench.workload import Row, Workload

ROOT = Path(__file__).parents[1]
GPU = "suites/gpu"
SIZES = ("--lora-rank=4", "--lora-adapters=2", "--lora-batch=2", "--lora-sequence=8")
SMALL = ("--lora-device=cpu", "--lora-model=micro", *SIZES)

PLANTED = """
from dataclasses import replace

from lora_bench import REFERENCE
from lora_bench.reference import LoraLinear


class Dropped(LoraLinear):
    def forward(self, x):
        return self.base_layer(x)


DROPPED = replace(REFERENCE, name="dropped", wrap=Dropped)
NO_SUBJECT = 1
"""


@dataclass
class Run:
    """One run of pytest within this process: exit code, what it printed, and each test's report by its name."""

    code: int = -1
    text: str = ""
    reports: dict[str, pytest.TestReport] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.reports[report.nodeid.rpartition("::")[2]] = report

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(report.outcome for report in self.reports.values())


def run(*arguments: str) -> Run:
    """`pytest` with these arguments in the project's root, as if it were typed there."""
    found, printed = Run(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(ROOT), redirect_stdout(printed), redirect_stderr(printed):
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        patch.setenv("COLUMNS", "200")
        found.code = int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[found]))
    found.text = printed.getvalue()
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "planted.py"
    path.write_text(PLANTED)
    return path


# --- refused --------------------------------------------------------------------------------------------------------

REFUSED = {
    "subject, near": ("--lora-subject=pefd", "no subject is called 'pefd': known are * (nearest: peft)"),
    "subject, far": ("--lora-subject=zzz", "no subject is called 'zzz': known are *reference"),
    "subject, no file": ("--lora-subject=absent.py:X", "'absent.py:X' cannot be loaded: * there is no file absent.py"),
    "subject, no attribute": ("--lora-subject={planted}:X", "has no 'X'; its subjects are *DROPPED"),
    "subject, no subject": ("--lora-subject={planted}:NO_SUBJECT", "wanted a lora_bench.Subject, got a int"),
    "subject, no module": ("--lora-subject=absent.module:X", "'absent.module:X' cannot be loaded: ModuleNotFoundError"),
    "model, near": ("--lora-model=mikro", "no model is called 'mikro' (nearest: micro)"),
    "model, no checkpoint": ("--lora-model=tests", "'tests' is no checkpoint: the directory has no config.json"),
    "rank": ("--lora-rank=0", "--lora-rank must be at least 1, got 0"),
    "adapters": ("--lora-adapters=0", "--lora-adapters must be at least 1, got 0"),
    "batch": ("--lora-batch=0", "--lora-batch must be at least 1, got 0"),
    "sequence": ("--lora-sequence=1", "--lora-sequence must be at least 2, got 1"),
    "dtype": ("--lora-dtype=fp8", "--lora-dtype must be one of fp64, fp32, bf16, fp16, got 'fp8'"),
    "no CUDA": ("--lora-device=cuda", "--lora-device cuda: torch * sees 0 CUDA devices"),
    "no second CUDA device": ("--lora-device=cuda:1", "--lora-device cuda:1: torch * sees 0 CUDA devices"),
    "device": ("--lora-device=tpu", "--lora-device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "device, no index": ("--lora-device=cuda:", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
    "device, wrong index": ("--lora-device=cuda:-1", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
    "device, a CPU's index": ("--lora-device=cpu:0", "--lora-device must be auto, cpu, cuda or cuda:N, got 'cpu:0'"),
    "seconds": ("--benchmark --lora-seconds=0", "--lora-seconds must be above 0, got 0"),
    "seconds, no number": ("--benchmark --lora-seconds=nan", "--lora-seconds must be above 0, got nan"),
    "baseline, missing": ("--benchmark --lora-baseline=absent.json", "there is no file absent.json"),
    "baseline, other": ("--benchmark --lora-baseline=pyproject.toml", "pyproject.toml is no JSON of *: JSONDecode"),
    "baseline, unmeasured": ("--lora-baseline=absent.json", "--lora-baseline needs --benchmark"),
    "output is a file": ("--benchmark --lora-output={planted}", "--lora-output *planted.py: File exists"),
    "output below a file": ("--benchmark --lora-output={planted}/x", "--lora-output *planted.py/x: Not a directory"),
    "xdist": ("--benchmark -n 2", "--benchmark cannot measure under xdist"),
    "xdist by its nodes": ("--benchmark --dist=load --tx=2*popen", "--benchmark cannot measure under xdist"),
    "no pytest-benchmark": ("--benchmark -p no:benchmark", "--benchmark needs pytest-benchmark"),
    "disabled": ("--benchmark --benchmark-disable", "drop --benchmark-disable"),
    "skipped": ("--benchmark --benchmark-skip", "drop --benchmark-skip"),
    "only": ("--benchmark --benchmark-only", "drop --benchmark-only"),
    "profiled": ("--benchmark --benchmark-cprofile=tottime", "drop --benchmark-cprofile"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_option_is_refused_in_one_sentence(
    options: str, sentence: str, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    output = [] if "--lora-output" in options else [f"--lora-output={tmp_path / 'out'}"]
    found = run(GPU, *output, *options.format(planted=planted).split())

    assert found.code == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in found.text.splitlines() if line)
    assert fnmatchcase(line, f"ERROR: *{sentence}*")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_worker_of_xdist_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    found = python("-m", "pytest", GPU, "--benchmark")

    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark cannot measure under xdist" in found.stderr


# --- what merely has the plugin -------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_the_plugin_imports_no_torch() -> None:
    found = python("-c", "import lora_bench.plugin, sys; print('torch' in sys.modules)")

    assert (found.returncode, found.stdout.split()) == (0, ["False"])


def test_a_run_of_other_tests_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("import sys\n\ndef test_other():\n    assert 'torch' not in sys.modules\n")
    found = python(
        "-m", "pytest", "-p", "lora_bench.plugin", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)
    )

    assert found.returncode == 0, found.stdout
    assert "1 passed" in found.stdout
    assert "lora-bench: device" not in found.stdout


# --- collected ------------------------------------------------------------------------------------------------------


def collected(*arguments: str) -> list[str]:
    found = run(GPU, *SMALL, "--collect-only", "-q", *arguments)
    assert found.code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return [line.rpartition("::")[2] for line in found.text.splitlines() if "::" in line]


BASES = [f"test_base[{phase}-micro-fp32-b2-s8]" for phase in ("prefill", "decode", "train")]


def test_a_selection_keeps_the_base_of_what_it_selects() -> None:
    separate = [
        f"test_separate[{name}-{phase}-micro-fp32-r4-b2-s8]"
        for phase in ("prefill", "decode")
        for name in ("reference", "peft")
    ]

    assert collected("-k", "separate") == [*BASES[:2], *separate]
    assert collected("-k", "peft and train") == [BASES[2], "test_training[peft-train-micro-fp32-r4-b2-s8]"]
    assert collected("-k", "base") == BASES
    assert collected("-k", "nothing_of_the_kind") == []


def test_a_subject_s_rows_are_named_by_it_and_every_one_is_there(planted: Path) -> None:
    names = collected(f"--lora-subject={planted}:DROPPED", "--lora-subject=reference", "--lora-subject=reference")

    assert len(names) == len(set(names)) == 3 + 2 * (3 * 2 + 2 + 1)
    assert "test_batched[DROPPED-decode-micro-fp32-r4-b2-s8-n2]" in names


def test_collecting_measures_nothing_and_writes_no_record(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, "--collect-only", "--benchmark", f"--lora-output={tmp_path}")

    assert found.code == 0
    assert "building" not in found.text
    assert not list(tmp_path.iterdir())


def test_a_run_that_selects_nothing_writes_no_record(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, "--benchmark", "-k", "nothing_of_the_kind", f"--lora-output={tmp_path}")

    assert found.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert not list(tmp_path.iterdir())


def test_the_settings_are_told_and_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run(GPU, "--collect-only", "--lora-rank=4")

    assert "lora-bench: device=cpu model=tiny dtype=fp32 rank=4 batch=8 sequence=64 adapters=8" in found.text
    assert "lora-bench: no CUDA device: a small model on the CPU; nothing here speaks of a GPU" in found.text
    assert "no CUDA device" not in run(GPU, "--collect-only", "--lora-device=cpu").text


# --- unmeasured -----------------------------------------------------------------------------------------------------


def test_an_unmeasured_run_proves_every_row_and_writes_nothing(tmp_path: Path) -> None:
    found = run(GPU, *SMALL, f"--lora-output={tmp_path / 'out'}")

    assert found.code == 0
    assert found.outcomes == {"passed": 21}
    assert not (tmp_path / "out").exists()
    assert "records:" not in found.text


def test_an_unmeasured_row_that_is_wrong_fails_shortly_with_its_layer(planted: Path) -> None:
    found = run(
        GPU, *SMALL, "-k", "decode and not batched", f"--lora-subject={planted}:DROPPED", "--lora-subject=reference"
    )
    wrong = {name for name, report in found.reports.items() if report.outcome == "failed"}

    assert found.code == 1
    # Merged it is right: only its own forward drops the adapter.
    assert wrong == {f"test_{setup}[DROPPED-decode-micro-fp32-r4-b2-s8]" for setup in ("separate", "four_bit")}
    for name in wrong:
        text = str(found.reports[name].longrepr)
        assert len(text.splitlines()) == 2
        assert "model.layers.0.self_attn.q_proj: found " in text
    assert "Traceback" not in found.text


# --- measured -------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    run: Run
    document: dict[str, Any]
    path: Path
    records: list[dict[str, Any]]


def measure(folder: Path, *arguments: str) -> Measured:
    path, output = folder / "out.json", folder / "records"
    options = (f"--benchmark-json={path}", f"--benchmark-storage={folder / 'store'}", f"--lora-output={output}")
    found = run(*SMALL, "--benchmark", "--lora-seconds=0.1", *options, *arguments)
    (records,) = output.iterdir()
    return Measured(found, json.loads(path.read_text()), path, list(map(json.loads, records.read_text().splitlines())))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("measured"), GPU, "--lora-subject=reference", "--benchmark-save=kept")


def place(of: dict[str, Any]) -> Row:
    return Row(of["subject"], Workload(**of["workload"]))


def test_a_measured_run_passes_and_prints_its_progress_and_its_table(measured: Measured) -> None:
    text = measured.run.text

    assert measured.run.code == 0
    assert measured.run.outcomes == {"passed": 12}
    for phrase in (
        "building and proving 5 arms of micro",
        "reference four_bit is right: 28 checks",
        "timing decode: 5 rows taking turns",
        "memory of reference merged, in a process of its own",
        "\ndecode: micro fp32, batch 2 x 8 tokens, rank 4, 2 adapters batched, device=cpu\n",
        "\ntrain: micro fp32, batch 2 x 8 tokens, rank 4, device=cpu\n",
        "\nfull fine-tuning ",
        "\nrecords: ",
    ):
        assert phrase in text
    assert "Name (time in" not in text  # pytest-benchmark's own table says less


def test_raw_samples_reach_the_json_bit_for_bit(measured: Measured) -> None:
    benchmarks = {place(benchmark["extra_info"]): benchmark for benchmark in measured.document["benchmarks"]}
    latencies = {place(record): record for record in measured.records if record["quantity"] == "latency"}

    assert len(benchmarks) == 12
    assert benchmarks.keys() == latencies.keys()
    for row, benchmark in benchmarks.items():
        assert benchmark["stats"]["data"] == latencies[row]["samples_seconds"]
        assert 10 <= len(benchmark["stats"]["data"]) <= 200
        assert benchmark["group"] == row.workload.phase
        info = benchmark["extra_info"]
        assert info["memory"]["parameter_bytes"] > 0
        assert info["memory"]["resident_peak_bytes"]
        assert info["device"] == "cpu"
        assert info["fingerprint"]["hard"]["torch"] == torch.__version__
        assert (info["ratio_to_base"]["median"] == 1) == (row.subject == "base")
        assert info["proof"] is None or info["proof"]["error_ratio"] <= 1


def test_a_saved_run_keeps_its_raw_samples(measured: Measured) -> None:
    (saved,) = (measured.path.parent / "store").rglob("0001_kept.json")
    kept = {benchmark["name"]: benchmark["stats"]["data"] for benchmark in json.loads(saved.read_text())["benchmarks"]}

    assert kept == {benchmark["name"]: benchmark["stats"]["data"] for benchmark in measured.document["benchmarks"]}


def test_every_row_has_one_record_of_latency_and_one_of_memory(measured: Measured) -> None:
    counts = Counter((place(record), record["quantity"]) for record in measured.records)

    assert len(counts) == 24
    assert set(counts.values()) == {1}
    assert {quantity for _, quantity in counts} == {"latency", "memory"}
    assert {record["device"] for record in measured.records} == {"cpu"}
    assert {record["fingerprint"]["hard"]["device"] for record in measured.records} == {"cpu"}
    assert len({record["run_id"] for record in measured.records}) == 1


@pytest.fixture
def baseline(measured: Measured, tmp_path: Path) -> Path:
    """The measured run's file with nothing but decoding with a separate adapter."""
    rows = measured.document["benchmarks"]
    chosen = [row for row in rows if row["name"].startswith("test_separate[reference-decode-")]
    (tmp_path / "baseline.json").write_text(json.dumps({"benchmarks": chosen}))
    return tmp_path / "baseline.json"


def test_a_run_beside_itself_is_a_pass_or_a_named_regression(
    baseline: Path, measured: Measured, tmp_path: Path
) -> None:
    store = measured.path.parent / "store"
    options = ("-k", "reference-decode", "--lora-subject=reference", f"--lora-baseline={baseline}", "-p", "no:capture")
    compare = ("--benchmark-compare=0001", f"--benchmark-storage={store}")
    found = measure(tmp_path, "suites/gpu/test_separate.py", *options, *compare).run
    lines = found.text.partition(f"against {baseline}")[2].splitlines()
    verdicts = [line for line in lines if " separate[reference-decode-micro-fp32-r4-b2-s8]: " in line]

    assert [line.partition("]: ")[2].split()[0] for line in verdicts] == ["parameter_bytes", "x"]
    assert "NOT COMPARABLE" not in found.text
    assert "test_separate[reference-decode-micro-fp32-r4-b2-s8] (0001_kept)" in found.text
    assert verdicts[0].startswith("pass ")
    # Its ratio of 10 samples of a millisecond may be off on a busy machine: then it is called so.
    assert found.code == int(verdicts[1].startswith("REGRESSION"))


def test_collecting_beside_a_baseline_judges_nothing(baseline: Path, tmp_path: Path) -> None:
    options = ("--benchmark", f"--lora-baseline={baseline}", f"--lora-output={tmp_path / 'out'}")
    found = run(GPU, *SMALL, "--collect-only", *options)

    assert found.code == 0
    assert "NOT COMPARABLE" not in found.text


def test_a_shipped_subject_that_is_not_installed_is_a_skip_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subjects, "find_spec", lambda _: None)
    found = run("suites/gpu/test_separate.py", *SMALL, "-k", "decode", "--lora-subject=loralib")
    (skipped,) = found.reports.values()

    assert found.code == 0
    assert "Skipped: loralib is not installed: pip install lora-bench[loralib]" in str(skipped.longrepr)


def test_a_baseline_that_nothing_was_compared_with_is_no_pass(baseline: Path, tmp_path: Path) -> None:
    options = ("--benchmark", f"--lora-baseline={baseline}", f"--lora-output={tmp_path / 'out'}")
    found = run("tests/test_workload.py", "-k", "json", *options)

    assert found.outcomes == {"passed": 1}
    assert found.code == 6
    assert "NOT COMPARABLE separate[reference-decode-micro-fp32-r4-b2-s8]: missing from this run" in found.text


def test_a_wrong_subject_fails_its_row_shortly_and_costs_no_other(planted: Path, tmp_path: Path) -> None:
    chosen = (f"--lora-subject={planted}:DROPPED", "--lora-subject=reference", "--lora-subject=loralib")
    found = measure(tmp_path, "suites/gpu/test_separate.py", "suites/gpu/test_batched.py", "-k", "decode", *chosen)
    (wrong,) = (report for report in found.run.reports.values() if report.outcome == "failed")
    (skipped,) = (report for report in found.run.reports.values() if report.outcome == "skipped")

    assert found.run.code == 1
    assert found.run.outcomes == {"passed": 4, "failed": 1, "skipped": 1}
    assert wrong.nodeid.endswith("test_separate[DROPPED-decode-micro-fp32-r4-b2-s8]")
    assert re.fullmatch(
        rf"separate\[{planted}:DROPPED-decode-\S+\]\n  Wrong: model\.layers\.0\.self_attn\.q_proj: found .*",
        str(wrong.longrepr),
    )
    assert "Traceback" not in found.run.text
    assert re.search(r"^separate +\S+ +failed$", found.run.text, re.MULTILINE)
    assert skipped.nodeid.endswith("test_batched[loralib-decode-micro-fp32-r4-b2-s8-n2]")
    assert "Skipped: loralib does not offer pool, route" in str(skipped.longrepr)
    assert [record["kind"] for record in found.records if record["quantity"] == "failure"] == ["wrong"]
