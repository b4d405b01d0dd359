"""ops.attention.Scratch: its views are those of the buffer as it is now, and not without number."""

from __future__ import annotations

import torch

from holdfast.ops import attention
from holdfast.ops.attention import Scratch


def test_a_shape_asked_for_again_is_the_same_memory():
    scratch = Scratch(torch.device("cpu"))
    first = scratch.take("a", (3, 4), torch.float32)
    assert scratch.take("a", (3, 4), torch.float32) is first
    assert scratch.take("a", (2, 6), torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take("b", (3, 4), torch.float32).data_ptr() != first.data_ptr()
    assert scratch.take("a", (3, 4), torch.bfloat16).dtype == torch.bfloat16


def test_a_buffer_that_grew_gives_no_view_of_the_one_before():
    scratch = Scratch(torch.device("cpu"))
    small = scratch.take("a", (2, 2), torch.float32)
    large = scratch.take("a", (50, 50), torch.float32)
    again = scratch.take("a", (2, 2), torch.float32)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.addresses == (large.data_ptr(),)


def test_views_of_many_shapes_are_not_all_kept():
    scratch = Scratch(torch.device("cpu"))
    scratch.take("a", (1000, 8), torch.float32)
    for rows in range(1, 1000):
        assert scratch.take("a", (rows, 8), torch.float32).shape == (rows, 8)
        assert len(scratch._views) <= attention._VIEWS_MAX
