"""Pages, plans and facts: who owns a page, what a step computes, what is true of a request."""

from holdfast.sim.mutations import Mutation

_S = "holdfast.core.scheduler:"
_C = "holdfast.core.commit:"
_B = "holdfast.core.brain:"
_L = "holdfast.kv.ledger:"
_P = "holdfast.kv.prefix:"
_R = "holdfast.wire.rows:"

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
        "self.seals.append(batch)",
        "self.ledger.index.insert(-1, tokens[:4 * page_tokens], int(handles[0]),"
        " int(handles[0]) & 0xFFFFFF)",
    ),
    Mutation(
        "page-boundary",
        "a token at a page's first position has a page",
        _S + "Scheduler._decode",
        "planned >= run.capacity[rows]",
        "planned > run.capacity[rows]",
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
        _S + "Scheduler._admit_past",
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
        _S + "Scheduler._admit_past",
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
)
