"""Admission to a graph, and padding."""

from holdfast.sim.mutations import Mutation

_E = "holdfast.wire.envelope:"
_A = "holdfast.wire.staging:"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "bucket-boundary",
        "a graph has room for every row of the step",
        _E + "admit",
        "bisect_left(rows, step.rows)",
        "bisect_left(rows, step.rows - 1)",
    ),
    Mutation(
        "context-boundary",
        "a graph's page tables hold every token of the step",
        _E + "_conditions_met",
        "step.seen_max > graph.context_tokens",
        "step.seen_max > graph.context_tokens + 1",
    ),
    Mutation(
        "pool-epoch-ignored",
        "a graph of an older pool is not replayed",
        _E + "_footing_met",
        "footing.pool_epoch != now.pool_epoch",
        "False",
    ),
    Mutation(
        "padding-on-live-page",
        "padding stores to the trash page alone",
        _A + "Staging._pad",
        "every.page_table[:, stale] = TRASH_PAGE",
        "every.page_table[:, stale] = every.page_table[:, n - 1 : n]",
    ),
    Mutation(
        "stale-row",
        "nothing of a row is left in the buffers when the batch shrinks",
        _A + "Staging._pad",
        "stale = slice(n, self._filled)",
        "stale = slice(n, n)",
    ),
    Mutation(
        "staged-table-too-narrow",
        "a staged page table has every page of its row",
        _A + "Staging._fill_pages",
        "width = int(table.pages_len[:, rows].max())",
        "width = int(table.pages_len[:, rows].max()) - 1",
    ),
    Mutation(
        "window-boundary-within",
        "a graph that reads from the first page on is replayed while all of it is in sight",
        _E + "in_phase",
        "seen_max <= window",
        "seen_max <= window + 1",
    ),
    Mutation(
        "window-boundary-beyond",
        "a graph that reads a whole window is replayed once there is one",
        _E + "in_phase",
        "seen_min >= window",
        "seen_min + 1 >= window",
    ),
)
