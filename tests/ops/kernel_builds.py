"""Compiles kernels for an H200 on a machine without one, and says what they take of it.

    python tests/ops/kernel_builds.py

prints one JSON line a kernel. BUILDS is the table: a name and a function that launches kernels on
tensors of device "meta", through the very class or function that the engine calls, so that what is
compiled here is what is launched there: arguments, constants, warps and stages. To have a kernel
looked at, add a line. Run as a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from holdfast.ops.kernels import dependent

H200 = GPUTarget("cuda", 90, 32)
H200_SMS = 132
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
# Two-dimensional tiles, so many deep, that a loop loads to.
_BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")


@dataclass(frozen=True)
class Build:
    """What one launch compiled to. name: "label: kernel"; spill_bytes: stack of a thread;
    buffers: tiles of shared memory that its pipeline turns through, 0 without a pipeline;
    tensor_products, of these of warp groups, and bulk_copies: instructions; specialised: integers
    of which some values would compile another kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    buffers: int
    tensor_products: int
    warp_group_products: int
    bulk_copies: int
    specialised: list[str]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def decode(
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
    rows: int,
    query_len: int = 1,
    *,
    mixed: bool = False,
):
    """Launch decode attention of a bucket; the graph's page table is as wide as the context.
    mixed: of the rows that decode beside chunks of prompts."""

    def launch() -> None:
        from holdfast.ops.kernels.decode_attention import DecodeAttention

        attention = DecodeAttention(
            "meta",
            rows_max=rows,
            query_len_max=query_len,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_tokens=16,
            context_max=40960,
            sm_count=H200_SMS,
        )
        tokens = rows * query_len
        attention.run(
            meta(tokens, (heads + 2 * kv_heads) * head_dim),
            meta(64, layers, 2, 16, kv_heads, head_dim),
            3,
            meta(rows, 2560, dtype=torch.int32),
            meta(rows, dtype=torch.int32),
            meta(tokens, heads * head_dim),
            query_len=query_len,
            first_tokens=meta(rows, dtype=torch.int32) if mixed else None,
        )

    return launch


def prefill(heads: int, kv_heads: int, head_dim: int, layers: int, window: int = 0):
    def launch() -> None:
        from holdfast.ops.kernels.prefill_attention import PrefillAttention

        attention = PrefillAttention(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_tokens=16
        )
        attention.run(
            meta(8192, (heads + 2 * kv_heads) * head_dim),
            meta(64, layers, 2, 16, kv_heads, head_dim),
            3,
            meta(4, 2560, dtype=torch.int32),
            meta(4, 512, dtype=torch.int32),
            meta(8192, heads * head_dim),
            window=window,
        )

    return launch


def gathered(heads: int, kv_heads: int, head_dim: int, layers: int, window: int = 0):
    """Launch prefill attention of rows whose K and V are gathered, and the gather."""

    def launch() -> None:
        from holdfast.ops.kernels.gather_kv import Gathered
        from holdfast.ops.kernels.warp_prefill import WarpPrefill

        scratch = meta(2, kv_heads, 1 << 15, head_dim)
        rows = Gathered(
            page_table=meta(4, 2560, dtype=torch.int32),
            places=meta(3, 4, dtype=torch.int32),
            owners=meta(256, dtype=torch.int32),
            used=meta(1, dtype=torch.int32),
            tiles=meta(4, 512, dtype=torch.int32),
        )
        WarpPrefill(scratch, heads=heads, kv_heads=kv_heads).run(
            meta(8192, (heads + 2 * kv_heads) * head_dim),
            meta(64, layers, 2, 16, kv_heads, head_dim),
            3,
            rows,
            meta(8192, heads * head_dim),
            window=window,
        )

    return launch


def product(n: int, k: int, rows: int, *, bias: bool = False):
    """Launch a product as the table says."""

    def launch() -> None:
        from holdfast.ops.kernels.small_matmul import SmallMatmul

        small = SmallMatmul("meta", [(n, k)], rows, sm_count=H200_SMS)
        config = small.config(n, k, rows)
        assert config is not None, "cuBLAS has it"
        small.run(meta(rows, k), meta(n, k), meta(n) if bias else None, meta(rows, n), config)

    return launch


