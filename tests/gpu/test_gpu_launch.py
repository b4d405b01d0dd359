"""ops.kernels.launch: later launches of a kind skip Triton's look-up, and kinds keep apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of kernels that Triton was asked for."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    inner = JITFunction.run

    def run(self: Any, *args: Any, **named: Any) -> Any:
        names.append(self.__name__)
        return inner(self, *args, **named)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


def normed(rows: int, hidden: int, dtype: torch.dtype, offset: int = 0) -> tuple[Any, Any]:
    """(what the kernel gives, what torch does) of a norm; its input begins `offset` elements on."""
    from holdfast.ops.kernels.norm import add_rms_norm

    memory = torch.randn(rows * hidden + offset, device="cuda").to(dtype)
    x = memory[offset:].view(rows, hidden)
    weight = torch.rand(hidden, device="cuda").to(dtype)
    wide = x.float()
    expected = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
    out = add_rms_norm(x, None, weight, 1e-6, torch.empty_like(x))
    return out.float(), expected.to(dtype).float() * weight.float()


def test_a_kind_is_looked_up_once_and_every_kind_is_right(asked: list[str]) -> None:
    kinds = [
        (3, 512, torch.bfloat16, 0),
        (3, 512, torch.float32, 0),
        (3, 512, torch.bfloat16, 1),  # Not at a multiple of 16 bytes: another binary.
        (3, 384, torch.bfloat16, 0),
    ]
    for _ in range(2):
        for kind in kinds:
            found, expected = normed(*kind)
            torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert asked.count("_add_rms_norm") <= len(kinds), asked
    before = len(asked)
    for rows in (1, 7, 300):
        found, expected = normed(rows, 512, torch.bfloat16)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert len(asked) == before, "the number of rows is a grid and no kind"


def test_a_launch_goes_to_the_stream_that_is_current(asked: list[str]) -> None:
    normed(2, 512, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    from holdfast.ops.kernels.norm import add_rms_norm

    x = torch.randn((2, 512), device="cuda", dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.graph(graph):
        add_rms_norm(x, None, weight, 1e-6, out)
    torch.cuda.synchronize()
    assert not out.any(), "it was captured, not run"
    graph.replay()
    torch.cuda.synchronize()
    assert out.any()
