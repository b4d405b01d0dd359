"""The kernels around attention, interpreted, against what model.layers computes.

What the interpreter cannot show: that they compile (test_fused_kernels_compile), and how fast.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import MARKS, interpreted

from holdfast.model.layers import Rotation, gated, rms_norm, rotation_frequencies
from holdfast.ops.attention import Scratch

pytestmark = MARKS
CPU = torch.device("cpu")
EPS = 1e-6


@pytest.fixture
def norm(monkeypatch):
    return interpreted("norm", monkeypatch)


@pytest.fixture
def gate(monkeypatch):
    return interpreted("gate", monkeypatch)


@pytest.fixture
def rope(monkeypatch):
    return interpreted("rope", monkeypatch)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- residual and norm ---


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 288, 1000])
def test_the_stream_is_added_to_and_normed_as_the_reference_does(norm, rows, hidden):
    x, delta, weight = normal(rows, hidden), normal(rows, hidden, seed=1), normal(hidden, seed=2)
    added = x + delta
    expected = rms_norm(added, weight, EPS, out=torch.empty_like(added))
    out = torch.empty_like(x)
    assert norm.add_rms_norm(x, delta, weight, EPS, out) is out
    assert torch.equal(x, added)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-6)


def test_without_a_delta_the_stream_is_only_read(norm):
    x, weight = normal(5, 65, scale=30), normal(65, seed=1)
    before = x.clone()
    out = norm.add_rms_norm(x, None, weight, EPS, torch.empty_like(x))
    assert torch.equal(x, before)
    expected = rms_norm(x, weight, EPS, out=torch.empty_like(x))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-6)


def test_a_row_of_zeros_is_normed_to_zeros(norm):
    x = torch.zeros(2, 64)
    out = norm.add_rms_norm(x, None, torch.ones(64), EPS, torch.full_like(x, 7.0))
    assert torch.equal(out, torch.zeros(2, 64))


def test_a_nan_stays_in_its_row_of_the_stream(norm):
    x, delta = normal(4, 63), normal(4, 63, seed=1)
    delta[2, 17] = float("nan")
    out = norm.add_rms_norm(x, delta, torch.ones(63), EPS, torch.empty_like(x))
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all() and x[[0, 1, 3]].isfinite().all()


def test_a_stream_of_bfloat16_is_rounded_before_it_is_squared(norm):
    x, delta = normal(3, 96).bfloat16(), normal(3, 96, seed=1).bfloat16()
    weight = normal(96, seed=2)
    before = x.float()
    # A wide result shows what it was made of; the interpreter rounds the stream down.
    out = norm.add_rms_norm(x, delta, weight, EPS, torch.empty(3, 96))
    torch.testing.assert_close(x.float(), before + delta.float(), atol=0.0, rtol=2**-7)
    expected = rms_norm(x, weight, EPS, out=torch.empty(3, 96))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-6)


def test_a_norm_of_bfloat16_is_rounded_before_it_is_weighed(norm):
    x, weight = normal(3, 96).bfloat16(), torch.full((96,), 3.0).bfloat16()
    out = norm.add_rms_norm(x, None, weight, EPS, torch.empty_like(x))
    unweighed = norm.add_rms_norm(x, None, torch.ones(96).bfloat16(), EPS, torch.empty_like(x))
    # Of the product the interpreter keeps the leading bits.
    product = (unweighed.float() * 3.0).view(torch.int32).bitwise_and_(-(1 << 16))
    assert torch.equal(out.float(), product.view(torch.float32))


def test_a_row_that_no_program_can_hold_is_refused(norm):
    wide = torch.zeros(1, norm.HIDDEN_MAX + 1)
    with pytest.raises(AssertionError, match="16385"):
        norm.add_rms_norm(wide, None, wide[0], EPS, torch.empty_like(wide))


# --- gate ---


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("width", [1, 63, 64, 288, 1000, 1025])
def test_the_gate_is_the_references(gate, rows, width):
    gate_up = normal(rows, 2 * width, scale=4)
    expected = gated(gate_up, Scratch(CPU))
    out = gate.silu_mul(gate_up, torch.empty(rows, width))
    torch.testing.assert_close(out, expected, atol=1e-7, rtol=2e-6)


def test_the_gate_of_extreme_values_is_a_limit_and_a_nan_stays_in_its_row(gate):
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0], [float("nan"), 1, 1, 1, 1, 1]])
    out = gate.silu_mul(gate_up, torch.empty(2, 3))
    assert torch.equal(out[0], torch.tensor([0.0, 2e4, 0.0]))
    assert out[1, 0].isnan() and out[1, 1:].isfinite().all()


def test_the_gate_of_bfloat16_is_rounded_once(gate):
    gate_up = normal(2, 128).bfloat16()
    out = gate.silu_mul(gate_up, torch.empty(2, 64, dtype=torch.bfloat16))
    expected = gated(gate_up.float(), Scratch(CPU))
    torch.testing.assert_close(out.float(), expected, atol=1e-6, rtol=2**-7)


# --- norm of heads, rotation, append ---


class Case:
    """t tokens of qkv, and a pool of NaN that only the tokens' slots may change."""

    def __init__(self, tokens, heads, kv_heads, head_dim, page_tokens, layers=3, seed=0):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.page_tokens, self.layers = page_tokens, layers
        generator = torch.Generator().manual_seed(seed)
        pages = -(-tokens // page_tokens) + 2
        self.qkv = normal(tokens + 1, (heads + 2 * kv_heads) * head_dim, seed=seed)
        shape = (pages, layers, 2, page_tokens, kv_heads, head_dim)
        self.pool = torch.full(shape, float("nan"))
        places = torch.randperm((pages - 1) * page_tokens, generator=generator)
        self.slots = places[:tokens] + page_tokens
        self.positions = torch.randint(0, 500, (tokens,), generator=generator)
        self.frequencies = rotation_frequencies(head_dim, 1e4, None)
        self.q_norm, self.k_norm = normal(head_dim, seed=7), normal(head_dim, seed=8)

    def expected(self, normed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v [t, heads, head_dim] as the torch reference has them before attention."""
        tokens = self.slots.numel()
        by_head = self.qkv[:tokens].view(tokens, -1, self.head_dim).clone()
        q, k, v = by_head.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        rotation = Rotation(self.positions, self.frequencies)
        found = []
        for x, weight in ((q, self.q_norm), (k, self.k_norm)):
            x = x.contiguous()
            if normed:
                x = rms_norm(x, weight, EPS, out=torch.empty_like(x))
            found.append(torch.empty_like(x))
            rotation.apply(x, out=found[-1])
        return found[0], found[1], v

    def run(self, rope, layer: int, normed: bool) -> torch.Tensor:
        """The kernel's q [t, heads, head_dim]; the pool is written."""
        tokens = self.slots.numel()
        norms = (self.q_norm, self.k_norm) if normed else (None, None)
        table = rope.rotation_table(self.frequencies, 500)
        rope.rotate_append(
            self.qkv, *norms, EPS, self.positions, table, self.slots, self.pool, layer
        )
        return self.qkv[:tokens].view(tokens, -1, self.head_dim)[:, : self.heads]

    def judge(self, rope, layer: int, normed: bool) -> None:
        q, k, v = self.expected(normed)
        before = self.qkv.clone()
        torch.testing.assert_close(self.run(rope, layer, normed), q, atol=2e-6, rtol=1e-5)
        assert torch.equal(self.qkv[self.slots.numel() :], before[self.slots.numel() :])
        stored = self.slots >= 0
        page, offset = self.slots[stored] // self.page_tokens, self.slots[stored] % self.page_tokens
        found_k = self.pool[page, layer, 0, offset]
        torch.testing.assert_close(found_k, k[stored], atol=2e-6, rtol=1e-5)
        assert torch.equal(self.pool[page, layer, 1, offset], v[stored])
        self.pool[page, layer, :, offset] = float("nan")
        assert self.pool.isnan().all(), "something else was written"


# groups 1, 3 and 8; a head count that no power of two divides; half sizes that are none.
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_heads_are_normed_rotated_and_appended_as_the_reference_does(
    rope, heads, kv_heads, head_dim, normed
):
    Case(5, heads, kv_heads, head_dim, page_tokens=3).judge(rope, layer=1, normed=normed)


@pytest.mark.parametrize("head_dim", [2, 6, 96, 256])
def test_any_even_head_size_is_rotated(rope, head_dim):
    Case(2, 5, 1, head_dim, page_tokens=4).judge(rope, layer=0, normed=True)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("page_tokens", [1, 3, 16])
@pytest.mark.parametrize("layer", [0, 2])
def test_keys_and_values_go_to_their_slot_of_their_layer(rope, tokens, page_tokens, layer):
    Case(tokens, 2, 1, 64, page_tokens).judge(rope, layer, normed=True)


def test_a_negative_slot_stores_nothing(rope):
    case = Case(6, 3, 1, 64, page_tokens=3)
    case.slots[[0, 3, 5]] = -1
    case.judge(rope, layer=2, normed=True)


def test_a_nan_stays_in_its_token(rope):
    case = Case(4, 3, 1, 64, page_tokens=3)
    case.qkv[2, 5] = float("nan")
    q = case.run(rope, 0, normed=True)
    assert q[2, 0].isnan().all()
    assert q[[0, 1, 3]].isfinite().all() and q[2, 1:].isfinite().all()


@pytest.mark.parametrize("position", [-1, 500, 1 << 40])
def test_a_position_outside_the_table_fails_its_token_and_reads_nothing(rope, position):
    case = Case(3, 3, 1, 64, page_tokens=3)
    case.positions[1] = position
    q = case.run(rope, 0, normed=True)
    assert q[1].isnan().all()
    assert q[[0, 2]].isfinite().all()


def test_positions_of_32_bits_are_the_same(rope):
    wide, narrow = Case(4, 3, 1, 64, page_tokens=3), Case(4, 3, 1, 64, page_tokens=3)
    narrow.positions = narrow.positions.to(torch.int32)
    assert torch.equal(wide.run(rope, 1, normed=True), narrow.run(rope, 1, normed=True))
    assert torch.equal(wide.pool.nan_to_num(), narrow.pool.nan_to_num())


def test_the_table_is_the_references_rotation_at_every_distance(rope):
    frequencies = rotation_frequencies(128, 1e6, None)
    table = rope.rotation_table(frequencies, 131_072)
    positions = torch.tensor([0, 1, 4095, 65_537, 131_071])
    rotation = Rotation(positions, frequencies)
    assert torch.equal(table[positions, :64], rotation.cos[:, 0, :64])
    assert torch.equal(table[positions, 64:], rotation.sin[:, 0, 64:])


def test_a_pool_of_bfloat16_holds_the_rounded_keys(rope):
    case = Case(3, 3, 1, 64, page_tokens=3)
    _, k, v = case.expected(True)
    case.pool = case.pool.bfloat16()
    case.run(rope, 1, normed=True)
    page, offset = case.slots // 3, case.slots % 3
    found = case.pool[page, 1, :, offset].float()
    torch.testing.assert_close(found[:, 0], k, atol=1e-6, rtol=2**-7)
    torch.testing.assert_close(found[:, 1], v, atol=1e-6, rtol=2**-7)
