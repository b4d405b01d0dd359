"""ModelSpec: what a Hugging Face folder says about its decoder, read once and refused when unclear.

Owns the meaning of config.json and generation_config.json. Invariant: every key is honoured, known
to be harmless, or refused with a ModelError that names it, so nothing that changes the maths is
ignored. Torch-free, so that `holdfast plan` answers at once and the brain's side may import it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.model.families import (
    FAMILIES,
    HARMLESS_KEYS,
    NEUTRAL_VALUES,
    UNDERSTOOD_KEYS,
    Family,
    Parameter,
    parameters,
)

BUNDLED_NAME = "holdfast-tiny"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Parameters start on a cache line and on what a TMA descriptor asks for (16 bytes) alike.
PARAMETER_ALIGN_BYTES = 64
HUB_TIMEOUT_S = 10.0
# A config is a few kilobytes; what is larger is not one.
CONFIG_BYTES_MAX = 1 << 20

# float16 has no home here: its range fits bfloat16, and a CPU computes it 100 times slower.
_SERVED_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}

# Rope types and the keys each has beside rope_type and rope_theta.
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *_LLAMA3_KEYS),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies, each divided by up to `factor`.

    kind "linear": all of them. kind "llama3": those whose wave is longer than
    original_context_tokens / low_frequency_factor wholly, those shorter than
    original_context_tokens / high_frequency_factor not at all, smoothly between.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder. Sizes in elements; `dtype` is what the checkpoint was saved in (float16 counts
    as bfloat16). end_ids: ids that end a text, of both config files, without repeats."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context_tokens: int
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v have a bias."""
    output_bias: bool = False
    """The projection behind attention has a bias."""
    mlp_bias: bool = False
    qk_norm: bool
    dtype: str
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    path: Path

    @staticmethod
    def load(folder: Path | str) -> ModelSpec:
        """Read `folder`/config.json (and generation_config.json where there is one).

        Raises ModelError, naming the key, for whatever this decoder does not do.
        """
        path = Path(folder)
        config = _read_json(path / "config.json")
        family = _family(config)
        _refuse_unknown(config, family)
        return _spec_of(config, family, path)

    def parameters(self) -> list[Parameter]:
        """Every tensor of the decoder, in slab order, with the checkpoint tensors it is made of."""
        return parameters(
            layers=self.layers,
            vocab_size=self.vocab_size,
            hidden=self.hidden_size,
            query=self.heads * self.head_dim,
            key=self.kv_heads * self.head_dim,
            head_dim=self.head_dim,
            intermediate=self.intermediate_size,
            tied=self.tied_embeddings,
            qk_norm=self.qk_norm,
            qkv_bias=self.attention_bias,
            output_bias=self.output_bias,
            mlp_bias=self.mlp_bias,
        )

    def weight_tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """(name in the checkpoint, shape) of every tensor the decoder needs."""
        return [part for parameter in self.parameters() for part in parameter.parts]

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of the weights slab: every parameter, each start aligned."""
        size = item_bytes(dtype)
        return sum(aligned(parameter.elements * size) for parameter in self.parameters())

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * item_bytes(dtype)


def item_bytes(dtype: str) -> int:
    """Bytes of one element; `dtype` is "float32" or "bfloat16"."""
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not served; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def aligned(size: int) -> int:
    """`size` bytes rounded up to the alignment of parameters."""
    return -(-size // PARAMETER_ALIGN_BYTES) * PARAMETER_ALIGN_BYTES


def resolve_model(name: str | None) -> Path:
    """The folder of a model: None or "holdfast-tiny" is the bundled one, else a local folder, else
    a hub id, whose json, template and safetensors files (nothing else) are downloaded.

    Raises ModelError, in one line, when it cannot be had.
    """
    if name is None or name == BUNDLED_NAME:
        return Path(__file__).resolve().parent.parent / "assets" / BUNDLED_NAME
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such folder")
    return _download(name)


def _download(name: str) -> Path:
    """Snapshot of hub repository `name` in huggingface_hub's own cache."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id=name,
                allow_patterns=["*.json", "*.jinja", "*.safetensors"],
                ignore_patterns=["original/*", "consolidated*"],
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
    except GatedRepoError:
        raise ModelError(
            f"{name}: the hub wants its licence accepted and a token (run `hf auth login`)"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: neither a local folder nor a model on the hub") from None
    except (HFValidationError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: not a local folder, and it cannot be had from the hub: {reason}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in file `path`. Raises ModelError when it cannot be read or is none."""
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
        if len(text) > CONFIG_BYTES_MAX:
            raise ModelError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes")
        value = json.loads(text)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; is this a Hugging Face model folder?") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _family(config: dict[str, Any]) -> Family:
    """The family by `architectures`, or by `model_type` where a config names no architecture."""
    known = ", ".join(family.architecture for family in FAMILIES)
    names = config.get("architectures")
    model_type = config.get("model_type")
    if names:
        if not isinstance(names, list) or len(names) != 1:
            raise ModelError(f"config.json: architectures = {names!r}; expected one of {known}")
        found = [family for family in FAMILIES if family.architecture == names[0]]
        if not found:
            raise ModelError(
                f"config.json: architectures = {names!r} is not served; served are {known}"
            )
        if model_type not in (None, found[0].name):
            raise ModelError(
                f"config.json: model_type = {model_type!r} contradicts architectures = {names!r}"
            )
        return found[0]
    for family in FAMILIES:
        if family.name == model_type:
            return family
    raise ModelError(
        f"config.json: no architectures, and model_type = {model_type!r}; served are {known}"
    )


def _refuse_unknown(config: dict[str, Any], family: Family) -> None:
    """Raise for keys nobody here understands, and for understood ones that ask for too much.

    A key whose value is null asks for nothing.
    """
    for key, value in config.items():
        if value is None or key in UNDERSTOOD_KEYS or key in HARMLESS_KEYS:
            continue
        if key in NEUTRAL_VALUES:
            if value in NEUTRAL_VALUES[key]:
                continue
            raise ModelError(f"config.json: {key} = {value!r} is not served")
        raise ModelError(
            f"config.json: unknown key {key} = {_short(value)}: it might change the maths, so the "
            f"model is refused; remove the key if it is harmless"
        )
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"config.json: quantization_config ({method}): quantised weights are not served yet; "
            f"use the float checkpoint"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act = {config['hidden_act']!r}; only silu is served")
    _refuse_windows(config, family)


def _refuse_windows(config: dict[str, Any], family: Family) -> None:
    """Windows come later; a config that mentions one without using it passes."""
    window = config.get("sliding_window")
    in_use = _flag(config, "use_sliding_window", False)
    # Llama itself knows no window: a config of it that names one belongs to some other code.
    if window is not None and (in_use or family.name == "llama"):
        raise ModelError(
            f"config.json: sliding_window = {window!r} is in use; windows are not served yet"
        )
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise ModelError("config.json: layer_types: only full_attention is served")
    if len(types) != config.get("num_hidden_layers"):
        raise ModelError(
            f"config.json: layer_types has {len(types)} entries for "
            f"num_hidden_layers = {config.get('num_hidden_layers')!r}"
        )


def _spec_of(config: dict[str, Any], family: Family, path: Path) -> ModelSpec:
    hidden = _count(config, "hidden_size")
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {heads} is no multiple of "
            f"num_key_value_heads = {kv_heads}"
        )
    default_head_dim = family.head_dim
    if default_head_dim is None:
        if config.get("head_dim") is None and hidden % heads:
            raise ModelError(
                f"config.json: hidden_size = {hidden} is no multiple of num_attention_heads = "
                f"{heads}, and there is no head_dim"
            )
        default_head_dim = hidden // heads
    head_dim = _count(config, "head_dim", default_head_dim)
    # Rotation needs pairs; and with 6 or 10 columns MKL's product of p and V gives a row other bits
    # at another place of its batch (measured; every multiple of 4 up to 256 is free of it).
    if head_dim % 4:
        raise ModelError(f"config.json: head_dim = {head_dim} is no multiple of 4")
    bias = _flag(config, "attention_bias", family.qkv_bias_always)
    if family.qkv_bias_always and not bias:
        raise ModelError(f"config.json: attention_bias = false, but {family.architecture} has it")
    mlp_bias = _flag(config, "mlp_bias", False)
    if mlp_bias and not family.mlp_bias_allowed:
        raise ModelError(f"config.json: mlp_bias = true is not a thing of {family.architecture}")
    theta, scaling = _rope(config)
    vocab_size = _count(config, "vocab_size")
    generation_path = path / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    files = (("config.json", config), ("generation_config.json", generation))
    ends = [token for file in files for token in _ids(*file, "eos_token_id", vocab_size)]
    bos = [token for file in files for token in _ids(*file, "bos_token_id", vocab_size)]
    return ModelSpec(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=_count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_count(config, "intermediate_size"),
        norm_eps=_positive(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        context_tokens=_count(config, "max_position_embeddings"),
        tied_embeddings=_flag(config, "tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias and not family.qkv_bias_always,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        dtype=_dtype(config),
        end_ids=tuple(dict.fromkeys(ends)),
        bos_id=bos[0] if bos else None,
        path=path,
    )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta`."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer is not None and older is not None and newer != older:
        raise ModelError("config.json: rope_parameters and rope_scaling differ; which one holds?")
    key = "rope_scaling" if newer is None else "rope_parameters"
    values = config.get(key)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ModelError(f"config.json: {key} is not an object")
    values = {name: value for name, value in values.items() if value is not None}
    outer = config.get("rope_theta")
    if outer is not None and values.get("rope_theta", outer) != outer:
        raise ModelError(
            f"config.json: rope_theta = {outer!r}, but {key}.rope_theta = {values['rope_theta']!r}"
        )
    theta = _positive(values if "rope_theta" in values else config, "rope_theta", 10_000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        raise ModelError(f"config.json: {key}.rope_type and {key}.type differ")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ModelError(
            f"config.json: {key}.rope_type = {kind!r} is not served; served are "
            f"{', '.join(_ROPE_KEYS)}"
        )
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    for name in sorted(values.keys() - {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}):
        raise ModelError(f"config.json: unknown key {key}.{name} for rope type {kind!r}")
    return theta, _scaling(kind, values, key)


def _scaling(kind: str, values: dict[str, Any], key: str) -> RopeScaling | None:
    """The scaling under config key `key`; None where the frequencies stay as they are."""
    if kind == "default":
        return None
    factor = _positive(values, "factor", prefix=key)
    if kind == "linear":
        return RopeScaling(kind, factor)
    low = _positive(values, "low_freq_factor", prefix=key)
    high = _positive(values, "high_freq_factor", prefix=key)
    if high <= low:
        raise ModelError(f"config.json: {key}.high_freq_factor must be above low_freq_factor")
    original = _count(values, "original_max_position_embeddings", prefix=key)
    return RopeScaling(kind, factor, low, high, original)


def _dtype(config: dict[str, Any]) -> str:
    """The served dtype of a checkpoint; transformers' own default, float32, where none is named."""
    newer, older = config.get("dtype"), config.get("torch_dtype")
    if newer is not None and older is not None and newer != older:
        raise ModelError("config.json: dtype and torch_dtype differ")
    name = newer if newer is not None else older if older is not None else "float32"
    name = str(name).removeprefix("torch.")
    if name not in _SERVED_DTYPES:
        raise ModelError(f"config.json: dtype = {name!r} is not served")
    return _SERVED_DTYPES[name]


def _count(
    config: dict[str, Any], key: str, default: int | None = None, prefix: str | None = None
) -> int:
    value = config.get(key)
    value = default if value is None else value
    name = key if prefix is None else f"{prefix}.{key}"
    if value is None:
        raise ModelError(f"config.json: {name} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ModelError(f"config.json: {name} = {_short(value)} is not a positive whole number")
    return value


def _positive(
    config: dict[str, Any], key: str, default: float | None = None, prefix: str | None = None
) -> float:
    value = config.get(key)
    value = default if value is None else value
    name = key if prefix is None else f"{prefix}.{key}"
    if value is None:
        raise ModelError(f"config.json: {name} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {name} = {_short(value)} is not a positive number")
    return float(value)


def _flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} = {_short(value)} is neither true nor false")
    return value


def _ids(file: str, config: dict[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids under `key`: null, one, or a list of them, all inside the vocabulary."""
    value = config.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token in values:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ModelError(f"{file}: {key} = {_short(value)} is not of the vocabulary")
    return tuple(values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
