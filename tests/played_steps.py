"""The steps of the suite played without memory, on torch's meta device, counting the bytes that a GPU would hold.

On "meta" tensors have sizes and no values, and operations, backward ones too, make and free what they would elsewhere.
Where a GPU goes another way it is led there: sdpa to FlashAttention, AdamW to all tensors at once. What cannot be seen
is what a kernel takes within itself.
"""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_bench.bench.arm import Arm, make_step, tensors_of, torch_dtype
from lora_bench.bench.workload import Workload
from lora_bench.models.bases import quantise
from lora_bench.models.build import build
from lora_bench.models.inject import adapt
from lora_bench.reference import REFERENCE, four_bit
from lora_bench.reference.nf4 import BLOCK, NESTED_BLOCK, Nf4
from lora_bench.spec import LoraSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pytest

GRAIN = 512
"""Bytes that torch's CUDA allocator rounds up to."""
SETUPS = {"lora": "separate", "qlora": "four_bit", "full": "base"}


class LiveBytes(TorchDispatchMode):
    """Counts the storages of meta tensors, each once and for as long as it lives: how many bytes now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def hold(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                self._held[key] = math.ceil(storage.nbytes() / GRAIN) * GRAIN
                self.now += self._held[key]
                weakref.finalize(storage, self._let_go, key)
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int) -> None:
        self.now -= self._held.pop(key)

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            return True  # transformers asks whether the positions are those of a single text
        out = operation(*args, **(kwargs or {}))
        self.hold((out,) if isinstance(out, Tensor) else tree_leaves(out))
        return out


def played(choices: Mapping[str, Any], patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of the model, and the peak of its step, measured as `peak_memory` does; `choices` are those of `budget`."""
    _as_on_a_gpu(patch)
    fields = dict(choices)
    mode, checkpointing = fields.pop("mode"), fields.pop("checkpointing", False)
    workload = Workload(SETUPS[mode], **fields | ({"rank": 0} if mode == "full" else {}))
    model = build(workload.model, dtype=torch_dtype(workload.dtype), device="meta")
    if mode == "qlora":
        quantise(model, "nf4", workload.adapted)
    if mode != "full":
        adapt(model, REFERENCE, LoraSpec(workload.rank, alpha=8.0), workload.adapted)
    if checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second is the older
        next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})
    live = LiveBytes()
    live.hold(tensors_of(model))
    standing = live.now
    with live:
        step = make_step(Arm(workload.setup, model), workload)
        step.prepare()
        step.run()
        step.prepare()
        live.peak = live.now
        step.run()
    return standing, live.peak


def _as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _flash_attention)
    patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, foreach=True))
    patch.setattr(four_bit, "quantise", _shell)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    assert how.pop("attn_mask") is None  # or a GPU would not choose this kernel
    assert how.pop("enable_gqa", False) == (query.shape[1] != key.shape[1])
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    y: Tensor = flash(query, key, value, how["dropout_p"], how["is_causal"], scale=how["scale"])[0]
    return y


def _shell(weight: Tensor, *, double: bool) -> Nf4:
    """Codes and statistics of the right shapes: there are no values to round."""
    assert double
    blocks = math.ceil(weight.numel() / BLOCK)
    made = partial(torch.empty, device=weight.device)
    return Nf4(
        made(math.ceil(weight.numel() / 2), dtype=torch.uint8),
        made(blocks, dtype=torch.uint8),
        made(math.ceil(blocks / NESTED_BLOCK), dtype=torch.float32),
        made((), dtype=torch.float32),
        weight.shape,
    )
