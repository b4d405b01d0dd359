"""What the device tests share: a tiny random checkpoint, and a brain made of two hands.

`Hand` writes plans, runs them on a Runner and on a mirror RowTable, and holds every result's digest
against the mirror's incremental one, so each test that steps proves the row state as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.config import Limits
from holdfast.device.build import Mixed, build_runner
from holdfast.device.memory import DeviceMemory
from holdfast.device.runner import Runner
from holdfast.model.decoder import Decoder
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout, load_weights
from holdfast.wire.plan import ADMIT, PAGE_WRITE, StepPlan, StepResult, handles_of
from holdfast.wire.rows import RowTable

VOCAB = 199
# Pages of 4 tokens, so that short tests cross many page ends; not 1, which hides mistakes.
LIMITS = Limits(
    vocab_size=VOCAB,
    context_tokens=96,
    page_tokens=4,
    pages=1400,
    rows_max=64,
    prefill_tokens=64,
    live_tokens=1 << 14,
)


def make_checkpoint(folder: Path) -> Any:
    """Save a random Qwen3 of 2 layers; returns transformers' model of it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        dtype="float32",
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def make_runner(
    spec: ModelSpec,
    limits: Limits = LIMITS,
    *,
    graphs: bool = False,
    token_buckets: tuple[int, ...] = (),
    **options: Any,
) -> Runner:
    """token_buckets: of graphs of steps with prompts; none: those run eagerly."""
    memory = DeviceMemory.allocate(spec, limits)
    layout = WeightsLayout.of(spec, "float32")
    load_weights(spec, memory.weights, layout)
    views = layout.views(memory.weights)
    decoder, replayed = Decoder(spec, views), Decoder(spec, views) if graphs else None
    if token_buckets:
        options["mixed"] = Mixed(decoder.beside(), token_buckets)
    return build_runner(limits, decoder, memory, graphs=replayed, **options)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The naive loop: transformers' logits of the whole text, again for every token."""
    text = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def handles(pages: list[int] | np.ndarray) -> np.ndarray:
    pages = np.asarray(pages, np.int64)
    return handles_of(0, pages, np.ones(pages.size, np.uint32))


@dataclass
class Request:
    """One row's admission in plain form; `fields` are those of ADMIT."""

    prompt: list[int]
    bias: dict[int, float] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    def record(self, row: int, owner: int, length: int) -> np.ndarray:
        record = np.zeros((), ADMIT)
        record["top_p"] = record["repetition_penalty"] = 1.0
        record["top_logprobs"] = -1
        record["tokens_len"] = record["prompt_len"] = len(self.prompt)
        for name, value in self.fields.items():
            record[name] = value
        record["owner"], record["row"], record["length"] = owner, row, length
        record["bias_len"], record["stop_len"] = len(self.bias), len(self.stops)
        return record


class Hand:
    """Plans by hand. Row and page numbers are the test's; `next_page` gives fresh ones."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.limits = runner.limits
        self.mirror = RowTable(runner.limits)
        self.step = 0
        self.owners = 0
        self.next_page = 1
        self._deltas: dict[str, list] = {}

    def fresh_pages(self, tokens: int) -> list[int]:
        count = self.limits.pages_for_tokens(tokens)
        first, self.next_page = self.next_page, self.next_page + count
        assert self.next_page <= self.limits.pages
        return list(range(first, self.next_page))

    def admit(self, row: int, request: Request, pages: list[int], length: int = 0) -> None:
        """Put the request in a row, with its pages from column 0 on, in the next plan."""
        self.owners += 1
        self._add("admits", request.record(row, self.owners, length))
        self._add("admit_tokens", *request.prompt)
        self._add("bias_ids", *request.bias.keys())
        self._add("bias_values", *request.bias.values())
        self._add("stop_ids", *request.stops)
        for column, page in enumerate(pages):
            self._add("page_writes", (0, row, column, page))

    def clear(self, row: int) -> None:
        self._add("clears", row)

    def plan(
        self, rows: list[tuple[int, int, int]] | None = None, seals: Any = (), zeros: Any = ()
    ) -> StepPlan:
        """The next plan: (row, query length, samples) each, and the deltas gathered so far."""
        self.step += 1
        deltas, self._deltas = self._deltas, {}
        columns = np.array(rows or [], np.int32).reshape(-1, 3)
        dtypes = {
            "clears": np.int32,
            "admits": ADMIT,
            "admit_tokens": np.int32,
            "bias_ids": np.int32,
            "bias_values": np.float32,
            "stop_ids": np.int32,
            "page_writes": PAGE_WRITE,
        }
        return StepPlan(
            epoch=self.runner.epoch,
            step=self.step,
            rows=columns[:, 0].copy(),
            query_lens=columns[:, 1].copy(),
            samples=columns[:, 2].astype(np.uint8),
            seals=handles(seals),
            zeros=handles(zeros),
            **{name: np.array(deltas.get(name, []), dtype) for name, dtype in dtypes.items()},
        )

    def run(self, rows: Any = None, seals: Any = (), zeros: Any = ()) -> StepResult:
        """Run the next plan, through its bytes as it would travel, and check the digest."""
        plan = StepPlan.decode(self.plan(rows, seals, zeros).encode())
        result = StepResult.decode(self.runner.run(plan).encode())
        self.mirror.apply(plan)
        assert result.digest == self.mirror.digest(plan), f"digest of step {plan.step}"
        self.mirror.advance(plan, result.tokens)
        return result

    def generate(self, row: int, request: Request, count: int, chunk: int = 1000) -> list[int]:
        """The request alone in a row of its own: prompt in chunks, then one token a step."""
        length = len(request.prompt)
        self.admit(row, request, self.fresh_pages(length + count))
        tokens, done = [], 0
        while done < length:
            part = min(chunk, length - done)
            done += part
            result = self.run([(row, part, int(done == length))])
        tokens.append(int(result.tokens[0]))
        while len(tokens) < count:
            tokens.append(int(self.run([(row, 1, 1)]).tokens[0]))
        return tokens

    def _add(self, name: str, *values: Any) -> None:
        self._deltas.setdefault(name, []).extend(values)
