"""ops.kernels.sample, interpreted, against ops.sampler: the same ids for the same keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import MARKS, interpreted

from holdfast.ops.sampler import Pairs, Sampler, SamplerInputs, plain_rows
from holdfast.wire import draw

pytestmark = MARKS


@pytest.fixture
def kernel(monkeypatch):
    module = interpreted("sample", monkeypatch)
    # The interpreter prepares itself again at each call of a helper, which takes longer than they.
    for name in ("_noise_bits", "_gumbel", "_draw_keys"):
        monkeypatch.setattr(module, name, getattr(module, name).rewrite())
    return module


@pytest.fixture
def small_tiles(kernel, monkeypatch):
    """Many tiles of several parts from few logits."""
    monkeypatch.setattr(kernel, "_TILE", 128)
    monkeypatch.setattr(kernel, "_PART", 32)
    return kernel


def inputs_for(rows: int, temperature: object, seed: int = 0, **changes: object) -> SamplerInputs:
    random = np.random.default_rng(seed)
    values = {
        "seeds": random.integers(0, 1 << 64, rows, np.uint64),
        "positions": random.integers(0, 1 << 20, rows),
        "temperature": np.broadcast_to(np.asarray(temperature, np.float32), rows).copy(),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "repetition": np.ones(rows, np.float32),
        "presence": np.zeros(rows, np.float32),
        "frequency": np.zeros(rows, np.float32),
        "top_logprobs": np.full(rows, -1, np.int32),
    }
    return SamplerInputs(**(values | changes))


def logits_of(rows: int, vocab: int, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


def drawn(kernel, logits: torch.Tensor, inputs: SamplerInputs, rows_max: int | None = None):
    rows, vocab = logits.shape
    draws = kernel.KeyedDraws(vocab, rows_max or rows, "cpu")
    return draws.sample(
        logits,
        torch.from_numpy(inputs.seeds.view(np.int64)),
        torch.from_numpy(inputs.positions),
        torch.from_numpy(inputs.temperature),
    )


def assert_same(kernel, logits: torch.Tensor, inputs: SamplerInputs) -> None:
    expected = Sampler(logits.shape[1]).sample(logits.float(), inputs)
    tokens, finite = drawn(kernel, logits, inputs)
    assert torch.equal(finite, expected.finite)
    assert torch.equal(tokens, expected.tokens), (tokens != expected.tokens).nonzero()


# A single id, less than a part, one part, tiles and parts that end early, the bundled vocabulary.
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(4, 1), (4, 2), (33, 1000), (5, 4096), (5, 4097), (1, 6144), (2, 6144), (33, 6144), (5, 9001)],
)
def test_greedy_and_keyed_rows_draw_the_samplers_ids(kernel, rows, vocab):
    temperature = np.array([0.0, 0.6, 1.0, 2.5])[np.arange(rows) % 4]
    assert_same(kernel, logits_of(rows, vocab), inputs_for(rows, temperature, seed=vocab))


# Peaked: most parts are passed over; flat: every part has candidates.
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 12.0])
def test_a_thousand_keyed_draws_have_the_samplers_ids(kernel, spread, monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", 1024)
    monkeypatch.setattr(kernel, "_PART", 512)
    temperature = np.array([0.3, 0.8, 1.0, 4.0])[np.arange(250) % 4]
    assert_same(kernel, logits_of(250, 1003, spread, seed=5), inputs_for(250, temperature))


@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_draws_over_many_tiles_have_the_samplers_ids(small_tiles, spread):
    assert_same(small_tiles, logits_of(24, 1003, spread, seed=6), inputs_for(24, 0.9))


def test_parts_and_tiles_without_a_candidate_are_passed_over(small_tiles, monkeypatch):
    """A peak beside noise that cannot reach it: its tile alone is judged."""
    logits = torch.zeros(4, 1003)
    logits[:, 500] = 100.0
    evaluated = noise_taken(small_tiles, monkeypatch)
    tokens, _ = drawn(small_tiles, logits, inputs_for(4, 1.0))
    assert (tokens == 500).all()
    # Eight tiles: each looks at the leaders, and one at one of its parts.
    assert len(evaluated) == 4 * (8 + 1)


def test_equal_logits_fall_to_the_lowest_id_across_parts_and_tiles(small_tiles):
    logits = torch.zeros(3, 700)
    logits[1, [300, 301, 699]] = 2.0
    logits[2, 0] = -0.0
    tokens, _ = drawn(small_tiles, logits, inputs_for(3, 0.0))
    assert tokens.tolist() == [0, 300, 0]


def test_equal_scores_fall_to_the_lowest_id(small_tiles, monkeypatch):
    """Noise made equal for all ids, so that scores tie within and across parts and tiles."""
    tl = small_tiles.tl
    monkeypatch.setattr(small_tiles, "_gumbel", lambda bits: bits.to(tl.float32) * 0.0)
    monkeypatch.setattr(
        small_tiles, "_noise_bits", lambda low, high, ids: (ids * 0 - 1).to(tl.uint32)
    )
    logits = torch.zeros(2, 700)
    logits[1, [200, 450, 451]] = 1.0
    tokens, _ = drawn(small_tiles, logits, inputs_for(2, 1.0))
    assert tokens.tolist() == [0, 200]


def noise_taken(kernel, monkeypatch) -> list[np.ndarray]:
    """The hash bits that noise was made of, one array a time, filled as the kernel runs."""
    taken: list[np.ndarray] = []
    whole = kernel._gumbel

    def gumbel(bits):
        taken.append(bits.handle.data.copy())
        return whole(bits)

    monkeypatch.setattr(kernel, "_gumbel", gumbel)
    return taken


def test_temperatures_near_nothing_are_the_largest_logit(small_tiles):
    logits = logits_of(3, 700)
    inputs = inputs_for(3, np.array([1e-20, 1e-38, 1e-3]))
    assert_same(small_tiles, logits, inputs)
    assert torch.equal(drawn(small_tiles, logits, inputs)[0], logits.argmax(-1))


def test_among_equal_leaders_the_noise_decides_at_the_lowest_temperature(small_tiles):
    logits = torch.zeros(30, 300)
    logits[:, [3, 150, 299]] = 5.0
    assert_same(small_tiles, logits, inputs_for(30, 1e-38))
    tokens, _ = drawn(small_tiles, logits, inputs_for(30, 1e-38))
    assert set(tokens.tolist()) == {3, 150, 299}


def test_a_temperature_that_drowns_the_logits_leaves_the_noise(small_tiles):
    assert_same(small_tiles, logits_of(10, 700), inputs_for(10, 1e6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_that_is_not_finite_is_reported_and_disturbs_no_other(small_tiles, bad, temperature):
    logits = logits_of(6, 700)
    logits[2, 699] = bad
    logits[4, 0] = bad
    inputs = inputs_for(6, temperature)
    assert_same(small_tiles, logits, inputs)
    tokens, finite = drawn(small_tiles, logits, inputs)
    assert finite.tolist() == [True, True, False, True, False, True]
    assert tokens[2] == tokens[4] == 0


def test_the_largest_numbers_are_finite(small_tiles):
    logits = torch.full((2, 300), -3e38)
    logits[:, 77] = 3e38
    assert_same(small_tiles, logits, inputs_for(2, np.array([0.0, 1.0])))


def test_logits_of_bfloat16_are_read_as_they_are(kernel):
    logits = logits_of(40, 6144).bfloat16()
    assert_same(kernel, logits, inputs_for(40, np.arange(40) % 3 * 0.7))


def test_seeds_may_be_unsigned_and_the_workspace_larger_and_used_again(small_tiles):
    draws = small_tiles.KeyedDraws(700, 9, "cpu")
    for rows, seed in ((9, 1), (2, 2), (5, 3)):
        logits, inputs = logits_of(rows, 700, seed=seed), inputs_for(rows, 1.0, seed)
        tokens, finite = draws.sample(
            logits,
            torch.from_numpy(inputs.seeds),
            torch.from_numpy(inputs.positions),
            torch.from_numpy(inputs.temperature),
        )
        assert torch.equal(tokens, Sampler(700).sample(logits, inputs).tokens)
        assert finite.dtype == torch.bool and finite.all()


def test_the_hash_is_the_definitions_to_the_bit(small_tiles, monkeypatch):
    seeds = np.array([0, (1 << 64) - 1, 0x9E37_79B9_7F4A_7C15], np.uint64)
    positions = np.array([0, 131_071, 7])
    taken = noise_taken(small_tiles, monkeypatch)
    inputs = inputs_for(3, 1e6, seeds=seeds, positions=positions)
    drawn(small_tiles, torch.zeros(3, 32), inputs)
    # One tile of one part that has ids: the leader's noise is taken first, then the part's.
    for row in range(3):
        expected = draw.noise_bits(int(seeds[row]), int(positions[row]), 32)
        assert np.array_equal(taken[2 * row + 1], expected)


def test_rows_that_ask_for_more_than_the_kernel_does_are_left_to_the_sampler():
    rows = 10
    temperature = np.full(rows, 0.7, np.float32)
    temperature[[1, 2]] = 0.0
    inputs = inputs_for(
        rows,
        temperature,
        top_p=np.array([1, 0.5, 1, 0.9, 1, 1, 1, 1, 1, 1], np.float32),
        min_p=np.array([0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0], np.float32),
        top_k=np.array([0, 4, 0, 0, 0, 50, 1000, 0, 0, 0], np.int32),
        top_logprobs=np.array([-1, -1, 0, -1, -1, -1, -1, -1, -1, -1], np.int32),
        bias=Pairs(np.array([7]), np.array([3])),
        bias_values=np.ones(1, np.float32),
        stops=Pairs(np.array([8]), np.array([3])),
        seen=Pairs(np.array([9]), np.array([3])),
        output_counts=np.ones(1, np.float32),
    )
    expected = [True, True, False, False, False, False, True, False, False, False]
    assert plain_rows(inputs, 1000).tolist() == expected
