"""Copies between device, host and disk."""

from holdfast.sim.mutations import Mutation

_S = "holdfast.core.scheduler:"
_B = "holdfast.core.brain:"
_T = "holdfast.kv.tiers:"
_L = "holdfast.kv.ledger:"
_P = "holdfast.kv.prefix:"

MUTATIONS: tuple[Mutation, ...] = (
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
        "self._start_over()",
        "self._start_over()\n    self.ready = True",
    ),
    Mutation(
        "tiers-outlive-the-keeper",
        "what host and disk held is not believed after the keeper died",
        _B + "Brain.new_epoch",
        "lost = memory is Memory.LOST",
        "lost = False",
    ),
    Mutation(
        "moves-of-a-dead-keeper-awaited",
        "the places of moves that a dead keeper had are used again",
        _T + "Tiers.reset",
        "self._moves.clear()",
        "pass",
    ),
    Mutation(
        "new-mover-not-reset",
        "a slot of new memory is not used while its mover may still run orders for the old one",
        _T + "Tiers.reset",
        "self._start_over()",
        "self._start_over()\n    self.ready = True",
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
)
