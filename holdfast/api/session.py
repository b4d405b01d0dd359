"""Session: what an api process knows and decides about its requests; no IO and no clock.

Owns the request ids (from `first_id` up) and every Generation until it is released. Invariants:
each token index of a choice is delivered once and in order (a repeated one is dropped, a gap fails
the request); every wait has a deadline, kept by `sweep`; buffers are bounded.

When the core dies the generations stay, and what is known of them is resumed over the next link:
what was not accepted is submitted again under the same ids, what was is asked for from the next
index on; a request that the new core has forgotten is submitted with its tokens as part of the
prompt. Driven by api.client in a process and by the simulator; knows no text and no HTTP.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from holdfast.api.generation import Choice, Generation, Token
from holdfast.api.refusal import RETRY_AFTER_S, error_of, not_ready, refusal_of
from holdfast.api.schema import Resolved
from holdfast.config import Limits
from holdfast.core.metrics import Metrics
from holdfast.errors import DeadlineExceeded, EngineFault, LinkError, QueueFull
from holdfast.wire.link import Kind
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Ended,
    Finish,
    Refused,
    Resume,
    State,
    ToApi,
    ToCore,
    TokenBatch,
    decode_to_api,
    encode,
)

log = logging.getLogger("holdfast.api")

# The core ends a request at its deadline; only a core that does not is waited for so much longer.
DEADLINE_GRACE_S = 5.0
# Ids whose late tokens are expected: two steps of rows, many times over.
RECENT_IDS_MAX = 1 << 16
# Requests in one Resume or Cancel; a bounded message, whatever the number of streams.
RESUME_IDS_MAX = 4096

Send = Callable[[bytes], None]


class Session:
    """`make`: what `start` returns, called with the arguments of Generation.

    Times are seconds of one monotonic clock, whichever; the caller tells them. `sweep` must be
    called every `sweep_s` or so while anything is open.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        *,
        first_id: int,
        accept_timeout_s: float = 10.0,
        resume_timeout_s: float = 60.0,
        write_timeout_s: float = 30.0,
        keepalive_s: float = 15.0,
        buffer_tokens: int = 1024,
        make: Callable[..., Generation] = Generation,
        logger: logging.Logger = log,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.ready = False
        self.detail = "no link to the core yet"
        self.draining = False
        self.accept_timeout_s = accept_timeout_s
        self.resume_timeout_s = resume_timeout_s
        self.write_timeout_s = write_timeout_s
        self.keepalive_s = keepalive_s
        shortest = min(accept_timeout_s, write_timeout_s, keepalive_s, resume_timeout_s)
        self.sweep_s = min(0.25, shortest / 4)
        # In order of arrival. Bounded by the core's queue: what it did not accept is refused.
        self.generations: dict[int, Generation] = {}
        # Over, but for a reader that has not left: it may be stuck in a write.
        self._failed: list[Generation] = []
        self._buffer_tokens = buffer_tokens
        self._make = make
        self._log = logger
        self._link: Send | None = None
        self._lost_s = 0.0
        self._next_id = first_id
        self._choices: dict[int, Choice] = {}
        self._recent: OrderedDict[int, None] = OrderedDict()
        metrics.set("streams_open", 0)

    # --- for requests ---

    def start(self, prompt: bytes, resolved: Resolved, tenant: str, now_s: float) -> Generation:
        """Submit one prompt (int32 ids as bytes) with all its choices.

        Raises RequestError: NotReady when there is no core, QueueFull when too much is open here.
        What the core refuses it with comes later, as the generation's error.
        """
        if self.draining:
            raise not_ready("the server is shutting down")
        if self._link is None:
            raise not_ready(self.detail)
        if len(self.generations) >= self.limits.live_requests:
            # The core's bound, kept here too: between two answers of the core, nothing else does.
            raise QueueFull(
                f"{len(self.generations)} requests are open here", retry_after_s=RETRY_AFTER_S
            )
        ids = [self._next_id + choice for choice in range(resolved.choices)]
        self._next_id += len(ids)
        generation = self._make(
            prompt,
            resolved,
            tenant,
            ids,
            now_s=now_s,
            release=self._release,
            finish=self._finish,
            buffer_tokens=self._buffer_tokens,
        )
        self.generations[ids[0]] = generation
        for choice in generation.choices:
            self._choices[choice.id] = choice
        self.metrics.set("streams_open", len(self.generations))
        self._submit(generation, now_s)
        return generation

    def drain(self) -> None:
        """Refuse new requests; what is open goes on."""
        self.draining = True
        self.ready = False
        self.detail = "the server is shutting down"

    def shut(self) -> None:
        """The process ends: every generation fails, the core is told, and nothing is sent after."""
        error = not_ready("the server is shutting down")
        for generation in list(self.generations.values()):
            generation.fail(error, "shutdown")
        self._link = None

    # --- the link ---

    def link_up(self, send: Send, now_s: float) -> None:
        """A link to a core, the first one or a new core's: resume over it what is open.

        `send` takes the payload of one Kind.MESSAGE; it may call `link_lost` when it cannot.
        """
        self._link = send
        # Ready once the core says so.
        self.ready, self.detail = False, "the core has not said that it can step"
        # The core before this one may have died with what it was told last: said again, or the new
        # one would compute for nobody, and in silence until somebody resumes it.
        gone = tuple(self._recent)
        for at in range(0, len(gone), RESUME_IDS_MAX):
            self._send(Cancel(gone[at : at + RESUME_IDS_MAX]))
        pairs = []
        for generation in list(self.generations.values()):
            if not generation.accepted:
                self._submit(generation, now_s)
                continue
            for choice in generation.choices:
                if not choice.ended:
                    choice.resuming = True
                    pairs.append((choice.id, len(choice.seen) - choice.base))
        for at in range(0, len(pairs), RESUME_IDS_MAX):
            self._send(Resume(tuple(pairs[at : at + RESUME_IDS_MAX])))

    def link_lost(self, detail: str, now_s: float) -> None:
        """The core is gone: hold what is open until `link_up`, refuse what comes."""
        if self._link is None:
            return
        self._link = None
        self._lost_s = now_s
        self.ready, self.detail = False, f"the core is being replaced: {detail}"
        self._log.warning(
            "lost the core: %s; %d requests wait for it", detail, len(self.generations)
        )

    def _send(self, message: ToCore) -> None:
        if self._link is not None:  # Else said again, or not needed, once there is a link.
            self._link(encode(message))

    def receive(self, kind: int, payload: bytes | memoryview, now_s: float) -> None:
        """A frame from the core. Raises LinkError or msgspec.DecodeError when it makes no sense."""
        if kind == Kind.TOKENS:
            self._tokens(TokenBatch.decode(payload), now_s)
        elif kind == Kind.MESSAGE:
            self._message(decode_to_api(payload), now_s)
        else:
            raise LinkError(f"frame of kind {kind} from the core")

    # --- what the core says ---

    def _tokens(self, batch: TokenBatch, now_s: float) -> None:
        requests, indexes = batch.requests.tolist(), batch.indexes.tolist()
        tokens, ends = batch.tokens.tolist(), batch.ends.tolist()
        cached = batch.cached.tolist()
        logprobs = batch.logprobs.tolist()
        top_k, top_ids, top_logprobs = batch.top_k, [], []
        if top_k:
            top_ids = batch.top_ids.reshape(-1, top_k).tolist()
            top_logprobs = batch.top_logprobs.reshape(-1, top_k).tolist()
        again = batch.step == 0  # sent in answer to a Resume
        choices = self._choices
        for at, request_id in enumerate(requests):
            choice = choices.get(request_id)
            if choice is None:
                self._unknown(request_id)
                continue
            index = indexes[at] + choice.base
            if index != len(choice.seen):
                self._out_of_order(choice, index)
                continue
            logprob, ids, values = None, _NONE, _NONE
            if logprobs:
                wanted = choice.generation.resolved.sampling.top_logprobs
                if wanted >= 0:
                    logprob = logprobs[at]
                    if wanted and top_k:
                        ids, values = top_ids[at][:wanted], top_logprobs[at][:wanted]
            event = Token(choice.index, tokens[at], ends[at], logprob, ids, values)
            self._deliver(choice, event, cached[at], again, now_s)

    def _deliver(
        self, choice: Choice, event: Token, cached: int, again: bool, now_s: float
    ) -> None:
        generation = choice.generation
        choice.resuming = False
        if not choice.seen:
            if generation.first_s is None:
                generation.first_s = now_s
                self.metrics.observe("ttft_seconds", now_s - generation.started_s)
            if choice.index == 0:
                generation.cached_tokens = cached
        else:
            self.metrics.observe("itl_seconds", now_s - choice.last_s)
        choice.last_s = now_s
        choice.seen.append(event.token)
        if event.end:
            generation.ended(choice)
            del self._choices[choice.id]
        if not generation.feed(event, again=again):
            self._slow(generation)
            return
        if event.end:
            error = error_of(event.end, "")
            if error is not None:
                generation.fail(error, "fault")

    def _out_of_order(self, choice: Choice, index: int) -> None:
        if index < len(choice.seen):
            return  # Repeated by a core that recovered: delivered already.
        if choice.resuming:
            return  # Sent before the core read our Resume; its answer has it again.
        self.metrics.add("token_gaps_total")
        message = f"the engine sent token {index} where {len(choice.seen)} was due"
        self._log.error("request %#x: %s", choice.id, message)
        choice.generation.fail(EngineFault(message, code="token_gap"), "fault")

    def _unknown(self, request_id: int) -> None:
        """A token of nobody: late ones are expected; a core that missed our Cancel gets another."""
        if request_id not in self._recent:
            self._remember(request_id)
            self._send(Cancel((request_id,)))

    def _remember(self, request_id: int) -> None:
        self._recent[request_id] = None
        if len(self._recent) > RECENT_IDS_MAX:
            self._recent.popitem(last=False)

    def _message(self, message: ToApi, now_s: float) -> None:
        if isinstance(message, State):
            if not self.draining:
                self.ready, self.detail = message.ready, message.detail
        elif isinstance(message, Accepted):
            for request_id in message.ids[:1]:
                choice = self._choices.get(request_id)
                if choice is not None:
                    choice.generation.accepted = True
                    choice.generation.wake()
        elif isinstance(message, Refused):
            self._refused(message, now_s)
        else:
            self._ended(message)

    def _refused(self, message: Refused, now_s: float) -> None:
        for request_id in message.ids:
            choice = self._choices.get(request_id)
            if choice is None:
                continue
            if message.status == 0:
                self._submit_anew(choice)
            elif choice.generation.accepted:
                # It was taken once and lost: whatever refuses it now is not the client's fault.
                choice.generation.fail(EngineFault(message.message), "fault")
            else:
                choice.generation.fail(refusal_of(message), "refused")

    def _ended(self, message: Ended) -> None:
        choice = self._choices.get(message.id)
        if choice is None:
            return
        generation = choice.generation
        error = error_of(message.end, message.message)
        if error is None and message.tokens == len(choice.seen) - choice.base:
            self._end_without_token(choice, message.end)
            return
        generation.ended(choice)
        del self._choices[choice.id]
        if error is None:
            missing = f"{message.tokens} tokens, {len(choice.seen) - choice.base} arrived"
            error = EngineFault(f"the engine ended the request after {missing}", code="token_gap")
        reasons = {int(End.DEADLINE): "deadline", int(End.SHUTDOWN): "shutdown"}
        generation.fail(error, reasons.get(message.end, "fault"))

    def _end_without_token(self, choice: Choice, end: int) -> None:
        """An answer that is complete, only that its last token did not say so."""
        generation = choice.generation
        generation.ended(choice)
        del self._choices[choice.id]
        if not generation.feed(Token(choice.index, None, end, None, _NONE, _NONE)):
            self._slow(generation)

    # --- what we say ---

    def _submit(self, generation: Generation, now_s: float) -> None:
        generation.sent_s = now_s
        self._send(generation.submission())

    def _submit_anew(self, choice: Choice) -> None:
        """The core has forgotten an accepted request: its tokens become part of the prompt."""
        generation, seen = choice.generation, len(choice.seen)
        resolved, sampling = generation.resolved, generation.resolved.sampling
        if seen >= resolved.max_tokens:
            self._end_without_token(choice, End.LENGTH)
            return
        if seen and (sampling.presence_penalty or sampling.frequency_penalty):
            # They count output tokens, which would be prompt tokens now: another distribution.
            message = "the engine lost this request, and penalties forbid to continue its text"
            generation.fail(EngineFault(message), "fault")
            return
        choice.base, choice.resuming = seen, False
        self._send(choice.submission())

    def _finish(self, choice: Choice) -> None:
        """A stop string ended the choice: the core commits that end."""
        self._choices.pop(choice.id, None)
        self._remember(choice.id)
        self._send(Finish(choice.id, len(choice.seen) - choice.base))

    def _release(self, generation: Generation, reason: str | None) -> None:
        """The generation is over; with a reason, what still runs of it is cancelled."""
        assert not generation.released, "a generation was released twice"
        generation.released = True
        del self.generations[generation.choices[0].id]
        if generation.error is not None:
            self._failed.append(generation)
        running = []
        for choice in generation.choices:
            if self._choices.pop(choice.id, None) is not None:
                running.append(choice.id)
                self._remember(choice.id)
        if running:
            self._send(Cancel(tuple(running)))
        metrics = self.metrics
        metrics.set("streams_open", len(self.generations))
        if reason is not None:
            metrics.add("stream_cancelled_total", labels=(reason,))
        else:
            metrics.observe("e2e_seconds", generation.done_s - generation.started_s)
        metrics.add("prompt_tokens_total", generation.prompt_tokens)
        metrics.add("completion_tokens_total", generation.completion_tokens)

    # --- deadlines ---

    def sweep(self, now_s: float) -> None:
        """Look at the deadline of every wait; to be called several times a second."""
        self._failed = [generation for generation in self._failed if not generation.left]
        for generation in self._failed:
            if self._is_stuck(generation, now_s) and generation.abort is not None:
                generation.cancelled = "slow_reader"
                generation.abort()
        for generation in list(self.generations.values()):
            self._look_at(generation, now_s)

    def _is_stuck(self, generation: Generation, now_s: float) -> bool:
        """Whether a write has waited too long for its client to read."""
        since_s = generation.writing_s
        return since_s is not None and now_s - since_s > self.write_timeout_s

    def _look_at(self, generation: Generation, now_s: float) -> None:
        """Every wait of a generation, and the deadline of each."""
        if self._is_stuck(generation, now_s):
            self._slow(generation)
        elif generation.live == 0:
            return  # Complete; only its last write is left.
        elif now_s > generation.deadline_s + DEADLINE_GRACE_S:
            generation.fail(DeadlineExceeded("the request's deadline passed"), "deadline")
        elif self._link is None:
            if now_s - self._lost_s > self.resume_timeout_s:
                generation.fail(not_ready(self.detail), "core_lost")
            elif now_s > generation.deadline_s:
                generation.fail(DeadlineExceeded("the request's deadline passed"), "deadline")
        elif not generation.accepted and now_s - generation.sent_s > self.accept_timeout_s:
            message = f"the core did not answer in {self.accept_timeout_s:g} s"
            generation.fail(not_ready(message), "core_lost")
        if not generation.released and now_s - generation.silent_s > self.keepalive_s:
            generation.wake()

    def _slow(self, generation: Generation) -> None:
        """Its client does not read: give up its pages, and break the write that waits."""
        abort = generation.abort
        generation.cancel("slow_reader")
        if abort is not None:
            abort()


_NONE: list = []