# 8B and 0.6B: Qwen3's shapes; tiny: the bundled model's.
BUILDS: dict[str, Callable[[], None]] = {
    "8B decode of 1 row": decode(32, 8, 128, 36, 1),
    "8B decode of 128 rows": decode(32, 8, 128, 36, 128),
    "8B decode of 512 rows, not split": decode(32, 8, 128, 36, 512),
    "8B decode of 64 rows in a mixed step": decode(32, 8, 128, 36, 64, mixed=True),
    "8B decode of 512 rows in a mixed step, not split": decode(32, 8, 128, 36, 512, mixed=True),
    "8B verify of 32 rows, 4 drafts": decode(32, 8, 128, 36, 32, 5),
    "0.6B decode of 64 rows": decode(16, 8, 128, 28, 64),
    "tiny decode of 8 rows": decode(6, 2, 64, 7, 8),
    "head_dim 80, group 7, decode of 8 rows": decode(28, 4, 80, 28, 8),
    "head_dim 256, group 8, decode of 8 rows": decode(8, 1, 256, 18, 8),
    "8B gate and up of 1 row": product(24_576, 4096, 1),
    "8B down of 16 rows": product(4096, 12_288, 16),
    "8B down of 64 rows": product(4096, 12_288, 64),
    "0.6B output of 8 rows": product(1024, 2048, 8),
    "0.6B gate and up of 64 rows": product(6144, 1024, 64),
    "0.6B head of 1 row": product(151_936, 1024, 1),
    "tiny qkv of 24 rows, with bias": product(640, 320, 24, bias=True),
    "8B prefill": prefill(32, 8, 128, 36),
    "8B prefill in a window": prefill(32, 8, 128, 36, 4096),
    "0.6B prefill": prefill(16, 8, 128, 28),
    "tiny prefill": prefill(6, 2, 64, 7),
    "head_dim 256, group 8, prefill": prefill(8, 1, 256, 18),
    "8B prefill, gathered": gathered(32, 8, 128, 36),
    "8B prefill in a window, gathered": gathered(32, 8, 128, 36, 4096),
    "tiny prefill, gathered": gathered(6, 2, 64, 7),
    "head_dim 80, group 7, prefill, gathered": gathered(28, 4, 80, 28),
}


def launches(launch: Callable[[], None]) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """What `launch` launched: kernel, arguments in place, arguments by name with the options."""
    seen: list[tuple[JITFunction, tuple, dict[str, Any]]] = []
    before = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: seen.append((self, args, kwargs))
    try:
        launch()
    finally:
        JITFunction.run = before
    return seen


def build(label: str, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Build:
    given = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    given |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature, constants, aligned, specialised = {}, {}, {}, []
    for param in kernel.params:
        value = given.get(param.name, param.default)
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            if not param.do_not_specialize:
                aligned[(param.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            box, layout = list(value.block_shape), value.layout
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}{box},{layout!r}>"
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if not param.do_not_specialize:
                specialised.append(param.name)
    if isinstance(kernel, GluonJITFunction):
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, places, aligned)
    else:
        source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=H200, options=options)
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Build(
        name=f"{label}: {kernel.__name__}",
        registers=registers,
        spill_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        buffers=min(map(int, _BUFFERS.findall(compiled.asm["ttgir"])), default=0),
        tensor_products=ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        warp_group_products=ptx.count("wgmma.mma_async"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        specialised=specialised,
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, by the cuobjdump that triton carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def main() -> None:
    # What a GPU of Hopper's would be launched with.
    dependent._capable = lambda device: True
    for label, launch in BUILDS.items():
        for kernel, args, kwargs in launches(launch):
            print(json.dumps(asdict(build(label, kernel, args, kwargs))), flush=True)


if __name__ == "__main__":
    main()
