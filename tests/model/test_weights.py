"""Every parameter is loaded exactly once, and what does not fit is named, all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_spec
from safetensors.torch import save_file

from holdfast.errors import InvariantError, ModelError
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout, dummy_weights, load_weights


def tensors_of(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in spec.weight_tensors()
    }


def load(spec: ModelSpec, dtype: str = "float32", fill: int = 0xEE, progress=None):
    layout = WeightsLayout.of(spec, dtype)
    slab = torch.full((layout.bytes,), fill, dtype=torch.uint8)
    load_weights(spec, slab, layout, progress)
    return slab, layout.views(slab)


@pytest.fixture
def spec(tmp_path) -> ModelSpec:
    return tiny_spec(path=tmp_path, attention_bias=True, output_bias=True, mlp_bias=True)


def test_fused_parameters_hold_their_parts_in_order(spec: ModelSpec) -> None:
    tensors = tensors_of(spec)
    save_file(tensors, spec.path / "model.safetensors")
    _, views = load(spec)
    own = "model.layers.1."
    qkv = [tensors[f"{own}self_attn.{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(views["layers.1.qkv"], torch.cat(qkv))
    biases = [tensors[f"{own}self_attn.{n}_proj.bias"] for n in "qkv"]
    assert torch.equal(views["layers.1.qkv_bias"], torch.cat(biases))
    gate_up = [tensors[f"{own}mlp.{n}_proj.weight"] for n in ("gate", "up")]
    assert torch.equal(views["layers.1.gate_up"], torch.cat(gate_up))
    assert torch.equal(views["norm"], tensors["model.norm.weight"])


def test_the_slab_depends_on_the_checkpoint_alone_gaps_included(spec: ModelSpec) -> None:
    save_file(tensors_of(spec), spec.path / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        first, _ = load(spec, dtype, fill=0xEE)
        second, _ = load(spec, dtype, fill=0x11)
        assert torch.equal(first, second)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_are_converted(spec: ModelSpec, stored: torch.dtype, wanted: str) -> None:
    tensors = tensors_of(spec, stored)
    save_file(tensors, spec.path / "model.safetensors")
    _, views = load(spec, wanted)
    expected = tensors["model.embed_tokens.weight"].to(views["embed"].dtype)
    assert torch.equal(views["embed"], expected)


def test_everything_missing_extra_and_misshapen_is_in_one_error(spec: ModelSpec) -> None:
    tensors = tensors_of(spec)
    del tensors["model.norm.weight"]
    del tensors["model.layers.0.mlp.up_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(80, 48)
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.zeros(16, dtype=torch.int32)
    save_file(tensors, spec.path / "model.safetensors")
    layout = WeightsLayout.of(spec, "float32")
    slab = torch.full((layout.bytes,), 0xEE, dtype=torch.uint8)
    with pytest.raises(ModelError) as error:
        load_weights(spec, slab, layout)
    message = str(error.value)
    assert "missing: model.layers.0.mlp.up_proj.bias, model.norm.weight" in message
    assert "extra: model.layers.2.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.down_proj.weight is (80, 48), expected (48, 80)" in message
    assert "model.layers.1.self_attn.q_norm.weight is I32" in message
    assert bool((slab == 0xEE).all()), "a byte was written although nothing could be loaded"


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path) -> None:
    spec = tiny_spec(path=tmp_path)
    tensors = tensors_of(spec)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    _, views = load(spec)
    assert "head" not in views
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load(spec)


def test_an_untied_head_is_needed(tmp_path) -> None:
    spec = tiny_spec(path=tmp_path, tied_embeddings=False)
    tensors = tensors_of(spec)
    save_file(tensors, tmp_path / "model.safetensors")
    _, views = load(spec)
    assert torch.equal(views["head"], tensors["lm_head.weight"])
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
        load(spec)


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_gives_the_same_slab(spec: ModelSpec) -> None:
    tensors = tensors_of(spec)
    save_file(tensors, spec.path / "model.safetensors")
    single, _ = load(spec)
    (spec.path / "model.safetensors").unlink()
    write_sharded(spec.path, tensors)
    sharded, _ = load(spec)
    assert torch.equal(single, sharded)


def test_broken_indexes_and_files_are_named(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(spec)
    tensors = tensors_of(spec)
    write_sharded(spec.path, tensors)
    (spec.path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: no such file"):
        load(spec)
    save_file(tensors, spec.path / "b.safetensors")
    with pytest.raises(ModelError, match="in more than one file"):
        load(spec)
    (spec.path / "b.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(ModelError, match=r"b\.safetensors: not a readable"):
        load(spec)
    index = spec.path / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": [1]}'):
        index.write_text(text)
        with pytest.raises(ModelError, match="not an index"):
            load(spec)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/a.safetensors"}}))
    with pytest.raises(ModelError, match="beside it"):
        load(spec)


def test_a_truncated_file_is_refused(spec: ModelSpec) -> None:
    path = spec.path / "model.safetensors"
    save_file(tensors_of(spec), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(spec)


def test_progress_counts_every_byte_of_the_checkpoint(spec: ModelSpec) -> None:
    save_file(tensors_of(spec, torch.bfloat16), spec.path / "model.safetensors")
    calls: list[tuple[int, int]] = []
    load(spec, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == len(spec.weight_tensors())
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]


def test_dummy_weights_follow_their_seed(spec: ModelSpec) -> None:
    layout = WeightsLayout.of(spec, "float32")
    slabs = [torch.full((layout.bytes,), fill, dtype=torch.uint8) for fill in (1, 2, 3)]
    for slab, seed in zip(slabs, (5, 5, 6), strict=True):
        dummy_weights(spec, slab, layout, seed)
    assert torch.equal(slabs[0], slabs[1]) and not torch.equal(slabs[0], slabs[2])
    views = layout.views(slabs[0])
    assert bool((views["layers.0.input_norm"] == 1).all())
    assert 0.1 < float(views["layers.0.down"].std()) * 80**0.5 < 1.5


def test_a_slab_that_is_too_small_or_misaligned_is_our_bug(spec: ModelSpec) -> None:
    layout = WeightsLayout.of(spec, "float32")
    with pytest.raises(InvariantError, match="weights slab"):
        layout.views(torch.zeros(layout.bytes - 1, dtype=torch.uint8))
    with pytest.raises(InvariantError, match="not aligned"):
        layout.views(torch.zeros(layout.bytes + 64, dtype=torch.uint8)[4:])
