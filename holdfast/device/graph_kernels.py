"""What graphs of a GPU are made of: attention and draws that read a bucket on the device alone.

Stands between device.graphs, which knows buckets, and the kernels of ops, which know tensors. Used
by device.build; imports triton. On a CPU both run in Triton's interpreter, for tests.
"""

from __future__ import annotations

import torch

from holdfast.config import Limits
from holdfast.device.buckets import Bucket
from holdfast.errors import require
from holdfast.model.layer_ops import Attention
from holdfast.ops.attention import StaticBatch
from holdfast.ops.kernels.sample import KeyedDraws
from holdfast.wire.plan import StepPlan


class DeviceAttention:
    """A device.graphs.BucketAttention over an Attention that takes static batches."""

    name = "triton"
    on_device = True

    def __init__(self, attention: Attention, limits: Limits) -> None:
        """Raises InvariantError where there is more than full attention."""
        require(attention.on_device, "attention that plans on the host cannot be captured")
        require(limits.groups == 1, f"{limits.groups} layer groups; graphs know one")
        self._attention = attention
        self._page_tokens = limits.page_tokens

    @property
    def addresses(self) -> tuple[int, ...]:
        return self._attention.addresses

    def of(self, bucket: Bucket, plan: StepPlan | None) -> StaticBatch:
        """The plan has been staged; nothing of it is looked at."""
        return StaticBatch(
            page_table=bucket.page_table[0],
            lengths=bucket.seen,
            slots=bucket.slots[0],
            page_tokens=self._page_tokens,
        )


class KernelDraw:
    """A device.graphs.Draw by ops.kernels.sample."""

    def __init__(self, draws: KeyedDraws) -> None:
        self._draws = draws

    @property
    def addresses(self) -> tuple[int, ...]:
        return self._draws.addresses

    def __call__(self, logits: torch.Tensor, bucket: Bucket) -> None:
        tokens, finite = self._draws.sample(
            logits, bucket.seeds, bucket.draw_positions, bucket.temperature
        )
        bucket.drawn.copy_(tokens)
        bucket.finite.copy_(finite)
