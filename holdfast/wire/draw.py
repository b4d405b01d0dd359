"""Keyed draws: the noise of a sampled token depends on (request seed, position, token id) alone.

A token is drawn as argmax over allowed ids of logits / temperature + gumbel(seed, position, id),
which is a draw from their softmax. Nothing of the batch, the rank, the step number or a restart
enters, so a request draws the same noise wherever and however often a position is computed.

This is the definition; ops.sampler has the torch twin and the drills' oracle uses this one.
"""

from __future__ import annotations

import numpy as np

_M64 = (1 << 64) - 1


def draw_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys of one draw: splitmix64 of seed + (position + 1) * golden ratio."""
    x = (seed + (position + 1) * 0x9E37_79B9_7F4A_7C15) & _M64
    x = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _M64
    x = ((x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB) & _M64
    x ^= x >> 31
    return x & 0xFFFF_FFFF, x >> 32


def noise_bits(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """uint32[vocab_size] hash bits, one a token id (murmur3's finaliser, keyed twice)."""
    low, high = draw_key(seed, position)
    x = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E37_79B1) + np.uint32(low)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EB_CA6B)
    x ^= np.uint32(high)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2_AE35)
    x ^= x >> np.uint32(16)
    return x


def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """float32[vocab_size] standard Gumbel noise.

    u = ((bits >> 9) + 0.5) / 2**23 lies strictly inside (0, 1) in float32 (24 bits would round up
    to 1 and give an infinite noise); the largest noise is 16.6, a chance of 6e-8 a token.
    """
    bits = noise_bits(seed, position, vocab_size)
    uniform = ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))
