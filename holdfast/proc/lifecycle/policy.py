"""Policy: the numbers of the state table, and the pace of restarts. Data and arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.proc.lifecycle.states import Standby, Wait

# SIGKILL takes a process in milliseconds, one that holds tens of GiB in seconds. After this it
# hangs in the kernel and cannot be fenced.
FENCE_S = 20.0
# Between end of file on the control channel and SIGKILL: a process that exits by itself does it in
# milliseconds, and its own exit status says more.
DYING_S = 0.25
# After the last token: api processes send what clients have not taken; then the others have
# nothing to finish and only give back memory.
API_STOP_S = 10.0
STOP_S = 5.0
# The core ends what is live in one tick.
END_S = 5.0
# Without a word of progress, of which a sum of weights gives ten a second.
VERIFY_S = 30.0
# The keeper compares two integers.
COMPARE_S = 10.0
# A core that compacts its journal, or an api process that encodes the longest prompt, is busy for
# one or two seconds; on a machine with ten times the load that it has cores, for ten times as long.
HEARTBEAT_S = 20.0
# Importing and warming takes a core for seconds: not in the first second of a recovery.
STANDBY_PAUSE_S = 1.0

RESTART_WINDOW_S = 60.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator chose, of ServeOptions."""

    apis: int = 1
    standby: Standby = Standby.WARM
    restarts_per_minute: int = 5
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    heartbeat_timeout_s: float = HEARTBEAT_S

    def seconds(self, wait: Wait) -> float:
        """How long a state with this deadline may last."""
        return {
            Wait.START: self.start_timeout_s,
            Wait.VERIFY: VERIFY_S,
            Wait.COMPARE: COMPARE_S,
            Wait.DYING: DYING_S,
            Wait.STOP: STOP_S,
            Wait.API_STOP: API_STOP_S,
            Wait.FENCE: FENCE_S,
            Wait.HEARTBEAT: self.heartbeat_timeout_s,
            Wait.DRAIN: self.drain_timeout_s,
            Wait.END: END_S,
        }[wait]

    def restart_s(self, ends: int) -> float | None:
        """The pause before the next start after so many ends in a minute; None: enough."""
        if ends > self.restarts_per_minute:
            return None
        return 0.0 if ends < 2 else min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** (ends - 2))

    def standby_s(self, worker_ends: int, standby_ends: int) -> float:
        """The pause before a standby is started. One that cannot live costs a start a minute."""
        pauses = (self.restart_s(worker_ends), self.restart_s(standby_ends))
        if None in pauses:
            return RESTART_WINDOW_S
        return max(STANDBY_PAUSE_S, *pauses)  # type: ignore[type-var]
