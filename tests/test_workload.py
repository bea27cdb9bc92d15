"""Workloads and rows: what is measured, as data that other parts key on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from lora_bench.bench.workload import BASE, SETUPS, VERBS, Row, Workload, verbs

SEPARATE = Workload("separate", "prefill", "micro", "fp32", rank=4, batch=3, sequence=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setup": "fused"}, "setup must be one of base, merged, separate, batched, four_bit, got 'fused'"),
        ({"phase": "generate"}, "phase must be one of prefill, decode, switch, train, got 'generate'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"setup": BASE, "rank": -1}, "rank must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"sequence": 1}, "sequence must be at least 2, got 1"),
        ({"adapters": 0}, "adapters must be at least 1, got 0"),
        (
            {"popularity": "pareto"},
            "popularity must be one of distinct, identical, uniform, zipf, got 'pareto'",
        ),
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
        (replace(SEPARATE, setup="batched", adapters=2, popularity="zipf"), "prefill-micro-fp32-r4-b3-s5-n2-zipf"),
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
    assert replace(SEPARATE, phase="switch").tokens == 0


@pytest.mark.parametrize(
    ("popularity", "asked"),
    [
        ("distinct", [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]),
        ("identical", [0] * 10),
    ],
)
def test_a_batch_asks_for_adapters_by_their_popularity(popularity: str, asked: list[int]) -> None:
    assert replace(SEPARATE, setup="batched", batch=10, adapters=4, popularity=popularity).asked == asked


@pytest.mark.parametrize(
    ("popularity", "shares"), [("uniform", [1 / 4] * 4), ("zipf", [12 / 25, 6 / 25, 4 / 25, 3 / 25])]
)
def test_a_random_batch_asks_as_often_as_its_law_says_and_always_the_same(popularity: str, shares: list[float]) -> None:
    batch = 40_000
    workload = replace(SEPARATE, setup="batched", batch=batch, adapters=4, popularity=popularity)
    counts = Counter(workload.asked)

    assert replace(workload, phase="decode").asked == workload.asked
    for adapter, share in enumerate(shares):
        # Five standard deviations of a binomial.
        assert abs(counts[adapter] - batch * share) < 5 * (batch * share * (1 - share)) ** 0.5


def test_a_workload_survives_json() -> None:
    assert Workload(**json.loads(json.dumps(SEPARATE.as_dict()))) == SEPARATE


def test_a_row_s_base_is_the_same_model_in_the_same_phase_without_an_adapter() -> None:
    row = Row("peft", replace(SEPARATE, setup="batched", phase="decode", adapters=2, popularity="zipf"))

    assert row.base() == Row(BASE, Workload(BASE, "decode", "micro", "fp32", rank=0, batch=3, sequence=5))
    assert row.base().base() == row.base()
    assert row.base().comparison == row.comparison


def test_two_arms_that_are_measured_apart_have_two_names() -> None:
    changes: list[dict[str, Any]] = [
        {"setup": "batched", "adapters": 8, "popularity": "zipf"},
        {"setup": "batched", "adapters": 8},
        {"setup": "batched", "adapters": 8, "phase": "switch"},
        {"rank": 8},
        {},
    ]
    rows = [Row("peft", replace(SEPARATE, **change)) for change in changes]

    assert len({row.arm for row in rows}) == len({row.arm_name for row in rows}) == len(rows)
    assert rows[0].arm_name == "peft batched r4 n8 zipf"
    assert rows[2].arm_name == "peft batched r4 n8 to switch"


def test_a_switch_is_compared_with_a_token_that_the_base_reads() -> None:
    switch = Row("peft", replace(SEPARATE, phase="switch"))

    assert switch.base() == Row("peft", replace(SEPARATE, phase="decode")).base()


@pytest.mark.parametrize(
    ("change", "together"),
    [
        ({"phase": "decode"}, True),
        ({"phase": "switch"}, True),
        ({"setup": "four_bit", "rank": 8}, True),
        ({"setup": "batched", "adapters": 8, "popularity": "zipf"}, True),
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


@pytest.mark.parametrize(
    ("change", "together"),
    [
        ({"phase": "decode"}, True),
        ({"phase": "switch"}, False),
        ({"setup": "merged"}, False),
        ({"rank": 8}, False),
        ({"adapters": 2}, False),
        ({"popularity": "zipf"}, False),
    ],
)
def test_rows_of_one_subject_set_up_rank_and_adapters_share_a_model(change: dict[str, Any], together: bool) -> None:
    row = Row("peft", SEPARATE)

    assert (row.arm == Row("peft", replace(SEPARATE, **change)).arm) == together
    assert row.arm != Row("reference", SEPARATE).arm


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (Row("peft", SEPARATE), "peft separate r4"),
        (Row("peft", replace(SEPARATE, setup="batched", adapters=8)), "peft batched r4 n8"),
        (Row("peft", SEPARATE).base(), "base"),
    ],
)
def test_an_arm_has_a_name_for_whoever_waits(row: Row, name: str) -> None:
    assert row.arm_name == name


def test_a_row_s_text_says_set_up_subject_and_workload() -> None:
    assert str(Row("mine.py:LORA", SEPARATE)) == "separate[mine.py:LORA-prefill-micro-fp32-r4-b3-s5]"


def test_every_set_up_says_what_it_needs() -> None:
    assert VERBS.keys() == set(SETUPS) - {BASE}


@pytest.mark.parametrize(
    ("setup", "phase", "needed"),
    [
        ("separate", "switch", ((),)),
        ("merged", "decode", (("merge_and_unload",), ("merge",))),
        ("merged", "switch", (("merge", "unmerge"),)),
        ("batched", "switch", (("pool", "route"),)),
    ],
)
def test_to_switch_what_is_merged_it_must_be_unmerged(setup: str, phase: str, needed: tuple[object, ...]) -> None:
    assert verbs(replace(SEPARATE, setup=setup, phase=phase)) == needed


def test_a_single_layer_is_the_only_one_that_is_adapted() -> None:
    layer: dict[str, Any] = {"model": "linear-8x16", "dtype": "fp32", "rank": 4, "batch": 2, "sequence": 6}

    assert str(Workload("separate", "decode", **layer)) == "decode-linear-8x16-fp32-r4-b2-s6"
    assert Workload("separate", "decode", **layer).adapted == ("linear",)
    with pytest.raises(ValueError, match=r"^targets must be all for linear-8x16, which is one layer, got 'qv'$"):
        Workload("separate", "decode", targets="qv", **layer)
