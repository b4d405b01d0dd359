"""Weights: where each parameter lies in one slab, and how a checkpoint fills it.

Owns the slab's layout and the loading of safetensors files. Invariants: parameters lie in the order
of ModelSpec.parameters, each start aligned, gaps are zero (so the slab's checksum depends on the
checkpoint alone); each parameter is written exactly once; nothing is loaded when anything is
missing, extra or misshapen, and one error names all of it. Files are memory-mapped; nothing is
unpickled. Called by proc.worker, llm and tests. The slab may lie on a GPU (model.staging).

Tied models: a file may still hold `lm_head.weight`. It is accepted when it equals the embedding
(transformers then ties, too) and refused when it differs, since one of the two statements is wrong.
Old checkpoints hold `rotary_emb.inv_freq` buffers; they follow from the config and are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from holdfast.errors import ModelError, require
from holdfast.model.spec import ModelSpec, aligned, item_bytes
from holdfast.model.staging import PinnedCopies
from holdfast.ops.contracts import require_launchable

# progress(bytes_done, bytes_total), bytes of the checkpoint's tensors; called after each tensor.
Progress = Callable[[int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FILE_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_INDEX_BYTES_MAX = 64 << 20
# Names listed in one error: enough to see the pattern, short enough to read.
_NAMES_SHOWN = 20
# Elements drawn at once for dummy weights: 64 MiB of float32.
_DUMMY_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter in the slab. `parts` are (checkpoint name, first row, rows) along axis 0."""

    name: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    parts: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class WeightsLayout:
    """Placements of every parameter in one slab of `bytes` bytes, elements of `dtype`."""

    dtype: str
    placements: tuple[Placement, ...]
    bytes: int

    @staticmethod
    def of(spec: ModelSpec, dtype: str) -> WeightsLayout:
        size = item_bytes(dtype)
        placements = []
        offset = 0
        for parameter in spec.parameters():
            parts = []
            row = 0
            for name, shape in parameter.parts:
                parts.append((name, row, shape[0]))
                row += shape[0]
            used = parameter.elements * size
            placements.append(
                Placement(parameter.name, parameter.shape, offset, used, tuple(parts))
            )
            offset += aligned(used)
        require(offset == spec.weights_bytes(dtype), f"layout has {offset} bytes")
        return WeightsLayout(dtype, tuple(placements), offset)

    def views(self, slab: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameter name -> tensor over `slab`, uint8[>= bytes]; contracts checked here, once."""
        require(
            slab.dtype == torch.uint8 and slab.dim() == 1 and slab.numel() >= self.bytes,
            f"weights slab is {slab.dtype}{tuple(slab.shape)}, the layout has {self.bytes} bytes",
        )
        found = {}
        for place in self.placements:
            part = slab[place.offset : place.offset + place.bytes]
            view = part.view(DTYPES[self.dtype]).view(place.shape)
            require_launchable(place.name, view)
            found[place.name] = view
        return found


@torch.inference_mode()
def load_weights(
    spec: ModelSpec, slab: torch.Tensor, layout: WeightsLayout, progress: Progress | None = None
) -> None:
    """Fill `slab` with the checkpoint at spec.path, converting to the layout's dtype.

    Raises ModelError naming every missing, extra and misshapen tensor, before a byte is written.
    """
    with ExitStack() as stack:
        tensors = _open_checkpoint(spec.path, stack)
        _check(spec, tensors)
        views = layout.views(slab)
        _zero_gaps(layout, slab)
        staged = None if slab.device.type == "cpu" else PinnedCopies(slab.device)
        total = sum(_file_bytes(tensors[name]) for name, _ in spec.weight_tensors())
        done = 0
        for place in layout.placements:
            target = views[place.name]
            for name, row, rows in place.parts:
                source = tensors[name]
                if staged is None:
                    target[row : row + rows].copy_(source.read())
                else:
                    staged.copy(target[row : row + rows], source.read())
                done += _file_bytes(source)
                if progress is not None:
                    progress(done, total)
        if staged is not None:
            staged.finish()
        require(done == total, f"{done} of {total} bytes loaded")


@torch.inference_mode()
def dummy_weights(
    spec: ModelSpec, slab: torch.Tensor, layout: WeightsLayout, seed: int = 0
) -> None:
    """Fill `slab` with random weights for `--load dummy`; the same seed gives the same bytes.

    Norms are 1, the rest is normal with standard deviation 1 / sqrt(inputs), so that activations
    stay in range at any depth.
    """
    views = layout.views(slab)
    _zero_gaps(layout, slab)
    for index, place in enumerate(layout.placements):
        target = views[place.name].view(-1)
        if place.name.endswith("norm"):
            target.fill_(1.0)
            continue
        generator = torch.Generator(device=slab.device).manual_seed((seed << 20) + index)
        deviation = 1.0 / math.sqrt(place.shape[-1])
        for first in range(0, target.numel(), _DUMMY_CHUNK):
            some = target[first : first + _DUMMY_CHUNK]
            drawn = torch.empty(some.numel(), device=slab.device)
            some.copy_(drawn.normal_(0.0, deviation, generator=generator))


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of an open safetensors file."""

    file: Path
    handle: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> torch.Tensor:
        """The tensor, over the mapped file where safetensors can."""
        try:
            return self.handle.get_tensor(self.name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{self.file}: {self.name}: {error}") from None


def _open_checkpoint(folder: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by name; the files stay open as long as `stack`."""
    found: dict[str, _Stored] = {}
    twice = []
    for path in _files(folder):
        try:
            handle = stack.enter_context(safetensors.safe_open(path, framework="pt", device="cpu"))
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                piece = handle.get_slice(name)
                if name in found:
                    twice.append(name)
                shape = tuple(piece.get_shape())
                found[name] = _Stored(path, handle, name, shape, str(piece.get_dtype()))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from None
    if twice:
        raise ModelError(f"{folder}: in more than one file: {_listed(twice)}")
    return found


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files: those of the index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            if index.stat().st_size > _INDEX_BYTES_MAX:
                raise ModelError(f"{index}: larger than {_INDEX_BYTES_MAX} bytes")
            names = json.loads(index.read_bytes())["weight_map"].values()
            shards = sorted({str(name) for name in names})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from None
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(f"{index}: {shard!r} is not a safetensors file beside it")
        return [folder / shard for shard in shards]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [folder / others[0]]
    raise ModelError(
        f"{folder}: neither model.safetensors nor model.safetensors.index.json"
        + (f", but {_listed(others)}" if others else "; other formats are not read")
    )


def _check(spec: ModelSpec, tensors: dict[str, _Stored]) -> None:
    """Raise ModelError, naming all that is wrong, unless `tensors` is what the decoder needs."""
    needed = dict(spec.weight_tensors())
    extra = {name for name in tensors if name not in needed}
    ignored = {name for name in extra if _BUFFER.fullmatch(name)}
    if spec.tied_embeddings and "lm_head.weight" in extra:
        ignored.add("lm_head.weight")
    missing = [name for name in needed if name not in tensors]
    held = [name for name in needed if name in tensors]
    misshapen = [
        f"{name} is {tensors[name].shape}, expected {needed[name]}"
        for name in held
        if tensors[name].shape != needed[name]
    ]
    unread = [
        f"{name} is {tensors[name].dtype}"
        for name in held
        if tensors[name].dtype not in _FILE_DTYPE_BYTES
    ]
    wrong = [
        f"{title}: {_listed(names)}"
        for title, names in (
            ("missing", missing),
            ("extra", sorted(extra - ignored)),
            ("misshapen", misshapen),
            ("of a dtype that is not served", unread),
        )
        if names
    ]
    if wrong:
        raise ModelError(f"{spec.path}: the checkpoint does not fit its config; {'; '.join(wrong)}")
    if "lm_head.weight" in ignored:
        head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        if head.shape != embed.shape or not torch.equal(head.read(), embed.read()):
            raise ModelError(
                f"{spec.path}: tie_word_embeddings is true, but lm_head.weight is there and "
                f"differs from model.embed_tokens.weight"
            )


def _file_bytes(stored: _Stored) -> int:
    return math.prod(stored.shape) * _FILE_DTYPE_BYTES[stored.dtype]


def _zero_gaps(layout: WeightsLayout, slab: torch.Tensor) -> None:
    """Zero the bytes between parameters."""
    ends = [*(place.offset for place in layout.placements[1:]), layout.bytes]
    for place, end in zip(layout.placements, ends, strict=True):
        slab[place.offset + place.bytes : end].zero_()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
