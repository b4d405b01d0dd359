"""Sizing: the numbers add up, and what does not fit is refused with the numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import gpu_work
from holdfast.config import Limits
from holdfast.errors import OptionError
from holdfast.ops.kernels.decode_config import choose_config, splits_max
from holdfast.sizing import (
    GIB,
    GPU_CONTEXT_BYTES,
    MIB,
    GpuRoom,
    Wishes,
    gpu_mixed_tokens,
    memory_available_bytes,
    show_bytes,
    size,
)


class Small:
    """A model of 7168 bytes of KV a token and 40 MiB of weights."""

    vocab_size = 6144
    context_tokens = 4096
    hidden_size = 320
    intermediate_size = 896
    layers = 14
    heads = 5
    kv_heads = 1
    head_dim = 64

    def kv_token_bytes(self, dtype: str) -> int:
        return 7168

    def weights_bytes(self, dtype: str) -> int:
        return 40 * MIB


def sized(available: int = 24 * GIB, **wishes: object):
    return size(Small(), Wishes(**wishes), dtype="float32", available_bytes=available)


def test_on_a_large_machine_rows_times_context_binds() -> None:
    sizing = sized()
    assert sizing.binds == "rows x context"
    assert sizing.limits.pages == 64 * 256 + 1
    assert sizing.full_rows == sizing.limits.rows_max == 64


def test_on_a_small_machine_the_share_of_memory_binds() -> None:
    sizing = sized(4 * GIB)
    assert "available memory" in sizing.binds
    assert sizing.kv_bytes <= GIB
    assert sizing.kv_bytes + sizing.page_bytes > GIB


@pytest.mark.parametrize(
    ("available", "wishes", "option"),
    [
        (300 * MIB, {}, "MODEL"),
        (800 * MIB, {}, "memory"),
        (24 * GIB, {"pages": 10**6}, "--kv-pages"),
        (24 * GIB, {"kv_memory_bytes": 30 * GIB}, "--kv-memory-gib"),
        (24 * GIB, {"kv_memory_bytes": 1}, "--kv-memory-gib"),
        (24 * GIB, {"context_tokens": 5000}, "--max-context-tokens"),
        (24 * GIB, {"pages": 1}, "--kv-pages"),
        (24 * GIB, {"rows_max": 5000}, "--max-rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_option_to_change(
    available: int, wishes: dict, option: str
) -> None:
    with pytest.raises(OptionError) as caught:
        sized(available, **wishes)
    assert caught.value.option == option
    assert any(letter.isdigit() for letter in str(caught.value))
    assert "\n" not in str(caught.value)


@given(
    available=st.integers(0, 64 * GIB),
    rows=st.integers(1, 512),
    page_tokens=st.integers(1, 256),
    context=st.integers(1, 4096),
)
def test_a_sizing_never_takes_more_than_is_there_and_always_fits_one_request(
    available: int, rows: int, page_tokens: int, context: int
) -> None:
    try:
        sizing = sized(available, rows_max=rows, page_tokens=page_tokens, context_tokens=context)
    except OptionError:
        return
    assert sizing.left_bytes >= 0
    assert sizing.kv_bytes == sizing.limits.pages * page_tokens * 7168
    assert sizing.limits.pages_usable >= math.ceil(context / page_tokens)


def machine(root: Path, *, available_kib: int, files: dict[str, str], cgroup: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_tightest_cgroup_above_us_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        available_kib=1 << 20,
        cgroup="0::/a/b\n",
        files={
            "a/memory.max": str(500 * MIB),
            "a/memory.current": str(300 * MIB),
            "a/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
            "a/b/memory.max": "max",
            "a/b/memory.current": "1",
            "a/b/memory.stat": "inactive_file 0\n",
        },
    )
    assert memory_available_bytes(root) == 300 * MIB


def test_a_version_1_cgroup_counts_too(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        available_kib=1 << 20,
        cgroup="7:cpu,memory:/docker/x\n0::/\n",
        files={
            "memory/memory.limit_in_bytes": str(256 * MIB),
            "memory/memory.usage_in_bytes": str(56 * MIB),
            "memory/memory.stat": "total_inactive_file 0\n",
        },
    )
    assert memory_available_bytes(root) == 200 * MIB


def test_without_cgroups_the_kernels_estimate_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, available_kib=1 << 20, cgroup="0::/\n", files={})
    assert memory_available_bytes(root) == GIB


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (GIB, "1.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_bytes_are_shown_with_binary_units(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


# --- on a GPU ---


def sized_on_gpu(
    free: int = 139 * GIB,
    *,
    model: object | None = None,
    total: int = 140 * GIB,
    streams: bool = True,
    utilization: float = 0.9,
    processes: int = 2,
    kernels: str = "reference",
    graphs: bool = False,
    **wishes: object,
):
    gpu = GpuRoom(total_bytes=total, free_bytes=free, utilization=utilization, processes=processes)
    return size(
        model or Small(),
        Wishes(**wishes),
        dtype="bfloat16",
        available_bytes=24 * GIB,
        gpu=gpu,
        kernels=kernels,
        graphs=graphs,
        streams=streams,
    )


def test_a_large_gpu_holds_every_row_at_the_longest_context() -> None:
    sizing = sized_on_gpu()
    assert sizing.binds == "rows x context"
    assert sizing.full_rows == sizing.limits.rows_max
    assert sizing.needed_bytes == sizing.journal_bytes + sizing.process_bytes


@pytest.mark.parametrize("asked", [None, 0])
def test_beside_decode_a_gpu_takes_few_prompt_tokens_and_a_cpu_all_of_a_step(asked) -> None:
    def mixed(sizing: object, **wishes: object) -> int:
        return sizing(mixed_tokens=asked, **wishes).limits.mixed_tokens

    assert mixed(sized_on_gpu, prefill_tokens=8192) == 4096
    assert mixed(sized_on_gpu, prefill_tokens=700) == 700
    assert mixed(sized_on_gpu, streams=False) == 8192
    assert mixed(sized, prefill_tokens=8192) == 8192
    assert mixed(sized) == 512


@pytest.mark.parametrize(
    ("layers", "hidden", "intermediate", "heads", "tokens"),
    # Shapes of Qwen3 0.6B, 8B, 14B and Llama 3 70B and 405B: 50 ms of 700 TFLOP/s, a power of two.
    [
        (28, 1024, 3072, 16, 4096),
        (36, 4096, 12288, 32, 2048),
        (40, 5120, 17408, 40, 1024),
        (80, 8192, 28672, 64, 256),
        (126, 16384, 53248, 128, 256),
    ],
)
def test_larger_models_take_fewer_prompt_tokens_beside_decode(
    layers: int, hidden: int, intermediate: int, heads: int, tokens: int
) -> None:
    model = Small()
    model.layers, model.hidden_size, model.intermediate_size = layers, hidden, intermediate
    model.heads, model.kv_heads, model.head_dim = heads, 8, 128
    assert gpu_mixed_tokens(model) == tokens


def test_a_large_gpu_takes_large_steps_and_a_small_one_those_of_a_cpu() -> None:
    large, small = sized_on_gpu().limits, sized_on_gpu(free=20 * GIB, total=24 * GIB).limits
    assert (large.rows_max, large.prefill_tokens) == (256, 8192)
    assert (small.rows_max, small.prefill_tokens) == (64, 512)
    asked = sized_on_gpu(rows_max=8, prefill_tokens=100).limits
    assert (asked.rows_max, asked.prefill_tokens) == (8, 100)


def test_prompt_tokens_beside_decode_are_what_was_asked_for_on_any_device() -> None:
    for sizing in (sized, sized_on_gpu):
        limits = sizing(prefill_tokens=8192, mixed_tokens=2000).limits
        assert limits.mixed_tokens == 2000
        with pytest.raises(OptionError, match=r"--mixed-tokens.*512.*513"):
            sizing(prefill_tokens=512, mixed_tokens=513)


def test_the_utilization_bounds_what_is_taken_of_a_gpu_with_what_others_hold() -> None:
    sizing = sized_on_gpu(rows_max=4096, utilization=0.5)
    taken = GIB + sizing.weights_bytes + sizing.kv_bytes + sizing.gpu_work_bytes
    assert sizing.binds == "--gpu-memory-utilization"
    assert taken <= 70 * GIB < taken + sizing.page_bytes
    other = sized_on_gpu(free=100 * GIB, rows_max=4096, utilization=0.5)
    assert other.kv_bytes <= sizing.kv_bytes - 38 * GIB


def test_without_a_standby_a_gpu_has_room_for_more_pages() -> None:
    wishes = {"rows_max": 4096, "utilization": 0.2}
    both, alone = sized_on_gpu(**wishes), sized_on_gpu(processes=1, **wishes)
    assert both.gpu_work_bytes == 2 * alone.gpu_work_bytes
    assert alone.limits.pages > both.limits.pages


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"free": GIB}, "--gpu-memory-utilization"),
        ({"utilization": 0.01}, "--gpu-memory-utilization"),
        ({"utilization": 0.0}, "--gpu-memory-utilization"),
        ({"utilization": 1.1}, "--gpu-memory-utilization"),
        ({"pages": 10**7}, "--kv-pages"),
        ({"kv_memory_bytes": 139 * GIB}, "--kv-memory-gib"),
    ],
)
def test_what_does_not_fit_a_gpu_is_refused_by_the_option_to_change(
    changes: dict, option: str
) -> None:
    with pytest.raises(OptionError) as caught:
        sized_on_gpu(**changes)
    assert caught.value.option == option
    assert any(letter.isdigit() for letter in str(caught.value))


# --- what kernels and graphs take of it ---


class Eight(Small):
    """Qwen3-8B's dimensions, as far as they count here."""

    vocab_size = 151936
    context_tokens = 40960
    hidden_size = 4096
    intermediate_size = 12288
    layers = 36
    heads = 32
    kv_heads = 8
    head_dim = 128


