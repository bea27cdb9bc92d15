"""Proofs of layers as wide as real models', in the dtype that they are served in: nothing honest is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lora_bench.bench import ready
from lora_bench.bench.workload import Row, Workload
from lora_bench.bounds import Arithmetic
from lora_bench.models.bases import missing

if TYPE_CHECKING:
    import torch

RIGHT = [
    *((setup, "prefill") for setup in ("separate", "merged", "batched", "four_bit")),
    *((setup, "decode") for setup in ("separate", "merged", "batched", "four_bit")),
    *((setup, "switch") for setup in ("separate", "merged", "batched")),
    ("separate", "train"),
]


def of_width(subject: str, setup: str, phase: str, *, model: str = "linear-4096x256", rank: int = 64) -> Row:
    adapters = 2 if setup == "batched" else 1
    return Row(subject, Workload(setup, phase, model, "bf16", rank, batch=4, sequence=8, adapters=adapters))


def proven(row: Row) -> Any:
    subject, arm = ready.build(ready.build_base(row, "cpu"), row)
    return ready.ready_row(row, subject, arm)[1]


@pytest.mark.parametrize("subject", ["reference", "peft"])
@pytest.mark.parametrize(("setup", "phase"), RIGHT)
def test_a_wide_layer_in_16_bits_is_proven(
    monkeypatch: pytest.MonkeyPatch, setup: str, phase: str, subject: str
) -> None:
    if setup == "four_bit" and subject == "peft" and (reason := missing("linear4bit")):
        pytest.skip(reason)

    def on_cuda(dtype: torch.dtype, _device: str, **how: Any) -> Arithmetic:
        return of(dtype, "cuda", **how)

    of = Arithmetic.of  # also where sums may be split, and their parts stored: as strict as a GPU's must be
    found = proven(of_width(subject, setup, phase))
    monkeypatch.setattr(Arithmetic, "of", on_cuda)
    there = proven(of_width(subject, setup, phase))

    assert found.error_ratio <= 1 < found.visibility
    assert there.error_ratio <= 1 < there.visibility
    assert there.error_ratio <= found.error_ratio
