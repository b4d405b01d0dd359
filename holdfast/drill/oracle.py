"""Oracles: whether the tokens of a stream are those that the model says. See docs/equality.md.

`Reference` runs the same jobs in this process, undisturbed, and compares token by token: on the CPU
reference equality is exact. `Explainer` computes one clean teacher-forced pass over prompt and
emitted tokens, and says of each token how far it lies below the maximum after its keyed noise: on a
GPU in bf16 near-ties flip, and a right token is one that lies within what rounding explains. It has
decoders and a pool of its own and shares nothing with the server but the files of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from holdfast.drill.job import Job
from holdfast.wire.draw import gumbel

if TYPE_CHECKING:
    from holdfast.llm import LLM
    from holdfast.model.decoder import Decoder
    from holdfast.model.spec import ModelSpec

# A token that is not the maximum of the clean pass may be right by rounding alone. In float32 on
# one machine the passes are bit-equal and this is not used up; it is the least tau there is.
TAU_MIN = 1e-4
# What is judged is more tokens than what tau is taken from, in other batches: its largest error may
# be larger. (Largest spread of the bundled model in bfloat16: 0.27 of 192 tokens, 0.31 of 2,304.)
TAU_FACTOR = 2.0
# Tokens between which a rounding may decide: the highest of a position. A tie of more is rarer than
# all that is measured here.
_CONTENDERS = 4
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

        keys = [job.without_key() for job in jobs]
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


class Explainer:
    """One clean pass a stream, by the model's own decoder, in float32.

    dtype: of weights, activations and the pool, as the server has them. The pass has the same
    weights in float32, so that the roundings of the server are all that its tokens may show.
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
        views = layout.views(slab.to(self._device))
        self._rounding = Decoder(spec, views)
        self._exact = self._rounding
        if self._dtype != torch.float32:
            self._exact = Decoder(spec, {name: view.float() for name, view in views.items()})

    def distances(self, job: Job, tokens: Sequence[int]) -> np.ndarray:
        """float32[len(tokens)]: how far each lies below the maximum, noise included; 0 is it.

        In units of logits divided by the temperature, or of logits where it is 0.
        """
        scores = self._scores(self._exact, job, tokens)
        chosen = scores[np.arange(len(tokens)), list(tokens)]
        return scores.max(axis=1) - chosen

    def spreads(self, job: Job, tokens: Sequence[int]) -> np.ndarray:
        """float32[len(tokens)]: how far rounding to the server's dtype moves the contenders of a
        position against each other, in the units of `distances`; 0 in float32.

        If a pass is off by delta_j for token j, what it draws lies at most max delta - min delta
        below the maximum. That holds for every token; `distances` of a right run sees it only where
        two are nearly as likely, one in two hundred.
        """
        if self._rounding is self._exact:
            return np.zeros(len(tokens), np.float32)
        exact = self._scores(self._exact, job, tokens)
        moved = self._scores(self._rounding, job, tokens) - exact
        highest = np.argpartition(exact, -_CONTENDERS, axis=1)[:, -_CONTENDERS:]
        moved = np.take_along_axis(moved, highest, axis=1)
        return moved.max(axis=1) - moved.min(axis=1)

    def _scores(self, decoder: Decoder, job: Job, tokens: Sequence[int]) -> np.ndarray:
        """float32[len(tokens), vocab] that each token was the highest of, or should have been."""
        logits = self._logits(decoder, [*job.prompt, *tokens], len(tokens))
        if job.temperature:
            logits = logits / np.float32(job.temperature)
            for at in range(len(tokens)):
                logits[at] += gumbel(job.seed, len(job.prompt) + at, logits.shape[1])
        return logits

    def _logits(self, decoder: Decoder, history: Sequence[int], count: int) -> np.ndarray:
        """float32[count, vocab] that the last `count` tokens were drawn from."""
        import torch

        from holdfast.ops.attention import AttentionBatch

        if not count:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        inputs, spec = np.array(history[:-1], np.int64), self.spec
        pages = -(-inputs.size // _PAGE_TOKENS)
        # Page 0 is the trash page, here as everywhere.
        shape = (pages + 1, spec.layers, 2, _PAGE_TOKENS, spec.kv_heads, spec.head_dim)
        dtype = torch.float32 if decoder is self._exact else self._dtype
        pool = torch.zeros(shape, dtype=dtype, device=self._device)
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
            hidden = decoder.forward(ids, positions, attention, pool)
            wanted = hidden[max(0, first - start) :]
            if wanted.shape[0]:
                found.append(decoder.logits(wanted).float().cpu().numpy())
        return np.concatenate(found)


def tau_of(errors: Iterable[np.ndarray]) -> float:
    """The distance within which a token counts as right, from distances and spreads of fault-free
    runs of the same jobs."""
    largest = max((float(each.max()) for each in errors if each.size), default=0.0)
    return max(TAU_MIN, TAU_FACTOR * largest)
