"""An LLM that was closed holds no weights and no KV cache, though somebody still holds the LLM, and
whatever ended it."""

from __future__ import annotations

import weakref

import pytest

from holdfast import LLM, SamplingParams
from holdfast.errors import EngineFault, InvariantError, WorkerFault


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_what_was_closed_gives_its_memory_back(graphs) -> None:
    llm = LLM(graphs=graphs, threads=1, pages=32, rows_max=2, context_tokens=128)
    try:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
        memory = llm.engine._device.memory
        held = [weakref.ref(slab) for slab in (memory.weights, memory.kv)]
        del memory
        assert all(slab() is not None for slab in held)
    finally:
        llm.close()
    assert [slab() for slab in held] == [None, None]
    llm.close()  # harmless
    with pytest.raises(EngineFault, match="closed"):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))


def fails(llm: LLM) -> str:
    """What a generation says; no frame of it is kept."""
    try:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    except BaseException as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize(("kind", "failed"), [(WorkerFault, True), (KeyboardInterrupt, False)])
def test_a_failed_llm_gives_its_memory_back_as_well(monkeypatch, kind, failed) -> None:
    llm = LLM(graphs="on", threads=1, pages=32, rows_max=2, context_tokens=128)
    released: list[bool] = []
    own = llm._release
    monkeypatch.setattr(llm, "_release", lambda failed: released.append(failed) or own(failed))
    runner = llm.engine._device
    held = [weakref.ref(slab) for slab in (runner.memory.weights, runner.memory.kv)]

    def collect() -> None:
        raise kind("no result")

    runner.collect = collect
    assert fails(llm) == kind.__name__
    del runner, collect
    llm.close()
    assert [slab() for slab in held] == [None, None]
    assert released == [failed], "nothing is asked of a GPU that has failed"


def test_the_memory_of_a_thread_that_does_not_end_is_left_alone(monkeypatch) -> None:
    llm = LLM(threads=1, pages=32, rows_max=2, context_tokens=128)
    released: list[bool] = []
    monkeypatch.setattr(llm, "_release", released.append)

    class Stuck:
        def join(self, timeout_s: float) -> None: ...

        def is_alive(self) -> bool:
            return True

    monkeypatch.setattr(llm.engine, "_thread", Stuck())
    with pytest.raises(InvariantError, match="did not end"):
        llm.close()
    assert released == []
