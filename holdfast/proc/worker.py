"""The worker: the one process that launches kernels. Disposable; nothing it holds is worth saving.

It maps the keeper's memory (or makes its own, where a GPU's cannot be shared), loads the weights
when the slab is empty, warms up, and waits without an epoch: a standby waits long, a first worker
not at all. Told to verify, it sums the weights;
whether the sum is right is the keeper's to say (the supervisor asks it). Promoted, it has an epoch
and the core's link, and answers plans with results until it is told to stop or loses its core. Any
error in a step ends the process: an epoch is never continued after a fault, it is replaced.

Invariants: without an epoch it writes no page but the trash page, and no weights unless it was told
to load them; on a GPU weights are mapped read-only, from the moment they are loaded. After an error
on a GPU it says its word and ends at once, by no destructor: what is queued there still runs.
Started by the supervisor through proc.child. It must not know requests, texts, or other workers.
Torch is imported after `boot`, so that the process is tied to its parent's life from the start.

    boot -> import -> map -> load -> warm up -> ready -> verify -> promote -> (plan -> result)*
                                                          -> stop, core gone: 0; fault: 70

Where the device computes by itself (graphs on a GPU), the next plan is launched before the result
of the last one is there, and results leave in the order of their plans.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import select
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import setproctitle

from holdfast.cuda_driver import Driver, parse_device
from holdfast.errors import LinkClosed, LinkError, OperatorError
from holdfast.proc.background import (
    LOOK_S,
    PATIENCE_S,
    Background,
    leave_background,
)
from holdfast.proc.child import EXIT_FAULT, EXIT_OPERATOR, Boot, boot, start_again
from holdfast.proc.control import Control, Message
from holdfast.proc.cuda_memory import Mapping
from holdfast.proc.lifecycle.slot import title
from holdfast.proc.pace import HURRY, Pace
from holdfast.wire.link import Kind, Link
from holdfast.wire.plan import StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from holdfast.device.memory import DeviceMemory
    from holdfast.device.provoke import Provocations
    from holdfast.device.runner import Runner
    from holdfast.device.scrub import WeightsScrub
    from holdfast.model.spec import ModelSpec
    from holdfast.model.weights import WeightsLayout

# Between two progress messages: at most ten a second.
PROGRESS_S = 0.1
# Between two tellings of what graphs did: the counters are for people.
TELL_S = 1.0
# One sleep at most, so that a missed wake-up costs a second and not the worker.
WAIT_S = 1.0
# How long results that were computed may take to leave after "stop".
STOP_FLUSH_S = 1.0
# Of the traceback in a fault message; the innermost frames come last and are kept.
TRACEBACK_CHARS = 16_000


class Stopped(Exception):
    """The supervisor said stop; not an error."""


class Progress:
    """Reports what is done to the supervisor; hears: and hears a stop meanwhile. Who prepares to
    take a worker's place is told more than that, by who waits for it, and does not hear."""

    def __init__(self, control: Control, what: str, *, hears: bool = True) -> None:
        self._control = control
        self._what = what
        self._hears = hears
        self._next_s = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s and done < total:
            return
        self._next_s = now_s + PROGRESS_S
        self._control.progress(self._what, done, total)
        if self._hears:
            for message, _ in self._control.receive():
                raise _stop(message)


