"""Mutations: real bugs of the field, each put into one production function to see it caught.

A mutation is a change of source text: the function's own source, in which `old` must stand exactly
once, recompiled with `new` in its place. So there are no hooks in production code, and a mutation
whose place has moved fails loudly (`MutationStale`) instead of testing nothing.

`hunt` runs worlds until one sees the mutation. The unmutated engine must pass all of them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.sim.simulator import Outcome, simulate
from holdfast.sim.world import PROFILES, draw


class MutationStale(Exception):
    """The text that a mutation changes is not there (once) any more."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """`where`: module:Class.function or module:function. `bug`: the sentence it makes untrue."""

    name: str
    bug: str
    where: str
    old: str
    new: str


_S, _C, _B = "holdfast.core.scheduler:", "holdfast.core.commit:", "holdfast.core.brain:"
_G, _N, _O = "holdfast.api.generation:", "holdfast.api.session:", "holdfast.api.output:"
_T = "holdfast.kv.tiers:"
_L, _P, _R = "holdfast.kv.ledger:", "holdfast.kv.prefix:", "holdfast.wire.rows:"
_Q = "holdfast.core.quarantine:"
_M = "holdfast.proc.lifecycle."
_E, _A = "holdfast.wire.envelope:", "holdfast.wire.staging:"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "free-for-retire",
        "a released page is reused only after the step that may touch it",
        _L + "Ledger.release",
        "if step <= self._acknowledged:",
        "if True:",
    ),
    Mutation(
        "reuse-at-abort",
        "pages of an aborted request wait for the step in flight",
        _S + "Scheduler.drop_row",
        "self.ledger.release(handles, self.step, group)",
        "self.ledger.release(handles, 0, group)",
    ),
    Mutation(
        "lost-acknowledgement",
        "every acknowledgement is taken",
        _L + "Ledger.acknowledge",
        "self._clock += 1",
        "self._clock += 1\n    if step % 3 == 0: return",
    ),
    Mutation(
        "drain-in-prefill-only",
        "acknowledgements are drained in every step",
        _C + "Commit.commit",
        "self.ledger.acknowledge(plan.step)",
        "if plan.admits.size: self.ledger.acknowledge(plan.step)",
    ),
    Mutation(
        "index-before-seal",
        "only sealed pages are indexed",
        _S + "Scheduler.want_seals",
        "self.seals.append(SealBatch(0, handles, column, tokens, chains))",
        "self.ledger.index.insert(-1, tokens[:4 * page_tokens], int(handles[0]),"
        " int(handles[0]) & 0xFFFFFF)",
    ),
    Mutation(
        "page-boundary",
        "a token at a page's first position has a page",
        _S + "Scheduler._decode",
        "run.planned[rows] >= run.capacity[rows]",
        "run.planned[rows] > run.capacity[rows]",
    ),
    Mutation(
        "chunk-page-boundary",
        "a chunk that fills its last page has that page",
        _S + "Scheduler._chunk",
        "pages = self.limits.pages_for_tokens(planned + count) - held",
        "pages = (planned + count - 1) // page_tokens - held",
    ),
    Mutation(
        "clamp-to-size",
        "a prefix hit leaves one token to compute",
        _S + "Scheduler._admit",
        "(tokens.size - 1) // self.limits.page_tokens",
        "tokens.size // self.limits.page_tokens",
    ),
    Mutation(
        "table-too-narrow",
        "a page table holds the longest context",
        "holdfast.config:Limits.table_columns",
        "math.ceil(self.context_tokens / self.page_tokens)",
        "max(1, self.context_tokens // self.page_tokens - 1)",
    ),
    Mutation(
        "delta-twice",
        "a step moves a row once",
        _R + "RowTable.advance",
        "length = self.length[rows] + plan.query_lens",
        "length = self.length[rows] + plan.query_lens + (plan.query_lens > 4)",
    ),
    Mutation(
        "clear-forgotten",
        "the device is told of every row that ends",
        _S + "Scheduler.drop_row",
        "self.clears.append(row)",
        "self.clears[:] = [row]",
    ),
    Mutation(
        "skip-epoch-check",
        "a result of an old epoch is dropped",
        "holdfast.wire.link:MemoryLink.receive",
        "if epoch == self.epoch:",
        "if epoch <= self.epoch:",
    ),
    Mutation(
        "emit-before-journal",
        "a token is in the journal before anybody sees it",
        _C + "Commit._settle_tokens",
        "if not self.journal.tokens(self._wall_ns(), ids, tokens):",
        "late, self.late = getattr(self, 'late', None), (self._wall_ns(), ids, tokens)\n"
        "    if late is not None and not self.journal.tokens(*late):",
    ),
    Mutation(
        "resume-from-start",
        "a resumed client gets what it has not seen",
        "holdfast.core.replies:Replies.say_tokens",
        "tokens = tokens[first:]",
        "pass",
    ),
    Mutation(
        "resume-at-cursor",
        "what was journalled and not sent is sent after a restart",
        "holdfast.core.replies:Replies.say_tokens",
        "tokens = tokens[first:]",
        "return",
    ),
    Mutation(
        "double-release",
        "a lease is released once",
        _S + "Scheduler.drop_row",
        "self.clears.append(row)",
        "self.clears.append(row)\n"
        "    self.ledger.release(self.running.handles[row, :1], self.step)",
    ),
    Mutation(
        "leak-on-abort-mid-prefill",
        "a request that ends in the middle of its prompt gives its pages back",
        _S + "Scheduler.drop_row",
        "for group, handles in enumerate(self.running.leave(row)):",
        "half = self.running.total[row] - self.running.planned[row] > 1\n"
        "    left = self.running.leave(row)\n"
        "    for group, handles in enumerate([one[:0] if half else one for one in left]):",
    ),
    Mutation(
        "prefix-without-parent",
        "a prefix hit continues the pages before it",
        _P + "PrefixIndex.walk",
        "parent = handle",
        "pass",
    ),
    Mutation(
        "prefix-without-tenant",
        "a prefix is shared within its tenant only",
        _S + "_tag",
        'return tag + b"\\0" + tenant.encode()',
        "return tag",
    ),
    Mutation(
        "token-after-cancel",
        "no token of a request follows its end",
        _C + "Commit.commit",
        "live = run.life[rows] == flight.life",
        "live = run.life[rows] >= 0",
    ),
    Mutation(
        "preempt-forgets",
        "a preempted request keeps the tokens it has said",
        _S + "Scheduler.preempt",
        "if known > tokens.size:",
        "if False:",
    ),
    Mutation(
        "preempt-off-by-one",
        "a preempted request goes on behind its last token",
        _S + "Scheduler.preempt",
        "known = request.prompt_len + int(run.emitted[row])",
        "known = request.prompt_len + max(0, int(run.emitted[row]) - 1)",
    ),
    Mutation(
        "seal-partial",
        "only full pages are sealed",
        _C + "Commit._want_seals",
        "length = self.scheduler.mirror.length[rows]",
        "length = self.scheduler.mirror.length[rows] + 1",
    ),
    Mutation(
        "twin-unleased",
        "a page below another's twin keeps that twin from eviction",
        _C + "Commit._borrow",
        "handles = np.array([handle], np.uint64)",
        "return",
    ),
    Mutation(
        "digest-ignored",
        "a device whose rows differ from the brain's is stopped",
        _C + "Commit.commit",
        "if expected != result.digest:",
        "if False:",
    ),
    Mutation(
        "deadline-ignored",
        "a request ends at its deadline",
        _B + "Brain.expire",
        "if request is not None and request.deadline_s <= now_s:",
        "if False:",
    ),
    Mutation(
        "queue-unbounded",
        "the queue is bounded",
        "holdfast.core.admission:Admission.judge",
        "if full or tokens:",
        "if False:",
    ),
    Mutation(
        "no-last-resort",
        "when nothing can go on, somebody is preempted",
        _S + "Scheduler._unblock",
        "if run.active == 0:",
        "if run.active >= 0:",
    ),
    Mutation(
        "generation-kept",
        "a freed page's old handles are stale",
        "holdfast.kv.pages:PagePool.give_back",
        "self.current[pages] += NEXT_GENERATION",
        "pass",
    ),
    Mutation(
        "end-forgotten",
        "a client that missed its end gets it from the next core",
        "holdfast.core.ended:EndedRequests.add",
        "self._entries[record.id] = (bare, output, end)",
        "return",
    ),
    Mutation(
        "restored-not-muted",
        "a restored request is silent until its client resumes it",
        _B + "Brain.restore",
        "self.committer.muted.add(request.id)",
        "pass",
    ),
    Mutation(
        "evict-parent-first",
        "a page leaves the trie after its children",
        _L + "Ledger._evictable",
        "and self.index.children[page] == 0",
        "",
    ),
    Mutation(
        "hit-without-lease",
        "a row leases the pages it shares",
        _S + "Scheduler._admit",
        "self.ledger.acquire(mine, group)",
        "pass",
    ),
    Mutation(
        "followers-forgotten",
        "held-back choices run when their leader is done",
        _S + "Scheduler.release_followers",
        "self.waiting.push(follower)",
        "pass",
    ),
    Mutation(
        "worker-loss-keeps-pages",
        "after a worker is lost nothing unverified is reused",
        _B + "Brain.new_epoch",
        "self.ledger.reset()",
        "self.ledger.acknowledge(1 << 40)\n    self.ledger._acknowledged = 0",
    ),
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
        _B + "Brain.restore",
        "self.ledger.soil_all()",
        "pass",
    ),
    Mutation(
        "dirty-after-a-fault",
        "a page that a dead worker was writing is zeroed before it is used",
        _L + "Ledger.soiled",
        "if self._dirty_pages == 0:",
        "if self._dirty_pages >= 0:",
    ),
    # --- streams ---
    Mutation(
        "finish-keeps-choice",
        "a stop string ends its choice once",
        _N + "Session._finish",
        "self._choices.pop(choice.id, None)",
        "self._choices.get(choice.id)",
    ),
    Mutation(
        "finish-after-end",
        "a stop string in the last token adds no second end",
        _G + "Generation.stop",
        "if not found.ended:",
        "if True:",
    ),
    Mutation(
        "stop-cut-late",
        "nothing of a stop string is shown",
        "holdfast.api.stop:StopStrings.feed",
        "return text[: found[1]]",
        "return text[: found[1] + 1]",
    ),
    Mutation(
        "stop-split-missed",
        "a stop string is found though tokens cut it in pieces",
        "holdfast.api.stop:StopStrings.feed",
        "keep = self._first_possible(text)",
        "keep = len(text)",
    ),
    Mutation(
        "stop-last-wins",
        "of several stop strings the one that is complete first ends the text",
        "holdfast.api.stop:StopStrings.feed",
        "(at + len(stop), at) < found",
        "(at + len(stop), at) > found",
    ),
    Mutation(
        "stop-before-min-tokens",
        "no stop string is looked for before min_tokens",
        _O + "ChoiceOutput.push",
        "self.tokens >= self._min_tokens",
        "True",
    ),
    Mutation(
        "held-back-lost",
        "text that was held back is shown when it is no stop string after all",
        "holdfast.api.stop:StopStrings.flush",
        "return held",
        'return ""',
    ),
    Mutation(
        "stop-id-shown",
        "the text of a stop id is not the client's",
        "holdfast.api.transcript:Transcript.take",
        "ends_by_id=event.end == _STOP",
        "ends_by_id=False",
    ),
    Mutation(
        "stop-id-shown-after-recovery",
        "a core that took over says which token ended the request",
        "holdfast.core.replies:Replies.say_tokens",
        "if end in (End.STOP, End.LENGTH):",
        "if False:",
    ),
    Mutation(
        "unfinished-character-dropped",
        "a character split over tokens is shown",
        "holdfast.api.detokenize:TableDetokenizer.push",
        "self._decode(self._table[token])",
        'self._table[token].decode("utf-8", "ignore")',
    ),
    Mutation(
        "logprob-before-its-text",
        "a logprob is shown with or after its token's text",
        _O + "ChoiceOutput.logprobs",
        "self._entries[0][0] <= self.shown",
        "True",
    ),
    Mutation(
        "logprob-of-stop-string",
        "a stop string does not leak through its tokens' logprobs",
        _O + "ChoiceOutput._cut",
        "if entry.offset < end or due <= end",
        "",
    ),
    Mutation(
        "logprobs-shifted",
        "a logprob belongs to its own token",
        _N + "Session._tokens",
        "logprob = logprobs[at]",
        "logprob = logprobs[at - 1]",
    ),
    Mutation(
        "one-cursor-a-stream",
        "each choice resumes behind its own last token",
        _N + "Session.link_up",
        "len(choice.seen) - choice.base",
        "max(len(one.seen) for one in generation.choices) - choice.base",
    ),
    Mutation(
        "repeat-delivered",
        "a token that comes again is dropped",
        _N + "Session._tokens",
        "if index != len(choice.seen):",
        "if index > len(choice.seen):",
    ),
    Mutation(
        "gap-ignored",
        "a missing token is noticed",
        _N + "Session._tokens",
        "if index != len(choice.seen):",
        "if index < len(choice.seen):",
    ),
    Mutation(
        "delivered-after-cancel",
        "nothing is delivered to a reader that has gone",
        _N + "Session._release",
        "self._choices.pop(choice.id, None)",
        "self._choices.get(choice.id)",
    ),
    Mutation(
        "token-to-sibling",
        "a token goes to its own choice",
        _N + "Session._tokens",
        "Token(choice.index, ",
        "Token(len(choice.generation.choices) - 1 - choice.index, ",
    ),
    Mutation(
        "buffer-unbounded",
        "the buffer of a slow reader is bounded",
        _G + "Generation.feed",
        "if len(self._events) >= self._room:",
        "if False:",
    ),
    Mutation(
        "resumed-tokens-fill-the-buffer",
        "a reader is not called slow for tokens that a dead core owed it",
        _G + "Generation.feed",
        "self._room += 1",
        "pass",
    ),
    Mutation(
        "stuck-write-forgotten",
        "a write that nobody reads has a deadline, also when its stream has failed",
        _N + "Session.sweep",
        "if self._is_stuck(generation, now_s) and generation.abort is not None:",
        "if False:",
    ),
    Mutation(
        "submitted-under-new-ids",
        "a request is submitted again under the same ids",
        _N + "Session.link_up",
        "self._submit(generation, now_s)",
        "generation.choices[0].id += 1 << 20\n    self._submit(generation, now_s)",
    ),
    Mutation(
        "resubmitted-and-silent",
        "a request whose acceptance was lost is resumed when it is submitted again",
        _B + "Brain._submit",
        "self._resume(api, Resume(tuple((one, 0) for one in submit.ids)))",
        "pass",
    ),
    Mutation(
        "cancel-dies-with-core",
        "what was given up while there was no core is cancelled at the next",
        _N + "Session.link_up",
        "gone = tuple(self._recent)",
        "gone = ()",
    ),
    Mutation(
        "late-token-cancelled-each-time",
        "late tokens of a request that was given up are expected",
        _N + "Session._unknown",
        "if request_id not in self._recent:",
        "if True:",
    ),
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
        _E + "_conditions_met",
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
        "suspicion-never-cleared",
        "suspicion is over once its request is past the position",
        _Q + "Quarantine.implicate",
        "if before is None or position > before.position:",
        "if before is not None: before.position = position\n    if before is None:",
    ),
    Mutation(
        "suspect-ended-at-once",
        "a request that faulted with others is run alone before it ends",
        _Q + "Quarantine.implicate",
        "if self.alone == request and not shared:",
        "if True:",
    ),
    Mutation(
        "never-alone",
        "a request implicated twice runs alone",
        _B + "Brain.plan",
        "if self.quarantine.alone is not None and not self._isolate():",
        "if False:",
    ),
    Mutation(
        "poison-retried",
        "a request that faults alone ends",
        _B + "Brain._suspect",
        "if culprit is not None:",
        "if False:",
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
    # --- tiers ---
    Mutation(
        "store-without-lease",
        "a page that is stored is leased until the copy is over",
        _T + "Tiers.offer",
        "self.ledger.lend(handle)",
        "pass",
    ),
    Mutation(
        "store-lease-cut-short",
        "the lease of a store ends with its acknowledgement and not with the plan's result",
        _L + "Ledger.lend",
        "self.lent[page] = True",
        "self.release(np.array([handle], np.uint64), 0)",
    ),
    Mutation(
        "load-freed-early",
        "a page that a copy writes is nobody else's until the copy is over",
        _T + "Tiers._load",
        "self.ledger.load(handles)",
        "self.ledger.load(handles)\n    self.ledger.release(handles[-1:], 0)",
    ),
    Mutation(
        "load-shared-early",
        "a loaded page is shared after its acknowledgement",
        _T + "Tiers._load",
        "self._copy(_Copy(LOAD, slot, int(handles[at]), entry, job, at))",
        "self._copy(_Copy(LOAD, slot, int(handles[at]), entry, job, at))\n"
        "    self.ledger.loaded(int(handles[at]), entry.sum)\n"
        "    parent = self.ledger.share(int(handles[at]), parent, entry.tokens)",
    ),
    Mutation(
        "sum-unchecked",
        "bytes that changed in a tier are not used",
        _T + "Tiers._judge",
        "if total != entry.sum:",
        "if False:",
    ),
    Mutation(
        "failed-copy-used",
        "a copy that broke off is not used",
        _T + "Tiers._judge",
        "if status != COPY_OK:",
        "if status != COPY_OK and (total := entry.sum) == 0:",
    ),
    Mutation(
        "slot-reused-while-stored",
        "a slot that a store writes is nobody else's",
        _T + "Tiers.offer",
        "self._copy(_Copy(STORE, slot, handle, entry))",
        "self._copy(_Copy(STORE, slot, handle, entry))\n    self.host.filled(slot)",
    ),
    Mutation(
        "slot-reused-while-read",
        "a slot that a load reads is not given up",
        "holdfast.kv.slots:Slots.oldest",
        "and self.leases[slot] == 0",
        "",
    ),
    Mutation(
        "chain-without-parent",
        "a page in a tier is known by all that came before it",
        _P + "PrefixIndex.chain_key",
        "key=parent",
        'key=b""',
    ),
    Mutation(
        "old-epoch-ack",
        "an acknowledgement of an old epoch is dropped",
        "holdfast.wire.link:MemoryLink.receive",
        "if epoch == self.epoch:",
        "if epoch == self.epoch or kind == 6:",
    ),
    Mutation(
        "old-core-ack",
        "the mover's answer to an older core says nothing to this one",
        _T + "Tiers.moved",
        "if acks.epoch == self.life else None",
        "",
    ),
    Mutation(
        "acks-with-results-only",
        "acknowledgements of copies are taken when no step is in flight",
        _B + "Brain.copied",
        "if self.tiers is None or self.suspended:",
        "if self.tiers is None or self.suspended or not self._flights:",
    ),
    Mutation(
        "late-move-forgotten",
        "the slot of a late move stays out of use until the move is over",
        _T + "Tiers.expire",
        "self.host.quarantine(move.slot)",
        "self.host.empty(move.slot)",
    ),
    Mutation(
        "mover-not-reset",
        "a new core uses no slot that an old core's orders may still touch",
        _T + "Tiers.__init__",
        "self.ready = limits.disk_pages == 0",
        "self.ready = True",
    ),
    Mutation(
        "late-copy-tolerated",
        "a worker whose copy is late is replaced",
        _B + "Brain._expire_orders",
        "if late is not None:",
        "if False:",
    ),
    Mutation(
        "abort-forgets-load",
        "a request that ends while it loads stays ended",
        _S + "Scheduler.brought",
        "if request.phase is Phase.LOADING:",
        "if True:",
    ),
    Mutation(
        "load-of-everything",
        "a load takes no more pages than are free",
        _T + "Tiers._load",
        "min(len(found), room, self",
        "min(len(found), self",
    ),
    Mutation(
        "waiter-forgotten",
        "whoever waits for a late move goes on without it",
        _T + "Tiers.expire",
        "waiters += self._part(move.job) if move.job else []",
        "pass",
    ),
    Mutation(
        "promoted-before-the-fence",
        "a worker's place is taken once its pidfd has fired, not while it ends",
        _M + "machine:Lifecycle._join",
        "slot.state not in joint.also[slot.role]:",
        "slot.state not in (*joint.also[slot.role], State.KILLED, State.ENDING):",
    ),
    Mutation(
        "loss-untold",
        "the core is told that the worker is lost, and how",
        _M + "steps:Steps._lose_worker",
        "if slot.epoch:",
        "if False:",
    ),
    Mutation(
        "epoch-reused",
        "each promotion gives a new epoch",
        _M + "steps:Steps._promote",
        "self.epoch += 1",
        "self.epoch += self.epoch == 0",
    ),
    Mutation(
        "standby-twice",
        "a standby that took the worker's place is no standby any more",
        _M + "slot:Slot.move_from",
        "other.process = None\n    other.enter(State.GONE, other.since_s, None)",
        "pass",
    ),
    Mutation(
        "worker-outlives-core",
        "a worker whose core has died is ended",
        _M + "steps:Steps._lose_core",
        "if self.worker.state is State.READY:",
        "if False:",
    ),
    Mutation(
        "weights-still-held",
        "weights that were found bad are loaded anew",
        _M + "steps:Steps._forget",
        "self.weights_held = False",
        "pass",
    ),
    Mutation(
        "hand-of-another",
        "a worker that was killed from outside has not faulted",
        _M + "slot:Slot.faulted",
        "status not in (0, -signal.SIGKILL)",
        "status != 0",
    ),
    Mutation(
        "hang-forgiven",
        "a worker that gave no result in time has faulted",
        _M + "steps:Steps._keep_hung",
        "slot.hung = happened.hung",
        "pass",
    ),
)


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The production function with the bug in it, for as long as the context lasts."""
    module_name, _, path = mutation.where.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name)
    function = original.fget if isinstance(original, property) else original
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutation.old) != 1:
        raise MutationStale(f"{mutation.name}: {source.count(mutation.old)} times in {path}")
    indent = " " * _indent_of(source, mutation.old)
    # New lines of a replacement continue at the indent of the line they replace.
    new = mutation.new.replace("\n    ", "\n" + indent).replace("\n" + indent * 2, "\n" + indent)
    source = source.replace(mutation.old, new).replace("@property\n", "")
    scope: dict[str, Any] = {}
    code = compile(source, f"<mutation {mutation.name}>", "exec", flags=0x100000, dont_inherit=True)
    exec(code, module.__dict__ | {"__class__": owner}, scope)
    changed: Any = _rebound(scope[function.__name__], module)
    if isinstance(original, property):
        changed = property(changed)
    # A module's function is also where others have imported it by name.
    places = [owner]
    if owner is module:
        places = [
            other
            for title, other in list(sys.modules.items())
            if title.startswith("holdfast.") and getattr(other, name, None) is original
        ]
    for place in places:
        setattr(place, name, changed)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, original)


def _indent_of(source: str, text: str) -> int:
    line = source[: source.index(text)].rsplit("\n", 1)[-1]
    return len(line) - len(line.lstrip())


def _rebound(function: Any, module: Any) -> Any:
    """The function with the module's own globals, so that it sees what others patch."""
    import types

    rebound = types.FunctionType(
        function.__code__, module.__dict__, function.__name__, function.__defaults__
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


def hunt(mutation: Mutation, seeds: int = 200, first: int = 0) -> tuple[int, Outcome] | None:
    """The first of `seeds` seeds that sees the bug in any profile, and how; None if none does."""
    with applied(mutation):
        for number in range(first, first + seeds):
            for profile in PROFILES:
                outcome = simulate(draw(number, profile))
                if outcome.violation is not None:
                    return number, outcome
    return None
