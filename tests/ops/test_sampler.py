"""ops.sampler: the stated order, keyed noise to the bit, rows that do not see each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from holdfast.ops import sampler as module
from holdfast.ops.sampler import Draws, Pairs, Sampler, SamplerInputs, seen_pairs
from holdfast.wire import draw

VOCAB = 997


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Ask:
    """One row's parameters in plain form; the oracle and the inputs are both made from it."""

    seed: int = 0
    position: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_logprobs: int = -1
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    stops: list[int] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)
    output: list[int] = dataclasses.field(default_factory=list)

    @property
    def penalised(self) -> bool:
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0


def inputs_of(asks: list[Ask], vocab: int = VOCAB) -> SamplerInputs:
    def floats(name: str) -> np.ndarray:
        return np.array([getattr(ask, name) for ask in asks], np.float32)

    bias = [(i, t, v) for i, ask in enumerate(asks) for t, v in ask.bias.items()]
    stops = [(i, t) for i, ask in enumerate(asks) for t in ask.stops]
    seen = [
        (i, t, flag)
        for i, ask in enumerate(asks)
        if ask.penalised
        for flag, ids in ((0, ask.prompt), (1, ask.output))
        for t in ids
    ]
    pairs, counts = seen_pairs(
        np.array([entry[0] for entry in seen], np.int64),
        np.array([entry[1] for entry in seen], np.int64),
        np.array([entry[2] for entry in seen], np.bool_),
        vocab,
    )
    return SamplerInputs(
        seeds=np.array([ask.seed for ask in asks], np.uint64),
        positions=np.array([ask.position for ask in asks], np.int64),
        temperature=floats("temperature"),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        top_k=np.array([ask.top_k for ask in asks], np.int32),
        repetition=floats("repetition"),
        presence=floats("presence"),
        frequency=floats("frequency"),
        top_logprobs=np.array([ask.top_logprobs for ask in asks], np.int32),
        bias=Pairs(*(np.array([entry[at] for entry in bias], np.int64) for at in (0, 1))),
        bias_values=np.array([entry[2] for entry in bias], np.float32),
        stops=Pairs(*(np.array([entry[at] for entry in stops], np.int64) for at in (0, 1))),
        seen=pairs,
        output_counts=counts,
    )


def sample(logits: torch.Tensor, asks: list[Ask], top_count: int = 0) -> Draws:
    sampler = Sampler(logits.shape[1])
    return sampler.sample(logits, inputs_of(asks, logits.shape[1]), top_count)


def oracle(logits: np.ndarray, ask: Ask) -> int:
    """The stated order in float64, one row at a time, with wire.draw's noise."""
    x = logits.astype(np.float64)
    for token, value in ask.bias.items():
        x[token] += value
    for token in set(ask.prompt + ask.output):
        x[token] = x[token] * ask.repetition if x[token] < 0 else x[token] / ask.repetition
    for token in set(ask.output):
        x[token] -= ask.presence + ask.frequency * ask.output.count(token)
    x[ask.stops] = -np.inf
    if ask.temperature == 0:
        return int(x.argmax())
    x /= np.float32(ask.temperature)
    order = np.argsort(-x, kind="stable")
    if ask.top_k:
        order = order[: ask.top_k]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    if ask.top_p < 1:
        kept = 1 + int((np.cumsum(p)[:-1] < np.float32(ask.top_p)).sum())
        order, p = order[:kept], p[:kept]
    order = order[p >= np.float32(ask.min_p) * p[0]]
    scores = x[order] + draw.gumbel(ask.seed, ask.position, x.size)[order]
    return int(order[scores.argmax()])


def random_ask(rng: np.random.Generator, vocab: int = VOCAB) -> Ask:
    def maybe(value, other):
        return value if rng.random() < 0.5 else other

    def ids(count):
        return rng.integers(0, vocab, rng.integers(0, count)).tolist()

    return Ask(
        seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
        position=int(rng.integers(0, 1 << 20)),
        temperature=maybe(float(np.float32(rng.uniform(0.2, 2))), maybe(0.0, 1.0)),
        top_p=maybe(float(np.float32(rng.uniform(0.05, 0.999))), 1.0),
        min_p=maybe(float(np.float32(rng.uniform(0.0, 0.3))), 0.0),
        top_k=maybe(int(rng.choice([1, 2, 40, 300, vocab - 1, vocab, vocab + 5])), 0),
        repetition=maybe(float(np.float32(rng.uniform(0.7, 1.5))), 1.0),
        presence=maybe(float(np.float32(rng.uniform(-2, 2))), 0.0),
        frequency=maybe(float(np.float32(rng.uniform(-1, 1))), 0.0),
        top_logprobs=maybe(int(rng.integers(0, 6)), -1),
        bias={t: float(np.float32(rng.normal() * 5)) for t in set(maybe(ids(9), []))},
        stops=sorted(set(maybe(ids(5), []))),
        prompt=ids(60),
        output=ids(60),
    )