class Worker:
    """A device behind two channels: plans come over `link`, a stop over `control`. scrub: reads the
    weights again between steps; None: nobody does."""

    def __init__(
        self,
        runner: Runner,
        control: Control,
        link: Link,
        scrub: WeightsScrub | None = None,
        provocations: Provocations | None = None,
    ) -> None:
        self._runner = runner
        self._control = control
        self._link = link
        self._provocations = provocations
        self._scrub = scrub
        self._pass_step = runner.step
        self._compiles_told = runner.stats.compiles
        self._steps_told: dict[str, dict[str, int]] = {"graph": {}, "mixed": {}, "eager": {}}
        self._tell_s = 0.0
        # A drill breaks a step when it is over, and reads rows as that step has left them.
        self._ahead = runner.in_flight_max if provocations is None else 1

    def run(self) -> None:
        """Answer plans. Raises Stopped when told to, LinkClosed when core or supervisor is gone,
        and whatever a step raises."""
        poller = select.poll()
        while True:
            for channel in (self._control, self._link):
                wanted = select.POLLOUT if channel.unsent_bytes else 0
                poller.register(channel.fileno(), select.POLLIN | wanted)
            ready = dict(poller.poll(self._wait_s() * 1000))
            if self._control.fileno() in ready:
                self._control.flush()
                self._obey()
            if self._link.fileno() in ready:
                self._link.flush()
                for kind, payload in self._link.drain():
                    self._step(kind, payload)
            while self._runner.in_flight and self._runner.ready:
                self._answer()
            self._tell()
            if not self._runner.in_flight:
                self._read_weights()

    def _wait_s(self) -> float:
        """Until there is something to do without being told."""
        if self._runner.in_flight:
            # What a GPU is done with does not wake a poll, and a millisecond is a step.
            return 0.0
        if self._scrub is None:
            return WAIT_S
        return min(WAIT_S, self._scrub.due_s(time.monotonic()))

    def _obey(self) -> None:
        """What the supervisor has said. Raises Stopped, or LinkError when it makes no sense."""
        for message, _ in self._control.receive():
            if self._provocations is None or message["type"] not in ("provoke", "tell"):
                raise _stop(message)
            if message["type"] == "provoke":
                self._provocations.take(message)
                continue
            self._tell(now=True)
            self._control.send(_told())

    def _read_weights(self) -> None:
        """A slice of them, when one is due; the keeper judges the sum of all."""
        now_s = time.monotonic()
        if self._scrub is None or self._scrub.due_s(now_s) > 0:
            return
        weights_sum = self._scrub.read(now_s)
        if weights_sum is not None:
            # What the pass says is true of the time before it began.
            began, self._pass_step = self._pass_step, self._runner.step
            self._control.send({"type": "weights_sum", "sum": weights_sum, "step": began})

    def flush(self) -> None:
        """Give the core what was computed, and what soon will be. Raises LinkError when it does not
        take it in time."""
        end_s = time.monotonic() + STOP_FLUSH_S
        while self._runner.in_flight and time.monotonic() < end_s:
            if self._runner.ready:
                self._answer()
        self._tell(now=True)
        self._link.flush_until(STOP_FLUSH_S)

    def _step(self, kind: int, payload: bytes) -> None:
        if kind != Kind.PLAN:
            raise LinkError(f"frame of kind {kind} from the core")
        plan, provocations = StepPlan.decode(payload), self._provocations
        while self._runner.in_flight >= self._ahead:
            self._answer()
        if provocations is not None:
            provocations.before(self._runner, plan)
        self._runner.launch(plan)
        if provocations is not None or self._runner.ready:
            self._answer(plan)

    def _answer(self, plan: StepPlan | None = None) -> None:
        """Send the oldest result, waiting for it; plan: whose it is, for drills."""
        result = self._runner.collect()
        if self._provocations is not None and plan is not None:
            self._provocations.after(self._runner, plan)
        self._link.send(Kind.RESULT, result.encode())

    def _tell(self, *, now: bool = False) -> None:
        """Say what the supervisor counts: compilations at once, what graphs did once a second, when
        a reason is new, before the end and when a drill asks."""
        stats = self._runner.stats
        if stats.compiles != self._compiles_told:
            count, self._compiles_told = stats.compiles - self._compiles_told, stats.compiles
            self._control.send({"type": "compiled", "count": count, "what": stats.compiled_last})
        now_s, told = time.monotonic(), self._steps_told
        if not now and now_s < self._tell_s and stats.eager_steps.keys() == told["eager"].keys():
            return
        self._tell_s = now_s + TELL_S
        steps = {
            "graph": dict(stats.graph_steps),
            "mixed": dict(stats.mixed_steps),
            "eager": dict(stats.eager_steps),
        }
        if steps == told:
            return
        self._steps_told = steps
        new = {
            kind: {name: count - told[kind].get(name, 0) for name, count in counts.items()}
            for kind, counts in steps.items()
        }
        self._control.send({"type": "steps", **new})


def _told() -> Message:
    return {"type": "provoked", "kind": "told", "at_s": time.monotonic()}


def _stop(message: Message) -> Exception:
    if message["type"] == "stop":
        return Stopped()
    return LinkError(f"control message {message['type']!r} from the supervisor")


def wait_for_epoch(
    memory: DeviceMemory, control: Control, provocations: Provocations | None = None
) -> tuple[int, Link]:
    """Sum the weights whenever asked, until promoted: the epoch, and the link to its core.

    Raises Stopped when told to, LinkClosed when the supervisor is gone.
    """
    from holdfast.ops.checksum import slab_sum

    while True:
        control.flush()
        received = control.wait(WAIT_S)
        if received is None:
            continue
        message, fds = received
        if message["type"] in ("hurry", "unwatched"):
            continue  # It was prepared already.
        if message["type"] == "provoke" and provocations is not None:
            provocations.take(message)
        elif message["type"] == "tell" and provocations is not None:
            control.send(_told())  # No step of it yet.
        elif message["type"] == "verify":
            if provocations is not None:
                provocations.at("verify")
            weights_sum = slab_sum(memory.weights, Progress(control, "weights check"))
            control.send({"type": "weights_sum", "sum": weights_sum})
        elif message["type"] == "ping":
            control.send({"type": "pong"})
        elif message["type"] == "promote" and len(fds) == 1:
            return message["epoch"], Link(socket.socket(fileno=fds[0]), epoch=message["epoch"])
        else:
            raise _stop(message)


