"""device.batch: what the decoder and the sampler get, against a plain reading of the row table."""

from __future__ import annotations

from collections import Counter

import numpy as np
from devicekit import LIMITS, VOCAB, Hand, Request

from holdfast.device.batch import sampler_inputs


def random_request(rng: np.random.Generator) -> Request:
    prompt = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
    fields = {
        "seed": int(rng.integers(0, 1 << 63)),
        "prompt_len": int(rng.integers(1, len(prompt) + 1)),
        "stop_from": int(rng.integers(0, 40)),
    }
    if rng.random() < 0.4:
        fields["repetition_penalty"] = 1.25
    if rng.random() < 0.4:
        fields["presence_penalty"] = 0.5
    if rng.random() < 0.4:
        fields["frequency_penalty"] = 0.25
    bias = {int(i): float(i) / 2 for i in rng.integers(0, VOCAB, rng.integers(0, 5))}
    stops = sorted({int(i) for i in rng.integers(0, VOCAB, rng.integers(0, 5))})
    return Request(prompt, bias, stops, fields)


def test_sampler_inputs_are_a_plain_reading_of_the_row_table(hand: Hand):
    rng = np.random.default_rng(0)
    requests = {row: random_request(rng) for row in range(1, 41)}
    for row, request in requests.items():
        hand.admit(row, request, hand.fresh_pages(32))
    hand.run([(row, len(request.prompt), 1) for row, request in requests.items()])
    table = hand.runner.rows.table
    rows = np.array(sorted(requests, key=lambda row: row % 7), np.int32)
    positions = table.length[rows] + 1
    found = sampler_inputs(table, rows, positions)
    for at, row in enumerate(rows.tolist()):
        request, fields = requests[row], requests[row].fields
        text = table.tokens[row, : positions[at]].tolist()
        assert text[:-1] == request.prompt
        assert (found.seeds[at], found.positions[at]) == (fields["seed"], positions[at])
        mine = found.bias.rows == at
        assert dict(zip(found.bias.ids[mine], found.bias_values[mine], strict=True)) == request.bias
        stops = found.stops.ids[found.stops.rows == at].tolist()
        assert stops == (request.stops if positions[at] < fields["stop_from"] else [])
        mine = found.seen.rows == at
        seen = dict(zip(found.seen.ids[mine].tolist(), found.output_counts[mine], strict=True))
        output = Counter(text[fields["prompt_len"] :])
        history = set(output)
        if "repetition_penalty" in fields:
            history |= set(text)
        elif not fields.keys() & {"presence_penalty", "frequency_penalty"}:
            history = set()
        assert seen == {token: output[token] for token in history}


def test_a_step_is_laid_out_row_after_row_in_plan_order(hand: Hand):
    for row, length in ((1, 9), (2, 5), (3, 7)):
        hand.admit(row, Request(list(range(row * 10, row * 10 + length))), hand.fresh_pages(20))
    hand.run([(1, 4, 0), (3, 7, 1)])
    plan = hand.plan([(3, 1, 1), (2, 5, 1), (1, 3, 0)])
    batch = hand.runner.rows.stage(plan)
    drawn = int(hand.mirror.tokens[3, 7])
    assert batch.tokens.tolist() == [drawn, 20, 21, 22, 23, 24, 14, 15, 16]
    assert batch.positions.tolist() == [7, 0, 1, 2, 3, 4, 4, 5, 6]
    assert batch.drawing.rows.tolist() == [0, 1]
    assert batch.last_tokens.tolist() == [0, 5]
    pages = hand.mirror.page_table[0]
    size = LIMITS.page_tokens
    expected = [pages[3, 1] * size + 3]
    expected += [pages[2, at // size] * size + at % size for at in range(5)]
    expected += [pages[1, 1] * size + at for at in range(3)]
    assert batch.attention.slots.tolist() == expected
    assert (batch.drawing.top_count, batch.drawing.logprobs_asked) == (0, False)
