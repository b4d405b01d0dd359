"""Limits: every bound of the engine, and the relations between them, proved once at start.

Owned by whoever starts an engine (the supervisor, `LLM`, a bench, a test); read by all; changed by
nobody. A queue or buffer elsewhere asserts its own bound against these numbers and never re-derives
a relation that `Limits` has proved.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, fields

from holdfast.errors import OptionError

# (group, page, generation) handles hold the page in 24 bits (wire.plan).
PAGES_MAX = 1 << 24
# Draft tokens are counted in a byte (wire.plan); nobody's acceptance makes more worth their pages.
DRAFT_DEPTH_MAX = 32
_MAY_BE_ZERO = {
    "mixed_tokens",
    "draft_depth",
    "windows",
    "window_pages",
    "host_pages",
    "disk_pages",
}
# Upper bound on one journal record of an admission, besides its tokens: scalars, tenant, and the
# bias and stop lists at their limits (msgpack: at most 16 and 8 bytes an entry) are added below.
JOURNAL_RECORD_BYTES = 512
# Ended requests that the journal keeps, in units of all that can be live: one for the last ones of
# this core, three for those that a client has not asked for since the core was replaced.
ENDED_SHARES = 4
# How the model's layers are computed (model.layer_ops).
KERNELS = ("reference", "triton")
AUTO = "auto"
HOST_PLANNED = (
    "the reference plans attention on the host, and no graph can; leave --kernels reference out"
)


def check_kernels(kernels: str, device: str) -> None:
    """Raise OptionError("--kernels") for what is not in KERNELS, or cannot run on `device`."""
    if kernels not in KERNELS:
        raise OptionError("--kernels", f"one of {', '.join((AUTO, *KERNELS))}, got {kernels!r}")
    if kernels == "reference":
        return
    if importlib.util.find_spec("triton") is None:
        raise OptionError("--kernels", f"{kernels} needs triton, which is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise OptionError(
            "--kernels",
            f"{kernels} is for GPUs; on the CPU leave it out, or set TRITON_INTERPRET=1 to have "
            "Triton's interpreter run the kernels, thousands of times slower",
        )


@dataclass(frozen=True, slots=True)
class Computation:
    """How a device computes, decided. kernels: of KERNELS; graphs: steps are replayed;
    fallback: one line that says what `auto` could not have and why, "" when it has all."""

    kernels: str
    graphs: bool
    fallback: str = ""

    @classmethod
    def choose(cls, device: str, kernels: str = AUTO, graphs: bool | None = None) -> Computation:
        """What was asked for, on `device` (cpu, cuda or cuda:N); AUTO and None are decided here.

        On a GPU triton's kernels, and graphs over them; on a CPU the reference without graphs, also
        under TRITON_INTERPRET, which is for tests. Raises OptionError("--kernels" or "--graphs")
        for what cannot be had.
        """
        on_gpu, fallback = device != "cpu", ""
        if kernels == AUTO:
            there = on_gpu and importlib.util.find_spec("triton") is not None
            kernels = "triton" if there else "reference"
            if on_gpu and not there:
                fallback = (
                    "triton is not installed: computing with plain torch, several times slower"
                )
        check_kernels(kernels, device)
        if graphs is None:
            graphs = on_gpu and kernels == "triton"
        if graphs and on_gpu and kernels == "reference":
            raise OptionError("--graphs", fallback or HOST_PLANNED)
        return cls(kernels, graphs, fallback)

    def __str__(self) -> str:
        return f"{self.kernels} kernels, graphs {'on' if self.graphs else 'off'}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the brain and the wire need to know of a served model and of the operator's options.

    All counts include nothing but what they name; row 0 and page 0 (trash) come on top of
    `rows_max` and inside `pages` respectively.
    """

    vocab_size: int
    """Ids the model can score: 0 <= id < vocab_size."""
    context_tokens: int
    """Longest sequence, prompt and output together."""
    page_tokens: int = 16
    pages: int = 1024
    """Pages of the pool of each layer group, the trash page 0 included."""
    windows: tuple[int, ...] = (0,)
    """Tokens that the layers of each layer group can see, the query's own included; 0 = all of them
    (full attention). Group 0 must be full: the prefix index stands on its pages. A model whose
    layers all have a window is one full group, whose kernels mask."""
    window_pages: int = 0
    """Pages of the pools of the groups with a window, as `pages`; 0 = the same number."""
    rows_max: int = 64
    """Requests in one step."""
    prefill_tokens: int = 512
    """Tokens of one step, decode rows first; what they leave is for prefill chunks."""
    mixed_tokens: int = 0
    """Tokens of a step that decodes and takes prompts as well, so that a long chunk does not hold
    up the rows beside it; prompts get half of them at least. At most prefill_tokens, and 0 = no
    bound but that."""
    draft_depth: int = 0
    """Most draft tokens of one row in one step (speculation); 0 = off."""
    steps_ahead: int = 2
    """Plans launched and not yet answered: 2 = one step ahead, 1 = overlap off."""
    queue_requests: int = 4096
    """Requests waiting for a row, and bound of a client's burst."""
    live_tokens: int = 2 << 20
    """Prompt tokens and output allowance, summed over all admitted requests."""
    bias_entries: int = 300
    """Entries of logit_bias per request; OpenAI's documented clients send at most 300."""
    stop_ids: int = 64
    """Stop token ids per request, those of the model included."""
    top_logprobs: int = 20
    choices: int = 32
    """Largest `n`."""
    host_pages: int = 0
    """Slots of the host tier of the KV cache, a page each; 0 = no tiers below the device."""
    disk_pages: int = 0
    """Blocks of the disk tier, a page each; 0 = no disk."""
    copies_max: int = 64
    """Copies between device and host that are not acknowledged, and as many moves to and from
    disk."""
    copy_timeout_s: float = 5.0
    """A copy that takes longer ends the worker; a move that does is not waited for."""
    timeout_s: float = 600.0
    """Deadline of a request that names none, and the largest it may name."""
    api_processes: int = 1

    def __post_init__(self) -> None:
        # A config that travelled as JSON has a list here.
        object.__setattr__(self, "windows", tuple(self.windows))
        for name in [f.name for f in fields(self) if f.name not in _MAY_BE_ZERO]:
            if not getattr(self, name) > 0:
                raise OptionError(_option(name), f"must be positive, got {getattr(self, name)}")
        if self.pages > PAGES_MAX:
            raise OptionError("--kv-pages", f"at most {PAGES_MAX}, got {self.pages}")
        if self.pages < 2:
            raise OptionError("--kv-pages", "needs at least 2: page 0 is the trash page")
        self._check_windows()
        if not 0 <= self.mixed_tokens <= self.prefill_tokens:
            raise OptionError(
                "--mixed-tokens",
                f"0 to --prefill-tokens ({self.prefill_tokens}), got {self.mixed_tokens}",
            )
        if not 0 <= self.draft_depth <= DRAFT_DEPTH_MAX:
            raise OptionError("--draft-depth", f"0 to {DRAFT_DEPTH_MAX}, got {self.draft_depth}")
        if self.steps_ahead > 2:
            raise OptionError("--steps-ahead", f"1 or 2, got {self.steps_ahead}")
        if self.rows_max > 4096:
            raise OptionError("--max-rows", f"at most 4096, got {self.rows_max}")
        for name in ("host_pages", "disk_pages"):
            if not 0 <= getattr(self, name) < 1 << 31:
                raise OptionError(_option(name), f"0 to 2**31 - 1, got {getattr(self, name)}")
        if self.host_pages and self.groups > 1:
            raise OptionError("--host-pages", "not together with windows: tiers hold full groups")
        if self.disk_pages and not self.host_pages:
            raise OptionError("--disk-pages", "needs --host-pages: the disk is filled through them")
        if self.disk_pages and self.copies_max < 2:
            raise OptionError("--copies-max", "at least 2 with a disk: a spill leaves one to fetch")
        if self.copies_max > 4096:
            raise OptionError("--copies-max", f"at most 4096, got {self.copies_max}")
        if self.live_tokens < self.context_tokens:
            raise OptionError(
                "--live-tokens",
                f"must hold one request of {self.context_tokens} tokens, got {self.live_tokens}",
            )

    def _check_windows(self) -> None:
        if not self.windows or self.windows[0] != 0 or not all(w > 0 for w in self.windows[1:]):
            raise OptionError(
                "--windows", f"a full group (0) and then windows above 0, got {self.windows}"
            )
        for window in self.windows[1:]:
            usable = self.pages_by_group[1] - 1
            if usable < self.window_need(window):
                raise OptionError(
                    "--window-pages",
                    f"a window of {window} tokens needs {self.window_need(window)} pages of "
                    f"{self.page_tokens} tokens for one row; there are {usable}",
                )

    @property
    def groups(self) -> int:
        """Layer groups, each with a pool and page tables of its own."""
        return len(self.windows)

    @property
    def pages_by_group(self) -> tuple[int, ...]:
        """Pages of each group's pool, the trash page included."""
        others = self.window_pages or self.pages
        return (self.pages, *(others for _ in self.windows[1:]))

    def window_need(self, window: int) -> int:
        """Pages that a row alone needs of a group with this window to compute one more token, be it
        at any offset in a page: what it sees, the token, and all drafts."""
        return min(self.table_columns, self.pages_for_tokens(window + self.draft_depth) + 1)

    @property
    def rows_total(self) -> int:
        """Rows of the row table: the trash row 0 and `rows_max` others."""
        return self.rows_max + 1

    @property
    def table_columns(self) -> int:
        """Static width of every page table: the maximum context, so width is never a graph key."""
        return math.ceil(self.context_tokens / self.page_tokens)

    @property
    def pages_usable(self) -> int:
        """Pages of a pool that requests can hold: all but the trash page."""
        return self.pages - 1

    @property
    def live_requests(self) -> int:
        """Admitted and not yet ended: waiting or in a row."""
        return self.queue_requests + self.rows_max

    @property
    def plan_tokens(self) -> int:
        """Bound of the admitted tokens of one plan: at least one longest request always fits."""
        return self.context_tokens + self.prefill_tokens

    @property
    def journal_bytes(self) -> int:
        """Size of one journal half that provably holds every live request at its largest.

        A live request is one admission record plus one copy of its tokens. Ended ones are kept
        without prompt and parameters, for clients that have not read their end when the core dies:
        as many as can be live, and three times as many that wait for their client after a core was
        replaced (ENDED_SHARES). A quarter is left for the records between two compactions.
        """
        record = JOURNAL_RECORD_BYTES + 16 * self.bias_entries + 8 * self.stop_ids
        live = self.live_requests * record + 4 * self.live_tokens
        ended = self.live_requests * JOURNAL_RECORD_BYTES + 4 * self.live_tokens
        return (live + ENDED_SHARES * ended) * 5 // 4 + 4096

    def pages_for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)


def _option(name: str) -> str:
    renamed = {
        "pages": "--kv-pages",
        "rows_max": "--max-rows",
        "context_tokens": "--max-context-tokens",
        "timeout_s": "--request-timeout-s",
    }
    return renamed.get(name, "--" + name.replace("_", "-"))
