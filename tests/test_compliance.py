"""The verdicts on many subjects as a table and as JSON."""

from __future__ import annotations

import json

from lora_bench import Case
from lora_bench.bounds import Deviation
from lora_bench.conformance import Verdict, find_check
from lora_bench.conformance.verdict import WORDING
from lora_bench.report.compliance import CELL, SCHEMA, as_json, as_markdown, versions

DEFINED, MERGED = find_check("forward.matches_definition"), find_check("merge.equals_definition@conv2d")
FAILED = Verdict(
    "acme",
    DEFINED,
    "fails",
    Case(tokens=1, d_in=1, d_out=1, rank=1, alpha=1.0),
    "y",
    Deviation((0, 0), 2.0, 1.0, 1.0, 1e-15),
    resembles="`scale_is_alpha` (alpha is not divided, residual 0e+00)",
)
VERDICTS = {
    "reference": [Verdict("reference", DEFINED, "conforms"), Verdict("reference", MERGED, "conforms")],
    "acme": [FAILED, Verdict("acme", find_check("merge.keeps_bias"), "known", because="it is lost (acme#1)")],
}


def test_every_status_has_a_cell_and_a_word() -> None:
    assert CELL.keys() == WORDING.keys()


def test_the_table_has_a_column_for_each_subject_and_says_what_failed_and_what_is_known() -> None:
    table = as_markdown(VERDICTS)

    assert "| check | reference | acme |\n|---|---|---|\n| forward.matches_definition | yes | **NO** |\n" in table
    assert "| merge.equals_definition@conv2d | yes |  |\n" in table
    assert "| merge.keeps_bias |  | known |\n" in table
    assert "## acme\n\nacme 0 of 2 checks conform, 1 fail, 1 known to fail\n" in table
    assert f"```\n{FAILED}\n```\n" in table
    assert "- merge.keeps_bias: it is lost (acme#1)\n" in table
    assert f"torch {versions()['torch']}" in table


def test_the_json_holds_everything_and_is_valid() -> None:
    kept = json.loads(json.dumps(as_json(VERDICTS), allow_nan=False))

    assert kept["schema"] == SCHEMA
    assert kept["subjects"]["acme"][0] == {
        "check": "forward.matches_definition",
        "claim": DEFINED.claim,
        "status": "fails",
        "case": "t1 i1 o1 r1 a1 fp64 s0",
        "deviation": {"tensor": "y", "error": 1.0, "allowed": 1e-15},
        "because": "",
        "resembles": "`scale_is_alpha` (alpha is not divided, residual 0e+00)",
        "replay": "lora-bench replay acme forward.matches_definition 't1 i1 o1 r1 a1 fp64 s0'",
    }
    assert kept["subjects"]["acme"][1]["replay"] is None


def test_an_error_without_end_is_still_json() -> None:
    endless = Verdict("acme", DEFINED, "fails", Case(), "y", Deviation((0,), float("nan"), 1.0, float("inf"), 1e-15))

    kept = json.loads(json.dumps(as_json({"acme": [endless]}), allow_nan=False))

    assert kept["subjects"]["acme"][0]["deviation"] == {"tensor": "y", "error": None, "allowed": 1e-15}
