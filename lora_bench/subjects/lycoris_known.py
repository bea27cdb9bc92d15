"""What is known to fail of LyCORIS, with `bypass_mode` and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.subject import Known
from lora_bench.subjects.convolutions import convolutions, padded_otherwise

if TYPE_CHECKING:
    from lora_bench.case import Case

SMALLEST = "t1 i1 o1 r1 a1 fp64 s0"
NOT_RESTORED = (
    "onfly_restore does nothing on a CPU, where what onfly_merge keeps is the weight itself (no thread found)"
)
BOTH = {
    **{
        f"merge.{check}": Known(NOT_RESTORED, SMALLEST)
        for check in ("unmerge_restores", "cycles_do_not_drift", "after_loading_others", "scaled_merges_and_unmerges")
    },
    **convolutions("merge.unmerge_restores", NOT_RESTORED),
    "dora.unmerge_restores": Known(NOT_RESTORED, f"{SMALLEST} dora"),
    "adapters.partial_merge_keeps_the_others": Known(NOT_RESTORED, f"{SMALLEST} n2"),
    "lifecycle.any_order": Known(
        NOT_RESTORED, f"{SMALLEST} n2 ops=merge,unmerge", where=lambda case: "merge" in case.ops
    ),
}


def _beside_the_base(case: Case) -> bool:
    return case.dilation > 1 or padded_otherwise(case)


WITHOUT_BYPASS = {
    **BOTH,
    **convolutions(
        "forward.matches_definition",
        "a convolution pads with zeros (no thread found)",
        "padding1 {} reflect",
        padded_otherwise,
    ),
    "forward.dropout_only_in_training": Known(
        "without bypass_mode the dropout is not applied, and nothing is said (no thread found)", SMALLEST
    ),
    "dora.is_identity": Known(
        "by design: the magnitude is made in float32, which fp64 shows, and so is the output over 16 bits",
        f"{SMALLEST} dora",
        where=lambda case: case.dtype != "fp32",
    ),
    "dora.matches_definition": Known(
        "over 16 bits it multiplies x by a float32 weight, which raises (no thread found)",
        "t1 i1 o1 r1 a1 bf16 s0 dora",
        where=lambda case: case.dtype in ("bf16", "fp16"),
    ),
    "dora.gradients_match_formulas": Known(
        "by design: it differentiates through the norm, which section 4.3 of the paper only proposes to spare",
        f"{SMALLEST} dora",
    ),
}
WITH_BYPASS = {
    **BOTH,
    **convolutions(
        "forward.matches_definition",
        "lora_down is made without the base's dilation and padding_mode (no thread found)",
        "kernel2 dilation2 {}",
        _beside_the_base,
    ),
    **{
        f"dora.{check}": Known(
            "bypass_mode ignores the magnitude in the forward and not in a merge (no thread found)", f"{SMALLEST} dora"
        )
        for check in ("matches_definition", "gradients_match_formulas")
    },
}
