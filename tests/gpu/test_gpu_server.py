"""A whole server on a GPU: streams survive its worker, token for token."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gpukit import Server, until_streaming

TOKENS = 200
PROMPTS = [f"Page {number} of the manual says that " * (1 + number % 5) for number in range(32)]


def test_32_streams_survive_a_killed_worker_with_the_tokens_of_an_undisturbed_run(tmp_path: Path):
    arguments = ("--device", "cuda:0", "--dtype", "float32", "--kv-pages", "4000")
    with Server(*arguments, log=tmp_path / "log") as server:
        undisturbed = server.answer(PROMPTS, TOKENS)
        assert [stream.error for stream in undisturbed] == [""] * len(PROMPTS)
        server.wait_standby()
        streams, threads = server.stream(PROMPTS, TOKENS)
        until_streaming(streams, 5)
        os.kill(server.process("holdfast worker")["pid"], signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert [(stream.error, stream.finish) for stream in streams] == [("", "length")] * 32
        assert [stream.text for stream in streams] == [stream.text for stream in undisturbed]
        assert server.process("holdfast worker")["epoch"] == 2
        metrics = server.metrics()
    assert "holdfast_compiles_after_ready_total 0.0" in metrics
    assert 'holdfast_process_restarts_total{role="worker"} 1.0' in metrics
