"""In which order a plan has the rows that decode."""

from __future__ import annotations

from brain_driver import Driver, limits_of


def test_rows_that_decode_go_longest_first():
    d = Driver(limits_of(prefill_tokens=64, pages=129))
    lengths = {1: 4, 2: 30, 3: 11}
    for request, tokens in lengths.items():
        d.submit(request, list(range(request, request + tokens)), max_tokens=12)
    d.run()
    # Rows were given in the order of requests, one after another.
    admitted = [int(row) for row in d.plans[0].rows]
    longest_first = [admitted[1], admitted[2], admitted[0]]
    decoding = [p.rows.tolist() for p in d.plans if p.rows.size == 3 and p.query_lens.max() == 1]
    assert len(decoding) > 5
    assert all(rows == longest_first for rows in decoding)
    for request in lengths:
        d.check(request)
    d.check_home()