def main() -> int:
    start = boot()
    control = start.control()
    try:
        return _work(start, control)
    except Stopped:
        return 0
    except LinkClosed:
        # The core is gone, or the supervisor, whose death kills us anyway: nobody to tell.
        return 0
    except OperatorError as error:
        with contextlib.suppress(LinkError):
            control.fault(error)
        return EXIT_OPERATOR
    except Exception as error:
        _report(control, error)
        if start.config["device"] != "cpu":
            # Destructors of a broken context wait for what never ends. The message has left.
            os._exit(EXIT_FAULT)
        return EXIT_FAULT


def _work(start: Boot, control: Control) -> int:
    from holdfast.model.spec import ModelSpec

    config = start.config
    parse_device(config["device"])
    spec = ModelSpec.load(config["model"])

    provocations = _provocations(start, control)
    # Only now is torch imported: what the operator can mend is said before the seconds it takes.
    if unnoticed(start) and config["device"] == "cpu":
        runner, facts = prepare_in_background(start, spec, control, provocations)
    else:
        captured = Progress(control, "graphs", hears=False)
        rest = make_pace(start, control, provocations)
        runner, facts = prepare(start, spec, control, provocations, captured, rest)
    import torch

    # Here, since this thread will serve; OMP_NUM_THREADS says the same to one that prepares. The
    # first call makes threads, and in the background they would stay there.
    torch.set_num_threads(config["threads"])
    # What is alive now stays alive; collections in the loop then have little to walk.
    gc.collect()
    gc.freeze()
    runner.mark_ready()
    control.ready(torch=str(torch.__version__), threads=torch.get_num_threads(), **facts)
    epoch, link = wait_for_epoch(runner.memory, control, provocations)
    runner.reset(epoch)
    setproctitle.setproctitle(title("worker", start.index))
    scrub = make_scrub(runner.memory, config["scrub_gbps"])
    worker = Worker(runner, control, link, scrub, provocations)
    try:
        worker.run()
    except Stopped:
        # A core that takes no results any more is no reason to end otherwise than told.
        with contextlib.suppress(LinkError):
            worker.flush()
    return 0


def _provocations(start: Boot, control: Control) -> Provocations | None:
    """What a drill may order of this worker; None unless the server was started with --drills."""
    if not start.config.get("drills"):
        return None
    from holdfast.device.provoke import Provocations

    provocations = Provocations(start.config["device"], control.send, control.sock.close)
    if order := start.config.get("provoke"):
        provocations.take(order)
    return provocations


def prepare_in_background(
    start: Boot, spec: ModelSpec, control: Control, provocations: Provocations | None = None
) -> tuple[Runner, dict[str, Any]]:
    """`prepare`, beside streams that are not to notice, until it is needed or long overdue.

    Raises Stopped when told to stop, LinkClosed when the supervisor is gone.
    """
    work = Background(lambda: prepare(start, spec, control, provocations))
    patient_until_s = time.monotonic() + PATIENCE_S
    hurried = False
    while not work.wait(LOOK_S):
        hurry = time.monotonic() > patient_until_s
        for message, _ in control.receive():
            hurry |= hurries(message, provocations)
        if hurry and not hurried:
            hurried = True
            if not leave_background():
                start_again(start, "holdfast.proc.worker")
    return work.result()


def unnoticed(start: Boot) -> bool:
    """Whether live streams are not to notice how this process prepares itself."""
    return start.role == "standby" and start.config["background"]


def make_pace(
    start: Boot, control: Control, provocations: Provocations | None = None
) -> Pace | None:
    """What gives a GPU back to live streams between two pieces of a warm-up; None where nobody is
    to be spared, or a CPU's scheduler does it."""
    if not unnoticed(start) or start.config["device"] == "cpu":
        return None
    return Pace(functools.partial(hear_of_streams, control, provocations), time.monotonic)


def hear_of_streams(control: Control, provocations: Provocations | None, timeout_s: float) -> float:
    """Until when this standby need not spare live streams (time.monotonic; pace.HURRY: it is needed
    now); waits up to `timeout_s` for such a word, and then it is 0. Raises as
    prepare_in_background does."""
    end_s = time.monotonic() + timeout_s
    while received := control.wait(max(0.0, end_s - time.monotonic())):
        message = received[0]
        if message["type"] == "unwatched":
            return message["until_s"]
        if hurries(message, provocations):
            return HURRY
    return 0.0


