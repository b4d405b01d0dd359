"""HfGenerate: transformers `generate` on the same checkpoint and requests, in this process.

With its default KV cache, left padding, at batch 8, 32 and 64, greedy. A batch runs as many steps
as its longest request asks. Two ways to cut the requests into batches are tried in the first run,
as they come and sorted by output length (fewest wasted steps); each batch size then keeps the
faster one, a gift that no server could be given. Its best median is the peer's figure.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Sequence

from holdfast.bench.timed import PeerSide, Report, Spent, Task
from holdfast.model.spec import ModelSpec

BATCHES = (8, 32, 64)
ORDERS = ("plain", "sorted")
NAME = "transformers"


class HfGenerate:
    """`threads`: of torch. The weights are read when it is made."""

    def __init__(self, spec: ModelSpec, dtype: str, threads: int, warm_up: Task) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # our own bar is on the screen
        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            spec.path, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
        # Greedy, and nothing of the checkpoint's own generation settings (end ids, penalties).
        self._model.generation_config = type(self._model.generation_config)(pad_token_id=0)
        self._spent: dict[tuple[int, str], dict[str, Spent]] = {
            (batch, order): {} for batch in BATCHES for order in ORDERS
        }
        self._run(warm_up, 4, "plain", lambda *_: None)

    def round(self, task: Task, report: Report) -> None:
        """One run at each batch size; the first one tries both orders."""
        for batch in BATCHES:
            tried = [self._spent[batch, order] for order in ORDERS]
            orders: Sequence[str] = ORDERS if not all(tried) else (self._better(batch),)
            for order in orders:
                self._spent[batch, order][task.key] = self._run(task, batch, order, report)

    def side(self) -> PeerSide:
        """Its best way to cut the requests, by the median."""

        def median(way: tuple[int, str]) -> float:
            return statistics.median(one.wall_s for one in self._spent[way].values())

        best = min((way for way in self._spent if self._spent[way]), key=median)
        options = {"batch": best[0], "order": best[1]}
        return PeerSide(NAME, importlib.metadata.version(NAME), self._spent[best], options)

    def _better(self, batch: int) -> str:
        def first(order: str) -> float:
            return next(iter(self._spent[batch, order].values())).wall_s

        return min(ORDERS, key=first)

    def _run(self, task: Task, batch: int, order: str, report: Report) -> Spent:
        work = task.work
        indexes = list(range(work.requests))
        if order == "sorted":
            indexes.sort(key=lambda i: (work.output_tokens[i], len(work.prompts[i])))
        done = 0
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for at in range(0, len(indexes), batch):
            group = indexes[at : at + batch]
            self._generate([work.prompts[i] for i in group], [work.output_tokens[i] for i in group])
            done += sum(work.output_tokens[i] for i in group)
            report(f"{NAME} {batch} {order}", done, work.total_output_tokens)
        return Spent(time.perf_counter() - wall_s, time.process_time() - cpu_s)

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
