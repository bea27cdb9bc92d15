"""The estimated peak of a GPU beside that of the step itself, played without memory on torch's meta device.

PYTHONPATH=. python reports/memory/played.py
"""

from __future__ import annotations

import pytest

from lora_bench.bench.budget import budget
from tests.played_steps import played

GIB = 2**30
MODELS = ("llama-3.2-1b", "llama-2-7b", "llama-3-8b")
SIZES = {
    "train": ((1, 64), (1, 512), (8, 512), (4, 2048)),
    "train, checkpointed": ((1, 512), (2, 512), (8, 512)),
    "prefill": ((1, 512), (8, 512)),
    "decode": ((8, 512), (16, 4000)),
}


def main() -> None:
    print("| model | mode | phase | batch x sequence | played, GiB | estimated, GiB | off |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    for model in MODELS:
        for mode in ("full", "lora", "qlora"):
            for phase, sizes in SIZES.items():
                for batch, sequence in sizes:
                    place = {"model": model, "mode": mode, "batch": batch, "sequence": sequence, "rank": 16}
                    name, _, checkpointing = phase.partition(", ")
                    chosen = place | {"phase": name, "dtype": "bf16", "checkpointing": bool(checkpointing)}
                    with pytest.MonkeyPatch.context() as patch:
                        _, peak = played(chosen, patch)
                    found = budget(**chosen, device="cuda").peak  # type: ignore[arg-type]
                    told = f"{peak / GIB:.3f} | {found / GIB:.3f} | {found / peak - 1:+.2%}"
                    print(f"| {model} | {mode} | {phase} | {batch} x {sequence:,} | {told} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
