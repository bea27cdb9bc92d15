"""Model shapes by name: the published Llama ones, two small ones, and single layers; nothing is fetched.

Sources: the configurations published with Llama 2 (Touvron et al. 2023, arXiv 2307.09288), Llama 3 and 3.2 (Grattafiori
et al. 2024, arXiv 2407.21783, table 3); the parameter counts follow from them and are asserted by the tests.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

PRESETS: dict[str, dict[str, Any]] = {
    "micro": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""The keyword arguments of transformers' LlamaConfig, by the preset's name."""


def config(name: str) -> LlamaConfig:
    """The transformers configuration of a preset; KeyError for a name that is none."""
    from transformers import LlamaConfig

    return LlamaConfig(**PRESETS[name])


SINGLE, SINGLE_FORM = "linear", "linear-<d_in>x<d_out>"
"""The name of the only layer of a model that is a single layer, and how such a model is named."""


def widths(model: str) -> tuple[int, int] | None:
    """(d_in, d_out) of a single layer by its name, such as linear-4096x11008; None for what is no such name.

    Below 2 no width is one: of a single weight there is no spread.
    """
    match = re.fullmatch(f"{SINGLE}-([1-9][0-9]*)x([1-9][0-9]*)", model)
    found = (int(match[1]), int(match[2])) if match else None
    return found if found and min(found) > 1 else None
