"""The fused kernels, compiled, against what torch computes on the same GPU at real shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gpu_reference import PROMPTS

from holdfast.llm import LLM, SamplingParams
from holdfast.model.layers import Rotation, gated, rms_norm, rotation_frequencies
from holdfast.ops.attention import Scratch
from holdfast.ops.sampler import Sampler, SamplerInputs

EPS = 1e-6
# A rounding of the result, and one more where the twin rounds in between.
CLOSE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},
    torch.bfloat16: {"atol": 2**-7, "rtol": 2**-6},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request):
    return request.param


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


# A number of rows is a grid and no kernel; a width is one: parts of a block or whole, few warps
# or as many as there are.
@pytest.mark.parametrize(
    ("rows", "hidden"), [(33, 63), (256, 1000), (2, 1024), (1, 4096), (256, 4096), (32, 16_384)]
)
def test_the_stream_is_added_to_and_normed(rows, hidden, dtype):
    from holdfast.ops.kernels.norm import add_rms_norm

    x, delta = normal(rows, hidden, dtype=dtype), normal(rows, hidden, dtype=dtype, seed=1)
    weight = normal(hidden, dtype=dtype, seed=2)
    added = x + delta
    expected = rms_norm(added, weight, EPS, out=torch.empty_like(added))
    out = add_rms_norm(x, delta, weight, EPS, torch.empty_like(x))
    assert torch.equal(x, added)
    torch.testing.assert_close(out, expected, **CLOSE[dtype])
    torch.testing.assert_close(add_rms_norm(x, None, weight, EPS, out), expected, **CLOSE[dtype])


@pytest.mark.parametrize(("rows", "width"), [(1, 63), (33, 1025), (256, 12_288)])
def test_the_gate(rows, width, dtype):
    from holdfast.ops.kernels.gate import silu_mul

    gate_up = normal(rows, 2 * width, dtype=dtype)
    out = silu_mul(gate_up, torch.empty(rows, width, dtype=dtype, device="cuda"))
    expected = gated(gate_up, Scratch(gate_up.device))
    torch.testing.assert_close(out, expected, **CLOSE[dtype])


# Every head size that is served; the last is a pool of more than 2^31 elements, used at its end.
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "page_tokens", "pages", "normed"),
    [
        (1, 16, 8, 128, 16, 40, True),
        (200, 32, 8, 128, 16, 40, False),
        (33, 8, 8, 64, 3, 90, True),
        (256, 7, 1, 80, 1, 300, True),
        (17, 7, 1, 80, 1, 300, False),
        (200, 9, 3, 96, 16, 40, True),
        (200, 4, 2, 256, 16, 40, True),
        (256, 32, 8, 128, 16, 24_000, True),
    ],
)
def test_heads_are_normed_rotated_and_appended(
    tokens, heads, kv_heads, head_dim, page_tokens, pages, normed
):
    from holdfast.ops.kernels.rope import rotate_append, rotation_table

    dtype, layers, layer = torch.bfloat16, 3, 2
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = [normal(head_dim, dtype=dtype, seed=seed) for seed in (3, 4)] if normed else [None] * 2
    pool = torch.full(
        (pages, layers, 2, page_tokens, kv_heads, head_dim),
        float("nan"),
        device="cuda",
        dtype=dtype,
    )
    assert pages < 10_000 or pool.numel() > 1 << 31
    generator = torch.Generator().manual_seed(1)
    # The last pages, in any order.
    slots = (
        pages * page_tokens - 1 - torch.randperm(tokens + 9, generator=generator)[:tokens]
    ).cuda()
    positions = torch.randint(0, 40_960, (tokens,), generator=generator).cuda()
    frequencies = rotation_frequencies(head_dim, 1e6, None).cuda()
    wide = qkv.view(tokens, -1, head_dim).float()
    q, k, v = wide.split((heads, kv_heads, kv_heads), dim=1)
    rotation = Rotation(positions, frequencies)
    turned = []
    for x, weight in zip((q, k), norms, strict=True):
        x = x.contiguous()
        if weight is not None:
            x = rms_norm(x, weight.float(), EPS, out=torch.empty_like(x))
        turned.append(torch.empty_like(x))
        rotation.apply(x.clone(), out=turned[-1])
    slots[1::7] = -1
    table = rotation_table(frequencies, 40_960)
    rotate_append(qkv, *norms, EPS, positions, table, slots, pool, layer)
    found = qkv.view(tokens, -1, head_dim)
    torch.testing.assert_close(found[:, :heads].float(), turned[0], atol=1e-3, rtol=2**-7)
    kept = slots >= 0
    page, offset = slots[kept] // page_tokens, slots[kept] % page_tokens
    cells = pool[page, layer, :, offset]
    torch.testing.assert_close(cells[:, 0].float(), turned[1][kept], atol=1e-3, rtol=2**-7)
    assert torch.equal(cells[:, 1].float(), v[kept])
    pool[page, layer, :, offset] = float("nan")
    for some in pool.split(1000):
        assert some.isnan().all(), "something else was written"


# Where scores lie close together, more of a row has to be drawn.
@pytest.mark.parametrize(
    ("rows", "vocab", "spread"),
    [(1, 6144, 0.5), (33, 9001, 3.0), (256, 151_936, 0.5), (256, 151_936, 3.0)],
)
def test_draws_are_the_samplers(rows, vocab, spread, dtype):
    from holdfast.ops.kernels.sample import KeyedDraws

    logits = (normal(rows, vocab, dtype=torch.float32) * spread).to(dtype)
    # No such row where there is but one.
    logits[5:6, vocab - 1] = float("nan")
    logits[6:7, 0] = float("inf")
    kind = np.arange(1, rows + 1) % 4
    draw = np.random.default_rng(vocab)
    zeros = np.zeros(rows, np.float32)
    inputs = SamplerInputs(
        seeds=draw.integers(0, 1 << 64, rows, np.uint64),
        positions=draw.integers(0, 1 << 20, rows),
        temperature=np.array([0.0, 0.6, 1.0, 2.0], np.float32)[kind],
        top_p=zeros + 1,
        min_p=zeros,
        top_k=np.zeros(rows, np.int32),
        repetition=zeros + 1,
        presence=zeros,
        frequency=zeros,
        top_logprobs=np.full(rows, -1, np.int32),
    )
    expected = Sampler(vocab, "cuda").sample(logits.float(), inputs)
    tokens, finite = KeyedDraws(vocab, rows, "cuda").sample(
        logits,
        torch.from_numpy(inputs.seeds.view(np.int64)).cuda(),
        torch.from_numpy(inputs.positions).cuda(),
        torch.from_numpy(inputs.temperature).cuda(),
    )
    assert torch.equal(finite, expected.finite)
    same = tokens == expected.tokens
    greedy = torch.from_numpy(kind == 0).cuda()
    # torch's argmax on a GPU is of no stated id on ties, so the largest logit is what is compared.
    value = logits.float().gather(1, tokens[:, None])[:, 0]
    assert torch.equal(value[greedy & finite], logits.float().amax(-1)[greedy & finite])
    # Two scores may lie within the last bits of two logarithms.
    assert int((~same & ~greedy).sum()) <= 1, (~same).nonzero()


def test_greedy_tokens_of_kernels_in_float32_are_those_of_the_cpu():
    def answers(**options) -> list[list[int]]:
        with LLM(dtype="float32", rows_max=8, context_tokens=1024, **options) as llm:
            params = SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.0)
            return [result.token_ids for result in llm.generate(PROMPTS, params)]

    assert answers(device="cuda:0", kernels="triton", graphs=False) == answers(device="cpu")
