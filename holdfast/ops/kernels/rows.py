"""Row state in a GPU's memory: wire.rows.RowTable's apply, digest, staging and advance as kernels.

Everything a kernel needs to know of a step comes from a *frame* in device memory, so launches are
the same in every step and a captured graph reads the step that was copied last. Grids are fixed;
programs walk the counts that they read in the frame. No integer is an argument but the tokens of a
bucket, which never specialise: what is fixed for a process (the table's shape) is a compile-time
constant, the rest is in the frame.

    frame, int32 words (R = rows_max; device.device_rows writes it):
    0            rows n | clears c | admits a | page writes w
    4            where these four deltas begin: clears | admits | admit places | page writes
    HEADER       rows[R] | query_lens[R] | samples[R] | offsets[R] | places[R]
                 offsets: query tokens of the rows before; places: where a row's draw lies
    behind       clears[c] | admits[a, 20] | places[a, 3]: word where tokens, bias, stop ids begin
                 (bias: ids and then the bits of the values) | their words | page writes[w, 4]

Called by device.device_rows, which keeps the tables and has had the plan checked: an index outside
a table is the caller's bug and is not looked for here. Constants that twin wire.plan and wire.rows
(ops does not import wire) are held against them by tests/ops/test_rows_kernels_compile.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- the frame ---

HEADER = 16
STEP_ARRAYS = 5

# --- wire.plan.ADMIT: 20 words of 4 bytes ---

RECORD_WORDS = 20
SEED_WORD = 2
LENGTH_WORD = 5
TOKENS_LEN_WORD = 6
TEMPERATURE_WORD = 8
BIAS_LEN_WORD = 17
STOP_LEN_WORD = 18

# --- wire.rows: the digest's domains and its hash ---

STOPS_FIELD = 1 << 10
BIAS_FIELD = 1 << 16
TOKENS_FIELD = 1 << 32
PAGES_FIELD = 1 << 40
GROUP_STRIDE = 1 << 32
C_FIELD = 0x9E37_79B9_7F4A_7C15
C_VALUE = 0xD1B5_4A32_D192_ED03
C_FINAL = 0xBF58_476D_1CE4_E5B9

_HEADER = tl.constexpr(HEADER)
_RECORD = tl.constexpr(RECORD_WORDS)
_SEED = tl.constexpr(SEED_WORD)
_LENGTH = tl.constexpr(LENGTH_WORD)
_TOKENS_LEN = tl.constexpr(TOKENS_LEN_WORD)
_TEMPERATURE = tl.constexpr(TEMPERATURE_WORD)
_BIAS_LEN = tl.constexpr(BIAS_LEN_WORD)
_STOP_LEN = tl.constexpr(STOP_LEN_WORD)
_STOPS_FIELD = tl.constexpr(STOPS_FIELD)
_BIAS_FIELD = tl.constexpr(BIAS_FIELD)
_TOKENS_FIELD = tl.constexpr(TOKENS_FIELD)
_PAGES_FIELD = tl.constexpr(PAGES_FIELD)
_GROUP_STRIDE = tl.constexpr(GROUP_STRIDE)
_C_FIELD = tl.constexpr(C_FIELD)
_C_VALUE = tl.constexpr(C_VALUE)
_C_FINAL = tl.constexpr(C_FINAL)


@triton.jit
def _mix(field, value):
    """wire.rows.mix of uint64 fields and values."""
    x = field * _C_FIELD + value * _C_VALUE
    x = x ^ (x >> 32)
    return x * _C_FINAL


@triton.jit
def _word(value):
    """The 32 bits of an int32 as uint64, so that -1 does not smear into the upper half."""
    return value.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def clear_rows(
    frame,
    records,
    length,
    page_table,
    pages_len,
    GROUPS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All state of the cleared rows becomes zero; what lies behind pages_len is zero already."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    count = tl.load(frame + 1)
    first = tl.load(frame + 4)
    for at in range(program, count, tl.num_programs(0)):
        row = tl.load(frame + first + at).to(tl.int64)
        for group in tl.static_range(GROUPS):
            held = pages_len + group * TABLE_ROWS + row
            table = page_table + (group * TABLE_ROWS + row) * COLUMNS
            width = tl.load(held)
            for start in range(0, width, BLOCK):
                column = start + lane
                tl.store(table + column, 0, mask=column < width)
            tl.store(held, 0)
        word = tl.arange(0, 32)
        tl.store(records + row * _RECORD + word, 0, mask=word < _RECORD)
        tl.store(length + row, 0)


@triton.jit
def admit_rows(
    frame,
    records,
    length,
    tokens,
    bias_ids,
    bias_values,
    stop_ids,
    TOKEN_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Admissions: record, length, tokens, bias and stop ids (-1 behind the last)."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    word = tl.arange(0, 32)
    count = tl.load(frame + 2)
    admits = tl.load(frame + 5)
    places = tl.load(frame + 6)
    for at in range(program, count, tl.num_programs(0)):
        record = frame + admits + at * _RECORD
        row = tl.load(record + 4).to(tl.int64)
        value = tl.load(record + word, mask=word < _RECORD, other=0)
        tl.store(records + row * _RECORD + word, value, mask=word < _RECORD)
        tl.store(length + row, tl.load(record + _LENGTH))

        source = frame + tl.load(frame + places + at * 3)
        tokens_len = tl.load(record + _TOKENS_LEN)
        for start in range(0, tokens_len, BLOCK):
            column = start + lane
            token = tl.load(source + column, mask=column < tokens_len, other=0)
            tl.store(tokens + row * TOKEN_COLUMNS + column, token, mask=column < tokens_len)

        source = frame + tl.load(frame + places + at * 3 + 1)
        bias_len = tl.load(record + _BIAS_LEN)
        for start in range(0, bias_len, BLOCK):
            column = start + lane
            held = column < bias_len
            token = tl.load(source + column, mask=held, other=0)
            bits = tl.load(source + bias_len + column, mask=held, other=0)
            tl.store(bias_ids + row * BIAS + column, token, mask=held)
            tl.store(bias_values + row * BIAS + column, bits, mask=held)

        source = frame + tl.load(frame + places + at * 3 + 2)
        stop_len = tl.load(record + _STOP_LEN)
        for start in range(0, STOPS, BLOCK):
            column = start + lane
            token = tl.load(source + column, mask=column < stop_len, other=-1)
            tl.store(stop_ids + row * STOPS + column, token, mask=column < STOPS)


@triton.jit
def write_pages(
    frame,
    page_table,
    pages_len,
    TABLE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """page_table[group, row, column] = page, for every page write of the frame."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    count = tl.load(frame + 3)
    first = tl.load(frame + 7)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        held = start + lane < count
        write = frame + first + (start + lane) * 4
        group = tl.load(write, mask=held, other=0).to(tl.int64)
        row = tl.load(write + 1, mask=held, other=0).to(tl.int64)
        column = tl.load(write + 2, mask=held, other=0)
        page = tl.load(write + 3, mask=held, other=0)
        place = group * TABLE_ROWS + row
        tl.store(page_table + place * COLUMNS + column, page, mask=held)
        tl.atomic_max(pages_len + place, column + 1, mask=held)


