"""Workloads and rows: what is measured, as data that other parts key on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lora_bench.bench.workload import BASE, SETUPS, VERBS, Row, Workload

SEPARATE = Workload("separate", "prefill", "micro", "fp32", rank=4, batch=3, sequence=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setup": "fused"}, "setup must be one of base, merged, separate, batched, four_bit, got 'fused'"),
        ({"phase": "generate"}, "phase must be one of prefill, decode, train, got 'generate'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"setup": BASE, "rank": -1}, "rank must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"sequence": 1}, "sequence must be at least 2, got 1"),
        ({"adapters": 0}, "adapters must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SEPARATE, **change)


@pytest.mark.parametrize(
    ("workload", "text"),
    [
        (SEPARATE, "prefill-micro-fp32-r4-b3-s5"),
        (replace(SEPARATE, setup="batched", adapters=2), "prefill-micro-fp32-r4-b3-s5-n2"),
        (Row("peft", SEPARATE).base().workload, "prefill-micro-fp32-b3-s5"),
        (replace(SEPARATE, model="some/folder/llama/"), "prefill-llama-fp32-r4-b3-s5"),
        (Row("peft", replace(SEPARATE, model="checkpoints/r0")).base().workload, "prefill-r0-fp32-b3-s5"),
    ],
)
def test_text_is_short_and_stable_for_it_names_benchmarks(workload: Workload, text: str) -> None:
    assert str(workload) == text


def test_a_base_of_any_rank_has_a_text() -> None:
    assert str(replace(SEPARATE, setup=BASE, rank=4)) == "prefill-micro-fp32-b3-s5"


def test_a_step_reads_the_batch_s_tokens_and_decoding_one_of_each_sequence() -> None:
    assert SEPARATE.tokens == 15
    assert replace(SEPARATE, phase="train").tokens == 15
    assert replace(SEPARATE, phase="decode").tokens == 3


def test_a_workload_survives_json() -> None:
    assert Workload(**json.loads(json.dumps(SEPARATE.as_dict()))) == SEPARATE


def test_a_row_s_base_is_the_same_model_in_the_same_phase_without_an_adapter() -> None:
    row = Row("peft", replace(SEPARATE, setup="batched", phase="decode", adapters=2))

    assert row.base() == Row(BASE, Workload(BASE, "decode", "micro", "fp32", rank=0, batch=3, sequence=5))
    assert row.base().base() == row.base()
    assert row.base().comparison == row.comparison


@pytest.mark.parametrize(
    ("change", "together"),
    [
        ({"phase": "decode"}, True),
        ({"setup": "four_bit", "rank": 8}, True),
        ({"phase": "train"}, False),
        ({"dtype": "bf16"}, False),
        ({"model": "tiny"}, False),
        ({"batch": 4}, False),
        ({"sequence": 6}, False),
    ],
)
def test_rows_that_share_a_base_model_and_its_input_are_compared(change: dict[str, Any], together: bool) -> None:
    first, second = Row("peft", SEPARATE), Row("reference", replace(SEPARATE, **change))

    assert (first.comparison == second.comparison) == together


def test_rows_of_one_subject_and_set_up_share_a_model() -> None:
    row = Row("peft", SEPARATE)

    assert row.arm == Row("peft", replace(SEPARATE, phase="decode")).arm
    assert row.arm != Row("reference", SEPARATE).arm
    assert row.arm != Row("peft", replace(SEPARATE, setup="merged")).arm


def test_a_row_s_text_says_set_up_subject_and_workload() -> None:
    assert str(Row("mine.py:LORA", SEPARATE)) == "separate[mine.py:LORA-prefill-micro-fp32-r4-b3-s5]"


def test_every_set_up_says_what_it_needs() -> None:
    assert VERBS.keys() == set(SETUPS) - {BASE}
