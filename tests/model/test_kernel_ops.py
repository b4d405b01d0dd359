"""A decoder of kernels, interpreted, says what the reference says."""

from __future__ import annotations

import model_helpers
import numpy as np
import pytest
import torch
from interpreted import MARKS, interpreted
from model_helpers import PagedRequests, dummy_decoder, tiny_spec

from holdfast.model.decoder import Decoder
from holdfast.model.spec import ModelSpec
from holdfast.ops.attention import AttentionBatch

pytestmark = MARKS

# The interpreter takes its time: fewer lanes and ids.
SPECS = {**model_helpers.SPECS, "qwen3 3:1": tiny_spec(head_dim=8, vocab_size=61)}


@pytest.fixture
def of_kernels(monkeypatch):
    """Makes the decoder that model_helpers.dummy_decoder does, of kernels."""
    for name in ("norm", "rope", "gate"):
        interpreted(name, monkeypatch)

    def make(spec: ModelSpec) -> Decoder:
        from holdfast.model.kernel_ops import KernelOps

        # With the reference's attention: tests/device/test_fast_path.py has all of it.
        ops = KernelOps(spec, torch.device("cpu"), context_tokens=64)
        return dummy_decoder(spec, seed=3, ops=ops)

    return make


def greedy(decoder: Decoder, prompts: list[list[int]], steps: int) -> PagedRequests:
    """Prompts in one step (one of them in two), then `steps` of decode, each row its own token."""
    rows = range(len(prompts))
    requests = PagedRequests(decoder, [prompt + [0] * steps for prompt in prompts], page_tokens=3)
    requests.step([(0, 2), *((row, len(prompts[row])) for row in rows[1:])])
    requests.step([(0, len(prompts[0]) - 2)])
    for step in range(steps):
        for row in rows:
            token = int(requests.logits[row][-1][-1].argmax())
            requests.texts[row][len(prompts[row]) + step] = token
        requests.step([(row, 1) for row in rows])
    return requests


@pytest.mark.parametrize("name", list(SPECS))
def test_a_decoder_of_kernels_has_the_references_tokens_and_logits(name, of_kernels):
    prompts = [[5, 9, 1, 33, 2, 8, 60], [4], [7, 7, 12, 50]]
    expected = greedy(dummy_decoder(SPECS[name], seed=3), prompts, steps=4)
    found = greedy(of_kernels(SPECS[name]), prompts, steps=4)
    assert found.texts == expected.texts
    for row in range(len(prompts)):
        logits, wanted = found.result(row), expected.result(row)
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_padding_of_a_batch_stores_nothing_and_disturbs_no_row(of_kernels):
    """A step whose last row has slot -1, as a padded graph's has."""
    decoder = of_kernels(SPECS["qwen3 3:1"])
    text = [5, 9, 1]
    requests = PagedRequests(decoder, [text], page_tokens=4)
    requests.step([(0, 3)])
    expected, pool = requests.result(), requests.pool.clone()

    lens, starts = np.array([4], np.int32), np.array([0], np.int32)
    batch = AttentionBatch.build(lens, starts, requests.table, 4, "cpu")
    positions = torch.tensor([0, 1, 2, 0])
    requests.pool.fill_(0.0)
    step = decoder.ops.begin(positions, batch, requests.pool, torch.float32)
    batch.slots[3] = -1
    stream = decoder.stream(torch.tensor([*text, 0]), step.rows)
    decoder.compute(stream, step, requests.pool)
    hidden = stream.hidden
    torch.testing.assert_close(decoder.logits(hidden)[:3], expected, atol=1e-5, rtol=1e-5)
    page = requests.table[0, 0]
    stored = requests.pool[page]
    # A product of four rows is not a product of three to the last bit.
    torch.testing.assert_close(stored[:, :, :3], pool[page][:, :, :3], atol=1e-5, rtol=1e-5)
    assert (stored[:, :, 3] == 0).all()


def test_the_head_gives_logits_of_its_own_each_time(of_kernels):
    decoder = of_kernels(SPECS["qwen3 3:1"])
    first = decoder.logits(torch.ones(2, 48))
    kept = first.clone()
    decoder.logits(torch.zeros(2, 48))
    assert torch.equal(first, kept)
