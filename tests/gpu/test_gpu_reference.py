"""The torch reference on a GPU computes what it computes on the CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from devicekit import Hand, Request

from holdfast.config import Limits
from holdfast.device.cuda import open_device
from holdfast.device.memory import DeviceMemory, pool_bytes
from holdfast.device.runner import Runner
from holdfast.gpu_work import work_bytes
from holdfast.llm import LLM, SamplingParams
from holdfast.model.decoder import Decoder
from holdfast.model.spec import ModelSpec
from holdfast.model.weights import WeightsLayout, dummy_weights, load_weights
from holdfast.ops.attention import AttentionBatch
from holdfast.ops.checksum import PageSums, slab_sum
from holdfast.wire import checksum
from holdfast.wire.plan import ROW_NOT_FINITE

PROMPTS = [
    "The index of a table",
    "def read(path):\n    ",
    "In Python, a list is",
    "SELECT name FROM",
    "A transaction that",
    "The " * 90,
    "Names are bound by assignment. " * 20,
    "x",
]


REFERENCE = {"kernels": "reference", "rows_max": 8, "context_tokens": 1024}


def answers(device: str, dtype: str, **sampling) -> list:
    with LLM(device=device, dtype=dtype, **REFERENCE) as llm:
        params = SamplingParams(**{"max_tokens": 48, "ignore_eos": True, **sampling})
        return llm.generate(PROMPTS, params)


def test_greedy_tokens_in_float32_are_those_of_the_cpu():
    expected = [result.token_ids for result in answers("cpu", "float32", temperature=0.0)]
    found = [result.token_ids for result in answers("cuda:0", "float32", temperature=0.0)]
    assert found == expected


def test_every_greedy_token_in_bfloat16_is_nearly_the_most_likely_one_in_float32():
    """Bfloat16 keeps 8 bits: where it takes another token, the two were close in float32.

    Teacher-forced: the exact model reads what bfloat16 wrote and says how far each token was from
    its own choice.
    """
    written = answers("cuda:0", "bfloat16", temperature=0.0)
    gaps = []
    with LLM(device="cuda:0", dtype="float32", **REFERENCE) as exact:
        one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)
        for result in written:
            tokens = result.prompt_token_ids + result.token_ids
            first = len(result.prompt_token_ids)
            prefixes = [tokens[:end] for end in range(first, len(tokens))]
            for end, said in enumerate(exact.generate(prefixes, one), first):
                top = said.logprobs[0]
                tops = dict(zip(top.top_ids, top.top_logprobs, strict=True))
                best = max(tops.values())
                gaps.append(best - tops.get(tokens[end], -np.inf))
    assert max(gaps) < 0.35, sorted(gaps)[-10:]
    assert np.mean(np.array(gaps) == 0.0) > 0.95


def test_seeded_draws_are_those_of_the_cpu_but_for_the_last_bits_of_logits():
    sampling = {"temperature": 0.9, "seed": 11, "top_p": 0.95, "top_k": 200, "min_p": 0.01}
    expected = [result.token_ids for result in answers("cpu", "float32", **sampling)]
    found = [result.token_ids for result in answers("cuda:0", "float32", **sampling)]
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= len(PROMPTS) - 1


def decoder_on(spec: ModelSpec, device: str, dtype: str) -> Decoder:
    layout = WeightsLayout.of(spec, dtype)
    slab = torch.zeros(layout.bytes, dtype=torch.uint8, device=device)
    load_weights(spec, slab, layout)
    return Decoder(spec, layout.views(slab))


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_logits_are_close_to_the_cpus(tiny, dtype, close):
    """||ours - CPU float32|| / ||CPU float32||, over mixed chunks and single tokens."""
    open_device("cuda:0")
    lens = np.array([1, 40, 7, 33], np.int32)
    table = np.arange(1, 4 * 16 + 1, dtype=np.int32).reshape(4, 16)
    ids = np.random.default_rng(3).integers(3, tiny.vocab_size, int(lens.sum()))
    found = {}
    for device, kind in (("cpu", "float32"), ("cuda:0", dtype)):
        decoder = decoder_on(tiny, device, kind)
        shape = (80, tiny.layers, 2, 16, tiny.kv_heads, tiny.head_dim)
        pool = torch.zeros(shape, dtype=getattr(torch, kind), device=device)
        batch = AttentionBatch.build(lens, np.zeros(4, np.int32), table, 16, device)
        positions = np.concatenate([np.arange(length) for length in lens])
        hidden = decoder.forward(
            torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), batch, pool
        )
        found[device] = decoder.logits(hidden).double().cpu()
    error = (found["cuda:0"] - found["cpu"]).norm() / found["cpu"].norm()
    assert float(error) < close


# --- a runner of its own ---

LIMITS = Limits(
    vocab_size=6144,
    context_tokens=128,
    page_tokens=4,
    pages=600,
    rows_max=16,
    prefill_tokens=64,
    live_tokens=1 << 14,
)


@pytest.fixture
def hand(tiny) -> Hand:
    device = open_device("cuda:0")
    memory = DeviceMemory.allocate(tiny, LIMITS, device=device)
    layout = WeightsLayout.of(tiny, "float32")
    load_weights(tiny, memory.weights, layout)
    runner = Runner(LIMITS, Decoder(tiny, layout.views(memory.weights)), memory)
    runner.warm_up()
    runner.mark_ready()
    return Hand(runner)


def test_no_step_compiles_after_ready(hand):
    hand.generate(1, Request(list(range(3, 40))), 6, chunk=9)
    many = Request(list(range(50, 60)), fields={"temperature": 0.8, "seed": 3, "top_p": 0.9})
    hand.generate(2, many, 3)
    hand.run(seals=[1, 2, 3])
    assert hand.runner.stats.compiles == 0, hand.runner.stats.compiled_last


def test_warm_up_leaves_every_page_zero(tiny, hand):
    assert not hand.runner.memory.kv.any()


def test_a_row_that_is_not_finite_fails_alone_and_its_pages_are_zeroed(hand):
    memory = hand.runner.memory
    for row in (1, 2):
        hand.admit(row, Request(list(range(3, 15))), hand.fresh_pages(20))
    clean = hand.run([(1, 12, 1), (2, 12, 1)])
    memory.pool[6] = float("nan")  # A page of the second row.
    result = hand.run([(1, 1, 1), (2, 1, 1)])
    assert list(result.faults) == [0, ROW_NOT_FINITE]
    assert clean.tokens[0] == clean.tokens[1]
    hand.clear(2)
    hand.run([(1, 1, 1)], zeros=list(range(6, 11)))
    assert not memory.page_words[6:11].any()
    assert memory.pool[:6].isfinite().all()


def test_sums_of_pages_and_slabs_are_those_of_the_definition(hand):
    memory = hand.runner.memory
    memory.page_words.random_(-(1 << 31), 1 << 31)
    assert memory.checksum_kernel == "triton"
    pages = np.array([599, 0, 17, 17])
    words = memory.page_words.cpu().numpy().view(np.uint32)
    expected = checksum.page_sums(words[pages], checksum.weights(words.shape[1]))
    assert np.array_equal(memory.seal_sums(pages), expected)
    for size in (64, 1 << 20, (3 << 20) + 256):
        slab = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
        assert slab_sum(slab) == checksum.bytes_sum(slab.cpu().numpy())


@pytest.mark.parametrize("words", [1, 8, 32768, 32772, 589824])
def test_the_compiled_kernel_and_the_expression_agree_at_every_length(words):
    pool = torch.randint(-(1 << 31), 1 << 31, (5, words), dtype=torch.int32, device="cuda:0")
    pages = np.array([4, 1, 1])
    host = pool.cpu().numpy().view(np.uint32)
    expected = checksum.page_sums(host[pages], checksum.weights(words))
    sums = PageSums(words, "cuda:0")
    assert np.array_equal(sums.of(pool, pages), expected)
    sums.kernel = False
    assert np.array_equal(sums.of(pool, pages), expected)


def test_a_step_takes_no_more_memory_than_sizing_reserves(tiny):
    """An 8B model's shape in two layers: 32 rows of 4,096 tokens, and a chunk of 512 at 4,096."""
    open_device("cuda:0")
    spec = dataclasses.replace(
        tiny,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        layers=2,
        heads=32,
        kv_heads=8,
        head_dim=128,
        context_tokens=8192,
        tied_embeddings=False,
    )
    limits = Limits(
        vocab_size=151936, context_tokens=8192, pages=32 * 258, rows_max=64, live_tokens=1 << 19
    )
    memory = DeviceMemory.allocate(
        spec, limits, dtype="bfloat16", pool_dtype="bfloat16", device="cuda:0"
    )
    assert memory.kv.numel() == pool_bytes(spec, limits, "bfloat16")
    layout = WeightsLayout.of(spec, "bfloat16")
    dummy_weights(spec, memory.weights, layout)
    runner = Runner(limits, Decoder(spec, layout.views(memory.weights)), memory)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.warm_up()
    table = np.arange(1, 32 * 257 + 1, dtype=np.int32).reshape(32, 257)
    for rows, starts, length in ((32, 4095, 1), (1, 3584, 512)):
        batch = AttentionBatch.build(
            np.full(rows, length, np.int32),
            np.full(rows, starts, np.int32),
            table[:rows],
            16,
            "cuda:0",
        )
        tokens = torch.zeros(rows * length, dtype=torch.int64, device="cuda:0")
        positions = torch.full((rows * length,), starts, device="cuda:0")
        hidden = runner.decoder.forward(tokens, positions, batch, memory.pool)
        assert runner.decoder.logits(hidden[:rows]).isfinite().all()
    taken = torch.cuda.max_memory_allocated() - before
    room = work_bytes(spec, limits, itemsize=2, kernels="reference", graphs=False)
    assert taken < room, f"{taken / 2**30:.2f} GiB"
