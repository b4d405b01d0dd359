"""config.json is honoured, known to be harmless, or refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.errors import ModelError
from holdfast.model.spec import ModelSpec, RopeScaling, resolve_model

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA = QWEN3 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(folder: Path, config: dict, generation: dict | None = None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec.load(folder)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "architectures"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 10}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "mscale"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_served_is_refused_by_its_key(tmp_path, changes, named) -> None:
    with pytest.raises(ModelError, match=named):
        load(tmp_path, QWEN3 | changes)


def test_a_window_of_llama_is_refused_and_an_unused_one_of_qwen_is_not(tmp_path) -> None:
    with pytest.raises(ModelError, match="sliding_window"):
        load(tmp_path, LLAMA | {"sliding_window": 64})
    unused = {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 1}
    assert load(tmp_path, QWEN3 | unused).family == "qwen3"


def test_harmless_keys_and_nulls_are_accepted(tmp_path) -> None:
    harmless = {"transformers_version": "4.51.0", "attention_dropout": 0.1, "use_cache": False}
    assert load(tmp_path, QWEN3 | harmless | {"some_future_key": None}).layers == 2


def test_defaults_of_the_families_are_those_of_transformers(tmp_path) -> None:
    bare = without(QWEN3, "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    spec = load(tmp_path, bare)
    assert (spec.head_dim, spec.kv_heads, spec.norm_eps) == (128, 4, 1e-6)
    assert (spec.rope_theta, spec.tied_embeddings, spec.dtype) == (10_000.0, False, "float32")
    llama = load(tmp_path, bare | {"architectures": ["LlamaForCausalLM"], "model_type": None})
    assert llama.head_dim == 8 and not llama.qk_norm


def test_biases_stand_where_the_family_has_them(tmp_path) -> None:
    qwen2 = QWEN3 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    spec = load(tmp_path, qwen2)
    assert (spec.attention_bias, spec.output_bias, spec.mlp_bias) == (True, False, False)
    with pytest.raises(ModelError, match="attention_bias"):
        load(tmp_path, qwen2 | {"attention_bias": False})
    spec = load(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (spec.attention_bias, spec.output_bias, spec.mlp_bias) == (True, True, True)


def test_both_spellings_of_rope_scaling_are_read(tmp_path) -> None:
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    newer = {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    older = {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}
    oldest = {"rope_scaling": LLAMA3 | {"type": "llama3"}, "rope_theta": 5e5}
    for spelling in (newer, older, oldest):
        spec = load(tmp_path, LLAMA | spelling)
        assert (spec.rope_theta, spec.rope_scaling) == (5e5, expected)
    linear = load(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    assert (
        load(tmp_path, LLAMA | {"rope_parameters": {"rope_type": "default"}}).rope_scaling is None
    )


def test_end_ids_come_from_both_files_without_repeats(tmp_path) -> None:
    ids = {"eos_token_id": 7, "bos_token_id": 1}
    spec = load(tmp_path, QWEN3 | ids, {"eos_token_id": [9, 7], "bos_token_id": 3})
    assert (spec.end_ids, spec.bos_id) == ((7, 9), 1)
    spec = load(tmp_path, QWEN3, {"temperature": 0.6})
    assert (spec.end_ids, spec.bos_id) == ((), None)


def test_an_unreadable_folder_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        ModelSpec.load(tmp_path)
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="JSON"):
            ModelSpec.load(tmp_path)


def test_sizes_count_every_parameter_once(tmp_path) -> None:
    spec = load(tmp_path, QWEN3)
    elements = sum(parameter.elements for parameter in spec.parameters())
    by_hand = 100 * 32 + 2 * (32 * 64 + 64 * 32 + 64 * 32 + 3 * 64 * 32 + 2 * 32 + 2 * 16) + 32
    assert by_hand == elements - 2 * (2 * 32 * 32 - 64 * 32)
    assert spec.weights_bytes("float32") == 4 * elements
    assert spec.weights_bytes("bfloat16") >= 2 * elements
    assert spec.kv_token_bytes("float32") == 2 * 2 * 2 * 16 * 4
    with pytest.raises(ModelError, match="float16"):
        spec.weights_bytes("float16")


def test_names_resolve_to_folders(tmp_path, monkeypatch) -> None:
    bundled = resolve_model(None)
    assert bundled == resolve_model("holdfast-tiny") and (bundled / "config.json").exists()
    assert resolve_model(str(tmp_path)) == tmp_path
    for name in ("/no/such/folder", "./nothing", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(name)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "file"))


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch) -> None:
    import huggingface_hub

    asked = {}

    def refuse(**options: object) -> str:
        asked.update(options)
        raise OSError("no route to host\nwith a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="no route to host") as error:
        resolve_model("someone/some-model")
    assert "\n" not in str(error.value)
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and not any("bin" in str(p) or p == "*" for p in patterns)
