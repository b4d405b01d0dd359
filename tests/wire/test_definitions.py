"""Checksums and keyed draws: the definitions that twins and oracles are held to."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.wire.checksum import bytes_sum, page_sums, weights
from holdfast.wire.draw import gumbel, noise_bits
from holdfast.wire.messages import (
    Accepted,
    Refused,
    Sampling,
    Submit,
    TokenBatch,
    decode_to_api,
    decode_to_core,
    encode,
)

WORDS = 64


@settings(max_examples=200, deadline=None)
@given(st.integers(0, WORDS - 1), st.integers(1, 2**32 - 1), st.integers(0, 2**32))
def test_any_change_of_one_word_changes_the_sum(at, flip, seed):
    page = np.random.default_rng(seed).integers(0, 2**32, (1, WORDS), dtype=np.uint32)
    before = page_sums(page, weights(WORDS))
    page[0, at] ^= np.uint32(flip)
    assert page_sums(page, weights(WORDS)) != before


@settings(max_examples=100, deadline=None)
@given(st.integers(0, WORDS - 2), st.integers(0, 2**32))
def test_swapped_words_change_the_sum(at, seed):
    page = np.random.default_rng(seed).integers(0, 2**32, (1, WORDS), dtype=np.uint32)
    swapped = page.copy()
    swapped[0, [at, at + 1]] = page[0, [at + 1, at]]
    if not np.array_equal(page, swapped):
        assert page_sums(page, weights(WORDS)) != page_sums(swapped, weights(WORDS))


def test_the_sum_is_its_formula():
    page = np.array([[7, 0, 2**32 - 1]], np.uint32)
    golden, seed = 0x9E37_79B9_7F4A_7C15, 0x9AE1_6A3B_2F90_404F
    want = seed + sum((w + 1) * (((i + 1) * golden) | 1) for i, w in enumerate(page[0].tolist()))
    assert int(page_sums(page, weights(3))[0]) == want % 2**64


def test_byte_sums_see_every_block_and_the_order_of_blocks():
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)
    whole = bytes_sum(data, 1024)
    for at in (0, 1023, 1024, 4096, 4999):
        changed = data.copy()
        changed[at] ^= 1
        assert bytes_sum(changed, 1024) != whole
    moved = np.concatenate([data[1024:2048], data[:1024], data[2048:]])
    assert bytes_sum(moved, 1024) != whole


def test_draws_depend_on_seed_position_and_token_alone():
    assert np.array_equal(noise_bits(5, 9, 100), noise_bits(5, 9, 400)[:100])
    assert not np.array_equal(noise_bits(5, 9, 100), noise_bits(5, 10, 100))
    assert not np.array_equal(noise_bits(5, 9, 100), noise_bits(6, 9, 100))


def test_gumbel_noise_draws_from_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    drawn = [int(np.argmax(logits + gumbel(11, position, 4))) for position in range(8000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    # Four standard errors of a share near one half: 4 * sqrt(0.25 / 8000) = 0.022.
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.022


def test_neighbouring_draws_are_not_correlated():
    first = np.stack([gumbel(3, position, 64) for position in range(500)])
    second = np.stack([gumbel(4, position, 64) for position in range(500)])
    for left, right in ((first[:-1], first[1:]), (first, second), (first[:, :-1], first[:, 1:])):
        correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(left.size)


def test_messages_survive_the_wire():
    sampling = Sampling(temperature=0.5, stop_ids=(1, 2), bias=((3, -1.5),))
    submit = Submit((1, 2), b"\0" * 8, (2**64 - 1, 3), 5, sampling, 1.5, "t", -2)
    assert decode_to_core(encode(submit)) == submit
    for message in (Accepted((1,)), Refused((1,), 429, "full", retry_after_s=2.0)):
        assert decode_to_api(encode(message)) == message


def test_token_batches_survive_the_wire():
    batch = TokenBatch(
        step=3,
        requests=np.array([2**63], np.uint64),
        indexes=np.array([4], np.int32),
        tokens=np.array([9], np.int32),
        ends=np.array([1], np.uint8),
        cached=np.array([16], np.int32),
        top_k=2,
        logprobs=np.array([-0.5], np.float32),
        top_ids=np.array([9, 8], np.int32),
        top_logprobs=np.array([-0.5, -1.0], np.float32),
    )
    back = TokenBatch.decode(batch.encode())
    for name in batch.__slots__:
        assert np.array_equal(getattr(back, name), getattr(batch, name)), name