def wide(**changes: int) -> Limits:
    chosen = {"context_tokens": 40960, "pages": 10_000, "rows_max": 64, "live_tokens": 1 << 20}
    return Limits(vocab_size=Eight.vocab_size, **(chosen | changes))


def test_kernels_take_less_than_the_reference_and_graphs_more_than_kernels() -> None:
    wishes = {"rows_max": 4096, "utilization": 0.2}
    reference = sized_on_gpu(**wishes)
    kernels = sized_on_gpu(kernels="triton", **wishes)
    graphs = sized_on_gpu(kernels="triton", graphs=True, **wishes)
    assert kernels.gpu_work_bytes < graphs.gpu_work_bytes
    assert kernels.gpu_work_bytes < reference.gpu_work_bytes
    # What graphs take is not handed out as pages.
    taken = GIB + graphs.weights_bytes + graphs.kv_bytes + graphs.gpu_work_bytes
    assert taken <= 28 * GIB < taken + graphs.page_bytes
    assert graphs.limits.pages < kernels.limits.pages


def test_each_part_of_what_graphs_take_grows_with_what_it_is_made_of() -> None:
    def work(graphs: bool = True, **changes: int) -> int:
        return gpu_work.work_bytes(
            Eight(), wide(**changes), itemsize=2, kernels="triton", graphs=graphs
        )

    # Logits of a bucket in bfloat16, twice, and the general sampler's 48 bytes a word.
    rows = work(rows_max=128) - work(rows_max=64)
    assert rows > 64 * 151936 * (48 + 4)
    # Twice the rotations: 40,960 positions of 128 numbers are 20 MiB each.
    assert gpu_work.rotation_bytes(Eight(), wide()) == 20 * MIB
    longer = work(context_tokens=40960) - work(context_tokens=20480)
    assert longer > 2 * 10 * MIB
    # Page tables of 2,560 columns in the rows and again in the bucket.
    assert gpu_work.row_state_bytes(wide()) > 2 * 64 * 2560 * 4
    # An idle standby with graphs stays below the 3 GiB that it may take, its context included.
    assert GPU_CONTEXT_BYTES + work() < 3 * GIB
    assert 0 < work() - work(graphs=False) < 400 * MIB
    # Of steps with prompts: rows of the largest bucket, which is as long as the host would be
    # waited for, and its page tables; four graphs of 36 layers.
    rows = 512 * (2 * (4 + 2.5 + 9) * 4096 + 24)
    tables = (64 + 16) * 2560 * 4
    assert 0 < gpu_work.mixed_buffer_bytes(Eight(), wide(), 2) - rows - tables < 32 << 10
    assert gpu_work.mixed_buffer_bytes(Eight(), wide(prefill_tokens=8), 2) < 18 * MIB
    assert 32 * MIB < gpu_work.mixed_graph_bytes(Eight(), wide()) < 64 * MIB
    # They gather prompts of any length, where eager steps gather long ones.
    short = wide(prefill_tokens=8)
    assert gpu_work.gather_bytes(Eight(), short, 2) == 0
    assert gpu_work.gather_bytes(Eight(), short, 2, graphs=True) == 128 * MIB