def hurries(message: Message, provocations: Provocations | None) -> bool:
    """What may be said to a standby that prepares itself: whether it was to hurry. Raises Stopped
    when it was to stop."""
    if message["type"] == "provoke" and provocations is not None:
        provocations.take(message)
        return False
    if message["type"] in ("hurry", "unwatched"):
        return message["type"] == "hurry"
    raise _stop(message)


def prepare(
    start: Boot,
    spec: ModelSpec,
    control: Control,
    provocations: Provocations | None = None,
    captured: Callable[[int, int], None] | None = None,
    rest: Callable[[], None] | None = None,
) -> tuple[Runner, dict[str, Any]]:
    """A warm runner over the keeper's memory, and what to tell of it. captured(done, total) counts
    graphs; None in a thread that may not speak. rest: called between two pieces of the warm-up."""
    from holdfast.device.build import build_engine
    from holdfast.device.cuda import open_device
    from holdfast.model.weights import WeightsLayout

    config = start.config
    device = open_device(config["device"])
    memory, seal_weights = attach(start, spec, device)
    started_s = time.monotonic()
    layout = WeightsLayout.of(spec, config["dtype"])
    if not config["loaded"]:
        load(spec, layout, memory, config, control)
        seal_weights()
    loaded_s = time.monotonic()
    runner = build_engine(
        spec,
        start.limits,
        layout.views(memory.weights),
        memory,
        kernels=config["kernels"],
        graphs=config["graphs"],
        epoch=0,
    )
    if provocations is not None:
        provocations.at("capture")
    runner.warm_up(captured, rest)
    facts = {
        "device": str(device),
        "weights_bytes": memory.weights.numel(),
        "load_s": loaded_s - started_s,
        "warm_s": time.monotonic() - loaded_s,
        "checksum_kernel": memory.checksum_kernel,
    }
    return runner, facts


def make_scrub(memory: DeviceMemory, gbps: float) -> WeightsScrub | None:
    """What reads the weights again, or None at rate 0."""
    from holdfast.device.scrub import WeightsScrub

    return WeightsScrub(memory.weights, gbps, time.monotonic()) if gbps else None


def attach(
    start: Boot, spec: ModelSpec, device: torch.device
) -> tuple[DeviceMemory, Callable[[], None]]:
    """The slabs, the keeper's where it has any; and what makes the weights read-only once loaded.

    Raises WorkerFault when they cannot be mapped, OptionError when there is no room.
    """
    from holdfast.device.memory import DeviceMemory

    config, limits = start.config, start.limits
    dtypes = {"dtype": config["dtype"], "pool_dtype": config["pool_dtype"]}
    if "weights" not in start.fds:
        return DeviceMemory.allocate(spec, limits, device=device, **dtypes), lambda: None
    if device.type == "cpu":
        fds = {"weights_fd": start.fds["weights"], "kv_fd": start.fds["pool"]}
        return DeviceMemory.attach(spec, limits, **fds, **dtypes), lambda: None
    import torch

    driver = Driver()
    pool_bytes = limits.pages * limits.page_tokens * spec.kv_token_bytes(config["pool_dtype"])
    weights, pool = (
        Mapping(driver, start.fds[name], size, device.index, write=write)
        for name, size, write in (
            ("weights", spec.weights_bytes(config["dtype"]), not config["loaded"]),
            ("pool", pool_bytes, True),
        )
    )

    def seal_weights() -> None:
        torch.cuda.synchronize(device)
        weights.protect()

    return DeviceMemory.over(spec, limits, weights, pool, device=device, **dtypes), seal_weights


def load(
    spec: ModelSpec,
    layout: WeightsLayout,
    memory: DeviceMemory,
    config: dict[str, Any],
    control: Control,
) -> None:
    """Fill the weights slab, from the model's folder or with numbers drawn from the seed."""
    from holdfast.model.weights import dummy_weights, load_weights

    if config["load"] == "dummy":
        dummy_weights(spec, memory.weights, layout, config["seed"])
    else:
        load_weights(spec, memory.weights, layout, Progress(control, "weights"))


def _report(control: Control, error: Exception) -> None:
    """Say what broke: in full on stderr, and to the supervisor, which shows one line of it."""
    text = traceback.format_exc()
    print(text, file=sys.stderr, flush=True)
    message = {
        "type": "fault",
        "operator": False,
        "message": str(error) or type(error).__name__,
        "kind": type(error).__name__,
        "at_s": time.monotonic(),
        "traceback": text[-TRACEBACK_CHARS:],
    }
    # A supervisor that is gone or does not read sees the exit code.
    with contextlib.suppress(LinkError):
        control.send(message)


if __name__ == "__main__":
    sys.exit(main())
