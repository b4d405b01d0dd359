"""Quarantine, and the processes that come and go."""

from holdfast.sim.mutations import Mutation

_B = "holdfast.core.brain:"
_Q = "holdfast.core.quarantine:"
_C = "holdfast.core.clocks:"
_M = "holdfast.proc.lifecycle."

MUTATIONS: tuple[Mutation, ...] = (
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
        "slot.hung, slot.word_s = happened.hung, happened.since_s",
        "pass",
    ),
    Mutation(
        "wake-up-forgotten",
        "with another worker the brain plans again",
        _B + "Brain.new_epoch",
        "self.suspended = False",
        "pass",
    ),
    Mutation(
        "hang-counted-from-sending",
        "a step's clock runs from its start on the device, not from the sending of its plan",
        _C + "StepClocks.done",
        "self._start(now_s)",
        "pass",
    ),
    Mutation(
        "hang-unseen",
        "a worker whose step never ends is given up",
        _C + "StepClocks.hung",
        "return now_s >= (self.deadline_s or math.inf)",
        "return False",
    ),
    Mutation(
        "clock-of-a-dead-worker",
        "what was sent to the worker before is not the next one's to answer",
        _C + "StepClocks.reset",
        "self._running.clear()",
        "pass",
    ),
    Mutation(
        "new-memory-taken-for-kept",
        "with the keeper all pages are lost",
        _M + "steps:Steps._lose_memory",
        "self.weights_held, self.memory = False, Memory.LOST",
        "self.weights_held = False",
    ),
    Mutation(
        "weights-outlive-the-keeper",
        "a new keeper's memory holds no weights",
        _M + "steps:Steps._lose_memory",
        "self.weights_held, self.memory = False, Memory.LOST",
        "self.memory = Memory.LOST",
    ),
    Mutation(
        "worker-outlives-keeper",
        "nobody goes on with the memory of a keeper that is gone",
        _M + "steps:Steps._lose_memory",
        "if other.alive:",
        "if False:",
    ),
    Mutation(
        "memory-made-too-early",
        "new memory is made once all who map the old one are fenced",
        _M + "machine:Lifecycle._join",
        "if slot.role in joint.also and slot.state not in joint.also[slot.role]:",
        "if joint.name != 'start the keeper' and slot.role in joint.also "
        "and slot.state not in joint.also[slot.role]:",
    ),
    Mutation(
        "reloaded-taken-for-kept",
        "pages that wrong weights may have computed are dropped",
        _M + "steps:Steps._forget",
        "self.memory = Memory.RELOADED",
        "pass",
    ),
    Mutation(
        "scrub-believes-itself",
        "what a scrub finds is compared with what was loaded, also by the worker that loaded it",
        _M + "steps:Steps._compare",
        "slot.loaded or slot.epoch > 0",
        "slot.loaded",
    ),
    Mutation(
        "silence-ignored",
        "a process that answers nothing is killed",
        _M + "machine:Lifecycle._handle",
        "self._enter(slot, rule.then, rule.within, rule.reason or happened.detail)",
        "if happened.event is not Event.SILENT: "
        "self._enter(slot, rule.then, rule.within, rule.reason or happened.detail)",
    ),
)
