"""Our side of timed generations: LLM.generate, in this process or in one that ends with its work.

`in_child` is for a machine whose GPU a peer needs next: the end of a process gives back all of its
memory, context and graphs, whatever a library caches.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from holdfast.bench.timed import OurSide, Report, Spent, Task
from holdfast.errors import OperatorError
from holdfast.llm import LLM, SamplingParams

# A child that says nothing for so long hangs: loading and steps report as they go.
SILENCE_S = 600.0
_END_S = 30.0
_REPORT_S = 0.1

Opener = Callable[[Report], LLM]


def in_process(open_llm: Opener, tasks: Sequence[Task], report: Report, side: OurSide) -> None:
    """Run every task; `side` is told each as it ends."""
    with open_llm(report) as llm:
        side.facts.update(facts(llm))
        for task in tasks:
            side.spent[task.key] = time_task(llm, task, report)


def facts(llm: LLM) -> dict[str, Any]:
    """Settings that an LLM decides by itself."""
    return {"steps_ahead": llm.limits.steps_ahead}


def in_child(open_llm: Opener, tasks: Sequence[Task], report: Report, side: OurSide) -> None:
    """The same in a process of its own. `open_llm` must be a function that can be pickled.

    Raises OperatorError with the child's words when it fails, ends or is silent for SILENCE_S.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, open_llm, list(tasks)), daemon=False)
    child.start()
    theirs.close()
    try:
        _listen(ours, report, side)
    except BaseException:
        child.kill()
        raise
    finally:
        ours.close()
        child.join(_END_S)
        if child.is_alive():
            child.kill()
            child.join(_END_S)


def time_task(llm: LLM, task: Task, report: Report) -> Spent:
    """From the first request handed in to the last token out."""
    work = task.work
    params = [
        SamplingParams(max_tokens=count, temperature=task.temperature, ignore_eos=True)
        for count in work.output_tokens
    ]
    done = [0]

    def tokens_out(count: int) -> None:
        done[0] += count
        report(task.key, done[0], work.total_output_tokens)

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    results = llm.generate(list(work.prompts), params, progress=tokens_out, tenant=task.tenant)
    spent = Spent(time.perf_counter() - wall_s, time.process_time() - cpu_s)
    for result, wanted in zip(results, work.output_tokens, strict=True):
        produced = len(result.choices[0].token_ids)
        if produced != wanted:
            raise RuntimeError(f"{task.key}: a request gave {produced} tokens, not {wanted}")
    return spent


def _listen(pipe: Connection, report: Report, side: OurSide) -> None:
    while True:
        if not pipe.poll(SILENCE_S):
            raise OperatorError(f"the measured engine said nothing for {SILENCE_S:g} s")
        try:
            kind, said = pipe.recv()
        except EOFError:
            raise OperatorError("the measured engine ended; what it said is above") from None
        if kind == "progress":
            report(*said)
        elif kind == "opened":
            side.facts.update(said)
        elif kind == "spent":
            side.spent.update(said)
        elif kind == "failed":
            raise OperatorError(said)
        else:
            return


def _child(pipe: Connection, open_llm: Opener, tasks: list[Task]) -> None:
    last_s = [0.0]

    def report(what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done >= total or now_s - last_s[0] >= _REPORT_S:
            last_s[0] = now_s
            pipe.send(("progress", (what, done, total)))

    try:
        with open_llm(report) as llm:
            pipe.send(("opened", facts(llm)))
            for task in tasks:
                pipe.send(("spent", {task.key: time_task(llm, task, report)}))
        pipe.send(("done", None))
    except OperatorError as error:
        pipe.send(("failed", str(error)))
