"""`holdfast bench offline`: output tokens a second of LLM.generate, and of transformers beside it.

Method. Both sides get the same requests (token ids), greedy, end tokens ignored, the same weights,
type of numbers and threads, in one process, one after the other, round by round, so that a change
of the machine's speed meets both. A side's time runs from the first request handed in to the last
token out; loading and one small warm-up are outside. Only requested output tokens count.

transformers: `generate` with its default KV cache, left padding, at batch 8, 32 and 64. A batch
runs as many steps as its longest request asks. Two ways to cut the requests into batches are tried,
as they come and sorted by output length (fewest wasted steps); each batch size then keeps the
faster one, a gift that no server could be given. Its best median is the peer's figure.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from holdfast.bench.report import table
from holdfast.bench.workload import Work
from holdfast.llm import LLM, SamplingParams
from holdfast.model.spec import ModelSpec
from holdfast.sizing import Sizing

PEER_BATCHES = (8, 32, 64)
ORDERS = ("plain", "sorted")
Report = Callable[[str, int, int], None]


def run(
    spec: ModelSpec,
    sizing: Sizing,
    work: Work,
    *,
    device: str,
    kernels: str,
    load: str,
    threads: int,
    repeats: int,
    peer: bool,
    report: Report,
) -> dict[str, Any]:
    """Measure; returns the row to print and keep. Seconds and tokens a second are floats."""
    tokens = work.total_output_tokens
    ours: list[Spent] = []
    other = PeerSide(spec, sizing.dtype, threads, work) if peer else None
    with LLM.prepared(
        spec,
        sizing,
        device=device,
        kernels=kernels,
        load=load,
        threads=threads,
        progress=report,
    ) as llm:
        _our_run(llm, _head(work, 4), lambda *_: None)
        for round_number in range(1, repeats + 1):
            label = f"holdfast, run {round_number}"
            ours.append(_our_run(llm, work, report, label))
            if other is not None:
                other.round(round_number, report)
    row: dict[str, Any] = {
        "model": spec.path.name,
        "work": work.name,
        "requests": work.requests,
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": tokens,
        "device": device,
        "dtype": sizing.dtype,
        "kernels": kernels,
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "rows_max": sizing.limits.rows_max,
        "holdfast": _side(ours, tokens),
    }
    if other is not None:
        row["transformers"] = other.figures()
        best = max(side["tokens_per_s"] for side in row["transformers"].values())
        row["speedup"] = round(row["holdfast"]["tokens_per_s"] / best, 3)
    return row


def show(row: dict[str, Any]) -> str:
    """A table of `run`'s answer."""
    sides = {f"holdfast, {row['rows_max']} rows": row["holdfast"]}
    sides.update({f"transformers, {k}": v for k, v in row.get("transformers", {}).items()})
    lines = [
        (
            name,
            f"{side['tokens_per_s']:,.0f}",
            f"{side['tokens_per_cpu_s']:,.0f}",
            f"{min(side['runs_s']):.2f}",
            f"{side['median_s']:.2f}",
            f"{max(side['runs_s']):.2f}",
            str(len(side["runs_s"])),
        )
        for name, side in sides.items()
    ]
    text = (
        f"{row['model']}: {row['requests']} requests, {row['prompt_tokens']:,} tokens in, "
        f"{row['output_tokens']:,} out; {row['dtype']}, {row['threads']} threads\n"
    )
    text += table(("", "tok/s", "per CPU s", "best s", "median s", "worst s", "runs"), lines)
    if "speedup" in row:
        text += f"\nholdfast / best of transformers: {row['speedup']:.2f}x"
    return text


class Spent(NamedTuple):
    """One run: by the clock, and on all CPUs of this process together."""

    wall_s: float
    cpu_s: float


class Watch:
    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> Spent:
        return Spent(time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s)


def _side(runs: list[Spent], tokens: int) -> dict[str, Any]:
    median = statistics.median(run.wall_s for run in runs)
    cpu = statistics.median(run.cpu_s for run in runs)
    return {
        "tokens_per_s": round(tokens / median, 1),
        # On a machine that others use too, this one moves less.
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "median_s": round(median, 3),
        "runs_s": [round(run.wall_s, 3) for run in runs],
        "runs_cpu_s": [round(run.cpu_s, 3) for run in runs],
    }


def _head(work: Work, count: int) -> Work:
    return Work(
        work.name, work.prompts[:count], tuple(min(8, n) for n in work.output_tokens[:count])
    )


def _our_run(llm: LLM, work: Work, report: Report, label: str = "warm-up") -> Spent:
    params = [
        SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        for count in work.output_tokens
    ]
    done = [0]

    def tokens_out(count: int) -> None:
        done[0] += count
        report(label, done[0], work.total_output_tokens)

    watch = Watch()
    # A tenant of its own: no run finds the prompts of an earlier one in the prefix cache.
    results = llm.generate(list(work.prompts), params, progress=tokens_out, tenant=label)
    spent = watch.stop()
    for result, wanted in zip(results, work.output_tokens, strict=True):
        produced = len(result.choices[0].token_ids)
        if produced != wanted:
            raise RuntimeError(f"a request gave {produced} tokens, not {wanted}")
    return spent


class PeerSide:
    """transformers on the same checkpoint and requests."""

    def __init__(self, spec: ModelSpec, dtype: str, threads: int, work: Work) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # our own bar is on the screen
        torch.set_num_threads(threads)
        self._torch = torch
        self._work = work
        self._model = AutoModelForCausalLM.from_pretrained(
            spec.path, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        # Greedy, and nothing of the checkpoint's own generation settings (end ids, penalties).
        self._model.generation_config = type(self._model.generation_config)(pad_token_id=0)
        self._runs: dict[tuple[int, str], list[Spent]] = {
            (batch, order): [] for batch in PEER_BATCHES for order in ORDERS
        }
        self._run(_head(work, 4), 4, "plain", lambda *_: None, "")

    def round(self, number: int, report: Report) -> None:
        """The first round tries both orders at each batch size, later ones the faster one."""
        for batch in PEER_BATCHES:
            orders = ORDERS if number == 1 else (self._better(batch),)
            for order in orders:
                label = f"transformers {batch}, run {number}"
                spent = self._run(self._work, batch, order, report, label)
                self._runs[batch, order].append(spent)

    def figures(self) -> dict[str, Any]:
        return {
            f"batch {batch}, {order}": _side(runs, self._work.total_output_tokens)
            for (batch, order), runs in self._runs.items()
        }

    def _better(self, batch: int) -> str:
        return min(ORDERS, key=lambda order: self._runs[batch, order][0].wall_s)

    def _run(self, work: Work, batch: int, order: str, report: Report, label: str) -> Spent:
        indexes = list(range(work.requests))
        if order == "sorted":
            indexes.sort(key=lambda i: (work.output_tokens[i], len(work.prompts[i])))
        done = 0
        watch = Watch()
        for at in range(0, len(indexes), batch):
            group = indexes[at : at + batch]
            self._generate([work.prompts[i] for i in group], [work.output_tokens[i] for i in group])
            done += sum(work.output_tokens[i] for i in group)
            report(label, done, work.total_output_tokens)
        return watch.stop()

    def _generate(self, prompts: list[tuple[int, ...]], outputs: list[int]) -> None:
        torch = self._torch
        width, steps = max(map(len, prompts)), max(outputs)
        ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            answer = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=steps, do_sample=False
            )
        if answer.shape != (len(prompts), width + steps):
            raise RuntimeError(f"transformers gave {tuple(answer.shape)}, not {steps} tokens each")
