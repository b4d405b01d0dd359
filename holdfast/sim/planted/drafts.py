"""Draft tokens, window groups, and rows that are not finite."""

from holdfast.sim.mutations import Mutation

_S = "holdfast.core.scheduler:"
_C = "holdfast.core.commit:"
_B = "holdfast.core.brain:"
_L = "holdfast.kv.ledger:"
_R = "holdfast.wire.rows:"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "publish-rejected-draft",
        "what a rejected draft left in a page is never sealed",
        _C + "Commit._want_seals",
        "length = self.scheduler.mirror.length[rows]",
        "length = self.scheduler.running.planned[rows]",
    ),
    Mutation(
        "no-rollback",
        "a row goes on behind its last accepted token",
        _C + "Commit._roll_back",
        "run.total[rows] -= rejected",
        "pass",
    ),
    Mutation(
        "draft-past-the-end",
        "no draft reaches behind a request's last token",
        _S + "Scheduler._draft_depths",
        "run.limit[rows] - run.total[rows] - 1",
        "run.limit[rows] - run.total[rows] + 1",
    ),
    Mutation(
        "draft-without-page",
        "every draft has a page to write to",
        _S + "Scheduler._draft_depths",
        "wanted = -((room - depths) // self.limits.page_tokens)",
        "wanted = -((room - depths + 1) // self.limits.page_tokens)",
    ),
    Mutation(
        "token-behind-stop-id",
        "an accepted token behind a stop id is never said",
        _C + "_until_end",
        "return before == np.repeat(before[first], counts)",
        "return before >= 0",
    ),
    Mutation(
        "accepted-one-too-many",
        "a row moves by the drafts that held",
        _R + "RowTable._advance_drafted",
        "self.length[plan.rows] = length + accepted",
        "self.length[plan.rows] = length + np.minimum(accepted + 1, plan.drafts)",
    ),
    Mutation(
        "window-boundary",
        "a page stays until no token can see it",
        _R + "first_column",
        "np.maximum(0, tokens - window + 1)",
        "np.maximum(0, tokens - window + 2)",
    ),
    Mutation(
        "window-follows-drafts",
        "a window moves with committed tokens only",
        "holdfast.core.windows:WindowDrops.drop_unseen",
        "length = mirror.length[rows]",
        "length = run.planned[rows]",
    ),
    Mutation(
        "drop-from-the-next-owner",
        "a dropped page leaves the table of the row that dropped it",
        "holdfast.core.windows:WindowDrops.take",
        'writes[run.life[writes["row"]] == life]',
        "writes",
    ),
    Mutation(
        "drop-forgotten",
        "a page that a window has left comes back",
        "holdfast.core.windows:WindowDrops.drop_unseen",
        "self.ledger.release(run.handles[group, row, column], step, group)",
        "pass",
    ),
    Mutation(
        "beside-outlives-its-page",
        "a window page is forgotten with the page it stands beside",
        _L + "Ledger._evict_leaves",
        "self._free_beside(group, beside)",
        "pass",
    ),
    Mutation(
        "window-hit-with-a-hole",
        "a prefix is a hit only where every window can see back far enough",
        _L + "Ledger.find",
        "found = found[: max(set.intersection(*depths))]",
        "found = found[: max(set.union(*depths))]",
    ),
    Mutation(
        "nan-page-reused",
        "the pages of a row that was not finite are zeroed before they are free",
        _C + "Commit._fail_rows",
        "scheduler.zeros.append(own)",
        "self.ledger.release(own, scheduler.step, group)",
    ),
    Mutation(
        "nan-row-that-left",
        "pages of a row that was not finite are zeroed though its request had left",
        _C + "Commit.commit",
        "self._soil_rows(rows[gone])",
        "pass",
    ),
    Mutation(
        "dirty-after-a-core",
        "a page that a dead core gave out is zeroed before it is used",
        _L + "Ledger._start_over",
        "self._soil.mark_all_but(group, stays)",
        "pass",
    ),
    Mutation(
        "dirty-after-a-fault",
        "a page that a dead worker was writing is zeroed before it is used",
        _L + "Ledger.soiled",
        "if self._soil.count == 0:",
        "if self._soil.count >= 0:",
    ),
)
