"""Pages that outlive their worker, and pages that change: what may be believed, and since when."""

from holdfast.sim.mutations import Mutation

_B = "holdfast.core.brain:"
_S = "holdfast.core.scheduler:"
_F = "holdfast.core.page_faults:"
_L = "holdfast.kv.ledger:"
_P = "holdfast.kv.prefix:"
_T = "holdfast.kv.tiers:"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "verification-skipped",
        "a page that outlived its worker is summed before it is used",
        _L + "Ledger.survive",
        "return np.concatenate(kept)",
        "self.unverified = 0\n    for one in self._unverified: one[:] = False\n"
        "    return np.empty(0, np.uint64)",
    ),
    Mutation(
        "sum-against-itself",
        "a page's sum is compared with the one it was sealed with",
        _L + "Ledger.judge",
        "same = pool.sums[pages] == sums[at]",
        "same = sums[at] == sums[at]",
    ),
    Mutation(
        "last-steps-believed",
        "what was sealed in the last two steps before a worker's end is computed again",
        _L + "Ledger.survive",
        "newest = self._clock - RECENT_STEPS",
        "newest = self._clock",
    ),
    Mutation(
        "children-of-a-failed-page",
        "what hangs below a page that has changed goes with it",
        _P + "PrefixIndex.below",
        "if handle in doomed or parent in found or parent in over:",
        "if handle in doomed:",
    ),
    Mutation(
        "served-before-verified",
        "no row is computed before all kept pages are verified",
        _S + "Scheduler.plan",
        "if self.ledger.unverified:",
        "if self.ledger.unverified and self.step == 0:",
    ),
    Mutation(
        "half-verified",
        "verification is over when the last page was found good, not when it was asked for",
        _L + "Ledger._recount_unverified",
        "if self.unverified:",
        "self.unverified = 0\n    for one in self._unverified: one[:] = False\n    if False:",
    ),
    Mutation(
        "weights-rule-forgotten",
        "what was computed since the weights were last good goes when they are found bad",
        _B + "Brain._sealed_until",
        "if memory is not Memory.RELOADED:",
        "if True:",
    ),
    Mutation(
        "weights-rule-ends-at-the-device",
        "what bad weights may have computed goes from the host as well",
        _T + "Tiers.new_epoch",
        "self.host.drop_since(sealed_until)",
        "pass",
    ),
    Mutation(
        "lost-memory-believed",
        "of a memory that is lost nothing is kept",
        _B + "Brain.new_epoch",
        "if memory is Memory.LOST:",
        "if False:",
    ),
    Mutation(
        "unsealed-kept",
        "a page that was being written when its worker ended is free",
        _L + "Ledger._start_over",
        "gone = ~stays & (pool.state != _FREE) & (pool.state != _TRASH)",
        "gone = ~stays & (pool.state == _SEALED)",
    ),
    Mutation(
        "generation-reset",
        "a handle of an ended epoch is never given out again",
        _L + "Ledger._start_over",
        "self._soil.mark_all_but(group, stays)",
        "self._soil.mark_all_but(group, stays)\n"
        "    pool.current[~stays] = np.uint64(group << 56 | 1 << 24) | "
        "np.flatnonzero(~stays).astype(np.uint64)",
    ),
    Mutation(
        "scrub-ignored",
        "a page that the scrub finds changed is given up",
        _B + "Brain._checked",
        "if handles:",
        "if handles and flight.verifies:",
    ),
    Mutation(
        "rows-keep-a-failed-page",
        "a row with a changed page in its context starts again from its tokens",
        _F + "PageFaults.fail",
        "rows = np.array(self._rows_with(void | set(handles)), np.int64)",
        "rows = np.array([], np.int64)",
    ),
    Mutation(
        "token-before-the-sums",
        "no token counts that was drawn by the step that found its page changed",
        "holdfast.core.commit:Commit.commit",
        "live = run.life[rows] == flight.life",
        "live = (run.life[rows] == flight.life) | bool(flight.checks.size)",
    ),
    Mutation(
        "failed-page-not-zeroed",
        "a page whose sum is wrong is zeroed before its next use",
        _L + "Ledger._give_up",
        "self._soil.mark(group, pages)",
        "pass",
    ),
    Mutation(
        "kept-beside-a-failed-page",
        "a window's page goes with the page that it hangs beside",
        _L + "Ledger.drop",
        "doomed |= {one for handle in trie if (one := cache.beside(handle)) is not None}",
        "pass",
    ),
    Mutation(
        "store-sum-ignored",
        "a page whose copy had another sum is given up",
        _T + "Tiers.copied",
        "if status == COPY_OK and not good:",
        "if False:",
    ),
)
