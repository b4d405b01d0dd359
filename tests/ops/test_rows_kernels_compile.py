"""ops.kernels.rows compiles for an H200 (sm_90) without a GPU, and its constants are the wire's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from holdfast.ops import kernels
from holdfast.wire import rows as wire_rows
from holdfast.wire.plan import ADMIT

pytestmark = pytest.mark.skipif(not kernels.available(), reason="triton is not installed")

# An 8B's table: 256 rows, 40,960 tokens of context in pages of 16; and an odd one of two groups.
TABLES = {
    "8B": {"ROWS_MAX": 256, "GROUPS": 1, "COLUMNS": 2560, "PAGE_TOKENS": 16, "TOKENS": 40961},
    "odd": {"ROWS_MAX": 33, "GROUPS": 2, "COLUMNS": 7, "PAGE_TOKENS": 3, "TOKENS": 20},
}

# In a process of its own: kernels that were decorated for the interpreter do not compile.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from holdfast.ops.kernels import rows

WIDE = {"out", "out_tokens", "out_positions", "out_slots", "out_lasts", "out_seeds",
        "out_draw_positions"}
found = {}
for table, sizes in json.loads(sys.argv[1]).items():
    fixed = {
        "ROWS_MAX": sizes["ROWS_MAX"], "GROUPS": sizes["GROUPS"],
        "TABLE_ROWS": sizes["ROWS_MAX"] + 1, "COLUMNS": sizes["COLUMNS"],
        "TOKEN_COLUMNS": sizes["TOKENS"], "PAGE_TOKENS": sizes["PAGE_TOKENS"],
        "BIAS": 300, "STOPS": 64, "QUERY_LEN": 1, "PLACED": True, "BLOCK": 256,
    }
    for name in ("clear_rows", "admit_rows", "write_pages", "digest_rows", "stage_bucket",
                 "stage_ragged", "stage_mixed", "advance_rows"):
        kernel = getattr(rows, name)
        pointers, constants = {}, {}
        for parameter in kernel.params:
            if parameter.is_constexpr:
                constants[parameter.name] = fixed[parameter.name]
                pointers[parameter.name] = "constexpr"
            elif parameter.name in WIDE:
                pointers[parameter.name] = "*i64"
            elif parameter.name == "bucket":
                pointers[parameter.name] = "i32"
            else:
                pointers[parameter.name] = "*fp32" if "temperature" in parameter.name else "*i32"
        source = ASTSource(kernel, pointers, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["cubin"]) > 0
        facts = {"shared": compiled.metadata.shared, "ptx": len(compiled.asm["ptx"])}
        spilled = [line for line in compiled.asm["ptx"].splitlines() if ".local" in line]
        found[f"{table} {name}"] = {**facts, "local": len(spilled)}
print(json.dumps(found))
"""


def test_every_kernel_compiles_for_sm_90_without_local_memory():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(TABLES)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 16
    for name, facts in found.items():
        assert facts["local"] == 0, f"{name} has local memory"
        assert facts["shared"] <= 48 << 10, f"{name} takes {facts['shared']} bytes"


def test_the_kernels_constants_are_the_wires():
    from holdfast.ops.kernels import rows

    assert int(wire_rows._C_FIELD) == rows.C_FIELD
    assert int(wire_rows._C_VALUE) == rows.C_VALUE
    assert int(wire_rows._C_FINAL) == rows.C_FINAL
    for name in ("STOPS", "BIAS", "TOKENS", "PAGES"):
        assert getattr(rows, f"{name}_FIELD") == getattr(wire_rows, f"_{name}")
    assert rows.GROUP_STRIDE == wire_rows._GROUP_STRIDE
    assert ADMIT.itemsize == 4 * rows.RECORD_WORDS
    for name in ("SEED", "LENGTH", "TOKENS_LEN", "TEMPERATURE", "BIAS_LEN", "STOP_LEN"):
        offset = ADMIT.fields[name.lower()][1]
        assert getattr(rows, f"{name}_WORD") * 4 == offset, name
    assert ADMIT.fields["row"][1] == 4 * 4
