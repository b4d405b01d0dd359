"""The same request gives bit-equal logits in any batch, chunking, cache layout and thread count."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SPECS, PagedRequests, alone, dummy_decoder

from holdfast.model import layers
from holdfast.ops.attention import Scratch

# The bundled model's products, then odd ones.
SHAPES = [(320, 640), (384, 320), (320, 1792), (896, 320), (320, 6144)]
SHAPES += [(random.Random(n).randrange(17, 1200), 40 + 97 * n) for n in range(10)]


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(SPECS))
def decoder(request):
    return dummy_decoder(SPECS[request.param], seed=3)


def text_of(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(150) for _ in range(length)]


@pytest.mark.parametrize("onednn", [layers.ONEDNN, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_row_of_a_linear_does_not_depend_on_the_other_rows(
    inner, outer, threads, onednn, monkeypatch
) -> None:
    monkeypatch.setattr(layers, "ONEDNN", onednn)
    generator = torch.Generator().manual_seed(inner * outer)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator)
    x = torch.randn(1200, inner, generator=generator)
    torch.set_num_threads(1)
    blocks = [layers.linear(x[at : at + 8], weight, bias) for at in range(0, 200, 8)]
    reference = torch.cat(blocks)
    torch.set_num_threads(threads)
    for rows in (8, 16, 24, 40, 64, 72, 136, 200, 520, 1024, 1200):
        out = layers.linear(x[:rows], weight, bias)
        assert torch.equal(out[:200], reference[:rows]), f"{rows} rows"
    for first in (1, 3, 6):
        out = layers.linear(x[first : first + 64], weight, bias)
        assert torch.equal(out, reference[first : first + 64]), f"from row {first}"
    torch.testing.assert_close(reference, x[:200] @ weight.T + bias, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_norm_gate_and_rotation_do_not_depend_on_the_other_rows(threads) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(2)
    for width in (320, 64, 91, 37):
        x = torch.randn(900, 2 * width, generator=generator) * 3
        frequencies = layers.rotation_frequencies(2 * width, 1e4, None)
        positions = torch.randint(0, 4096, (900,), generator=generator)

        def results(rows: slice, x=x, width=width, frequencies=frequencies, positions=positions):
            some = x[rows].contiguous()
            count = some.shape[0]
            rotated = torch.empty(count, 1, 2 * width)
            layers.Rotation(positions[rows], frequencies).apply(some.clone()[:, None], out=rotated)
            norm = layers.rms_norm(some, x[0], 1e-6, out=torch.empty_like(some))
            gate = layers.gated(some, Scratch(some.device))
            return torch.cat((rotated[:, 0], norm, gate), dim=1)

        whole = results(slice(0, 900))
        for first, count in ((0, 1), (3, 8), (17, 64), (101, 333), (1, 899)):
            some = slice(first, first + count)
            assert torch.equal(results(some), whole[some]), (width, first, count)


def test_chunking_does_not_change_a_bit(decoder) -> None:
    text = text_of(1, 150)
    whole = alone(decoder, text)
    for chunks in ([1] * 150, [50] * 3, [7] * 21 + [3], [100, 1, 1, 48], [33, 32, 31, 54]):
        requests = PagedRequests(decoder, [text])
        for count in chunks:
            requests.step([(0, count)])
        assert torch.equal(requests.result(), whole), chunks


def test_page_size_within_a_block_and_page_order_do_not_change_a_bit(decoder) -> None:
    text = text_of(2, 140)
    whole = alone(decoder, text, page_tokens=16)
    for page_tokens, seed in ((1, 1), (4, 2), (32, 3), (64, 4)):
        assert torch.equal(alone(decoder, text, page_tokens, seed), whole), page_tokens


@pytest.mark.parametrize("page_tokens", [3, 6, 12, 128])
def test_chunking_does_not_change_a_bit_with_pages_that_do_not_divide_64(page_tokens) -> None:
    decoder = dummy_decoder(SPECS["qwen3 3:1"], seed=3)
    text = text_of(4, 150)
    whole = alone(decoder, text, page_tokens)
    requests = PagedRequests(decoder, [text], page_tokens)
    for count in (60, 1, 4, 1, 1, 33, 50):
        requests.step([(0, count)])
    assert torch.equal(requests.result(), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_decode_row_is_the_same_in_every_batch_from_1_to_64(threads) -> None:
    decoder = dummy_decoder(SPECS["qwen3 3:1"], seed=3)
    texts = [text_of(10 + row, 3 + 5 * row % 97) for row in range(64)]
    torch.set_num_threads(1)
    expected = [alone(decoder, text) for text in texts]
    torch.set_num_threads(threads)
    for rows in (*range(1, 10), 16, 31, 33, 63, 64):
        requests = PagedRequests(decoder, texts[:rows])
        requests.step([(row, len(texts[row]) - 1) for row in range(rows)])
        requests.step([(row, 1) for row in reversed(range(rows))])
        for row in range(rows):
            assert torch.equal(requests.result(row), expected[row]), (rows, row)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(data=st.data(), threads=st.sampled_from([1, 2]))
def test_any_mix_of_prefill_chunks_and_decode_gives_the_same_bits(data, threads) -> None:
    decoder = dummy_decoder(SPECS["qwen3 3:1"], seed=3)
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=12))
    texts = [text_of(20 + row, length) for row, length in enumerate(lengths)]
    torch.set_num_threads(threads)
    requests = PagedRequests(decoder, texts, page_tokens=data.draw(st.sampled_from([1, 4, 16])))
    left = dict(enumerate(lengths))
    while left:
        chosen = data.draw(st.permutations(sorted(left)))
        chosen = chosen[: data.draw(st.integers(1, len(chosen)))]
        parts = [(r, data.draw(st.sampled_from([1, 2, 8, 31, 140]))) for r in chosen]
        parts = [(request, min(count, left[request])) for request, count in parts]
        requests.step(parts)
        for request, count in parts:
            left[request] -= count
            if not left[request]:
                del left[request]
    torch.set_num_threads(1)
    for row, text in enumerate(texts):
        assert torch.equal(requests.result(row), alone(decoder, text)), row
