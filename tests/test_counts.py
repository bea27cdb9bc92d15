"""The least that a workload computes and moves, worked out by hand for the micro model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_bench.bench.counts import Bound, Ceilings, Count, bounded, budget_of, count, reconciled
from lora_bench.bench.workload import Workload

# micro: hidden 64, intermediate 128, 2 layers, 4 heads of 16, 2 key-value heads, 128 words; fp32.
LINEARS = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
WIDTHS = 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
HEAD = 128 * 64
NORMS = 5 * 64
FREQUENCIES = 2 * 8  # of the rotary embedding, and a copy
BASE = Workload("base", "prefill", "micro", "fp32", rank=0, batch=3, sequence=5)
SEPARATE = replace(BASE, setup="separate", rank=4)


def test_a_prefill_computes_every_product_once() -> None:
    attention = 4 * 2 * 64 * 3 * (5 * 6 // 2)

    assert count(BASE).flops == 2 * (15 * LINEARS + 3 * HEAD) + attention


def test_an_adapter_beside_the_base_adds_its_two_products_and_a_merged_one_nothing() -> None:
    assert count(SEPARATE).flops - count(BASE).flops == 2 * 15 * 4 * WIDTHS
    assert count(replace(SEPARATE, setup="merged")) == count(BASE)


def test_decoding_reads_the_weights_the_cache_and_the_adapters_asked_for() -> None:
    decode = replace(BASE, phase="decode")
    cache = 2 * 2 * 3 * (5 + 1) * 32
    batched = replace(SEPARATE, setup="batched", phase="decode", adapters=2)

    assert count(decode).bytes == 4 * (LINEARS + HEAD + NORMS + FREQUENCIES + cache)
    assert count(decode).flops == 2 * 3 * (LINEARS + HEAD) + 4 * 2 * 64 * 3 * 6
    assert count(batched).bytes - count(decode).bytes == 4 * 2 * 4 * WIDTHS
    assert count(replace(batched, popularity="identical")).bytes - count(decode).bytes == 4 * 4 * WIDTHS


def test_a_4_bit_base_is_read_in_4_bits() -> None:
    dense, packed = (count(replace(SEPARATE, phase="decode", setup=setup)).bytes for setup in ("separate", "four_bit"))

    assert 0.85 < (dense - packed) / (4 * LINEARS) < 0.875  # 7 / 8, without the blocks' statistics


def test_training_goes_back_through_the_base_without_its_weights_gradients() -> None:
    full, lora = (count(replace(own, phase="train")) for own in (BASE, SEPARATE))
    base = 2 * 15 * (LINEARS + HEAD)
    attention = 3 * 4 * 2 * 64 * 3 * 15

    assert full.flops == 3 * base + attention
    assert lora.flops == 2 * base + attention + 3 * 2 * 15 * 4 * WIDTHS


def test_of_a_switch_and_of_unknown_shapes_nothing_is_counted() -> None:
    with pytest.raises(ValueError, match=r"^of a switch nothing is counted$"):
        count(replace(SEPARATE, phase="switch"))
    with pytest.raises(ValueError, match="no-such-model"):
        count(replace(BASE, model="no-such-model"))


def test_the_bound_is_the_slower_of_moving_and_computing() -> None:
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)

    assert Count(flops=300, bytes=20).bound(ceilings) == Bound(3.0, "FLOPs")
    assert Count(flops=100, bytes=20).bound(ceilings) == Bound(2.0, "bytes")


def test_only_the_targets_are_adapted_and_quantised() -> None:
    some = replace(SEPARATE, targets="qv")
    widths = 2 * ((64 + 64) + (64 + 32))
    decode = replace(BASE, phase="decode")
    packed = replace(some, setup="four_bit", phase="decode")

    assert count(some).flops - count(BASE).flops == 2 * 15 * 4 * widths
    saved = count(decode).bytes + 4 * 4 * widths - count(packed).bytes
    assert 0.85 < saved / (4 * 2 * (64 * 64 + 64 * 32)) < 0.875


def test_what_was_measured_stands_beside_what_was_worked_out() -> None:
    on_a_cpu = reconciled(SEPARATE, "cpu", {"resident_peak_bytes": 5_000_000})
    on_a_gpu = reconciled(SEPARATE, "cuda:0", {"allocated_peak_bytes": 4_000_000})
    budget = on_a_cpu["budget"]

    assert budget["adapters"] == 4 * 4 * WIDTHS
    assert on_a_cpu["unexplained_bytes"] == 5_000_000 - budget["peak"]
    assert on_a_gpu["unexplained_bytes"] == 4_000_000 - on_a_gpu["budget"]["peak"]
    assert "unexplained_bytes" not in reconciled(SEPARATE, "cuda", {"allocated_peak_bytes": "unavailable (lost)"})
    assert not reconciled(replace(SEPARATE, phase="switch"), "cpu", {"resident_peak_bytes": 1})


def test_a_merged_model_keeps_no_adapter() -> None:
    assert budget_of(replace(SEPARATE, setup="merged")) == budget_of(BASE)


LAYER = replace(BASE, model="linear-24x40")


def test_a_single_layer_computes_one_product_and_an_adapter_two_more() -> None:
    separate = replace(LAYER, setup="separate", rank=4)
    full, lora = (count(replace(own, phase="train")).flops for own in (LAYER, separate))

    assert count(LAYER).flops == 2 * 15 * 24 * 40
    assert count(replace(LAYER, phase="decode")).flops == 2 * 3 * 24 * 40
    assert count(separate).flops - count(LAYER).flops == 2 * 15 * 4 * (24 + 40)
    assert full == 3 * 2 * 15 * 24 * 40
    assert lora == 2 * 2 * 15 * 24 * 40 + 3 * 2 * 15 * 4 * (24 + 40)


def test_a_single_layer_reads_its_weight_and_what_goes_in_and_out() -> None:
    decode = replace(LAYER, phase="decode")
    batched = replace(decode, setup="batched", rank=4, adapters=2)

    assert count(decode).bytes == 4 * (24 * 40 + 3 * (24 + 40))
    assert count(batched).bytes - count(decode).bytes == 4 * 2 * 4 * (24 + 40)
    # Weight twice; its gradient, moments and itself by AdamW; x written and read; y, dL/dy, dL/dx.
    assert count(replace(LAYER, phase="train")).bytes == 4 * ((2 + 8) * 24 * 40 + 15 * (2 * 24 + 2 * 40 + 24))


@pytest.mark.parametrize(("share", "by"), [(None, "bytes"), (0.5, "bytes"), (0.51, "launches")])
def test_what_waits_for_launches_more_than_half_of_the_time_is_bound_by_them(share: float | None, by: str) -> None:
    ceilings = {"fp32": Ceilings(bytes_per_second=1e6, flops_per_second=1e12)}
    seconds = count(BASE).bytes / 1e6

    assert bounded(BASE, ceilings, share) == Bound(seconds, by)
    assert bounded(BASE, {}, share) is None
