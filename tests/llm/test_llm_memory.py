"""An LLM that was closed holds no weights and no KV cache, though somebody still holds the LLM."""

from __future__ import annotations

import weakref

import pytest

from holdfast import LLM, SamplingParams
from holdfast.errors import EngineFault


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
