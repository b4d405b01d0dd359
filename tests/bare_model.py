"""A model folder with a config and nothing else, for drawn weights: real code, no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "eos_token_id": 7,
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
}


def bare_model(folder: Path, **changes: Any) -> Path:
    """Write the config, with `changes`, into a folder; returns the folder."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder
