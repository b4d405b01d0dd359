"""Oracles: whether the tokens of a stream are those that the model says. See docs/equality.md.

`Reference` runs the same jobs in this process, undisturbed, and compares token by token: on the CPU
reference equality is exact. `Explainer` computes one clean teacher-forced pass over prompt and
emitted tokens, and says of each token how far it lies below the maximum after its keyed noise: on a
GPU in bf16 near-ties flip, and a right token is one that lies within a small distance. It has a
decoder and a pool of its own and shares nothing with the server but the files of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from holdfast.drill.job import Job
from holdfast.wire.draw import gumbel

if TYPE_CHECKING:
    from holdfast.llm import LLM
    from holdfast.model.spec import ModelSpec

# A token that is not the maximum of the clean pass may be right by rounding alone. In float32 on
# one machine the passes are bit-equal and this is not used up; it is the least tau there is.
TAU_MIN = 1e-4
# A faulted run sees other batch shapes than a fault-free one: its largest distance may be larger.
TAU_FACTOR = 2.0
# Rows of the teacher-forced pass computed at once.
_CHUNK_TOKENS = 512
_PAGE_TOKENS = 16


class Reference:
    """The tokens of jobs as this process computes them, each once."""

    def __init__(self, model: str | None, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._known: dict[Job, list[int]] = {}
        self._llm: LLM | None = None

    def tokens(self, jobs: Iterable[Job]) -> list[list[int]]:
        """The answer to each job."""
        from holdfast.api.schema import SamplingParams
        from holdfast.llm import LLM

        keys = [_without_key(job) for job in jobs]
        missing = list(dict.fromkeys(key for key in keys if key not in self._known))
        if missing:
            if self._llm is None:
                self._llm = LLM(self._model, threads=self._threads, rows_max=64)
            params = [
                SamplingParams(
                    max_tokens=job.max_tokens,
                    temperature=job.temperature,
                    seed=job.seed,
                    ignore_eos=True,
                )
                for job in missing
            ]
            results = self._llm.generate([list(job.prompt) for job in missing], params)
            self._known.update(
                (job, result.token_ids) for job, result in zip(missing, results, strict=True)
            )
        return [self._known[key] for key in keys]

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()


def _without_key(job: Job) -> Job:
    return Job(job.prompt, job.max_tokens, job.temperature, job.seed)


class Explainer:
    """One clean pass a stream, by the model's own decoder.

    dtype: of weights, activations and the pool, as the server has them.
    """

    def __init__(self, spec: ModelSpec, *, device: str = "cpu", dtype: str = "float32") -> None:
        import torch

        from holdfast.model.decoder import Decoder
        from holdfast.model.weights import DTYPES, WeightsLayout, load_weights

        layout = WeightsLayout.of(spec, dtype)
        slab = torch.zeros(spec.weights_bytes(dtype), dtype=torch.uint8)
        load_weights(spec, slab, layout)
        self.spec = spec
        self._device = torch.device(device)
        self._dtype = DTYPES[dtype]
        self._decoder = Decoder(spec, layout.views(slab.to(self._device)))

    def distances(self, job: Job, tokens: Sequence[int]) -> np.ndarray:
        """float32[len(tokens)]: how far each lies below the maximum, noise included; 0 is it.

        In units of logits divided by the temperature, or of logits where it is 0.
        """
        logits = self._logits([*job.prompt, *tokens], len(tokens))
        if job.temperature:
            logits = logits / np.float32(job.temperature)
            for at in range(len(tokens)):
                logits[at] += gumbel(job.seed, len(job.prompt) + at, logits.shape[1])
        chosen = logits[np.arange(len(tokens)), list(tokens)]
        return logits.max(axis=1) - chosen

    def _logits(self, history: Sequence[int], count: int) -> np.ndarray:
        """float32[count, vocab] that the last `count` tokens were drawn from."""
        import torch

        from holdfast.ops.attention import AttentionBatch

        if not count:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        inputs, spec = np.array(history[:-1], np.int64), self.spec
        pages = -(-inputs.size // _PAGE_TOKENS)
        # Page 0 is the trash page, here as everywhere.
        shape = (pages + 1, spec.layers, 2, _PAGE_TOKENS, spec.kv_heads, spec.head_dim)
        pool = torch.zeros(shape, dtype=self._dtype, device=self._device)
        table = np.arange(1, pages + 1, dtype=np.int32)[None]
        first, found = len(history) - 1 - count, []
        for start in range(0, inputs.size, _CHUNK_TOKENS):
            part = inputs[start : start + _CHUNK_TOKENS]
            attention = AttentionBatch.build(
                query_lens=np.array([part.size], np.int32),
                starts=np.array([start], np.int32),
                page_table=table,
                page_tokens=_PAGE_TOKENS,
                device=self._device,
            )
            positions = torch.arange(start, start + part.size, device=self._device)
            ids = torch.from_numpy(part).to(self._device)
            hidden = self._decoder.forward(ids, positions, attention, pool)
            wanted = hidden[max(0, first - start) :]
            if wanted.shape[0]:
                found.append(self._decoder.logits(wanted).float().cpu().numpy())
        return np.concatenate(found)


def tau_of(distances: Iterable[np.ndarray]) -> float:
    """The distance within which a token counts as right, from fault-free runs of the same job."""
    largest = max((float(each.max()) for each in distances if each.size), default=0.0)
    return max(TAU_MIN, TAU_FACTOR * largest)
