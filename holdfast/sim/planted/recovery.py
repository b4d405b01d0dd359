"""Quarantine, and the processes that come and go."""

from holdfast.sim.mutations import Mutation

_B = "holdfast.core.brain:"
_Q = "holdfast.core.quarantine:"
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
        "slot.hung = happened.hung",
        "pass",
    ),
)