def random_logits(rng: np.random.Generator, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    scale = rng.uniform(0.5, 6, (rows, 1))
    return torch.from_numpy((rng.normal(size=(rows, vocab)) * scale).astype(np.float32))


# --- the noise ---


def test_noise_bits_are_the_definition_to_the_bit():
    rng = np.random.default_rng(1)
    edges = np.array([0, 1, 2**64 - 1], np.uint64)
    seeds = np.concatenate([rng.integers(0, 1 << 64, 30, np.uint64), edges])
    positions = np.concatenate([rng.integers(0, 1 << 31, 30), [0, 1, 4095]])
    sampler = Sampler(6144)
    bits = sampler.noise_bits(seeds, positions).numpy().view(np.uint32)
    chosen = torch.from_numpy(rng.integers(0, 6144, (33, 50)))
    some = sampler.noise_bits(seeds, positions, chosen).numpy().view(np.uint32)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        expected = draw.noise_bits(seed, position, 6144)
        assert np.array_equal(bits[row], expected)
        assert np.array_equal(some[row], expected[chosen[row].numpy()])


def test_gumbel_noise_is_the_definition_and_the_same_for_lists_of_ids():
    seeds, positions = np.array([5, 2**63], np.uint64), np.array([0, 77])
    sampler = Sampler(VOCAB)
    noise = sampler.gumbel(seeds, positions)
    for row in range(2):
        expected = draw.gumbel(int(seeds[row]), int(positions[row]), VOCAB)
        assert np.array_equal(noise[row].numpy(), expected)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 13)))
    assert torch.equal(sampler.gumbel(seeds, positions, ids), noise.gather(1, ids))


# --- the order ---


def test_random_mixes_of_parameters_draw_what_the_stated_order_draws():
    rng = np.random.default_rng(2)
    for _ in range(12):
        asks = [random_ask(rng) for _ in range(32)]
        logits = random_logits(rng, 32)
        found = sample(logits, asks, 5).tokens.tolist()
        assert found == [oracle(logits[i].numpy(), ask) for i, ask in enumerate(asks)]


def test_filters_keep_the_sets_that_transformers_keeps():
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = np.random.default_rng(3)
    logits = random_logits(rng, 1, 64)
    history = rng.integers(0, 64, 20).tolist()
    processors = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TopKLogitsWarper(12),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ]
    scores = logits.clone()
    for process in processors:
        scores = process(torch.tensor([history]), scores)
    allowed = set(scores.isfinite().nonzero()[:, 1].tolist())
    asks = [
        Ask(seed=s, temperature=1, top_k=12, top_p=0.8, min_p=0.05, repetition=1.3, prompt=history)
        for s in range(3000)
    ]
    drawn = sample(logits.expand(3000, -1), asks).tokens
    assert set(drawn.tolist()) == allowed
    shares = torch.bincount(drawn, minlength=64) / 3000
    assert (shares - scores.softmax(-1)[0]).abs().max() < 0.03


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    asks = [Ask(seed=s, position=7, temperature=1.5) for s in range(20000)]
    drawn = sample(logits.expand(20000, -1), asks).tokens
    shares = torch.bincount(drawn, minlength=5) / 20000
    assert (shares - (logits[0] / 1.5).softmax(-1)).abs().max() < 0.015


def test_greedy_takes_the_lowest_id_on_ties_with_and_without_edits():
    logits = torch.zeros(3, 50)
    logits[:, [7, 3, 49]] = 2.0
    asks = [Ask(), Ask(bias={3: -1.0}), Ask(stops=[3, 7])]
    assert sample(logits, asks).tokens.tolist() == [3, 7, 49]
    assert sample(logits[:1], asks[:1]).tokens.tolist() == [3]


def test_top_p_keeps_the_smallest_set_even_among_equal_probabilities():
    asks = [Ask(seed=s, temperature=1, top_p=0.5) for s in range(400)]
    drawn = sample(torch.zeros(400, 10), asks).tokens
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


