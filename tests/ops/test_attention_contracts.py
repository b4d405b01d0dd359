"""Launch contracts: strides of size-1 dimensions, packing, alignment, 32-bit reach."""

from __future__ import annotations

import pytest
import torch

from holdfast.errors import InvariantError
from holdfast.ops import contracts
from holdfast.ops.contracts import Reason


def test_a_degenerate_stride_of_size_one_is_made_canonical_without_moving_an_element() -> None:
    base = torch.arange(48.0).view(6, 8)
    odd = base.as_strided((6, 1, 8), (8, 1, 1))
    assert odd.is_contiguous(), "torch itself does not mind, which is the trap"
    assert contracts.launch_reason(odd) is Reason.STRIDE_OF_SIZE_ONE
    good = contracts.canonical(odd)
    assert good.stride() == (8, 8, 1) and torch.equal(good, odd)
    assert good.data_ptr() == odd.data_ptr()
    assert contracts.launch_reason(good) is None


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((3, 1, 4), (4, 999, 1), (4, 4, 1)),
        ((1, 1, 1), (7, 8, 9), (1, 1, 1)),
        ((2, 3, 1), (3, 1, 5), (3, 1, 1)),
        ((2, 1), (10, 3), (10, 1)),
        ((), (), ()),
    ],
)
def test_canonical_strides(shape, strides, expected) -> None:
    assert contracts.canonical_strides(shape, strides) == expected


def test_views_with_gaps_are_not_packed_but_may_be_launched_where_that_is_allowed() -> None:
    view = torch.zeros(4, 8)[:, :4]
    assert contracts.launch_reason(view) is Reason.NOT_PACKED
    assert contracts.launch_reason(view, packed=False) is None


def test_an_expanded_view_is_refused() -> None:
    view = torch.zeros(1, 8).expand(4, 8)
    assert contracts.launch_reason(view, packed=False) is Reason.NEGATIVE_OR_ZERO_STRIDE


def test_the_first_byte_must_be_aligned() -> None:
    assert contracts.launch_reason(torch.zeros(16)[1:]) is Reason.MISALIGNED
    with pytest.raises(InvariantError, match="K: the first byte"):
        contracts.require_launchable("K", torch.zeros(16)[1:])


def test_reach_is_counted_in_elements_up_to_the_last_that_fits_32_bits() -> None:
    assert contracts.reach((2, 3), (10, 2)) == 15
    assert contracts.reach((2, 0), (10, 2)) == 0
    assert contracts.int32_reason((1 << 31,), (1,)) is None
    assert contracts.int32_reason(((1 << 31) + 1,), (1,)) is Reason.BEYOND_INT32
    big = torch.empty(1, device="meta").expand(1 << 20, 1 << 12)
    assert contracts.int32_reason(big.shape, contracts.packed_strides(big.shape)) is not None
