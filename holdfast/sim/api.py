"""SimApi: an api process of the simulation, and its clients.

The production Session and Transcripts on virtual time. Played are the socket to the core, the event
loop (a wake is an event, the sweep is one that repeats) and the clients: they leave, read slowly,
come back after a refusal. Each answer is compared with sim.oracle, and each other end is accepted
only when the world gave cause for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from holdfast.api.generation import Generation
from holdfast.api.refusal import error_of
from holdfast.api.schema import Resolved
from holdfast.api.session import Session
from holdfast.api.transcript import Transcript
from holdfast.core.brain import POISON_MESSAGE
from holdfast.core.metrics import Metrics
from holdfast.errors import (
    DeadlineExceeded,
    EngineFault,
    InvalidField,
    NotReady,
    QueueFull,
    RequestError,
)
from holdfast.sim.oracle import ClientView, answer_to
from holdfast.sim.violation import Violation
from holdfast.sim.vocabulary import Vocabulary
from holdfast.sim.world import Job, prompt_array
from holdfast.wire.link import Kind
from holdfast.wire.messages import End, Sampling, TokenBatch

if TYPE_CHECKING:
    from holdfast.sim.simulator import Simulation

# What the session would log is a part of the trace, or a violation.
_SILENT = logging.Logger("holdfast.sim", logging.CRITICAL + 1)

# What the supervisor has the core say when it gives up (proc.lifecycle).
_GIVEN_UP = "the server cannot go on"
_WORDLESS = str(error_of(End.ENGINE_FAULT, ""))


class _Read(Generation):
    """A Generation whose reader is a simulated client."""

    woken: Callable[[], None] | None = None

    def wake(self) -> None:
        if self.woken is not None:
            self.woken()


class SimApi:
    """Process `index`; it has many lives, each with a Session of its own."""

    def __init__(self, sim: Simulation, index: int) -> None:
        self.sim = sim
        self.index = index
        self.life = 0
        self.process: int | None = None  # None while the index has no process that runs
        self.linked: int | None = None  # life of the core that there is a link to
        self.linked_at = 0
        self.lost_at = 0
        self.outages: list[tuple[int, int]] = []  # without a core, from and to
        self.clients: list[_Client] = []
        self.sweeping = False
        self._life_lost = 0  # of the last core whose link was given up
        self._early: list[tuple[int, bytes, tuple[int, int]]] = []  # before the link that they use
        self._backlog: list[tuple[Job, int]] = []  # connected while no process was there

    def begin(self, process: int, core: int) -> None:
        """A process has started; core: life of the core that it has a link to, 0 = none."""
        self.life += 1
        self.process, self.linked = process, None
        self.lost_at, self.outages = self.sim.now, []
        world = self.sim.world
        self.session = Session(
            world.limits,
            Metrics.private(),
            first_id=(self.index << 48) | (self.life << 32) | 1,
            resume_timeout_s=world.resume_timeout * 1e-6,
            write_timeout_s=world.write_timeout * 1e-6,
            buffer_tokens=world.buffer_tokens,
            make=_Read,
            logger=_SILENT,
        )
        if core:
            self.link_up(core)
        backlog, self._backlog = self._backlog, []
        for job, attempt in backlog:
            self.arrive(job, attempt)

    def obey(self, message: dict[str, Any]) -> None:
        """A word of the supervisor."""
        if message["type"] == "core":
            self.link_up(message["life"])
        elif message["type"] == "core_lost":
            if self.linked is not None:
                self.link_lost(self.linked)
        else:
            assert message["type"] == "drain"
            self.session.drain()

    def arrive(self, job: Job, attempt: int = 0) -> None:
        """A client connects and asks. The port stays open without a process: it waits for one."""
        if self.process is None:
            if not self.sim.processes.gave_up:
                self._backlog.append((job, attempt))
            return
        client = _Client(self, job, attempt)
        client.start()
        if self.clients and not self.sweeping:
            self.sweeping = True
            self._sweep_later()

    def _sweep_later(self) -> None:
        period = max(1, int(self.session.sweep_s * 1e6))
        self.sim.after(period, self._sweep, f"api {self.index} sweeps")

    def _sweep(self) -> None:
        if self.process is None:
            self.sweeping = False
            return
        self.session.sweep(self.sim.now_s)
        self._check_writes()
        # Beyond the horizon nothing waits for a timeout: what is open there never ends.
        self.sweeping = bool(self.clients) and self.sim.now < self.sim.horizon
        if self.sweeping:
            self._sweep_later()

    # --- the link ---

    def link_up(self, life: int) -> None:
        """A link to the core of this life, unless that one has died meanwhile."""
        if life != self.sim.core.life:
            return
        if self.linked is None:
            self.outages.append((self.lost_at, self.sim.now))
        mine, self.linked, self.linked_at = self.process, life, self.sim.now
        assert mine is not None

        def send(payload: bytes) -> None:
            def arrives() -> None:
                if self.process == mine:
                    self.sim.core.receive(self.index, payload, life, mine)

            self.sim.after(
                self.sim.world.channel_time, arrives, f"core receives from api {self.index}"
            )

        self.session.link_up(send, self.sim.now_s)
        early, self._early = self._early, []
        for kind, payload, link in early:
            self.receive(kind, payload, link)

    def link_lost(self, life: int) -> None:
        """The end of the link to a core that has died is noticed."""
        self._life_lost = max(self._life_lost, life)
        if self.process is not None and self.linked == life:
            self.linked, self.lost_at = None, self.sim.now
            self.session.link_lost("gone", self.sim.now_s)

    def receive(self, kind: int, payload: bytes, link: tuple[int, int]) -> None:
        """A frame over the link of (life of core, process); nobody reads it once that is over."""
        life, process = link
        if process != self.process or life < (self.linked or 0):
            return
        if life != self.linked:
            if life > self._life_lost:
                self._early.append((kind, payload, link))  # It waits in a socket not yet got.
            return
        if kind == Kind.TOKENS and (batch := TokenBatch.decode(payload)).step:
            for client in self.clients:
                mine = {view.request for view in client.views}
                client.unread += sum(request in mine for request in batch.requests.tolist())
        self.session.receive(kind, payload, self.sim.now_s)
        self._check_buffers()

    def core_died(self) -> None:
        """Clients that choose this moment to leave."""
        for client in list(self.clients):
            if client.job.client.leaves_with_core:
                client.leave()

    def die(self, process: int) -> None:
        """Its connections are gone, and what it had sent is too; the next process starts afresh."""
        if self.process != process:
            return  # It had not started.
        for client in list(self.clients):
            client.end("api died", orphaned=True)
        self.process, life = None, self.linked
        if life is not None:
            self.linked = None
            self.sim.after(
                self.sim.world.channel_time,
                lambda: self.sim.core.api_closed(self.index, process, life),
                f"link of api {self.index} closes",
            )

    # --- checks ---

    def _check_buffers(self) -> None:
        for client in self.clients:
            unread, bound = client.generation.unread, client.generation.buffer_tokens
            if self.sim.core.life > 1:
                # What was missed comes at once, and is bounded by what was asked for.
                bound += client.job.choices * client.job.max_tokens
            if unread > bound:
                raise client.wrong(f"{unread} unread tokens, over the bound of {bound}")

    def _check_writes(self) -> None:
        for client in self.clients:
            if client.stuck_for > self.sim.world.write_timeout:
                raise client.wrong("its write waits for longer than the write timeout")


class _Client:
    """One HTTP exchange: what api.stream does around a Generation, without HTTP."""

    def __init__(self, api: SimApi, job: Job, attempt: int) -> None:
        self.api = api
        self.sim = api.sim
        self.job = job
        self.attempt = attempt
        self.generation: _Read
        self.views: list[ClientView] = []
        self.started = self.sim.now
        self.over = False
        self.waking = False
        self.writing_since: int | None = None
        self.unread = 0  # tokens sent as they were made, since it last read

    @property
    def name(self) -> str:
        return f"client {self.job.number}"

    @property
    def deadline(self) -> int:
        return self.started + self.job.timeout

    @property
    def stuck_for(self) -> int:
        return 0 if self.writing_since is None else self.sim.now - self.writing_since

    def wrong(self, what: str) -> Violation:
        return Violation(f"{self.name}: {what}")

    def start(self) -> None:
        job, session = self.job, self.api.session
        resolved = _resolved(job)
        before = len(session.generations)
        try:
            generation = session.start(
                prompt_array(job).tobytes(), resolved, job.tenant, self.sim.now_s
            )
        except QueueFull:
            if before < self.sim.limits.live_requests:
                raise self.wrong(f"refused with {before} requests open") from None
            self._refused()
            return
        except NotReady:
            if self.api.linked is not None and not self.sim.processes.gave_up:
                raise self.wrong("refused although there is a core") from None
            self._refused()
            return
        assert isinstance(generation, _Read)
        self.generation = generation
        generation.woken = self._wake
        generation.abort = self._aborted
        self.transcript = Transcript(Vocabulary(), job.prompt, resolved)
        for choice in generation.choices:
            answer = self.sim.answer_to(job, choice.index)
            again = partial(answer_to, job, choice.index, self.sim.limits)
            name = f"{self.name} choice {choice.index}"
            view = ClientView(job, name, choice.id, answer, again)
            self.views.append(view)
            self.sim.witness.register(view, self.deadline)
        self.api.clients.append(self)
        if job.client.leaves_after is not None:
            self.sim.after(job.client.leaves_after, self.leave, f"{self.name} leaves")

    def leave(self) -> None:
        """The connection breaks."""
        if not self.over:
            self.generation.cancel("disconnect")
            self.generation.leave(self.sim.now_s)
            self.end("disconnect")

    # --- reading ---

    def _wake(self) -> None:
        if self.over:
            raise self.wrong("something is delivered after its end")
        if not self.waking:
            self.waking = True
            self.sim.at(self.sim.now, self._read, f"{self.name} reads")

    def _read(self) -> None:
        self.waking = False
        if self.over or self.writing_since is not None:
            return
        generation = self.generation
        try:
            generation.check()
            if generation.cancelled is None and not generation.accepted:
                return
            events = generation.take()
        except RequestError as error:
            self._failed(error)
            return
        if generation.cancelled is not None:
            self._cancelled(generation.cancelled)
            return
        self.unread = 0
        if not events:
            return
        for event in events:
            if self.views[event.choice].how is None:
                self.views[event.choice].token(event)
        for shown in self.transcript.take(generation, events):
            view = self.views[shown.choice]
            if view.how is not None:
                raise view.wrong("shown something after its end")
            view.show(shown.text, shown.logprobs, shown.reason)
            self._check_logprobs(shown.logprobs)
            if shown.reason is not None:
                view.finish(shown.reason, self.sim.now)
        leaves_at = self.job.client.leaves_at_token
        if leaves_at is not None and self.views[0].tokens >= leaves_at and self.transcript.left:
            self.leave()
        elif self.job.client.read_time:
            self._write(self.job.client.read_time)
        else:
            self._written()

    def _write(self, time: int) -> None:
        self.writing_since, self.generation.writing_s = self.sim.now, self.sim.now_s
        self.sim.after(time, self._written, f"{self.name} has read")

    def _written(self) -> None:
        if self.over:
            return
        self.writing_since = self.generation.writing_s = None
        self.generation.silent_s = self.sim.now_s
        if self.transcript.left == 0:
            self.generation.leave(self.sim.now_s)
            if self.generation.cancelled is not None:
                raise self.wrong("its answer was complete, and cancelled all the same")
            self.end("")
        elif self.job.client.read_time:
            self._read()

    # --- the end, and whether there is cause for it ---

    def end(self, how: str, *, orphaned: bool = False) -> None:
        """Nothing more reaches this client; what its choices were not told ends as `how`."""
        assert not self.over, f"{self.name} is over twice"
        self.over = True
        self.api.clients.remove(self)
        for view in self.views:
            view.orphaned |= orphaned
            if view.how is None:
                view.finish(how, self.sim.now)

    def _aborted(self) -> None:
        """The server drops the connection under a write that waits."""
        if self.generation.error is None:
            self._cancelled(self.generation.cancelled or "")
        elif self.stuck_for < self.sim.world.write_timeout:
            raise self.wrong("its connection is dropped though its write does not wait")
        else:
            self.generation.leave(self.sim.now_s)
            self.end("slow_reader")

    def _cancelled(self, reason: str) -> None:
        if self.over:
            return
        if reason != "slow_reader":
            raise self.wrong(f"cancelled: {reason}")
        full = self.unread > self.generation.buffer_tokens
        if not full and self.stuck_for < self.sim.world.write_timeout:
            raise self.wrong(f"called slow with {self.unread} tokens unread")
        self.end(reason)

    def _failed(self, error: RequestError) -> None:
        self.generation.leave(self.sim.now_s)
        how = type(error).__name__ if error.code is None else str(error.code)
        if not self._is_due(error):
            raise self.wrong(f"{type(error).__name__}: {error}")
        self.end(how)
        if isinstance(error, QueueFull):
            self._retry()

    def _is_due(self, error: RequestError) -> bool:
        """Whether the world gave cause for this error."""
        sim, witness, job = self.sim, self.sim.witness, self.job
        requests = [view.request for view in self.views]
        if isinstance(error, DeadlineExceeded):
            return sim.now >= self.deadline
        if isinstance(error, QueueFull):
            return witness.may_refuse(requests[0])
        if isinstance(error, InvalidField):
            return witness.never_fits(job)
        if isinstance(error, NotReady):
            # One that reads late hears of it late.
            lost, now = self.api.outages, (self.api.lost_at, sim.now)
            lost = [*lost, now] if self.api.linked is None else lost
            patience = sim.world.resume_timeout
            silent = any(b - max(a, self.started) >= patience for a, b in lost)
            return silent or sim.processes.gave_up
        if isinstance(error, EngineFault) and error.code == "not_finite":
            return any(request in witness.not_finite for request in requests)
        if isinstance(error, EngineFault) and error.code == "token_gap":
            return any(request in witness.gapped for request in requests)
        if isinstance(error, EngineFault) and error.code == "never_fits":
            return witness.never_fits(job)
        if not isinstance(error, EngineFault):
            return False
        # One that is told late, because a core died, comes without the words.
        if sim.processes.gave_up and str(error) == _WORDLESS:
            return True
        if str(error).startswith(_GIVEN_UP):
            return sim.processes.gave_up
        # Whether such an end was its own doing, checkers.Suspects judges.
        if str(error) == POISON_MESSAGE or any(one in witness.faulted for one in requests):
            return True
        return any(sim.core.suspects.is_culprit(one) for one in requests)

    def _refused(self) -> None:
        self.sim.refusals += 1
        self.over = True
        self._retry()

    def _retry(self) -> None:
        if self.attempt < self.job.client.retries:
            job, attempt = self.job, self.attempt + 1
            self.sim.after(
                job.client.retry_after,
                lambda: self.api.arrive(job, attempt),
                f"{self.name} tries again",
            )

    def _check_logprobs(self, entries: Any) -> None:
        if self.sim.core.life > 1:
            return  # Tokens sent again after a recovery have none.
        for entry in entries:
            if entry.logprob is None:
                raise self.wrong(f"no logprob of token {entry.token}")


def _resolved(job: Job) -> Resolved:
    return Resolved(
        sampling=Sampling(
            temperature=1.0 if job.sampled else 0.0,
            min_tokens=job.min_tokens,
            top_logprobs=job.logprobs,
            stop_ids=job.stop_ids,
        ),
        max_tokens=job.max_tokens,
        seeds=job.seeds,
        stop=job.stop,
        include_stop=job.include_stop,
        skip_special=True,
        timeout_s=job.timeout * 1e-6,
        priority=job.priority,
    )
