"""Models to measure in: a preset with random weights, or a checkpoint from a local directory."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.models.presets import PRESETS, config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_model(name_or_path: str) -> None:
    """Raise ValueError unless `name_or_path` is a preset or a directory with a checkpoint.

    Imports neither torch nor transformers, so that a command line can refuse at once. A preset's name wins over a
    directory of the same name, which is reached as ./name.
    """
    if name_or_path in PRESETS:
        return
    path = Path(name_or_path)
    if not path.is_dir():
        near = difflib.get_close_matches(name_or_path.lower(), PRESETS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(
            f"no model is called {name_or_path!r}{hint}: wanted one of {', '.join(PRESETS)}, "
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
    """The causal language model, in eval mode, with its weights in `dtype` on `device`.

    A preset's weights are drawn from `seed` on the device itself, so that a large model never passes through the host;
    the caller's random state is left as it was. A path is read from the disk and nowhere else.

    Raises ValueError as `check_model` does.
    """
    check_model(name_or_path)
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    model: PreTrainedModel
    if name_or_path in PRESETS:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config(name_or_path), dtype=dtype)
            model.tie_weights()  # the first releases of transformers 5 leave that out on the meta device
    else:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
        )
    return model.eval()
