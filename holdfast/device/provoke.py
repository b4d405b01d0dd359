"""Provocations: how a worker breaks itself on a drill's order. Exists only with `--drills`.

Each kind is the real thing: a signal or a driver error that no Python handler turns into something
milder, a loop that never ends, bytes that are wrong. On a CPU faults are signals (an address that
is not mapped, an instruction that does not exist); on a CUDA device they are kernels
(device.provoke_cuda); what breaks the ground that graphs stand on is device.provoke_graphs'. Knows
rows and pages because it must hit the right ones; nothing of drills.

An order: kind (KINDS), phase (PHASES: in a step of that kind, or at that point of a worker's life),
after (matching moments to let pass), tokens (only steps with a row whose tokens begin so; that row
is the victim), then (the fault that follows before anything leaves the worker). Told to `before`
and `after` of every step, it fires once and is over, unless it is `lasting`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.device import provoke_graphs
from holdfast.device.runner import Runner
from holdfast.errors import LinkError
from holdfast.wire.plan import StepPlan

FAULTS = ("address", "instruction", "assert", "misaligned", "dma", "spin")
BYTES = ("corrupt-page", "plant-page", "nan")
KINDS = (*FAULTS, *BYTES, "zombie", "unfenced-writer", *provoke_graphs.KINDS)
STEP_PHASES = ("prefill", "decode", "any")
PHASES = (*STEP_PHASES, "verify", "capture")
ORDERS_MAX = 16
# A page is sealed within four steps of decode after its last token (core/commit), two of them may
# be in flight; a prompt's pages at once.
_SEALED_AFTER_TOKENS = 8
# What goes on writing after its process was told to end: longer than any fence on a CPU.
_WRITER_S = 3.0
# What no fence covers writes on until its server is gone, and at most so long.
_UNFENCED_S = 60.0
_UNFENCED_PAUSE_S = 0.005
_PROT_NONE = 0
# A planted page: factor, and bound of what comes of it.
_PLANT_GAIN, _PLANT_MAX = 8.0, 1e4

Say = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Order:
    kind: str
    phase: str
    after: int = 0
    tokens: tuple[int, ...] = ()
    lasting: bool = False
    then: str = ""

    @property
    def late(self) -> bool:
        """It needs to know rows, which only the end of a step does."""
        return bool(self.tokens) or self.kind in BYTES or self.kind in provoke_graphs.LATE


class Provocations:
    """`say` sends a control message; `hang_up` closes the worker's channels."""

    def __init__(self, device: str, say: Say, hang_up: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._say = say
        self._hang_up = hang_up
        self._orders: list[Order] = []
        self._gpu: Any = None
        self._graphs = provoke_graphs.GraphProvocations(say)

    def take(self, message: dict[str, Any]) -> None:
        """Arm an order. Raises LinkError on one that makes no sense."""
        facts = {name: value for name, value in message.items() if name not in _ENVELOPE}
        try:
            order = Order(**{**facts, "tokens": tuple(facts.get("tokens", ()))})
        except TypeError as error:
            raise LinkError(f"provoke: {error}") from error
        known = order.kind in KINDS and order.phase in PHASES
        if not known or order.then not in ("", *FAULTS):
            raise LinkError(f"provoke: no {order.kind!r} in phase {order.phase!r}")
        if len(self._orders) >= ORDERS_MAX:
            raise LinkError(f"provoke: {ORDERS_MAX} orders are armed already")
        self._orders.append(order)

    def at(self, phase: str) -> None:
        """A point of the worker's life that is no step."""
        if phase == "capture" and self._device != "cpu":
            from holdfast.device.provoke_cuda import Provoker

            # Now, and not when it is to fault: a compiler is not what a drill times.
            self._gpu = Provoker()
        for order in list(self._orders):
            if order.phase == phase and self._due(order):
                self._fault(order.kind)

    def before(self, runner: Runner, plan: StepPlan) -> None:
        """A step begins: its deltas are not applied yet, so this is for what needs no row."""
        for order in list(self._orders):
            if not order.late and plan.rows.size and _is(plan, order.phase):
                self._fire(order, runner, plan)
        self._graphs.before(runner, plan)

    def after(self, runner: Runner, plan: StepPlan) -> None:
        """A step is over: its pages are written and not yet sealed, its result not yet sent."""
        for order in list(self._orders):
            if not order.late or not plan.rows.size or not _is(plan, order.phase):
                continue
            if self._row(order, runner, plan) is not None:
                self._fire(order, runner, plan)
        self._graphs.after(runner, plan)

    def _fire(self, order: Order, runner: Runner, plan: StepPlan) -> None:
        if order.kind in FAULTS:
            if self._due(order):
                self._fault(order.kind)
        elif order.kind in BYTES:
            page = _PAGES[order.kind](runner, plan, self._row(order, runner, plan))
            if page is not None and self._due(order):
                _WRITES[order.kind](runner, page)
                if order.then:
                    self._fault(order.then)
        elif order.kind in provoke_graphs.KINDS:
            if self._due(order):
                self._graphs.fire(order.kind, runner, plan)
        elif self._due(order):
            self._write_on(runner, fenced=order.kind == "zombie")

    def _due(self, order: Order) -> bool:
        """Whether it happens now; says so first."""
        if order.after > 0:
            order.after -= 1
            return False
        if not order.lasting:
            self._orders.remove(order)
        self._say({"type": "provoked", "kind": order.kind, "at_s": time.monotonic()})
        return True

    def _row(self, order: Order, runner: Runner, plan: StepPlan) -> int | None:
        """The first row of the plan whose tokens begin as the order says; any row if it does not
        say."""
        table, marker = runner.rows.table, np.array(order.tokens, np.int32)
        for row in plan.rows:
            if np.array_equal(table.tokens[row, : marker.size], marker):
                return int(row)
        return None

    def _fault(self, kind: str) -> None:
        if self._gpu is not None:
            self._gpu.fault(kind)
        elif kind == "spin":
            while True:
                pass
        else:
            _CPU_FAULTS[kind]()

    def _write_on(self, runner: Runner, *, fenced: bool) -> None:
        """Write into every page but the trash page for as long as it can, and look dead.

        fenced: from a thread, which the death of this process ends. Else from a process of its own,
        which nobody fences: what the engine does not promise to survive.
        """
        words = runner.memory.page_words[1:]
        started_s, supervisor = time.monotonic(), os.getppid()

        def write_words() -> None:
            while time.monotonic() < started_s + _WRITER_S:
                words.fill_(0x3F3F3F3F)  # 0.747 in float32 and bfloat16: wrong and finite

        def write() -> None:
            # In a forked process nothing of a tensor library is safe.
            address, size = words.data_ptr(), words.numel() * words.element_size()
            while time.monotonic() < started_s + _UNFENCED_S and _alive(supervisor):
                ctypes.memset(address, 0x3F, size)
                time.sleep(_UNFENCED_PAUSE_S)

        if fenced:
            threading.Thread(target=write_words, daemon=True).start()
        else:
            _in_a_child(write)
        self._hang_up()
        time.sleep(_WRITER_S)
        os._exit(1)


_ENVELOPE = ("type", "fd_count")


def _is(plan: StepPlan, phase: str) -> bool:
    """Whether some row of the plan is in that phase."""
    chunk = (plan.query_lens > 1) | (plan.samples == 0)
    return {"any": True, "prefill": bool(chunk.any()), "decode": bool((~chunk).any())}.get(
        phase, False
    )


def _sealed_page(runner: Runner, plan: StepPlan, row: int | None) -> int | None:
    """The first page of a row that draws since some steps: one that was sealed long ago."""
    table = runner.rows.table
    for each in [row] if row is not None else plan.rows:
        drawn = int(table.length[each]) - int(table.records["prompt_len"][each])
        full = int(table.records["prompt_len"][each]) >= runner.limits.page_tokens
        if full and drawn >= _SEALED_AFTER_TOKENS:
            return int(table.page_table[0, each, 0])
    return None


def _written_pages(runner: Runner, plan: StepPlan, row: int | None) -> list[int] | None:
    """The pages that the row's query tokens of this step went to: not sealed yet."""
    if row is None:
        return None
    table, tokens = runner.rows.table, runner.limits.page_tokens
    count = int(plan.query_lens[plan.rows == row][0])
    end = int(table.length[row])  # The step has advanced it.
    first, last = (end - count) // tokens, (end - 1) // tokens
    return [int(page) for page in table.page_table[0, row, first : last + 1]]


def _open_slot(runner: Runner, plan: StepPlan, row: int | None) -> tuple[int, int] | None:
    """(page, slot) of the last token of a row that draws, in a page that is not full."""
    table, tokens = runner.rows.table, runner.limits.page_tokens
    for each in [row] if row is not None else plan.rows:
        length = int(table.length[each])
        if length > int(table.records["prompt_len"][each]) and length % tokens:
            page = int(table.page_table[0, each, length // tokens])
            return page, length % tokens - 1
    return None


def _corrupt(runner: Runner, page: int) -> None:
    """One word of a sealed page, as a bit that flipped: its sign."""
    runner.memory.page_words[page, 0] ^= -(1 << 31)


def _plant(runner: Runner, pages: list[int]) -> None:
    """Whole pages of other content, before anybody has summed them."""
    runner.memory.pool[pages] = spoiled(runner.memory.pool[pages])


def spoiled(values: torch.Tensor) -> torch.Tensor:
    """Keys and values that no token of a row behind them survives: the wrong way round, and so loud
    that attention looks at nothing else. Finite, however often it is done. (Signs alone left 0 to 6
    of 47 tokens wrong, since a model goes on from what it has just said; these leave all 47.)"""
    return (values * -_PLANT_GAIN).clamp(-_PLANT_MAX, _PLANT_MAX)


def _poison(runner: Runner, slot: tuple[int, int]) -> None:
    page, at = slot
    runner.memory.pool[page, :, :, at] = float("nan")


_PAGES: dict[str, Callable] = {
    "corrupt-page": _sealed_page,
    "plant-page": _written_pages,
    "nan": _open_slot,
}
_WRITES: dict[str, Callable] = {"corrupt-page": _corrupt, "plant-page": _plant, "nan": _poison}


# --- faults of a CPU: signals, as the kernel sends them ---


def _bad_address() -> None:
    ctypes.memset(0, 1, 1)


def _bad_instruction() -> None:
    """Run bytes that are no instruction: ud2 on x86-64, a zero word on arm64."""
    code = b"\x0f\x0b" if os.uname().machine in ("x86_64", "AMD64") else b"\0\0\0\0"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def _bus_error() -> None:
    """Touch a page of a mapping behind the end of its file, as a slab that was cut off."""
    fd = os.memfd_create("holdfast-drill")
    os.ftruncate(fd, mmap.PAGESIZE)
    mapped = mmap.mmap(fd, mmap.PAGESIZE)
    os.ftruncate(fd, 0)
    mapped[0] = 1


def _bad_copy() -> None:
    """Copy into memory that may not be touched."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    target = libc.mmap(None, mmap.PAGESIZE, _PROT_NONE, flags, -1, 0)
    ctypes.memmove(target, b"x" * 64, 64)


_CPU_FAULTS: dict[str, Callable[[], None]] = {
    "address": _bad_address,
    "instruction": _bad_instruction,
    "assert": lambda: signal.raise_signal(signal.SIGABRT),
    "misaligned": _bus_error,
    "dma": _bad_copy,
}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _in_a_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked process that shares our memory and none of our descriptors."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        # The parent is fenced without it: PR_SET_PDEATHSIG is not inherited by a fork.
        os.dup2(theirs, 3)
        os.closerange(4, 1 << 16)
        os.write(3, b"x")
        os.close(3)
        work()
        os._exit(0)
    os.close(theirs)
    os.read(ours, 1)
