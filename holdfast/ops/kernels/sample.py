"""Draws without a softmax: the largest of logits, or of logits / temperature + keyed noise.

The twin is ops.sampler for rows that ask for no filter, penalty, bias, stop id or logprob
(`ops.sampler.plain_rows` says which): the hash bits are wire.draw's to the bit, and scaled values
are formed in the same order, the row's maximum taken off first. Three launches, each with a grid
that depends on the number of rows alone, so that a graph can hold them:

    _lead   each tile of a row: its largest logit, the lowest id that has it, and NaN in their
            place where a logit is not finite
    _draw   each tile again: its best scaled + noise. A greedy row, and one that is not finite,
            leaves at once
    _join   each row: the best of its tiles, lowest id on ties, and whether it is finite

`_draw` is ruled by the two logarithms of the noise (accurate ones; the fast approximation is wrong
by its own size where the noise is largest), so it skips them where no id can win. The best score of
the tiles' leaders is a bound from below. With u the id's uniform number its noise is -log(E), E =
-log(u) >= 1 - u, and it beats the bound only if E <= exp(scaled - bound). 1 - u is an integer of
the hash, so the test costs one exponential; a thousandth is left for rounding. A part of a tile
without a candidate is done then, and a tile whose leader plus the largest noise stays below the
bound is not read again at all.

Floor on an H200, 256 rows of 151,936 logits in bfloat16: 78 MB read twice at 4.24 TB/s, 37 us;
about 30 instructions a logit for the hash and the test are as long. At one row launches rule.
Logits of bfloat16 or float32; vocabularies to 2^31. Called by who decides that rows may use it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from holdfast.ops.kernels.launch import ceil_div, launch, power_of_two

# Logits of a program: 38 programs for a row of 151,936.
_TILE = 4096
# Logits that are judged at once in a draw: 8 a lane with 4 warps.
_PART = 1024
_WARPS = 4

# -log(-log(u)) of the largest u, 1 - 2**-24, is 16.64.
NOISE_MAX = 16.7


@triton.jit
def _noise_bits(low, high, ids):
    """uint32 hash bits: wire.draw.noise_bits of keys and ids."""
    x = ids.to(tl.uint32) * 0x9E3779B1 + low
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ high
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _gumbel(bits):
    """float32 standard Gumbel noise of hash bits: wire.draw.gumbel."""
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw_keys(seed, position):
    """Two uint32 of a uint64 seed and position: wire.draw.draw_key."""
    x = seed + (position + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _lead(logits, tops, leaders, VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    ids = (program % TILES).to(tl.int32) * TILE + tl.arange(0, TILE)
    inside = ids < VOCAB
    value = tl.load(logits + row * VOCAB + ids, mask=inside, other=0.0).to(tl.float32)
    # False for NaN and for both infinities.
    finite = tl.abs(value) < float("inf")
    broken = tl.max(tl.where(finite, 0, 1), axis=0)
    value = tl.where(inside & finite, value, float("-inf"))
    top = tl.max(value, axis=0)
    leader = tl.min(tl.where(value == top, ids, VOCAB), axis=0)
    tl.store(tops + program, tl.where(broken > 0, float("nan"), top))
    tl.store(leaders + program, leader)


@triton.jit(do_not_specialize_on_alignment=["seeds", "positions", "temperature"])
def _draw(
    logits,
    seeds,
    positions,
    temperature,
    tops,
    leaders,
    scores,
    drawn,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    NOISE_MAX: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    tile = (program % TILES).to(tl.int32)
    lane = tl.arange(0, TILES_BLOCK)
    of_row = row * TILES + lane
    top_of = tl.load(tops + of_row, mask=lane < TILES, other=float("-inf"))
    broken = tl.max(tl.where(top_of != top_of, 1, 0), axis=0)
    warmth = tl.load(temperature + row)
    if (warmth > 0) & (broken == 0):
        low, high = _draw_keys(
            tl.load(seeds + row).to(tl.uint64, bitcast=True),
            tl.load(positions + row).to(tl.uint64),
        )
        top = tl.max(top_of, axis=0)
        led_by = tl.load(leaders + of_row, mask=lane < TILES, other=0)
        scaled_of = tl.div_rn(top_of - top, warmth)
        bound = tl.max(scaled_of + _gumbel(_noise_bits(low, high, led_by)), axis=0)
        # Never infinite, so never 0 * inf; what it makes less negative only stays a candidate.
        inverse = tl.minimum(1.0 / warmth, 3.0e38)
        best = tl.full([], float("-inf"), tl.float32)
        best_id = tl.full([], VOCAB, tl.int32)
        own_top = tl.max(tl.where(lane == tile, top_of, float("-inf")), axis=0)
        if (own_top - top) * inverse + NOISE_MAX >= bound:
            for part in range(TILE // PART):
                ids = tile * TILE + part * PART + tl.arange(0, PART)
                inside = ids < VOCAB
                value = tl.load(logits + row * VOCAB + ids, mask=inside, other=float("-inf"))
                below = value.to(tl.float32) - top
                bits = _noise_bits(low, high, ids)
                missing = (0x7FFFFF - (bits >> 9).to(tl.int32)).to(tl.float32) + 0.5
                missing = missing * 1.1920928955078125e-07
                candidate = missing * 0.999 <= tl.exp(below * inverse - bound)
                if tl.max(tl.where(candidate & inside, 1, 0), axis=0) > 0:
                    score = _gumbel(bits) + tl.div_rn(below, warmth)
                    score = tl.where(inside, score, float("-inf"))
                    top_score = tl.max(score, axis=0)
                    top_id = tl.min(tl.where(score == top_score, ids, VOCAB), axis=0)
                    # Parts rise in id: an equal score of an earlier one stays.
                    best_id = tl.where(top_score > best, top_id, best_id)
                    best = tl.maximum(best, top_score)
        tl.store(scores + program, best)
        tl.store(drawn + program, best_id)


@triton.jit(do_not_specialize_on_alignment=["temperature", "tokens", "finite"])
def _join(
    temperature,
    tops,
    leaders,
    scores,
    drawn,
    tokens,
    finite,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILES_BLOCK)
    at = row * TILES + lane
    top_of = tl.load(tops + at, mask=lane < TILES, other=float("-inf"))
    broken = tl.max(tl.where(top_of != top_of, 1, 0), axis=0)
    # A number a lane: the interpreter (triton 3.7) cannot spread the truth of one number.
    warm = (lane < TILES) & (tl.load(temperature + row + lane * 0) > 0)
    led_by = tl.load(leaders + at, mask=lane < TILES, other=VOCAB)
    # `_draw` wrote none for a greedy row; nor for one that is not finite, whose token is 0 anyway.
    score_of = tl.load(scores + at, mask=warm, other=float("-inf"))
    drawn_by = tl.load(drawn + at, mask=warm, other=VOCAB)
    value = tl.where(warm, score_of, top_of)
    ids = tl.where(warm, drawn_by, led_by)
    token = tl.min(tl.where(value == tl.max(value, axis=0), ids, VOCAB), axis=0)
    tl.store(tokens + row, tl.where(broken > 0, 0, token).to(tl.int64))
    tl.store(finite + row, tl.where(broken > 0, 0, 1).to(tl.uint8))


class KeyedDraws:
    """The workspace of draws for one vocabulary and at most rows_max rows; nothing grows later.

    16 bytes a tile of a row: 152 KiB for 256 rows of 151,936 ids. One stream at a time.
    """

    def __init__(self, vocab_size: int, rows_max: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.rows_max = rows_max
        self.tiles = ceil_div(vocab_size, _TILE)
        cells = rows_max * self.tiles
        self._tops = torch.zeros(cells, dtype=torch.float32, device=device)
        self._leaders = torch.zeros(cells, dtype=torch.int32, device=device)
        self._scores = torch.zeros(cells, dtype=torch.float32, device=device)
        self._drawn = torch.zeros(cells, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(rows_max, dtype=torch.int64, device=device)
        self._finite = torch.zeros(rows_max, dtype=torch.uint8, device=device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of the workspace: a part of a captured graph's address manifest."""
        own = (self._tops, self._leaders, self._scores, self._drawn, self.tokens, self._finite)
        return tuple(buffer.data_ptr() for buffer in own)

    def sample(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64[n], finite bool[n]) of logits [n, vocab_size], bfloat16 or float32, packed.

        seeds: uint64[n], or int64[n] with their bits; positions: int64[n], of the token drawn;
        temperature: float32[n], 0 for the largest logit. All on the device. A row that is not
        finite has token 0. The results are views of the workspace, valid until the next call.
        """
        rows = logits.shape[0]
        assert rows <= self.rows_max, f"{rows} rows, made for {self.rows_max}"
        assert logits.shape[1] == self.vocab_size and logits.is_contiguous(), tuple(logits.shape)
        tiles_block = power_of_two(self.tiles)
        sizes = {"VOCAB": self.vocab_size, "TILES": self.tiles}
        launch(
            _lead,
            (rows * self.tiles,),
            logits,
            self._tops,
            self._leaders,
            **sizes,
            TILE=_TILE,
            num_warps=_WARPS,
        )
        launch(
            _draw,
            (rows * self.tiles,),
            logits,
            seeds.view(torch.int64),
            positions,
            temperature,
            self._tops,
            self._leaders,
            self._scores,
            self._drawn,
            **sizes,
            TILE=_TILE,
            PART=_PART,
            TILES_BLOCK=tiles_block,
            NOISE_MAX=NOISE_MAX,
            num_warps=_WARPS,
        )
        launch(
            _join,
            (rows,),
            temperature,
            self._tops,
            self._leaders,
            self._scores,
            self._drawn,
            self.tokens,
            self._finite,
            **sizes,
            TILES_BLOCK=tiles_block,
            num_warps=1,
        )
        return self.tokens[:rows], self._finite[:rows].view(torch.bool)
