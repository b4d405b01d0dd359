"""The kernel of ops.kernels.warp_prefill: warp groups with parts of their own (Hopper, Gluon).

A program has a tile of `prefill_attention.cut_tiles`: the query tokens of one row and HEADS query
heads of one kv head. One warp has the tiles of K and V copied (TMA) from the scratch of
ops.kernels.gather_kv; two warp groups of 64 query rows each multiply. A group has the next block's
scores computed while it sums the last block's values, and works on its softmax while the other
group multiplies: the scheme of FlashAttention-3 (Shah et al., 2024). Blocks are walked from the
last to the first, so that those of the causal edge come first. Scores stay as the product gives
them; the factor goes into the exponent.

Nothing waits for ever: a tile without a query token (a graph has more tiles than most steps) has
nothing copied and nobody waits for it; any other has a block at least. The copying warp and both
groups walk the blocks high - 1 .. low one by one, whatever a group's rows see of them, and wait
only for each other's word on the stage of that block. A block's number in the program (`base` and
what came since) gives its stage and the parity of its turn, the same to all three.

Does not run in Triton's interpreter, nor on other GPUs (wgmma).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _work(
    tiles, tiles_len, number, window,
    WINDOWED: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr,
    TILES_FIRST: gl.constexpr,
):  # fmt: skip
    """A program's `number`th piece of work: (row, first_head, first_token, tokens, first_position,
    low, whole, whole_end, high). Blocks low .. high - 1 are seen by some query token, whole ..
    whole_end - 1 by all."""
    if TILES_FIRST:
        tile = number % tiles_len
        first_head = number // tiles_len * HEADS
    else:
        tile = number // PARTS
        first_head = number % PARTS * HEADS
    row = gl.load(tiles + tile)
    first_token = gl.load(tiles + tiles_len + tile)
    tokens = gl.load(tiles + 2 * tiles_len + tile)
    first_position = gl.load(tiles + 3 * tiles_len + tile)
    high = (first_position + tokens + BLOCK - 1) // BLOCK
    whole_end = (first_position + 1) // BLOCK
    low = 0
    whole = 0
    if WINDOWED:
        # From `low` on the first query token sees, from `whole` on all of them do.
        low = gl.maximum(first_position - window + 1, 0) // BLOCK
        whole = (gl.maximum(first_position + tokens - window, 0) + BLOCK - 1) // BLOCK
        whole_end = gl.maximum(whole_end, gl.minimum(whole, high))
    return row, first_head, first_token, tokens, first_position, low, whole, whole_end, high


@gluon.jit
def _turn(programs, round_number):
    """The number of a program's work in a round: there and back, so that who had the longest of
    one round has the shortest of the next."""
    program = gl.program_id(0)
    mine = program
    if round_number % 2 == 1:
        mine = programs - 1 - program
    return round_number * programs + mine


@gluon.jit
def _copy(
    kv, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, keys_at, values_at, base, low, high,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Have the tiles of blocks high - 1 .. low copied, each once its stage is empty. base: blocks
    that this program copied before."""
    for count in range(0, high - low):
        at = (high - 1 - count) * BLOCK
        number = base + count
        stage = number % STAGES
        free = (number // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_ready.index(stage), kv.block_type.nbytes)
        tma.async_copy_global_to_shared(
            kv, [keys_at + at, 0], k_ready.index(stage), k_tiles.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_ready.index(stage), kv.block_type.nbytes)
        tma.async_copy_global_to_shared(
            kv, [values_at + at, 0], v_ready.index(stage), v_tiles.index(stage)
        )


@gluon.jit
def _produce(
    kv, tiles, places, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
    tiles_len, tokens_max, window,
    WINDOWED: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, TILES_FIRST: gl.constexpr,
    PERSISTENT: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = KV_HEADS * GROUP // HEADS
    if PERSISTENT:
        programs = gl.num_programs(0)
        base = 0
        for turn in range(0, (tiles_len * PARTS + programs - 1) // programs):
            number = _turn(programs, turn)
            if number < tiles_len * PARTS:
                row, first_head, _, _, _, low, _, _, high = _work(
                    tiles, tiles_len, number, window, WINDOWED, HEADS, PARTS, BLOCK, TILES_FIRST
                )
                keys_at = first_head // GROUP * tokens_max + gl.load(places + row)
                _copy(
                    kv, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, keys_at,
                    keys_at + KV_HEADS * tokens_max, base, low, high, BLOCK, STAGES,
                )  # fmt: skip
                base += high - low
    else:
        row, first_head, _, _, _, low, _, _, high = _work(
            tiles, tiles_len, gl.program_id(0), window, WINDOWED, HEADS, PARTS, BLOCK, TILES_FIRST
        )
        keys_at = first_head // GROUP * tokens_max + gl.load(places + row)
        _copy(
            kv, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, keys_at,
            keys_at + KV_HEADS * tokens_max, 0, low, high, BLOCK, STAGES,
        )  # fmt: skip


@gluon.jit
def _softmax(scores, maximum, weight, factor, MASKED: gl.constexpr):
    """(p, shrink, maximum, weight) after a block, as paged_kv.softmax_step has them; scores and
    maximum are before `factor`, which brings them to base 2."""
    higher = gl.maximum(maximum, gl.max(scores, 1))
    base = higher * factor
    if MASKED:
        # -inf less -inf is NaN: what has seen nothing counts from 0.
        base = gl.where(higher == float("-inf"), 0.0, base)
    p = gl.exp2(scores * factor - base[:, None])
    shrink = gl.exp2(maximum * factor - base)
    return p, shrink, higher, weight * shrink + gl.sum(p, 1)


@gluon.jit
def _hidden(scores, last, block, back, BLOCK: gl.constexpr, layout: gl.constexpr):
    position = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    distance = last[:, None] - position[None, :]
    return gl.where((distance >= 0) & (distance < back), scores, float("-inf"))


@gluon.jit
def _walk(
    queries, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, p, total, maximum, weight, last,
    base, high, begin, stop, back, factor,
    MASKED: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, scores_layout: gl.constexpr,
    p_layout: gl.constexpr,
):  # fmt: skip
    """Blocks begin, begin - 1 .. stop of a tile whose first block was `high` - 1 and, of the
    program's, number `base`."""
    for block in range(begin, stop - 1, -1):
        number = base + high - 1 - block
        stage = number % STAGES
        before = (number - 1) % STAGES
        mbarrier.wait(k_ready.index(stage), number // STAGES & 1)
        blank = gl.zeros([64, BLOCK], gl.float32, scores_layout)
        scores = warpgroup_mma(
            queries, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), (number - 1) // STAGES & 1)
        summed = warpgroup_mma(p, v_tiles.index(before), total, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MASKED:
            scores = _hidden(scores, last, block, back, BLOCK, scores_layout)
        wide, shrink, maximum, weight = _softmax(scores, maximum, weight, factor, MASKED)
        total, p = warpgroup_mma_wait(0, deps=(summed, p))
        mbarrier.arrive(v_empty.index(before), count=1)
        kept = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))
        total = total * kept[:, None]
        p = gl.convert_layout(wide.to(k_tiles.dtype), p_layout)
    return p, total, maximum, weight


@gluon.jit
def _attend(
    q, out, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
    first_head, first_token, tokens, first_position, base, low, whole, whole_end, high, window,
    factor,
    PART: gl.constexpr, WINDOWED: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    HEAD_PAD: gl.constexpr, Q_STRIDE: gl.constexpr, OUT_STRIDE: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Query rows PART * 64 .. of the tile."""
    LANES: gl.constexpr = HEAD_PAD // 8 if HEAD_PAD < 256 else 32
    packed: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_PAD, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, total_layout, 2)
    scores_row: gl.constexpr = gl.SliceLayout(1, scores_layout)

    part = PART * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, packed))
    lane = gl.arange(0, HEAD_PAD, layout=gl.SliceLayout(0, packed))
    token = part // HEADS
    inside = (token < tokens)[:, None] & (lane < HEAD_DIM)[None, :]
    at_token = first_token.to(gl.int64) + token
    head = (first_head + part % HEADS) * HEAD_DIM
    queries = q_tiles.index(PART)
    at = at_token[:, None] * Q_STRIDE + head[:, None] + lane[None, :]
    queries.store(gl.load(q + at, mask=inside, other=0.0))
    fence_async_shared()

    last = first_position + (PART * 64 + gl.arange(0, 64, layout=scores_row)) // HEADS
    back = 0x7FFFFFFF
    if WINDOWED:
        back = window
    maximum = gl.full([64], float("-inf"), gl.float32, scores_row)
    weight = gl.zeros([64], gl.float32, scores_row)
    total = gl.zeros([64, HEAD_PAD], gl.float32, total_layout)

    stage = base % STAGES
    mbarrier.wait(k_ready.index(stage), base // STAGES & 1)
    blank = gl.zeros([64, BLOCK], gl.float32, scores_layout)
    scores = warpgroup_mma(
        queries, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    scores = _hidden(scores, last, high - 1, back, BLOCK, scores_layout)
    wide, _, maximum, weight = _softmax(scores, maximum, weight, factor, True)
    p = gl.convert_layout(wide.to(k_tiles.dtype), p_layout)
    p, total, maximum, weight = _walk(
        queries, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, p, total, maximum, weight,
        last, base, high, high - 2, whole_end, back, factor, True, BLOCK, STAGES, scores_layout,
        p_layout,
    )  # fmt: skip
    p, total, maximum, weight = _walk(
        queries, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, p, total, maximum, weight,
        last, base, high, gl.minimum(whole_end, high - 1) - 1, whole, back, factor, False, BLOCK,
        STAGES, scores_layout, p_layout,
    )  # fmt: skip
    if WINDOWED:
        p, total, maximum, weight = _walk(
            queries, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, p, total, maximum,
            weight, last, base, high, gl.minimum(whole, high - 1) - 1, low, back, factor, True,
            BLOCK, STAGES, scores_layout, p_layout,
        )  # fmt: skip
    number = base + high - 1 - low
    mbarrier.wait(v_ready.index(number % STAGES), number // STAGES & 1)
    summed = warpgroup_mma(p, v_tiles.index(number % STAGES), total, is_async=True)
    total, p = warpgroup_mma_wait(0, deps=(summed, p))
    if PERSISTENT:
        mbarrier.arrive(v_empty.index(number % STAGES), count=1)

    weight = gl.convert_layout(weight, gl.SliceLayout(1, total_layout))
    total = total / gl.where(weight == 0.0, 1.0, weight)[:, None]
    result = gl.convert_layout(total.to(out.dtype.element_ty), packed)
    at = at_token[:, None] * OUT_STRIDE + head[:, None] + lane[None, :]
    gl.store(out + at, result, mask=inside)


@gluon.jit
def _consume(
    q, out, tiles, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
    tiles_len, window, factor,
    PART: gl.constexpr, WINDOWED: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_PAD: gl.constexpr, Q_STRIDE: gl.constexpr,
    OUT_STRIDE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    TILES_FIRST: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Query rows PART * 64 .. of each tile of the program."""
    if PERSISTENT:
        programs = gl.num_programs(0)
        base = 0
        for turn in range(0, (tiles_len * PARTS + programs - 1) // programs):
            number = _turn(programs, turn)
            if number < tiles_len * PARTS:
                _, first_head, first_token, tokens, first_position, low, whole, whole_end, high = (
                    _work(
                        tiles, tiles_len, number, window, WINDOWED, HEADS, PARTS, BLOCK,
                        TILES_FIRST,
                    )
                )  # fmt: skip
                if tokens > 0:
                    _attend(
                        q, out, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                        first_head, first_token, tokens, first_position, base, low, whole,
                        whole_end, high, window, factor, PART, WINDOWED, HEADS, HEAD_DIM, HEAD_PAD,
                        Q_STRIDE, OUT_STRIDE, BLOCK, STAGES, PERSISTENT,
                    )  # fmt: skip
                base += high - low
    else:
        _, first_head, first_token, tokens, first_position, low, whole, whole_end, high = _work(
            tiles, tiles_len, gl.program_id(0), window, WINDOWED, HEADS, PARTS, BLOCK, TILES_FIRST
        )
        if tokens > 0:
            _attend(
                q, out, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                first_head, first_token, tokens, first_position, 0, low, whole, whole_end, high,
                window, factor, PART, WINDOWED, HEADS, HEAD_DIM, HEAD_PAD, Q_STRIDE, OUT_STRIDE,
                BLOCK, STAGES, PERSISTENT,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["tiles_len", "tokens_max", "window"])
def attend_warps(
    q,
    kv,
    tiles,
    places,
    out,
    tiles_len,
    tokens_max,
    window,
    factor,
    WINDOWED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_PAD: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    OUT_STRIDE: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    TILES_FIRST: gl.constexpr,
    PERSISTENT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One tile and HEADS query heads, or one after another. kv: the scratch as [2 * kv_heads *
    tokens_max, head_dim]; tiles: int32[4, tiles_len] of `cut_tiles`; places: of `place_rows`, of
    which the first row."""
    PARTS: gl.constexpr = KV_HEADS * GROUP // HEADS
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [64, HEAD_PAD], q.dtype.element_ty
    )
    q_tiles = gl.allocate_shared_memory(q.dtype.element_ty, [2, 64, HEAD_PAD], q_layout)
    k_tiles = gl.allocate_shared_memory(kv.dtype, [STAGES, BLOCK, HEAD_PAD], kv.layout)
    v_tiles = gl.allocate_shared_memory(kv.dtype, [STAGES, BLOCK, HEAD_PAD], kv.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, out, tiles, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                    tiles_len, window, factor, 0, WINDOWED, HEADS, PARTS, HEAD_DIM, HEAD_PAD,
                    Q_STRIDE, OUT_STRIDE, BLOCK, STAGES, TILES_FIRST, PERSISTENT,
                ),
            ),
            (
                _consume,
                (
                    q, out, tiles, q_tiles, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                    tiles_len, window, factor, 1, WINDOWED, HEADS, PARTS, HEAD_DIM, HEAD_PAD,
                    Q_STRIDE, OUT_STRIDE, BLOCK, STAGES, TILES_FIRST, PERSISTENT,
                ),
            ),
            (
                _produce,
                (
                    kv, tiles, places, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                    tiles_len, tokens_max, window, WINDOWED, KV_HEADS, GROUP, HEADS, BLOCK,
                    STAGES, TILES_FIRST, PERSISTENT,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
