"""Tiny decoders and a paged cache to run them through; shared by the tests of model/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from holdfast.model.decoder import Decoder
from holdfast.model.layer_ops import LayerOps
from holdfast.model.spec import ModelSpec, RopeScaling
from holdfast.model.weights import WeightsLayout, dummy_weights, load_weights
from holdfast.ops.attention import AttentionBatch


def tiny_spec(**changes: object) -> ModelSpec:
    values: dict = {
        "family": "qwen3",
        "vocab_size": 200,
        "hidden_size": 48,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "context_tokens": 512,
        "tied_embeddings": True,
        "attention_bias": False,
        "qk_norm": True,
        "dtype": "float32",
        "path": Path("/nowhere"),
    }
    return ModelSpec(**(values | changes))


SPECS = {
    "qwen3 3:1": tiny_spec(),
    "llama 1:1": tiny_spec(
        family="llama",
        heads=3,
        kv_heads=3,
        qk_norm=False,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    ),
    "qwen2 7:1 odd sizes": tiny_spec(
        family="qwen2",
        hidden_size=53,
        heads=7,
        kv_heads=1,
        head_dim=12,
        intermediate_size=91,
        vocab_size=151,
        qk_norm=False,
        attention_bias=True,
        tied_embeddings=False,
    ),
}


def dummy_decoder(spec: ModelSpec, seed: int = 0, ops: LayerOps | None = None) -> Decoder:
    layout = WeightsLayout.of(spec, "float32")
    slab = torch.empty(layout.bytes, dtype=torch.uint8)
    dummy_weights(spec, slab, layout, seed)
    return Decoder(spec, layout.views(slab), ops)


def loaded_decoder(folder: Path) -> Decoder:
    spec = ModelSpec.load(folder)
    layout = WeightsLayout.of(spec, "float32")
    slab = torch.empty(layout.bytes, dtype=torch.uint8)
    load_weights(spec, slab, layout)
    return Decoder(spec, layout.views(slab))


class PagedRequests:
    """Requests over one pool whose bytes are NaN wherever nothing was stored, page 0 included.

    Pages are dealt out in a random order; table entries a request does not hold point to page 0.
    """

    def __init__(
        self, decoder: Decoder, texts: list[list[int]], page_tokens: int = 4, seed: int = 0
    ) -> None:
        spec = decoder.spec
        self.decoder = decoder
        self.texts = texts
        self.page_tokens = page_tokens
        held = [-(-len(text) // page_tokens) for text in texts]
        pages = sum(held) + 1
        order = np.random.default_rng(seed).permutation(pages - 1).astype(np.int32) + 1
        self.table = np.zeros((len(texts), max(held) + 2), np.int32)
        at = 0
        for row, count in enumerate(held):
            self.table[row, :count] = order[at : at + count]
            at += count
        shape = (pages, spec.layers, 2, page_tokens, spec.kv_heads, spec.head_dim)
        self.pool = torch.full(shape, float("nan"))
        self.length = [0] * len(texts)
        self.logits: list[list[torch.Tensor]] = [[] for _ in texts]

    def step(self, parts: list[tuple[int, int]]) -> None:
        """Compute `count` further tokens of each (request, count), in that order."""
        rows = np.array([request for request, _ in parts])
        starts = np.array([self.length[request] for request, _ in parts], np.int32)
        lens = np.array([count for _, count in parts], np.int32)
        tokens, positions = [], []
        for (request, count), start in zip(parts, starts.tolist(), strict=True):
            tokens += self.texts[request][start : start + count]
            positions += range(start, start + count)
        batch = AttentionBatch.build(lens, starts, self.table[rows], self.page_tokens, "cpu")
        hidden = self.decoder.forward(
            torch.tensor(tokens), torch.tensor(positions), batch, self.pool
        )
        logits = self.decoder.logits(hidden)
        at = 0
        for request, count in parts:
            self.logits[request].append(logits[at : at + count])
            self.length[request] += count
            at += count

    def result(self, request: int = 0) -> torch.Tensor:
        """float32[tokens so far, vocab]."""
        return torch.cat(self.logits[request])


def alone(decoder: Decoder, text: list[int], page_tokens: int = 4, seed: int = 0) -> torch.Tensor:
    """Logits of `text` computed in one step by itself."""
    requests = PagedRequests(decoder, [text], page_tokens, seed)
    requests.step([(0, len(text))])
    return requests.result()