@pytest.mark.parametrize("rows, page_tokens, context", [(5, 16, 512), (64, 7, 1000), (1, 1, 64)])
def test_what_is_counted_is_what_the_device_makes(
    rows: int, page_tokens: int, context: int
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from holdfast.device.device_rows import DeviceRows
    from holdfast.ops.attention_triton import TritonAttention
    from holdfast.ops.kernels.decode_attention import DecodeAttention
    from holdfast.ops.kernels.rope import rotation_table
    from holdfast.ops.kernels.sample import KeyedDraws

    limits = wide(rows_max=rows, page_tokens=page_tokens, context_tokens=context)

    def held(thing: object) -> int:
        """Bytes of the memory behind an object's tensors, each counted once."""
        found = {}
        for value in vars(thing).values():
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return sum(found.values())

    made = DeviceRows(limits, "cpu")
    bucket = made.bucket(rows)
    static = sum(
        buffer.numel() * buffer.element_size()
        for name in bucket.__dataclass_fields__
        if name not in ("drawn", "finite")
        for buffer in (getattr(bucket, name),)
    )
    assert held(made) + held(made.frames) + static == gpu_work.row_state_bytes(limits)
    assert held(KeyedDraws(limits.vocab_size, rows, "cpu")) == gpu_work.draw_bytes(Eight(), limits)
    table = rotation_table(torch.ones(64), context)
    assert table.nbytes == gpu_work.rotation_bytes(Eight(), limits)
    attention = DecodeAttention(
        "cpu",
        rows_max=rows,
        query_len_max=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        page_tokens=page_tokens,
        context_max=limits.table_columns * page_tokens,
        sm_count=132,
    )
    assert attention.workspace_bytes <= gpu_work.attention_workspace_bytes(Eight(), limits, 2)
    made_of = []
    TritonAttention(
        "cpu",
        rows_max=rows,
        query_len_max=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        page_tokens=page_tokens,
        context_max=limits.table_columns * page_tokens,
        make_gathered=lambda scratch, **_: made_of.append(scratch.nbytes),
    )._gathered_rows(
        np.array([context]),
        np.array([0]),
        torch.empty((1, 1, 2, page_tokens, 8, 128), dtype=torch.bfloat16),
        torch.bfloat16,
    )
    assert sum(made_of) == gpu_work.gather_bytes(Eight(), limits, 2)
    assert gpu_work.gather_bytes(Eight(), limits, 4) == 0


@given(
    rows=st.integers(1, 600),
    kv_heads=st.sampled_from([1, 2, 4, 8, 12]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    itemsize=st.sampled_from([2, 4]),
    context=st.integers(1, 200_000),
    sm_count=st.integers(1, 192),
)
def test_no_smaller_gpu_cuts_a_bucket_in_more_parts_than_is_counted(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, context: int, sm_count: int
) -> None:
    shape = rows, kv_heads, head_dim, itemsize, context
    assert choose_config(*shape, sm_count).splits <= splits_max(*shape, 192)
