"""CoreClient: the asyncio end of an api process's link to the core.

Owns the link, the request ids (api index << 48 | counter, the counter starting at the clock so that
a restarted process never reuses one), and every Generation until it is released. Invariants: each
token index of a choice is delivered once and in order (a repeated one is dropped, a gap fails the
request); every wait has a deadline, kept by one sweep several times a second; buffers are bounded.

When the core dies the generations stay, and what is known of them is resumed over the next link:
what was not accepted is submitted again under the same ids, what was is asked for from the next
index on; a request that the new core has forgotten is submitted with its tokens as part of the
prompt. Called by api.stream and proc.api on one event loop; knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict

import msgspec

from holdfast.api.generation import Choice, Generation, Token, error_of
from holdfast.api.schema import Resolved
from holdfast.config import Limits
from holdfast.core.metrics import Metrics
from holdfast.errors import (
    DeadlineExceeded,
    EngineFault,
    InvalidField,
    LinkError,
    NotReady,
    QueueFull,
    RequestError,
)
from holdfast.wire.link import Kind, Link
from holdfast.wire.messages import (
    Accepted,
    Cancel,
    End,
    Ended,
    Finish,
    Refused,
    Resume,
    State,
    Submit,
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
# Requests in one Resume; a bounded message, whatever the number of streams.
RESUME_IDS_MAX = 4096
RETRY_AFTER_S = 2.0


class CoreClient:
    """`index`: of this api process. To be made on the event loop that it will serve."""

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        *,
        index: int = 0,
        accept_timeout_s: float = 10.0,
        resume_timeout_s: float = 60.0,
        write_timeout_s: float = 30.0,
        keepalive_s: float = 15.0,
        buffer_tokens: int = 1024,
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
        self._buffer_tokens = buffer_tokens
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._lost_s = time.monotonic()
        self._writing = False
        self._next_id = (index << 48) | (time.time_ns() // 1000 & 0x3FFF_FFFF_FFFF)
        self._choices: dict[int, Choice] = {}
        # In order of arrival. Bounded by the core's queue: what it did not accept is refused.
        self._generations: dict[int, Generation] = {}
        self._recent: OrderedDict[int, None] = OrderedDict()
        shortest = min(accept_timeout_s, write_timeout_s, keepalive_s, resume_timeout_s)
        self._sweep_s = min(0.25, shortest / 4)
        self._sweeper: asyncio.TimerHandle | None = self._loop.call_later(
            self._sweep_s, self._sweep
        )
        metrics.set("streams_open", 0)

    @property
    def open(self) -> int:
        """Generations not released."""
        return len(self._generations)

    # --- for requests ---

    async def submit(self, prompt: bytes, resolved: Resolved, tenant: str = "") -> Generation:
        """Admit one prompt (int32 ids as bytes) with all its choices.

        Returns once the core has accepted it; its reader must `close` it. Raises RequestError:
        what the core refused it with, NotReady when there is no core or it does not answer.
        """
        generation = self.start(prompt, resolved, tenant)
        try:
            await generation.accept()
        except BaseException:
            generation.close()
            raise
        return generation

    def start(self, prompt: bytes, resolved: Resolved, tenant: str = "") -> Generation:
        """As `submit`, but returns before the core has answered: `Generation.accept` waits."""
        if self.draining:
            raise _not_ready("the server is shutting down")
        if self._link is None:
            raise _not_ready(self.detail)
        if len(self._generations) >= self.limits.live_requests:
            # The core's bound, kept here too: between two answers of the core, nothing else does.
            raise QueueFull(
                f"{len(self._generations)} requests are open here", retry_after_s=RETRY_AFTER_S
            )
        ids = [self._next_id + choice for choice in range(resolved.choices)]
        self._next_id += len(ids)
        generation = Generation(
            prompt,
            resolved,
            tenant,
            ids,
            now_s=time.monotonic(),
            release=self._release,
            finish=self._finish,
            buffer_tokens=self._buffer_tokens,
            loop=self._loop,
        )
        self._generations[ids[0]] = generation
        for choice in generation.choices:
            self._choices[choice.id] = choice
        self.metrics.set("streams_open", len(self._generations))
        self._submit(generation)
        return generation

    def drain(self) -> None:
        """Refuse new requests; what is open goes on."""
        self.draining = True
        self.ready = False
        self.detail = "the server is shutting down"

    def close(self) -> None:
        """The process ends: every generation fails, the link closes, no timer is left."""
        error = _not_ready("the server is shutting down")
        for generation in list(self._generations.values()):
            generation.fail(error, "shutdown")
        self._unlink()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    # --- the link ---

    def set_link(self, link: Link) -> None:
        """A link to a core, the first one or a new core's: resume over it what is open."""
        self._unlink()
        self._link = link
        self._recent.clear()
        self._loop.add_reader(link.fileno(), self._readable)
        # Ready once the core says so.
        self.ready, self.detail = False, "the core has not said that it can step"
        pairs = []
        for generation in list(self._generations.values()):
            if not generation.accepted:
                self._submit(generation)
                continue
            for choice in generation.choices:
                if not choice.ended:
                    choice.resuming = True
                    pairs.append((choice.id, len(choice.seen) - choice.base))
        for at in range(0, len(pairs), RESUME_IDS_MAX):
            self._send(Resume(tuple(pairs[at : at + RESUME_IDS_MAX])))

    def lose_link(self, detail: str) -> None:
        """The core is gone: hold what is open until `set_link`, refuse what comes."""
        if self._link is None:
            return
        self._unlink()
        self._lost_s = time.monotonic()
        self.ready, self.detail = False, f"the core is being replaced: {detail}"
        log.warning("lost the core: %s; %d requests wait for it", detail, len(self._generations))

    def _unlink(self) -> None:
        if self._link is None:
            return
        fd = self._link.fileno()
        self._loop.remove_reader(fd)
        if self._writing:
            self._loop.remove_writer(fd)
            self._writing = False
        self._link.close()
        self._link = None

    def _send(self, message: ToCore) -> None:
        link = self._link
        if link is None:
            return  # Said again, or not needed any more, once there is a link.
        try:
            link.send(Kind.MESSAGE, encode(message))
        except LinkError as error:
            self.lose_link(str(error))
            return
        if link.unsent_bytes and not self._writing:
            self._writing = True
            self._loop.add_writer(link.fileno(), self._writable)

    def _writable(self) -> None:
        assert self._link is not None, "writable without a link"
        try:
            if self._link.flush():
                self._loop.remove_writer(self._link.fileno())
                self._writing = False
        except LinkError as error:
            self.lose_link(str(error))

    def _readable(self) -> None:
        assert self._link is not None, "readable without a link"
        link = self._link
        try:
            for kind, payload in link.drain():
                if kind == Kind.TOKENS:
                    self._tokens(TokenBatch.decode(payload))
                elif kind == Kind.MESSAGE:
                    self._message(decode_to_api(payload))
                else:
                    raise LinkError(f"frame of kind {kind} from the core")
                if self._link is not link:
                    return  # Answering one of them broke the link.
        except (LinkError, msgspec.DecodeError) as error:
            self.lose_link(str(error))

    # --- what the core says ---

    def _tokens(self, batch: TokenBatch) -> None:
        now_s = time.monotonic()
        requests, indexes = batch.requests.tolist(), batch.indexes.tolist()
        tokens, ends = batch.tokens.tolist(), batch.ends.tolist()
        cached = batch.cached.tolist()
        logprobs = batch.logprobs.tolist()
        top_k, top_ids, top_logprobs = batch.top_k, [], []
        if top_k:
            top_ids = batch.top_ids.reshape(-1, top_k).tolist()
            top_logprobs = batch.top_logprobs.reshape(-1, top_k).tolist()
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
            self._deliver(choice, event, cached[at], now_s)

    def _deliver(self, choice: Choice, event: Token, cached: int, now_s: float) -> None:
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
        if not generation.feed(event):
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
        log.error("request %#x: %s", choice.id, message)
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

    def _message(self, message: ToApi) -> None:
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
            self._refused(message)
        else:
            self._ended(message)

    def _refused(self, message: Refused) -> None:
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
                choice.generation.fail(_refusal(message), "refused")

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

    def _submit(self, generation: Generation) -> None:
        now_s = time.monotonic()
        generation.sent_s = now_s
        resolved = generation.resolved
        self._send(
            Submit(
                ids=tuple(choice.id for choice in generation.choices),
                prompt=generation.prompt,
                seeds=resolved.seeds,
                max_tokens=resolved.max_tokens,
                sampling=resolved.sampling,
                timeout_s=max(0.001, generation.deadline_s - now_s),
                tenant=generation.tenant,
                priority=resolved.priority,
            )
        )

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
        self._send(
            Submit(
                ids=(choice.id,),
                prompt=generation.prompt + choice.seen.tobytes(),
                seeds=(resolved.seeds[choice.index],),
                max_tokens=resolved.max_tokens - seen,
                sampling=msgspec.structs.replace(
                    sampling, min_tokens=max(0, sampling.min_tokens - seen)
                ),
                timeout_s=max(0.001, generation.deadline_s - time.monotonic()),
                tenant=generation.tenant,
                priority=resolved.priority,
            )
        )

    def _finish(self, choice: Choice) -> None:
        """A stop string ended the choice: the core commits that end."""
        self._choices.pop(choice.id, None)
        self._remember(choice.id)
        self._send(Finish(choice.id, len(choice.seen) - choice.base))

    def _release(self, generation: Generation, reason: str | None) -> None:
        """The generation is over; with a reason, what still runs of it is cancelled."""
        assert not generation.released, "a generation was released twice"
        generation.released = True
        del self._generations[generation.choices[0].id]
        running = []
        for choice in generation.choices:
            if self._choices.pop(choice.id, None) is not None:
                running.append(choice.id)
                self._remember(choice.id)
        if running:
            self._send(Cancel(tuple(running)))
        metrics = self.metrics
        metrics.set("streams_open", len(self._generations))
        if reason is not None:
            metrics.add("stream_cancelled_total", labels=(reason,))
        else:
            metrics.observe("e2e_seconds", time.monotonic() - generation.started_s)
        metrics.add("prompt_tokens_total", generation.prompt_tokens)
        metrics.add("completion_tokens_total", generation.completion_tokens)

    # --- deadlines ---

    def _sweep(self) -> None:
        now_s = time.monotonic()
        for generation in list(self._generations.values()):
            self._look_at(generation, now_s)
        self._sweeper = self._loop.call_later(self._sweep_s, self._sweep)

    def _look_at(self, generation: Generation, now_s: float) -> None:
        """Every wait of a generation, and the deadline of each."""
        waited = None if generation.writing_s is None else now_s - generation.writing_s
        if waited is not None and waited > self.write_timeout_s:
            self._slow(generation)
        elif generation.live == 0:
            return  # Complete; only its last write is left.
        elif now_s > generation.deadline_s + DEADLINE_GRACE_S:
            generation.fail(DeadlineExceeded("the request's deadline passed"), "deadline")
        elif self._link is None:
            if now_s - self._lost_s > self.resume_timeout_s:
                generation.fail(_not_ready(self.detail), "core_lost")
            elif now_s > generation.deadline_s:
                generation.fail(DeadlineExceeded("the request's deadline passed"), "deadline")
        elif not generation.accepted and now_s - generation.sent_s > self.accept_timeout_s:
            message = f"the core did not answer in {self.accept_timeout_s:g} s"
            generation.fail(_not_ready(message), "core_lost")
        if now_s - generation.silent_s > self.keepalive_s:
            generation.wake()

    def _slow(self, generation: Generation) -> None:
        """Its client does not read: give up its pages, and break the write that waits."""
        abort = generation.abort
        generation.cancel("slow_reader")
        if abort is not None:
            abort()


_NONE: list = []


def _not_ready(message: str) -> NotReady:
    error = NotReady(message, code="not_ready")
    error.retry_after_s = RETRY_AFTER_S
    return error


def _refusal(message: Refused) -> RequestError:
    """The core's refusal as the error that its client gets."""
    if message.status == 429:
        return QueueFull(message.message, message.retry_after_s or 1.0)
    if message.status == 504:
        return DeadlineExceeded(message.message)
    if message.status == 503:
        error = NotReady(message.message, code=message.code or "not_ready")
        error.retry_after_s = message.retry_after_s or RETRY_AFTER_S
        return error
    if message.status == 400:
        return InvalidField(message.field or "body", message.message, code=message.code)
    return EngineFault(message.message, code=message.code or "engine_fault")