def test_top_p_near_zero_and_min_p_one_keep_exactly_the_most_likely():
    rng = np.random.default_rng(4)
    logits = random_logits(rng, 40)
    best = logits.argmax(-1)
    for ask in ({"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}):
        asks = [Ask(seed=s, temperature=2.0, **ask) for s in range(40)]
        assert torch.equal(sample(logits, asks).tokens, best)


def test_a_tiny_temperature_is_greedy_and_never_overflows():
    logits = random_logits(np.random.default_rng(5), 3) * 100
    for filters in ({}, {"top_p": 0.9}, {"min_p": 0.1}):
        asks = [Ask(seed=s, temperature=1e-38, **filters) for s in range(3)]
        assert torch.equal(sample(logits, asks).tokens, logits.argmax(-1))


def test_a_nucleus_longer_than_the_first_list_is_found_in_full():
    logits = random_logits(np.random.default_rng(6), 8) * 0.01
    asks = [Ask(seed=s, temperature=1.0, top_p=0.97) for s in range(8)]
    found = sample(logits, asks).tokens.tolist()
    assert found == [oracle(logits[i].numpy(), ask) for i, ask in enumerate(asks)]
    assert any(token != 0 for token in found)


# --- one row does not see another ---


def test_a_row_alone_and_in_a_batch_of_64_gives_the_same_bits():
    rng = np.random.default_rng(7)
    for _ in range(4):
        asks = [random_ask(rng) for _ in range(64)]
        logits = random_logits(rng, 64)
        together = sample(logits, asks, 5)
        for i, ask in enumerate(asks):
            alone = sample(logits[i : i + 1], [ask], max(ask.top_logprobs, 0))
            assert alone.tokens[0] == together.tokens[i], ask
            if ask.top_logprobs >= 0:
                at = int(np.flatnonzero(together.asked == i)[0])
                k = ask.top_logprobs
                assert torch.equal(alone.logprobs[0], together.logprobs[at])
                assert torch.equal(alone.top_ids[0], together.top_ids[at, :k])
                assert torch.equal(alone.top_logprobs[0], together.top_logprobs[at, :k])


@pytest.mark.parametrize("vocab", [17, 40000])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_decides_a_draw_has_the_same_bits_in_any_batch(vocab, threads):
    """Cut-offs and noise themselves, for a vocabulary that threads would split (over 32768)."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(8)
    logits = random_logits(rng, 9, vocab)
    sampler = Sampler(vocab)
    seeds, positions = rng.integers(0, 1 << 63, 9).astype(np.uint64), np.arange(9)
    noise, softmax = sampler.gumbel(seeds, positions), logits.softmax(-1)
    logprobs, keys = logits.log_softmax(-1), sampler._keys(logits)
    for size in (1, 2, 3, 8):
        for start in range(9 - size + 1):
            part = slice(start, start + size)
            assert torch.equal(sampler.gumbel(seeds[part], positions[part]), noise[part])
            assert torch.equal(logits[part].softmax(-1), softmax[part])
            assert torch.equal(logits[part].log_softmax(-1), logprobs[part])
            assert torch.equal(sampler._keys(logits[part]), keys[part])
    asks = [Ask(seed=i, temperature=1.0, top_p=0.9) for i in range(9)]
    together = sample(logits, asks).tokens
    assert all(sample(logits[i : i + 1], asks[i : i + 1]).tokens == together[i] for i in range(9))


def test_ordered_candidates_are_a_prefix_of_the_full_order():
    logits = random_logits(np.random.default_rng(9), 5).round(decimals=1)
    keys = Sampler(VOCAB)._keys(logits)
    full = module._leading(keys, VOCAB)
    expected = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    assert np.array_equal(full.numpy(), expected)
    for count in (1, 2, 40, 500):
        assert torch.equal(module._leading(keys, count), full[:, :count])


# --- bad rows, logprobs, inputs left alone ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_reported_and_disturbs_no_other(bad):
    rng = np.random.default_rng(10)
    asks = [random_ask(rng) for _ in range(16)]
    for ask in asks:
        ask.top_logprobs = 3
    logits = random_logits(rng, 16)
    clean = sample(logits, asks, 3)
    logits[5, 123] = bad
    logits[11] = bad
    found = sample(logits, asks, 3)
    healthy = [i for i in range(16) if i not in (5, 11)]
    assert (~found.finite).nonzero()[:, 0].tolist() == [5, 11]
    assert found.tokens[[5, 11]].tolist() == [0, 0]
    assert torch.equal(found.tokens[healthy], clean.tokens[healthy])
    assert torch.equal(found.top_logprobs[healthy], clean.top_logprobs[healthy])
    assert not found.logprobs[[5, 11]].any()
    assert not found.top_logprobs[[5, 11]].any()


def test_huge_but_finite_logits_are_not_called_faulty():
    logits = torch.full((2, 100), 3e38)
    logits[:, 40] = 3.2e38
    found = sample(logits, [Ask(), Ask(temperature=1.0)])
    assert found.finite.all()
    assert found.tokens.tolist() == [40, 40]


def test_logprobs_are_of_the_raw_distribution():
    rng = np.random.default_rng(11)
    logits = random_logits(rng, 3)
    asks = [
        Ask(top_logprobs=4, bias={9: 100.0}),
        Ask(),
        Ask(top_logprobs=0, temperature=0.3, top_k=2),
    ]
    found = sample(logits, asks, 4)
    raw = logits.log_softmax(-1)
    assert found.asked.tolist() == [0, 2]
    assert found.tokens[0] == 9
    assert torch.equal(found.logprobs, raw[[0, 2], found.tokens[[0, 2]]])
    values, ids = raw[0].topk(4)
    assert torch.equal(found.top_ids[0], ids)
    assert torch.equal(found.top_logprobs[0], values)


def test_more_alternatives_than_ids_leave_zeros():
    found = sample(torch.tensor([[0.0, 1.0]]), [Ask(top_logprobs=5)], 5)
    assert found.top_ids.tolist() == [[1, 0, 0, 0, 0]]
    assert found.top_logprobs[0, 2:].tolist() == [0, 0, 0]


def test_the_logits_are_not_written():
    rng = np.random.default_rng(12)
    for count in (1, 32):
        logits = random_logits(rng, count)
        logits[0, 0] = torch.nan
        before = logits.clone()
        sample(logits, [random_ask(rng) for _ in range(count)], 5)
        assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
