"""Models to measure in: a preset or a single layer with random weights, or a checkpoint from a local directory."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora_bench.models.presets import PRESETS, SINGLE, SINGLE_FORM, config, widths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_model(name_or_path: str) -> None:
    """Raise ValueError unless `name_or_path` is a preset, a single layer or a directory with a checkpoint.

    Imports neither torch nor transformers, so that a command line can refuse at once. A preset's name, or a layer's,
    wins over a directory of the same name, which is reached as ./name.
    """
    if name_or_path in PRESETS or widths(name_or_path):
        return
    path = Path(name_or_path)
    if not path.is_dir() and name_or_path.lower().startswith((f"{SINGLE}-", f"{SINGLE}:")):
        raise ValueError(f"a single layer is {SINGLE_FORM}, of whole numbers of at least 2, got {name_or_path!r}")
    if not path.is_dir():
        near = difflib.get_close_matches(name_or_path.lower(), PRESETS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(
            f"no model is called {name_or_path!r}{hint}: wanted one of {', '.join(PRESETS)}, {SINGLE_FORM}, "
            "or the path of a directory with a checkpoint"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{name_or_path!r} is no checkpoint: the directory has no config.json")
    if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise ValueError(
            f"{name_or_path!r} has a config.json but no weights (*.safetensors or pytorch_model*.bin): "
            f"for random weights name a preset, one of {', '.join(PRESETS)}"
        )


def build(name_or_path: str, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> PreTrainedModel:
    """The causal language model in eval mode, with its weights in `dtype` on `device`; or a `SingleLayer` in its place.

    Weights that are not read are drawn from `seed` on the device itself, so that a large model never passes through
    the host; the caller's random state is left as it was. A path is read from the disk and nowhere else.

    Raises ValueError as `check_model` does.
    """
    check_model(name_or_path)
    import torch
    from transformers import AutoModelForCausalLM

    from lora_bench.models.single import SingleLayer

    device = torch.device(device)
    model: PreTrainedModel
    drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
    if single := widths(name_or_path):
        with drawing:
            torch.manual_seed(seed)
            return cast("PreTrainedModel", SingleLayer(*single, dtype=dtype, device=device).eval())
    if name_or_path in PRESETS:
        with drawing, device:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config(name_or_path), dtype=dtype)
            model.tie_weights()  # the first releases of transformers 5 leave that out on the meta device
    else:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
        )
    return model.eval()
