"""What a drill reads of its server is of all that the server has done."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from holdfast.api.text import Tokenizer
from holdfast.drill.client import Stream
from holdfast.drill.graphs import NEEDS
from holdfast.drill.job import make_jobs
from holdfast.drill.server import DrillServer
from holdfast.model.spec import ModelSpec, resolve_model

TOKENS = 12
KINDS = ("decode", "mixed")


@pytest.mark.slow
def test_counts_of_a_worker_are_told_when_they_are_asked_for() -> None:
    spec = ModelSpec.load(resolve_model(None))
    encode = Tokenizer.load(spec.path, vocab_size=spec.vocab_size).encode
    jobs = [replace(job, max_tokens=TOKENS) for job in make_jobs(encode, "told", 4)]
    server = DrillServer(NEEDS, model=None, device="cpu", threads=1)
    try:
        assert server.wait_warm(150.0)
        for at, job in enumerate(jobs, 1):
            asyncio.run(_answer(server, job))
            server.tell()
            found = server.metrics()
            told = {kind: _sum(found, f'graph_steps_total{{kind="{kind}"') for kind in KINDS}
            # The first token is the prompt's.
            assert told == {"decode": at * (TOKENS - 1), "mixed": at}
        assert not _sum(found, "eager_steps_total")
    finally:
        server.close()


async def _answer(server: DrillServer, job: object) -> None:
    stream = Stream(job)  # type: ignore[arg-type]
    stream.start(server.address, server.name)
    await stream.finish()
    assert stream.whole


def _sum(samples: dict[str, float], begins: str) -> int:
    return int(sum(value for name, value in samples.items() if name.startswith(begins)))