@triton.jit
def digest_rows(
    frame,
    records,
    length,
    page_table,
    pages_len,
    tokens,
    bias_ids,
    bias_values,
    stop_ids,
    out,
    ROWS_MAX: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out int64[R]: bits of each plan row's term of RowTable.digest_full, its place included.

    The digest is the sum of the first n, modulo 2**64; who reads them adds them up. All is read
    from the tables: nothing that apply computed is trusted.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    word = tl.arange(0, 16)
    count = tl.load(frame)
    for at in range(program, count, tl.num_programs(0)):
        row = tl.load(frame + _HEADER + at).to(tl.int64)
        query_len = tl.load(frame + _HEADER + ROWS_MAX + at)
        record = records + row * _RECORD
        # Records are 8-byte words to the digest.
        low = tl.load(record + word * 2, mask=word * 2 < _RECORD, other=0)
        high = tl.load(record + word * 2 + 1, mask=word * 2 < _RECORD, other=0)
        hashed = _mix(word.to(tl.uint64), _word(low) | (_word(high) << 32))
        total = tl.sum(tl.where(word * 2 < _RECORD, hashed, 0), axis=0)

        sums = tl.zeros([BLOCK], tl.uint64)
        bias_len = tl.load(record + _BIAS_LEN)
        for start in range(0, bias_len, BLOCK):
            column = start + lane
            held = column < bias_len
            token = tl.load(bias_ids + row * BIAS + column, mask=held, other=0)
            bits = tl.load(bias_values + row * BIAS + column, mask=held, other=0)
            field = column.to(tl.uint64) + _BIAS_FIELD
            sums += tl.where(held, _mix(field, (_word(token) << 32) | _word(bits)), 0)
        stop_len = tl.load(record + _STOP_LEN)
        for start in range(0, stop_len, BLOCK):
            column = start + lane
            held = column < stop_len
            token = tl.load(stop_ids + row * STOPS + column, mask=held, other=0)
            sums += tl.where(held, _mix(column.to(tl.uint64) + _STOPS_FIELD, _word(token)), 0)
        for group in tl.static_range(GROUPS):
            width = tl.load(pages_len + group * TABLE_ROWS + row)
            table = page_table + (group * TABLE_ROWS + row) * COLUMNS
            for start in range(0, width, BLOCK):
                column = start + lane
                page = tl.load(table + column, mask=column < width, other=0)
                field = column.to(tl.uint64) + (_PAGES_FIELD + group * _GROUP_STRIDE)
                sums += tl.where(page != 0, _mix(field, _word(page)), 0)
        begin = tl.load(length + row)
        for start in range(0, query_len, BLOCK):
            held = start + lane < query_len
            position = begin + start + lane
            token = tl.load(tokens + row * TOKEN_COLUMNS + position, mask=held, other=0)
            field = position.to(tl.uint64) + _TOKENS_FIELD
            sums += tl.where(held, _mix(field, _word(token)), 0)

        total += tl.sum(sums, axis=0)
        place = (tl.cast(at, tl.uint64) << 32) + row.to(tl.uint64)
        tl.store(out + at, _mix(place, total).to(tl.int64, bitcast=True))


@triton.jit
def stage_bucket(
    frame,
    records,
    length,
    page_table,
    pages_len,
    tokens,
    out_rows,
    out_lengths,
    out_samples,
    out_seen,
    out_tokens,
    out_positions,
    out_slots,
    out_page_table,
    out_width,
    out_seeds,
    out_temperature,
    out_draw_positions,
    ROWS_MAX: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_COLUMNS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill one row of the static buffers a program: wire.staging.Staging.fill, padding and all.

    A grid of as many programs as the bucket has rows. Of the page table, the columns are written
    that the row has or the row here before it had (out_width int32[groups, R]).
    """
    at = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    live = at < tl.load(frame)
    row = tl.load(frame + _HEADER + at, mask=live, other=0).to(tl.int64)
    begin = tl.load(length + row, mask=live, other=0)
    tl.store(out_rows + at, row.to(tl.int32))
    tl.store(out_lengths + at, begin)
    samples = tl.load(frame + _HEADER + 2 * ROWS_MAX + at, mask=live, other=0)
    tl.store(out_samples + at, samples)
    tl.store(out_seen + at, tl.where(live, begin + QUERY_LEN, 0))
    for within in tl.static_range(QUERY_LEN):
        position = begin + within
        token = tl.load(tokens + row * TOKEN_COLUMNS + position, mask=live, other=0)
        out = at * QUERY_LEN + within
        tl.store(out_tokens + out, token.to(tl.int64))
        tl.store(out_positions + out, position.to(tl.int64))
        for group in tl.static_range(GROUPS):
            table = page_table + (group * TABLE_ROWS + row) * COLUMNS
            page = tl.load(table + position // PAGE_TOKENS, mask=live, other=0).to(tl.int64)
            slot = page * PAGE_TOKENS + position % PAGE_TOKENS
            # Padding stores nothing.
            slot = tl.where(live, slot, -1)
            tl.store(out_slots + group * ROWS_MAX * QUERY_LEN + out, slot)
    for group in tl.static_range(GROUPS):
        table = page_table + (group * TABLE_ROWS + row) * COLUMNS
        target = out_page_table + (group * ROWS_MAX + at).to(tl.int64) * COLUMNS
        width = tl.load(pages_len + group * TABLE_ROWS + row, mask=live, other=0)
        before = tl.load(out_width + group * ROWS_MAX + at)
        widest = tl.maximum(width, before)
        for start in range(0, widest, BLOCK):
            column = start + lane
            pages = tl.load(table + column, mask=column < width, other=0)
            tl.store(target + column, pages, mask=column < widest)
        tl.store(out_width + group * ROWS_MAX + at, width)
    # The words of a record are written by int32; its seed is two of them.
    low = tl.load(records + row * _RECORD + _SEED, mask=live, other=0)
    high = tl.load(records + row * _RECORD + _SEED + 1, mask=live, other=0)
    seed = _word(low) | (_word(high) << 32)
    tl.store(out_seeds + at, seed.to(tl.int64, bitcast=True))
    bits = tl.load(records + row * _RECORD + _TEMPERATURE, mask=live, other=0)
    tl.store(out_temperature + at, bits.to(tl.float32, bitcast=True))
    tl.store(out_draw_positions + at, (begin + QUERY_LEN).to(tl.int64))


@triton.jit
def stage_ragged(
    frame,
    length,
    page_table,
    tokens,
    out_tokens,
    out_positions,
    out_slots,
    out_lasts,
    ROWS_MAX: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_COLUMNS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Query tokens of a step of any shape, row after row: ids, positions, slots of group 0, and
    out_lasts[places[i]] = which of them is row i's last."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    count = tl.load(frame)
    for at in range(program, count, tl.num_programs(0)):
        step = frame + _HEADER + at
        row = tl.load(step).to(tl.int64)
        query_len = tl.load(step + ROWS_MAX)
        offset = tl.load(step + 3 * ROWS_MAX)
        place = tl.load(step + 4 * ROWS_MAX)
        begin = tl.load(length + row)
        for start in range(0, query_len, BLOCK):
            within = start + lane
            held = within < query_len
            position = begin + within
            token = tl.load(tokens + row * TOKEN_COLUMNS + position, mask=held, other=0)
            table = page_table + row * COLUMNS
            page = tl.load(table + position // PAGE_TOKENS, mask=held, other=0).to(tl.int64)
            out = offset + within
            tl.store(out_tokens + out, token.to(tl.int64), mask=held)
            tl.store(out_positions + out, position.to(tl.int64), mask=held)
            slot = page * PAGE_TOKENS + position % PAGE_TOKENS
            tl.store(out_slots + out, slot, mask=held)
        tl.store(out_lasts + place, (offset + query_len - 1).to(tl.int64))


@triton.jit(do_not_specialize=["bucket"])
def stage_mixed(
    frame,
    page_table,
    rows,
    seen,
    out_tokens,
    out_positions,
    out_slots,
    out_page_table,
    bucket,
    ROWS_MAX: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a bucket of so many query tokens has besides `stage_ragged`'s. Of each row of the table
    that int32 `rows` names, one a program, the columns of its `seen` tokens in group 0; below 0 is
    none. And padding: token 0 at position 0, which is stored nowhere."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    row = tl.load(rows + program).to(tl.int64)
    if row >= 0:
        width = tl.minimum(tl.cdiv(tl.load(seen + program), PAGE_TOKENS), COLUMNS)
        target = out_page_table + program.to(tl.int64) * COLUMNS
        for start in range(0, width, BLOCK):
            column = start + lane
            pages = tl.load(page_table + row * COLUMNS + column, mask=column < width, other=0)
            tl.store(target + column, pages, mask=column < width)
    count = tl.load(frame)
    last = frame + _HEADER + tl.maximum(count - 1, 0)
    used = tl.load(last + 3 * ROWS_MAX) + tl.load(last + ROWS_MAX)
    used = tl.where(count > 0, used, 0)
    nothing = tl.zeros([BLOCK], tl.int64)
    for start in range(used + program * BLOCK, bucket, tl.num_programs(0) * BLOCK):
        out = start + lane
        tl.store(out_tokens + out, nothing, mask=out < bucket)
        tl.store(out_positions + out, nothing, mask=out < bucket)
        tl.store(out_slots + out, nothing - 1, mask=out < bucket)


@triton.jit
def advance_rows(
    frame,
    length,
    tokens,
    drawn,
    ROWS_MAX: tl.constexpr,
    TOKEN_COLUMNS: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """length += query_lens; where samples, tokens[row, length] = the row's draw.

    drawn int32[R]: by places where PLACED, else by plan row.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = frame + _HEADER + at
    held = at < tl.load(frame)
    row = tl.load(step, mask=held, other=0).to(tl.int64)
    query_len = tl.load(step + ROWS_MAX, mask=held, other=0)
    samples = tl.load(step + 2 * ROWS_MAX, mask=held, other=0)
    place = at
    if PLACED:
        place = tl.load(step + 4 * ROWS_MAX, mask=held, other=0)
    end = tl.load(length + row, mask=held, other=0) + query_len
    tl.store(length + row, end, mask=held)
    draws = held & (samples != 0)
    token = tl.load(drawn + place, mask=draws, other=0)
    tl.store(tokens + row * TOKEN_COLUMNS + end, token, mask=draws)
