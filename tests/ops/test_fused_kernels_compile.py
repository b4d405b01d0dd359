"""The fused kernels compile for an H200 (sm_90) at real shapes, without a GPU, and spill nothing.

In a process of its own, where nothing is interpreted. Says nothing about results or speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from holdfast.ops import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="triton is not installed")

# Shapes of the 0.6B and the 8B model of the benches and of the bundled one.
SHAPES = {
    "0.6B": dict(hidden=1024, heads=16, kv_heads=8, head_dim=128, width=3072, vocab=151_936),
    "8B": dict(hidden=4096, heads=32, kv_heads=8, head_dim=128, width=12_288, vocab=151_936),
    "bundled": dict(hidden=320, heads=6, kv_heads=2, head_dim=64, width=896, vocab=6144),
}

SCRIPT = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from holdfast.ops.kernels import gate, norm, rope, sample

shape, dtype = json.loads(sys.argv[1]), sys.argv[2]
T, F, I, L = "*" + dtype, "*fp32", "*i32", "*i64"
H, V, D = shape["hidden"], shape["vocab"], shape["head_dim"]
block = triton.next_power_of_2(H)
half = triton.next_power_of_2(D // 2)
tiles = triton.cdiv(V, sample._TILE)
tiles_block = triton.next_power_of_2(tiles)
sized = {"VOCAB": V, "TILES": tiles}

# (kernel, arguments, constants, warps); arguments are aligned unless the kernel never asks.
TABLE = [
    *(
        (
            norm._add_rms_norm,
            {"x": T, "delta": T, "weight": T, "out": T, "eps": "fp32"},
            {"HIDDEN": H, "BLOCK": block, "ADD": add},
            norm.warps_for(block),
        )
        for add in (True, False)
    ),
    *(
        (
            rope._rotate_append,
            {
                "qkv": T, "q_norm": T, "k_norm": T, "positions": L, "table": F, "slots": L,
                "pool": T, "eps": "fp32", "layer": "i32", "context": "i32",
            },
            {
                "HEADS": shape["heads"], "KV_HEADS": shape["kv_heads"], "HEAD_DIM": D,
                "PAGE_TOKENS": 16, "LAYERS": 36, "NORM": normed, "HALF_BLOCK": half,
                "HEADS_BLOCK": rope.heads_of_program(half),
            },
            rope._WARPS,
        )
        for normed in (True, False)
    ),
    (
        gate._silu_mul,
        {"gate_up": T, "out": T},
        {"WIDTH": shape["width"], "BLOCK": gate._BLOCK},
        gate._WARPS,
    ),
    (
        sample._lead,
        {"logits": T, "tops": F, "leaders": I},
        {**sized, "TILE": sample._TILE},
        sample._WARPS,
    ),
    (
        sample._draw,
        {
            "logits": T, "seeds": L, "positions": L, "temperature": F, "tops": F, "leaders": I,
            "scores": F, "drawn": I,
        },
        {
            **sized, "TILE": sample._TILE, "PART": sample._PART, "TILES_BLOCK": tiles_block,
            "NOISE_MAX": sample.NOISE_MAX,
        },
        sample._WARPS,
    ),
    (
        sample._join,
        {
            "temperature": F, "tops": F, "leaders": I, "scores": F, "drawn": I, "tokens": L,
            "finite": "*u8",
        },
        {**sized, "TILES_BLOCK": tiles_block},
        1,
    ),
]

for kernel, arguments, constants, warps in TABLE:
    if "DEPENDENT" in kernel.arg_names:
        constants["DEPENDENT"] = True
    signature = {**arguments, **{name: "constexpr" for name in constants}}
    signature = {name: signature[name] for name in kernel.arg_names}
    unknown = set(kernel.do_not_specialize_on_alignment)
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and name not in unknown
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "launch_pdl": "DEPENDENT" in constants}
    done = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    ptx = done.asm["ptx"]
    assert ("griddepcontrol.wait" in ptx) == ("DEPENDENT" in constants), kernel
    # What ptxas says of the code that it makes of it; the driver alone would tell otherwise.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", os.devnull]
        said = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    print(json.dumps({
        "kernel": kernel.fn.__name__,
        "shared": done.metadata.shared,
        "spilled_bytes": sum(map(int, re.findall(r"(\\d+) bytes spill", said.stderr))),
        "registers": max(map(int, re.findall(r"Used (\\d+) registers", said.stderr))),
        "wide_loads": "ld.global.v4.b32" in ptx or "ld.global.L1" in ptx,
        "approximate_log": "lg2.approx" in ptx,
    }))
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("model", list(SHAPES))
def test_every_fused_kernel_compiles_for_sm_90(model, dtype, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(SHAPES[model]), dtype],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 8
    for each in found:
        assert each["spilled_bytes"] == 0 and each["registers"] <= 128, each
        assert each["shared"] <= 16 << 10, each
        # The noise is largest where the approximation is nothing but error.
        assert not each["approximate_log"], each
    # Rows of whole lines are read 16 bytes at a time, so the compiler knew their alignment.
    assert all(each["wide_loads"] for each in found if each["kernel"] == "_add_rms_norm"), found
