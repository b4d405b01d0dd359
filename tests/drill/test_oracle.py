"""The oracles accept what the model says and refuse what it does not: docs/equality.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from holdfast.device.provoke import spoiled
from holdfast.drill.job import Job, make_jobs
from holdfast.drill.oracle import TAU_MIN, Explainer, Reference, tau_of
from holdfast.model.decoder import Decoder
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout, load_weights
from holdfast.ops.attention import AttentionBatch
from holdfast.proc.provoker import flip_signs

MODEL = Path(holdfast.__file__).parent / "assets" / "holdfast-tiny"
TOKENS = 24


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    made = Reference(str(MODEL), threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    from holdfast.api.text import Tokenizer

    tokenizer = Tokenizer.load(MODEL, vocab_size=6144)
    return make_jobs(tokenizer.encode, "oracle", 4, tokens=TOKENS)


@pytest.fixture(scope="module")
def answers(reference: Reference, jobs: list[Job]) -> list[list[int]]:
    return reference.tokens(jobs)


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(ModelSpec.load(MODEL))


def test_a_clean_run_is_explained_without_any_distance(
    explainer: Explainer, jobs: list[Job], answers: list[list[int]]
) -> None:
    """Bit-equal in float32: other batch, other chunks, one page table wider than the other."""
    assert {job.temperature for job in jobs} == {0.0, 0.8}
    distances = [explainer.distances(j, t) for j, t in zip(jobs, answers, strict=True)]
    assert max(float(each.max()) for each in distances) == 0.0
    assert tau_of(distances) == TAU_MIN


def test_a_swapped_token_is_not_explained(
    explainer: Explainer, jobs: list[Job], answers: list[list[int]]
) -> None:
    for job, tokens in zip(jobs, answers, strict=True):
        wrong = list(tokens)
        wrong[7] = (wrong[7] + 1) % 6144
        assert float(explainer.distances(job, wrong)[7]) > 0.05
        repeated = [*tokens[:9], tokens[8], *tokens[9:-1]]
        assert float(explainer.distances(job, repeated).max()) > 0.05


def test_another_seed_s_draws_are_not_explained(explainer: Explainer, jobs, answers) -> None:
    drawn = [at for at, job in enumerate(jobs) if job.temperature]
    for at in drawn:
        other = replace(jobs[at], seed=jobs[at].seed + 1)
        assert float(explainer.distances(other, answers[at]).max()) > 0.5


def test_tokens_from_a_wrong_page_are_not_explained(
    explainer: Explainer, reference: Reference, jobs: list[Job]
) -> None:
    """The tokens of a prompt whose first page is somebody else's, judged as those of the right
    one: what a wrong page table gives."""
    for job, other in zip(jobs, [*jobs[1:], jobs[0]], strict=True):
        mixed = replace(job, prompt=(*other.prompt[:16], *job.prompt[16:]))
        (tokens,) = reference.tokens([mixed])
        if tokens != reference.tokens([job])[0]:
            assert float(explainer.distances(job, tokens).max()) > 0.05
            return
    raise AssertionError("no prompt of these depends on its first page")


@pytest.fixture(scope="module")
def bfloat16() -> Explainer:
    return Explainer(ModelSpec.load(MODEL), dtype="bfloat16")


def test_what_bfloat16_draws_is_explained_by_its_spread_and_wrong_tokens_are_not(
    bfloat16: Explainer, jobs: list[Job]
) -> None:
    """The server's pass in bfloat16, a token at a time, judged by one in float32: near-ties flip,
    each within what rounding moved its contenders by."""
    spreads, judged = [], []
    for job in (replace(job, temperature=0.0) for job in jobs):
        tokens = _greedy(bfloat16, bfloat16._rounding, job.prompt)
        spreads.append(bfloat16.spreads(job, tokens))
        judged.append(bfloat16.distances(job, tokens))
        wrong = list(tokens)
        wrong[5] = (wrong[5] + 1) % 6144
        judged_wrong = float(bfloat16.distances(job, wrong).max())
        assert judged_wrong > 2.0
    tau = tau_of(spreads)
    assert 0.05 < tau < 1.0
    assert max(float(each.max()) for each in judged) <= tau


def test_the_spread_of_a_right_run_does_not_wait_for_a_tie(
    bfloat16: Explainer, explainer: Explainer, jobs: list[Job], answers: list[list[int]]
) -> None:
    """Few tokens show a distance at all, each shows what rounding can do; float32 has none."""
    distances = [bfloat16.distances(*pair) for pair in zip(jobs, answers, strict=True)]
    spreads = [bfloat16.spreads(*pair) for pair in zip(jobs, answers, strict=True)]
    assert np.mean([each > 0 for each in distances]) < 0.05
    assert np.mean([each > 0 for each in spreads]) > 0.95
    taus = [tau_of([each]) for each in spreads]
    assert max(taus) < 4 * min(taus), "of 24 tokens each"
    assert not explainer.spreads(jobs[0], answers[0]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["weights", "pages"])
def test_what_sabotage_plants_leaves_hardly_a_token_within_any_tau(
    jobs: list[Job], dtype: str, what: str
) -> None:
    """Weights whose signs were flipped, and the pages of a prompt that were spoiled, against a tau
    ten times what rounding needs: a sabotage that looks like rounding proves nothing."""
    spec = ModelSpec.load(MODEL)
    right = Explainer(spec, dtype=dtype)
    decoder = right._rounding
    if what == "weights":
        layout = WeightsLayout.of(spec, dtype)
        slab = torch.zeros(spec.weights_bytes(dtype), dtype=torch.uint8)
        load_weights(spec, slab, layout)
        flipped = bytearray(slab.numpy().tobytes())
        flip_signs(flipped)
        wrong = layout.views(torch.frombuffer(flipped, dtype=torch.uint8))
        decoder = Decoder(spec, wrong)
    for job in jobs:
        tokens = _greedy(right, decoder, job.prompt, spoil=what == "pages")
        far = right.distances(replace(job, temperature=0.0), tokens) > 2.0
        assert far.sum() >= 0.6 * (TOKENS - 1)


def _greedy(
    explainer: Explainer, decoder: Decoder, prompt: tuple[int, ...], *, spoil: bool = False
) -> list[int]:
    """TOKENS tokens, a step each; spoil: after the first one, the pages of the prompt."""
    spec = explainer.spec
    pages = -(-(len(prompt) + TOKENS) // 16)
    shape = (pages + 1, spec.layers, 2, 16, spec.kv_heads, spec.head_dim)
    pool = torch.zeros(shape, dtype=explainer._dtype)
    found: list[int] = []
    start, chunk = 0, list(prompt)
    while len(found) < TOKENS:
        attention = AttentionBatch.build(
            query_lens=np.array([len(chunk)], np.int32),
            starts=np.array([start], np.int32),
            page_table=np.arange(1, pages + 1, dtype=np.int32)[None],
            page_tokens=16,
            device=pool.device,
        )
        positions = torch.arange(start, start + len(chunk))
        hidden = decoder.forward(torch.tensor(chunk), positions, attention, pool)
        if spoil and not found:
            pool[1 : 1 + -(-len(prompt) // 16)] = spoiled(pool[1 : 1 + -(-len(prompt) // 16)])
        start += len(chunk)
        found.append(int(decoder.logits(hidden[-1:]).argmax()))
        chunk = found[-1:]
    return found


def test_a_page_that_is_spoiled_again_and_again_stays_finite() -> None:
    values = torch.randn(64, dtype=torch.bfloat16)
    for _ in range(200):
        values = spoiled(values)
    assert values.isfinite().all()


def test_a_stream_without_tokens_has_no_distances(explainer: Explainer, jobs: list[Job]) -> None:
    assert explainer.distances(jobs[0], []).size == 0
    assert tau_of([np.zeros(0, np.float32)]) == TAU_MIN
    assert torch.get_num_threads() >= 1


def test_jobs_are_the_same_in_every_run_and_differ_by_name(jobs: list[Job]) -> None:
    from holdfast.api.text import Tokenizer

    encode = Tokenizer.load(MODEL, vocab_size=6144).encode
    assert make_jobs(encode, "oracle", 4, tokens=TOKENS) == jobs
    assert make_jobs(encode, "others", 1, tokens=TOKENS)[0].prompt != jobs[0].prompt
    assert all(64 < len(job.prompt) < 200 for job in jobs)
